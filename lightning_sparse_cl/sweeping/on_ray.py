"""Trials on Ray Tune: several at a time, on one machine or a cluster; needs the extra ``sweep``."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_sparse_cl.sweeping.progress import SweepProgress
from lightning_sparse_cl.sweeping.space import Space, Trial, argument
from lightning_sparse_cl.sweeping.trials import Fit, TellAfterTask, is_over, record_of, run_trial, write_record


def run_on_ray(space: Space, points: Sequence[Trial], fit: Fit, progress: SweepProgress) -> None:
    """Run what is not over yet. A trial whose process or node dies goes on from its last checkpoint.

    Args:
        space: what is tried.
        points: of the space, from which trials are drawn.
        fit: how a trial is run; it is sent to other processes.
        progress: is told of what happens.

    Raises:
        ModuleNotFoundError: without Ray.
    """
    import ray
    from ray import tune

    root = Path(space.folder).resolve()
    search = _OptunaSweep(space, points, root) if space.method == "optuna" else _ListedSweep(space, points, root)
    progress.begin(search.total, search.over)
    if search.over == search.total:
        return
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the traceback of a process that was killed
    started = not ray.is_initialized()
    if started:
        ray.init(address=space.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        told = _Told(search, root, progress)
        metric = space.metric if space.method == "optuna" or space.stop_early is not None else None
        shared = space.workers is not None  # then the trial's own process only waits for them
        fit = partial(_fit_on_workers, fit=fit, space=space, cwd=os.getcwd()) if shared else fit
        trainable = tune.with_resources(
            tune.with_parameters(_train, search=search, root=root, fit=fit, cwd=os.getcwd(), metric=metric),
            {"memory": 1} if shared else {"CPU": space.cpus, "GPU": space.gpus},
        )
        tune.Tuner(
            trainable,
            param_space=search.param_space(),
            tune_config=tune.TuneConfig(
                metric=metric, mode=None if metric is None else "max",
                num_samples=search.samples, search_alg=search.algorithm(),
                scheduler=_scheduler(space), max_concurrent_trials=_at_a_time(space, ray.cluster_resources()),
                reuse_actors=True, trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="ray", storage_path=str(root), verbose=0, callbacks=[told],
                failure_config=tune.FailureConfig(max_failures=space.failures),
            ),
        ).fit()  # fmt: skip
    finally:
        if started:
            ray.shutdown()


def _train(config: Mapping[str, Any], search: Any, root: Path, fit: Fit, cwd: str, metric: str | None) -> None:
    """In a process of Ray."""
    from ray import tune

    os.chdir(cwd)  # what relative paths in configurations mean
    trial = search.trial_of(config)

    def tell(figures: dict[str, float]) -> None:
        if metric is not None and metric not in figures:
            raise ValueError(f"sweep.metric={metric}: what is logged after each task is {', '.join(figures)}")
        tune.report(figures)

    try:
        figures = run_trial(trial, root, fit, tell)
    except Exception:  # it is in the trial's record; to try again is of use only where a process dies
        return
    tell(figures)


def _fit_on_workers(
    args: Sequence[str], folder: Path, callbacks: Sequence[Any], fit: Fit, space: Space, cwd: str
) -> None:
    """A trial on several processes: Lightning's DDP, which Ray starts and, when one of them dies, starts again."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    parts = {"strategy": "RayDDPStrategy", "plugins": "RayLightningEnvironment"}
    args = [*args, *(argument(f"trainer.{k}", {"class_path": f"ray.train.lightning.{v}"}) for k, v in parts.items())]
    TorchTrainer(
        _work,
        train_loop_config={"args": args, "folder": folder, "fit": fit, "cwd": cwd},
        scaling_config=ScalingConfig(
            num_workers=space.workers, use_gpu=space.gpus > 0,
            resources_per_worker={"CPU": space.cpus} | ({"GPU": space.gpus} if space.gpus else {}),
        ),
        run_config=RunConfig(
            name="workers", storage_path=str(folder), callbacks=[TuneReportCallback()],
            failure_config=FailureConfig(max_failures=space.failures),
        ),
    ).fit()  # fmt: skip


def _work(config: Mapping[str, Any]) -> None:
    """In each of the processes of a trial."""
    from lightning.pytorch.utilities import rank_zero_only
    from ray import train

    setattr(rank_zero_only, "rank", train.get_context().get_world_rank())  # noqa: B010 - before a Trainer sets it
    os.chdir(config["cwd"])
    config["fit"](config["args"], config["folder"], [TellAfterTask(train.report)])


