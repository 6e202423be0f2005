"""A sweep runs each trial once, whatever interrupts it, and says what is wrong with a space in one line."""

import json
import os
from pathlib import Path

import pytest

import lightning_sparse_cl as scl
from lightning_sparse_cl.__main__ import main
from lightning_sparse_cl.callbacks.claims import Claim
from lightning_sparse_cl.cli.sweep import command
from lightning_sparse_cl.sweeping import Space

SPACE = """
sweep:
  configs: [split_digits/er, [split_digits/finetune, policies/snip]]
  seeds: [0, 1]
  grid:
    model.init_args.backbone.init_args.width: [2, 3]
  folder: trials
  engine: sequential
"""
SMALL = ["--schedule.epochs=1", "--trainer.limit_train_batches=2", "--data.init_args.num_tasks=2"]


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text(SPACE)
    return tmp_path / "trials"


def metrics_of(folder):
    return json.loads(next(iter(sorted(Path(folder).rglob("metrics.json")))).read_text())


def figures(metrics):
    return {key: metrics[key] for key in ("class_il", "task_il", "density_per_layer", "seed", "settings", "name")}


def test_every_combination_is_run_once_and_as_fit_runs_it(space, capsys):
    command(["-c", "space.yaml", *SMALL])
    names = {f"{m}-width={w}-seed={s}" for m in ("er", "finetune+snip") for w in (2, 3) for s in (0, 1)}
    assert {path.name for path in space.iterdir() if path.is_dir()} == names
    assert "8/8" in capsys.readouterr().out
    alone = ["fit", "-c", "split_digits/er", "--model.init_args.backbone.init_args.width=3", "--seed_everything=1"]
    main([*alone, *SMALL, "--trainer.enable_progress_bar=false"])
    assert figures(metrics_of("runs")) == figures(metrics_of(space / "er-width=3-seed=1"))
    made = scl.compare(space)
    assert [(g.name, len(g.runs)) for g in made.groups] == [
        ("er, width=2", 2), ("er, width=3", 2), ("finetune, snip, width=2", 2), ("finetune, snip, width=3", 2)
    ]  # fmt: skip

    before = {path: path.stat().st_mtime_ns for path in space.rglob("metrics.json")}
    capsys.readouterr()
    command(["-c", "space.yaml", *SMALL])
    assert "8 of 8 trials were over before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in space.rglob("metrics.json")} == before
    with pytest.raises(ValueError, match=r"with other arguments \(--schedule.epochs=1, --schedule.epochs=2\)"):
        command(["-c", "space.yaml", "--schedule.epochs=2", *SMALL[1:]])


