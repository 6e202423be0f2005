"""Every shipped YAML runs, in process, on small data in the real on-disk format."""

import json
import subprocess
import sys
from pathlib import Path

import fake_data
import pytest
import torch
from toy_trainer import epochs_of, shortened

from lightning_sparse_cl import FlatNetwork
from lightning_sparse_cl.__main__ import main, run

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = sorted(p for p in CONFIGS.glob("split_*/*.yaml"))
OVERLAYS = sorted(p for p in CONFIGS.glob("*/*.yaml") if p not in EXPERIMENTS)

SMALL = {
    "split_japanese_vowels": [],
    "split_digits": ["--data.init_args.batch_size", "48"],
    "split_digits_table": ["--data.init_args.batch_size", "48"],
    "split_cifar10": ["--data.init_args.batch_size", "20"],
    "split_cifar100": ["--data.init_args.batch_size", "16"],
    "split_cifar100_superclasses": ["--data.init_args.batch_size", "8"],
    "split_mini_imagenet": ["--data.init_args.batch_size", "8"],
    "split_tiny_imagenet": ["--data.init_args.batch_size", "16"],
}


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    root = tmp_path / "data"
    root.mkdir()

    def write(kind):
        if kind == "split_cifar10":
            fake_data.write_cifar10(root, monkeypatch, per_class=20)
        if kind.startswith("split_cifar100"):
            fake_data.write_cifar100(root, monkeypatch, per_class=4)
        if kind == "split_mini_imagenet":
            fake_data.write_mini_imagenet(root, per_class=6, size=16)
        if kind == "split_tiny_imagenet":
            fake_data.write_tiny_imagenet(root, per_class=2)

    return write


def small(config):
    few = config.parent.name == "split_cifar100" and not config.stem.endswith("_tasks")  # those are named for them
    few |= config.parent.name == "split_tiny_imagenet" and config.stem == "wsn"  # of 40 tasks
    width = 8 if "nispa" in config.stem else 2  # where there are units left for a second task
    return [
        f"--model.init_args.backbone.init_args.{'hidden=[8,8]' if 'table' in config.parent.name else f'width={width}'}",
        f"--schedule.epochs={epochs_of(config)}",
        "--trainer.accelerator=cpu",
        *SMALL[config.parent.name],
        *(["--data.init_args.num_tasks=4"] if few else []),
        *shortened(config.stem),
    ]


FAST = {
    "split_cifar10": ("esacl", "sparcl"), "split_cifar100": ("co2l", "icarl"), "split_tiny_imagenet": ("er",),
    "split_japanese_vowels": ("esacl", "continual_dst"), "split_digits_table": ("sparcl",),
}  # fmt: skip
"""Beside those of the digits."""


def similar(config):
    """The same method as another, on other data, or of two that are tried each by itself."""
    if config.parent.name == "split_digits":
        return config.stem.endswith(("_co2l", "_ewc"))
    return config.stem not in FAST.get(config.parent.name, ())


