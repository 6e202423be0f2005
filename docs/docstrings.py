"""Docstrings as Markdown: Sphinx roles become links to the reference, and ``::`` before an indented block one colon."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

_INIT = ast.parse((Path(__file__).parents[1] / "lightning_sparse_cl" / "__init__.py").read_text())
PUBLIC = next(
    ast.literal_eval(node.value)
    for node in _INIT.body
    if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
)


def _link(role: re.Match) -> str:
    name = role[1].rpartition(".")[2]
    return f"[`{name}`][lightning_sparse_cl.{name}]" if name in PUBLIC else f"`{name}`"


class Markdown(griffe.Extension):
    """Rewrites each docstring when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`", _link, obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
