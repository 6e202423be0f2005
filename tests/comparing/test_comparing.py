"""Runs on disk become one table, whose numbers are those of SciPy and of hand-made files."""

import io
import json
import math
import os
from functools import partial

import lightning.pytorch as pl
import numpy
import pytest
import torch
from rich.console import Console
from scipy import stats
from torch import nn
from torch.optim import SGD
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.cli.compare import command
from lightning_sparse_cl.comparing import Interval, Spread, find_runs, holm, p_value, paired, verdict
from lightning_sparse_cl.comparing.plots import Point, pareto
from lightning_sparse_cl.demos import toy_tasks

SETTINGS = {"optimizer.lr": 0.1, "data.num_tasks": 2, "data.class_order": 0, "epochs": 1}


def matrix(last):
    return {
        "matrix": [[1.0, 0.0], [last, last]], "baseline": [0.0, 0.0], "acc_seen": [1.0, last], "acc": last,
        "incremental_acc": (1 + last) / 2, "bwt": last - 1, "fwt": 0.0, "forgetting": 1 - last,
    }  # fmt: skip


def write_run(root, folder, acc, seed=0, **more):
    """A finished run with an accuracy; what is given replaces or adds entries, ``settings`` single ones."""
    settings = {**SETTINGS, **more.pop("settings", {})}
    metrics = {
        "name": None, "method": "ER", "data": "Toy", "seed": seed, "processes": 1, "finished": True, "sparsity": 0.0,
        "class_il": matrix(acc), "task_il": matrix(acc), "classes": [["cat"], ["dog"]],
        "digests": {"network": "a", "data": "b"}, "flops": {"training": 1e12 * (1 + acc), "dense": 2e12},
        "size": {"bytes": 1000}, "seconds": 1.0,
    }  # fmt: skip
    path = root / folder / f"seed_{seed}"
    path.mkdir(parents=True)
    (path / "metrics.json").write_text(json.dumps(metrics | more | {"settings": settings}))
    return path


def names(comparison):
    return [group.name for group in comparison.groups]


@pytest.fixture
def two_methods(tmp_path):
    for seed in range(6):
        write_run(tmp_path, "er", 0.5 + 0.01 * seed, seed)
        write_run(tmp_path, "der", 0.6 + 0.012 * seed, seed, method="DER")
    return tmp_path


