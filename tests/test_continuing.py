"""Learning that goes on: a sequence that has ended learns further tasks and classes, exactly."""

import json
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from forked import forked
from test_resume import assert_identical, command, final_state, kill_and_resume, strike

import lightning_sparse_cl as scl
from lightning_sparse_cl.__main__ import main

CONFIGS = sorted(p.stem for p in (Path(__file__).parents[1] / "configs" / "split_digits").glob("*.yaml"))
ISOLATING = ["continual_dst", "cl_lsg", "scratch", "finetune_copies", "wsn", "supsup", "piggyback", "nispa", "cpg"]
FIRST, LATER, ALL = "[[0,1],[2,3],[4,5]]", "[[6,7],[8,9]]", "[[0,1],[2,3],[4,5],[6,7],[8,9]]"


def slow(config):
    return pytest.param(config, marks=pytest.mark.slow)


def tasks(listed, *more):
    return ["--data.init_args.num_tasks=null", f"--data.init_args.tasks={listed}", *more]


def continued(folder):
    return f"--continue_from={folder / 'last.ckpt'}"


AS_ANOTHER = {"der", "er", "finetune", "finetune_copies", "lps", "piggyback", "rigl_derpp", "snip_derpp", "supsup"}
"""What goes on in them goes on in others, too."""


@pytest.mark.parametrize("config", [slow(c) if c in AS_ANOTHER else c for c in CONFIGS])
def test_every_configuration_goes_on_from_three_tasks_to_five(tmp_path, config):
    first, later = tmp_path / "first", tmp_path / "later"
    main(command(first, config, *tasks(FIRST)))
    before = torch.load(first / "last.ckpt")
    refused = {"joint": "joint training learns all tasks at once", "packnet": "free weights ended with task 2"}
    refused["lps"] = refused["packnet"]
    if config in refused:  # the last task keeps all that is free
        with pytest.raises(ValueError, match=refused[config]):
            main(command(later, config, *tasks(LATER), continued(first)))
        return
    cli = main(command(later, config, *tasks(LATER), continued(first)))
    after, data = torch.load(later / "last.ckpt"), cli.datamodule
    assert cli.model.head.out_features == data.num_classes == 10
    assert data.names_of_tasks() == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"], ["8", "9"]]
    assert cli.trainer.current_epoch == 10 and data.starts[:4] == before["SplitDigits"]["starts"]
    assert [len(a) for a in data.alive[:3]] == [len(a) for a in before["SplitDigits"]["alive"]]
    assert after["callbacks"]["FlopsCounter"]["served"] > before["callbacks"]["FlopsCounter"]["served"]
    metrics = json.loads((later / "metrics.json").read_text())
    for scenario in ("class_il", "task_il"):
        R = metrics[scenario]["matrix"]
        assert R[2][:3] == json.loads((first / "metrics.json").read_text())[scenario]["matrix"][2]
        assert R[2][3:] == [None, None] and None not in R[4], "old digits are in no task, and are measured"
        assert metrics[scenario]["acc"] is not None
    if config in ISOLATING:
        assert_identical(after["subnetworks"]["tasks"][:3], before["subnetworks"]["tasks"], "subnetworks")


@pytest.mark.parametrize("config", [slow(c) if c in AS_ANOTHER else c for c in ISOLATING])
def test_isolated_tasks_end_with_the_bits_of_all_at_once(tmp_path, config):
    main(command(tmp_path / "all", config, *tasks(ALL)))
    main(command(tmp_path / "first", config, *tasks(FIRST)))
    main(command(tmp_path / "later", config, *tasks(LATER), continued(tmp_path / "first")))
    whole, parts = (torch.load(tmp_path / name / "last.ckpt") for name in ("all", "later"))
    for entry in ("state_dict", "masks", "subnetworks"):
        assert_identical(whole[entry], parts[entry], entry)


@pytest.mark.parametrize("config", ["esacl", "gpm", *map(slow, ("agem", "derpp", "ewc", "icarl", "sparcl"))])
def test_stopped_at_a_tasks_end_and_continued_as_planned_is_the_undisturbed_run(tmp_path, config):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(command(whole, config))
    main(command(tmp_path / "first", config, "--trainer.callbacks+=test_continuing.StopAfter"))
    main(command(parts, config, f"--continue_from={tmp_path / 'first' / 'between.ckpt'}"))
    a, b = final_state(whole), final_state(parts)
    for state in (a, b):
        state["SplitDigits"].pop("learnt_before")
    assert_identical(a, b, config)


