"""What the user can mend, told in one line."""

from __future__ import annotations

import errno
import re
import traceback
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch.optim
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_sparse_cl as scl

OF_THE_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ENOENT, errno.EPIPE,
}  # fmt: skip
NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|Storage size calculation overflowed|not enough memory|numel: integer"
    r"|Overflow when unpacking",
    re.IGNORECASE,
)
IN_PLAIN_WORDS = {
    r"Expected a dot import path string:": "no class is called",
    r"'\w+' object has no attribute 'keys'": "options by name are expected",
    r"(unhashable type|argument of type) .*": "a class by its name is expected",
}
"""What the parser says of values that it did not think of."""
NOTHING, A_LIST = "Expected a <class 'NoneType'>", "Expected a <class 'list'>"
UNION = "Does not validate against any of the Union subtypes"
RESTORING = "checkpoint_connector.py"
"""Of Lightning: a fault below it is a checkpoint that does not fit."""


def one_line(error: BaseException) -> str | None:
    """What to tell of an error that this package, Lightning, an optimiser or the parser found in the input, or that
    lies in the disk, the memory or a checkpoint.

    If it is a fault with a traceback to read, None.
    """
    chain = _chain(error)
    checkers = [Path(module.__path__[0]) for module in (scl, torch.optim, lightning)]
    for link in chain:
        raised = _frames(link)[-1] if link.__traceback__ else traceback.FrameSummary("", 0, "")
        found = [folder for folder in checkers if Path(raised.filename).is_relative_to(folder)]
        own, on_purpose = found[:1] == checkers[:1], (raised.line or "").startswith("raise ")
        kinds = ValueError | TypeError | NotImplementedError | OSError if own else ValueError | OSError
        if found and isinstance(link, kinds) and (on_purpose or not own):
            return _joined(link)
        if type(link).__module__.startswith(scl.__name__):
            return _joined(link)
    if isinstance(error, MisconfigurationException):
        return _joined(error)
    if isinstance(error, ArgumentError):
        key = ".".join(re.findall(r'[Pp]arser key "([\w.]+)"', str(error)))
        reason = str(chain[-1]).strip().splitlines()[0]
        if NOTHING in reason or A_LIST in reason:  # the alternatives to what was meant
            reason = _reason(str(error)) or reason
        for raw, plain in IN_PLAIN_WORDS.items():
            reason = re.sub(raw, plain, reason)
        return f"{key}: {reason}" if key and key not in reason else reason
    if isinstance(error, ValueError) and (meant := _reason(str(error))):
        return meant
    for link in chain:
        if isinstance(link, OSError) and link.errno in OF_THE_DISK:
            return f"{link.filename or 'a file'}: {link.strerror}"
    if any(RESTORING in frame.filename for frame in _frames(error)):
        return f"--ckpt_path: this checkpoint does not fit what is run: {type(error).__name__}: {_joined(error)[:200]}"
    return None


def _reason(text: str) -> str | None:
    """Why none of several types takes a value, as the parser lists it: of the types, the one that was meant."""
    if UNION not in text:
        return None
    lines = [line.strip() for line in text.splitlines()]
    said = [
        lines[i + 1] if line.endswith(":") else line.removeprefix("- ")
        for i, line in enumerate(lines)
        if line.startswith("- ") and not any(other in line for other in (NOTHING, UNION, " path but "))
    ]
    value = next((line.partition(": ")[2] for line in reversed(lines) if line.startswith("Given value: ")), "")
    best = next((line for line in said if A_LIST not in line), next(iter(said), None))
    return f"{best}. Got value: {value}" if best and best.startswith("Expected a <class") else best


def too_large(error: BaseException, config: Mapping[str, Any]) -> str | None:
    """One line for what does not fit into the memory, with the largest number that was asked for; else None."""
    found = [link for link in _chain(error) if _is_of_memory(link)]
    if not found:
        return None
    name, value = max(_numbers(config, ""), key=lambda item: item[1], default=("nothing", 0))
    return (
        f"the memory of this machine does not hold what is asked for ({_joined(found[-1])[:120]}); the largest number "
        f"in the configuration is {name}={value}"
    )


def _is_of_memory(error: BaseException) -> bool:
    known = isinstance(error, RuntimeError | TypeError) and NO_MEMORY.search(str(error))
    return bool(known) or isinstance(error, MemoryError | torch.OutOfMemoryError | OverflowError)


def _chain(error: BaseException) -> list[BaseException]:
    """The error, and what it was raised from or while handling, outermost first."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


def _numbers(value: Any, name: str) -> Iterator[tuple[str, int | float]]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _numbers(item, f"{name}.{key}" if name else str(key))


def _frames(error: BaseException) -> traceback.StackSummary:
    return traceback.extract_tb(error.__traceback__)


def _joined(error: BaseException) -> str:
    return " ".join(str(error).split())
