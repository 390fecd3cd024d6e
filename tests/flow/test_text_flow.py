"""Flows whose layers are copies of a frozen decoder's, which reads texts for them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lisa_kernels import InputError, TimestepExperts, attach
from lisa_kernels.cli import main
from lisa_kernels.flow import Intervals
from lisa_kernels.flow.context import read_context
from lisa_kernels.flow.path import flow_loss
from lisa_kernels.flow.replica import replicate
from lisa_kernels.flow.sample import guided, sample
from lisa_kernels.flow.text_flow import Reader, TextFlow
from lisa_kernels.flow.transformer import FlowShape
from lisa_kernels.train.models import train_tokenizer

from .small_run import arguments, forget_after, summary
from .test_transformer import runs, woken

TEXTS = ("a handwritten seven", "an owl", "a rather long text about something else")
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def decoder(kind: str = "Llama", **changed: Any) -> Any:
    """Return a decoder with random weights that are far from those it would begin with."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "bos_token_id": 0, "eos_token_id": 0, **changed})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.1)
    return model


@cache
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300)


def text_flow(kind: str = "Llama", groups: int = 2, **changed: Any) -> TextFlow:
    shape = FlowShape(1, 8, 8, len(TEXTS), patch=4, reuse="before")
    made = TextFlow(shape, Intervals.make(groups), Reader(decoder(kind, **changed), tokenizer()), TEXTS)
    return woken(made).eval()  # type: ignore[arg-type, return-value]


def images(rows: int = 3) -> Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("kind", "changed"),
    [("Llama", {}), ("Qwen2", {}), ("Qwen3", {"head_dim": 16}), ("Mistral", {"num_key_value_heads": 4})],
)
def test_copies_do_what_the_decoder_s_layers_do(kind: str, changed: dict[str, Any]) -> None:
    """Each is checked where it is made, on a text's last token; copies that were changed are noticed."""
    model = decoder(kind, **changed)
    blocks, _ = replicate(model, "none", 2)
    assert len(blocks) == 4
    assert all(param.requires_grad for block in blocks for param in block.parameters())
    first = model.model.layers[0].self_attn
    first.scaling *= 1.1
    with pytest.raises(InputError, match="computes something else"):
        replicate(model, "none", 2)


