"""One fine-tuning run from options to a saved model and its summary."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from lisa_kernels.distributed import (
    Ranks,
    at_rest,
    join,
    on_first,
    others_heard,
    part,
    ranks_of,
    read_launch,
    together,
    whole_state,
)
from lisa_kernels.errors import InputError
from lisa_kernels.layers import (
    attends_by_segments,
    checkpoint_blocks,
    find_blocks,
    find_linears,
    linear_shape,
    offload_checkpoints,
)
from lisa_kernels.methods import Method, SampledAdamW, attach, layer_scores
from lisa_kernels.methods.adapter_layout import is_all_adaptable
from lisa_kernels.methods.precision import AS_THEY_ARE
from lisa_kernels.report import PAGE_FILE, read_run, write_page
from lisa_kernels.report.memory import most_held
from lisa_kernels.report.memory import planned as planned_of
from lisa_kernels.train.answers import Question, answers, held_out_questions, print_answers, samples_for
from lisa_kernels.train.checkpoint import checkpoint_step, find_checkpoints
from lisa_kernels.train.finish import finish_run, save_weights
from lisa_kernels.train.identity import check_unchanged, checksum_of_folder, checksum_of_rows
from lisa_kernels.train.lent_checkpoint import on_every_machine
from lisa_kernels.train.master_files import master_folder, tell_written
from lisa_kernels.train.memory import PlannedMemory, describe_held
from lisa_kernels.train.options import AUTO, AUTOMATIC, SCHEDULES, FineTuneOptions, default_options
from lisa_kernels.train.ornaments import ornament
from lisa_kernels.train.packing import Row, collate, collate_flat, pad_token_id
from lisa_kernels.train.placement import (
    Memory,
    out_of_host_memory,
    out_of_memory,
    take_device,
)
from lisa_kernels.train.preparation import prepare_run
from lisa_kernels.train.recomputation import checkpointed_blocks
from lisa_kernels.train.reporters import reporters
from lisa_kernels.train.restart import LAUNCHERS, find_launchers, resumed_by_launcher
from lisa_kernels.train.run_folder import start_run
from lisa_kernels.train.run_lock import RunLock
from lisa_kernels.train.save_rehearsal import check_space
from lisa_kernels.train.sharded import check_disk
from lisa_kernels.train.size_rows import rows_for_size, tell_picks
from lisa_kernels.train.taken import Grounds, Taken, recorded_in
from lisa_kernels.train.tokenize import TokenizedData

if TYPE_CHECKING:
    from lisa_kernels.train.history import RunHistory

INTERRUPTED = 130


def build_method(options: FineTuneOptions, model: Any) -> Method:
    """Return the method, its default rank and number of layers no more than the model can hold."""
    options = options.settled(options.method != AUTO or is_all_adaptable(model))
    if options.build_method().form == "adapter":
        places = find_linears({"": model}, rank=1)
        return options.build_method(min((min(linear_shape(place.layer)) for place in places), default=None))
    path, blocks = find_blocks(model)
    places = find_linears({path: model.get_submodule(path)}, rank=1)
    smallest = min((min(linear_shape(place.layer)) for place in places), default=None)
    return options.build_method(None if smallest is None else max(1, smallest // 4), len(blocks))


def _scores(
    model: Any, method: Method, data: TokenizedData, options: FineTuneOptions, pad: int, where: torch.device | None
) -> list[float] | None:  # fmt: skip
    """Return the layer scores that the method draws by, measured on the first training rows.

    where: blocks compute for it, of weights on the host that are to rest; None: where the model is.
    """
    kind = method.score_kind()
    if kind is None:
        return None
    rows = [data[index] for index in range(min(len(data), options.calibration_rows))]
    batches = [rows[start : start + options.batch_size] for start in range(0, len(rows), options.batch_size)]
    device = next(model.parameters()).device
    calibration = [{name: value.to(device) for name, value in collate(batch, pad).items()} for batch in batches]
    return layer_scores(model, kind, calibration, device=where)


def _agreed_scores(
    model: Any, method: Method, data: TokenizedData, options: FineTuneOptions, pad: int, ranks: Ranks | None,
    where: torch.device | None,
) -> list[float] | None:  # fmt: skip
    """Return what rank 0 measures; where ranks share the weights out, what all of them measure on the same rows."""
    if ranks is None or not options.shard:
        return on_first(ranks, lambda: _scores(model, method, data, options, pad, where))
    with ranks.together():
        found = _scores(model, method, data, options, pad, where)
    at_rest(model)
    told: list[float] | None = ranks.tell(found)[0]
    return told


def _checksums(options: FineTuneOptions, train: TokenizedData, held_out: TokenizedData) -> dict[str, str]:
    """Return what tells this run's rows and model from others."""
    found = {"rows": checksum_of_rows(train.rows), "held_out": checksum_of_rows(held_out.rows)}
    folder = Path(options.model).expanduser()
    return {**found, "model": checksum_of_folder(folder)} if folder.is_dir() else found


