"""Planned memory of training LaTtE-Flow's published size, in groups and not, beside its frozen backbone.

    python -m bench.flow_memory            # plans, records the rows and writes the table into bench/README.md
    python -m bench.flow_memory --report   # only the table

The replica has the geometry of Qwen2-VL-2B's language layers, which its paper (arXiv 2506.06952) trains beside that
model, frozen. Batch and latents of the paper are not known here: 16 images of 16 × 16 latents of 32 channels, a token
each, and texts of 64 tokens were chosen.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from bench.flow_table import report
from bench.rows import append_row
from lisa_kernels import TimestepExperts
from lisa_kernels.flow.block import FlowBlock, ImageAttention
from lisa_kernels.flow.embeddings import Head, Patches, TimeEmbedding
from lisa_kernels.flow.path import flow_loss
from lisa_kernels.flow.residual_attention import ContextKeys
from lisa_kernels.plan.flow import FlowWorkload, plan_flow
from lisa_kernels.plan.result import Plan

LAYERS, HIDDEN, INNER, HEADS, SHARED_HEADS, HEAD_WIDTH = 28, 1536, 8960, 12, 2, 128
VOCABULARY = 151_936
# Of the backbone's vision tower, which rests on the device too: 665 M in its published count.
VISION_PARAMETERS = 665_000_000
IMAGES, CHANNELS, SIDE, TEXT_TOKENS = 16, 32, 16, 64
GROUPS = 4

RUNS: dict[str, dict[str, Any]] = {
    "dense, all layers together": {"groups": 1},
    "4 groups at once: routed by time, all gradients and moments kept": {"groups": GROUPS, "together": True},
    "4 groups in turn, moments on the device": {"groups": GROUPS, "retired_state": "keep"},
    "4 groups in turn, moments paged": {"groups": GROUPS},
    "4 groups in turn, moments and weights paged": {"groups": GROUPS, "resting_weights": "page"},
}


# Pages are moments; what comes ahead of weights is counted with them.
_PARTS = {
    "weights": "weights", "gradients": "gradients", "optimizer state": "moments", "pages": "moments",
    "saved activations": "saved activations",
}  # fmt: skip


class GatedNetwork(nn.Module):
    """The feed-forward network of the backbone's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x's shape."""
        out: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out


def _block() -> FlowBlock:
    query, output = (nn.Linear(HIDDEN, HIDDEN, bias=bias) for bias in (True, False))
    key, value = (nn.Linear(HIDDEN, SHARED_HEADS * HEAD_WIDTH) for _ in range(2))
    attention = ImageAttention(query, key, value, output, HEAD_WIDTH)
    return FlowBlock(attention, nn.RMSNorm(HIDDEN), GatedNetwork(), nn.RMSNorm(HIDDEN), HIDDEN, HIDDEN)


class Replica(nn.Module):
    """The layers that generate, and the weights of the backbone that rests beside them.

    together: every group runs on its share of the batch, so that all of them train in one step.
    """

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.patches = Patches(CHANNELS, SIDE, SIDE, 1, HIDDEN)
        self.times = TimeEmbedding(HIDDEN)
        self.blocks = nn.ModuleList(_block() for _ in range(LAYERS))
        self.head = Head(CHANNELS, SIDE, SIDE, 1, HIDDEN, HIDDEN)
        frozen = VISION_PARAMETERS + VOCABULARY * HIDDEN + LAYERS * sum(p.numel() for p in _backbone_layer())
        self.backbone = nn.Parameter(torch.empty(frozen, dtype=torch.bfloat16), requires_grad=False)
        self.together = together

    def forward(self, x: Tensor, t: Tensor, context: list[ContextKeys]) -> Tensor:
        """Return the velocity; context: keys and values of each layer of the backbone."""
        if self.together:
            size, part = LAYERS // GROUPS, IMAGES // GROUPS
            parts = [
                self._velocity(list(self.blocks)[k * size : (k + 1) * size], x[rows], t[rows], context, rows)
                for k, rows in ((k, slice(k * part, (k + 1) * part)) for k in range(GROUPS))
            ]
            return torch.cat(parts)
        return self._velocity(list(self.blocks), x, t, context, slice(None))

    def _velocity(
        self, blocks: list[nn.Module], x: Tensor, t: Tensor, context: list[ContextKeys], rows: slice
    ) -> Tensor:
        tokens, embedding = self.patches(x), self.times(t)
        for block, kept in zip(blocks, context):
            tokens, _ = block(tokens, embedding, None, ContextKeys(kept.key[rows], kept.value[rows]))
        velocity: Tensor = self.head(tokens, embedding)
        return velocity


def _backbone_layer() -> list[nn.Parameter]:
    """Return the parameters of a layer of the backbone: those of a replica's without the parts that t modulates."""
    with torch.device("meta"):
        block = _block()
    added = set(block.modulation.parameters()) | set(block.output_norm.parameters())
    return [param for param in block.parameters() if param not in added]


def planned(groups: int, together: bool = False, **method: Any) -> Plan:
    """Return the plan of one run."""
    with torch.device("meta"):
        model = Replica(together).bfloat16()

    def loss(model: nn.Module, times: Tensor) -> Tensor:
        images = torch.empty(IMAGES, CHANNELS, SIDE, SIDE, dtype=torch.bfloat16, device="meta")
        keys = torch.empty(IMAGES, SHARED_HEADS, TEXT_TOKENS, HEAD_WIDTH, dtype=torch.bfloat16, device="meta")
        # The backbone has read the texts, and keeps keys and values of each of its layers.
        context = [ContextKeys(keys.clone(), keys.clone()) for _ in range(LAYERS)]
        return flow_loss(model, images, times, context)

    experts = TimestepExperts(groups=1 if together else groups, **method)
    return plan_flow(model, loss, FlowWorkload("qwen2-vl-2b replica", experts, IMAGES), blocks="blocks")


def record(name: str) -> None:
    """Plan one run and add its row."""
    plan = planned(**RUNS[name])
    alive, most, peak_training, training = dict.fromkeys(_PARTS.values(), 0), dict[str, int](), 0, 0
    for event in plan.trace.events:
        part = _PARTS.get(event.category, "others")
        alive[part] = alive.get(part, 0) + event.bytes
        most[part] = max(most.get(part, 0), alive[part])
        training += event.bytes if part != "weights" else 0
        peak_training = max(peak_training, training)
    append_row(
        "flow_memory",
        {
            "run": name, "images": IMAGES, "image_tokens": SIDE * SIDE, "text_tokens": TEXT_TOKENS,
            "peak_bytes": plan.peak_bytes, "split_bytes": plan.split, "most_bytes": most,
            "training_bytes": peak_training,
        },
    )  # fmt: skip


def main() -> None:
    """Plan, record, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only the table from the rows that exist")
    if not parser.parse_args().report:
        for name in RUNS:
            record(name)
    report(["flow memory"])


if __name__ == "__main__":
    main()