def test_a_table_holds_what_the_files_hold(two_methods):
    made = scl.compare(two_methods)
    assert names(made) == ["DER", "ER"]
    found = made.groups[1].spread(made.quantities[0])
    values = [50 + seed for seed in range(6)]
    assert found == pytest.approx(
        Spread(6, numpy.mean(values), numpy.std(values, ddof=1), numpy.median(values), 50, 55)
    )
    assert made.cells()[2][1] == "52.5 ± 1.9" and made.cells("median")[2][1] == "52.5 (50.0 to 55.0)"
    assert made.cells()[2][-1] == "6"
    rows = [line.split(",") for line in made.to_csv().splitlines()]
    assert rows[0][3:] == ["n", "mean", "deviation", "median", "least", "greatest"]
    assert all(len(row) - line.count('"') // 2 in (8, 9) for row, line in zip(rows, made.to_csv().splitlines()))
    assert made.to_markdown().splitlines()[3].startswith("| ER | 52.5 ± 1.9 |")
    latex = made.to_latex()
    assert r"ER & 52.5 $\pm$ 1.9 &" in latex and r"ACC, \%" in latex and latex.count(r"\\") == 3


@pytest.mark.parametrize("test", ["t", "wilcoxon"])
def test_tests_are_scipys_with_holms_correction(two_methods, test):
    for seed in range(6):
        write_run(two_methods, "fdr", 0.5 + 0.02 * (seed % 2), seed, method="FDR")
    made = scl.compare(two_methods, metrics=["class_il"], test=test)
    found = {(d.one, d.other): d for d in made.differences()}
    assert list(found) == [("DER", "ER"), ("DER", "FDR"), ("ER", "FDR")]
    values = {g.name: [100 * g.runs[s].metrics["class_il"]["acc"] for s in range(6)] for g in made.groups}
    raw = []
    for (one, other), d in found.items():
        a, b = numpy.array(values[one]), numpy.array(values[other])
        expected = stats.ttest_rel(a, b) if test == "t" else stats.wilcoxon(a - b)
        assert d.p == pytest.approx(expected.pvalue) and d.seeds == 6
        low, high = stats.t.interval(0.95, 5, (a - b).mean(), stats.sem(a - b))
        assert d.interval == pytest.approx(Interval((a - b).mean(), low, high))
        raw.append(d.p)
    assert [d.corrected for d in found.values()] == pytest.approx(holm(raw))
    if test == "t":
        assert found["DER", "ER"].verdict == "DER is better" == found["DER", "ER"].verdict
        assert found["DER", "FDR"].verdict == "DER is better"
    else:  # six pairs: p is 1/32 at the least, and three comparisons ask for 1/60
        assert {d.verdict for d in found.values()} == {"too few seeds"}
    against = scl.compare(two_methods, metrics=["class_il"], test=test, reference="DER").differences()
    assert [(d.one, d.other) for d in against] == [("FDR", "DER"), ("ER", "DER")] or [
        (d.one, d.other) for d in against
    ] == [("ER", "DER"), ("FDR", "DER")]
    assert all(d.interval.mean < 0 for d in against)


def test_less_is_better_where_it_is(two_methods):
    (found,) = scl.compare(two_methods, metrics=["flops"]).differences()
    assert found.interval.mean > 0 and found.verdict == "ER is better"


def test_few_seeds_decide_nothing(tmp_path):
    for seed in range(4):
        write_run(tmp_path, "er", 0.5 + 0.001 * seed, seed)
        write_run(tmp_path, "der", 0.9, seed, method="DER")
    made = scl.compare(tmp_path)
    assert {d.verdict for d in made.differences()} == {"too few seeds"}
    console = Console(width=80, file=io.StringIO())
    made.print(console=console)
    assert "5 common seeds at least" in " ".join(console.file.getvalue().split())


def test_corrections_and_p_values():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([math.nan, 0.01])[1] == pytest.approx(0.02) and math.isnan(holm([math.nan, 0.01])[0])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []
    assert p_value([1, 2], [1, 2], "t") == p_value([1, 2], [1, 2], "wilcoxon") == 1.0
    assert math.isnan(p_value([1], [0], "t")) and math.isnan(p_value([1.5, 2.5], [1, 2], "t"))
    assert p_value([0.3, 0.4], [0.1, 0.2], "wilcoxon") == p_value([3, 4], [1, 2], "wilcoxon")  # ties, but for rounding
    assert math.isnan(paired([1.0], [0.0]).low) and paired([1.0], [0.0]).mean == 1
    assert verdict(Interval(1, 0.5, 2), 5) == "confirmed" and verdict(Interval(-1, -2, -0.5), 5) == "not confirmed"
    assert verdict(Interval(1, 0.5, 2), 4) == "not decidable" == verdict(Interval(1, -0.5, 2), 9)


def test_groups_are_named_by_what_sets_them_apart(tmp_path):
    for seed in (0, 1):
        for lr in (0.1, 0.2):
            write_run(tmp_path, f"er_{lr}", 0.5, seed, settings={"optimizer.lr": lr, "RunReport.folder": f"{seed}"})
        parts = {"update": "SAM", "update.rho": 0.1, "policies.0": "RigL", "policies.0.interval": 3, "RigL": "RigL"}
        write_run(tmp_path, "sam", 0.5, seed, method="DER", settings=parts)
        write_run(tmp_path, "plain", 0.5, seed, method="DER", settings={"update": "Single"})
        write_run(tmp_path, "called", 0.5, seed, name="esacl, efficient")
    assert names(scl.compare(tmp_path)) == [
        "esacl, efficient", "ER, lr=0.1", "ER, lr=0.2", "DER, update=Single", "DER, update=SAM"
    ]  # fmt: skip
    write_run(tmp_path, "elsewhere", 0.5, data="Other")
    assert "ER on Other" in names(scl.compare(tmp_path)) and "ER, lr=0.1 on Toy" in names(scl.compare(tmp_path))


def test_equal_settings_of_two_parts_are_told_apart(tmp_path):
    for i, (a, b) in enumerate([(1, 1), (1, 2), (2, 1)]):
        write_run(tmp_path, f"{i}", 0.5, settings={"masking.interval": a, "removal.interval": b})
    assert names(scl.compare(tmp_path)) == [
        f"ER, masking.interval={a}, removal.interval={b}" for a, b in [(1, 1), (1, 2), (2, 1)]
    ]


def test_what_is_no_finished_run_is_told(tmp_path):
    write_run(tmp_path, "a", 0.5)
    write_run(tmp_path, "stopped", 0.5, seed=1, finished=False)
    older = write_run(tmp_path, "again", 0.7)
    for path in (tmp_path / "a").rglob("metrics.json"):
        os.utime(path, (1, 1))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.json").write_text("{")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.json").write_text('{"accuracy": 1}')
    found = find_runs([tmp_path, tmp_path / "again"])
    assert [run.folder for run in found.runs] == [older.resolve()]
    for why in ("was stopped", "not readable", "another program", "is newer, with the same configuration and seed 0"):
        assert sum(why in line for line in found.left_out) == 1, why


def test_tuning_and_reporting_are_kept_apart(tmp_path):
    for lr, tuned, reported in ((0.1, 0.6, 0.5), (0.2, 0.7, 0.4)):
        for seed in (0, 1):
            chosen = {"optimizer.lr": lr}
            held_out = {"held_out": [tuned, tuned]}
            write_run(tmp_path, f"tune/{lr}", 0.9 - tuned, seed, settings=chosen | {"data.class_order": 1}, **held_out)
            write_run(tmp_path, f"report/{lr}", reported, seed, settings=chosen | {"data.class_order": 2})
            write_run(tmp_path, f"elsewhere/{lr}", 1 - tuned, seed, settings=chosen, data="Other")
    (group,) = scl.compare(tmp_path / "tune", tmp_path / "report", tune_on={"data.class_order": "1"}).groups
    assert len(group.runs) == 2 and group.runs[0].metrics["class_il"]["acc"] == 0.4  # best on held-out samples
    (note,) = scl.compare(tmp_path / "tune", tmp_path / "report", tune_on={"data.class_order": "1"}).notes
    assert note == "tuned on data.class_order=1, by validation samples: ER, optimizer.lr=0.2"
    made = scl.compare(tmp_path / "elsewhere", tmp_path / "report", tune_on={"data": "Other"})
    assert made.groups[0].runs[0].metrics["class_il"]["acc"] == 0.5  # best on the other data's test samples
    made = scl.compare(
        tmp_path / "elsewhere", tmp_path / "report", tune_on={"data": "Other"}, metrics=["class_il_forgetting"]
    )
    assert made.groups[0].runs[0].metrics["class_il"]["acc"] == 0.5
    with pytest.raises(ValueError, match=r"must not decide, and no validation samples; train with data\.val_fraction"):
        scl.compare(tmp_path / "report", tmp_path / "tune", tune_on={"data.class_order": "2"})
    with pytest.raises(ValueError, match=r"0 runs to tune on and 4 to report; data\.class_order is 2"):
        scl.compare(tmp_path / "report", tune_on={"data.class_order": "7"})
    for path in (tmp_path / "report" / "0.2").rglob("metrics.json"):
        path.unlink()
    with pytest.raises(ValueError, match="no run to report has the settings that were best for ER"):
        scl.compare(tmp_path / "tune", tmp_path / "report", tune_on={"data.class_order": "1"})


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere"], "compare nowhere: there is no such folder"),
        (["empty"], "compare empty: no finished run"),
        (["runs", "--metrics=accuracy"], "--metrics=accuracy: no run has it; names are class_il, "),
        (["runs", "--metrics=a.b"], "--metrics=a.b: no run has it"),
        (["runs", "--reference=x"], "--reference=x: methods are DER; ER"),
        (["runs", "--test=f"], "argument --test: invalid choice"),
        (["runs", "--tune_on", "data"], "--tune_on data: SETTING=VALUE"),
        ([], "the following arguments are required: RUN"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for method in ("ER", "DER"):
        write_run(tmp_path, f"runs/{method}", 0.5, method=method)
    with pytest.raises(ValueError, match=r"^compare") as error:
        command(args)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "comparison").exists()


def test_real_runs_are_compared_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for sparsity in (0.5, 0.8):
        for seed in (0, 1):
            report = scl.RunReport(folder=f"runs/{sparsity}_{seed}")
            parts = [scl.ContinualEvaluation(), scl.FlopsCounter(), scl.ModelCapacity(), report]
            pl.seed_everything(seed, verbose=False)
            module = scl.ContinualModule(scl.SmallCNN(4), scl.ER(30, 8), policies=[scl.OneShotPruning(sparsity)])
            trainer(*parts, epochs=1).fit(module, toy_tasks())
    command(["runs", "--show=median", "--metrics=class_il,task_il,size,flops.scoring"])
    shown = capsys.readouterr().out
    assert "sparsity=0.5" in shown and "sparsity=0.8" in shown and "seeds" in shown
    assert {path.name for path in (tmp_path / "comparison").iterdir()} == {
        "table.csv", "table.md", "table.tex", "differences.csv", "curves.png", "matrices_class_il.png",
        "matrices_task_il.png", "acc_over_flops.png", "acc_over_size.png", "acc_over_sparsity.png",
    }  # fmt: skip
    made = scl.compare("runs")
    (axes,) = made.plot_over_sparsity().axes
    assert len(axes.get_legend_handles_labels()[1]) == 1  # one line through both
    assert [t.get_text() for t in made.plot_curves().axes[0].get_xticklabels()] == ["1\n0, 1", "2\n2, 3", "3\n4, 5"]
    assert "| ER-OneShotPruning, sparsity=0.5 |" in made._repr_markdown_()
    _, axes = scl.AccuracyMatrix(2).plot()
    assert axes.get_ylabel() == "after learning task" and "2 stages, 2 tasks" in repr(scl.AccuracyMatrix(2))


def test_the_pareto_front_is_of_what_nothing_beats():
    def at(x, y):
        return Point(f"{x} {y}", Spread.of([x]), Spread.of([y]))

    points = [at(3, 3), at(1, 1), at(2, 0.5), at(2, 2), at(4, 3)]
    assert [p.name for p in pareto(points)] == ["1 1", "2 2", "3 3"]


BROKEN = {
    "settings": [None, []], "class_il": [None, 1, {"acc": 0.5}], "classes": [None], "digests": [None], "seed": ["0"],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BROKEN.items() for value in values])
