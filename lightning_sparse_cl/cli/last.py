"""What ``--ckpt_path last`` means: the newest intact checkpoint of this very configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_sparse_cl.callbacks.identity import FORMAT, differences, epochs_complete, refuse_epochs, told
from lightning_sparse_cl.checkpoint_file import read_checkpoint

CONFIG = "config"
"""Entry of a checkpoint: the configuration of its run, as :func:`plain` gives it."""
PARTS = ("seed_everything", "continue_from", "model", "data", "schedule", "trainer")
"""Of a configuration, what a run is."""
ELSEWHERE = ("data.init_args.root", "data.init_args.download", "data.init_args.num_workers")
"""Where data lie and how they are read: their contents are compared when a checkpoint is loaded."""
PROCESSES = "data.init_args.batch_size"
"""Of each process, whose number may have changed: the product is compared when a checkpoint is loaded."""
OF_TRAINER = (
    "limit_train_batches", "overfit_batches", "precision", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm",
)  # fmt: skip
"""What of the Trainer changes the training."""


class _Plain(yaml.SafeDumper):
    """Writes what YAML does not know, such as ``torch.float32``, as text."""


_Plain.add_representer(None, lambda dumper, value: dumper.represent_str(str(value)))


class _Run(NamedTuple):
    """A checkpoint that was found."""

    path: Path
    differs: dict[str, tuple[Any, Any]]
    epochs: bool
    """Whether the planned epochs are the same."""


def plain(config: Namespace) -> dict[str, Any]:
    """What a run is, out of its configuration, as a tree of primitives."""
    parts = Namespace(**{key: config.get(key) for key in PARTS}).as_dict()
    found = yaml.safe_load(yaml.dump(parts, Dumper=_Plain))
    return found | {"trainer": {key: (found["trainer"] or {}).get(key) for key in OF_TRAINER}}


def newest_run(folders: list[Path], config: Mapping[str, Any], training: bool) -> Path | None:
    """The newest intact ``last.ckpt`` in ``folders`` whose run was this one.

    Damaged ones are skipped with a warning, if they may be of other runs. With other numbers of planned epochs a run is
    this one if what has been trained agrees.

    Args:
        folders: where checkpoints lie.
        config: of :func:`plain`.
        training: whether the run shall go on, or be tested: then only method, data and seed count.

    Returns:
        The file. If there is none, None, and a message says so.

    Raises:
        ValueError: if the only one that can be this run's is damaged.
    """
    wanted, runs, damaged = _flat(config, training), [], []
    for path in _last_in(folders):
        try:
            checkpoint = read_checkpoint(path, mmap=True)
        except ValueError as error:
            damaged.append((path, error))
            continue
        if (found := checkpoint.get(CONFIG)) is None:
            rank_zero_info(f"--ckpt_path=last: {path} has no configuration: another version or a script wrote it")
            continue
        differs = differences(_flat(found, training), wanted)
        same_epochs = (found.get("schedule") or {}).get("epochs") == (config.get("schedule") or {}).get("epochs")
        if not differs and training and not same_epochs and not _can_go_on(checkpoint, config):
            differs = {"schedule.epochs": (found["schedule"]["epochs"], config["schedule"]["epochs"])}
        runs.append(_Run(path, differs, same_epochs))
        if not differs and same_epochs:
            break
    matching = sorted((run for run in runs if not run.differs), key=lambda run: not run.epochs)
    for path, fault in damaged:
        if not matching and _may_be(path, wanted, training):
            raise fault
        rank_zero_warn(f"--ckpt_path=last: skipped {fault}")
    if matching:
        return matching[0].path
    where = ", ".join(map(str, dict.fromkeys(folder for folder in folders if folder.is_dir()))) or "no folder of runs"
    rank_zero_info(f"--ckpt_path=last: nothing is saved of this configuration ({where})")
    if runs:
        rank_zero_info(f"--ckpt_path=last: {runs[0].path} is of another: {told(runs[0].differs)}")
    return None


def _last_in(folders: list[Path]) -> Iterator[Path]:
    """Newest first."""
    found: dict[Path, tuple[int, Path]] = {}
    for path in (path for folder in folders for path in folder.glob("last*.ckpt")):
        with contextlib.suppress(FileNotFoundError):  # its run has just removed it
            found[path.resolve()] = path.stat().st_mtime_ns, path
    yield from (path for _, path in sorted(found.values(), reverse=True))


def _can_go_on(checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    sequence = checkpoint["task_sequence"]
    if sequence.get("format") != FORMAT:
        return False
    planned, epochs = sequence["epochs"], config["schedule"]["epochs"]
    now = epochs if isinstance(epochs, list) else [epochs] * len(planned)
    try:
        refuse_epochs(planned, now, checkpoint[sequence["tested"]["data"]]["starts"], epochs_complete(checkpoint))
    except ValueError:
        return False
    return True


def _may_be(path: Path, wanted: Mapping[str, Any], training: bool) -> bool:
    """Whether a damaged checkpoint may be of this configuration, by the file beside it if that can be read."""
    for beside in (path.parents[1] / "config.yaml", path.parent / "config.yaml"):
        try:
            found = yaml.safe_load(beside.read_text())
            return not differences(_flat({key: found.get(key) for key in PARTS}, training), wanted)
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            continue
    return True


def _flat(config: Mapping[str, Any], training: bool) -> dict[str, Any]:
    """What must agree, by dotted name."""
    kept: dict[str, Any] = {}
    for part in PARTS if training else ("seed_everything", "model", "data"):
        value = config.get(part)
        if part == "trainer":
            value = {key: (value or {}).get(key) for key in OF_TRAINER}
        _flatten(value, part, kept)
    left_out = (*ELSEWHERE, PROCESSES, "schedule.epochs")
    return {k: v for k, v in kept.items() if not any(k == o or k.startswith(f"{o}.") for o in left_out)}


def _flatten(value: Any, name: str, kept: dict[str, Any]) -> None:
    if isinstance(value, Mapping | list) and value:
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            _flatten(item, f"{name}.{key}", kept)
    else:
        kept[name] = value
