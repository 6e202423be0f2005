"""The command line at its edges: what cannot be meant, disks that refuse, other loggers, the installed package."""

import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import fuzz_cli
import pytest
import yaml
from forked import FORK, forked
from lightning.pytorch.loggers import Logger
from test_resume import CONFIGS

import lightning_sparse_cl as scl
from lightning_sparse_cl.__main__ import COMMANDS, main, run
from lightning_sparse_cl.callbacks.claims import Claim
from lightning_sparse_cl.checkpoint_file import read_checkpoint
from lightning_sparse_cl.cli.errors import one_line
from lightning_sparse_cl.cli.shipped import configs, find
from lightning_sparse_cl.kernels import KernelsUnavailable, build

ROOT = Path(__file__).parents[1]
SMALL = ["--schedule.epochs=1", "--trainer.limit_train_batches=2", "--model.init_args.backbone.width=2",
         "--data.init_args.batch_size=48", "--trainer.enable_progress_bar=false"]  # fmt: skip


def refused(monkeypatch, *args):
    """The one line that the command ends with."""
    monkeypatch.setattr("sys.argv", ["sparsecl", *args])
    with pytest.raises(SystemExit) as exit:
        run()
    assert isinstance(exit.value.code, str), exit.value.code
    assert exit.value.code.startswith("sparsecl: error: ") and "\n" not in exit.value.code
    return exit.value.code


METHODS = {  # a configuration, and where in it the named values are
    "esacl": ["data.init_args.batch_size", "data.init_args.val_fraction", "schedule.epochs", "model.init_args.sparsity",
              "model.init_args.selection.init_args.warmup", "model.init_args.selection.init_args.sse",
              "model.init_args.update.init_args.rho", "model.init_args.optimizer.init_args.lr"],
    "sparcl": ["model.init_args.removal.init_args.fraction", "model.init_args.removal.init_args.cutoff",
               "model.init_args.gradients.init_args.q"],
    "lwf": ["model.init_args.objective.init_args.temperature"],
    "gpm": ["model.init_args.policies.0.init_args.threshold"],
    "continual_dst": ["model.init_args.growth.init_args.interval"],
}  # fmt: skip


def put(tree, dotted, value):
    *path, last = dotted.split(".")
    for key in path:
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    assert last in tree or last in ("val_fraction", "threshold"), dotted
    tree[last] = value


@pytest.mark.parametrize(("method", "key"), [(m, k) for m, keys in METHODS.items() for k in keys])
@pytest.mark.parametrize("value", [None, float("nan"), "many"], ids=str)
def test_a_value_that_cannot_be_meant_is_refused_by_name(tmp_path, monkeypatch, method, key, value):
    tree = yaml.safe_load((CONFIGS / f"{method}.yaml").read_text())
    put(tree, key, value)
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(tree))
    assert key.rpartition(".")[2] in refused(monkeypatch, "fit", "-c", "wrong.yaml")
    assert not Path("runs").exists() or not any(p.is_file() for p in Path("runs").rglob("*"))


@pytest.mark.slow
def test_wrong_values_in_every_configuration():
    assert fuzz_cli.main(seed=3, count=300) == 0


@pytest.mark.parametrize("section", ["trainer", "schedule", "evaluation", "checkpoint"])
@pytest.mark.parametrize("value", ["null", "3", "[1]"])
def test_a_section_that_is_no_section_is_refused(monkeypatch, tmp_path, section, value):
    tree = yaml.safe_load((CONFIGS / "er.yaml").read_text()) | {section: yaml.safe_load(value)}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(tree))
    assert section in refused(monkeypatch, "fit", "-c", "wrong.yaml")