def test_a_broken_file_does_not_stop_the_others(tmp_path, key, value):
    write_run(tmp_path, "good", 0.5)
    write_run(tmp_path, "bad", 0.5, seed=1, **({key: value} if key not in ("settings", "seed") else {}))
    path = tmp_path / "bad" / "seed_1" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    made = scl.compare(tmp_path)
    assert names(made) == ["ER"] and len(made.groups[0].runs) == 1 and "bad" in made.left_out[0]


def test_odd_names_and_missing_numbers_are_shown_as_they_are(tmp_path):
    odd = ["[/]", "[red]a[/red]", "a|b & c_d", "*ü*"]
    for i, name in enumerate(odd):
        for seed in (0, 1):
            write_run(tmp_path, f"{i}", math.nan if i == 0 else 0.5, seed, name=name)
    console = Console(width=200, file=io.StringIO())
    made = scl.compare(tmp_path)
    made.print(console=console)
    assert all(name in console.file.getvalue() for name in odd)
    rows = made.to_latex().splitlines()
    assert not any(row.startswith(("[", "*")) for row in rows) and r"{[}/{]} & - &" in made.to_latex()
    assert r"a\|b & c_d" in made.to_markdown()


def test_what_is_tested_on_other_tasks_is_not_tested_in_pairs(tmp_path):
    for seed in range(5):
        for method in ("ER", "DER"):
            write_run(tmp_path, method, 0.5 + 0.01 * seed, seed, method=method)
        write_run(tmp_path, "fdr", 0.9, seed, method="FDR", classes=[["dog"], ["cat"]])
        if seed < 3:
            write_run(tmp_path, "gpm", 0.9, seed, method="GPM", class_il=matrix(0.9))
    write_run(tmp_path, "gpm", 0.7, 7, method="GPM", commit="abc", size={})
    made = scl.compare(tmp_path, metrics=["class_il", "size"])
    assert not [d for d in made.differences() if "FDR" in (d.one, d.other)]
    assert "note: the runs of GPM are of different commits" in made.notes
    assert next(row for row in made.cells() if row[0] == "GPM")[2].endswith("[3]")