@pytest.mark.parametrize(
    "config",
    [pytest.param(e, marks=pytest.mark.slow) if similar(e) else e for e in EXPERIMENTS],
    ids=map(name_of, EXPERIMENTS),
)
def test_every_experiment_fits_and_its_test_gives_the_final_row(config, data_root, tmp_path):
    data_root(config.parent.name)
    cli = main(["fit", "-c", str(config), *small(config)])
    folder = Path(cli.trainer.log_dir)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"class_il", "task_il", "sparsity", "density_per_layer", "seconds", "seed", "versions"} <= metrics.keys()
    assert (folder / "accuracy_matrix.png").exists() and (folder / "metrics.csv").exists()
    last = cli.trainer.checkpoint_callback.last_model_path or folder / "checkpoints" / "last.ckpt"
    tested = main(["test", "-c", str(config), *small(config), "--ckpt_path", str(last)]).trainer.callback_metrics
    for scenario in ("class_il", "task_il"):
        for task, accuracy in enumerate(metrics[scenario]["matrix"][-1]):
            assert float(tested[f"{scenario}/task_{task}"]) == pytest.approx(accuracy, abs=1e-6)
    expected = {"esacl": 0.8, "sparcl": 0.9, "snip_derpp": 0.9, "rigl_derpp": 0.9}
    expected |= {"split_digits": {}, "split_digits_table": {}, "split_japanese_vowels": {"sparcl": 0.8}}.get(
        config.parent.name, {"sparcl": 0.75}
    )
    learnt = {"wsn": 0.5, "supsup": 0.5, "supsup_20_tasks": 0.9}
    method = config.stem.removesuffix("_ewc").removesuffix("_co2l").removesuffix("_efficient")
    if config.stem == "cl_lsg":  # as much as it has grown
        assert metrics["growth"]["grew"] and 0 < metrics["subnetworks"]["used"][-1] <= 1
    elif config.stem == "lps":  # the last task leaves a tenth of the old weights out
        assert metrics["subnetworks"]["used"][-1] == 1
    elif config.stem.startswith("cpg"):
        assert metrics["stages"]["size"] and 0 < metrics["subnetworks"]["used"][-1] <= 1
    elif config.stem.startswith("nispa"):  # what no task uses is zero, too
        assert metrics["units"]["phases"] and 0 < metrics["subnetworks"]["used"][-1] < 1
    elif config.stem.startswith("continual_dst"):  # weights that have just grown are zero too
        assert metrics["sparsity"] >= (0.8 if config.parent.name == "split_japanese_vowels" else 0.9) - 1e-3
    else:
        assert metrics["sparsity"] == pytest.approx((expected | learnt).get(method, 0.0), abs=0.02)
    if config.stem in ("continual_dst", "cl_lsg"):
        assert (folder / "subnetworks.png").exists() and metrics["task_il"]["bwt"] == 0
        predicted = main(["predict", "-c", str(config), *small(config), "--ckpt_path", str(last)])
        assert predicted.trainer.predict_loop.num_dataloaders == len(metrics["task_il"]["baseline"])
    if method in expected:
        assert any(d < 0.5 for d in metrics["density_per_layer"].values())
        assert metrics["size"]["nonzero"] < metrics["size"]["parameters"]


BASES = {"esacl": "esacl", "objectives": "esacl", "sparcl": "sparcl", "policies": "derpp", "cl_lsg": "cl_lsg"}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name_of)
def test_every_overlay_fits_over_its_base(overlay):
    base = CONFIGS / "split_digits" / f"{BASES[overlay.parent.name]}.yaml"
    name = overlay.stem
    inside = ["--schedule.epochs=3"] if name == "efficient" else []  # it prunes in a task's third epoch
    cli = main(["fit", "-c", str(base), "-c", str(overlay), *small(base), "--trainer.limit_train_batches=2", *inside])
    parts = [getattr(c, "fraction", getattr(c, "q", getattr(c, "sparsity", None))) for c in cli.model.policies]
    changed = {
        "without_sa": lambda m: type(m.update).__name__ == "SingleBackward",
        "without_sp": lambda m: isinstance(m.trainer.optimizers[0], torch.optim.SGD),
        "efficient": lambda m: (
            (m.policies[0].epoch, m.policies[1].part) == (2, 0.3)
            and type(m.update).__name__ == "SingleBackward"
            and {m.selection.sse, m.selection.ere, m.selection.replay} == {1.0}
            and m.trainer.optimizers[0].param_groups[0]["k"] == pytest.approx(0.1)
            and (m.trainer.optimizers[0].param_groups[0]["lr"], m.trainer.optimizers[0].param_groups[0]["momentum"])
            == (0.001, 0.9)
        ),
        "without_sse": lambda m: m.selection.sse == 1.0 and m.selection.ere == 0.4,
        "without_ere": lambda m: m.selection.sse == 0.4 and m.selection.ere == 1.0,
        "er": lambda m: type(m.objective).__name__ == "ER",
        "derpp": lambda m: type(m.objective).__name__ == "DERpp" and m.objective.memory.size == 500,
        **{
            c.lower(): lambda m, c=c: type(m.objective).__name__ == c
            for c in ("CO2L", "DER", "EWC", "FDR", "ICaRL", "LwF")
        },
        "agem": lambda m: type(m.policies[-1]).__name__ == "AGEM",
        "accelerate": lambda m: any(type(c).__name__ == "SparseAcceleration" for c in m.trainer.callbacks),
        "joint_forward": lambda m: type(m.objective).__name__ == "DERpp" and m.objective._forward == "joint",
        "derpp_one_draw": lambda m: type(m.objective).__name__ == "DERppOneDraw",
        "tdm": lambda m: parts == [0.9, 0.0, 0.0],
        "tdm_ddr": lambda m: parts == [0.9, 0.3, 0.0],
        "tdm_dgm": lambda m: parts == [0.9, 0.0, 0.02],
        "sparsity_90": lambda m: parts == [0.9, 0.3, 0.02],
        "sparsity_95": lambda m: parts == [0.95, 0.3, 0.01],
        "as_in_the_code": lambda m: (
            (m.objective.single_head, m.objective.replay_in_first_task, m.policies[1].by) == (True, False, "forgetting")
        ),
        "grow": lambda m: not (m.gates.selective or m.gates.attentive or m.gates.retrain),
        "sel_mask": lambda m: m.gates.selective and not m.gates.attentive and not m.gates.retrain,
        "lsg": lambda m: m.gates.selective and m.gates.attentive and not m.gates.retrain,
        **dict.fromkeys(
            ("set", "snfs", "snip", "rigl"), lambda m: type(m.policies[0]).__name__.lower() == overlay.stem
        ),
    }
    assert changed[name](cli.model)
    last = Path(cli.trainer.log_dir, "checkpoints", "last.ckpt")
    main(["test", "-c", str(base), "-c", str(overlay), *small(base), "--ckpt_path", str(last)])


