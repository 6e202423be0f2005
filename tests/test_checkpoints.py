"""Whether a checkpoint is taken: what is damaged, of another run or not there is never trained on or tested."""

import copy
import random
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from forked import forked
from test_resume import BATCH_SIZE, CONFIGS, assert_identical, command, final_state, strike
from torch.optim import SGD
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.__main__ import main, run
from lightning_sparse_cl.checkpoint_file import read_checkpoint
from lightning_sparse_cl.demos import toy_tasks

SHORT = "--trainer.limit_train_batches=4"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run, with its ``last.ckpt``."""
    folder = tmp_path_factory.mktemp("finished")
    main(command(folder, "finetune", SHORT, "--schedule.epochs=1"))
    return folder


@pytest.fixture
def said(monkeypatch):
    """What is told on the way."""
    lines = []
    for module in ("cli.lightning_cli", "cli.last", "callbacks.schedule", "callbacks.identity"):
        for name in ("rank_zero_info", "rank_zero_warn"):
            monkeypatch.setattr(f"lightning_sparse_cl.{module}.{name}", lines.append, raising=False)
    return lines


def altered(whole, seed):
    """Damaged copies of a file's bytes: 100 with a bit flipped, 50 cut, and an empty one."""
    drawn = random.Random(seed)
    for _ in range(100):
        at, bit = drawn.randrange(len(whole)), 1 << drawn.randrange(8)
        yield whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]
    for _ in range(50):
        yield whole[: drawn.randrange(1, len(whole))]
    yield b""


def test_every_flipped_bit_and_every_cut_is_refused(tmp_path, finished):
    whole, path = (finished / "last.ckpt").read_bytes(), tmp_path / "last.ckpt"
    for damaged in altered(whole, 0):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^checkpoint .*: this file "):
            read_checkpoint(path)
    path.write_bytes(whole)
    assert read_checkpoint(path)["global_step"] == 20


def test_a_module_is_not_made_of_a_damaged_checkpoint(tmp_path, finished):
    path = shutil.copy(finished / "last.ckpt", tmp_path)
    module = scl.ContinualModule.load_from_checkpoint(path, backbone=scl.SmallCNN(4))
    assert module.head.out_features == 10
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:-200] + bytes([whole[-200] ^ 4]) + whole[-199:])
    with pytest.raises(ValueError, match="this file is altered"):
        scl.ContinualModule.load_from_checkpoint(path, backbone=scl.SmallCNN(4))


@pytest.mark.slow
def test_every_flipped_bit_and_every_cut_is_refused_by_last(tmp_path, finished):
    whole, path = (finished / "last.ckpt").read_bytes(), tmp_path / "last.ckpt"
    options = command(tmp_path, "finetune", SHORT, "--schedule.epochs=1", "--ckpt_path=last")
    refused = 0
    for damaged in altered(whole, 1):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^checkpoint .*: this file "):
            main(options)
        refused += 1
    print(f"{refused} of {refused} damaged checkpoints refused by --ckpt_path last")


@pytest.mark.parametrize("door", ["fit", "validate", "test", "predict", "export"])
@pytest.mark.parametrize("way", ["last", "last in a run's folder", "path"])
def test_no_door_takes_a_damaged_checkpoint(tmp_path, finished, monkeypatch, door, way):
    whole = (finished / "last.ckpt").read_bytes()
    where = ["--trainer.logger=false", f"--checkpoint.dirpath={tmp_path}"]
    path = tmp_path / "last.ckpt"
    if way == "last in a run's folder":
        where, path = [], tmp_path / "runs" / "CrossEntropy-SplitDigits" / "version_3" / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
    at = len(whole) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    options = ["-c", str(CONFIGS / "finetune.yaml"), "--model.init_args.backbone.width=4", "--schedule.epochs=1",
               f"--data.init_args.batch_size={BATCH_SIZE}", "--trainer.enable_progress_bar=false", SHORT,
               *where]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["sparsecl", door, *options, f"--ckpt_path={path if way == 'path' else 'last'}"])
    with pytest.raises(SystemExit) as exit:
        run()
    assert "this file is altered" in exit.value.code and "\n" not in exit.value.code
    assert not (tmp_path / "model.pt2").exists() and not (tmp_path / "metrics.json").exists()


