"""Adapter folders: what is in them, what of peft's is taken over, and what is refused with nothing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ADAPTED, LAYERS, build, common, llama, logits, roberta_classifier, tokens, train
from safetensors.torch import load_file, save_file
from tolerances import BFLOAT16_PRODUCT, ORTHONORMAL, PRODUCT

from lisa_kernels import InputError, LoRAFA, attach
from lisa_kernels.layers import LowRankLinear
from lisa_kernels.methods import SampledAdamW
from lisa_kernels.methods.peft_folder import split

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def attached(model: Any, steps: int = 0, **settings: Any) -> SampledAdamW:
    """Attach LoRA-FA of rank 4 and take some steps."""
    optimizer = attach(model, LoRAFA(**{"rank": 4, "alpha": 8, **settings}), lr=1e-2)
    for seed in range(steps):
        train(model, optimizer, tokens(seed=seed))
    return optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter folder of a Llama that took some steps; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    attached(llama(), steps=2).save_adapter(folder)
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "damaged")


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_the_folder_holds_the_factors_under_pefts_names(tmp_path: Path) -> None:
    """lora_A is the frozen A [r, n], lora_B is Bᵀ [m, r], both float32, scaled by lora_alpha / r."""
    model = llama().to(torch.bfloat16)
    attached(model, steps=1).save_adapter(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert len(tensors) == 2 * len(layers) == 2 * 7 * LAYERS
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    for name, layer in layers.items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], layer.basis.float())
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], layer.slot.detach().t())
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)


@pytest.mark.parametrize(
    ("name", "task", "transposed", "heads"),
    [
        ("llama", "CAUSAL_LM", False, None),
        ("gpt2", "CAUSAL_LM", True, None),
        ("t5", "SEQ_2_SEQ_LM", False, None),
        ("roberta-masked", None, False, None),
        ("roberta-classifier", "SEQ_CLS", False, ["classifier"]),
        ("llama-classifier", "SEQ_CLS", False, ["score"]),
    ],
)
def test_the_settings_say_what_the_model_is(
    name: str, task: str | None, transposed: bool, heads: list[str] | None, tmp_path: Path
) -> None:
    """Its task where peft has a name for it, weights stored transposed, and heads saved in full."""
    attached(ADAPTED[name].make()).save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["task_type"], config["fan_in_fan_out"], config["modules_to_save"]) == (task, transposed, heads)
    assert (config["auto_mapping"] is None) == (task is not None)


@pytest.mark.parametrize(
    ("name", "targets", "wanted"),
    [
        ("llama", ("v_proj", "self_attn.q_proj"), ["q_proj", "v_proj"]),
        ("llama", "layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        ("gpt2", "attn.c_proj", [f"transformer.h.{index}.attn.c_proj" for index in range(LAYERS)]),
        ("roberta-classifier", "all-linear", ["dense", "key", "query", "value"]),
    ],
    ids=["all of a name", "one layer", "two layers of a name", "a head passed over"],
)
def test_target_modules_name_these_layers_and_no_others(
    name: str, targets: Any, wanted: list[str], tmp_path: Path
) -> None:
    """A name stands for all its layers only where all of them have adapters; peft then finds exactly these."""
    import peft

    model = ADAPTED[name].make()
    attached(model, targets=targets).save_adapter(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"] == wanted
    theirs = peft.PeftModel.from_pretrained(ADAPTED[name].make(), tmp_path / "adapter").get_base_model()
    found = {path for path, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert found == {path for path, module in model.named_modules() if isinstance(module, LowRankLinear)}


@pytest.mark.parametrize("merged", [False, True], ids=["beside the weights", "merged"])
def test_saving_changes_nothing_and_replaces_an_adapter(merged: bool, tmp_path: Path) -> None:
    """A second save writes over the first; merged or not, the same bytes are written."""
    model = llama()
    optimizer = attached(model, steps=1)
    optimizer.save_adapter(tmp_path / "adapter")
    first = (tmp_path / "adapter" / WEIGHTS).read_bytes()
    if merged:
        optimizer.merge()
    before = logits(model)
    optimizer.save_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(model), before)
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    """A model's folder, an adapter's with a note in it and a file stay as they are."""
    optimizer = attached(llama())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    optimizer.save_adapter(tmp_path / "noted")
    (tmp_path / "noted" / "README.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, reason in (("model", "config.json"), ("noted", "README.md"), ("file", "is a file")):
        with pytest.raises(InputError, match=reason):
            optimizer.save_adapter(tmp_path / name)
    assert (tmp_path / "noted" / "README.md").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "noted", "file"}


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two files the disk is full: neither of them, nor a part, is left."""
    optimizer = attached(llama())

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        optimizer.save_adapter(tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


def test_a_round_trip_is_bit_equal(saved: Path) -> None:
    """What was saved comes back as it was, and the moments start anew."""
    model, other = llama(), llama()
    attached(model, steps=2)
    optimizer = attached(other, steps=1, alpha=8)
    optimizer.load_adapter(saved)
    assert torch.equal(logits(other), logits(model))
    assert not optimizer.state
    for layer, same in zip(model.modules(), other.modules()):
        if isinstance(layer, LowRankLinear):
            assert torch.equal(layer.basis, same.basis)
            assert torch.equal(layer.slot, same.slot)
    assert train(other, optimizer, tokens()) > train(other, optimizer, tokens())


def test_another_alpha_gives_the_same_function(saved: Path) -> None:
    """The adapter's scale counts; what this model was attached with goes into B."""
    model, other = llama(), llama()
    attached(model, steps=2)
    attached(other, alpha=24).load_adapter(saved)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-6)


