"""How many processes there are is found out when it matters, not only when a model is attached."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from families import llama, tokens

from distributed.ranks import on_ranks
from lisa_kernels import LISA, InputError, attach
from lisa_kernels.distributed import check_one_process, process_count

METHOD = LISA(active_layers=1, period=2)


def sentences(rank: int) -> tuple[int, str, str]:
    found = []
    with pytest.MonkeyPatch.context() as patch:
        # As the order of lines may have it: the group comes later.
        patch.setattr(dist, "is_initialized", lambda: False)
        model = llama()
        attach(model, METHOD)
    for attempt in (lambda: model(**tokens()), lambda: check_one_process("this Trainer")):
        with pytest.raises(InputError) as caught:
            attempt()
        found.append(str(caught.value))
    return process_count(), found[0], found[1]


def test_a_model_attached_before_there_was_a_group_is_refused() -> None:
    """It would train alone on each rank, and nobody would know; what is made for one process says so too."""
    for count, late, alone in on_ranks(sentences):
        assert count == 2
        assert "attached before its process was one of 2" in late
        assert "attach after init_process_group(), Accelerator() or TrainingArguments()" in late
        assert alone.startswith("this is one of 2 processes of torch.distributed, and this Trainer is made for one")


def test_without_a_group_there_is_one_process() -> None:
    assert process_count() == 1
    check_one_process("this Trainer")