def test_a_damaged_neighbour_is_skipped_and_said(tmp_path, said):
    """Of another configuration, or with an intact one of this beside it."""

    def fit(seed, *more):
        options = command(tmp_path / "x", "finetune", SHORT, "--schedule.epochs=1", f"--seed_everything={seed}", *more)
        return main([o for o in options if "dirpath" not in o and "logger" not in o])

    first, other, newer = (Path(fit(seed).trainer.log_dir) for seed in (0, 7, 0))
    for folder in (other, newer):
        (folder / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    (other / "config.yaml").write_text("- [")
    said.clear()
    assert Path(fit(0, "--ckpt_path=last").trainer.ckpt_path).parents[1].name == first.name
    assert sum("skipped checkpoint" in line for line in said) == 2
    shutil.rmtree(first)
    shutil.rmtree(Path("runs/CrossEntropy-SplitDigits/version_3"))
    with pytest.raises(ValueError, match="this file is truncated"):
        fit(0, "--ckpt_path=last")  # one of the two may be this run's


def test_last_starts_anew_where_nothing_is_saved(tmp_path, said):
    options = command(tmp_path, "finetune", SHORT, "--schedule.epochs=1", "--ckpt_path=last")
    assert main(options).trainer.ckpt_path is None and any("starts anew" in line for line in said)
    assert main(options).trainer.ckpt_path == str(tmp_path / "last.ckpt")
    for door in ("test", "export"):
        with pytest.raises(FileNotFoundError, match=r"no intact last\.ckpt"):
            main([door, *(o for o in options[1:] if not o.startswith("--seed")), "--seed_everything=5"])


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        ("--seed_everything=7", "seed_everything = 7 (0 in the checkpoint)"),
        ("--model.init_args.optimizer.lr=0.5", "optimizer.init_args.lr = 0.5"),
        ("--trainer.limit_train_batches=3", "trainer.limit_train_batches = 3 (4 in the checkpoint)"),
        ("--schedule.epochs=2", "schedule.epochs = 2 (1 in the checkpoint)"),
        ("--data.init_args.val_fraction=0.2", "data.init_args.val_fraction = 0.2"),
    ],
)
def test_last_takes_no_run_of_another_configuration_and_names_what_differs(tmp_path, finished, said, more, differs):
    shutil.copy(finished / "last.ckpt", tmp_path)
    cli = main(command(tmp_path, "finetune", SHORT, "--schedule.epochs=1", "--ckpt_path=last", more))
    assert cli.trainer.ckpt_path is None and any(differs in line for line in said), said
    assert (tmp_path / "last-v1.ckpt").exists()  # the other run's is untouched
    assert (tmp_path / "last.ckpt").read_bytes() == (finished / "last.ckpt").read_bytes()


