"""Labels that are several, real numbers or maps: learnt, measured as others measure them, predicted and refused."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import kinds_of_labels as kinds
import lightning.pytorch as pl
import pytest
import torch
from sklearn.metrics import average_precision_score, jaccard_score, r2_score
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import TensorDataset
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.data.targets import KINDS

ER = partial(scl.ER, 40, 16)
METHODS: dict[str, Callable[[str], scl.ContinualModule]] = {
    "fine-tuning": lambda kind: kinds.module(kind),
    "single head": lambda kind: kinds.module(kind, scl.CrossEntropy(single_head=True)),
    "ER": lambda kind: kinds.module(kind, ER()),
    "DER": lambda kind: kinds.module(kind, scl.DER(40, 16)),
    "DER++": lambda kind: kinds.module(kind, scl.DERpp(40, 16)),
    "A-GEM": lambda kind: kinds.module(kind, policies=[scl.AGEM(40, 16)]),
    "GPM": lambda kind: kinds.module(kind, optimizer=partial(SGD, lr=0.2), policies=[scl.GPM()]),
    "RigL": lambda kind: kinds.module(kind, ER(), policies=[scl.RigL(0.5, interval=5)]),
    "SNIP": lambda kind: kinds.module(kind, ER(), policies=[scl.SNIP(0.5)]),
    "SparCL": lambda kind: scl.SparCL(
        kinds.backbone(kind), ER(), scl.TaskAwareDynamicMasking(0.5, 3),
        scl.DynamicDataRemoval(0.2, 2, 2, by="loss"), optimizer=partial(Adam, lr=0.005),
    ),
    "EsaCL": lambda kind: scl.EsaCL(kinds.backbone(kind), ER(), 0.5),
    "LaMAML": lambda kind: kinds.module(kind, ER(), update=scl.LaMAML(parts=2)),
}  # fmt: skip


def fit(kind: str, method: str, epochs: int = 10, **kwargs: Any) -> Any:
    pl.seed_everything(0, verbose=False)
    module, evaluation, data = METHODS[method](kind), scl.ContinualEvaluation(), kinds.data(kind, **kwargs)
    trainer(evaluation, scl.FlopsCounter(), epochs=epochs).fit(module, data)
    return module, evaluation.matrices, data


def by_scikit(kind: str, outputs: Tensor, labels: Tensor) -> float:
    if kind == "multi_label":
        has = labels.any(0)
        return average_precision_score(labels[:, has], outputs[:, has])
    if kind == "real_numbers":
        return r2_score(labels, outputs)
    counts = labels != 255
    found, true = outputs.argmax(1)[counts], labels[counts]
    return jaccard_score(true, found, average="macro")


FAST = [("multi_label", "RigL"), ("real_numbers", "RigL"), ("class_maps", "SparCL"), ("real_numbers", "EsaCL")]
NOT = [("class_maps", "DER"), ("class_maps", "DER++"), ("real_numbers", "GPM")]  # GPM has no direction left to learn in
CASES = [(kind, method) for kind in kinds.KINDS for method in METHODS if (kind, method) not in NOT]


@pytest.mark.parametrize(
    ("kind", "method"), [pytest.param(*c, marks=[pytest.mark.slow] if c not in FAST else []) for c in CASES]
)
def test_methods_learn_labels_of_every_kind(kind: str, method: str) -> None:
    """Each learns its tasks, and the matrix is what scikit-learn finds of the network at the end."""
    module, matrices, data = fit(kind, method)
    untrained, own = matrices["task_il"].baseline, matrices["task_il"].R.diag()
    assert (own > untrained + 0.1).all() and own.min() > 0.3, (own, untrained)
    module.eval()
    for task, test in enumerate(data.test_sets):
        with torch.no_grad():
            outputs = module(data.prepare(test.inputs, augment=False))
        expected = by_scikit(kind, outputs, test.labels)
        assert float(matrices["class_il"].R[1, task]) == pytest.approx(expected, abs=1e-5)
        live = torch.zeros(data.num_classes, dtype=torch.bool)
        live[data.classes[task]] = True
        if kind == "class_maps":
            outputs = outputs.masked_fill(~live.view(-1, 1, 1), -torch.inf)
            expected = by_scikit(kind, outputs, test.labels)
        assert float(matrices["task_il"].R[1, task]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_memories_hold_labels_as_stored(kind: str) -> None:
    module, _, data = fit(kind, "ER", 2)
    held = module.objective.memory.contents()
    assert held.labels.dtype == data.labels.dtype and held.labels.shape[1:] == data.labels.shape[1:]
    inputs, labels = (torch.cat([getattr(d, name) for d in data.train_sets]) for name in ("inputs", "labels"))
    for x, y in zip(held.inputs, held.labels):
        assert any(torch.equal(y, label) for label in labels[(inputs == x).flatten(1).all(1)])


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_in_memory_or_item_by_item_is_the_same(kind: str) -> None:
    one, other = (fit(kind, "ER", 2, in_memory=held, val_fraction=0.1)[0].state_dict() for held in (True, False))
    assert all(torch.equal(one[name], other[name]) for name in one if torch.is_tensor(one[name]))


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_checkpoint_says_what_its_module_says(kind: str, tmp_path: Any) -> None:
    pl.seed_everything(0, verbose=False)
    names = {"multi_label": list("abcd"), "real_numbers": ["height", "width"], "class_maps": list("abcd")}[kind]
    data, module = kinds.data(kind, class_names=names), METHODS["ER"](kind)
    fitting = trainer(epochs=5)
    fitting.fit(module, data)
    fitting.save_checkpoint(tmp_path / "a.ckpt")
    loaded = scl.ContinualModule.load_from_checkpoint(tmp_path / "a.ckpt", **(
        {} if kind != "class_maps" else {"backbone": kinds.backbone(kind), "objective": ER()}
    ))  # fmt: skip
    stored = data.test_sets[1].inputs
    with torch.no_grad():
        outputs = module.eval()(data.prepare(stored, augment=False))
    answers = loaded.predict_samples(stored, data.transform)
    assert len(answers) == len(stored)
    for answer, output in zip(answers, outputs):
        if kind == "multi_label":
            assert {p.name for p in answer} == {names[i] for i in (output > 0).nonzero().flatten()}
            assert [p.probability for p in answer] == sorted((p.probability for p in answer), reverse=True)
        elif kind == "real_numbers":
            assert answer == pytest.approx(dict(zip(names, output.tolist())))
        else:
            assert torch.equal(answer, output.argmax(0))


class PlainModule(pl.LightningModule):
    """Somebody's module: a network and a loss, and nothing of this package."""

    def __init__(self, network: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return Adam(self.parameters(), 0.01)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "multi_label": nn.functional.binary_cross_entropy_with_logits,
    "real_numbers": nn.functional.mse_loss,
    "class_maps": partial(nn.functional.cross_entropy, ignore_index=255),
}


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_foreign_module_gets_labels_that_its_loss_takes(kind: str) -> None:
    pl.seed_everything(0, verbose=False)
    data = kinds.data(kind)
    data.setup()
    wide = nn.Conv2d(32, 4, 1) if kind == "class_maps" else nn.Linear(32, data.num_classes)
    network = nn.Sequential(kinds.backbone(kind), wide)
    network(data.example())
    evaluation = scl.ContinualEvaluation()
    fitting = trainer(evaluation, scl.RigL(0.5, interval=5), epochs=12)
    fitting.fit(PlainModule(network, LOSSES[kind]), data)
    found = evaluation.matrices["task_il"]
    assert (found.R.diag() > found.baseline + 0.1).all()


