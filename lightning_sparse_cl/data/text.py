"""Texts as token ids: any tokenizer, one that needs no vocabulary, and text files in folders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from lightning_sparse_cl.data.sources import Source

Tokenizer = Callable[[str], Any]
"""From a text to its token ids, a list of integers from 0 on; or a mapping with ``input_ids``, as the tokenizers of
transformers return."""


@dataclass(frozen=True)
class HashTokenizer:
    """Maps words, in lower case, to ids by a hash: no vocabulary has to be learnt or kept, and no word is unknown.

    Different words may share an id. The id 0 is left for padding.

    Args:
        vocabulary: ids are in 1 ... vocabulary - 1.

    Raises:
        ValueError: if ``vocabulary`` leaves no id.
    """

    vocabulary: int = 4096

    def __post_init__(self) -> None:
        if self.vocabulary < 2:
            raise ValueError(f"HashTokenizer(vocabulary={self.vocabulary}): one id is for padding, so at least 2")

    def __call__(self, text: str) -> list[int]:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return [1 + crc32(word.encode()) % (self.vocabulary - 1) for word in words]


def encoded(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> dict[str, Tensor]:
    """Texts as one batch: ``ids`` (N, T) int64, with 0 after each end, and ``mask`` (N, T), true for tokens.

    Args:
        texts: N texts; the first T tokens of each are kept.
        tokenizer: see :data:`Tokenizer`.
        length: T.

    Raises:
        ValueError: if a text has no tokens, or the tokenizer returns something else.
    """
    rows = []
    if isinstance(texts, str):
        raise ValueError(f"texts: a list of texts is expected, got one text, {texts[:40]!r}")
    for i, text in enumerate(texts):
        found = tokenizer(text)
        found = found["input_ids"] if isinstance(found, Mapping) else found
        try:
            ids = torch.as_tensor(found)
        except (TypeError, ValueError, RuntimeError):
            ids = torch.empty(0, 0)
        if ids.ndim == 1 and not len(ids):
            raise ValueError(f"text {i}, {text[:40]!r}, has no tokens")
        if ids.ndim != 1 or ids.is_floating_point() or ids.min() < 0:
            raise ValueError(f"tokenizer: a list of integers from 0 on is expected for each text, got {found!r:.60}")
        rows.append(ids.long()[:length])
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return {"ids": ids, "mask": mask}


def positive_length(owner: str, length: int) -> None:
    """Raise ValueError, naming ``owner``, unless texts have room for a token."""
    if length < 1:
        raise ValueError(f"{owner}(length={length}): how many tokens are kept of each text, at least 1")


@dataclass(frozen=True)
class TextFolderSource(Source):
    """Text files in folders, ``root/train/<class>/**.txt`` and ``root/test/<class>/**.txt``, in UTF-8.

    Files and folders whose name begins with a dot are passed over.

    Args:
        root: the folder.
        length: how many tokens are kept of each text; shorter ones are padded.
        tokenizer: see :data:`Tokenizer`. If None, :class:`HashTokenizer`.

    Raises:
        FileNotFoundError: when the classes are asked for, if there are none.
        ValueError: if a class has no texts, or a text has no tokens.
    """

    root: str = "data"
    length: int = 64
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        positive_length(type(self).__name__, self.length)

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # computed here, a constant there
        return len(self.names())

    def names(self) -> list[str]:
        folder = Path(self.root, "train")
        found = sorted(_folders(folder))
        if not found:
            raise FileNotFoundError(f"{self}: there is no folder {str(folder)!r}/<class>")
        return found

    def encode(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """Texts as the training texts were stored; see :func:`encoded`."""
        return encoded(texts, self.tokenizer or HashTokenizer(), self.length)

    def read(self, train: bool) -> tuple[dict[str, Tensor], Tensor]:
        part = Path(self.root, "train" if train else "test")
        texts, labels = [], []
        names = self.names()
        if unknown := sorted(_folders(part) - set(names)):
            raise ValueError(
                f"{self}: there are texts of the class {unknown[0]!r} in {str(part)!r}, but none for training"
            )
        for label, name in enumerate(names):
            files = sorted(path for path in (part / name).rglob("*.txt") if not _is_hidden(path, part))
            if not files and train:
                raise ValueError(f"{self}: the class {name!r} has no files .txt in {str(part / name)!r}")
            texts += [self._text(file) for file in files]
            labels += [label] * len(files)
        return self.encode(texts), torch.tensor(labels)

    def _text(self, file: Path) -> str:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self}: {str(file)!r} is not UTF-8 text: {error.reason}") from None
        if not text.strip():
            raise ValueError(f"{self}: {str(file)!r} has no text")
        return text


def _folders(folder: Path) -> set[str]:
    """Names of the folders in a folder, if there is one."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return {path.name for path in inside if path.is_dir() and not _is_hidden(path, folder)}


def _is_hidden(path: Path, inside: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(inside).parts)
