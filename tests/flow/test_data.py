"""Images to learn from."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lisa_kernels import InputError
from lisa_kernels.flow.data import load_images


def write_idx(folder: Path, images: int = 4, labels: int = 4, packed: bool = False) -> Path:
    """Write two files in MNIST's format, each pixel of image k with the value 10 k."""
    folder.mkdir()
    pixels = np.repeat(np.arange(images, dtype=np.uint8) * 10, 28 * 28).tobytes()
    files = {
        "train-images-idx3-ubyte": np.array([0x803, images, 28, 28], dtype=">u4").tobytes() + pixels,
        "train-labels-idx1-ubyte": np.array([0x801, labels], dtype=">u4").tobytes() + bytes(range(labels)),
    }
    for name, content in files.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


def write_pictures(folder: Path, mode: str = "L", size: tuple[int, int] = (6, 6)) -> Path:
    for name, value in (("cat", 0), ("owl", 255)):
        (folder / name).mkdir(parents=True)
        Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(folder / name / "one.png")
    return folder


def test_digits_are_there_without_a_download() -> None:
    images = load_images("digits")
    assert images.shape == (1, 8, 8)
    assert len(images) == 1797
    assert (float(images.pixels.min()), float(images.pixels.max())) == (-1.0, 1.0)
    assert images.text(7) == "a handwritten seven"
    assert images.names[int(images.labels[0])] == "zero"


@pytest.mark.parametrize("packed", [False, True])
def test_files_in_mnist_s_format_are_read(packed: bool, tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "files", packed=packed)
    images = load_images(f"mnist:{folder}")
    assert images.shape == (1, 28, 28)
    assert images.labels.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(images.pixels[3, 0, 0, 0], torch.tensor(30 / 127.5 - 1))
    assert load_images(f"fashion-mnist:{folder}", 14).shape == (1, 14, 14)
    assert load_images(f"fashion-mnist:{folder}").text(9) == "a piece of clothing: ankle boot"


def test_a_folder_s_subfolders_are_its_classes(tmp_path: Path) -> None:
    images = load_images(str(write_pictures(tmp_path / "pictures")))
    assert images.names == ("cat", "owl")
    assert images.text(1) == "an owl"
    assert images.pixels.unique().tolist() == [-1.0, 1.0]
    assert load_images(str(tmp_path / "pictures"), 3).shape == (1, 3, 3)
    assert load_images(str(tmp_path / "pictures" / "cat")).names == ("cat",)


def test_colours_are_kept_and_what_shows_through_is_white(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", "RGB")
    Image.new("RGBA", (6, 6), (0, 0, 0, 0)).save(folder / "owl" / "two.png")
    images = load_images(str(folder))
    assert images.shape == (3, 6, 6)
    assert images.pixels[2].unique().tolist() == [1.0]


def test_pictures_beside_the_classes_are_counted(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures")
    Image.new("L", (6, 6)).save(folder / "loose.png")
    images = load_images(str(folder))
    assert len(images) == 2
    assert "1 pictures beside" in images.notes[0]


def test_what_is_held_out_is_of_every_class_and_the_same_each_time() -> None:
    images = load_images("digits")
    train, held_out = images.split(0.05, seed=3)
    assert len(train) + len(held_out) == 1797
    assert held_out.labels.unique().tolist() == list(range(10))
    assert images.split(0.05, seed=3)[1].digest() == held_out.digest()
    assert images.split(0.05, seed=4)[1].digest() != held_out.digest()
    assert len(images.split(0.0, seed=3)[1]) == 0


def _not_images(folder: Path, what: str) -> str:
    if what == "empty folder":
        folder.mkdir()
    elif what == "two sizes":
        write_pictures(folder)
        Image.new("L", (7, 6)).save(folder / "owl" / "two.png")
    elif what == "broken picture":
        write_pictures(folder)
        (folder / "owl" / "two.png").write_bytes(b"no picture")
    elif what == "cut file":
        path = write_idx(folder) / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-1])
        return f"mnist:{folder}"
    elif what == "labels missing":
        return f"mnist:{write_idx(folder, labels=3)}"
    elif what == "no files":
        folder.mkdir()
        return f"mnist:{folder}"
    elif what == "mnist alone":
        return "mnist"
    return str(folder)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no folder", "is no folder that is there"),
        ("empty folder", "holds no pictures"),
        ("two sizes", "--image-size"),
        ("broken picture", "cannot be read as a picture"),
        ("cut file", "no whole file in MNIST's format"),
        ("labels missing", "4 images and 3 labels"),
        ("no files", "there is no"),
        ("mnist alone", "mnist:FOLDER"),
    ],
)
def test_what_holds_no_images_is_refused_with_the_reason(what: str, said: str, tmp_path: Path) -> None:
    spec = _not_images(tmp_path / "data", what)
    with pytest.raises(InputError, match=said):
        load_images(spec)