def test_trials_that_did_not_finish_are_told(tmp_path):
    write_run(tmp_path, "sweep/er-seed=0", 0.5)
    for name, record in {"a": {"state": "failed", "error": "no memory"}, "b": {"state": "stopped early"}}.items():
        (tmp_path / "sweep" / name).mkdir()
        (tmp_path / "sweep" / name / "trial.json").write_text(json.dumps(record))
    told = " ".join(scl.compare(tmp_path).left_out)
    assert "a: this trial failed: no memory" in told and "b: this trial was stopped early" in told


class Own(pl.LightningModule):
    """Somebody's module, which keeps nothing of what it is made with."""

    def __init__(self, **kwargs):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(36, kwargs["width"]), torch.nn.Linear(kwargs["width"], 6)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def er(**kwargs):
    return scl.ContinualModule(scl.SmallMLP([4]), scl.ER(30, 8), **kwargs)


IMAGES, LABELS = torch.randint(256, (120, 1, 6, 6), dtype=torch.uint8), torch.arange(120) % 6


def split(images=IMAGES, **kwargs):
    return scl.SplitTensors((images, LABELS), (images, LABELS), num_tasks=3, batch_size=8, **kwargs)


def plain(width):
    return scl.ContinualModule(nn.Sequential(nn.Flatten(), nn.LazyLinear(width)))


