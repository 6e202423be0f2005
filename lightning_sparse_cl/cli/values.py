"""Values that a parser lets through and no class can mean: null where something is needed, and what is no number."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Union, get_args, get_origin, get_type_hints

SECTIONS = {
    "trainer": "lightning.pytorch.Trainer",
    "schedule": "lightning_sparse_cl.TaskSchedule",
    "evaluation": "lightning_sparse_cl.ContinualEvaluation",
    "checkpoint": "lightning_sparse_cl.SequenceCheckpoint",
}
"""Parts of a configuration that are the arguments of a fixed class."""


def refuse_nonsense(config: Mapping[str, Any]) -> None:
    """Look at every value of a parsed configuration.

    Raises:
        ValueError: with the dotted name, the value and what is expected.
    """
    for name, class_path in SECTIONS.items():
        if not isinstance(config.get(name, {}), Mapping):
            raise ValueError(f"{name}={config[name]}: options by name are expected")
        _refuse_nulls(config.get(name, {}), class_path, name)
    _look(config, "")


def _refuse_nulls(arguments: Mapping[str, Any], class_path: str, name: str) -> None:
    for key, item in arguments.items():
        if item is None and (expected := _expected(class_path, key)) is not None:
            raise ValueError(f"{name}.{key}=null: {expected} is expected")


def _look(value: Any, name: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value}: a finite number is expected")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name}={value}: an integer of 64 bits is expected")
    if isinstance(value, Mapping) and "class_path" in value and isinstance(value.get("init_args"), Mapping):
        _refuse_nulls(value["init_args"], value["class_path"], f"{name}.init_args")
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        _look(item, f"{name}.{key}" if name else str(key))


def _expected(class_path: str, argument: str) -> str | None:
    """What a class takes for an argument, in words. If that may be null, or nothing says, None."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    for base in inspect.getmro(found) if inspect.isclass(found) else ():
        parameter = inspect.signature(base).parameters.get(argument) if "__init__" in vars(base) else None
        if parameter is None:
            continue
        try:
            hint = get_type_hints(base.__init__).get(argument, Any)  # type: ignore[misc]  # of this very class
        except NameError:  # imported for type checkers only
            return None
        union = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if parameter.default is None or hint is Any or type(None) in union:
            return None
        return " or ".join(getattr(part, "__name__", str(part)) for part in union)
    return None
