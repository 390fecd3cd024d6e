"""Options that several commands share, and how their help shows defaults."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisa_kernels.errors import InputError
from lisa_kernels.sizes import parse_size

MODEL_HELP = (
    "directory, hub id, preset:NAME (random weights): tiny, small, tinyllama-1.1b, llama-2-7b, llama-3.1-8b, "
    "qwen2.5-7b, mistral-7b, or sample:smollm2-135m (a small pretrained one, of the extra sample)"
)
_PERIOD_HELP = (
    "steps between switches; auto: the published 50 (lisa 20), or fewer, so that layers are drawn twice on average "
    "in the run (default: auto)"
)
_DATA_HELP = (
    ".jsonl, .json, .csv, .tsv or .parquet (text, or prompt/completion, or messages, or ShareGPT's conversations, or "
    "Alpaca's instruction/input/output, or question/answer), .txt, a folder of these, hub id, or the text of Python's "
    "own standard library: stdlib, stdlib:code, stdlib:docstrings, stdlib:questions; may be given several times"
)


@dataclass(frozen=True)
class OrAuto:
    """Reads a number, or the word auto as itself; wanted: what is said to be missing where neither is given."""

    number: type[int] | type[float]

    @property
    def wanted(self) -> str:
        """What may be given."""
        return f"{'a whole number' if self.number is int else 'a number'} or auto"

    @property
    def __name__(self) -> str:
        """What argparse calls the type in its errors."""
        return self.wanted.removeprefix("a ")

    def __call__(self, text: str) -> Any:
        """Return the value; raises ValueError."""
        return "auto" if text.strip().lower() == "auto" else self.number(text)


class Recomputation(argparse.BooleanOptionalAction):
    """A switch that may also be told how far."""

    def __init__(self, option_strings: Sequence[str], dest: str, type: Any = None, **settings: Any) -> None:
        super().__init__(option_strings, dest, **settings)
        self.nargs, self.type = "?", type

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Store what was said, True where nothing was."""
        if option_string is not None and option_string.startswith("--no-"):
            if values is not None:
                parser.error(f"{option_string} takes no value")
            values = False
        setattr(namespace, self.dest, True if values is None else values)


