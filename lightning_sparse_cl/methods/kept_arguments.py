"""A module that can be made again from its checkpoint: its constructor's arguments are saved with its weights."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sparse_cl.checkpoint_file import read_checkpoint
from lightning_sparse_cl.methods.blueprint import Untrusted, class_named, from_bytes, to_bytes

ARGUMENTS = "arguments"
"""Entry of a checkpoint: the class of the module, and its constructor's arguments by name."""
OF_LIGHTNING = ("map_location", "hparams_file", "strict", "weights_only")


class KeepsArguments(pl.LightningModule):
    """Base of modules for which ``load_from_checkpoint(path)`` needs nothing but the path.

    What the constructor is given is pickled at once, before anything is trained; weights are left out. Each argument is
    kept by itself: an object that is part of two of them is two objects when they are made again.
    """

    _arguments: dict[str, bytes | str]
    """The constructor's arguments by name, as bytes; if an argument cannot be pickled, the reason."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        module = super().__new__(cls)
        module.__dict__["_arguments"] = _kept(cls, args, kwargs)
        return module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        kept = {
            name: value if isinstance(value, str) else torch.frombuffer(bytearray(value), dtype=torch.uint8)
            for name, value in self._arguments.items()
        }
        checkpoint[ARGUMENTS] = {"class": _full_name(type(self)), "given": kept}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The trained module of a checkpoint; Lightning's, after the file's checksum has been compared.

        The module is made as it was when it was trained: of its own class, if that is this class or derived from it,
        with the arguments that its constructor was given then. Arguments given here take their place. A checkpoint of
        an older version holds none, and all must be given.

        Objects of this package, of torch and torchvision are made again by themselves. Those of other classes need
        ``torch.serialization.add_safe_globals``, or ``weights_only=False``. If arguments are given, others that cannot
        be made again get their defaults, with a warning.

        Args:
            checkpoint_path: the file.
            *args: see Lightning's ``LightningModule.load_from_checkpoint``: ``map_location``, ``hparams_file``,
                ``strict``, ``weights_only``.
            **kwargs: the same by name, and arguments of the constructor.

        Raises:
            ValueError: if the file is missing, truncated, altered or no checkpoint, or an argument cannot be made again
                and must be given.
        """
        if not isinstance(checkpoint_path, str | os.PathLike) or "://" in str(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        weights_only = dict(zip(OF_LIGHTNING, args), **kwargs).get("weights_only") is not False
        found = read_checkpoint(Path(checkpoint_path), mmap=True, weights_only=weights_only).get(ARGUMENTS)
        made: type | None = None
        if found is not None:
            given = [name for name in kwargs if name not in OF_LIGHTNING]
            made = _class_of(cls, found["class"], needed=not given)
            kwargs = (_made_again(made, found["given"], given, weights_only) if made else {}) | kwargs
        loads: Any = super(KeepsArguments, made or cls)
        return loads.load_from_checkpoint(checkpoint_path, *args, **kwargs)


def _kept(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, bytes | str]:
    """The arguments of a constructor that is about to be called."""
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]  # of this very class
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError:  # the constructor raises it, or none is called: a copy is being made
        return {}
    given: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            return {name: "they have no names"}
        else:
            given[name] = value
    return {name: _pickled(value) for name, value in given.items()}


def _pickled(value: Any) -> bytes | str:
    try:
        return to_bytes(value)
    except Exception as error:  # pickling a user's object may raise anything
        return " ".join(str(error).split())[:200] or type(error).__name__


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _class_of(cls: type, name: str, needed: bool) -> type | None:
    """The class of the module in a checkpoint, if it is ``cls`` or derived from it; else None.

    Raises:
        ValueError: if it is needed, but is in a module that is neither imported nor part of this package.
    """
    if name.rpartition(".")[2] == cls.__qualname__.rpartition(".")[2]:  # a script's module has another name elsewhere
        return cls
    found = class_named(name)
    if found is None and needed and cls.__module__.startswith(f"{__package__}."):
        raise ValueError(
            f"{cls.__name__}.load_from_checkpoint: this checkpoint is from the class {name}; import it and call its "
            "load_from_checkpoint"
        )
    return found if inspect.isclass(found) and issubclass(found, cls) else None


def _made_again(cls: type, kept: dict[str, Any], given: list[str], weights_only: bool) -> dict[str, Any]:
    """The kept arguments that are not given."""
    made: dict[str, Any] = {}
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]  # of this very class
    for name, value in ((name, value) for name, value in kept.items() if name not in given):
        try:
            made[name] = _value(name, value, weights_only)
        except ValueError as error:
            told = f"{cls.__name__}.load_from_checkpoint: {error}"
            if not given or name not in parameters or parameters[name].default is inspect.Parameter.empty:
                raise ValueError(told) from error
            rank_zero_warn(f"{told}; for now it has its default")
    return made


def _value(name: str, value: Any, weights_only: bool) -> Any:
    if isinstance(value, str):
        raise ValueError(f"the argument {name!r} could not be saved ({value}); give {name}=... again")
    try:
        return from_bytes(value.numpy().tobytes(), weights_only)
    except Untrusted as error:
        shown, more = error.names[:3], ", ..." * (len(error.names) > 3)
        last = ", ".join(full.rpartition(".")[2] for full in shown) + more
        raise ValueError(
            f"the argument {name!r} has objects of {', '.join(shown)}{more}, which are not made from a file without "
            f"asking; give {name}=... again, or call torch.serialization.add_safe_globals([{last}]) before"
        ) from error
    except Exception as error:  # an unpickler raises anything
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"the argument {name!r} cannot be made again ({line}); give {name}=... again") from error
