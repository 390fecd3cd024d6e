"""`lisa-kernels difference`: base and adapter are the tuned model, as peft loads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, common, gpt2, llama, logits
from rich.console import Console
from torch import Tensor

from lisa_kernels.cli import main
from lisa_kernels.difference.command import DifferenceOptions, write
from lisa_kernels.errors import InputError
from lisa_kernels.train.models import train_tokenizer

QUIET = Console(quiet=True)


def biased() -> Any:
    return build("Qwen2ForCausalLM", "Qwen2Config", **common(tie_word_embeddings=True))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama, "tied": lambda: llama(tied=True), "biases, tied": biased, "conv1d": gpt2,
}  # fmt: skip


def changed(model: Any, rank: int, what: Callable[[str], bool] = lambda name: True) -> Any:
    """Return the model with an update of this rank in each matrix that `what` names, and of any kind in each vector."""
    generator = torch.Generator().manual_seed(7)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        for name, param in model.named_parameters():
            if what(name):
                low = some(len(param), rank) @ some(rank, *param.shape[1:]) if param.dim() == 2 else some(len(param))
                param += 0.02 * low
    return model


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder, max_shard_size="30KB")
    return str(folder)


def loaded(base: str, adapter: Path) -> Any:
    """Return what peft makes of the adapter beside its base."""
    peft = pytest.importorskip("peft", reason="peft loads the adapters")
    from transformers import AutoModelForCausalLM

    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


@pytest.mark.parametrize("size", [{"rank": 3}, {"keep": 0.9999}, {"rank": 40}])
@pytest.mark.parametrize("name", MODELS)
def test_base_and_adapter_are_the_tuned_model(name: str, size: dict[str, Any], tmp_path: Path) -> None:
    """Matrices as products, and embedding, head, norms and biases whole: logits agree, in evaluation and merged."""
    tuned = changed(MODELS[name](), rank=3).eval()
    base = saved(MODELS[name](), tmp_path / "base")
    options = DifferenceOptions(base, saved(tuned, tmp_path / "tuned"), tmp_path / "adapter", **size)
    result = write(options, QUIET)
    assert result["energy"] > 0.999
    assert result["left_out"] == []
    both = loaded(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(both), logits(tuned), rtol=1e-3, atol=2e-3 if "keep" in size else 2e-5)
    torch.testing.assert_close(logits(both.merge_and_unload()), logits(tuned), rtol=1e-3, atol=2e-3)


def test_a_share_goes_where_it_holds_most(tmp_path: Path) -> None:
    """A matrix that changed much in many directions gets more rank than one that changed little; the size is kept."""
    base, tuned = saved(llama(), tmp_path / "base"), llama()
    changed(tuned, 12, lambda name: "mlp" in name)
    changed(tuned, 1, lambda name: "q_proj" in name)
    found = {}
    for share in (0.1, 0.3):
        options = DifferenceOptions(base, saved(tuned, tmp_path / "tuned"), tmp_path / "adapter", share=share)
        found[share] = write(options, QUIET)
        assert found[share]["share"] <= share + 0.03  # what names take in a file as small as this
    assert 0.3 < found[0.1]["energy"] < found[0.3]["energy"] <= 1.0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert all(rank == 1 for path, rank in config["rank_pattern"].items() if "q_proj" in path)
    assert config["r"] > 4


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    tuned = saved(
        changed(llama(), 2, lambda name: "layers.1.mlp" in name or name == "model.norm.weight"), tmp_path / "t"
    )
    result = write(DifferenceOptions(base, tuned, tmp_path / "adapter", rank=2), QUIET)
    assert (result["matrices"], result["whole"]) == (3, ["model.norm"])
    bare = write(DifferenceOptions(base, tuned, tmp_path / "adapter", rank=2, matrices_only=True), QUIET)
    assert (bare["whole"], bare["left_out"]) == ([], ["model.norm"])
    assert bare["bytes"] < result["bytes"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None


def test_the_three_are_measured_on_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The adapter's folder speaks with the tuned model's tokenizer, and stands between base and tuned."""
    base, tuned = (saved(model, tmp_path / name) for name, model in (("a", spoken()), ("b", changed(spoken(), 2))))
    for folder in (base, tuned):
        train_tokenizer(["some words to say"] * 9, 257).save_pretrained(folder)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "some words", "completion": " to say"}) + "\n")
    words = ["--base", base, "--tuned", tuned, "--output", str(tmp_path / "c"), "--rank", "2", "--data", str(data)]
    assert main(["difference", *words, "--json"]) == 0
    losses = [model["answer_loss"] for model in json.loads(capsys.readouterr().out)["evaluation"]["models"]]
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_rows_are_read_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = saved(llama(), tmp_path / "base"), saved(changed(llama(), 1), tmp_path / "tuned")
    words = ["--base", base, "--tuned", tuned, "--output", str(tmp_path / "c"), "--data", str(tmp_path / "no.jsonl")]
    assert main(["difference", *words]) == 2
    assert "no.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def spoken() -> Any:
    """Return a model that reads bytes."""
    return build("LlamaForCausalLM", "LlamaConfig", **common(vocab_size=257))


def wider(folder: Path) -> dict[str, Any]:
    return {"tuned": saved(build("LlamaForCausalLM", "LlamaConfig", **common(vocab_size=70)), folder / "wide")}


def spoilt(folder: Path) -> dict[str, Any]:
    model = changed(llama(), 1)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    return {"tuned": saved(model, folder / "spoilt")}


def taken(folder: Path) -> dict[str, Any]:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "notes.txt").write_text("mine")
    return {}


BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "nothing changed": (lambda folder: {"tuned": str(folder / "base")}, "there is no difference"),
    "no matrix changed": (
        lambda folder: {"tuned": saved(changed(llama(), 1, lambda name: "embed" in name), folder / "words")},
        "no linear layer .* differs from .*, only model.embed_tokens",
    ),
    "no numbers": (spoilt, r"layers.1.mlp.up_proj.weight has a NaN"),
    "resized": (wider, r"lm_head.weight is \[61, 32\] in .* and \[70, 32\]"),
    "another model": (lambda folder: {"tuned": saved(gpt2(), folder / "other")}, "not checkpoints of one model"),
    "two sizes": (lambda folder: {"keep": 0.9}, "--rank and --keep both say"),
    "a share of all": (lambda folder: {"rank": None, "keep": 1.5}, "--keep is 1.5"),
    "nothing fits": (lambda folder: {"rank": None, "share": 1e-6}, "leaves 0.0 MB for matrices"),
    "a folder in use": (taken, "holds notes.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(case: str, tmp_path: Path) -> None:
    change, said = BAD[case]
    base, tuned = saved(llama(), tmp_path / "base"), saved(changed(llama(), 1), tmp_path / "tuned")
    given = {"base": base, "tuned": tuned, "output": tmp_path / "adapter", "rank": 2, **change(tmp_path)}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=said):
        write(DifferenceOptions(**given), QUIET)
    assert sorted(tmp_path.rglob("*")) == before
