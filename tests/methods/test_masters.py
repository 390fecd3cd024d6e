"""Masters in files that are mapped: they learn what those in memory do, and the model's own files stay as they are."""

from __future__ import annotations

import copy
import errno
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from families import anatomy, gpt2, llama, tokens, train
from forked import in_another_process
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lisa_kernels import LISA, GaLore, InputError, LoRA, OwLore, attach
from lisa_kernels.layers import RestingLinear
from lisa_kernels.methods import Method, SampledAdamW
from lisa_kernels.ops import resting as ops
from lisa_kernels.ops.resting import quantize_resting
from lisa_kernels.paging import masters as files
from lisa_kernels.paging import tensor_file

OWLORE = OwLore(active_layers=1, period=2, gap=3, rank=4, scores="uniform")
METHODS: dict[str, Method] = {
    "owlore": OWLORE,
    "frozen": OwLore(active_layers=1, period=2, rank=4, scores="uniform", embeddings="frozen"),
    "first": OwLore(active_layers=1, period=2, gap=3, rank=4, scores="uniform", embeddings="with-first-block"),
    "galore-tied": GaLore(rank=4, gap=3, embeddings="low-rank"),
    # Adapters: masters are what they were until these are merged.
    "lora": LoRA(rank=4),
    # Layers that train on copies of their masters.
    "lisa": LISA(active_layers=1, period=2, embeddings="frozen"),
    # Weights stored transposed.
    "gpt2": GaLore(rank=4, gap=3, embeddings="frozen"),
}