def test_a_key_that_is_given_twice_is_refused_with_its_lines(monkeypatch, tmp_path):
    (tmp_path / "twice.yaml").write_text(
        "model:\n  class_path: EsaCL\n  init_args:\n    sparsity: 0.5\n    sparsity: 0.9\n"
    )
    assert "twice.yaml: 'sparsity' is given twice, in lines 4 and 5" in refused(
        monkeypatch, "fit", "-c", "split_digits/esacl", "--config=twice.yaml"
    )
    (tmp_path / "twice.yaml").write_text("model: [")
    assert "no YAML" in refused(monkeypatch, "fit", "-c", "twice.yaml")


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("os.replace", errno.ENOSPC), ("pathlib.Path.mkdir", errno.EROFS), ("os.fsync", errno.EDQUOT),
        ("os.makedirs", errno.EACCES),
    ],
)  # fmt: skip
def test_a_disk_that_refuses_is_one_line_and_leaves_nothing_half_written(monkeypatch, tmp_path, where, number):
    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    module, _, name = where.rpartition(".")
    target = Path if module == "pathlib.Path" else os
    with monkeypatch.context() as patch:
        patch.setattr(target, name, refuse)
        told = refused(patch, "fit", "-c", "split_digits/finetune", *SMALL)
    assert os.strerror(number) in told
    assert not [
        p for p in tmp_path.rglob("*") if p.is_file() and (p.suffix in (".part", ".tmp") or not p.stat().st_size)
    ]


def test_a_folder_that_is_a_file_and_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "runs").symlink_to("/nowhere/runs")
    assert "runs" in refused(monkeypatch, "fit", "-c", "split_digits/finetune", *SMALL)
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").write_text("a file")
    assert "runs" in refused(monkeypatch, "fit", "-c", "split_digits/finetune", *SMALL)
    elsewhere = ["--trainer.logger=false", f"--checkpoint.dirpath={tmp_path / 'runs'}"]
    assert "runs" in refused(monkeypatch, "fit", "-c", "split_digits/finetune", *SMALL, *elsewhere)
    monkeypatch.setenv("LIGHTNING_SPARSE_CL_CACHE", str(tmp_path / "runs" / "cache"))
    with pytest.raises(KernelsUnavailable) as fault:
        build.library.__wrapped__()  # not the library that is loaded already
    assert "set LIGHTNING_SPARSE_CL_CACHE to one" in one_line(fault.value)


def test_what_is_too_large_for_the_memory_is_one_line(monkeypatch):
    told = refused(
        monkeypatch, "fit", "-c", "split_digits/er", *SMALL, f"--model.init_args.objective.init_args.memory={10**13}"
    )
    assert "model.init_args.objective.init_args.memory=10000000000000" in told


def test_every_command_takes_the_runs_own_configuration(monkeypatch, capsys):
    fitted = main(["fit", "-c", "split_digits/finetune", *SMALL])
    config = str(Path(fitted.trainer.log_dir, "config.yaml"))
    files = {p: p.read_bytes() for p in Path(fitted.trainer.log_dir).rglob("*") if p.is_file()}
    for door in ("validate", "test", "predict", "export"):
        main([door, "-c", config, "--ckpt_path=last"])
    assert Path("model.pt2").exists()
    again = main(["fit", "-c", config, "--ckpt_path=last"])
    assert again.trainer.ckpt_path == str(Path(fitted.trainer.log_dir, "checkpoints", "last.ckpt"))
    assert main(["fit", "-c", config, "--seed_everything=7"]).trainer.log_dir != fitted.trainer.log_dir
    assert files == {p: p.read_bytes() for p in files}  # the first run's were not touched


def test_figures_of_an_untrained_network_are_said_to_be(monkeypatch):
    said = []
    monkeypatch.setattr("lightning_sparse_cl.cli.lightning_cli.rank_zero_warn", said.append)
    for door in ("validate", "test", "predict"):
        main([door, "-c", "split_digits/finetune", *SMALL])
    assert len(said) == 3 and all("untrained network" in line for line in said)


class RemoteLogger(Logger):
    """As loggers of experiment trackers are: no ``log_dir``, and a name for each run."""

    save_dir, name = "tracked", "project"

    def __init__(self) -> None:
        super().__init__()
        self.version = os.urandom(4).hex()
        self.hyperparameters = {}

    version = ""

    def log_hyperparams(self, params, *_, **__):
        self.hyperparameters = params

    def log_metrics(self, *_, **__):
        pass