HALVED, QUARTERED = (lambda x: x / 2), (lambda x: x / 4)
APART = {
    "learning rate": [{"module": partial(er, optimizer=partial(SGD, lr=lr))} for lr in (0.1, 0.2)],
    "policies": [{"module": lambda n=n: er(policies=[scl.GradientClipping(n)])} for n in (0.1, 10.0)],
    "callbacks": [{}, *({"callbacks": lambda n=n: [scl.GradientClipping(n)]} for n in (0.1, 10.0))],
    "early stopping": [
        {"callbacks": lambda n=n: [scl.TaskEarlyStopping("val/loss", n)], "data": partial(split, val_fraction=0.2)}
        for n in (1, 9)
    ],
    "GPM": [{"callbacks": lambda n=n: [scl.GPM(n, samples=20)]} for n in (0.5, 0.9)],
    "batches": [{"limit_train_batches": n} for n in (1, 2)],
    "data": [{"data": partial(split, images)} for images in (IMAGES, 255 - IMAGES)],
    "transform": [{"data": partial(split, transform=f)} for f in (HALVED, QUARTERED, None)],
    "a network of torch": [{"module": partial(plain, n)} for n in (8, 16)],
    "somebody's module": [{"module": partial(Own, width=n)} for n in (8, 16)],
    "order of classes": [{"data": partial(split, class_order=n)} for n in (None, 1, 2)],
    "validation": [{"data": partial(split, val_fraction=n)} for n in (0.0, 0.2, 0.4)],
    "epochs": [{"epochs": n} for n in (1, [1, 2, 1])],
    "precision": [{"precision": p} for p in ("32-true", "bf16-mixed")],
    "growth": [{"module": lambda n=n: scl.CLLSG(scl.SmallCNN(8), scl.SparseGrowth(n, 1)), "epochs": 3,
                "data": partial(split, val_fraction=0.2)} for n in (0.0, 1.1)],
}  # fmt: skip


@pytest.mark.parametrize("axis", APART)
def test_other_configurations_are_other_rows_and_seeds_are_one(tmp_path, axis):
    """The worst fault of a table is a row that mixes two methods; the next worst, one method in two rows."""
    for i, given in enumerate(APART[axis]):
        for seed in (0, 1):
            pl.seed_everything(seed, verbose=False)
            options = {"data": split, "module": er, "callbacks": list, "epochs": 1} | given
            data, module, callbacks = (options.pop(name)() for name in ("data", "module", "callbacks"))
            report = scl.RunReport(folder=str(tmp_path / f"{i}_{seed}"), show=bool(seed))
            measures = [scl.AnytimeAccuracy(5)] if seed else []  # what only measures sets nothing apart
            trainer(scl.ContinualEvaluation(), report, *callbacks, *measures, **options).fit(module, data)
    made = scl.compare(tmp_path)
    assert [len(group.runs) for group in made.groups] == [2] * len(APART[axis]), names(made)
    assert len(set(names(made))) == len(APART[axis]), names(made)
