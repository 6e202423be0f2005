"""What `__all__` promises, and that no public name means something else in a library used beside this one."""

import importlib
import pkgutil
import re
from types import ModuleType

import lightning.pytorch.callbacks
import pytest
import torch
import torchmetrics
import torchvision

import lightning_sparse_cl as scl

PACKAGES = [scl] + [
    importlib.import_module(f"{scl.__name__}.{module.name}")
    for module in pkgutil.iter_modules(scl.__path__)
    if module.ispkg
]
NEIGHBOURS = [
    torchvision.datasets, torchvision.models, torch.nn, torch.optim, lightning.pytorch.callbacks, torchmetrics,
]  # fmt: skip


def bound(package: ModuleType) -> set[str]:
    """Names without an underscore that a package binds, other than modules."""
    return {name for name, value in vars(package).items() if name[0] != "_" and not isinstance(value, ModuleType)}


def sorting_key(name: str) -> tuple:
    """Constants, then classes, then functions; numbers by value, so that CIFAR10 precedes CIFAR100."""
    return not name.isupper(), name[0].islower(), [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_all_is_complete_and_sorted(package):
    assert set(package.__all__) == bound(package)
    assert package.__all__ == sorted(package.__all__, key=sorting_key)


def test_the_root_exports_the_packages_own_objects():
    for package in PACKAGES[1:]:
        for name in set(package.__all__) & set(scl.__all__):
            assert getattr(scl, name) is getattr(package, name)


@pytest.mark.parametrize("neighbour", NEIGHBOURS, ids=lambda m: m.__name__)
def test_no_public_name_is_also_a_neighbours(neighbour):
    shadowed = {name for package in PACKAGES for name in package.__all__ if hasattr(neighbour, name)}
    assert not shadowed, f"{neighbour.__name__} also has {sorted(shadowed)}"
