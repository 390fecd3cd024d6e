"""The end of a run: its weights first, and then what may fail without losing them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from lisa_kernels.methods import SampledAdamW
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.ornaments import ornament
from lisa_kernels.train.run_folder import ADAPTER_FOLDER, SUMMARY_FILE, save_final_model, write_json


def save_weights(trainer: Any, folder: Path, console: Console, state: Mapping[str, Any] | None = None) -> None:
    """Write what was trained, with configuration and tokenizer; the model stays attached.

    state: the model's, where it holds a part of it only. Where the folder takes it no more (a disk that others have
    filled) it goes to a new one for temporary files, with a sentence.
    """
    config = trainer.model.config
    training, config.use_cache = config.use_cache, True
    try:
        save_final_model(trainer.model, trainer.processing_class, folder, state)
    except (OSError, SafetensorError) as error:
        refuge = Path(tempfile.mkdtemp(prefix="lisa-kernels-"))
        save_final_model(trainer.model, trainer.processing_class, refuge, state)
        console.print(
            f"warning: {folder} did not take the model ({error}); it is in {refuge}: move it from there.",
            style="yellow", highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    finally:
        config.use_cache = training


def finish_run(options: FineTuneOptions, optimizer: SampledAdamW, summary: dict[str, Any], console: Console) -> None:
    """Write summary.json, and then what adorns it: the adapter alone, the picture of the layers, the last lines."""
    output = options.output
    ornament(f"the summary ({SUMMARY_FILE})", lambda: write_json(output / SUMMARY_FILE, summary), console)
    if optimizer.method.form == "adapter" and optimizer.method.get("embeddings", "frozen") == "frozen":
        ornament("the adapter alone", lambda: optimizer.save_adapter(output / ADAPTER_FOLDER), console)
    ornament("the picture of the layers", lambda: _show_layers(output, optimizer, summary["steps"], console), console)
    ornament("the end of what is printed", lambda: _tell(output, summary, console), console)
    ornament("the end of the attachment", optimizer.detach, console)


def _show_layers(output: Path, optimizer: SampledAdamW, steps: int, console: Console) -> None:
    from lisa_kernels.train.progress import plot_layer_history, print_layer_history

    names, period = optimizer.layer_names, optimizer.period
    if period is not None:
        # The last draw belongs to a period that never began when the run ends on a switch.
        shown = optimizer.history[: math.ceil(steps / period)]
        print_layer_history(shown, names, period, console)
        plot_layer_history(shown, names, period, output / "layers.png")


def _tell(output: Path, summary: dict[str, Any], console: Console) -> None:
    if summary["eval_loss_before"] is not None and summary["eval_loss_after"] is not None:
        console.print(
            f"held-out loss: {summary['eval_loss_before']:.4f} before, {summary['eval_loss_after']:.4f} after "
            f"{summary['steps']} steps",
            style="bold", highlight=False,
        )  # fmt: skip
    console.print(
        f"{summary['tokens_per_second']:,.0f} tokens/s; model and summary in {output}",
        highlight=False,
    )
