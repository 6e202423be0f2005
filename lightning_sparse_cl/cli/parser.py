"""A parser of the small commands, whose faults are told in one line like all others."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that takes no abbreviations, and raises ``ValueError`` where the other one exits."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog.removeprefix('sparsecl ')}: {message}")
