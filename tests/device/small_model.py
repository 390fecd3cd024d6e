"""A saved model so small that whole commands run on it in seconds, one token a byte, and a command that trains it."""

from __future__ import annotations

from pathlib import Path

from families import common
from train.small_run import arguments, write_text

from lisa_kernels.train.models import BYTE_VOCABULARY, train_tokenizer

MODEL, TEXT = "model", "text.txt"


def save_small_model(folder: Path) -> None:
    """Save a Llama of two blocks, its tokenizer, and a text to train on, into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**common(
        num_hidden_layers=2, vocab_size=BYTE_VOCABULARY, pad_token_id=0, bos_token_id=None, eos_token_id=0,
        tie_word_embeddings=False,
    ))  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / MODEL)
    train_tokenizer(["some words"], BYTE_VOCABULARY).save_pretrained(folder / MODEL)
    text = write_text(folder)
    text.write_text("".join(text.read_text().splitlines(keepends=True)[:12]))


def small_command(folder: Path, output: Path, *more: str, method: str = "owlore") -> list[str]:
    """Return the arguments of a short run of it; later flags win."""
    of_method = ["--rank", "8", "--scores", "uniform"] if method == "owlore" else []
    flags = ["--model", str(folder / MODEL), "--active-layers", "1", "--period", "2", *of_method]
    return arguments(folder / TEXT, output, *flags, "--batch-size", "1", *more, method=method)
