"""Masks over plain weights: which are alive, which are frozen, which are updated. They belong to the layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_KEY = "_weight_masks"
"""In a layer's ``__dict__``: the :class:`WeightMask` of each of its parameters. No buffer, so that no ``state_dict``,
average or broadcast meets it; copies and pickles of the layer have it like any other attribute."""


@dataclass
class WeightMask:
    """The masks of one weight. Layers that share the weight share this record, and so do the module's averages."""

    alive: Tensor | None = None
    frozen: Tensor | None = None
    updated: Tensor | None = None
    values: Tensor | None = None
    """The weight when it was last held, kept to put back. None if none of it is held."""
    version: int = 0
    """Grows with every change."""

    def free(self) -> Tensor | None:
        """Where a tensor with held weights may move, pruned or not. None if none of it is held."""
        if self.frozen is None:
            return self.updated
        return ~self.frozen if self.updated is None else ~self.frozen & self.updated

    def to(self, device: torch.device) -> WeightMask:
        """Itself, with its tensors on the device."""
        held = self.alive if self.alive is not None else self.values
        if held is None or held.device == device:
            return self
        for kind in ("alive", "frozen", "updated", "values"):
            tensor = getattr(self, kind)
            if tensor is not None and tensor.device != device:
                setattr(self, kind, tensor.to(device))
        return self

    @torch.no_grad()
    def apply_(self, weight: Tensor) -> None:
        """Put the held entries of the weight back and zero the pruned ones; an average may be on another device."""
        device = weight.device
        if self.values is not None and (free := self.free()) is not None:
            weight.copy_(torch.where(free.to(device), weight, self.values.to(device)))
        if self.alive is not None:
            weight.mul_(self.alive.to(device))