def made(name: str = "owlore", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    if name == "gpt2":
        return gpt2().to(dtype)
    return llama(tied=name.endswith("tied"), **changes).to(dtype)


def start(model: Any, name: str, masters: Path | str | None, seed: int = 1) -> SampledAdamW:
    return attach(model, METHODS[name], lr=3e-3, seed=seed, resting="nf4", masters=masters)


def run(model: Any, optimizer: SampledAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        train(model, optimizer, tokens(1, 6, seed=step))


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").train()


def values(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def resting(model: Any) -> dict[str, RestingLinear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, RestingLinear)}


def generations(folder: Path) -> set[str]:
    """Return the names of the masters that are in files of their own."""
    return {path.name.rsplit(".", 3)[0] for path in folder.glob(f"*{files.SUFFIX}")}


def seldom(*case: Any) -> Any:
    """Return a case that is left out of a plain run of the tests."""
    return pytest.param(*case, marks=pytest.mark.slow)


SELDOM = ("frozen", "first", "galore-tied", "gpt2", "lora", "lisa")
OF_METHODS = pytest.mark.parametrize("name", ["owlore", *map(seldom, SELDOM)])


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests write need not outlive the machine's power."""
    monkeypatch.setattr(tensor_file.os, "fsync", lambda descriptor: None)


@OF_METHODS
def test_masters_in_files_learn_what_those_in_memory_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in the middle of a period and at the end; a tile at a time."""
    monkeypatch.setattr(ops, "TILE_ELEMENTS", 1 << 10)
    ends = []
    for masters in ("host", tmp_path / "masters"):
        model = made(name)
        optimizer = start(model, name, masters)
        run(model, optimizer, 0, 5)
        middle = values(model)
        run(model, optimizer, 5, 9)
        at_end, written = values(model), optimizer.master_bytes_written
        optimizer.detach()
        ends.append([middle, at_end, values(model)])
        assert (written > 0) == (masters != "host")
        train_on(model)
    assert all(same(one, other) for one, other in zip(*ends))
    assert not (tmp_path / "masters").exists()


def test_a_copy_has_its_masters_in_memory(tmp_path: Path) -> None:
    """One that is made here, and one that was sent elsewhere."""
    model = made()
    optimizer = start(model, "owlore", tmp_path / "masters")
    run(model, optimizer, 0, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(values(other), values(model))
        assert not any(layer.is_mapped for layer in resting(other).values())


def train_on(model: Any) -> None:
    """What is left after `detach()` is an ordinary model, into which anyone may write."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**tokens()).loss.backward()
    optimizer.step()
    model.to(torch.float64)


@OF_METHODS
def test_a_master_is_the_file_of_the_model_until_it_changes(name: str, tmp_path: Path) -> None:
    """Which is never written to; a tied weight is one file."""
    folder = saved(tmp_path / "model", made(name))
    [weights] = folder.glob("*.safetensors")
    before, stamp = weights.read_bytes(), weights.stat()
    model = loaded(folder)
    optimizer = start(model, name, tmp_path / "masters")
    layers = resting(model)
    assert generations(tmp_path / "masters") == set()
    assert optimizer.master_bytes_written == 0
    codes = {path: layer.codes.clone() for path, layer in layers.items()}
    run(model, optimizer, 0, 6)
    layers = {path: layer for path, layer in layers.items() if not getattr(layer, "awake", False)}
    moved = {path for path, layer in layers.items() if not torch.equal(layer.codes, codes[path])}
    assert bool(moved) != (name == "lora")
    changed = {name.removesuffix(".weight") for name in generations(tmp_path / "masters")}
    assert {path for path in changed if "lm_head" in path or "embed" not in path} >= moved
    assert len([path for path in changed if "lm_head" in path or "embed" in path]) <= (1 if "tied" in name else 2)
    if name == "owlore":
        assert len(changed) < len(layers)
    for layer in layers.values():
        stored = layer.stored_weight.detach()
        stored = stored.t().contiguous() if layer.transposed else stored
        assert torch.equal(quantize_resting(stored, layer.kind)[0], layer.codes)
    optimizer.detach()
    assert weights.read_bytes() == before
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)


def test_a_master_is_never_another_file(tmp_path: Path) -> None:
    """One of the same names and shapes, but for a bit; found where the file was moved, as it is mapped."""
    model = loaded(saved(tmp_path / "model", made()))
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data.view(torch.int16)[3, 5] ^= 1
    optimizer = start(model, "frozen", tmp_path / "masters")
    assert generations(tmp_path / "masters") == {"model.layers.1.mlp.up_proj.weight"}
    optimizer.detach()
    model = loaded(tmp_path / "model")
    model.config._name_or_path = "someone/something"
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    optimizer = start(model, "frozen", tmp_path / "masters")
    assert generations(tmp_path / "masters") == set()


@pytest.mark.parametrize(
    ("before", "name"), [("files", "galore-tied"), seldom("host", "owlore"), seldom("files", "owlore")]
)
def test_a_run_goes_on_where_its_masters_are_elsewhere(before: str, name: str, tmp_path: Path) -> None:
    """From a state taken in mid-period, with masters in memory or in files, bit for bit."""
    model = made(name)
    run(model, start(model, name, None), 0, 9)
    stopped = made(name)
    optimizer = start(stopped, name, before if before == "host" else tmp_path / before)
    run(stopped, optimizer, 0, 5)
    weights, state = values(stopped), optimizer.state_dict()
    resumed = made(name)
    after = start(resumed, name, tmp_path / "masters")
    resumed.load_state_dict(weights)
    after.load_state_dict(state)
    run(resumed, after, 5, 9)
    assert same(values(resumed), values(model))


@pytest.mark.parametrize("name", [seldom("frozen"), "galore-tied"])
def test_what_others_write_into_a_model_is_its_master(name: str, tmp_path: Path) -> None:
    """Loaded, it is a new file; written into a parameter, what the layer learns is added to it."""
    model, plain = made(name), made(name)
    optimizer, beside = start(model, name, tmp_path / "masters"), start(plain, name, None)
    other = {key: value * 1.5 for key, value in made(name).state_dict().items()}
    for each, steps in ((model, optimizer), (plain, beside)):
        run(each, steps, 0, 1)
        each.load_state_dict(other)
        run(each, steps, 1, 3)
        each.model.layers[0].mlp.up_proj.weight.data.mul_(0.5)
        run(each, steps, 3, 7)
    assert same(values(model), values(plain))
    assert len(generations(tmp_path / "masters")) == sum(
        isinstance(layer, RestingLinear) or (name == "frozen" and path == "model.embed_tokens")
        for path, layer in model.named_modules()
    )
    optimizer.detach()
    beside.detach()
    assert same(values(model), values(plain))


def test_loading_what_is_there_writes_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", made())
    model = loaded(folder)
    optimizer = start(model, "frozen", tmp_path / "masters")
    model.load_state_dict(made().state_dict())
    assert optimizer.master_bytes_written == 0


def test_merged_adapters_come_out_of_their_masters_again(tmp_path: Path) -> None:
    """Bit for bit, as those in memory do; the model's own file is not the master meanwhile."""
    ends = []
    for masters in (None, tmp_path / "masters"):
        model = loaded(saved(tmp_path / "model", made()))
        optimizer = start(model, "lora", masters)
        run(model, optimizer, 0, 2)
        optimizer.merge()
        merged = values(model)
        assert len(generations(tmp_path / "masters")) == (0 if masters is None else 21)
        optimizer.unmerge()
        apart = {path: layer.stored_weight.clone() for path, layer in resting(model).items()}
        run(model, optimizer, 2, 3)
        optimizer.detach()
        ends.append([merged, apart, values(model)])
    assert all(same(one, other) for one, other in zip(*ends))


@pytest.mark.slow
def test_widths_that_no_block_divides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "TILE_ELEMENTS", 1 << 10)
    ends = []
    for masters in (None, tmp_path / "masters"):
        model = made(hidden_size=40, intermediate_size=72, num_attention_heads=4)
        run(model, start(model, "owlore", masters), 0, 5)
        ends.append(values(model))
    assert same(*ends)