def test_an_interrupted_sweep_goes_on_with_the_same_bits(space, monkeypatch):
    command(["-c", "space.yaml", *SMALL, "--sweep.folder=whole", "--sweep.seeds=[0]"])
    ends, begin = [], scl.RunReport.on_after_task_end

    def stop(self, trainer, pl_module, task):
        begin(self, trainer, pl_module, task)
        ends.append(task)
        if len(ends) in (2, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(scl.RunReport, "on_after_task_end", stop)
    for _ in range(2):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            command(["-c", "space.yaml", *SMALL, "--sweep.seeds=[0]"])
    command(["-c", "space.yaml", *SMALL, "--sweep.seeds=[0]"])
    for trial in Path("whole").iterdir():
        resumed = [json.loads(p.read_text()) for p in (space / trial.name).rglob("metrics.json")]
        (finished,) = [found for found in resumed if found["finished"]]
        assert figures(finished) == figures(metrics_of(trial)), trial.name
        record = json.loads((space / trial.name / "trial.json").read_text())
        assert record["state"] == "finished" and record["figures"]["tasks"] == 2


def test_a_trial_that_fails_does_not_take_the_others_with_it(space):
    Path("one.yaml").write_text("sweep: {grid: {model.init_args.backbone.init_args.width: [0, 2]}, engine: sequential}")
    with pytest.raises(ValueError, match=r"1 trials failed; er-width=0-seed=0: SmallCNN\(width=0\): a .*log.txt"):
        command(["-c", "split_digits/er", "-c", "one.yaml", *SMALL])
    assert "Traceback" in Path("sweep/er-width=0-seed=0/log.txt").read_text()
    assert metrics_of("sweep/er-width=2-seed=0")["finished"]


def test_values_are_drawn_the_same_in_every_sweep():
    way = {"a.lr": {"log_uniform": [0.001, 0.1]}, "b": {"choice": ["x", "y"]}, "n": {"integers": [1, 3]}}
    space = Space(search=way, trials=20, seeds=[0, 1])
    trials = space.drawn(space.points(["er.yaml"], []))
    assert len(trials) == 40 and len({t.name for t in trials}) == 40
    assert [t.name for t in trials] == [
        t.name for t in Space(search=way, trials=20, seeds=[0, 1]).drawn(space.points(["er.yaml"], []))
    ]
    rates = [t.values["a.lr"] for t in trials]
    assert all(0.001 <= rate <= 0.1 for rate in rates) and sum(rate < 0.01 for rate in rates) in range(8, 33)
    assert {t.values["n"] for t in trials} == {1, 2, 3} and {t.values["b"] for t in trials} == {"x", "y"}
    assert f"--a.lr={trials[0].values['a.lr']}" in trials[0].args and f"lr={trials[0].values['a.lr']}" in trials[0].name


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("seed: 1", "sweep.seed: there is no such entry; there are configs, seeds"),
        ("seeds: 3", "sweep.seeds=3: a list is expected"),
        ("seeds: [-1]", "sweep.seeds=[-1]: a list of whole numbers from 0 on"),
        ("seeds: [true]", "sweep.seeds=[True]"),
        ("grid: {lr: 0.1}", "sweep.grid.lr=0.1: a list of values is expected"),
        ("search: {lr: [0, 1]}", "sweep.search.lr=[0, 1]: one of uniform"),
        ("search: {lr: {log_uniform: [0, 1]}}", "both ends are above 0"),
        ("search: {lr: {uniform: [1, 0]}}", "two numbers in ascending order"),
        ("search: {lr: {integers: [1, 2.5]}}", "two numbers in ascending order"),
        ("search: {lr: {choice: []}}", "a list of values"),
        ("{search: {lr: {uniform: [0, 1]}}, grid: {lr: [1]}}", "sweep.search.lr: this setting is in sweep.grid, too"),
        ("method: best", "sweep.method='best': one of random, optuna"),
        ("method: optuna", "it needs settings to search, one seed and Ray"),
        ("cpus: 0", "sweep.cpus=0: a number, at least 1"),
        ("trials: many", "sweep.trials='many': a number, at least 1"),
        ("stop_early: {grace: 0}", "grace, at least 1, and factor, at least 2"),
        ("stop_early: {patience: 1}", "whole numbers grace and factor"),
        ("stop_early: 2", "sweep.stop_early=2: whole numbers grace and factor"),
        ("stop_early: {grace: two}", "whole numbers grace and factor"),
        ("folder: 3", "sweep.folder=3: the name of a folder"),
        ("folder: ''", "sweep.folder='': the name of a folder"),
        ("cpus: 1.5", "sweep.cpus=1.5: a whole number"),
        ("seeds: [0, 0]", "a seed is given twice"),
        ("configs: [split_digits/nothing]", "there is no configuration split_digits/nothing"),
        ("configs: [split_digits/er, split_digits/er]", "two trials would be called"),
        ("[1]", "the section 'sweep' is a mapping"),
    ],
)  # fmt: skip
def test_a_wrong_space_is_told_in_one_line(tmp_path, monkeypatch, section, said):
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text(f"sweep:\n  {section}\n")
    with pytest.raises(ValueError, match=r"sweep") as error:
        command(["-c", "split_digits/er", "-c", "space.yaml", "--sweep.engine=sequential"])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("metrics.json"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-c", "nothing.yaml"], "there is no configuration nothing.yaml"),
        (["-c"], "sweep -c: a value is expected after it"),
        (["--sweep.seeds=[0]"], "no configuration"),
        (["--sweep.seeds=[0"], "it is no YAML"),
        (["-c", "split_digits/er", "--seed_everything=7"], "--seed_everything=7: the sweep sets seed_everything"),
        (["-c", "split_digits/er", "--sweep.grid={a.b: [1]}", "--a.b", "2"], "--a.b: the sweep sets a.b"),
        (["-c", "split_digits/er", "--trainer.fast_dev_run=true"], "the sweep sets trainer.fast_dev_run"),
        (["-c", "mixed.yaml"], "'model' stands beside the section 'sweep'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told_in_one_line(tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    Path("mixed.yaml").write_text("sweep: {seeds: [0]}\nmodel: ER\n")
    with pytest.raises(ValueError, match="sweep") as error:
        command(args)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_folder_is_of_one_sweep_at_a_time(space):
    space.mkdir()
    other = Claim(space / "sweep")
    assert other.take()
    with pytest.raises(ValueError, match="another sweep is running there"):
        command(["-c", "space.yaml", *SMALL])
    other.release()
    assert not os.listdir(space)


def test_values_of_one_class_have_names_of_their_own(space):
    parts = [{"class_path": "ER", "init_args": {"memory": n, "replay_batch_size": 8}} for n in (20, 40)]
    command(["-c", "split_digits/er", f"--sweep.grid={json.dumps({'model.init_args.objective': parts})}",
             "--sweep.engine=sequential", "--sweep.folder=trials", *SMALL])  # fmt: skip
    assert {path.name for path in space.iterdir()} == {"er-objective=ER.0-seed=0", "er-objective=ER.1-seed=0"}
    assert len(scl.compare(space).groups) == 2


@pytest.mark.parametrize("logger", ["false", "{class_path: CSVLogger, init_args: {save_dir: elsewhere}}"])
def test_a_logger_that_takes_the_files_elsewhere_is_refused(space, logger):
    Path("own.yaml").write_text(f"trainer: {{logger: {logger}}}")
    with pytest.raises(ValueError, match=r"1 trials failed; .*this run's files belong in trials.*leave the logger out"):
        command(
            ["-c", "split_digits/er", "-c", "own.yaml", "--sweep.engine=sequential", "--sweep.folder=trials", *SMALL]
        )
    assert not Path("elsewhere").exists() and not list(Path().rglob("*.ckpt"))