class NamelessLogger(RemoteLogger):
    """As RemoteLogger, without a name."""

    name = None


LOGGERS = {
    "CSV": [],
    "TensorBoard": ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=tracked"],
    "remote": ["--trainer.logger=test_cli_edges.RemoteLogger"],
    "nameless": ["--trainer.logger=test_cli_edges.NamelessLogger"],
    "none": ["--trainer.logger=false", "--trainer.default_root_dir=alone"],
    "none, files told": ["--trainer.logger=false", "--trainer.default_root_dir=x", "--checkpoint.dirpath=elsewhere"],
}


@pytest.mark.parametrize("logger", LOGGERS)
def test_every_run_has_a_folder_of_its_own_that_last_finds(logger):
    if logger == "TensorBoard":
        pytest.importorskip("tensorboard", reason="TensorBoard is no dependency")
    options = ["fit", "-c", "split_digits/finetune", *SMALL, *LOGGERS[logger]]
    seeds = {seed: main([*options, f"--seed_everything={seed}"]) for seed in (1, 2)}
    several = "none" not in logger
    for seed, cli in seeds.items():
        found = [p for p in Path().rglob("metrics.json") if json.loads(p.read_text())["seed"] == seed]
        if several:
            (folder,) = (p.parent for p in found)
            assert {"config.yaml", "model.safetensors", "accuracy_matrix.png"} <= {p.name for p in folder.iterdir()}
            assert yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"] == seed
        again = main([*options, f"--seed_everything={seed}", "--ckpt_path=last"])
        assert read_checkpoint(again.trainer.ckpt_path)["task_sequence"]["must"]["seed"] == seed
        if logger == "remote":
            assert cli.trainer.logger.hyperparameters["model"]["class_path"].endswith("ContinualModule")


def test_two_runs_without_a_logger_do_not_share_a_folder_at_once(tmp_path, monkeypatch):
    claim = Claim(tmp_path / "d" / "metrics.json")
    claim.path.parent.mkdir()
    assert claim.take()
    alone = [*SMALL, "--trainer.logger=false", "--trainer.default_root_dir=d"]
    assert "another run is writing its files there" in refused(
        monkeypatch, "fit", "-c", "split_digits/finetune", *alone
    )
    claim.release()
    main(["fit", "-c", "split_digits/finetune", *alone])
    assert Path("d/metrics.json").exists() and not list(Path("d").glob(".*.lock"))


def test_the_top_of_the_help_is_for_users(monkeypatch, capsys):
    for args in ([], ["--help"]):
        monkeypatch.setattr("sys.argv", ["sparsecl", *args])
        with pytest.raises(SystemExit) as exit:
            run()
        shown = capsys.readouterr().out
        assert exit.value.code in (0, None) and "\n  sparsecl fit -c split_digits/esacl " in shown[:700]
        assert all(f"sparsecl {name} " in shown for name in (*COMMANDS, "export", "profile", "predict"))
    monkeypatch.setattr("sys.argv", ["sparsecl", "--version"])
    with pytest.raises(SystemExit):
        run()
    assert scl.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "folder"),
    [
        (["-c", "split_digits/esacl"], "EsaCL-DERpp-SplitDigits"),
        (["-c", "split_digits/packnet", "--schedule.epochs=8"], "PackNet-SplitDigits"),
        (["-c", "split_digits/rigl_derpp"], "DERpp-RigL-SplitDigits"),
        (["-c", "split_digits/er", "--data=PermutedDigits"], "ER-PermutedDigits"),
        (["-c", "split_digits/er", "--trainer.logger.init_args.name=mine"], "mine"),
        (["-c", "split_digits/er", "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=runs"],
         "ER-SplitDigits"),
    ],
)  # fmt: skip
def test_the_folder_of_a_run_is_named_by_method_and_data(args, folder):
    if "--trainer.logger=TensorBoardLogger" in args:
        pytest.importorskip("tensorboard")
    short = ["--trainer.limit_train_batches=1", "--trainer.enable_progress_bar=false"]
    main(["fit", "--schedule.epochs=1", *args, *short])
    (path,) = Path("runs").glob("*/version_*/metrics.json")
    assert path.parts[1] == folder
    name = ", ".join(Path(args[i + 1]).stem for i, word in enumerate(args) if word == "-c")
    assert json.loads(path.read_text())["name"] == name
    main(["fit", "-c", str(path.with_name("config.yaml")), "--ckpt_path=last", *short])
    (again,) = Path("runs").glob("*/version_1/metrics.json")
    assert json.loads(again.read_text())["name"] is None  # config.yaml is no name of a method


