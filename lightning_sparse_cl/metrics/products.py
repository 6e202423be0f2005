"""Multiplications of a forward pass as they happen: how many there are, and with which weight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def _mv(matrix: torch.Size, vector: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * matrix.numel()


def _addmv(_: torch.Size, matrix: torch.Size, *__: Any, **___: Any) -> int:
    return 2 * matrix.numel()


def _dot(a: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * a.numel()


def _addbmm(_: torch.Size, a: torch.Size, b: torch.Size, *__: Any, **___: Any) -> int:
    return 2 * a.numel() * b[2]


def _formulas() -> dict[Any, Callable[..., int]]:
    """FLOPs of each operator: those that PyTorch knows or a user has registered, and ours for those that it lacks."""
    own = {aten.mv: _mv, aten.addmv: _addmv, aten.dot: _dot, aten.vdot: _dot, aten.addbmm: _addbmm}
    found = dict(FlopCounterMode(display=False, custom_mapping=own).flop_registry)
    names = ("flash_attention_for_cpu", "fused_attention_overrideable", "attention_math_for_mps")
    for name in (f"_scaled_dot_product_{name}" for name in names):
        if hasattr(aten, name):
            found.setdefault(getattr(aten, name), found[aten._scaled_dot_product_flash_attention])
    return found


RECURRENT: dict[Any, Callable[[tuple], Iterable[Tensor]]] = {
    aten.mkldnn_rnn_layer: lambda args: args[1:3],
    aten._cudnn_rnn: lambda args: args[1],
    aten.miopen_rnn: lambda args: args[1],
}
"""Where an operator that runs a recurrent layer, over all its time steps, has its weights."""

_MULTIPLY = {
    "convolution", "conv", "attention", "rnn", "lstm", "gru", "dot", "vdot", "linear", "bilinear", "trilinear", "fft",
    "cdist", "linalg", "transformer",
}  # fmt: skip
_PLAIN = {"upsample", "cell", "flatten", "norm", "backward"}  # words in names of operators that are element by element
_NAMESPACES = {"aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "_c10d_functional_autograd"}


def multiplies(operator: Any) -> bool:
    """Whether an operator without a formula seems, by its name, to do more than one product per element."""
    space, name = str(operator).split(".")[-2:]
    words = set(re.findall("[a-z]+", name))
    known = words & _MULTIPLY or any(word.endswith(("mm", "mv")) for word in words)
    return space not in _NAMESPACES or bool(known and not words & _PLAIN)


CONSTANT = ""  # stands for the name of a weight


class ProductCounter(TorchDispatchMode):
    """Counts multiply-accumulates while it is entered, and follows weights through casts, masks, views and norms.

    A product of a weight (or of what was computed from weights alone) belongs to that weight; a product of two
    activations, as in attention, to none. It only observes: the same kernels run on the same tensors. Backward passes
    do not count.

    Args:
        weights: names and tensors; a name may have several. Vectors are left out: no product belongs to them.
        constants: tensors that are neither weights nor computed from a pass's inputs: buffers.
    """

    supports_higher_order_operators = True

    def __init__(self, weights: Iterable[tuple[str, Tensor]], constants: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()
        self.weightless = 0
        self.activations = 0
        """How many elements the outputs of all products with weights have."""
        self.missing: dict[str, str] = {}
        """Operators that multiply and are not counted, each with the reason."""
        self._formulas = _formulas()
        self._sizes = {CONSTANT: 0}
        self._made: dict[int, list[tuple[int, int, str]]] = {}  # which weight is where in a storage
        self._held: list[StorageWeakRef] = []  # so that no new storage gets the address of one that is remembered
        self._data: set[int] = set()
        for name, weight in weights:
            if weight.ndim > 1 and (key := _storage(weight)) is not None:
                self._sizes[name], start = weight.numel(), int(weight.storage_offset())
                self._made.setdefault(key, []).append((start, start + weight.numel(), name))
        for constant in constants:
            if (key := _storage(constant)) is not None:
                self._made.setdefault(key, [(0, 2**62, CONSTANT)])

    def begin(self, inputs: Any) -> None:
        """Count anew, for a pass with these inputs: what is computed from them is not a weight."""
        self.macs, self.weightless, self.activations, self.missing = Counter(), 0, 0, {}
        keys = (_storage(t) for t in tree_leaves(inputs) if isinstance(t, Tensor))
        self._data = {key for key in keys if key is not None and key not in self._made}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            self.missing[str(func)] = "an operator without a formula"
            return NotImplemented
        operator = func._overloadpacket
        if operator not in self._formulas and operator not in RECURRENT:
            with self:  # as FlopCounterMode does
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if torch._C._current_graph_task_id() == -1:
            self._note(operator, args, kwargs, out)
        return out

    def _note(self, operator: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        computed = any(_storage(t) in self._data for t in inputs)
        if operator in RECURRENT:
            rows, computed = args[0].numel() // args[0].shape[-1], True
            for weight in RECURRENT[operator](args):
                if weight.ndim == 2:
                    self._add(self._name(weight), rows * weight.numel())
            self.activations += outputs[0].numel()
        elif operator in self._formulas:
            names = [self._name(t) for t in _operands(operator, args) if isinstance(t, Tensor)]
            name = self._largest(names) or None
            self._add(name, self._formulas[operator](*args, **kwargs, out_val=out) // 2)
            self.activations += outputs[0].numel() * (name is not None)
            computed = computed or None in names or not names
        elif multiplies(operator):
            self.missing[str(operator)] = "an operator without a formula"
        made = self._largest(map(self._name, inputs)) if operator not in self._formulas else CONSTANT
        for t in outputs:
            if (key := _storage(t)) is None or key in self._made:
                continue
            self._data.discard(key)  # an earlier one had the same address
            if computed:
                self._data.add(key)
            elif made is not None:
                self._held.append(StorageWeakRef(t.untyped_storage()))
                self._made[key] = [(0, 2**62, made)]

    def _add(self, name: str | None, macs: int) -> None:
        if name is None:
            self.weightless += macs
        else:
            self.macs[name] += macs

    def _largest(self, names: Iterable[str | None]) -> str | None:
        return max((n for n in names if n is not None), key=self._sizes.__getitem__, default=None)

    def _name(self, t: Tensor) -> str | None:
        """The weight that a tensor is, is part of, or was computed from."""
        at = t.storage_offset() if (found := self._made.get(_storage(t) or 0)) else 0
        return next((name for start, stop, name in found or () if start <= at < stop), None)


def _operands(operator: Any, args: tuple) -> tuple:
    """The two factors of a product; none for attention, which multiplies activations."""
    if "attention" in str(operator):
        return ()
    return args[1:3] if operator.__name__ in ("addmm", "addmv", "baddbmm", "addbmm") else args[:2]


def _storage(t: Tensor) -> int | None:
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other tensors that have none
        return None