def test_a_report_says_what_was_measured(tmp_path: Any, capsys: Any) -> None:
    data, module = kinds.data("multi_label"), METHODS["ER"]("multi_label")
    fitting = trainer(scl.ContinualEvaluation(), scl.RunReport(str(tmp_path)), epochs=2)
    fitting.fit(module, data)
    shown = capsys.readouterr().out
    assert "Class-IL mAP on each task (column) after each task (row), %" in shown and "mean mAP" in shown
    fitting.test(module, data)
    assert "MAP on each task, %" in capsys.readouterr().out


@pytest.mark.parametrize("again", [copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_copies_of_data_have_the_same_target(again: Callable[[Any], Any]) -> None:
    for kind in ("classes", *kinds.KINDS):
        assert again(KINDS[kind]) is KINDS[kind]
    data = kinds.data("multi_label")
    data.setup()
    module, evaluation = METHODS["RigL"]("multi_label"), scl.ContinualEvaluation()
    trainer(evaluation, epochs=1).fit(module, again(data))
    assert again(module).target is KINDS["multi_label"]


def test_a_further_fit_has_labels_of_the_same_kind_and_order() -> None:
    module = kinds.module("multi_label")
    trainer(epochs=1).fit(module, kinds.data("multi_label", class_names=list("abcd")))
    other = TensorDataset(torch.randn(40, 8), torch.arange(40) % 2)
    with pytest.raises(ValueError, match="labels are classes, those learnt before multi_label"):
        trainer(epochs=1).fit(module, scl.TaskDatasets([other], [other], batch_size=8))
    turned = [kinds.one("multi_label", 1, 40, 7)]
    with pytest.raises(ValueError, match="labels are b, a, c, d, those learnt before a, b, c, d; those of multi_label"):
        data = scl.TaskDatasets(turned, turned, target="multi_label", class_names=list("bacd"), batch_size=8)
        trainer(epochs=1).fit(module, data)
    evaluation, data = scl.ContinualEvaluation(), None
    data = scl.TaskDatasets(turned, turned, target="multi_label", class_names=list("abcd"), batch_size=8)
    trainer(evaluation, epochs=1).fit(module, data)
    assert data.num_tasks == 3 and not evaluation.matrices["class_il"].R[-1, 2].isnan()


def test_workers_that_are_spawned_give_the_same_labels() -> None:
    part = TensorDataset(torch.randn(40, 2), torch.tensor([3, 7, 9, 20]).repeat(10))
    data = scl.TaskDatasets([part], [part], in_memory=False)
    data.setup()
    assert [pickle.loads(pickle.dumps(data.train_sets[0]))[i][1] for i in range(4)] == [0, 1, 2, 3]


def test_one_number_may_come_without_a_dimension_of_its_own() -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    part = TensorDataset(x, x.sum(1) - 1)
    data = scl.TaskDatasets([part], [part], target="real_numbers", batch_size=8)
    evaluation, module = scl.ContinualEvaluation(), kinds.module("real_numbers", ER())
    trainer(evaluation, epochs=20).fit(module, data)
    assert evaluation.matrices["class_il"].R.item() > 0.8 and module.head.out_features == 1


X = torch.zeros(40, 8)
MAPS = torch.zeros(40, 6, 6, dtype=torch.long)
REFUSED: list[tuple[str, Any, Any, str]] = [
    ("multi_label", X, torch.zeros(40, dtype=torch.long), r"labels are \(N, C\) of 0 and 1.*, got the shape \(40,\)"),
    ("multi_label", X, torch.full((40, 3), 2), r"labels are \(N, C\) of 0 and 1, a column for each label, got 2"),
    ("real_numbers", X, torch.full((40,), torch.nan), "label 0 has values that are NaN or infinite"),
    ("real_numbers", X, torch.zeros(40, 2, 2), r"labels are real numbers \(N,\) or \(N, C\), got torch.float32"),
    ("class_maps", X, MAPS + 256, r"whole numbers 0-254, and 255 where a pixel does not count, got 256"),
    ("class_maps", X, MAPS + 0.5, "labels are maps of classes .N, H, W., whole numbers 0-254"),
    ("class_maps", X, MAPS + 255, "no label counts; labels are maps of classes"),
    ("classes", X, torch.zeros(40, 3, dtype=torch.long), "labels are whole numbers, one for each sample"),
    ("none", X, MAPS, r"TaskDatasets\(target='none'\): target is one of classes, multi_label, real_numbers, class"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "inputs", "labels", "message"), REFUSED, ids=[m for *_, m in REFUSED])
@pytest.mark.parametrize("in_memory", [True, False])
def test_labels_of_another_kind_are_refused(kind: str, inputs: Any, labels: Any, message: str, in_memory: bool) -> None:
    part = TensorDataset(inputs, labels)
    with pytest.raises(ValueError, match=message) as error:
        scl.TaskDatasets([part], [part], target=kind, in_memory=in_memory).setup()
    assert "\n" not in str(error.value)


ONE_EACH = [
    *((method(40), kind) for method in (scl.ICaRL, scl.FDR, scl.CO2L) for kind in kinds.KINDS),
    *((method(), kind) for method in (scl.LwF, scl.EWC) for kind in kinds.KINDS),
    (scl.DERpp(40), "class_maps"),
    (scl.ER(40, balanced=True), "multi_label"),
    (scl.ER(per_class=4), "real_numbers"),
]


@pytest.mark.parametrize(("objective", "kind"), ONE_EACH, ids=[f"{type(o).__name__}-{k}" for o, k in ONE_EACH])
def test_objectives_refuse_labels_that_they_cannot_take(objective: scl.Objective, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{type(objective).__name__}: .*{kind}") as error:
        trainer(epochs=1).fit(kinds.module(kind, objective), kinds.data(kind))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (300, 0.1), (3e4, 1), (1e-6, 1e-7)])
def test_r2_of_numbers_of_any_size_is_that_of_scikit_learn(mean: float, deviation: float) -> None:
    pl.seed_everything(0, verbose=False)
    labels = mean + deviation * torch.randn(500, 3)
    outputs = labels + 0.5 * deviation * torch.randn(500, 3)
    labels[:, 2] = 3.25  # the same for all
    metric = KINDS["real_numbers"].measure(3)
    for i in range(0, 500, 64):
        metric.update(outputs[i : i + 64], labels[i : i + 64])
    assert float(metric.compute()) == pytest.approx(r2_score(labels.double(), outputs.double()), abs=1e-5)


def test_what_moves_the_pixels_of_images_is_refused_for_maps() -> None:
    moving = scl.ImageTransform([0.0] * 3, [1.0] * 3, flip=True)
    for given in ({"augment": lambda x: x.flip(3)}, {"transform": moving}):
        with pytest.raises(ValueError, match=r"augment=.* would change images, but not their maps") as error:
            kinds.data("class_maps", **given).setup()
        assert "\n" not in str(error.value)
    kinds.data("class_maps", transform=moving, augment=False).setup()


def test_other_refusals_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"a backbone gives features \(B, D, H, W\) for labels of class_maps, got"):
        flat = nn.Sequential(nn.Flatten(), nn.LazyLinear(8))
        trainer(epochs=1).fit(scl.ContinualModule(flat), kinds.data("class_maps"))
    with pytest.raises(
        ValueError, match=r"a backbone gives features \(B, D\) for labels of classes, got \(1, 32, 6, 6\)"
    ):
        kinds.module("class_maps").build((3, 6, 6), 4)
    with pytest.raises(ValueError, match="Sequential: it gives features of 3 x 3 pixels, and maps of"):
        halved = nn.Sequential(kinds.PerPixel(), nn.MaxPool2d(2))
        trainer(epochs=1).fit(scl.ContinualModule(halved), kinds.data("class_maps"))
    with pytest.raises(ValueError, match=r"TaskSubnetworks: .* labels of the kind 'multi_label'; it takes 'classes'"):
        trainer(epochs=1).fit(scl.ContinualDST(kinds.backbone("multi_label")), kinds.data("multi_label"))
    part = kinds.one("multi_label", 0, 40, 0)
    for names, message in (
        (list("abcdef"), "there are 6 names, but labels of multi_label have 4"), ("abcd", "a list of texts"),
        (["a", "a", "b", "c"], "all different"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            scl.TaskDatasets([part], [part], target="multi_label", class_names=names).setup()
    named = [[[(torch.zeros(2), "low"), (torch.ones(2), "high")]]] * 2
    with pytest.raises(ValueError, match=r"labels are real numbers .*; that of item 0 is str low"):
        scl.TaskDatasets(*named, target="real_numbers").setup()
    sets = [kinds.one("multi_label", 0, 40, 0), TensorDataset(torch.zeros(40, 8), torch.zeros(40, 3))]
    with pytest.raises(ValueError, match=r"labels of shape \(3,\) and of shape \(4,\); all must be equal"):
        scl.TaskDatasets(sets, sets, target="multi_label").setup()
