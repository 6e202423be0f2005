"""Files that are there whole or not at all, even if another process writes the same name."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike, ending: str = ".part") -> Iterator[Path]:
    """Inside, write to the file that it gives; afterwards that takes the place of ``path`` at once.

    An exception leaves ``path`` as it was, and nothing beside it. The name is this call's own, so that two processes
    may write the same file at once: the last one stays.

    Args:
        path: the file.
        ending: of the half-written file's name, for those that look at it.
    """
    target = Path(path)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{ending}")
    try:
        yield part
        os.replace(part, target)
    except OSError as error:
        if str(error.filename) == str(part):
            error.filename = str(target)  # which the user knows
        raise
    finally:
        part.unlink(missing_ok=True)
