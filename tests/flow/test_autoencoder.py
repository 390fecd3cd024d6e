"""Flows of latents: an autoencoder of diffusers encodes pictures once and decodes what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_kernels import InputError
from lisa_kernels.cli import main
from lisa_kernels.flow.autoencoder import check_same_latents, fit_autoencoder, load_described
from lisa_kernels.flow.data import Images, load_images
from lisa_kernels.flow.model_file import load_model
from lisa_kernels.flow.pictures import make_images

from .small_run import arguments, forget_after, summary

CPU = torch.device("cpu")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; its autoencoders make latents")


def autoencoder(kind: str = "kl", channels: int = 1, seed: int = 0) -> Any:
    """Return a small autoencoder that halves both sides, with random weights."""
    torch.manual_seed(seed)
    if kind == "tiny":
        return diffusers.AutoencoderTiny(
            channels, channels, (8, 8), (8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
            upsampling_scaling_factor=2,
        )  # fmt: skip
    return diffusers.AutoencoderKL(
        channels, channels, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (8, 8), latent_channels=3,
        norm_num_groups=4,
    )  # fmt: skip


def saved(folder: Path, **more: Any) -> Path:
    autoencoder(**more).save_pretrained(folder)
    return folder


def pictures(channels: int = 1, side: int = 8) -> Images:
    pixels = torch.rand(5, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Images(pixels, torch.arange(5) % 2, ("cat", "owl"))


@pytest.mark.parametrize(("kind", "channels"), [("kl", 1), ("kl", 3), ("tiny", 3)])
def test_latents_are_centred_and_decode_to_what_the_autoencoder_makes_of_them(
    kind: str, channels: int, tmp_path: Path
) -> None:
    """Of mean 0 and deviation 1 in every channel, and sampled from no distribution: the same again."""
    images = pictures(channels)
    found, latents = fit_autoencoder(str(saved(tmp_path, kind=kind, channels=channels)), images, CPU)
    std, mean = torch.std_mean(latents.pixels, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(std, torch.ones_like(std))
    assert torch.equal(latents.labels, images.labels)
    theirs = autoencoder(kind, channels)
    with torch.no_grad():
        encoded = theirs.encode(images.pixels)
        inner = encoded.latents if kind == "tiny" else encoded.latent_dist.mode()
        wanted = theirs.decode(inner).sample
    torch.testing.assert_close(found.decode(latents.pixels), wanted)
    again = load_described(found.described(), tmp_path)
    assert torch.equal(again.decode(latents.pixels), found.decode(latents.pixels))


def test_grey_pictures_pass_through_colours(tmp_path: Path) -> None:
    """An autoencoder of three channels is shown one three times, and what it makes is grey again."""
    grey = pictures()
    found, latents = fit_autoencoder(str(saved(tmp_path, channels=3)), grey, CPU)
    _, coloured = fit_autoencoder(
        str(tmp_path), Images(grey.pixels.expand(-1, 3, -1, -1), grey.labels, grey.names), CPU
    )
    torch.testing.assert_close(latents.pixels, coloured.pixels)
    assert found.decode(latents.pixels).shape == (5, 1, 8, 8)


def test_a_channel_that_says_nothing_stays_so(tmp_path: Path) -> None:
    model = autoencoder()
    with torch.no_grad():
        model.quant_conv.weight[0] = 0
    model.save_pretrained(tmp_path)
    _, latents = fit_autoencoder(str(tmp_path), pictures(), CPU)
    assert latents.pixels[:, 0].abs().max() < 1e-6
    assert latents.pixels[:, 1].std() > 0.5


def test_large_pictures_pass_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time they become what they become together."""
    folder = str(saved(tmp_path))
    found, latents = fit_autoencoder(folder, pictures(), CPU)
    monkeypatch.setattr("lisa_kernels.flow.autoencoder._PIXELS_AT_ONCE", 1)
    parts, one_by_one = fit_autoencoder(folder, pictures(), CPU)
    torch.testing.assert_close(one_by_one.pixels, latents.pixels)
    torch.testing.assert_close(parts.decode(latents.pixels), found.decode(latents.pixels))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing", "no config.json"),
        ("pickle", "cannot be loaded"),
        ("dit", "does not encode and decode"),
        ("odd size", r"makes 1 × 6 × 6 of pictures of 1 × 7 × 7; give an --image-size"),
        ("colours", r"does not take pictures of 3 × 8 × 8"),
    ],
)
def test_what_cannot_encode_the_pictures_is_refused(what: str, said: str, tmp_path: Path) -> None:
    images = pictures(3 if what == "colours" else 1, 7 if what == "odd size" else 8)
    if what == "dit":
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=4
        ).save_pretrained(tmp_path)
    elif what != "nothing":
        autoencoder().save_pretrained(tmp_path, safe_serialization=what != "pickle")
    with pytest.raises(InputError, match=said):
        fit_autoencoder(str(tmp_path), images, CPU)


def test_a_run_on_latents_is_stopped_resumed_and_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit, its samples decoded; without the autoencoder as it was neither goes on."""
    folder, output, plot = saved(tmp_path / "vae"), tmp_path / "run", tmp_path / "grid.png"
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    flags = arguments(output, "--patch", "2", "--autoencoder", str(folder), "--steps", "2", "--save-every", "1")
    assert main(flags) == 0
    assert "latents of 3 × 4 × 4 for pictures of 1 × 8 × 8" in capsys.readouterr().err
    assert summary(output)["eval_loss_after"] > 0
    assert (output / "samples.png").stat().st_size > 1000
    model, _, found = load_model(output)
    assert model.shape.channels == 3
    assert make_images(model, torch.zeros(2, dtype=torch.int64), steps=2, autoencoder=found).shape == (2, 1, 8, 8)
    whole = forget_after(output, 1)
    assert main([*flags, "--resume"]) == 0
    assert (output / "flow.safetensors").read_bytes() == whole
    told = ["flow", "sample", "--model", str(output), "--plot", str(plot), "--steps", "2", "--count", "1"]
    assert main(told) == 0
    assert (folder / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    saved(folder, seed=1)
    capsys.readouterr()
    assert main(told) == 2
    assert "latents of the autoencoder" in capsys.readouterr().err
    assert main([*flags, "--resume"]) == 2
    assert "--autoencoder has changed" in capsys.readouterr().err


def test_a_flow_begins_from_one_of_the_same_latents(tmp_path: Path) -> None:
    """Not from one of pixels, of another autoencoder or of latents that were brought to other sizes."""
    one, _ = fit_autoencoder(str(saved(tmp_path / "one")), pictures(), CPU)
    other, _ = fit_autoencoder(str(saved(tmp_path / "other", seed=1)), pictures(), CPU)
    digits, _ = fit_autoencoder(str(tmp_path / "one"), load_images("digits"), CPU)
    for pair in ((None, None), (one, one), (load_described(one.described(), tmp_path), one)):
        check_same_latents(*pair, tmp_path)
    for pair in ((one, None), (None, one), (one, other), (one, digits)):
        with pytest.raises(InputError, match="begin from a flow of the same"):
            check_same_latents(*pair, tmp_path)
