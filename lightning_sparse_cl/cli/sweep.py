"""``sparsecl sweep -c CONFIG -c SPACE.yaml``: many runs by one command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from lightning_sparse_cl.cli import shipped
from lightning_sparse_cl.cli.config import refuse_repeated_keys
from lightning_sparse_cl.cli.lightning_cli import main
from lightning_sparse_cl.sweeping import Space, run_sweep

SECTION = "sweep"


def command(args: Sequence[str]) -> None:
    """Run a sweep.

    Args:
        args: of the command line, after ``sweep``: ``-c`` with configurations and files that have a section ``sweep``,
            ``--sweep.ENTRY=VALUE``, and arguments of ``sparsecl fit`` for all trials.

    Raises:
        ValueError: if the space is wrong, or a trial fails.
    """
    if not args or {"-h", "--help"} & set(args):
        print(HELP)
        return
    files, entries, rest = _sorted(args)
    space = Space.of(entries)
    space.configs = [
        [_file(name) for name in ([overlays] if isinstance(overlays, str) else overlays)] for overlays in space.configs
    ]
    if not files and not space.configs:
        raise ValueError("sweep: no configuration; give one by -c, or several in sweep.configs")
    try:
        failures = run_sweep(space, files, rest, fit)
    except (KeyboardInterrupt, SystemExit):
        print(f"the sweep in {space.folder} was interrupted; the same command goes on with it", flush=True)
        raise
    if failures:
        name, why = next(iter(failures.items()))
        raise ValueError(f"sweep: {len(failures)} trials failed; {name}: {why} (see {space.folder}/{name}/log.txt)")
    print(f"all trials are in {space.folder}; sparsecl compare {space.folder} shows them in a table")


def fit(args: Sequence[str], folder: Path, callbacks: Sequence[pl.Callback]) -> None:
    """``sparsecl fit`` with its runs in a folder of its own."""
    main(list(args), folder, callbacks)


def _sorted(args: Sequence[str]) -> tuple[list[str], dict[str, Any], list[str]]:
    """Files of configurations, entries of the space, and what is left."""
    files: list[str] = []
    entries: dict[str, Any] = {}
    given: dict[str, Any] = {}
    rest: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if option in shipped.OPTIONS or option.startswith(f"--{SECTION}."):
            if not equals:
                if not words:
                    raise ValueError(f"sweep {option}: a value is expected after it")
                value = words.pop(0)
            if option in shipped.OPTIONS:
                found = _section(_file(value))
                files += [] if found is not None else [_file(value)]
                entries |= found or {}
            else:
                given[option.partition(".")[2]] = _parsed(option, value)
        else:
            rest.append(word)
    for name, value in given.items():  # they come after the files, wherever they stand
        head, _, tail = name.partition(".")
        if tail:
            entries[head] = {**(entries.get(head) or {}), tail: value}
        else:
            entries[head] = value
    return files, entries, rest


def _section(path: str) -> dict[str, Any] | None:
    """The section ``sweep`` of a file. If it has none, None.

    Raises:
        ValueError: if the file is no YAML, repeats a key, or has other sections beside it.
    """
    path = shipped.find(path)
    refuse_repeated_keys(Path(path))
    content = yaml.safe_load(Path(path).read_text())
    if not isinstance(content, dict) or SECTION not in content:
        return None
    if others := sorted(content.keys() - {SECTION}):
        raise ValueError(
            f"sweep -c {path}: {others[0]!r} stands beside the section 'sweep'; put it in a file of its own"
        )
    if not isinstance(content[SECTION], dict):
        raise ValueError(f"sweep -c {path}: the section 'sweep' is a mapping, such as 'seeds: [0, 1, 2]'")
    return content[SECTION]


def _file(name: Any) -> str:
    """A configuration as trials name it, which may run elsewhere: an absolute path, or a name in the package.

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(name, str):
        raise ValueError(f"sweep.configs: {name!r} is no name of a configuration")
    if Path(name).is_file():
        return str(Path(name).resolve())
    if not Path(shipped.find(name)).is_file():
        raise ValueError(f"sweep: there is no configuration {name}; 'sparsecl configs' lists those of the package")
    return name


def _parsed(option: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"sweep {option}={value}: it is no YAML") from error


HELP = """usage: sparsecl sweep -c CONFIG [-c OVERLAY ...] -c SPACE.yaml [--sweep.ENTRY=VALUE ...] [options of fit]

Run a grid or a search over configurations, settings and seeds, on Ray (extra 'sweep') or one after the other.
SPACE.yaml has a section 'sweep':

  sweep:
    configs: [split_digits/esacl, [split_digits/esacl, esacl/efficient], split_digits/er]
    seeds: [0, 1, 2]
    grid:
      model.init_args.objective.init_args.memory: [100, 200]
    folder: sweep

The same command goes on with a sweep that was interrupted; trials that are over are not run again.
All entries: search, trials, method, metric, stop_early, engine, address, cpus, gpus, workers, failures;
see the page on sweeps in the documentation."""
