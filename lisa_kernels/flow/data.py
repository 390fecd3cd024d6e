"""Images with labels for a flow to learn: handwritten digits, files in MNIST's format, or a folder of pictures."""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.requirements import require

ACCEPTED = (
    "digits, fashion-mnist or mnist (with the folder of their files, as in mnist:FOLDER), or a folder of pictures, a "
    "subfolder for each class"
)
# Where Debian's dataset-fashion-mnist puts its files.
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".pgm", ".ppm")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GARMENTS = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_IMAGES_MAGIC, _LABELS_MAGIC = 0x803, 0x801


@dataclass(frozen=True)
class Images:
    """pixels: float32 [images, channels, height, width] from −1 to 1; labels: int64 [images], places in `names`.

    Latents of an autoencoder stand in for pixels where one was given.
    kind: what an image is called in a sentence, as "handwritten {}" of a class's name.
    """

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]
    kind: str = "{}"
    notes: list[str] = field(default_factory=list, compare=False)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def text(self, label: int) -> str:
        """Return a class in words, as "a handwritten seven"."""
        words = self.kind.format(self.names[label])
        return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"

    def digest(self) -> str:
        """Return SHA-256 of pixels and labels, as 64 hexadecimal digits."""
        checksum = hashlib.sha256(repr((tuple(self.pixels.shape), self.names)).encode())
        checksum.update(self.pixels.numpy().tobytes() + self.labels.numpy().tobytes())
        return checksum.hexdigest()

    def split(self, share: float, seed: int) -> tuple[Images, Images]:
        """Return (what trains, what is held out): of each class the same share, at least one where there are two."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held = torch.zeros(len(self), dtype=torch.bool)
        for label in range(len(self.names)):
            mine = order[self.labels[order] == label]
            count = min(math.ceil(share * len(mine)), len(mine) - 1) if share and len(mine) else 0
            held[mine[:count]] = True
        return self._part(~held), self._part(held)

    def _part(self, mask: Tensor) -> Images:
        return Images(self.pixels[mask], self.labels[mask], self.names, self.kind)


def load_images(spec: str, size: int | None = None) -> Images:
    """Return the images that `spec` names, resized to size × size pixels where that is given.

    Raises InputError for what cannot be read as images.
    """
    name, _, folder = spec.partition(":")
    if name == "digits":
        images = _digits()
    elif name in ("mnist", "fashion-mnist"):
        images = _idx_images(name, folder)
    elif not Path(spec).expanduser().is_dir():
        raise InputError(f"--data {spec!r} is no folder that is there; give {ACCEPTED}.")
    else:
        return _folder_images(Path(spec).expanduser(), size)
    if size is None or images.shape[1:] == (size, size):
        return images
    return Images(resized(images.pixels, size), images.labels, images.names, images.kind)


def resized(pixels: Tensor, size: int) -> Tensor:
    """Return [images, channels, size, size] by averaging over what falls into each new pixel."""
    if size < 1:
        raise InputError(f"--image-size is {size}; at least 1 pixel is wanted.")
    return torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True).clamp(-1, 1)


def _digits() -> Images:
    require("--data digits", "sklearn", extra="flow")
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images.astype(np.float32))[:, None] / 8 - 1
    return Images(pixels, torch.from_numpy(found.target.astype(np.int64)), DIGITS, "handwritten {}")


def _idx_images(name: str, folder: str) -> Images:
    place = Path(folder).expanduser() if folder else FASHION_FOLDER
    if not folder and (name == "mnist" or not place.is_dir()):
        hint = " (on Debian, apt install dataset-fashion-mnist puts them where they are found)"
        raise InputError(
            f"--data {name} needs the folder of its files: give {name}:FOLDER, with train-images-idx3-ubyte and "
            f"train-labels-idx1-ubyte in it{hint if name == 'fashion-mnist' else ''}."
        )
    pixels = read_idx(_idx_file(place, "train-images", "idx3"), _IMAGES_MAGIC)
    labels = read_idx(_idx_file(place, "train-labels", "idx1"), _LABELS_MAGIC)
    names, kind = (DIGITS, "handwritten {}") if name == "mnist" else (GARMENTS, "piece of clothing: {}")
    if len(pixels) != len(labels) or not len(pixels) or int(labels.max()) >= len(names):
        raise InputError(
            f"{place} holds {len(pixels)} images and {len(labels)} labels up to {int(labels.max(initial=0))}; one "
            f"label below {len(names)} for each image is wanted: fetch the files again."
        )
    scaled = torch.from_numpy(pixels.astype(np.float32))[:, None] / 127.5 - 1
    return Images(scaled, torch.from_numpy(labels.astype(np.int64)), names, kind)


def _idx_file(folder: Path, name: str, kind: str) -> Path:
    tried = [folder / f"{name}{joint}{kind}-ubyte{packed}" for joint in "-." for packed in ("", ".gz")]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise InputError(f"there is no {tried[0]} (nor {tried[1].name}); give the folder of MNIST's files.")
    return found


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Return the uint8 numbers of a file in MNIST's format, packed or not. Raises InputError for any other file."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again.") from error
    axes = magic & 0xFF
    header = np.frombuffer(content[: 4 * (axes + 1)], dtype=">u4")
    if len(header) < axes + 1 or header[0] != magic or math.prod(header[1:].tolist()) != len(content) - 4 * (axes + 1):
        raise InputError(f"{path} is no whole file in MNIST's format; fetch it again.")
    numbers: np.ndarray = np.frombuffer(content, np.uint8, offset=4 * (axes + 1)).reshape(header[1:].tolist())
    return numbers


def _folder_images(folder: Path, size: int | None) -> Images:
    require("a folder of pictures", "PIL", extra="flow")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and _pictures(path))
    groups = {path.name: _pictures(path) for path in classes} or {folder.name: _pictures(folder)}
    paths = [(path, label) for label, group in enumerate(groups.values()) for path in group]
    if not paths:
        raise InputError(
            f"--data {folder} holds no pictures ({', '.join(PICTURES)}); give {ACCEPTED}."
        )  # fmt: skip
    loose = len(_pictures(folder)) if classes else 0
    notes = [f"{loose} pictures beside the subfolders of {folder} belong to no class and are left out"] if loose else []
    arrays = [_picture(path) for path, _ in paths]
    if any(array.shape[0] == 3 for array in arrays):
        arrays = [np.repeat(array, 3, axis=0) if array.shape[0] == 1 else array for array in arrays]
    return Images(
        _stacked(arrays, [path for path, _ in paths], size), torch.tensor([label for _, label in paths]), tuple(groups),
        notes=notes,
    )  # fmt: skip


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in PICTURES)


def _picture(path: Path) -> np.ndarray:
    """Return float32 [1 or 3, height, width] from −1 to 1; what shows through is white."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode in ("RGBA", "LA", "PA", "P"):
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                image = image.convert("RGB")
            grey = image.mode in ("1", "L")
            array = np.asarray(image.convert("L" if grey else "RGB"), dtype=np.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a picture ({error}); mend or remove it.") from error
    planes: np.ndarray = (array[None] if grey else array.transpose(2, 0, 1)) / np.float32(127.5) - np.float32(1)
    return planes


def _stacked(arrays: Sequence[np.ndarray], paths: Sequence[Path], size: int | None) -> Tensor:
    if size is not None:
        return torch.cat([resized(torch.from_numpy(array)[None], size) for array in arrays])
    for array, path in zip(arrays, paths):
        if array.shape != arrays[0].shape:
            raise InputError(
                f"{path} has {array.shape[2]} × {array.shape[1]} pixels and {paths[0].name} "
                f"{arrays[0].shape[2]} × {arrays[0].shape[1]}; give --image-size to have all of one size."
            )
    return torch.from_numpy(np.stack(arrays))
