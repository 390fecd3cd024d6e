"""What several processes agree on, what travels between them, and which wrappers cannot be followed."""

from lisa_kernels.distributed.absent import absent_others
from lisa_kernels.distributed.fully_sharded import (
    at_rest,
    check_fully_sharded,
    check_sent,
    gradients_at_home,
    is_unit,
    settle,
    share_out,
    units_of,
    whole_state,
)
from lisa_kernels.distributed.launcher import Launch, check_one_launched, environment_of_one, read_launch, read_launcher
from lisa_kernels.distributed.processes import Sharing, check_one_process, process_count
from lisa_kernels.distributed.ranks import LostRankError, Ranks, join, on_first, others_heard, part, ranks_of, together
from lisa_kernels.distributed.reduction import GradientReduction, check_wire_dtype
from lisa_kernels.distributed.shard_files import read_state, read_tensors, write_together
from lisa_kernels.distributed.shards import first_element, first_row, is_sharded, local, total_norm, whole
from lisa_kernels.distributed.wrappers import REPLACED, check_not_shared_out, check_not_wrapped

__all__ = [
    "REPLACED",
    "GradientReduction",
    "Launch",
    "LostRankError",
    "Ranks",
    "Sharing",
    "absent_others",
    "at_rest",
    "check_fully_sharded",
    "check_not_shared_out",
    "check_not_wrapped",
    "check_one_launched",
    "check_one_process",
    "check_sent",
    "check_wire_dtype",
    "environment_of_one",
    "first_element",
    "first_row",
    "gradients_at_home",
    "is_sharded",
    "is_unit",
    "join",
    "local",
    "on_first",
    "others_heard",
    "part",
    "process_count",
    "ranks_of",
    "read_launch",
    "read_launcher",
    "read_state",
    "read_tensors",
    "settle",
    "share_out",
    "together",
    "total_norm",
    "units_of",
    "whole",
    "whole_state",
    "write_together",
]