class BlocksOrSize:
    """Reads a number of blocks, the word auto, or a size, which stays as it is written."""

    wanted = "a number of blocks, auto or a size such as 24GB"
    __name__ = wanted.removeprefix("a ")

    def __call__(self, text: str) -> int | str:
        """Return the value; raises ValueError."""
        word = text.strip()
        if word.isdecimal():
            return int(word)
        if word.lower() == "auto":
            return "auto"
        try:
            parse_size(word)
        except InputError as error:
            raise ValueError(str(error)) from error
        return word


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing_to_show = action.default is None or isinstance(action.default, bool)
        if nothing_to_show or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare the model, the shape of its batches and what every command has."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per row")
    parser.add_argument("--batch-size", type=int, default=4, help="rows per forward pass")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="weights: fp32, bf16, fp16, or auto (bf16 on GPUs that multiply it, fp16 on older ones, else fp32)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of data order, sampler, rounding and random weights")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def add_data(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Declare the data."""
    parser.add_argument("--data", action="append", required=required, help=_DATA_HELP)
    parser.add_argument("--columns", help="the columns that hold a row's fields, as in prompt=ASKED,completion=REPLY "
        "(text, prompt, completion, messages, tools, instruction, input, output, question, answer)")  # fmt: skip
    parser.add_argument("--max-data-bytes", type=int, help="read at most this many bytes of text (default: all)")


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Declare what becomes of the data: rows to train on, and rows held out."""
    add = parser.add_argument
    add("--no-packing", dest="packing", action="store_false", help="one example per row")
    add("--eval-fraction", type=float, default=0.05, help="share of the data held out")
    add("--eval-data", action="append", help="data held out, as --data, in place of a share of it")


def readers_of(data: str | Sequence[str] | None) -> list[str]:
    """Return the modules that read the data: of parquet files, and of data sets that are no file here."""
    needed: list[str] = []
    for source in [data] if isinstance(data, str) else data or ():
        path = Path(source).expanduser()
        if path.suffix == ".parquet":
            needed.append("pyarrow")
        elif not path.suffix and not path.exists() and source.partition(":")[0] != "stdlib":
            needed.append("datasets")
    return list(dict.fromkeys(needed))


def add_method(parser: argparse.ArgumentParser) -> None:
    """Declare what decides the memory of a run besides model, batch and dtype, and what the period follows from."""
    add = parser.add_argument
    add(
        "--method",
        default="auto",
        help="lisa, ows, owlore, badam, galore, lora, lora-fa or full; auto: lora with embedding and head in low rank "
        "beside it; owlore where a setting is given that lora has not, and for models that adapters do not reach whole",
    )
    add(
        "--active-layers",
        type=int,
        help="layers trained at a time (default: 2 for lisa and ows, 5 for owlore, 1 for badam)",
    )
    add("--period", type=OrAuto(int), help=_PERIOD_HELP)
    add("--rank", type=int, help="of low-rank layers (default: 128, lora and lora-fa 16; less on small models)")
    add("--alpha", type=float, help="scale of the adapters of lora and lora-fa, divided by the rank (default: 32)")
    add("--rate-ratio", type=float, help="rate of lora's B over that of its A (default: 4)")
    add(
        "--targets",
        help="layers with adapters of lora and lora-fa: all-linear, or names as q_proj,v_proj (default: all-linear)",
    )
    add("--master", help="of 16-bit low-rank matrices while they train: remainder keeps 16 more bits (default: none)")
    add(
        "--embeddings",
        help="embedding and head: always, low-rank, with-first-block (low-rank, the embedding while the first layer is "
        "drawn), frozen or sampled (default: always; owlore low-rank, badam frozen)",
    )
    add(
        "--design",
        help="how layers are drawn together: marginals, by chance; shallow, neighbours together, so that backward "
        "passes end higher up; sequential, as OwLore's published code draws (ows and owlore; default: marginals)",
    )
    add(
        "--scores",
        help="what owlore and ows draw by: outlier, hill, weight-norm, gradient-norm or uniform (default: outlier)",
    )
    add("--retired-state", help="moments of layers that leave: drop, keep (on the device) or page (default: drop)")
    add("--wire-dtype", help="of gradients between processes: bf16 halves them (default: their own dtype)")
    add(
        "--paging",
        help="where moments are between steps: resident, host, managed (unified memory) or file:DIR (default: on the "
        "device); where paged ones of layers that left are, too (default: host)",
    )
    add(
        "--resting",
        help="bits in which matrices are on the device, their masters and the token embedding in host memory: 16-bit, "
        "int8, mixed (int8 where nf4 loses most, in the bytes of down_proj), nf4, or a size such as 5.5GB that all "
        "codes may take, int8 where nf4 loses most for the bytes (with any method but full; default: 16-bit)",
    )
    add(
        "--active-on",
        help="what layers that train compute on beside others at rest: codes, or their 16-bit master, brought to the "
        "device for the period (default: codes for owlore and galore, master for lisa, ows and badam)",
    )
    add(
        "--masters",
        help="where the 16-bit masters of resting weights are: host (memory), or a folder for files that are mapped "
        "and take none (default: host where they take up to half of what is free, else OUTPUT/masters)",
    )
    add(
        "--resting-where",
        help="where these bits of the layers are: device; host, which streams them a layer ahead, so that the device "
        "holds two layers of them; or a folder for a file of them, of which the host then holds two layers as well "
        "(default: device)",
    )
    add("--steps", type=int, help="optimizer steps (default: 200)")
    add("--epochs", type=float, help="passes over the data, in place of --steps")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient's norm to this; 0 for never")
    add("--accumulate", type=int, default=1, help="forward passes per optimizer step")
    add("--keep-logits", action="store_true", help="form the logits of all tokens for the training loss")
    add("--gradient-checkpointing", action=Recomputation, default=None, metavar="HOW", type=BlocksOrSize(), help=(
        "recompute activations: of all blocks, or of as many as a number says; auto: of as few as the device's free "
        "memory allows, or a size such as 24GB (default: all blocks, from 0.5e9 parameters)"))  # fmt: skip
    add("--offload-activations", action="store_true", help="recompute activations, and keep what that starts from in "
        "host memory until it is needed")  # fmt: skip
