"""What code of a user's own sees of a run: `train(cfg, callbacks=[EarlyStopping("segm/AP")])`."""

import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tensormask.config import CfgNode
from tensormask.data import IssueReporter
from tensormask.data.classes import UNKNOWN, Classes
from tensormask.engine import distributed
from tensormask.engine.evaluator import Evaluator
from tensormask.engine.events import MetricsWriter
from tensormask.engine.resume import SampleIssue
from tensormask.engine.signals import StopSignals
from tensormask.engine.step import TrainState
from tensormask.modeling import TensorMask
from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

# Names in records of metrics.json that no metric of a callback can have.
_TAKEN = ("iteration", "issues", "total_loss", "max_mem", "eta_seconds")


class Callback:
    """Methods that `train` calls at certain moments; the base class does nothing.

    Every rank calls the methods of all callbacks in the same order and with the same metrics, so
    that collectives are possible. `distributed.is_main_process()` tells rank 0, which writes files.
    The order of the callbacks is that of the list.
    """

    def before_step(self, run: "Run", batch: list[dict[str, Any]]) -> None:
        """Called with this rank's samples (see `TrainingSet`), which may be changed in place."""

    def after_step(self, run: "Run", metrics: Mapping[str, float]) -> None:
        """Called with the losses and other numbers of a step (see `train_step`)."""

    def before_evaluation(self, run: "Run") -> None:
        """Called before an evaluation on `DATASETS.TEST`."""

    def after_evaluation(self, run: "Run", metrics: Mapping[str, float]) -> None:
        """Called with all results of an evaluation, such as `{"segm/AP": 30.0, "ema/segm/AP": 31}`.

        A resumed run calls it again if its checkpoint was saved before the evaluation, which is
        read from `metrics.json` then.
        """

    def before_checkpoint(self, run: "Run") -> None:
        """Called before a periodic or final checkpoint is written."""

    def after_checkpoint(self, run: "Run", path: Path) -> None:
        """Called when this checkpoint has been written."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint saves: tensors, numbers, texts, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` of rank 0 has returned; called when a run is resumed."""


class EarlyStopping(Callback):
    """Stop a run when a metric has not improved for some evaluations.

    `SOLVER.PATIENCE` adds one for the metric of `SOLVER.CHECKPOINT_BEST`.

    Args:
        metric: the one to increase, by its name in `metrics.json`; it can be one that a callback
            before this one logs.
        patience: the number of evaluations in a row without a new best value.
    """

    def __init__(self, metric: str = "segm/AP", patience: int = 3) -> None:
        self.metric, self.patience = metric, patience
        self.best, self.num_worse = -math.inf, 0

    def after_evaluation(self, run: "Run", metrics: Mapping[str, float]) -> None:
        metrics = {**run.logged, **metrics}
        if self.metric not in metrics:
            names = ", ".join(metrics)
            raise UserError(f"EarlyStopping: no metric is {self.metric!r}; available: {names}")
        if metrics[self.metric] > self.best:
            self.best, self.num_worse = metrics[self.metric], 0
            return
        self.num_worse += 1
        if self.num_worse >= self.patience:
            run.stop(f"{self.metric} was not above {self.best:.4g} in {self.num_worse} evaluations")

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "best": self.best, "num_worse": self.num_worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("metric", self.metric) == self.metric:  # else its values say nothing
            self.best, self.num_worse = state["best"], state["num_worse"]


def build_early_stopping(cfg: CfgNode) -> list[Callback]:
    """Return the callback of `SOLVER.PATIENCE`, if it is not 0.

    Raises:
        UserError: it is negative, or the run has no periodic evaluations or no metric for it.
    """
    patience, metric = cfg.SOLVER.PATIENCE, cfg.SOLVER.CHECKPOINT_BEST
    if patience < 0:
        raise UserError(f"SOLVER.PATIENCE is {patience}; give a number of evaluations, or 0")
    for key, value, example in (
        ("TEST.EVAL_PERIOD", max(0, cfg.TEST.EVAL_PERIOD), "a number of iterations, such as 1000"),
        ("SOLVER.CHECKPOINT_BEST", metric, "a metric, such as segm/AP"),
    ):
        if patience and not value:
            raise UserError(
                f"SOLVER.PATIENCE is {patience}, but {key} is {value!r}: set it to {example}, "
                "or SOLVER.PATIENCE to 0"
            )
    return [EarlyStopping(metric, patience)] if patience else []


