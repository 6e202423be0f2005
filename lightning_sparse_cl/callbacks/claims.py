"""Claims on files that several running processes might want to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class Claim:
    """Reserves a file's name for this process for as long as it lives, or until it is released.

    A lock beside the file marks the claim; the system lifts it when the process dies, for any reason. Copies of the
    object have claimed nothing.

    Args:
        path: the file, which need not exist, in a folder that does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FileLock | None = None

    def take(self) -> bool:
        """Claim the file; returns False if another process has it."""
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self._lock = lock
        return True

    def release(self) -> None:
        """Give up the claim. Releasing twice does nothing more."""
        if self._lock is not None:
            Path(self._lock.lock_file).unlink(missing_ok=True)  # while held, so as not to remove another process's lock
            self._lock.release()
        self._lock = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Claim, (self.path,)