# What goes wrong


def attached(tmp_path: Path, name: str = "frozen") -> tuple[Any, SampledAdamW, Path]:
    """Return a model after a settling, its optimizer, and the file of a master in which a layer that trains ends."""
    model = made(name)
    optimizer = start(model, name, tmp_path / "masters")
    run(model, optimizer, 0, 2)
    [active] = optimizer.active_layers
    [file] = (tmp_path / "masters").glob(f"model.layers.{active}.mlp.up_proj.weight.*")
    return model, optimizer, file


@pytest.mark.parametrize("how", ["written", seldom("replaced"), seldom("cut")])
def test_a_master_that_another_process_changed_is_refused(how: str, tmp_path: Path) -> None:
    """Before it is read, by a step and by who saves; a real process does it."""
    model, optimizer, file = attached(tmp_path)
    program = {
        "written": "f = open(p, 'r+b'); f.seek(5000); f.write(b'xyz'); f.close()",
        "replaced": "b = open(p, 'rb').read(); open(p + '.new', 'wb').write(b); os.replace(p + '.new', p)",
        "cut": "os.truncate(p, 4100)",
    }[how]
    subprocess.run([sys.executable, "-c", f"import os, sys; p = sys.argv[1]; {program}", str(file)], check=True)
    with pytest.raises(InputError, match=r"up_proj.weight, was changed by another process; resume from the last"):
        run(model, optimizer, 2, 4)
    with pytest.raises(InputError, match="changed by another process"):
        model.state_dict()


def test_the_model_file_that_another_process_changed_is_refused(tmp_path: Path) -> None:
    """Written into; one that was put in its place, or deleted, leaves what is mapped as it was."""
    folder = saved(tmp_path / "model", made())
    model = loaded(folder)
    optimizer = start(model, "frozen", tmp_path / "masters")
    [file] = folder.glob("*.safetensors")
    (tmp_path / "copy").write_bytes(file.read_bytes())
    with file.open("r+b") as opened:
        opened.write(b"x")
    with pytest.raises(InputError, match="was changed by another process"):
        model.state_dict()
    (tmp_path / "copy").rename(file)
    model.state_dict()
    file.unlink()
    run(model, optimizer, 0, 4)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_one_run_at_a_time_has_a_folder(tmp_path: Path) -> None:
    """Another process is refused; what a killed one has left goes, half-written files too."""
    first = made()
    optimizer = start(first, "frozen", tmp_path / "masters")
    model = made()
    before = anatomy(model)

    def be_refused() -> None:
        with pytest.raises(InputError, match="are in use by another run"):
            start(made(), "frozen", tmp_path / "masters")
        die()

    assert in_another_process(be_refused) == -signal.SIGKILL
    with pytest.raises(InputError, match="are in use by another run"):
        start(model, "frozen", tmp_path / "masters")
    assert anatomy(model) == before
    optimizer.detach()

    def be_killed() -> None:
        run(model, start(model, "frozen", tmp_path / "masters"), 0, 3)
        die()

    assert in_another_process(be_killed) == -signal.SIGKILL
    assert len(generations(tmp_path / "masters")) > 10
    (tmp_path / "masters" / f"x{files.SUFFIX}{tensor_file.PARTIAL}").write_bytes(b"half")
    model = loaded(saved(tmp_path / "model", made()))
    optimizer = start(model, "frozen", tmp_path / "masters")
    assert generations(tmp_path / "masters") == set()
    optimizer.detach()
    assert not (tmp_path / "masters").exists()


@pytest.mark.parametrize("at", [seldom(2), 5, seldom(9)])
def test_a_run_that_is_killed_in_a_settle_goes_on_as_if_it_had_not_been(at: int, tmp_path: Path) -> None:
    """In the middle of a generation; every master in the folder is whole then, old or new."""
    whole = made()
    run(whole, start(whole, "frozen", None), 0, 8)

    def be_killed() -> None:
        torch.manual_seed(0)
        model = made()
        optimizer = start(model, "frozen", tmp_path / "masters")
        run(model, optimizer, 0, 3)
        torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state")
        calls, fsync = [], os.fsync

        def sync(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) == at:
                die()
            fsync(descriptor)

        tensor_file.os.fsync = sync  # type: ignore[assignment]
        run(model, optimizer, 3, 8)

    assert in_another_process(be_killed) == -signal.SIGKILL
    seen = {path.name.rsplit(".", 3)[0]: load_file(path) for path in (tmp_path / "masters").glob(f"*{files.SUFFIX}")}
    assert all(tensor.isfinite().all() for loaded in seen.values() for tensor in loaded.values())
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    resumed = made()
    optimizer = start(resumed, "frozen", tmp_path / "masters")
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(state)
    run(resumed, optimizer, 3, 8)
    assert same(values(resumed), values(whole))


