"""What a sweep tries: the section ``sweep`` of a YAML file, and the trials that it stands for."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

DRAWS = {"uniform": 2, "log_uniform": 2, "integers": 2, "choice": 0}
"""Ways to draw a value, and how many numbers each takes; 0 if any number."""
METHODS = ("random", "optuna")
OWN = ("seed_everything", "ckpt_path", "trainer.logger", "trainer.fast_dev_run")
"""Options of fit that a sweep sets itself, or that leave no finished run."""
ENGINES = ("auto", "ray", "sequential")


@dataclass(frozen=True)
class Trial:
    """One task sequence of a sweep.

    Args:
        name: of its folder; unique in the sweep.
        args: of ``sparsecl fit``, without the folder.
        values: what was drawn for it, by setting.
    """

    name: str
    args: list[str]
    values: dict[str, Any] = field(default_factory=dict)


@dataclass
class Space:
    """The section ``sweep``; each entry can be given as ``--sweep.ENTRY=VALUE``, too.

    Args:
        configs: configurations, each laid over the files of the command line; a list is several, one over the other.
        seeds: each configuration is trained with every one.
        grid: values by setting; all combinations are tried.
        search: how to draw values, by setting: ``{log_uniform: [0.001, 0.1]}``, ``{uniform: [0, 1]}``,
            ``{integers: [1, 8]}`` (both ends included) or ``{choice: [a, b]}``.
        trials: how many times values are drawn for each configuration and point of the grid.
        method: ``"random"``; or ``"optuna"``, which learns from the trials before, on Ray, with one seed.
        metric: what a search and early stopping go by, as it is logged after each task; more is better.
        stop_early: ``{grace: 1, factor: 3}`` stops a trial that, after ``grace``, ``grace * factor``, ... tasks, is not
            among the best ``1 / factor`` of the trials that got so far (ASHA). On Ray only. If None, none is stopped.
        folder: where the trials have their folders. All nodes of a cluster must see it.
        engine: ``"ray"``; ``"sequential"``, one after the other in this process; or ``"auto"``, Ray if it is installed.
        address: of a running Ray cluster, or ``"auto"``. If None, Ray is started on this machine.
        cpus: of each trial, which are its threads, too, unless its configuration says another number.
        gpus: of each trial, or of each of its workers.
        workers: processes of each trial, by Lightning's strategy for Ray. If None, the trial is no distributed one.
        failures: how many times a trial is started again if its process or node dies.

    Raises:
        ValueError: if an entry is out of range, or entries do not go together.
    """

    configs: list[str | list[str]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    grid: dict[str, list[Any]] = field(default_factory=dict)
    search: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    trials: int = 10
    method: str = "random"
    metric: str = "class_il/acc_seen"
    stop_early: dict[str, int] | None = None
    folder: str = "sweep"
    engine: str = "auto"
    address: str | None = None
    cpus: int = 1
    gpus: float = 0
    workers: int | None = None
    failures: int = 3

    def __post_init__(self) -> None:
        for name, options in (("method", METHODS), ("engine", ENGINES)):
            if (value := getattr(self, name)) not in options:
                raise ValueError(f"sweep.{name}={value!r}: one of {', '.join(options)}")
        for name, least in (("trials", 1), ("cpus", 1), ("gpus", 0), ("failures", 0), ("workers", 1)):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (name == "workers" and value is None) and not (is_number and value >= least):
                raise ValueError(f"sweep.{name}={value!r}: a number, at least {least}")
        for name in ("trials", "cpus", "failures", "workers"):
            if not isinstance(value := getattr(self, name), int | None):
                raise ValueError(f"sweep.{name}={value!r}: a whole number")
        if not isinstance(self.folder, str) or not self.folder:
            raise ValueError(f"sweep.folder={self.folder!r}: the name of a folder")
        for name, kind in (("configs", list), ("seeds", list), ("grid", dict), ("search", dict)):
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"sweep.{name}={value!r}: a {'list' if kind is list else 'mapping'} is expected")
        if not self.seeds or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in self.seeds):
            raise ValueError(f"sweep.seeds={self.seeds!r}: a list of whole numbers from 0 on")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"sweep.seeds={self.seeds!r}: a seed is given twice")
        for name, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"sweep.grid.{name}={values!r}: a list of values is expected")
        for name, drawn in self.search.items():
            _check_draw(f"sweep.search.{name}", drawn)
        if both := self.grid.keys() & self.search.keys():
            raise ValueError(f"sweep.search.{min(both)}: this setting is in sweep.grid, too")
        if self.method == "optuna" and (not self.search or len(self.seeds) > 1 or self.engine == "sequential"):
            raise ValueError(
                f"sweep.method=optuna with {len(self.search)} settings in search, {len(self.seeds)} seeds and "
                f"engine={self.engine}: it needs settings to search, one seed and Ray; try other seeds on the best"
            )
        if self.stop_early is not None:
            given = self.stop_early
            numbers = isinstance(given, dict) and all(type(value) is int for value in given.values())
            if not numbers or given.keys() - {"grace", "factor"}:
                raise ValueError(f"sweep.stop_early={given!r}: whole numbers grace and factor, such as {{grace: 1}}")
            self.stop_early = {"grace": 1, "factor": 3} | given
            if self.stop_early["grace"] < 1 or self.stop_early["factor"] < 2:
                raise ValueError(f"sweep.stop_early={given}: grace, at least 1, and factor, at least 2")

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> Space:
        """From a mapping.

        Raises:
            ValueError: if it has an entry that there is not.
        """
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in entries if name not in known]:
            raise ValueError(f"sweep.{unknown[0]}: there is no such entry; there are {', '.join(known)}")
        return cls(**entries)

    def points(self, base: Sequence[str], rest: Sequence[str]) -> list[Trial]:
        """Every configuration with every point of the grid and every seed, before anything is drawn.

        Args:
            base: files of configurations, over which ``configs`` are laid.
            rest: further arguments of ``sparsecl fit`` for all trials.
        """
        for word in rest:
            option = word.partition("=")[0].removeprefix("--")
            if option in (*OWN, *self.grid, *self.search):
                raise ValueError(f"sweep {word}: the sweep sets {option} for each trial; leave it out")
        found = []
        names = {setting: _names(values) for setting, values in self.grid.items()}
        short = shortened([*self.grid, *self.search])
        for overlays in self.configs or [[]]:
            files = [*base, *([overlays] if isinstance(overlays, str) else overlays)]
            for at in itertools.product(*(range(len(values)) for values in self.grid.values())):
                chosen = {k: self.grid[k][i] for k, i in zip(self.grid, at)}
                for seed in self.seeds:
                    parts = ["+".join(Path(file).stem for file in files)]
                    parts += [f"{short[k]}={names[k][i]}" for k, i in zip(self.grid, at)]
                    args = [f"--threads={self.cpus}", *itertools.chain(*(("-c", file) for file in files))]
                    args += [f"--seed_everything={seed}", *(argument(k, v) for k, v in chosen.items()), *rest]
                    found.append(Trial("-".join([*parts, f"seed={seed}"]), args))
        return found

    def drawn(self, points: Sequence[Trial]) -> list[Trial]:
        """Each point with values drawn for it, as often as ``trials`` says; the same ones in every sweep and seed."""
        if not self.search:
            return list(points)
        random_numbers = random.Random(0)
        draws = [{k: draw(way, random_numbers) for k, way in self.search.items()} for _ in range(self.trials)]
        return [self.with_values(point, values) for values in draws for point in points]

    def with_values(self, point: Trial, values: Mapping[str, Any]) -> Trial:
        """A point with values that were drawn for it."""
        rounded, short = {k: _rounded(v) for k, v in values.items()}, shortened([*self.grid, *self.search])
        told = [f"{short[k]}={_in_a_name(v)}" for k, v in rounded.items()]
        return Trial(
            "-".join([point.name, *told]), [*point.args, *(argument(k, v) for k, v in rounded.items())], rounded
        )


def draw(way: Mapping[str, list[Any]], random_numbers: random.Random) -> Any:
    """A value, as an entry of ``search`` says."""
    ((kind, of),) = way.items()
    if kind == "choice":
        return random_numbers.choice(of)
    if kind == "integers":
        return random_numbers.randint(*of)
    low, high = of
    return math.exp(random_numbers.uniform(math.log(low), math.log(high))) if kind == "log_uniform" else (
        random_numbers.uniform(low, high)
    )  # fmt: skip


def argument(setting: str, value: Any) -> str:
    """``--setting=value``, as YAML."""
    return f"--{setting}={value if isinstance(value, str) else json.dumps(value)}"


def shortened(settings: Sequence[str]) -> dict[str, str]:
    """The last part of each setting, or all of it where two have the same."""
    last = [setting.rpartition(".")[2] for setting in settings]
    return {setting: part if last.count(part) == 1 else setting for setting, part in zip(settings, last)}


def _rounded(value: Any) -> Any:
    """Four digits tell one draw from another, in names and in tables."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _in_a_name(value: Any) -> str:
    text = value.get("class_path", value) if isinstance(value, Mapping) else value
    return "".join(letter if letter.isalnum() or letter in "._+" else "_" for letter in str(text))[:40]


def _names(values: Sequence[Any]) -> list[str]:
    """What values are called in names of trials; those that would be called the same are numbered."""
    called = [_in_a_name(value) for value in values]
    return [f"{name}.{i}" if called.count(name) > 1 else name for i, name in enumerate(called)]


def _check_draw(name: str, way: Any) -> None:
    if not isinstance(way, Mapping) or len(way) != 1 or next(iter(way)) not in DRAWS:
        raise ValueError(f"{name}={way!r}: one of {', '.join(DRAWS)}, with a list, such as {{uniform: [0, 1]}}")
    ((kind, of),) = way.items()
    if not isinstance(of, list) or not of or (kind != "choice" and len(of) != 2):
        raise ValueError(f"{name}.{kind}={of!r}: {'a list of values' if kind == 'choice' else 'the two ends'}")
    if kind == "choice":
        return
    number = int if kind == "integers" else (int, float)
    if not all(isinstance(v, number) and not isinstance(v, bool) for v in of) or not of[0] < of[1]:
        raise ValueError(f"{name}.{kind}={of!r}: two numbers in ascending order")
    if kind == "log_uniform" and of[0] <= 0:
        raise ValueError(f"{name}.{kind}={of!r}: both ends are above 0")