def test_export_writes_what_runs_alone(tmp_path, monkeypatch):
    base, file = CONFIGS / "split_digits" / "derpp.yaml", tmp_path / "model.pt2"
    prune = ["--model.init_args.policies+=OneShotPruning", "--model.init_args.policies.sparsity=0.9"]
    options = ["-c", str(base), *small(base), *prune]
    cli = main(["fit", *options, "--trainer.limit_train_batches=4"])
    main(["export", *options, "--ckpt_path=last", f"--output={file}"])
    script = f"""
import json, sys, torch
x, about = torch.load({str(tmp_path / "x.pt")!r}), {{"metadata.json": ""}}
torch.save(torch.export.load({str(file)!r}, extra_files=about).module()(x), {str(tmp_path / "y.pt")!r})
assert json.loads(about["metadata.json"])["class_names"] == {cli.datamodule.class_names}
assert not {{"lightning", "lightning_sparse_cl", "pytorch_lightning"}} & set(sys.modules)
"""
    stored = cli.datamodule.test_sets[0].inputs[:7]
    images, wanted = (
        stored.permute(0, 2, 3, 1).contiguous(),
        cli.model.eval()(cli.model.prepare_images(stored)).detach(),
    )
    torch.save(images, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), wanted, rtol=1e-4, atol=1e-5)
    main(["export", *options, "--ckpt_path=last", f"--output={tmp_path / 'model.spnet'}"])
    alone = Path(cli.trainer.log_dir, "checkpoints", "last.ckpt")
    monkeypatch.setattr(sys, "argv", ["sparsecl", "export", f"--ckpt_path={alone}", "--output=alone.spnet"])
    run()
    assert Path("alone.spnet").read_bytes() == (tmp_path / "model.spnet").read_bytes()
    monkeypatch.setattr(sys, "argv", ["sparsecl", "export", f"--ckpt_path={alone}", "--output=alone.zip"])
    with pytest.raises(SystemExit, match=r"error: export\(output='alone.zip'\): the ending says what is written"):
        run()
    flat = FlatNetwork.load(tmp_path / "model.spnet")
    torch.testing.assert_close(flat.of_bytes(images), wanted, rtol=1e-4, atol=1e-5)
    assert flat.metadata["class_names"] == cli.datamodule.class_names
    with pytest.raises(ValueError, match=r"export\(output='mine.zip'\): the ending says what is written"):
        main(["export", *options, "--ckpt_path=last", "--output=mine.zip"])
    with pytest.raises(FileNotFoundError, match=r"no intact last\.ckpt of this configuration"):
        main(["export", *options, "--seed_everything=5", "--ckpt_path=last"])
    dst = CONFIGS / "split_digits" / "scratch.yaml"
    cli = main(["fit", "-c", str(dst), *small(dst), "--trainer.limit_train_batches=2"])
    own = Path(cli.trainer.log_dir, "config.yaml")
    for options, names in ((["--task=1"], cli.datamodule.names_of_tasks()[1]), ([], cli.datamodule.class_names)):
        main(["export", "-c", str(own), "--ckpt_path=last", "--output=tasks.spnet", *options])
        assert FlatNetwork.load("tasks.spnet").metadata["class_names"] == names
    with pytest.raises(ValueError, match=r"values in a \.spnet are float32, bfloat16, int8"):
        main(["export", "-c", str(own), "--ckpt_path=last", "--output=narrow.spnet", "--values=float16"])


