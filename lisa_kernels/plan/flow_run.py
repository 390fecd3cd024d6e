"""The memory of a run of `lisa-kernels flow train`, known before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lisa_kernels.errors import NotRehearsedError
from lisa_kernels.flow.build import new_model
from lisa_kernels.flow.data import Images
from lisa_kernels.flow.options import FlowOptions
from lisa_kernels.flow.path import flow_loss
from lisa_kernels.plan.flow import FlowWorkload, plan_flow


def plan_flow_run(options: FlowOptions, images: Images, device: torch.device) -> int:
    """Return the peak in bytes: of two turns of each group, and of the averages of all weights, which stay.

    Raises NotRehearsedError beside a backbone, whose layers have values already.
    """
    if options.backbone is not None:
        raise NotRehearsedError("the layers of --backbone are copied with their values, and a plan wants none.")
    method = options.build_method()
    with torch.device("meta"):
        model = new_model(options, images, method.intervals()).train()
        pixels = torch.empty(options.batch_size, *images.shape)
        labels = torch.zeros(options.batch_size, dtype=torch.int64)

    def loss(planned: nn.Module, times: Tensor) -> Tensor:
        return flow_loss(planned, pixels, times, labels)

    averages = sum(param.numel() * param.element_size() for param in model.parameters())
    workload = FlowWorkload(
        "flow", method, options.batch_size, options.accumulate, options.max_grad_norm or None, paging=options.paging
    )  # fmt: skip
    return plan_flow(model, loss, workload, "blocks", on_gpu=device.type == "cuda").peak_bytes + averages