@pytest.mark.parametrize("how", ["a file", "no folder", "others", "small", "in 16 bits"])
def test_a_folder_that_cannot_hold_masters_is_refused(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one sentence, the model and the disk as they were."""
    folder, words = tmp_path / "some" / "masters", "cannot hold masters"
    if how == "a file":
        (tmp_path / "some").write_text("")
    elif how == "no folder":
        folder = Path("/proc/masters")
    elif how == "others":
        saved(folder, made())
        words = "holds .*, which is no master of a run; name an empty folder"
    elif how == "small":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(0, 0, 12_345))
        words = r"masters take up to [\d,]+ bytes on the disk, and .* has 12,345 left"
    else:
        words = "is for weights that rest in 8 or 4 bits"
    model, present = made(), sorted(tmp_path.rglob("*"))
    before = anatomy(model)
    with pytest.raises(InputError, match=words):
        attach(model, OWLORE, resting=None if how == "in 16 bits" else "nf4", masters=folder)
    assert anatomy(model) == before
    assert sorted(tmp_path.rglob("*")) == present


def test_a_device_is_for_weights_that_rest() -> None:
    with pytest.raises(InputError, match=r"device='cuda' is for a model whose weights are to rest.*model.to"):
        attach(made(), OWLORE, device="cuda")


def test_a_disk_that_fills_leaves_every_master_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a layer; the codes are those of the master, and with room the run goes on."""
    model, optimizer, _ = attached(tmp_path)
    before, present = values(model), sorted((tmp_path / "masters").iterdir())
    codes = {path: layer.codes.clone() for path, layer in resting(model).items()}
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file.os, "fsync", fsync)
        with pytest.raises(InputError, match=r"cannot write the master of .* \(No space left on device\)"):
            run(model, optimizer, 2, 4)
    # The first matrix and its folder were flushed, the second was not.
    changed = {path for path, was in codes.items() if not torch.equal(model.get_submodule(path).codes, was)}
    assert len(changed) == 1
    now = sorted((tmp_path / "masters").iterdir())
    assert len(now) == len(present)
    assert len(set(now) - set(present)) == 1
    for path in codes:
        layer = model.get_submodule(path)
        assert torch.equal(quantize_resting(layer.stored_weight.detach(), layer.kind)[0], layer.codes)
        if path not in changed:
            assert torch.equal(layer.stored_weight, before[f"{path}.weight"]) or layer.active
    optimizer.detach()


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    model = made()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    before = anatomy(model)
    with pytest.raises(InputError, match="holds a NaN"):
        start(model, "frozen", tmp_path / "masters")
    assert anatomy(model) == before
    assert not (tmp_path / "masters").exists()


@pytest.mark.slow
def test_at_the_end_of_a_process_its_masters_go(tmp_path: Path) -> None:
    """Where nobody has said that the run is over."""
    program = (
        "import os, sys; from test_masters import *\n"
        "model = made(); optimizer = start(model, 'frozen', sys.argv[1]); run(model, optimizer, 0, 3)\n"
        "assert len(os.listdir(sys.argv[1])) > 10\n"
    )
    where = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", program, str(tmp_path / "masters")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": where})
    assert not (tmp_path / "masters").exists()


@pytest.mark.slow
def test_a_thousand_switches_leave_no_map_and_no_file_behind(tmp_path: Path) -> None:
    """A layer is settled at each; files, maps and descriptors are as many after them as before."""
    model = made()
    method = OwLore(active_layers=1, period=1, rank=4, scores="uniform", embeddings="frozen")
    optimizer = attach(model, method, lr=1e-3, seed=1, resting="nf4", masters=tmp_path / "masters")

    def held() -> tuple[int, ...]:
        gc.collect()
        maps = sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())
        return (*(len(list(Path(place).iterdir())) for place in (tmp_path / "masters", "/proc/self/fd")), maps)

    run(model, optimizer, 0, 20)
    before = held()
    assert before[2] == before[0] - 1 == 23
    for step in range(20, 1020):
        train(model, optimizer, tokens(1, 2, seed=step))
    assert held() == before


def test_a_generation_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    model, _, file = attached(tmp_path)
    [(name, tensor)] = load_file(file).items()
    assert torch.equal(tensor, model.get_parameter(name))
    header, start_of_numbers = tensor_file.header_of(file)
    assert start_of_numbers % 4096 == 0
    assert json.dumps(header[name]["shape"]) == json.dumps(list(tensor.shape))
