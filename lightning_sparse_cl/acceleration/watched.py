"""Parameters that report when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, SupportsIndex

from torch import Tensor


class Watched(dict[str, Any]):
    """The parameters of a layer. Reading one calls ``wake`` first. A copy is a plain ``dict``."""

    def __init__(self, parameters: Mapping[str, Tensor | None], wake: Callable[[], None]) -> None:
        super().__init__(parameters)
        self._wake = wake

    def __getitem__(self, name: str) -> Tensor | None:
        self._wake()
        return super().__getitem__(name)

    def __setitem__(self, name: str, value: Tensor | None) -> None:
        self._wake()
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._wake()
        super().__delitem__(name)

    def __iter__(self) -> Any:  # without it, {**parameters} would bypass __getitem__
        return super().__iter__()

    def get(self, *args: Any) -> Any:
        self._wake()
        return super().get(*args)

    def pop(self, *args: Any) -> Any:
        self._wake()
        return super().pop(*args)

    def items(self) -> Any:
        self._wake()
        return super().items()

    def values(self) -> Any:
        self._wake()
        return super().values()

    def copy(self) -> dict[str, Tensor | None]:
        return dict(self.items())

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return dict, (self.copy(),)
