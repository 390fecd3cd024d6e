"""Models and tokenizers from `--model`: presets, directories, and one sentence for what cannot be trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_kernels.errors import InputError
from lisa_kernels.train import models
from lisa_kernels.train.models import (
    check_no_meta,
    check_token_ids,
    load_model,
    load_tokenizer,
    parse_dtype,
    train_tokenizer,
)
from lisa_kernels.train.presets import PRESETS, preset_config

# total parameters, in millions, that the models' publishers state
PUBLISHED = {
    "tinyllama-1.1b": 1100,
    "llama-2-7b": 6738,
    "llama-3.1-8b": 8030,
    "qwen2.5-7b": 7616,
    "mistral-7b": 7248,
}
SMALL_SIZES = {"tiny": (2.1, 8), "small": (24.4, 12)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a directory with a model and its tokenizer, as save_pretrained writes them."""
    load_model("preset:tiny", torch.float32, seed=1).save_pretrained(tmp_path)
    train_tokenizer(["some text"], 300).save_pretrained(tmp_path)
    return tmp_path


def count_millions(name: str) -> float:
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(preset_config(name))
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_have_their_published_size(name: str) -> None:
    assert round(count_millions(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", SMALL_SIZES)
def test_small_presets_have_the_size_they_are_named_for(name: str) -> None:
    millions, layers = SMALL_SIZES[name]
    assert round(count_millions(name), 1) == millions
    assert preset_config(name).num_hidden_layers == layers


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_takes_the_end_token_for_padding_in_its_embedding(name: str) -> None:
    config = preset_config(name)
    assert (config.eos_token_id, config.pad_token_id, config.tie_word_embeddings) == (0, None, False)


def test_a_long_context_preset_keeps_its_published_rotary_settings() -> None:
    rope = preset_config("llama-3.1-8b").rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("llama3", 500000.0, 8.0)
    assert preset_config("qwen2.5-7b").rope_parameters["rope_theta"] == 1000000.0
    assert preset_config("mistral-7b").sliding_window is None


def test_preset_weights_are_a_function_of_the_seed_and_leave_the_global_state() -> None:
    before = torch.get_rng_state()
    first, again, other = (load_model("preset:tiny", torch.bfloat16, seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_saved_model_comes_back_bit_equal_with_its_tokenizer(saved: Path) -> None:
    expected = load_model("preset:tiny", torch.float32, seed=1).state_dict()
    found = load_model(str(saved), torch.float32, seed=0).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert load_model(str(saved), torch.bfloat16, seed=0).dtype == torch.bfloat16
    assert load_tokenizer(str(saved), [], 0).encode("some text") == train_tokenizer(["some text"], 300).encode(
        "some text"
    )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("preset:tny", "did you mean 'tiny'"),
        ("preset:", "unknown preset"),
        ("tiny", "write preset:tiny"),
        ("./nowhere", "does not exist: give preset:NAME"),
        ("a/b/c", "does not exist"),
    ],
)
def test_a_name_that_is_no_model_says_what_is_wanted(spec: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_model(spec, torch.float32, 0)


def rewrite_config(saved: Path, **changes: Any) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | changes))


def without_head(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda saved: (saved / "config.json").unlink(), "has no config.json:"),
        (lambda saved: (saved / "config.json").rename(saved / "adapter_config.json"), "an adapter, not a model"),
        (lambda saved: (saved / "config.json").write_text("{"), "cannot be loaded"),
        (lambda saved: (saved / "model.safetensors").unlink(), "no weights"),
        (lambda saved: (saved / "model.safetensors").write_bytes(b"short"), "cannot be loaded"),
        (lambda saved: rewrite_config(saved, hidden_size=64), "cannot be loaded"),
        (without_head, r"lacks 1 weights .*lm_head\.weight"),
        (lambda saved: rewrite_config(saved, architectures=["LlamaForSequenceClassification"]), "not a causal"),
        (lambda saved: rewrite_config(saved, model_type="t5", architectures=None), "not a causal"),
        (lambda saved: rewrite_config(saved, model_type="unheard-of"), "cannot be loaded"),
    ],
    ids=[
        "no-config",
        "adapter-only",
        "broken-config",
        "no-weights",
        "broken-weights",
        "other-shapes",
        "no-head",
        "classifier",
        "encoder-decoder",
        "unknown-family",
    ],
)
def test_a_directory_that_holds_no_trainable_model_is_one_sentence(damage: Any, said: str, saved: Path) -> None:
    damage(saved)
    with pytest.raises(InputError, match=said) as error:
        load_model(str(saved), torch.float32, 0)
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_old_spelling_of_the_architecture_still_loads(saved: Path) -> None:
    rewrite_config(saved, architectures=["LLaMAForCausalLM"])
    assert load_model(str(saved), torch.float32, 0).config.num_hidden_layers == 8


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(InputError, match="is a file: give preset:NAME"):
        load_model(str(tmp_path / "model.gguf"), torch.float32, 0)


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("We couldn't connect\nmore")

    for loader in (transformers.AutoConfig, transformers.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", unreachable)
    for load in (lambda: load_model("owner/name", torch.float32, 0), lambda: load_tokenizer("owner/name", [], 0)):
        with pytest.raises(InputError, match=r"hub could not be reached .*couldn't connect\).*preset:NAME"):
            load()


def test_tensors_on_meta_are_refused() -> None:
    check_no_meta(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"2 tensors .* meta device.*\(weight, "):
        check_no_meta(torch.nn.Linear(2, 2, device="meta"))


def test_a_directory_without_a_tokenizer_is_refused(saved: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(str(saved), ["text"], 300)


def test_a_broken_tokenizer_is_one_sentence(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer of model .* cannot be loaded"):
        load_tokenizer(str(saved), [], 300)


def test_a_preset_tokenizer_round_trips_any_text_and_ends_with_token_zero() -> None:
    tokenizer = load_tokenizer("preset:tiny", ["def f():\n    return x\n"] * 50, vocab_size=2048)
    awkward = " don 't , \n\n\t é 漢字 \U0001f600 \x00 <s>"
    assert tokenizer.decode(tokenizer.encode(awkward)) == awkward
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.encode("<|endoftext|>")[0] == 0
    assert len(tokenizer.encode("return")) < 6
    assert tokenizer.bos_token is None
    assert 257 < len(tokenizer) <= 2048


def test_a_trained_tokenizer_is_a_function_of_its_texts_and_the_vocabulary_is_capped() -> None:
    texts = [f"word{n % 977} and{n % 463}ing number {n}" for n in range(9000)]
    first, again = (train_tokenizer(iter(texts), 1000).get_vocab() for _ in range(2))
    assert first == again
    assert len(first) == 1000
    assert len(load_tokenizer("preset:llama-2-7b", texts, 32000)) <= 4096
    with pytest.raises(InputError, match="257 or more"):
        train_tokenizer(texts, 256)


def test_a_tokenizer_learns_from_every_text_of_a_large_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "TOKENIZER_TRAINING_CHARACTERS", 2000)
    tokenizer = train_tokenizer(["alpha " * 1000, "omega " * 1000], 300)
    assert len(tokenizer.encode("alpha omega")) == 2


def test_a_token_without_an_embedding_row_is_refused() -> None:
    model = load_model("preset:tiny", torch.float32, 0)
    check_token_ids(model, 2047)
    with pytest.raises(InputError, match=r"token id 2048 .* 2048 rows"):
        check_token_ids(model, 2048)


def test_auto_dtype_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is told, else the first that is there."""
    monkeypatch.setattr(
        models, "auto_dtype", {torch.device("cuda", 0): torch.float16, torch.device("cpu"): torch.float32}.get
    )
    assert parse_dtype("auto", torch.device("cpu")) == torch.float32
    assert parse_dtype("auto", torch.device("cuda", 0)) == torch.float16
    for there, wanted in ((False, torch.float32), (True, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert parse_dtype("auto") == wanted


def test_dtype_names() -> None:
    assert [parse_dtype(n) for n in ("fp32", "bf16", "fp16")] == [torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(InputError, match="unknown dtype 'bf61': did you mean 'bf16'"):
        parse_dtype("bf61")
