"""Images of every mode come out as 8 bits or are refused, and files that are not read are told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_sparse_cl import data as scl
from tests import fake_data

LEVELS = np.array([[0, 1, 128, 129, 256], [257, 32768, 65278, 65407, 65535]])
SCALED = [[0, 0, 0, 1, 1], [1, 128, 254, 255, 255]]  # to the nearest of 257 steps
COLOUR = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)


def sixteen(mode: str) -> Image.Image:
    """LEVELS in a mode of 16 bits."""
    if mode == "I":
        return Image.fromarray(LEVELS.astype(np.int32))
    order = ">" if mode.endswith("B") else "<"
    return Image.frombytes(mode, (5, 2), LEVELS.astype(f"{order}u2").tobytes())


def taken(image: Any, in_memory: bool = True) -> torch.Tensor:
    """What TaskDatasets makes of an image."""
    split = scl.TaskDatasets([[(image, 0)] * 40], [[(image, 0)] * 40], in_memory=in_memory)
    split.setup()
    return split.train_sets[0][3][0]


def folder(root: Path, image: Image.Image, ending: str = "png") -> scl.SplitImageFolder:
    """One class of 40 copies of an image."""
    for part in ("train", "test"):
        (root / part / "a").mkdir(parents=True)
        for i in range(40):
            image.save(root / part / "a" / f"{i}.{ending}")
    return scl.SplitImageFolder(str(root), num_tasks=1)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_of_grey_are_scaled_in_items(mode: str, in_memory: bool) -> None:
    out = taken(sixteen(mode), in_memory)
    assert out.dtype == torch.uint8 and out.tolist() == [SCALED]


@pytest.mark.parametrize("mode, ending", [("I;16", "png"), ("I;16", "tif"), ("I;16B", "TIFF")])
def test_sixteen_bits_of_grey_are_scaled_in_files(mode: str, ending: str, tmp_path: Path) -> None:
    split = folder(tmp_path, sixteen(mode), ending)
    split.setup()
    assert split.train_sets[0].inputs[7].tolist() == [SCALED] * 3


def test_a_dark_png_that_older_pillow_opens_as_32_bits() -> None:
    dark = Image.fromarray(np.full((2, 5), 200, dtype=np.int32))
    with pytest.raises(ValueError, match=r"item 0: the pixels of mode I \(32 bits\) have no known range"):
        taken(dark)
    dark.format = "PNG"  # as Image.open says
    assert taken(dark).unique().tolist() == [1]


UNKNOWN = {
    "float": np.full((2, 5), 0.5, dtype=np.float32),
    "large": np.full((2, 5), 70000, dtype=np.int32),
    "negative": np.full((2, 5), -300, dtype=np.int32),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_pixels_of_unknown_range_are_refused(kind: str, tmp_path: Path) -> None:
    image = Image.fromarray(UNKNOWN[kind])
    for in_memory in (True, False):
        with pytest.raises(ValueError, match=r"train\[0\]\): .* item 0: the pixels of mode [IF] \(32 bits\) have no"):
            taken(image, in_memory)
    with pytest.raises(ValueError, match=r"cannot read the image '.*/train/a/0.tif': the pixels of mode [IF]"):
        folder(tmp_path, image, "tif").setup()


@pytest.mark.parametrize("mode, channels", [("1", 1), ("L", 1), ("LA", 1), ("La", 1), ("P", 3), ("PA", 3), ("RGBA", 3),
    ("RGBa", 3), ("CMYK", 3), ("YCbCr", 3), ("HSV", 3), ("RGBX", 3)])  # fmt: skip
def test_other_modes_show_the_same_picture(mode: str, channels: int) -> None:
    flat = Image.fromarray(COLOUR // 255 * 255) if mode in ("1", "HSV") else Image.fromarray(COLOUR)
    flat = flat.convert("L") if channels == 1 else flat.convert("RGB")
    through = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    image = (flat.convert(through) if through else flat).convert(mode)
    out = taken(image)
    assert out.shape == (channels, 4, 5) and out.dtype == torch.uint8
    off = np.abs(out.permute(1, 2, 0).numpy().astype(int) - np.array(flat).reshape(4, 5, channels))
    assert off.max() <= (130 if mode in ("P", "PA") else 3) and off.mean() < 40  # palettes have few colours


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:45] + b"\xff" * 9 + b[54:]])
def test_broken_files_are_named(damage: Any, tmp_path: Path) -> None:
    fake_data.write_image_folder(tmp_path, classes=1)
    path = tmp_path / "train" / "class_0" / "0003.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"cannot read the image '.*0003\.png'") as error:
        scl.SplitImageFolder(str(tmp_path), num_tasks=1).setup()
    assert "\n" not in str(error.value)


def test_several_pictures_in_a_file_are_refused(tmp_path: Path) -> None:
    split = folder(tmp_path, Image.fromarray(COLOUR), "tiff")
    two = [Image.fromarray(COLOUR)] * 2
    two[0].save(tmp_path / "test" / "a" / "5.tiff", save_all=True, append_images=two[1:])
    with pytest.raises(ValueError, match=r"5\.tiff': it holds 2 pictures"):
        split.setup()


def test_files_that_are_not_read_are_told_once(tmp_path: Path) -> None:
    fake_data.write_image_folder(tmp_path, classes=2)
    split = scl.SplitImageFolder(str(tmp_path), num_tasks=2)
    train = tmp_path / "train"
    for name in (".hidden.png", "class_0/Thumbs.db", "class_0/notes.txt", "README.md", "class_1/.cache/x.png"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_bytes(b"?")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split.setup()
    for name in ("class_0/a.GIF", "class_0/more/b.gif", "class_1/c.npy", "class_1/raw", "d.png", "e.gif"):
        (train / name).write_bytes(b"?")
    with pytest.warns(UserWarning) as told:
        scl.SplitImageFolder(str(tmp_path), num_tasks=2).setup()
    (message,) = [str(w.message) for w in told if "not read" in str(w.message)]
    assert message.endswith("not read: 1 without ending, 2 .gif, 1 .npy in its classes and 1 .gif, 1 .png in no class")
    assert str(train) in message
    assert len(split.train_sets[0]) == 40


def test_a_class_without_test_images_is_named(tmp_path: Path) -> None:
    fake_data.write_image_folder(tmp_path, classes=4)
    (tmp_path / "test" / "class_3").rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="task 1 has no test samples of 1 of its classes: 'class_3'"):
        scl.SplitImageFolder(str(tmp_path), num_tasks=2).setup()