def test_last_is_the_newest_run_of_the_same_configuration():
    def fit(config, *more):
        return main(
            ["fit", "-c", str(CONFIGS / f"{config}.yaml"), "--schedule.epochs=1", "--trainer.limit_train_batches=2",
             "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *more]
        )  # fmt: skip

    first = fit("er")
    time.sleep(0.01)
    fit("finetune")
    again = fit("er", "--ckpt_path=last")
    assert Path(again.trainer.ckpt_path).parents[1].name == Path(first.trainer.log_dir).name
    with pytest.raises(ValueError, match="batch_size over all processes"):  # found: it may be of two processes
        fit("er", "--ckpt_path=last", "--data.init_args.batch_size=8")


def test_more_epochs_for_tasks_to_come_are_those_of_a_run_that_had_them_from_the_start(tmp_path, said):
    longer = "--schedule.epochs=[1, 1, 2, 1, 2]"
    main(command(tmp_path / "whole", "derpp", longer))
    killed = tmp_path / "killed"
    assert forked(main, command(killed, "derpp", "--schedule.epochs=1", *strike("on_train_batch_start", 10))) == -9
    assert main(command(killed, "derpp", longer, "--ckpt_path=last")).trainer.ckpt_path
    assert any("epochs = [1, 1, 2, 1, 2] ([1, 1, 1, 1, 1] in the checkpoint)" in line for line in said)
    assert_identical(final_state(tmp_path / "whole"), final_state(killed))


def test_with_a_path_settings_may_be_changed_on_purpose(tmp_path, said):
    changed, killed = ["--model.init_args.sparsity=0.5", "--model.init_args.optimizer.lr=0.004"], tmp_path / "killed"
    assert forked(main, command(killed, "esacl", SHORT, "--schedule.epochs=1", *strike("on_task_start", 3))) == -9
    cli = main(command(killed, "esacl", SHORT, "--schedule.epochs=1", *changed, f"--ckpt_path={killed / 'last.ckpt'}"))
    (note,) = (line for line in said if "other settings" in line)
    assert "OneShotPruning.sparsity = 0.5 (0.8 in the checkpoint)" in note
    assert "optimizer.lr = 0.004 (0.01 in the checkpoint)" in note
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.004


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        ("finetune", ["--model.init_args.backbone.width=5"], r"from another network: backbone\.0\.weight is"),
        ("er", [], r"another network: objective\.memory"),
        ("finetune", ["--data.init_args.class_order=3"], "another run: .*samples of each task"),
        ("finetune", ["--data.init_args.batch_size=32"], rf"batch_size over all processes = 32 \({BATCH_SIZE} in"),
        ("finetune", ["--data.init_args.val_fraction=0.3"], r"val_fraction = 0.3 \(0.0 in the checkpoint\)"),
        ("finetune", ["--data=PermutedDigits"], r"data = 'PermutedDigits' \('SplitDigits' in the checkpoint\)"),
        ("finetune", ["--seed_everything=7"], r"seed = 7 \(0 in the checkpoint\)"),
        ("finetune", ["--trainer.limit_train_batches=3"], r"limit_train_batches = 3 \(4 in the checkpoint\)"),
        ("finetune", ["--schedule.epochs=3"], "task 0 of the checkpoint is over, and was to have 2 epochs, not 3"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, config, more, message):
    short = "--trainer.limit_train_batches=4"
    main(command(tmp_path, "finetune", short))
    with pytest.raises(ValueError, match=message):
        main(command(tmp_path, config, short, f"--ckpt_path={tmp_path / 'last.ckpt'}", *more))


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path):
    short = "--trainer.limit_train_batches=4"
    main(command(tmp_path, "esacl", short, "--schedule.epochs=2"))
    sgd = ["--model.init_args.optimizer=SGD", "--model.init_args.optimizer.lr=0.1"]
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "tau" in checkpoint["optimizer_states"][0]["param_groups"][0]
    with pytest.raises(ValueError, match=r"another optimiser: SGD has .*weight_decay"):
        main(command(tmp_path, "esacl", short, f"--ckpt_path={tmp_path / 'last.ckpt'}", *sgd))


def test_checkpoints_that_are_none_are_refused_by_name(tmp_path, finished, monkeypatch):
    checkpoint = torch.load(finished / "last.ckpt", weights_only=True)
    torch.save(checkpoint, tmp_path / "saved_again.ckpt")
    del checkpoint["sealed"]
    old = checkpoint["task_sequence"] | {"format": 0}
    torch.save(checkpoint | {"task_sequence": old}, tmp_path / "old.ckpt")
    weights = {k: checkpoint[k] for k in ("state_dict", "epoch", "global_step", "pytorch-lightning_version")}
    torch.save(weights, tmp_path / "weights.ckpt")
    torch.save(checkpoint | {"task_sequence": None}, tmp_path / "foreign.ckpt")
    torch.save(checkpoint | {"loops": {"fit_loop": {}}}, tmp_path / "edited.ckpt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "folder.ckpt").mkdir()
    for name, message in (
        ("saved_again", "it has lost the seal"), ("old", "format = 0"), ("none", "is not there"),
        ("weights", "it has no callbacks and no loops and no optimizer_states"), ("foreign", "not of a task sequence"),
        ("edited", "does not fit what is run: KeyError"), ("other", "no checkpoint of Lightning"),
        ("list", "no checkpoint of Lightning"), ("text", "no checkpoint"), ("folder", "is a folder"),
    ):  # fmt: skip
        options = command(tmp_path, "finetune", SHORT, "--schedule.epochs=1", f"--ckpt_path={tmp_path / name}.ckpt")
        monkeypatch.setattr("sys.argv", ["sparsecl", *options])
        with pytest.raises(SystemExit) as exit:
            run()
        assert message in exit.value.code and "\n" not in exit.value.code, exit.value.code


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--data.init_args.class_order=3", "classes of each task"),
        ("--data=PermutedDigits", "data = 'PermutedDigits' ('SplitDigits' in the checkpoint)"),
        ("--model=EsaCL", "EsaCL"),
    ],
)
@pytest.mark.parametrize("door", ["test", "validate", "predict", "export"])
def test_nothing_is_tested_on_classes_that_it_was_not_trained_on(tmp_path, finished, monkeypatch, door, more, message):
    options = command(tmp_path, "finetune", SHORT, f"--ckpt_path={finished / 'last.ckpt'}", more)[1:]
    monkeypatch.setattr("sys.argv", ["sparsecl", door, *options])
    if door == "export" and "data" in more:
        return  # needs no data
    with pytest.raises(SystemExit) as exit:
        run()
    assert message in exit.value.code and "\n" not in exit.value.code