def test_a_new_head_comes_back(tmp_path: Path) -> None:
    """It is saved in full beside the adapters; a file without it leaves the model's own."""
    batch = ADAPTED["roberta-classifier"].batch()
    model, other, bare = roberta_classifier(), roberta_classifier(), roberta_classifier()
    optimizer = attached(model)
    for _ in range(3):
        train(model, optimizer, batch)
    optimizer.save_adapter(tmp_path / "adapter")
    attached(other).load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(other, batch), logits(model, batch))
    own = bare.classifier.out_proj.weight.clone()
    change_weights(
        tmp_path / "adapter", lambda tensors: [tensors.pop(key) for key in list(tensors) if "classifier" in key]
    )
    attached(bare).load_adapter(tmp_path / "adapter")
    assert torch.equal(bare.classifier.out_proj.weight, own)
    assert not torch.equal(model.classifier.out_proj.weight, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["random", "rank-deficient", "orthonormal"])
def test_a_product_is_split_into_an_orthonormal_basis_and_a_slot(kind: str, dtype: torch.dtype) -> None:
    """slotᵀ @ basis is the product, to rounding, and the nearest to it in the span of a basis that was rounded too; an
    orthonormal A that the dtype holds is taken as it is.
    """
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=generator) * 3 for shape in ((8, 96), (40, 8)))
    if kind == "rank-deficient":
        down[5:] = down[:3]
    if kind == "orthonormal":
        down = torch.linalg.qr(down.t()).Q.t().to(dtype).float()
    basis, slot = split(down, up, dtype)
    assert basis.dtype == dtype
    assert slot.dtype == torch.float32
    bound, gram = (PRODUCT, ORTHONORMAL) if dtype == torch.float32 else (BFLOAT16_PRODUCT, 2**-7)
    wanted = up.double() @ down.double()
    rest = slot.double().t() @ basis.double() - wanted
    assert rest.norm() <= bound * wanted.norm()
    assert (rest @ basis.double().t()).norm() <= PRODUCT * wanted.norm()
    torch.testing.assert_close(basis.double() @ basis.double().t(), torch.eye(8).double(), rtol=0, atol=gram)
    if kind == "orthonormal":
        assert torch.equal(basis.float(), down)
        assert torch.equal(slot, up.t())


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "has no adapter_config.json"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "a broken config": (lambda folder: (folder / CONFIG).write_text("{"), "no whole adapter"),
    "a config that is a list": (lambda folder: (folder / CONFIG).write_text("[]"), "holds no settings"),
    "weights cut short": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-40]),
        "no whole adapter",
    ),
    "weights that are text": (lambda folder: (folder / WEIGHTS).write_text("text"), "no whole adapter"),
    "another type": (lambda folder: change_config(folder, peft_type="IA3"), "type IA3; LORA is wanted"),
    "another rank": (lambda folder: change_config(folder, r=8), r"rank 8.*LoRAFA\(rank=8\)"),
    "no alpha": (lambda folder: change_config(folder, lora_alpha=None), "lora_alpha None"),
    "dora": (lambda folder: change_config(folder, use_dora=True), "uses use_dora"),
    "rslora": (lambda folder: change_config(folder, use_rslora=True), "uses use_rslora"),
    "ranks by pattern": (lambda folder: change_config(folder, rank_pattern={"q_proj": 2}), "uses rank_pattern"),
    "alphas by pattern": (lambda folder: change_config(folder, alpha_pattern={"q_proj": 2}), "uses alpha_pattern"),
    "a start that moves the base": (
        lambda folder: change_config(folder, init_lora_weights="pissa"),
        "init_lora_weights=pissa",
    ),
    "a layer short": (
        lambda folder: change_weights(
            folder, lambda tensors: tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
        ),
        "has no model.layers.1.mlp.up_proj.lora_B.weight",
    ),
    "a layer more": (
        lambda folder: change_weights(
            folder, lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)})
        ),
        "no place for",
    ),
    "weights that train in full": (
        lambda folder: change_weights(
            folder, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(61, 32)})
        ),
        "lm_head.weight, which this model has no place for",
    ),
    "a NaN": (
        lambda folder: change_weights(
            folder,
            lambda tensors: tensors["base_model.model.model.layers.2.self_attn.o_proj.lora_A.weight"].fill_(torch.nan),
        ),
        "holds a NaN",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_changes(case: str, damaged: Path) -> None:
    """One clear error names the reason; bases, slots and moments are what they were."""
    spoil, reason = REFUSED[case]
    spoil(damaged)
    model = llama()
    optimizer = attached(model, steps=1)
    before = logits(model)
    count = len(optimizer.state)
    with pytest.raises(InputError, match=reason):
        optimizer.load_adapter(damaged)
    assert torch.equal(logits(model), before)
    assert len(optimizer.state) == count > 0


@pytest.mark.parametrize(
    ("make", "settings", "reason"),
    [
        (lambda: llama(hidden_size=64), {}, "this model needs"),
        (lambda: llama(layers=4), {}, "has no model.layers.3"),
        (lambda: llama(layers=2), {}, "no place for"),
        (llama, {"targets": "q_proj"}, "with its targets"),
        (llama, {"rank": 8}, "rank 4, this model was attached with rank 8"),
        (lambda: build("Phi3ForCausalLM", "Phi3Config", **common()), {}, "has no model.layers.0"),
    ],
    ids=["wider", "deeper", "shallower", "other targets", "another rank", "another family"],
)
def test_an_adapter_of_another_model_is_refused(
    make: Callable[[], Any], settings: dict[str, Any], reason: str, saved: Path
) -> None:
    """A base of another shape, with other layers or attached otherwise, is named; it computes what it did."""
    model = make()
    optimizer = attached(model, **settings)
    before = logits(model)
    with pytest.raises(InputError, match=reason):
        optimizer.load_adapter(saved)
    assert torch.equal(logits(model), before)