class StopAfter(pl.Callback):
    """Keeps a checkpoint of the end of the third task."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.datamodule.starts[3:] == [trainer.current_epoch + 1]:
            trainer.save_checkpoint(Path(trainer.default_root_dir, "between.ckpt"))


@pytest.mark.parametrize("config", ["wsn", *map(slow, ("continual_dst", "derpp", "ewc", "lamaml"))])
def test_killed_in_the_continued_part_and_resumed(tmp_path, config):
    """Inside a further task, and where the sequence goes on, with the same command."""
    main(command(tmp_path / "first", config, *tasks(FIRST)))
    further = tasks(LATER, continued(tmp_path / "first"))
    main(command(tmp_path / "whole", config, *further))
    for hook, at in (("on_train_batch_end", 5), ("on_task_end", 1), ("on_task_start", 2)):
        kill_and_resume(tmp_path / "whole", tmp_path / f"{hook}", config, hook, at, *further)


@pytest.mark.slow
def test_two_processes_go_on_and_resume_as_one_run(tmp_path):
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=24"]
    assert forked(main, command(tmp_path / "first", "derpp", *tasks(FIRST), *two), processes=2) == 0
    further = tasks(LATER, continued(tmp_path / "first"), *two)
    assert forked(main, command(tmp_path / "whole", "derpp", *further), processes=2) == 0
    strikes = strike("on_train_batch_end", 7)
    assert forked(main, command(tmp_path / "killed", "derpp", *further, *strikes), processes=2) != 0
    assert forked(main, command(tmp_path / "killed", "derpp", *further, "--ckpt_path=last"), processes=2) == 0
    assert_identical(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))


def test_a_sequence_stopped_inside_a_task_goes_on_with_it_and_then_further(tmp_path):
    first, all_ = tmp_path / "first", tmp_path / "all"
    assert forked(main, command(first, "derpp", *tasks(FIRST), *strike("on_train_batch_end", 17))) != 0
    main(command(all_, "derpp", *tasks(ALL), continued(first)))
    end = torch.load(all_ / "last.ckpt")
    assert end["SplitDigits"]["starts"] == [0, 2, 4, 6, 8, 10] and end["state_dict"]["head.weight"].shape[0] == 10
    with pytest.raises(ValueError, match="stopped inside task 1, whose data are not among these"):
        main(command(tmp_path / "gone", "derpp", *tasks(LATER), continued(first)))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model.init_args.backbone.width=5"], "the checkpoint is from another network: backbone.0.weight"),
        (["--model=SparCL", "--model.backbone=SmallCNN"], "this checkpoint is from a ContinualModule"),
        (["--data=test_continuing.Larger"], "samples are uint8 (1, 16, 16), those learnt before uint8 (1, 8, 8)"),
        (["--data.init_args.joint=true"], "joint training learns all tasks at once"),
        (["--schedule.epochs=[1,2,3]"], "3 entries for 5 tasks, 2 of them new"),
        (
            ["--model.init_args.objective.init_args.memory=40"],
            "memory.samples is (200, 1, 8, 8) in it and (40, 1, 8, 8)",
        ),
        (["--data=test_continuing.Named"], "its classes are 'zero', 'one'"),
    ],
)
def test_what_cannot_go_on_is_refused_in_one_line(tmp_path, options, message, first):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        main(command(tmp_path / "later", "derpp", *tasks(LATER), f"--continue_from={first}", *options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "later" / "metrics.json").exists()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    main(command(folder, "derpp", *tasks(FIRST)))
    return folder / "last.ckpt"


class Larger(scl.SplitDigits):
    """Digits of twice the size."""

    def load(self):
        return [[scl.SampleTensors(d.inputs.repeat(1, 1, 2, 2), d.labels) for d in sets] for sets in super().load()]


class LateSource(scl.DigitsSource):
    """Digits from 6 on: the others are gone."""

    num_classes = 4

    def read(self, train):
        images, labels = scl.DigitsSource().read(train)
        return images[labels > 5], labels[labels > 5] - 6

    def names(self):
        return ["6", "7", "8", "9"]


class LateDigits(scl.ClassSplit):
    def __init__(self, **kwargs):
        super().__init__(LateSource(), **kwargs)


class Named(scl.SplitDigits):
    """Digits by other names."""

    def names(self):
        return ["zero", "one", "two", "three"]


@pytest.mark.parametrize(
    "listed, tested",
    [
        (tasks(LATER, "--data=test_continuing.LateDigits"), [3, 4]),
        (tasks("[[8,9],[0,1]]"), [0, 1, 2, 3, 4]),
        (tasks(ALL), [0, 1, 2, 3, 4]),
    ],
)
def test_a_continued_run_is_tested_on_the_tasks_whose_data_are_there(tmp_path, first, listed, tested):
    later = tmp_path / "later"
    late = listed if "--data=test_continuing.LateDigits" in listed else tasks(ALL)
    whole = main(command(later, "derpp", *late, f"--continue_from={first}"))
    expected = next(c for c in whole.trainer.callbacks if isinstance(c, scl.ContinualEvaluation)).matrices
    options = [o for o in command(later, "derpp", *listed) if "every_n" not in o][1:]
    cli = main(["test", *options, f"--ckpt_path={later / 'last.ckpt'}"])
    evaluation = next(c for c in cli.trainer.callbacks if isinstance(c, scl.ContinualEvaluation))
    for scenario in ("class_il", "task_il"):
        found = cli.trainer.callback_metrics
        row = [found[f"{scenario}/task_{t}"].item() for t in range(5)]
        wanted = expected[scenario].R[4]
        assert [t for t in range(5) if row[t] == row[t]] == tested
        assert all(row[t] == pytest.approx(wanted[t].item()) for t in tested)
        assert found[f"{scenario}/acc"].item() == pytest.approx(wanted[tested].mean().item())
    assert evaluation.tested


def test_the_screen_says_what_was_not_measured(tmp_path, first, capsys):
    late = tasks(LATER, "--data=test_continuing.LateDigits")
    cli = main(command(tmp_path / "later", "derpp", *late, f"--continue_from={first}"))
    R = next(c for c in cli.trainer.callbacks if isinstance(c, scl.ContinualEvaluation)).matrices["class_il"].R
    assert R[3:].isnan().tolist() == [[True] * 3 + [False] * 2] * 2
    assert "-: not measured; the task's test data are not there" in " ".join(capsys.readouterr().out.split())
    main(command(tmp_path / "all", "derpp"))
    assert "not measured" not in capsys.readouterr().out
