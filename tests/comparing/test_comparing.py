"""Runs on disk become one table, whose numbers are those of SciPy and of hand-made files."""

import io
import json
import math
import os

import lightning.pytorch as pl
import numpy
import pytest
from rich.console import Console
from scipy import stats
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
        "flops": {"training": 1e12 * (1 + acc), "dense": 2e12}, "size": {"bytes": 1000}, "seconds": 1.0,
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
    assert "at least 5 common seeds" in " ".join(console.file.getvalue().split())


def test_corrections_and_p_values():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([math.nan, 0.01])[1] == pytest.approx(0.02) and math.isnan(holm([math.nan, 0.01])[0])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []
    assert p_value([1, 2], [1, 2], "t") == p_value([1, 2], [1, 2], "wilcoxon") == 1.0
    assert math.isnan(p_value([1], [0], "t")) and p_value([1.5, 2.5], [1, 2], "t") == 0.0
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
    for why in ("was stopped", "not readable", "another program", "is a newer run of the same"):
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
    made = scl.compare(tmp_path / "elsewhere", tmp_path / "report", tune_on={"data": "Other"})
    assert made.groups[0].runs[0].metrics["class_il"]["acc"] == 0.5  # best on the other data's test samples
    made = scl.compare(
        tmp_path / "elsewhere", tmp_path / "report", tune_on={"data": "Other"}, metrics=["class_il_forgetting"]
    )
    assert made.groups[0].runs[0].metrics["class_il"]["acc"] == 0.5
    with pytest.raises(ValueError, match=r"must not decide, and no validation samples; train with data\.val_fraction"):
        scl.compare(tmp_path / "report", tmp_path / "tune", tune_on={"data.class_order": "2"})
    with pytest.raises(ValueError, match="0 runs to tune on and 4 to report"):
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
        (["runs", "--metrics=accuracy"], "--metrics=accuracy: one of class_il, "),
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
