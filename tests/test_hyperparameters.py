"""Every public hyper-parameter does something: changing it changes the result. New classes join by themselves."""

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import fake_data
import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.run_description import run_description
from lightning_sparse_cl.demos import toy_tasks

PARTS = (
    scl.Objective, scl.UpdateRule, Optimizer, scl.LossSelection, scl.ContinualModule, scl.TaskDataModule, pl.Callback,
    nn.Module,
)  # fmt: skip

# Small files for the data modules that read some.
FILES: dict[str, Callable[..., Any]] = {
    "SplitMNIST": fake_data.write_mnist, "PermutedMNIST": fake_data.write_mnist, "RotatedMNIST": fake_data.write_mnist,
    "SplitFashionMNIST": partial(fake_data.write_mnist, name="FashionMNIST"),
    "SplitCIFAR10": fake_data.write_cifar10, "SplitCIFAR100": fake_data.write_cifar100,
    "SplitTinyImageNet": fake_data.write_tiny_imagenet, "SplitMiniImageNet": fake_data.write_mini_imagenet,
    "SplitImageFolder": fake_data.write_image_folder,
}  # fmt: skip

NO_RESULT = {
    "where the files are": {"root", "download", "folder"},
    "bases and data containers": {"ClassSplit", "SourceTasks", "TaskDataModule", "Permuted", "Rotated", "TaskDatasets",
        "Objective", "UpdateRule", "ScoredModule", "WeightScores",
        "Sparsifier", "ScorePruning", "DropAndGrow", "TaskCallback", "AccuracyMatrix",
        "ReservoirMemory", "BalancedMemory", "ClassBalancedReservoir", "ImageTransform", "Standardisation"},
    "Lightning's own, tested in test_resume": {"SequenceCheckpoint"},
    "tasks that come one after the other, tested in test_open_sequences": {"OpenTasks", "TaskStream",
        "GrowingImageFolder"},
    "on the screen only, or what a run is called, tested in test_report": {"TaskProgressBar", "RunReport"},
    "how fast it is computed": {"SparseAcceleration"},
    "where it runs, not what comes out": {"num_workers", "in_memory"},
    "schedulers of foreign modules, tested in test_order_and_hooks": {"TaskSchedule.restart_schedulers"},
    "what is tested, not how it is trained, tested in test_some_tasks": {"ContinualEvaluation.tasks"},
    "goes on or stops, tested in test_subnetworks": {"TaskSubnetworks.full"},
    "takes more epochs, tested in test_lps, test_nispa and test_cpg": {"LPS", "NISPA", "StableUnits", "CPG",
        "CompactPickGrow"},
    "acts where a Reopen gives weights back, tested in test_packnet": {"OneShotPruning.last", "GradualPruning.last"},
    "how answers are compared, tested in test_task_inference": {"TaskSubnetworks.inference"},
    "takes another backbone, tested in test_cli": {"SplitDigits.table"},
    "digits are not augmented": {f"{kind}{name}.augment" for kind in ("Split", "Permuted", "Rotated")
        for name in ("Digits", "MNIST", "FashionMNIST")} | {"SplitJapaneseVowels.augment"},
    "must fit the number of classes, tried with SplitDigits": {f"Split{name}.{way}"
        for name in ("CIFAR10", "CIFAR100", "FashionMNIST", "ImageFolder", "JapaneseVowels", "MNIST",
            "MiniImageNet", "Tensors", "TinyImageNet") for way in ("base", "increment", "sizes")},
    "goes with base": {"SplitDigits.increment"},
    "others' packages and data modules, tested in test_foreign_modules and foreign": {"Tasks", "Timm", "Transformers"},
    "what is measured besides, tested in test_streams": {"AnytimeAccuracy"},
    "rows of files, tested in test_text_and_csv": {"SplitCSV", "SplitTextFolder", "TextTransformer"},
    "what the parts below are put into": {"params", "kwargs", "args", "source"},
}  # fmt: skip

NOT_TOLD = {"train", "test", "transform", "ContinualEvaluation.before_pruning", "ContinualEvaluation.class_il"}
"""Tensors and callables, which settings do not describe, and what is measured."""
OF_SERIES = {"SplitJapaneseVowels", "SeriesCNN", "SeriesGRU"}
THE_DATA = toy_tasks()
IMAGES = tuple(torch.cat([getattr(d, part) for d in THE_DATA.load()[0]]) for part in ("inputs", "labels"))

