"""Rows of CSV files: texts, or numbers."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_sparse_cl.data.labels import is_number
from lightning_sparse_cl.data.sources import Source
from lightning_sparse_cl.data.text import HashTokenizer, Tokenizer, encoded, positive_length
from lightning_sparse_cl.nests import Nest

EVERY = 5
"""Without a test file, every fifth row of each class is for testing."""


@dataclass(frozen=True)
class CSVSource(Source):
    """Rows of a CSV file with a header: a column of texts, or columns of numbers; each distinct label is a class.

    Args:
        path: the file, in UTF-8.
        label: name of the column with the class.
        text: name of the column with the text: samples are token ids and their mask, see
            :func:`~lightning_sparse_cl.data.text.encoded`. If None, samples are the numbers of ``columns``.
        columns: names of the columns of numbers. If None, all but ``label``.
        test: the file with the test part. If None, every fifth row of each class is for testing.
        length: how many tokens are kept of each text; shorter ones are padded.
        tokenizer: see :data:`~lightning_sparse_cl.data.text.Tokenizer`. If None, :class:`HashTokenizer`.

    Raises:
        FileNotFoundError: on reading, if there is no such file.
        ValueError: likewise, if a column is missing, a value is not a number, a label is empty, or a text has no
            tokens.
    """

    path: str
    label: str = "label"
    text: str | None = None
    columns: Sequence[str] | None = None
    test: str | None = None
    length: int = 64
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        positive_length(type(self).__name__, self.length)
        if self.text is not None and self.columns is not None:
            raise ValueError(f"CSVSource(text={self.text!r}, columns={list(self.columns)}): give one of them")
        if isinstance(self.columns, str):
            raise ValueError(f"CSVSource(columns={self.columns!r}): a list of names of columns")
        if self.columns is not None and not self.columns:
            raise ValueError("CSVSource(columns=[]): at least one column; null takes all but the label's")
        if self.label in (self.text, *(self.columns or [])):
            raise ValueError(f"CSVSource(label={self.label!r}): the label is no part of a sample")

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # computed here, a constant there
        return len(self.names())

    def names(self) -> list[str]:
        names = {row[self.label] for _, row in self._rows(self.path)}
        return sorted(names, key=float) if all(map(is_number, names)) else sorted(names)

    def encode(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """Texts as the training texts were stored."""
        return encoded(texts, self.tokenizer or HashTokenizer(), self.length)

    def read(self, train: bool) -> tuple[Nest, Tensor]:
        own = train or self.test is None
        rows = self._split(self._rows(self.path), train) if own else self._rows(self.test or "")
        if not rows:
            raise ValueError(
                f"CSVSource: {self.path!r} has no rows to test on: every {EVERY}th row of each class is for testing, "
                "and no class has that many; give test, a file with the test part"
            )
        numbers = {name: i for i, name in enumerate(self.names())}
        for _, row in rows:
            if row[self.label] not in numbers:
                raise ValueError(
                    f"CSVSource(test={self.test!r}): no row for training has the label {row[self.label]!r}"
                )
        labels = torch.tensor([numbers[row[self.label]] for _, row in rows])
        if self.text is not None:
            return self.encode(row[self.text] for _, row in rows), labels
        columns = self.columns or [name for name in self._rows(self.path)[0][1] if name != self.label]
        if missing := [name for name in columns if name not in rows[0][1]]:
            raise ValueError(f"CSVSource(test={self.test!r}): it has no column {missing[0]!r}, which {self.path!r} has")
        if not columns:
            raise ValueError(f"CSVSource: {self.path!r} has no column but {self.label!r}")
        values = [[self._number(line, row, name) for name in columns] for line, row in rows]
        return _narrow(torch.tensor(values, dtype=torch.float64)), labels

    def _rows(self, path: str) -> list[tuple[int, dict[str, str]]]:
        """For each row, the number of its line, and its values by column name."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"CSVSource: there is no file {path!r}")
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, restval="")
                there = list(reader.fieldnames or [])
                rows = [(reader.line_num, row) for row in reader]
        except UnicodeDecodeError as error:
            raise ValueError(f"CSVSource: {path!r} is not UTF-8 text: {error.reason}") from None
        except csv.Error as error:
            raise ValueError(f"CSVSource: {path!r}, line {reader.line_num}, cannot be read: {error}") from None
        if twice := [name for name in there if there.count(name) > 1]:
            raise ValueError(f"CSVSource: {path!r} has the column {twice[0]!r} twice")
        texts = [] if self.text is None else [self.text]
        wanted = {"label": [self.label], "text": texts, "columns": list(self.columns or [])}
        for argument, names in wanted.items():
            if missing := [name for name in names if name not in there]:
                raise ValueError(
                    f"CSVSource({argument}={missing[0]!r}): {path!r} has no such column; it has {', '.join(there)}"
                )
        if not rows:
            raise ValueError(f"CSVSource: {path!r} has no rows")
        for line, row in rows:
            if None in row:
                raise ValueError(f"CSVSource: {path!r}, line {line}, has more fields than the header")
            if not row[self.label]:
                raise ValueError(f"CSVSource: {path!r}, line {line}, has no {self.label}")
        return rows

    def _split(self, rows: list[tuple[int, dict[str, str]]], train: bool) -> list[tuple[int, dict[str, str]]]:
        if self.test is not None:
            return rows
        met: dict[str, int] = {}
        chosen = []
        for line, row in rows:
            met[row[self.label]] = met.get(row[self.label], 0) + 1
            if (met[row[self.label]] % EVERY == 0) != train:
                chosen.append((line, row))
        return chosen

    @staticmethod
    def _number(line: int, row: dict[str, str], name: str) -> float:
        try:
            value = float(row[name])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"CSVSource: line {line}, column {name}: a number is expected, got {row[name]!r}")
        return value


def _narrow(values: Tensor) -> Tensor:
    """Numbers (N, C) in float32 if that keeps the variation of each column, otherwise in float64."""
    narrow = values.float()
    lost = (narrow.double() - values).abs().amax(0)
    return values if bool((lost > 1e-3 * values.std(0, correction=0)).any()) else narrow