@pytest.mark.parametrize(("kind", "said"), [("GPT2", "no rotary embedding"), ("Gemma2", "computes something else")])
def test_decoders_of_another_build_are_refused(kind: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        replicate(decoder(kind), "none", 2)


def test_the_decoder_s_logits_stay_as_they_are_to_the_bit() -> None:
    """Through training, evaluation and sampling beside it; it is no part of the model and holds no gradient."""
    model = text_flow()
    reader, ids = model.reader.decoder, torch.arange(20)[None]
    before, weights = reader(ids).logits, copy.deepcopy(reader.state_dict())
    optimizer: Any = attach(model.train(), TimestepExperts(groups=2), lr=1e-2, blocks="blocks")
    for _ in range(2):
        flow_loss(model, images(), optimizer.times(3), model.condition(torch.arange(3))).backward()
        optimizer.step()
        optimizer.zero_grad()
    sample(model.eval(), model.route, images(), model.condition(torch.arange(3)), steps=2)
    assert torch.equal(reader(ids).logits, before)
    assert all(torch.equal(weight, weights[name]) for name, weight in reader.state_dict().items())
    ours = {id(param) for param in model.parameters()}
    assert not ours & {id(param) for param in reader.parameters()}
    assert all(param.grad is None for param in reader.parameters())


def test_texts_are_read_once() -> None:
    """Not again in training, sampling or guidance."""
    model = text_flow()
    read: list[int] = []
    model.reader.decoder.register_forward_pre_hook(lambda *_: read.append(1))
    ran = runs(model)  # type: ignore[arg-type]
    anything = model.condition(torch.full((3,), model.any_class))
    sample(guided(model, 2.0, anything), model.route, images(), model.condition(torch.arange(3)), steps=4)
    assert not read
    assert ran == [0, 1, 0, 1, 2, 3, 2, 3]
    model.tell(["another text"])
    assert len(read) == 1


def test_what_is_drawn_depends_on_the_text_and_not_on_its_neighbours() -> None:
    """Padding of shorter texts is seen by nothing: a text alone is as it is beside a longer one."""
    model = text_flow()
    x, t = images(1), torch.full((1,), 0.3)
    found = [model(x, t, model.condition(torch.tensor([label]))) for label in range(3)]
    assert not torch.allclose(found[0], found[1])
    model.tell(TEXTS[:1])
    torch.testing.assert_close(model(x, t, model.condition(torch.tensor([0]))), found[0])


def test_a_text_reads_as_the_decoder_reads_it_alone() -> None:
    model = decoder()
    ids = [tokenizer()(text)["input_ids"] for text in TEXTS]
    together = read_context(model, ids)
    assert together.lengths.tolist() == [len(row) for row in ids]
    for place, row in enumerate(ids):
        alone = read_context(model, [row]).layer(3)
        keys = together.layer(3)
        torch.testing.assert_close(keys.key[place : place + 1, :, : len(row)], alone.key)
        torch.testing.assert_close(keys.value[place : place + 1, :, : len(row)], alone.value)
    with pytest.raises(InputError, match="no tokens"):
        read_context(model, [[1], []])


def test_what_a_text_says_is_learnt() -> None:
    """Bright images for one text, dark ones for another: after training each text draws its own."""
    model = text_flow()
    optimizer: Any = attach(model.train(), TimestepExperts(groups=2), lr=5e-3, blocks="blocks")
    generator = torch.Generator().manual_seed(0)
    for _ in range(160):
        labels = torch.randint(2, (16,), generator=generator)
        noise, grain = torch.randn(2, 16, 1, 8, 8, generator=generator)
        data = 0.8 - 1.6 * labels[:, None, None, None] + 0.1 * grain
        flow_loss(model, data, optimizer.times(16), model.condition(labels), noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    labels = torch.arange(8) % 2
    found = sample(model.eval(), model.route, images(8), model.condition(labels), steps=8).mean(dim=(1, 2, 3))
    assert (found[::2] > 0.4).all()
    assert (found[1::2] < -0.4).all()


def test_texts_follow_the_model_to_its_device_and_the_decoder_does_not() -> None:
    """So a card need not hold the decoder; on a device without values only places can be looked at."""
    model = text_flow().to("meta")
    condition = model.condition(torch.arange(3, device="meta"))
    velocity = model._velocity(0, images().to("meta"), torch.zeros(3, device="meta"), condition)
    assert velocity.device.type == condition.mask.device.type == "meta"
    assert {param.device.type for param in model.reader.decoder.parameters()} == {"cpu"}


def test_a_batch_of_several_groups_takes_each_image_s_own_text() -> None:
    model = text_flow()
    times, labels = torch.tensor([0.9, 0.1, 0.8]), torch.tensor([2, 0, 1])
    together = model(images(), times, model.condition(labels))
    for place in range(3):
        one = slice(place, place + 1)
        alone = model(images()[one], times[one], model.condition(labels[one]))
        torch.testing.assert_close(together[one], alone)


def test_groups_that_do_not_divide_the_decoder_s_layers_are_refused() -> None:
    with pytest.raises(InputError, match="4 layers do not divide into 3 groups"):
        text_flow(groups=3)


def test_a_run_beside_a_backbone_is_stopped_resumed_and_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line, with texts of its own afterwards; a backbone that changed is refused."""
    folder, output, plot = tmp_path / "backbone", tmp_path / "run", tmp_path / "grid.png"
    decoder().save_pretrained(folder)
    train_tokenizer(["a handwritten digit of a picture"], 300).save_pretrained(folder)
    flags = arguments(output, "--backbone", str(folder), "--steps", "2", "--save-every", "1")
    flags = [flag for flag in flags if flag not in ("--layers", "4", "--hidden", "64", "--patch")] + ["--patch", "4"]
    assert main(flags) == 0
    assert summary(output)["eval_loss_after"] > 0
    whole = forget_after(output, 1)
    assert main([*flags, "--resume"]) == 0
    assert (output / "flow.safetensors").read_bytes() == whole
    told = ["flow", "sample", "--model", str(output), "--plot", str(plot), "--steps", "2", "--count", "1"]
    assert main([*told, "--text", "a handwritten seven"]) == 0
    assert main([*told, "--label", "7"]) == 0
    changed = decoder(rms_norm_eps=1e-3)
    changed.save_pretrained(folder)
    capsys.readouterr()
    assert main([*told, "--label", "7"]) == 2
    assert "not there as it was" in capsys.readouterr().err
    assert main([*flags, "--layers", "8"]) == 2
    assert "--layers follows from" in capsys.readouterr().err