# What a class needs to be made at all or to show a difference, and the other value where it is not obvious.
BASE: dict[str, dict[str, Any]] = {
    "ContinualModule": {"backbone": scl.SmallCNN(4), "optimizer": partial(SGD, lr=0.03)},
    "IsolatingModule": {"backbone": scl.SmallCNN(4), "optimizer": partial(SGD, lr=0.03),
        "policies": [scl.TaskSubnetworks(share=False)]},
    "EsaCL": {"backbone": scl.SmallCNN(4), "objective": scl.DERpp(30, 8), "selection": scl.LossSelection(warmup=0)},
    **{name: {"memory": 30, "replay_batch_size": 8}
        for name in ("ER", "DER", "DERpp", "DERppOneDraw", "FDR", "ICaRL", "AGEM")},
    "CO2L": {"memory": 30, "replay_batch_size": 8, "teacher_temperature": 0.1}, "EWC": {"samples": 8, "bound": 0.5},
    "GPM": {"threshold": 0.5, "increment": 0.2, "samples": 20}, "LaMAML": {"clip": 0.1},
    "SparCL": {"backbone": scl.SmallCNN(4), "objective": scl.DERpp(30, 8),
        "masking": scl.TaskAwareDynamicMasking(0.5, 1), "removal": scl.DynamicDataRemoval(0.3, 1, 1),
        "gradients": scl.DynamicGradientMasking(0.1, 2)},
    "TaskAwareDynamicMasking": {"sparsity": 0.5, "interval": 1, "p_intra": 0.2, "p_inter": 0.2},
    "DynamicDataRemoval": {"cutoff": 2, "interval": 1}, "DynamicGradientMasking": {"q": 0.3, "interval": 2},
    "RigL": {"sparsity": 0.5, "interval": 3}, "SET": {"sparsity": 0.5, "interval": 3},
    "SNFS": {"sparsity": 0.5, "interval": 3}, "SNIP": {"sparsity": 0.5},
    **{name: {"sparsity": 0.5, "interval": 3} for name in ("UnfiredGrowth", "MomentumGrowth", "AdaptiveGrowth")},
    "ContinualDST": {"backbone": scl.SmallCNN(4), "growth": scl.SET(0.5, interval=3, dense=["head.weight"])},
    "CLLSG": {"backbone": scl.SmallCNN(8), "growth": scl.SparseGrowth(1.1, 1)},
    "GrowthGates": {"kernel_init": 0.1}, "SparseGrowth": {"target": 1.1, "reuse_epochs": 1},
    "PackNet": {"backbone": scl.SmallCNN(4), "pruning": scl.OneShotPruning(0.5, dense=["head.weight"])},
    **{name: {"backbone": scl.SmallCNN(4)} for name in ("WSN", "SupSup")},
    "Piggyback": {"backbone": scl.SmallCNN(4), "optimizer": partial(Adam, lr=0.02)},
    "TaskSubnetworks": {"full": "share"},
    "LossSelection": {"warmup": 1}, "Reopen": {"part": 0.4},
    "OneShotPruning": {"sparsity": 0.5}, "GradualPruning": {"sparsity": 0.5}, "GradientClipping": {"max_norm": 0.1},
    "TaskLRSchedule": {"scheduler": partial(StepLR, step_size=1, gamma=0.5)},
    "TaskEarlyStopping": {"monitor": "val/loss", "patience": 1},
    "SplitTensors": {"train": IMAGES, "test": IMAGES, "num_tasks": 3},
    "SplitImageFolder": {"num_tasks": 2, "crop": 2, "size": 9},
    # As quick as it gets.
    "SplitDigits": {"batch_size": 64}, "SeriesCNN": {"width": 4}, "SeriesGRU": {"width": 4},
    **{name: {"num_tasks": 3, "batch_size": 64} for name in ("PermutedDigits", "RotatedDigits")},
    "VGG16": {"width": 4}, "ResNet18": {"width": 8}, "SmallImageMobileNetV2": {"width": 0.25},
}  # fmt: skip
OTHER: dict[str, Any] = {
    "backbone": scl.SmallMLP([8]), "objective": scl.ER(30, 8), "update": scl.SharpnessAware(0.5),
    "optimizer": partial(SGD, lr=0.01), "selection": scl.LossSelection(0.2, 0.2, 0),
    "policies": [scl.GradientClipping(0.1)], "freeze": "share", "dense": ["head.weight"], "of": "share",
    "init": "zero", "part": 0.5, "momentum": 0.9, "min_k": 40, "scheduler": partial(StepLR, step_size=2, gamma=0.1),
    "monitor": "val/acc", "mode": "max", "min_delta": 1e9, "patience": 3, "hidden": [5],
    "class_order": 3, "transform": scl.ImageTransform([0.2], [0.7]), "train": (IMAGES[0].flip(3), IMAGES[1]),
    "test": (IMAGES[0][:90], IMAGES[1][:90] * 0 + torch.arange(90) % 6), "crop": 1, "flip": False, "num_tasks": 2,
    "val_fraction": 0.3, "batch_size": 20, "augment": False, "max_norm": 0.01,
}  # fmt: skip
OTHER |= {
    "distribution": "erk",
    "sparse": ["head.weight"],
    "loss": lambda module, batch: module(batch[0]).square().mean(),
    **{f"{name}.final": 0.2 for name in ("RigL", "SET", "SNFS", "UnfiredGrowth", "MomentumGrowth", "AdaptiveGrowth")},
    "stem": "7x7",
    "GradualPruning.start": 0.4,
    "GradualPruning.until": 0.5,
    "OneShotPruning.epoch": 1,
    "OneShotPruning.retrain": 1,
    "keep": 0.3,
    "train_free": 1,
    "SupSup.subnetworks": scl.TaskSubnetworks("frozen", "share"),
    "Piggyback.subnetworks": scl.TaskSubnetworks("frozen", "share"),
    "Piggyback.threshold": 0.008,
    "Piggyback.init": 0.02,
    "pruning": scl.OneShotPruning(0.8, dense=["head.weight"]),
    "forward": "joint",
    "over": "all",
    "prune_epoch": 1,
    "EsaCL.reopen": scl.Reopen("zero"),
    "LossSelection.replay": 0.5,
    "replays": False,
    "batch_norm": "shared",
    "target": 0.0,
    "gates": scl.GrowthGates(0.5),
    "GrowthGates.seed": 0.5,
    "IsolatingModule.policies": [scl.TaskSubnetworks(share=False), scl.GradientClipping(0.1)],
    "CLLSG.optimizer": partial(SGD, lr=0.1),
    "penalty": 10.0,
    "growth": scl.SET(0.7, interval=3, dense=["head.weight"]),
    "CLLSG.growth": scl.SparseGrowth(0.0, 1),
    "subnetworks": scl.TaskSubnetworks("shared", "share"),
    "reopen": scl.Reopen("random"),
    "mask_optimizer": partial(SGD, lr=1.0),
    "LeNet5.width": 8,
    "kernel": 3,
    "SplitJapaneseVowels.tasks": [[2, 1, 0], [5, 4]],
    "SplitJapaneseVowels.num_tasks": 9,
    "SplitJapaneseVowels.transform": scl.Standardisation([0.0] * 12, [1.0] * 12),
    "SmallImageMobileNetV2.width": 0.5,
    "TaskLRSchedule.interval": "step",
    "masking": scl.TaskAwareDynamicMasking(0.7, 1),
    "removal": scl.DynamicDataRemoval(0.6, 1, 1),
    "SparCL.gradients": scl.DynamicGradientMasking(0.3, 2),
    "gradients": "training",
    "ranking": "global",
    "by": "loss",
    "TaskAwareDynamicMasking.init": "magnitude",
    "EsaCL.update": scl.SingleBackward(),
    "EsaCL.backbone": scl.SmallMLP([8, 8]),
    "SparCL.backbone": scl.SmallMLP([8, 8]),
    "joint": True,
    "stream": True,
    "fit": "crop",
    "channels": 1,
    "SplitImageFolder.num_tasks": 4,
    "SplitImageFolder.flip": True,
    "size": 8,
    "SplitDigits.base": 4,
    "sizes": [4, 2, 2, 2],
    "tasks": [[1, 0], [2]],
    **{
        f"Split{name}.tasks": [list(range(99, 39, -1)), list(range(40))]
        for name in ("CIFAR100", "MiniImageNet", "TinyImageNet")
    },
    "per_class": 5,
    "block": [2, 2],
}
# What goes with the other value.
ALONG: dict[str, dict[str, Any]] = {
    "SplitDigits.base": {"increment": 3},
    "SplitTensors.tasks": {"num_tasks": None},
    "SplitImageFolder.tasks": {"num_tasks": None},
}