def test_validate_predict_and_print_config_work(capsys, tmp_path):
    base = CONFIGS / "split_digits" / "finetune.yaml"
    cli = main(["validate", "-c", str(base), *small(base)])
    assert 0 <= float(cli.trainer.callback_metrics["class_il/acc"]) <= 1
    main(["predict", "-c", str(base), *small(base)])
    with pytest.raises(SystemExit) as exit:
        main(["fit", "-c", str(base), "--print_config"])
    assert exit.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out.partition("seed_everything")[2].join(["seed_everything", ""]))
    main(["fit", "-c", str(printed), *small(base), "--trainer.limit_train_batches=1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.init_args.sparsity=1.5"], "sparsity is the zero fraction"),
        (["--model.init_args.update.init_args.rho=-1"], "rho is the radius"),
        (["--data.init_args.num_tasks=3"], "10 classes divide into"),
        (["--data.init_args.batch_size=5000"], "task 0 has 289 training samples"),
        (["--model.init_args.objective.init_args.memory=0"], "at least one exemplar"),
        (["--model=NoSuchMethod"], "model: no class is called NoSuchMethod"),
        (["--model.init_args.sparcity=0.5"], "model: Option 'sparcity' is not accepted"),
        (["--schedule.epochs=many"], "schedule.epochs: Expected a <class 'int'>. Got value: many"),
        (["-c", "missing.yaml"], "missing.yaml"),
        (["--data=SplitCIFAR10", "--data.root=nowhere"], "download"),
        (["--model.init_args.optimizer=SGD", "--model.init_args.optimizer.lr=-1"], "Invalid learning rate: -1.0"),
        (["--trainer.strategy=nonsense"], "invalid strategy name"),
        (["--model.init_args.backbone.init_args.width=0"], "at least one channel"),
    ],
)
def test_bad_input_is_one_clear_line_and_a_status(options, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sparsecl", "fit", "-c", str(CONFIGS / "split_digits" / "esacl.yaml"), *options])
    with pytest.raises(SystemExit) as exit:
        run()
    assert message in exit.value.code and exit.value.code.startswith("sparsecl: error: ")
    assert "\n" not in exit.value.code


def test_compile_compiles_the_backbone(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    base = CONFIGS / "split_digits" / "finetune.yaml"
    main(["fit", "-c", str(base), *small(base), "--trainer.limit_train_batches=1", "--compile=true"])
    assert compiled == ["SmallCNN"]


@pytest.mark.parametrize(
    "given",
    [
        ["--trainer.callbacks=EMAWeightAveraging"],
        ["--trainer.callbacks=[{class_path: EMAWeightAveraging}, {class_path: RichProgressBar}]"],
        ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks+=SparseAcceleration"],
    ],
)
def test_a_callback_on_the_command_line_is_added_to_the_others(given):
    base = CONFIGS / "split_digits" / "finetune.yaml"
    cli = main(["fit", "-c", str(base), *small(base), "--trainer.limit_train_batches=1", *given])
    kinds = {type(c).__name__ for c in cli.trainer.callbacks}
    assert {"EMAWeightAveraging", "TaskSchedule", "RunReport", "FlopsCounter", "SequenceCheckpoint"} <= kinds


def test_a_fault_that_is_not_the_users_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("lightning_sparse_cl.__main__.main", lambda: {}["a bug"])
    with pytest.raises(KeyError):
        run()


def test_torchvisions_transforms_in_a_configuration(tmp_path):
    """``torch.float32`` is nothing that YAML knows."""
    path = tmp_path / "own.yaml"
    path.write_text(
        "seed_everything: 0\n"
        "model: {class_path: ContinualModule, init_args: {backbone: {class_path: SmallCNN, init_args: {width: 2}}}}\n"
        "data:\n"
        "  class_path: SplitDigits\n"
        "  init_args:\n"
        "    batch_size: 64\n"
        "    transform: {class_path: torchvision.transforms.v2.ToDtype, "
        "init_args: {dtype: torch.float32, scale: true}}\n"
        "    augment: {class_path: torchvision.transforms.v2.RandomHorizontalFlip}\n"
        "schedule: {epochs: 1}\n"
    )
    options = ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", f"--checkpoint.dirpath={tmp_path}"]
    cli = main(["fit", "-c", str(path), *options])
    data = cli.datamodule
    images = data.train_sets[0].inputs
    torch.testing.assert_close(data.prepare(images, augment=False), images / 255)
    resumed = main(["fit", "-c", str(path), *options, "--ckpt_path=last"])
    assert resumed.trainer.global_step == cli.trainer.global_step > 0
