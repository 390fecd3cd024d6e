"""The model of a run, by its options and images, or by what its files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lisa_kernels.errors import InputError
from lisa_kernels.flow.data import Images
from lisa_kernels.flow.intervals import Intervals
from lisa_kernels.flow.transformer import FlowShape, FlowTransformer, GroupedFlow
from lisa_kernels.train.identity import checksum_of_folder
from lisa_kernels.train.models import load_model, load_tokenizer

if TYPE_CHECKING:
    from lisa_kernels.flow.options import FlowOptions
    from lisa_kernels.flow.text_flow import Reader

# Of flows with layers of their own, where nothing is given.
LAYERS, HIDDEN, HEADS = 8, 128, 4


def new_model(options: FlowOptions, images: Images, intervals: Intervals) -> GroupedFlow:
    """Return the model that a run begins with, on the CPU; its random weights are a function of the seed."""
    shape = FlowShape(
        *images.shape, len(images.names), options.patch, options.hidden or HIDDEN, options.layers or LAYERS,
        options.heads or HEADS, reuse=options.residual_attention,
    )  # fmt: skip
    reader, texts = None, [images.text(label) for label in range(len(images.names))]
    if options.backbone is not None:
        reader = load_reader(options.backbone, texts, options.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return FlowTransformer(shape, intervals) if reader is None else _text_flow(shape, intervals, reader, texts)


def load_reader(spec: str, texts: Sequence[str], seed: int = 0) -> Reader:
    """Return the decoder that `spec` names, as `finetune --model` does, with its tokenizer; in float32 on the CPU."""
    from transformers.utils import logging

    from lisa_kernels.flow.text_flow import NO_TEXT, Reader

    logging.disable_progress_bar()
    decoder = load_model(spec, torch.float32, seed)
    return Reader(decoder, load_tokenizer(spec, [*texts, NO_TEXT], decoder.config.vocab_size), spec)


def _text_flow(shape: FlowShape, intervals: Intervals, reader: Reader, texts: Sequence[str]) -> GroupedFlow:
    from lisa_kernels.flow.text_flow import TextFlow

    return TextFlow(shape, intervals, reader, texts)


def described_reader(model: GroupedFlow, seed: int = 0) -> dict[str, Any] | None:
    """Return what is to be known of the decoder that reads a model's texts; None for a model without one."""
    reader = getattr(model, "reader", None)
    if reader is None:
        return None
    return {"model": reader.path, "checksum": _checksum(reader.path), "texts": list(model.texts), "seed": seed}  # type: ignore[arg-type]


def _checksum(spec: str) -> str | None:
    folder = Path(spec).expanduser()
    return checksum_of_folder(folder) if folder.is_dir() else None


def saved_model(settings: Mapping[str, Any], backbone: Mapping[str, Any] | None, folder: Path) -> GroupedFlow:
    """Return the model that files in `folder` describe, its weights aside.

    Raises InputError where the decoder that read its texts has changed since.
    """
    shape, intervals = FlowShape(**settings["shape"]), Intervals.from_state(settings["intervals"])
    if backbone is None:
        return FlowTransformer(shape, intervals)
    if _checksum(backbone["model"]) != backbone["checksum"]:
        raise InputError(
            f"the flow in {folder} was trained beside the model in {backbone['model']}, which is not there as it was; "
            "put it back, for its images depend on what that model makes of a text."
        )
    reader = load_reader(backbone["model"], backbone["texts"], backbone["seed"])
    return _text_flow(shape, intervals, reader, settings["texts"])