def public(files: bool) -> Iterator[Any]:
    """Every pair of a public class, which reads files or not, and one of its parameters, the inherited too.

    The pairs of a class are compared with the same run: one worker tries them all.
    """
    skipped = set().union(*NO_RESULT.values())
    for name in sorted(dir(scl)):
        part = getattr(scl, name)
        if not inspect.isclass(part) or not issubclass(part, PARTS) or name in skipped or (name in FILES) != files:
            continue
        takers = part.__mro__[:-1] if issubclass(part, scl.TaskDataModule) else [part]  # they pass kwargs on
        names = [p for taker in takers for p in inspect.signature(taker).parameters if p not in skipped]
        pairs = [(name, p) for p in dict.fromkeys(names) if f"{name}.{p}" not in skipped]
        yield from (pytest.param(*pair, marks=pytest.mark.xdist_group(name)) for pair in pairs)


def fit(name: str, **kwargs: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """A short sequence with the class in its place; all that came out, and the settings that its report tells."""
    part, kwargs = getattr(scl, name), copy.deepcopy(kwargs)
    torch.manual_seed(0)
    data, callbacks, model = {"val_fraction": 0.2}, [], None
    if issubclass(part, scl.TaskDataModule):
        flip = {"flip": True, "crop": 2} if name == "SplitTensors" else {}
        sequence = part(**({"batch_size": 16} | flip | kwargs))
    else:
        sequence = scl.SplitJapaneseVowels(**data) if name in OF_SERIES else toy_tasks(**data)
    selection = scl.LossSelection(warmup=0)
    if issubclass(part, scl.ContinualModule):
        model = part(**kwargs)
    elif issubclass(part, scl.Objective):
        model = scl.ContinualModule(scl.SmallCNN(4), part(**kwargs))
    elif issubclass(part, scl.UpdateRule):
        model = scl.ContinualModule(scl.SmallCNN(4), scl.DERpp(30, 8), part(**kwargs))
    elif issubclass(part, Optimizer):
        model = scl.EsaCL(scl.SmallCNN(4), scl.DERpp(30, 8), optimizer=partial(part, **kwargs))
    elif issubclass(part, scl.LossSelection):
        model = scl.EsaCL(scl.SmallCNN(4), scl.DERpp(30, 8), selection=part(**kwargs))
    elif issubclass(part, scl.GrowthGates):
        model = scl.CLLSG(scl.SmallCNN(8), scl.SparseGrowth(1.1, 1), part(**kwargs))
    elif issubclass(part, scl.SparseGrowth):
        model = scl.CLLSG(scl.SmallCNN(8), part(**kwargs))
    elif issubclass(part, nn.Module) and not issubclass(part, pl.LightningModule):
        model = scl.ContinualModule(part(**kwargs))
    elif issubclass(part, pl.Callback):
        callbacks = [part(**kwargs)]
    policies = [c for c in callbacks if not isinstance(c, scl.TaskSchedule | scl.ContinualEvaluation)]
    policies += [scl.OneShotPruning(0.5)] if name in ("FreezeMasks", "Reopen") else []
    policies.sort(key=lambda c: not isinstance(c, scl.OneShotPruning))
    objective = scl.DERpp(30, 8)
    model = model or scl.ContinualModule(
        scl.SeriesCNN(4) if name in OF_SERIES else scl.SmallCNN(4),
        objective,
        optimizer=partial(SGD, lr=0.1),
        selection=selection,
        policies=policies,
    )
    evaluation = next((c for c in callbacks if isinstance(c, scl.ContinualEvaluation)), scl.ContinualEvaluation())
    schedule = next((c for c in callbacks if isinstance(c, scl.TaskSchedule)), scl.TaskSchedule(2))
    schedule = scl.TaskSchedule(3) if name in ("GrowthGates", "SparseGrowth", "CLLSG") else schedule
    schedule = {"TaskEarlyStopping": scl.TaskSchedule(8), "DynamicDataRemoval": scl.TaskSchedule(4)}.get(name, schedule)
    ran = trainer(evaluation, epochs=schedule.epochs)
    ran.fit(model, sequence)
    figures = [m.R for m in evaluation.matrices.values()] + [torch.tensor(sequence.starts)]
    results = [p.detach() for p in model.parameters()] + [f.float().nan_to_num(-1) for f in figures]
    return results, run_description(ran, model)["settings"]


@cache
def base(name: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    return fit(name, **BASE.get(name, {}))


def other(name: str, parameter: str) -> Any:
    for key in (f"{name}.{parameter}", parameter):
        if key in OTHER:
            return OTHER[key]
    signature = inspect.signature(getattr(scl, name))
    value = BASE.get(name, {}).get(parameter, signature.parameters[parameter].default)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.5
    raise AssertionError(f"say in OTHER what {name}({parameter}={value!r}) is to be changed to")


def along(name: str, parameter: str) -> dict[str, Any]:
    return ALONG.get(f"{name}.{parameter}", {})


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


AS_ANOTHER = {"RotatedDigits", "PermutedMNIST", "RotatedMNIST", "SplitFashionMNIST", "SplitCIFAR100",
              "SplitMiniImageNet", "SplitTinyImageNet", "SNFS", "AdaptiveGrowth", "DERppOneDraw", "SupSup"}  # fmt: skip
"""Their arguments are those of another class, which is tried in the fast tests."""


def cases(files):
    """All; those like others are slow."""

    def marked(case):
        return pytest.param(*case.values, marks=[*case.marks, pytest.mark.slow])

    return [marked(case) if case.values[0] in AS_ANOTHER else case for case in public(files=files)]


@pytest.mark.parametrize(("name", "parameter"), cases(files=False), ids=str)
def test_changing_it_changes_the_result(name, parameter):
    changed, told = fit(name, **BASE.get(name, {}) | {parameter: other(name, parameter)} | along(name, parameter))
    assert not same(changed, base(name)[0]), f"{name}({parameter}=...) has no effect"
    if parameter not in NOT_TOLD and f"{name}.{parameter}" not in NOT_TOLD:
        assert told != base(name)[1], f"metrics.json does not tell {name}({parameter}=...)"


def served(name: str, **kwargs: Any) -> list[torch.Tensor]:
    """What a data module that reads files gives to training, of each task some batches, and to the test."""

    class Record(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches.extend(batch)

    batches: list[torch.Tensor] = []
    pl.seed_everything(0, verbose=False)
    data = getattr(scl, name)(**{"batch_size": 16} | copy.deepcopy(kwargs))
    trainer(Record(), epochs=1, limit_train_batches=2).fit(scl.ContinualModule(scl.SmallMLP([4])), data)
    return batches + [part for loader in data.test_dataloader() for part in next(iter(loader))]


@pytest.fixture(scope="module")
def file_based(tmp_path_factory):
    """Writes a data module's files once, and tells what it serves from them."""
    served_of: dict[str, list[torch.Tensor]] = {}
    with pytest.MonkeyPatch.context() as patch:

        def of(name: str, **changed: Any) -> list[torch.Tensor]:
            root = tmp_path_factory.getbasetemp() / name
            if name not in served_of:
                FILES[name](root, *[patch] * ("CIFAR" in name))
                served_of[name] = served(name, root=str(root), **BASE.get(name, {}))
            return served(name, root=str(root), **BASE.get(name, {}) | changed) if changed else served_of[name]

        yield of


@pytest.mark.parametrize(("name", "parameter"), cases(files=True), ids=str)
def test_changing_it_changes_what_is_read_from_files(name, parameter, file_based):
    changed = file_based(name, **{parameter: other(name, parameter)} | along(name, parameter))
    assert not same(changed, file_based(name)), f"{name}({parameter}=...) has no effect"