def test_a_refused_run_leaves_no_folder(monkeypatch):
    main(["fit", "-c", "split_digits/finetune", *SMALL])
    last = "--ckpt_path=runs/CrossEntropy-SplitDigits/version_0/checkpoints/last.ckpt"
    before = set(Path("runs").rglob("*"))
    for door in ("fit", "test"):
        wider = ["split_digits/finetune", *SMALL, "--model.init_args.backbone.width=8", last]
        assert "another network" in refused(monkeypatch, door, "-c", *wider)
        assert set(Path("runs").rglob("*")) == before


def test_two_runs_that_start_at_once_have_two_folders():
    options = ["fit", "-c", "split_digits/finetune", *SMALL]
    runs = [FORK.Process(target=main, args=([*options, f"--seed_everything={s}"],)) for s in range(4)]
    for run_ in runs:  # from one thread: a copy made while another one imports would wait for its lock for ever
        run_.start()
    for run_ in runs:
        run_.join()
    found = [json.loads(p.read_text())["seed"] for p in Path("runs").rglob("metrics.json")]
    assert sorted(found) == [0, 1, 2, 3] and len(list(Path("runs").rglob("last.ckpt"))) == 4


def test_nothing_is_said_that_the_user_cannot_act_on(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    options = ["--schedule.epochs=1", "--ckpt_path=last"]
    command = [sys.executable, "-m", "lightning_sparse_cl", "fit", "-c", "split_digits/esacl", *options]
    assert forked(main, command[3:]) == 0
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stderr + done.stdout
    for word in ("Warning", "treespec", "litlogger", "dirpath has changed", "weights_only", "Tip", "deprecated"):
        assert word not in said, [line for line in said.splitlines() if word in line]
    assert "all tasks of this run are finished" in said


def test_configurations_are_found_by_name_listed_and_copied(monkeypatch, tmp_path, capsys):
    assert len(configs()) == len(list(CONFIGS.parent.rglob("*.yaml"))) > 90
    assert find("split_digits/esacl") == find("configs/split_digits/esacl.yaml") == str(CONFIGS / "esacl.yaml")
    monkeypatch.setattr("sys.argv", ["sparsecl", "configs"])
    run()
    assert "split_digits/esacl " in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["sparsecl", "configs", "copy", "mine"])
    run()
    assert len(list(Path("mine").rglob("*.yaml"))) == len(configs())
    assert "is there already" in refused(monkeypatch, "configs", "copy", "mine")
    assert "copy DIR" in refused(monkeypatch, "configs", "remove")
    assert "no-such" in refused(monkeypatch, "fit", "-c", "split_digits/no-such")


def test_the_wheel_has_every_package_and_every_configuration(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path / "wheel"), str(ROOT)],
        check=True,
    )
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    package = ROOT / "lightning_sparse_cl"
    wanted = {p.relative_to(ROOT).as_posix() for p in package.rglob("*.py")}
    wanted |= {f"lightning_sparse_cl/configs/{p.relative_to(CONFIGS.parent).as_posix()}" for p in configs().values()}
    assert wanted <= names, sorted(wanted - names)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    script = "from lightning_sparse_cl.cli.shipped import find; print(find('split_digits/esacl'))"
    found = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True).stdout
    assert found.startswith(str(tmp_path / "installed"))
