"""Learning that goes on: a sequence that has ended learns further tasks and classes, exactly."""

import json
from pathlib import Path

import pytest
import torch
from test_resume import assert_identical, command, final_state, kill_and_resume

from lightning_sparse_cl.__main__ import main, run

CONFIGS = sorted(p.stem for p in (Path(__file__).parents[1] / "configs" / "split_digits").glob("*.yaml"))
ISOLATING = ["continual_dst", "cl_lsg", "scratch", "finetune_copies"]
FIRST, LATER, ALL = "[[0,1],[2,3],[4,5]]", "[[6,7],[8,9]]", "[[0,1],[2,3],[4,5],[6,7],[8,9]]"


def tasks(listed, *more):
    return ["--data.init_args.num_tasks=null", f"--data.init_args.tasks={listed}", *more]


def continued(folder):
    return f"--continue_from={folder / 'last.ckpt'}"


@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_goes_on_from_three_tasks_to_five(tmp_path, config):
    first, later = tmp_path / "first", tmp_path / "later"
    main(command(first, config, *tasks(FIRST)))
    before = torch.load(first / "last.ckpt")
    if config == "joint":
        with pytest.raises(ValueError, match="joint training learns all tasks at once"):
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
        assert R[2][3:] == [None, None] and R[4][:3] == [None] * 3 and None not in R[4][3:]
        assert metrics[scenario]["acc"] is not None
    if config in ISOLATING:
        assert_identical(after["subnetworks"]["tasks"][:3], before["subnetworks"]["tasks"], "subnetworks")


@pytest.mark.parametrize("config", ISOLATING)
def test_isolated_tasks_end_with_the_bits_of_all_at_once(tmp_path, config):
    main(command(tmp_path / "all", config, *tasks(ALL)))
    main(command(tmp_path / "first", config, *tasks(FIRST)))
    main(command(tmp_path / "later", config, *tasks(LATER), continued(tmp_path / "first")))
    whole, parts = (torch.load(tmp_path / name / "last.ckpt") for name in ("all", "later"))
    for entry in ("state_dict", "masks", "subnetworks"):
        assert_identical(whole[entry], parts[entry], entry)
