"""Pictures as latents: an autoencoder of diffusers stays as it is, encodes them once and decodes what is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.flow.data import Images
from lisa_kernels.requirements import require
from lisa_kernels.train.identity import checksum_of_folder

# Of pictures that are encoded or decoded together: two of 512 × 512.
_PIXELS_AT_ONCE = 1 << 19
# Where the autoencoders of diffusers put latents: a distribution, whose mode is taken, or the numbers themselves.
_LATENTS = ("latents", "latent")


@dataclass(frozen=True)
class Autoencoder:
    """A frozen autoencoder, and what brings its latents to mean 0 and standard deviation 1 in every channel.

    path: the folder it was loaded from. picture: channels, height and width. mean, std: float32 [latent channels], of
    the pictures that a run was given.
    """

    model: Any
    path: str
    picture: tuple[int, int, int]
    mean: Tensor
    std: Tensor

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures, float32 [images, channels, height, width]; the work is done where the latents are."""
        latents = latents * _channels(self.std).to(latents) + _channels(self.mean).to(latents)
        return _decoded(self.model, latents, self.picture)

    def described(self) -> dict[str, Any]:
        """Return plain values by which `load_described` finds the same."""
        return {
            "path": self.path, "checksum": checksum_of_folder(Path(self.path)), "picture": list(self.picture),
            "mean": self.mean.tolist(), "std": self.std.tolist(),
        }  # fmt: skip


def fit_autoencoder(spec: str, images: Images, device: torch.device) -> tuple[Autoencoder, Images]:
    """Return the autoencoder in a folder of diffusers, and the images with their latents in place of pixels.

    Latents are float32 [images, latent channels, height, width] on the CPU, of mean 0 and standard deviation 1.

    Raises InputError for a folder without one, and for pictures that it cannot encode and decode again.
    """
    folder = Path(spec).expanduser()
    model = _load(folder)
    _check_both_ways(model, images, folder, device)
    latents = _encoded(model, images.pixels, device)
    std, mean = torch.std_mean(latents.double(), dim=(0, 2, 3), correction=0)
    # A channel that never changes has nothing to be divided by.
    std = torch.where(std > 0, std, torch.ones_like(std))
    found = Autoencoder(model, str(folder), images.shape, mean.float(), std.float())
    return found, replace(images, pixels=(latents - _channels(found.mean)) / _channels(found.std))


def check_same_latents(one: Autoencoder | None, other: Autoencoder | None, spec: Path) -> None:
    """Raise InputError unless both flows, the second from `spec`, have latents of one meaning, or both have none."""
    known = [None if each is None else each.described() for each in (one, other)]
    checksums = [None if each is None else each["checksum"] for each in known]
    if checksums[0] == checksums[1] and all(
        one is None or other is None or torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-3, atol=1e-3)
        for name in ("mean", "std")
    ):
        return
    raise InputError(
        f"the flow in {spec} draws {'pixels' if other is None else 'latents of ' + other.path}, and this run "
        f"{'pixels' if one is None else 'latents of ' + one.path}, or of other pictures; begin from a flow of the same "
        "pictures and the same --autoencoder."
    )


def load_described(values: Mapping[str, Any], folder: Path) -> Autoencoder:
    """Return the autoencoder whose latents the flow in `folder` learnt; InputError where it has changed since."""
    path = Path(values["path"])
    if not path.is_dir() or checksum_of_folder(path) != values["checksum"]:
        raise InputError(
            f"the flow in {folder} was trained on latents of the autoencoder in {path}, which is not there as it was; "
            "put it back, for nothing else decodes them."
        )
    channels, height, width = values["picture"]
    mean, std = (torch.tensor(values[name], dtype=torch.float32) for name in ("mean", "std"))
    return Autoencoder(_load(path), values["path"], (channels, height, width), mean, std)


def _load(folder: Path) -> Any:
    require("--autoencoder", "diffusers", extra="latents")
    from diffusers import AutoModel

    if not (folder / "config.json").is_file():
        raise InputError(
            f"--autoencoder {folder} has no config.json; give a folder that save_pretrained of diffusers' "
            "AutoencoderKL or AutoencoderTiny wrote, such as the folder vae of a pipeline."
        )
    try:
        model = AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(f"--autoencoder {folder} cannot be loaded by diffusers ({error}).") from error
    if not all(callable(getattr(model, name, None)) for name in ("encode", "decode")):
        raise InputError(f"--autoencoder {folder} holds a {type(model).__name__}, which does not encode and decode.")
    return model.float().eval().requires_grad_(False)


def _check_both_ways(model: Any, images: Images, folder: Path, device: torch.device) -> None:
    """Raise InputError unless one picture comes back in its own size."""
    channels, height, width = images.shape
    said = f"pictures of {channels} × {height} × {width}"
    try:
        back = _decoded(model, _encoded(model, images.pixels[:1], device).to(device), images.shape)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"the autoencoder in {folder} ({type(model).__name__}) does not take {said} and give them back ({error}); "
            "another --image-size may do."
        ) from error
    if back.shape[1:] != images.shape:
        raise InputError(
            f"the autoencoder in {folder} makes {' × '.join(map(str, back.shape[1:]))} of {said}; give an --image-size "
            "that it divides."
        )


def _encoded(model: Any, pixels: Tensor, device: torch.device) -> Tensor:
    """Return latents as the autoencoder has them, on the CPU."""
    wanted = getattr(model.config, "in_channels", pixels.shape[1])
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, wanted, -1, -1)
    return _in_parts(lambda part: _latents(model.encode(part)).cpu(), pixels, pixels[0, 0].numel(), model, device)


def _latents(encoded: Any) -> Tensor:
    if (distribution := getattr(encoded, "latent_dist", None)) is not None:
        found = distribution.mode()
    else:
        found = next((getattr(encoded, name) for name in _LATENTS if hasattr(encoded, name)), None)
    if not isinstance(found, Tensor) or found.dim() != 4:
        raise ValueError("what it encodes to are no latents with channels, height and width")
    return found


def _decoded(model: Any, latents: Tensor, picture: tuple[int, int, int]) -> Tensor:
    channels, height, width = picture
    pixels = _in_parts(lambda part: model.decode(part).sample, latents, height * width, model, latents.device)
    return pixels.mean(dim=1, keepdim=True) if channels == 1 else pixels


@torch.no_grad()
def _in_parts(
    run: Callable[[Tensor], Tensor], rows: Tensor, pixels: int, model: Any, device: torch.device
) -> Tensor:  # fmt: skip
    """Return what `run` makes of the rows on a device, a few at a time; the autoencoder is on the CPU afterwards."""
    model.to(device)
    try:
        return torch.cat([run(part.to(device)).float() for part in rows.split(max(1, _PIXELS_AT_ONCE // pixels))])
    finally:
        model.to("cpu")


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None]