def _at_a_time(space: Space, there: Mapping[str, float]) -> int | None:
    """How many trials of several processes there is room for. If each has one process, Ray knows: None.

    Raises:
        ValueError: if there is no room for one.
    """
    if space.workers is None:
        return None
    each = {"CPU": space.cpus * space.workers, "GPU": space.gpus * space.workers}
    room = min(there.get(kind, 0) / needed for kind, needed in each.items() if needed)
    if room < 1:
        known = ", ".join(f"{there.get(kind, 0):g} {kind}s" for kind in each)
        raise ValueError(
            f"sweep.workers={space.workers}: with {space.cpus} CPUs and {space.gpus} GPUs for each, they need more "
            f"than this cluster has ({known})"
        )
    return int(room)


class _ListedSweep:
    """Trials that are known before the first one runs."""

    def __init__(self, space: Space, points: Sequence[Trial], root: Path) -> None:
        trials = space.drawn(points)
        self.total, self._left = len(trials), [trial for trial in trials if not is_over(root, trial)]
        self.over = self.total - len(self._left)
        self.samples = 1

    def param_space(self) -> dict[str, Any]:
        from ray import tune

        return {"trial": tune.grid_search(list(range(len(self._left))))}

    def algorithm(self) -> Any:
        return None

    def trial_of(self, config: Mapping[str, Any]) -> Trial:
        """What Ray's configuration of a trial stands for."""
        return self._left[config["trial"]]


class _OptunaSweep:
    """Trials whose values Optuna suggests, by those of the trials before; also by those of an interrupted sweep."""

    def __init__(self, space: Space, points: Sequence[Trial], root: Path) -> None:
        if len(points) > 1:
            raise ValueError(
                f"sweep.method=optuna: {len(points)} configurations; it searches one, which tells its values apart"
            )
        self._space, self._point = space, points[0]
        prefix = f"{self._point.name}-"
        found = {p.name: record_of(p) for p in sorted(root.glob("*")) if p.name.startswith(prefix)}
        known = [record for name, record in found.items() if record and record["values"]]
        for record in known:
            is_over(root, space.with_values(self._point, record["values"]))  # refuses those with other arguments
        done = [
            r for r in known if r["state"] in ("finished", "stopped early") and space.metric in r.get("figures", {})
        ]
        self._done = [(r["values"], r["figures"][space.metric]) for r in done]
        self._begun = [r["values"] for r in known if r["state"] == "begun"]
        self.total, self.over = space.trials, min(len(done), space.trials)
        self.samples = self.total - self.over

    def param_space(self) -> dict[str, Any]:
        return {}

    def algorithm(self) -> Any:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = {name: _distribution(way) for name, way in self._space.search.items()}
        found = OptunaSearch(
            space, metric=self._space.metric, mode="max", points_to_evaluate=self._begun or None,
            sampler=optuna.samplers.TPESampler(seed=len(self._done)),  # not those again that were drawn before
        )  # fmt: skip
        for values, reward in self._done:
            found.add_evaluated_point(values, reward)
        return found

    def trial_of(self, config: Mapping[str, Any]) -> Trial:
        """What Ray's configuration of a trial stands for."""
        return self._space.with_values(self._point, {name: config[name] for name in self._space.search})


def _distribution(way: Mapping[str, list[Any]]) -> Any:
    from optuna import distributions

    ((kind, of),) = way.items()
    if kind == "choice":
        return distributions.CategoricalDistribution(of)
    if kind == "integers":
        return distributions.IntDistribution(*of)
    low, high = map(float, of)
    return distributions.FloatDistribution(low, high, log=kind == "log_uniform")


def _scheduler(space: Space) -> Any:
    if space.stop_early is None:
        return None
    from ray.tune.schedulers import ASHAScheduler

    grace, factor = space.stop_early["grace"], space.stop_early["factor"]
    longest = 10**6  # tasks: no trial is stopped for having learnt all
    return ASHAScheduler(time_attr="tasks", grace_period=grace, reduction_factor=factor, max_t=longest)


def _Told(search: Any, root: Path, progress: SweepProgress) -> Any:
    """A callback of Ray that passes on what happens; made when Ray is there."""
    from ray import tune

    class Told(tune.Callback):
        def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
            if "tasks" in result:
                progress.update(search.trial_of(trial.config).name, result)

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            ours = search.trial_of(trial.config)
            state = record_of(root / ours.name).get("state")
            figures = {k: v for k, v in trial.last_result.items() if "/" in k or k in ("tasks", "of")}
            if state == "failed":
                progress.failed(ours.name, record_of(root / ours.name)["error"])
                return
            if state != "finished":
                write_record(root / ours.name, ours, "stopped early", figures=figures)
            progress.finished(ours.name, figures, "" if state == "finished" else ", stopped early")

        def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            progress.said(f"{search.trial_of(trial.config).name}: its process died; it goes on")

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            progress.failed(search.trial_of(trial.config).name, "its process died each time")

    return Told()