@dataclass
class Run:
    """Config, training state and reporting of a run.

    Attributes:
        cfg: the config, frozen; `cfg.OUTPUT_DIR` is the folder of the run.
        state: model (wrapped if there are several ranks), optimizer, schedule and averages.
        done: the number of iterations so far, with those before a resume.
        saved: that of the last checkpoint.
        issues: of training samples, in order of their detection.
        classes: of the model, and the category ids that its checkpoints name.
        stopped: the reason of a callback that has stopped the run.
        best: the best value of `SOLVER.CHECKPOINT_BEST` before a resume.
        evaluated: the iterations of the weights that were evaluated last; -1 for none.
        updating: the index of the iteration that has last begun to change the weights.
        results: of this evaluation, in this process (see `evaluate_all`).
        logged: the metrics of `log` that the next record gets.
    """

    cfg: CfgNode
    state: TrainState
    reporter: IssueReporter
    signals: StopSignals
    callbacks: Sequence[Callback] = ()
    evaluators: Sequence[Evaluator] = ()
    classes: Classes = UNKNOWN
    writer: MetricsWriter = field(init=False)
    issues: dict[SampleIssue, None] = field(default_factory=dict)
    done: int = 0
    saved: int = 0
    stopped: str | None = None
    best: float = -math.inf
    evaluated: int = -1
    updating: int = -1
    results: dict[str, Any] | None = None
    logged: dict[str, float] = field(default_factory=dict)
    _request: str | None = None  # of this rank, to stop

    @property
    def model(self) -> TensorMask:
        """The model itself, not its `DistributedDataParallel` wrapper."""
        return distributed.unwrap(self.state.model)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.cfg.OUTPUT_DIR)

    @property
    def finished(self) -> bool:
        """Whether all iterations are done, or a callback has stopped the run."""
        return self.done >= self.cfg.SOLVER.MAX_ITER or self.stopped is not None

    def stop(self, reason: str) -> None:
        """Let the run end after this step or evaluation as if it had done all iterations.

        It saves its final checkpoint and evaluates it. Like every finished run, it is not trained
        further by a resume. One rank is enough to stop all.
        """
        self._request = reason

    def log(self, name: str, value: float) -> None:
        """Add a metric to `metrics.json` and TensorBoard.

        It becomes part of the next record: of the results of an evaluation if it is logged in
        `after_evaluation`, otherwise of a step. A record of steps has the median of their values.
        """
        self.logged[name] = float(value)

    def with_logged(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics with those of `log` since the last call.

        Raises:
            UserError: two metrics have the same name.
        """
        if taken := ({*metrics, *_TAKEN} & self.logged.keys()):
            raise UserError(f"Run.log: choose other names than {', '.join(sorted(taken))}")
        logged, self.logged = self.logged, {}
        return {**metrics, **logged}

    def agree_on_stop(self) -> None:
        """Let all ranks know whether a callback of any rank has called `stop`."""
        if not self.callbacks or self.finished:
            return
        if distributed.any_rank(self._request is not None):
            self.stopped = next(filter(None, distributed.gather_objects(self._request)))
            logger.info("Stopped after %d iterations: %s", self.done, self.stopped)

    def state_dict(self) -> dict[str, Any]:
        """Return the part of a checkpoint that is not in `TrainState`.

        Raises:
            UserError: a callback's state has other objects than a checkpoint can have.
        """
        states = {}
        for name, callback in _named(self.callbacks).items():
            states[name] = callback.state_dict()
            if not _is_plain(states[name]):
                raise UserError(
                    f"{name}.state_dict() returns objects that a checkpoint does not save: "
                    "give tensors, numbers and texts, and lists and dicts of them"
                )
        return {"stopped": self.stopped, "evaluated": self.evaluated, "callbacks": states}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned; the log has the callbacks without a state."""
        self.stopped, self.evaluated = saved.get("stopped"), saved.get("evaluated", -1)
        named, states = _named(self.callbacks), saved.get("callbacks", {})
        for name in named.keys() & states.keys():
            named[name].load_state_dict(states[name])
        if new := ", ".join(sorted(named.keys() - states.keys())):
            logger.warning("Callbacks without a state in the checkpoint: %s", new)
        if gone := ", ".join(sorted(states.keys() - named.keys())):
            logger.warning("The run had callbacks that it has not now: %s", gone)


def _named(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Return callbacks by class name, with a number from the second of a class on."""
    named: dict[str, Callback] = {}
    for callback in callbacks:
        name = type(callback).__name__
        count = sum(type(other).__name__ == name for other in named.values())
        named[f"{name}_{count + 1}" if count else name] = callback
    return named


def _is_plain(value: Any) -> bool:
    if type(value) in (dict, OrderedDict):  # the latter of modules
        return all(map(_is_plain, [*value, *value.values()]))
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return (
        value is None or isinstance(value, torch.Tensor) or type(value) in (str, bool, int, float)
    )