def _settle(
    options: FineTuneOptions, model: Any, rows: int, run: dict[str, Any], console: Console
) -> tuple[Method, Taken, int]:  # fmt: skip
    """Return the method, the settings and the number of steps of a run on so many rows; says what was not given.

    run: what run.json holds of a run that goes on; it keeps what it took.
    """
    method = build_method(options, model)
    grounds = Grounds.of(options, method, model, rows)
    recorded = recorded_in(run) or options.taken or {}
    taken = grounds.take(options, recorded)
    said = grounds.describe(taken, options, recorded)
    if said is not None:
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    return taken.applied_to(method), taken, grounds.steps


def _training_arguments(
    options: FineTuneOptions, taken: Taken, steps: int, has_held_out: bool, device: torch.device
) -> Any:  # fmt: skip
    from lisa_kernels.train.trainer import OneDevice

    return OneDevice(
        output_dir=str(options.output), max_steps=steps, per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size, gradient_accumulation_steps=options.accumulate,
        learning_rate=taken.lr, lr_scheduler_type=SCHEDULES[options.lr_schedule],
        # The optimizer clips, in the passes over the gradients that it takes anyway.
        warmup_steps=taken.warmup_steps, max_grad_norm=0.0,
        seed=options.seed, data_seed=options.seed,
        logging_strategy="steps", logging_steps=max(1, steps // 50), logging_first_step=True,
        eval_strategy="steps" if options.eval_every and has_held_out else "no", eval_steps=options.eval_every or None,
        save_strategy="steps" if options.save_every else "no", save_steps=options.save_every or 500,
        save_total_limit=options.max_checkpoints, remove_unused_columns=False, report_to="none", disable_tqdm=True,
        use_cpu=device.type == "cpu", dataloader_pin_memory=device.type == "cuda", log_level="error",
        run_device=str(device),
        # What would make the host wait at every micro-batch: asking whether the loss is a number (the Trainer sees to
        # that on the device), and copying a batch.
        logging_nan_inf_filter=False, accelerator_config={"non_blocking": device.type == "cuda"},
    )  # fmt: skip


def finetune(
    options: FineTuneOptions, console: Console, plan: Callable[..., PlannedMemory] | None = None
) -> tuple[int, dict[str, Any]]:
    """Run `options`; returns (exit code, summary): 0 when done, 130 when stopped by ctrl-C with a checkpoint.

    plan: tells the memory of a run, of its options and ranks=, before it starts; summary and page have it beside the
    measured one. Processes that torchrun has started share the rows of each step and train one model; rank 0 writes,
    the others return no summary.
    What torchrun starts again goes on from the last checkpoint.
    """
    launch = read_launch()
    ranks = ranks_of("auto") if launch is None else join(launch)
    if ranks is not None and ranks.rank:
        console = Console(quiet=True)
    launchers = find_launchers(ranks)
    options = resumed_by_launcher(options, launchers, ranks)
    lock = RunLock(options.output)
    on_first(ranks, lock.take)
    try:
        with together(ranks):
            device = take_device(options, console, launch=launch)
        if device.type == "cuda":
            # Whatever asks for "the GPU" means this one.
            torch.cuda.set_device(device)
        try:
            with others_heard(), ExitStack() as ends:
                result = _run(options, device, console, plan, lock, ranks, launchers, ends)
        except torch.OutOfMemoryError as error:
            resumable = bool(find_checkpoints(options.output))
            raise out_of_memory(Memory.of(device), device, resumable) from error
        except (MemoryError, OSError, RuntimeError) as error:
            told = out_of_host_memory(error, bool(find_checkpoints(options.output)), options.resting)
            if told is None:
                raise
            raise told from error
    finally:
        lock.release()
    if launch is not None:
        part()
    return result


def _run(
    options: FineTuneOptions, device: torch.device, console: Console,
    plan: Callable[..., PlannedMemory] | None, lock: RunLock, ranks: Ranks | None, launchers: list[str],
    ends: ExitStack,
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    from transformers.utils import logging as transformers_logging

    from lisa_kernels.train.history import RunHistory
    from lisa_kernels.train.progress import LiveProgress
    from lisa_kernels.train.trainer import SamplingState, StopOnInterrupt, held_out_loss

    transformers_logging.disable_progress_bar()
    run = prepare_run(options, device, console, plan, ranks)
    facts, model, train, held_out, meter = run.facts, run.model, run.train, run.held_out, run.meter
    began = _checksums(options, train, held_out)
    if ranks is not None:
        ranks.check_alike({f"the checksum of {name}": value for name, value in began.items()})
    check_unchanged(facts.get("began", {}), began, options.output)
    method, taken, max_steps = _settle(options, model, len(train), facts, console)
    pad = pad_token_id(run.tokenizer)
    arguments = _training_arguments(run.settled, taken, max_steps, len(held_out) > 0, device)
    model.config.use_cache = False
    recomputed = checkpointed_blocks(run.settled, model)
    if recomputed != 0:
        checkpoint_blocks(model, recomputed)
        if options.offload_activations:
            offload_checkpoints(model)
    # A resumed run has its scores from the first start: the weights have moved on since they were measured.
    resting = options.resting not in (None, AS_THEY_ARE)
    there = device if resting else None
    if "scores" in facts:
        scores = facts["scores"]
    else:
        if resting and device.type != "cpu" and method.score_kind() == "outlier":
            console.print(
                "note: outlier scores are measured in 16 bits, which come to the device a block at a time for each "
                "batch; --scores uniform or weight-norm needs no forwards",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        scores = _agreed_scores(model, method, train, options, pad, ranks, there)
    masters = master_folder(run.settled, model, method)
    optimizer = attach(
        model, method, lr=taken.lr, weight_decay=options.weight_decay, seed=options.seed, scores=scores,
        max_grad_norm=options.max_grad_norm or None, keep_logits=options.keep_logits, paging=options.paging,
        resting=options.resting, resting_where=options.resting_where, active_on=options.active_on, masters=masters,
        wire_dtype=options.wire_dtype, calibration=rows_for_size(options, train, pad, console),
        device=there,
    )  # fmt: skip
    tell_picks(options, model, console)
    tokens_per_step = options.batch_size * options.accumulate * train.tokens / len(train)
    if optimizer.layout.masters is not None:
        # However the run ends.
        ends.callback(optimizer.layout.masters.close)
    if optimizer.code_bytes_written:
        # Of a disk that may be the run's.
        check_space(options, model)
    progress = LiveProgress(console, optimizer, tokens_per_step)
    history = RunHistory(options.output, optimizer, meter, tokens_per_step, console)
    interrupt = StopOnInterrupt(ranks)
    writes = ranks is None or ranks.rank == 0
    callbacks = [SamplingState(optimizer), interrupt, *([progress, history] if writes else [])]
    trainer = _trainer(model, arguments, train, held_out, run.tokenizer, optimizer, callbacks, ranks)
    trainer.say = lambda note: console.print(f"note: {note}", highlight=False)
    _describe(method, optimizer, arguments, console)
    loader = trainer.get_eval_dataloader() if len(held_out) else []
    for reporter in reporters(options, trainer) if writes else []:
        trainer.add_callback(reporter)
    if "eval_loss_before" not in facts:
        facts = {"eval_loss_before": _finite(held_out_loss(model, loader, optimizer, ranks)), "scores": scores}
        _check_within_float16(run.dtype, facts["eval_loss_before"], len(held_out))
        facts |= {"began": began, "dtype": run.dtype, "taken": dataclasses.asdict(taken)}
        facts[LAUNCHERS] = launchers
        on_first(ranks, lambda: _begin(options, facts, lock, None if masters is None else Path(masters)))
    if options.shard and ranks is not None:
        check_disk(options, ranks)
    questions = held_out_questions(held_out, 0 if options.shard else samples_for(model, options.samples))
    if writes:
        history.begin(_begin_facts(options, optimizer, arguments, run.plan), checkpoint_step(run.checkpoint))
        if not history.has("answers"):
            _ask(model, run.tokenizer, questions, history, 0, console)
    if len(held_out):
        console.print(f"held-out loss before: {facts['eval_loss_before']:.4f}", highlight=False)
    with on_every_machine(run.checkpoint, ranks) as checkpoint, interrupt:
        trainer.train_on(checkpoint)
    steps = trainer.state.global_step
    if interrupt.interrupted and steps < arguments.max_steps:
        where = options.output / f"checkpoint-{steps}"
        console.print(
            f"stopped at step {steps}; continue with the same command and --resume ({where})", highlight=False
        )
        if not writes:
            return INTERRUPTED, {}
        ornament("the page of the run", lambda: _write_page(options.output, console), console)
        return INTERRUPTED, {"checkpoint": str(where), "steps": steps}
    if not writes:
        # What is left is the work of rank 0, but for this rank's part of the held-out rows.
        if options.shard:
            whole_state(model)
        on_first(ranks, lambda: None)
        ornament("the held-out loss", lambda: held_out_loss(model, loader, optimizer, ranks), console)
        return 0, {}
    peak, memory, excess = meter.peak_bytes(), meter.describe(run.planned_bytes), meter.warning(run.planned_bytes)
    # What was trained is safe before anything that may fail is tried.
    state = whole_state(model) if options.shard else None
    on_first(ranks, lambda: save_weights(trainer, options.output, console, state))
    loss_after = ornament(
        "the held-out loss after training", lambda: _finite(held_out_loss(model, loader, optimizer, ranks)), console
    )
    losses = facts["eval_loss_before"], loss_after
    summary = {
        **_summary(options, taken, trainer, optimizer, losses, progress.tokens_per_second),
        "peak_bytes_measured": peak, "peak_bytes_planned": run.planned_bytes,
    }  # fmt: skip
    if summary["skipped_steps"]:
        console.print(
            f"{summary['skipped_steps']} of {steps} steps changed nothing: a gradient was not finite, or too large",
            highlight=False,
        )
    ornament("the memory that was taken", lambda: _tell_memory(memory, excess, console), console)
    tell_written(optimizer, console)
    finish_run(options, optimizer, summary, console)
    _ask(model, run.tokenizer, questions, history, steps, console)
    ornament("the page of the run", lambda: _write_page(options.output, console), console)
    return 0, summary


def _begin(options: FineTuneOptions, facts: dict[str, Any], lock: RunLock, kept: Path | None) -> None:
    """Begin the run in its folder, which this process holds from before until after."""
    lock.take()
    start_run(options, facts, kept)
    lock.take()


def _check_within_float16(dtype: str, loss: float | None, held_out_rows: int) -> None:
    """Raise InputError where the model's numbers are beyond float16: every step would be skipped."""
    if dtype == "fp16" and loss is None and held_out_rows:
        raise InputError(
            "the model's loss is not finite in fp16, whose largest number is 65504: use --dtype fp32, or bf16 on a GPU "
            "of compute capability 8.0 or more."
        )


def _tell_memory(memory: str, excess: str | None, console: Console) -> None:
    console.print(memory, highlight=False)
    if excess is not None:
        console.print(f"warning: {excess}", style="yellow", highlight=False)


def _ask(
    model: Any, tokenizer: Any, questions: list[Question], history: RunHistory, step: int, console: Console
) -> None:  # fmt: skip
    """Note in the history what the model says to held-out prompts now."""
    said = ornament("what the model says", lambda: answers(model, tokenizer, questions), console)
    if said:
        history.add("answers", step, answers=said)


def _write_page(folder: Path, console: Console) -> None:
    run = read_run(folder)
    held = describe_held(most_held(run), planned_of(run).get("held_bytes") or {})
    if held is not None:
        console.print(held, highlight=False)
    print_answers(run.answers, console)
    write_page([run], folder / PAGE_FILE)
    console.print(f"page of the run: {folder / PAGE_FILE}", highlight=False, soft_wrap=True)


def _begin_facts(
    options: FineTuneOptions, optimizer: SampledAdamW, arguments: Any, planned: PlannedMemory | None
) -> dict[str, Any]:  # fmt: skip
    """Return what the history of a run begins with."""
    model = optimizer.model
    return {
        "max_steps": arguments.max_steps, "device": next(model.parameters()).device.type,
        "parameters": sum(param.numel() for param in model.parameters()), "layers": optimizer.layer_names,
        "method": optimizer.method.settings(), "defaults": default_options(),
        "plan": None if planned is None else dataclasses.asdict(planned),
    }  # fmt: skip


def _collator(model: Any, tokenizer: Any) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
    if attends_by_segments(model):
        return collate_flat
    return functools.partial(collate, pad_token_id=pad_token_id(tokenizer))


def _trainer(
    model: Any, arguments: Any, train: TokenizedData, held_out: TokenizedData, tokenizer: Any, optimizer: SampledAdamW,
    callbacks: list[Any], ranks: Ranks | None,
) -> Any:  # fmt: skip
    from transformers import PrinterCallback, ProgressCallback

    from lisa_kernels.train.trainer import FineTuneTrainer

    trainer = FineTuneTrainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=held_out if len(held_out) else None,
        data_collator=_collator(model, tokenizer), processing_class=tokenizer, optimizers=(optimizer, None),
        callbacks=callbacks, ranks=ranks,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _summary(
    options: FineTuneOptions, taken: Taken, trainer: Any, optimizer: SampledAdamW,
    losses: tuple[float | None, float | None], tokens_per_second: float,
) -> dict[str, Any]:  # fmt: skip
    """Return what summary.json says; losses: held-out, before and after."""
    train_losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "method": optimizer.method.name, "settings": optimizer.method.settings(), "steps": trainer.state.global_step,
        "lr": taken.lr, "warmup_steps": taken.warmup_steps,
        "given": {name: getattr(options, name) for name in AUTOMATIC},
        "train_loss_first": train_losses[0], "train_loss_last": train_losses[-1],
        "eval_loss_before": losses[0], "eval_loss_after": losses[1], "tokens_per_second": tokens_per_second,
        "skipped_steps": optimizer.skipped_steps, "master_bytes_written": optimizer.master_bytes_written,
        "code_bytes_written": optimizer.code_bytes_written, "code_bytes_read": optimizer.code_bytes_read,
        "layer_visits": dict(zip(optimizer.layer_names, optimizer.visits)), "layer_history": optimizer.history,
    }  # fmt: skip


def _finite(loss: float) -> float | None:
    """Return None for a loss that JSON cannot hold: that of a run without held-out rows, or one that diverged."""
    return loss if math.isfinite(loss) else None


def _describe(method: Method, optimizer: SampledAdamW, arguments: Any, console: Console) -> None:
    settings = ", ".join(f"{key}={value}" for key, value in method.settings().items() if key != "method")
    console.print(
        f"method {method.name} ({settings}), lr {arguments.learning_rate:g}, {arguments.max_steps} steps",
        highlight=False,
    )