class Masks:
    """The masks of a module, by parameter name; the weights stay plain parameters with their usual names.

    ``alive[name]`` is True where a weight may be non-zero, ``frozen[name]`` True where it is never updated,
    ``updated[name]`` True where it is updated until further notice (a gradient mask). A name that is absent has no
    mask: all alive, none frozen, all updated. Pruning a coordinate sets it to zero. A frozen weight may be pruned too:
    it is zero while pruned, and has its frozen value again once it is alive. To keep masks through the steps of an
    optimiser, see :func:`~lightning_sparse_cl.sparsity.enforce`.

    Masks are stored with the layers. They travel with ``copy.deepcopy``, ``pickle`` and ``torch.save`` of the module
    or of any part of it, and a module that contains the layers finds them. Names are those of
    ``module.named_parameters()``, in its order; a weight that several layers share has one mask, which goes by its
    first name.

    Args:
        module: the module whose weights are masked.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers = [(f"{name}." if name else "", layer) for name, layer in module.named_modules()]
        """The parts of the module with the prefix of their names, as they were when this view was made."""
        self._records: list[tuple[str, WeightMask]] = []  # collected when they are first needed
        self._homes: dict[str, tuple[nn.Module, str]] = {}  # the layer of each, and the weight's name there

    def __repr__(self) -> str:
        alive = {name: mask.float().mean().item() for name, mask in self.alive.items()}
        frozen = [name for name, mask in self.frozen.items() if mask.any()]
        lines = [f"  {name}: {part:.1%} alive{', partly frozen' * (name in frozen)}" for name, part in alive.items()]
        return "\n".join([f"Masks of {len(alive)} weights of {type(self.module).__name__}", *lines])

    @classmethod
    def of(cls, module: nn.Module) -> Masks:
        """The masks of ``module``. This is a view: all views of one module show and change the same masks."""
        return cls(module)

    @classmethod
    def from_zeros(cls, module: nn.Module, names: Iterable[str] | None = None, least: float = 0.1) -> Masks:
        """Masks at the zeros of weights that are sparse already, because they were loaded or pruned elsewhere.

        Args:
            module: a module whose weights have zeros.
            names: names of the weights. If None, all with two or more dimensions in which at least ``least`` of the
                entries are zero, but not all.
            least: smallest fraction of zeros.

        Returns:
            The masks of the module; weights that had one keep it.
        """
        masks = cls(module)
        known = masks.alive
        for name, weight in (
            module.named_parameters() if names is None else [(n, module.get_parameter(n)) for n in names]
        ):
            if name in known or (names is None and weight.ndim < 2):
                continue
            alive = weight.detach() != 0
            kept = int(alive.sum())
            if names is not None or 0 < kept <= (1 - least) * alive.numel():
                masks.set_alive(name, alive)
        return masks

    # -- what is masked ----------------------------------------------------------------------------------------

    @property
    def alive(self) -> dict[str, Tensor]:
        """Where each masked weight may be non-zero."""
        return {name: m.alive for name, m in self._here() if m.alive is not None}

    @property
    def frozen(self) -> dict[str, Tensor]:
        """Where each tensor with frozen weights is never updated."""
        return {name: m.frozen for name, m in self._here() if m.frozen is not None}

    @property
    def updated(self) -> dict[str, Tensor]:
        """The gradient masks."""
        return {name: m.updated for name, m in self._here() if m.updated is not None}

    @property
    def version(self) -> int:
        """Grows with every change of a mask."""
        return sum(m.version for _, m in self.records())

    def __iter__(self) -> Iterator[str]:
        return iter(self.alive)

    def __len__(self) -> int:
        return len(self.alive)

    def is_pruned(self) -> bool:
        """Whether any weight has a mask."""
        return any(m.alive is not None for _, m in self.records())

    def frozen_part(self, name: str) -> Tensor:
        """Where the weight is frozen, of the weight's shape; False everywhere if none of it is."""
        frozen = self.record(name).frozen
        return torch.zeros_like(self.module.get_parameter(name), dtype=torch.bool) if frozen is None else frozen

    def held(self, name: str) -> Tensor:
        """The weight with its frozen values, including those of entries that are pruned now."""
        weight, mask = self.module.get_parameter(name).detach(), self.record(name)
        if mask.frozen is None or mask.values is None:
            return weight
        return torch.where(mask.frozen, mask.values, weight)

    def movable(self, name: str) -> Tensor:
        """Where the next step may move the weight: alive and not held; of the weight's shape."""
        mask, found = self.record(name), torch.ones_like(self.module.get_parameter(name), dtype=torch.bool)
        for part in (mask.free(), mask.alive):
            found = found if part is None else found & part
        return found

    def density(self, name: str | None = None) -> float:
        """Fraction of weights alive, of one masked weight or over all that have a mask."""
        alive = self.alive
        masks = list(alive.values()) if name is None else [alive[name]]
        total = sum(m.numel() for m in masks)
        return sum(int(m.sum()) for m in masks) / total if total else 1.0

    # -- changes -----------------------------------------------------------------------------------------------

    def set_alive(self, name: str, mask: Tensor | None) -> None:
        """Prune: zero the weights where ``mask`` is False. If None, the mask is taken away.

        Raises:
            ValueError: if the mask does not have the weight's shape.
        """
        self._change("alive", name, mask)

    def set_frozen(self, name: str, mask: Tensor | None) -> None:
        """Hold the weights where ``mask`` is True at their present value. If None, release all.

        Raises:
            ValueError: if the mask does not have the weight's shape.
        """
        self._change("frozen", name, mask)

    def set_updated(self, name: str, mask: Tensor | None) -> None:
        """Update only where ``mask`` is True and hold the other weights at their present value. If None, update all.

        Raises:
            ValueError: if the mask does not have the weight's shape.
        """
        self._change("updated", name, mask)

    @torch.no_grad()
    def _change(self, kind: str, name: str, mask: Tensor | None) -> None:
        weight, record = self._weight(name, mask), self.record(name)
        whole = self.held(name).clone()
        # in the weight's memory format
        setattr(record, kind, None if mask is None else torch.empty_like(weight, dtype=torch.bool).copy_(mask))
        record.values = None if record.free() is None else whole
        record.version += 1  # now that the old mask cannot be seen under the new number
        weight.copy_(whole if record.alive is None else whole.masked_fill(~record.alive, 0))

    def apply_(self) -> None:
        """Put the held weights back and zero the pruned ones."""
        for name, record in self.records():
            if record.alive is not None or record.values is not None:
                record.apply_(self.module.get_parameter(name))

    def share_with(self, copy: nn.Module) -> None:
        """From now on a copy of the module, such as an average of it, has these very masks and follows them.

        Its weights change with the next :meth:`apply_` of its own masks.
        """
        self.ensure()
        theirs = dict(copy.named_modules())
        for prefix, layer in self.layers:
            other = theirs.get(prefix.removesuffix("."))
            if other is not None and _KEY in layer.__dict__:
                other.__dict__[_KEY] = layer.__dict__[_KEY]

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Masks by kind and name, and the frozen values: tensors, as ``torch.load(weights_only=True)`` takes them."""
        records = self.records()
        kinds = {kind: {n: getattr(m, kind) for n, m in records} for kind in ("alive", "frozen", "updated")}
        found = {kind: {n: m for n, m in masks.items() if m is not None} for kind, masks in kinds.items()}
        values = {n: m.values[m.frozen] for n, m in records if m.frozen is not None and m.values is not None}
        return found | {"values": values}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore, after the weights: a gradient mask holds the values that they have now.

        Raises:
            ValueError: if the masks belong to another network; nothing is changed then.
        """
        names = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        kinds = (("frozen", self.set_frozen), ("alive", self.set_alive), ("updated", self.set_updated))
        for name, mask in ((n, m) for kind, _ in kinds for n, m in state.get(kind, {}).items()):
            if name not in names:
                raise ValueError(f"Masks: the checkpoint has a mask of {name!r}, which this network does not have")
            self._weight(name, mask)
        for kind, put in kinds:
            for name in getattr(self, kind):
                put(name, None)
        for kind, put in kinds:
            for name, mask in state.get(kind, {}).items():
                put(name, mask)
        for name, values in state.get("values", {}).items():
            record = self.record(name)
            if record.values is not None and record.frozen is not None:
                record.values[record.frozen] = values.to(record.values)
                self.set_frozen(name, record.frozen)

    # -- where they are ----------------------------------------------------------------------------------------

    def records(self) -> list[tuple[str, WeightMask]]:
        """The record of each weight, by its first name."""
        if not self._records:
            self.ensure()
        return self._records

    def record(self, name: str) -> WeightMask:
        """The record of the weight of that name."""
        self.records()
        if name not in self._homes:
            self.module.get_parameter(name)  # raises an error with the name if there is none
            self.ensure()
        layer, own = self._homes[name]
        record: WeightMask = layer.__dict__[_KEY][own]
        weight = dict.get(layer._parameters, own)
        return record if weight is None else record.to(weight.device)

    def ensure(self) -> None:
        """Make a record for every parameter; parameters that are one tensor share one."""
        known: dict[int, WeightMask] = {}
        places = [
            (layer, name, p) for _, layer in self.layers for name, p in dict.items(layer._parameters) if p is not None
        ]
        for layer, name, parameter in places:
            if (record := layer.__dict__.get(_KEY, {}).get(name)) is not None:
                known.setdefault(id(parameter), record)
        for layer, name, parameter in places:
            layer.__dict__.setdefault(_KEY, {}).setdefault(name, known.setdefault(id(parameter), WeightMask()))
        found: dict[int, tuple[str, WeightMask]] = {}
        for prefix, layer in self.layers:
            for name, record in layer.__dict__.get(_KEY, {}).items():
                found.setdefault(id(record), (prefix + name, record))
                self._homes[prefix + name] = layer, name
        self._records = list(found.values())

    def _here(self) -> Iterator[tuple[str, WeightMask]]:
        """The records that hold something, on the devices of their weights: the module may have been moved."""
        for name, record in self.records():
            if record.alive is not None or record.values is not None:
                layer, own = self._homes[name]
                weight = dict.get(layer._parameters, own)  # a plain look-up would end compact training
                yield name, record if weight is None else record.to(weight.device)

    def _weight(self, name: str, mask: Tensor | None) -> nn.Parameter:
        weight = self.module.get_parameter(name)
        if mask is not None and mask.shape != weight.shape:
            raise ValueError(f"Masks: mask of {name!r} has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
        return weight
