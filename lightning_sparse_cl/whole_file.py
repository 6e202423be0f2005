"""Files that are there whole or not at all, even if another process writes the same name."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike, ending: str = ".part") -> Iterator[Path]:
    """Inside the block, write to the file that it yields; afterwards that file replaces ``path`` at once.

    An exception leaves ``path`` as it was, and no other file. Each call yields a name of its own, so that two processes
    may write the same file at once: the last one stays.

    Args:
        path: the file.
        ending: how the half-written file's name ends, for code that looks at it.
    """
    target = Path(path)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{ending}")
    try:
        yield part
        os.replace(part, target)
    except OSError as error:
        if str(error.filename) == str(part):
            error.filename = str(target)  # the path that the user knows
        raise
    finally:
        part.unlink(missing_ok=True)
