"""``sparsecl predict --data FOLDER``: the classes of images in a folder, by a checkpoint alone."""

from __future__ import annotations

import argparse
import csv
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

import lightning_sparse_cl as scl
from lightning_sparse_cl.checkpoint_file import read_checkpoint
from lightning_sparse_cl.cli.parser import Parser
from lightning_sparse_cl.data.pictures import image_paths, unread_below
from lightning_sparse_cl.data.raw_images import one_as_stored
from lightning_sparse_cl.nests import described, in_words, is_image
from lightning_sparse_cl.thread_pool import thread_pool
from lightning_sparse_cl.whole_file import whole_file

COLUMNS = ("file", "class", "probability", "task")


def is_meant(args: Sequence[str]) -> bool:
    """Whether a command line asks for the images of a folder, and not for Lightning's ``predict`` on a data module.

    It does if ``--data`` names a folder, or what can only be one that is missing: a path that is no file. A name
    without a separator is taken for a class if there is a configuration too.
    """
    if args[:1] != ["predict"]:
        return False
    value = next((_value(args, i) for i, word in enumerate(args) if word.partition("=")[0] == "--data"), "")
    configured = any(word.partition("=")[0] in ("-c", "--config") for word in args)
    if not value:
        return False
    if re.fullmatch(r"[A-Za-z_][\w.]*", value):
        return Path(value).is_dir() and not configured
    return Path(value).is_dir() or (bool({os.sep, "/"} & set(value)) and value[0] != "{" and not Path(value).is_file())


def command(args: Sequence[str]) -> None:
    """Classify the images anywhere below a folder, and write a table: a line for each.

    The columns are ``file``, relative to the folder, ``class``, ``probability`` among all classes, and ``task``, which
    has the class, counted from 0; empty if several have it. Files that cannot be read are warned of and left out.

    Args:
        args: of the command line, after ``predict``.

    Raises:
        ValueError: if an argument is wrong, the folder has no image that can be read, or the checkpoint is damaged, of
            an older version, or of data with a transform of their own.
    """
    given = _parse(args)
    folder = Path(given.data)
    if not folder.is_dir():
        raise ValueError(f"--data={given.data}: this folder is not there")
    if not Path(given.output).parent.is_dir():
        raise ValueError(f"--output={given.output}: there is no folder {str(Path(given.output).parent)!r}")
    if Path(given.output).is_dir():
        raise ValueError(f"--output={given.output}: this is a folder; give a file in it")
    if given.batch_size < 1:
        raise ValueError(f"--batch_size={given.batch_size}: a batch has at least one image")
    paths = image_paths(folder)
    if not paths:
        raise ValueError(f"--data={given.data}: this folder has no images")
    if others := unread_below(folder):
        rank_zero_warn(f"files of {given.data!r} that are not read: {others}")
    module, known = _module(given.ckpt_path, given.device)
    written = 0
    with (
        whole_file(given.output) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for batch, images in _batches(paths, given.batch_size, known):
            answers = cast(list[scl.Prediction], module.predict_images(images, batch_size=given.batch_size))
            for path, answer in zip(batch, answers, strict=True):
                task = "" if answer.task is None else answer.task
                table.writerow((path.relative_to(folder).as_posix(), answer.name, f"{answer.probability:.6f}", task))
                written += 1
        if not written:
            raise ValueError(f"--data={given.data}: none of the {len(paths)} images of this folder can be read")
    print(f"{given.output}: {written} images")


def _module(path: str, device: str) -> tuple[scl.ContinualModule, scl.DataDescription]:
    checkpoint = read_checkpoint(path, mmap=True)
    if not {"arguments", "data_description"} <= checkpoint.keys():
        raise ValueError(
            f"checkpoint {path}: it does not say what its network and data were, as those of this version do; an older "
            "one wrote it, or no method of this package"
        )
    try:
        module: scl.ContinualModule = scl.ContinualModule.load_from_checkpoint(path, map_location="cpu")
    except ValueError as error:
        raise ValueError(f"{error}; for that, use predict_images in Python") from error
    if (known := module.data_description) is None or known.transform() is None:
        raise ValueError(f"checkpoint {path}: its data had a transform of their own; use predict_images in Python")
    if known.target != "classes":
        raise ValueError(
            f"checkpoint {path}: it was trained on labels of the kind {known.target!r}, and the table is of classes; "
            "use predict_images in Python"
        )
    if not is_image(known.layout) or known.dtype != torch.uint8 or known.input_shape[0] not in (1, 3):
        raise ValueError(
            f"checkpoint {path}: its training samples were {in_words(described(known.layout))}, which image files "
            "cannot be made into; use predict_samples in Python"
        )
    try:
        return module.to(device).eval(), known
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
        raise ValueError(f"--device={device}: {str(error).splitlines()[0]}") from error


def _batches(paths: Sequence[Path], size: int, known: scl.DataDescription) -> Iterator[tuple[list[Path], list[Tensor]]]:
    """Paths of images that can be read, and the images as the training's were stored; decoded by threads."""
    with thread_pool() as pool:
        for start in range(0, len(paths), size):
            batch = paths[start : start + size]
            read = zip(batch, pool.map(partial(_stored, known=known), batch), strict=True)
            pairs = [(path, image) for path, image in read if image is not None]
            if pairs:
                yield [path for path, _ in pairs], [image for _, image in pairs]


def _stored(path: Path, known: scl.DataDescription) -> Tensor | None:
    try:
        return one_as_stored(path, known, "predict")
    except ValueError as error:
        rank_zero_warn(" ".join(str(error).split()))
        return None


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = Parser("sparsecl predict", description="Classify the images of a folder.")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="images of any size and mode, anywhere below")
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="a checkpoint of a run")
    parser.add_argument("--output", default="predictions.csv", metavar="FILE", help="the table (predictions.csv)")
    parser.add_argument("--batch_size", type=int, default=64, help="images that are in memory at a time (64)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, mps, ..."
    )
    return parser.parse_args(args)


def _value(args: Sequence[str], i: int) -> str:
    """Of the option at a place: after "=", or the next word."""
    _, equals, value = args[i].partition("=")
    return value if equals else "".join(args[i + 1 : i + 2])