def test_runs_that_share_a_folder_keep_their_files(tmp_path):
    """Two at once, of two seeds; each goes on from its own checkpoint."""
    options = [
        [*command(tmp_path, "finetune", f"--seed_everything={seed}", "--schedule.epochs=1"),
         f"--trainer.default_root_dir={tmp_path / str(seed)}"]
        for seed in (0, 1)
    ]  # fmt: skip
    both = [threading.Thread(target=forked, args=(main, o)) for o in options]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    found = {p.name: read_checkpoint(p) for p in tmp_path.glob("last*.ckpt")}
    assert found.keys() == {"last.ckpt", "last-v1.ckpt"} and len({c["run"] for c in found.values()}) == 2
    assert {c["task_sequence"]["must"]["seed"] for c in found.values()} == {0, 1}
    for name, checkpoint in found.items():
        seed = checkpoint["task_sequence"]["must"]["seed"]
        assert main([*options[seed], "--ckpt_path=last"]).trainer.ckpt_path == str(tmp_path / name)
    assert {p.name for p in tmp_path.glob("last*.ckpt")} == found.keys() and not list(tmp_path.glob(".*lock"))
    assert not list(tmp_path.glob("*.part"))


def script(folder, lr=0.1, data=None, **options):
    """A fit as in a script of the user's own."""
    pl.seed_everything(0, verbose=False)
    saving = scl.SequenceCheckpoint(dirpath=folder, save_last=True, **options)
    fit = trainer(scl.RandomState(), saving, enable_checkpointing=True)
    fit.fit(
        scl.ContinualModule(scl.SmallMLP([8]), optimizer=partial(SGD, lr=lr)), data or toy_tasks(), ckpt_path="last"
    )
    return fit


def test_last_in_a_script_is_not_another_run(tmp_path):
    script(tmp_path)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match=r"'last' has found .*optimizer.lr = 0.01 \(0.1 in the checkpoint\)"):
        script(tmp_path, lr=0.01)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    script(tmp_path)  # it is finished


@pytest.mark.parametrize("change", ["two labels swapped", "the last image zeroed", "a pixel of a test image", None])
def test_data_that_have_changed_are_named(tmp_path, change):
    images, labels = torch.arange(64 * 16).view(64, 1, 4, 4).remainder(251).byte(), torch.arange(64) % 4
    test = images[:16].clone(), labels[:16].clone()

    def data():
        return scl.SplitTensors((images.clone(), labels.clone()), test, num_tasks=2, batch_size=8)

    script(tmp_path, data=data())
    if change == "two labels swapped":
        labels[[0, 1]] = labels[[1, 0]]
    elif change == "the last image zeroed":
        images[-1] = 0
    elif change:
        test[0][3, 0, 1, 2] += 1
    if change is None:
        script(tmp_path, data=data())
    else:
        with pytest.raises(ValueError, match="fingerprint of each task's data"):
            script(tmp_path, data=data())


@pytest.mark.parametrize("options", [{}, {"monitor": "train/loss", "save_top_k": 1}], ids=["latest", "best"])
def test_a_second_fit_and_a_copy_leave_the_files_of_the_first(tmp_path, options):
    saving = scl.SequenceCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=10, **options)
    fit = trainer(saving, enable_checkpointing=True)
    fit.fit(scl.ContinualModule(scl.SmallMLP([8])), toy_tasks())
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert any(name.startswith("epoch") for name in first) and copy.deepcopy(saving).dirpath == str(tmp_path)
    fit.fit(scl.ContinualModule(scl.SmallMLP([8])), toy_tasks())
    assert first.items() <= {p.name: p.read_bytes() for p in tmp_path.iterdir()}.items()
    assert (tmp_path / "last-v1.ckpt").exists()
