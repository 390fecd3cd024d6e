"""What runs of `lisa-kernels flow train` draw: told by texts beside a language model, and through an autoencoder.

Each run is trained once, into a folder of its own that a later start goes on with, and its samples of every digit are
shown to the classifier of real digits that `bench.flow` has. Rows that exist are not measured again.

    python -m bench.flow_runs --runs FOLDER --backbone DIR   # digits told by texts, beside the model in DIR
    python -m bench.flow_runs --runs FOLDER --latents        # an autoencoder of digits, then a flow of its latents
    python -m bench.flow_runs --report                       # only the table
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.flow_measures import Judge, Pictures, load_pictures
from bench.flow_table import report
from bench.rows import append_row, read_rows
from lisa_kernels.cli import main as command
from lisa_kernels.flow.autoencoder import Autoencoder, fit_autoencoder
from lisa_kernels.flow.data import DIGITS, Images
from lisa_kernels.flow.model_file import load_model
from lisa_kernels.flow.pictures import make_images
from lisa_kernels.flow.text_flow import NO_TEXT, TextFlow
from lisa_kernels.flow.transformer import GroupedFlow

FILE = "flow_runs"
EACH, STEPS = 20, 20
GUIDANCE = (1.0, 2.0, 4.0)
# By the names of options, as a run's folder has them.
BESIDE = {"data": "digits", "groups": 10, "patch": 4, "steps": 3000, "batch_size": 64, "seed": 0}
OF_LATENTS = {"data": "digits", "groups": 4, "patch": 1, "steps": 1000, "batch_size": 64, "seed": 0}
# What a flow is told that it was never told in training, and the words that it was.
TRAINED, OTHERS = "a handwritten {}", ("a {}", "the number {} in handwriting", "please draw a handwritten {}")
# Of the autoencoder of digits.
CHANNELS, WIDTH, LATENT_CHANNELS, AUTOENCODER_STEPS = 1, 16, 2, 1000


def trained(options: dict[str, Any], output: Path, more: Sequence[str] = ()) -> dict[str, Any]:
    """Return the summary of the run of these options in a folder, which is begun, gone on with, or there already."""
    if not (output / "summary.json").is_file():
        flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        begun = ["--resume"] if (output / "run.json").is_file() else []
        if command(["flow", "train", "--output", str(output), "--save-every", "500", *flags, *more, *begun]):
            raise SystemExit(f"the run in {output} did not end")
    found = json.loads((output / "run.json").read_text())["options"]
    other = {name: found.get(name) for name, value in options.items() if found.get(name) != value}
    if other:
        raise SystemExit(f"the run in {output} has {other}; give another folder with --runs")
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def recognised(
    model: GroupedFlow, asked: Sequence[int], judge: Judge, guidance: float, autoencoder: Autoencoder | None = None
) -> float:  # fmt: skip
    """Return the share of samples that are taken for the digit asked; asked: the model's label for each digit."""
    labels, digits = torch.tensor(asked).repeat_interleave(EACH), torch.arange(10).repeat_interleave(EACH)
    images = make_images(model, labels, steps=STEPS, guidance=guidance, seed=3, autoencoder=autoencoder)
    return judge.accuracy(images, digits)


def told(model: TextFlow, judge: Judge) -> list[dict[str, Any]]:
    """Return a row for each text and guidance: as trained, in other words, and the text that says nothing."""
    rows = [
        {"told": TRAINED, "guidance": guidance, "recognised": recognised(model, range(10), judge, guidance)}
        for guidance in GUIDANCE
    ]
    for text in OTHERS:
        model.tell([text.format(digit) for digit in DIGITS])
        rows.append({"told": text, "guidance": 2.0, "recognised": recognised(model, range(10), judge, 2.0)})
    model.tell([NO_TEXT])
    rows.append({"told": NO_TEXT, "guidance": 1.0, "recognised": recognised(model, [0] * 10, judge, 1.0)})
    return rows


def make_autoencoder(pixels: Tensor, folder: Path, steps: int = AUTOENCODER_STEPS) -> None:
    """Train an AutoencoderKL of diffusers that halves both sides, and save it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model: Any = AutoencoderKL(
        CHANNELS, CHANNELS, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (WIDTH, WIDTH),
        latent_channels=LATENT_CHANNELS, norm_num_groups=8,
    )  # fmt: skip
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        part = pixels[torch.randint(len(pixels), (64,), generator=generator)]
        latents = model.encode(part).latent_dist
        apart = torch.nn.functional.mse_loss(model.decode(latents.sample(generator)).sample, part)
        (apart + 1e-4 * latents.kl().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def restored(folder: Path, held_out: Pictures, judge: Judge) -> dict[str, Any]:
    """Return what is left of held-out pictures that are encoded and decoded."""
    images = Images(held_out.pixels, held_out.labels, DIGITS)
    autoencoder, latents = fit_autoencoder(str(folder), images, torch.device("cpu"))
    back = autoencoder.decode(latents.pixels).clamp(-1, 1)
    return {
        "told": "held-out digits, encoded and decoded", "recognised": judge.accuracy(back, held_out.labels),
        "error": float((back - held_out.pixels).square().mean().sqrt()),
    }  # fmt: skip


def add(run: str, options: dict[str, Any], rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Record rows of a run that are not there yet."""
    there = read_rows(FILE)
    facts = {"eval_loss_before": summary["eval_loss_before"], "eval_loss_after": summary["eval_loss_after"]}
    for row in rows:
        key = {"run": run, **options, "told": row["told"], "guidance": row.get("guidance")}
        if not any(all(known.get(name) == value for name, value in key.items()) for known in there):
            append_row(FILE, {**key, **row, **facts})
            print(key["told"], key["guidance"], row["recognised"], flush=True)


def main() -> None:
    """Run what is asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder for the runs")
    parser.add_argument("--backbone", help="folder of a pretrained language model")
    parser.add_argument("--latents", action="store_true", help="a flow of an autoencoder's latents")
    parser.add_argument("--report", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    if (arguments.backbone or arguments.latents) and arguments.runs is None:
        parser.error("--runs FOLDER is wanted")
    torch.set_num_threads(1)
    train, held_out = load_pictures("digits")
    judge = Judge(train)
    if arguments.backbone:
        output = arguments.runs / "told"
        summary = trained(BESIDE, output, ["--backbone", arguments.backbone])
        model, _, _ = load_model(output)
        assert isinstance(model, TextFlow)
        add(f"beside {Path(arguments.backbone).name}", BESIDE, told(model, judge), summary)
    if arguments.latents:
        folder, output = arguments.runs / "autoencoder", arguments.runs / "latents"
        if not (folder / "config.json").is_file():
            make_autoencoder(train.pixels, folder)
        summary = trained(OF_LATENTS, output, ["--autoencoder", str(folder)])
        model, _, autoencoder = load_model(output)
        rows = [
            {"told": "class", "guidance": each, "recognised": recognised(model, range(10), judge, each, autoencoder)}
            for each in GUIDANCE
        ]
        add("latents of 2 × 4 × 4", OF_LATENTS, [*rows, restored(folder, held_out, judge)], summary)
    report(["flow runs"])


if __name__ == "__main__":
    main()
