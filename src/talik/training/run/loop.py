"""The loop around the step: batches in, metrics out, evaluation, checkpoints, and when to stop.

It reads the scalars that the step left with the monitor, checks that they are finite, and tells what
happens through `notify`. It prints nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from talik.base.errors import InterruptedRunError, NonFiniteError
from talik.base.events import Evaluated, Evaluation, Saved, StepDone
from talik.base.files import quoted, write_text
from talik.data.batches import steps_of_epoch
from talik.data.examples import Example
from talik.data.preparing.store import lengths_of
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.training.memory.scratch import Scratch
from talik.training.memory.store import Store
from talik.training.run.checkpoints import State, save_checkpoint
from talik.training.run.feed import run_step
from talik.training.step.optim import learning_rate_at
from talik.training.step.top import Top, World
from talik.training.trunk.cache import States


class ScalarMonitor:
    """Keeps the step's scalars as tensors until the loop reads them."""

    def __init__(self, phase: Callable[[str, int], None] = lambda name, size: None) -> None:
        self._scalars: dict[str, Tensor] = {}
        self._phase = phase

    def phase(self, name: str, size: int = 0, /) -> None:
        self._phase(name, size)

    def scalar(self, name: str, value: Float[Tensor, ""]) -> None:
        self._scalars[name] = value

    def read(self, name: str) -> float:
        return self._scalars[name].item()


@runtime_checkable
class Watch(Protocol):
    """Who watches a run's memory, told of phases and steps; `take` is the peak since the last, in bytes."""

    def phase(self, name: str, size: int = 0, /) -> None: ...
    def step(self, top: Top, scratch: Scratch, /) -> AbstractContextManager[None]: ...
    def take(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that the loop works on."""

    top: Top
    examples: Sequence[Example]
    states: States | None
    store: Store
    scratch: Scratch
    recipe: Recipe
    plan: Plan
    run: Path
    evaluate: Callable[[], tuple[Evaluation, dict[str, Evaluation]]] | None
    watch: Watch
    notify: Callable[[Any], None]
    interrupted: Callable[[], bool]


def count_steps(lengths: Sequence[int], recipe: Recipe) -> int:
    """How many steps the whole run has."""
    if recipe.steps is not None:
        return recipe.steps
    epochs = range(recipe.epochs)
    return sum(len(_epoch(lengths, recipe, e)) for e in epochs)


def _epoch(lengths: Sequence[int], recipe: Recipe, epoch: int) -> list[list[int]]:
    return steps_of_epoch(lengths, recipe.batch_tokens, recipe.seed, epoch, recipe.shuffle)


def train_loop(job: Job, state: State) -> State:
    """Trains from `state` to the end. Raises NonFiniteError, or InterruptedRunError after saving."""
    lengths = lengths_of(job.examples)
    steps = count_steps(lengths, job.recipe)
    metrics = _open_metrics(job.run, state.step if state.step else -1)  # -1: nothing is saved yet
    with metrics:
        if job.evaluate and not state.evaluations:
            _evaluate(job, state, metrics)
        epoch: list[list[int]] = []
        while state.step < steps and not _patience_lost(job.recipe, state):
            if not epoch or state.step_in_epoch == 0:
                epoch = _epoch(lengths, job.recipe, state.epoch)
            done = _one_step(job, state, epoch[state.step_in_epoch], steps)
            metrics.write(json.dumps(_without(asdict(done), "steps")) + "\n")
            metrics.flush()
            _advance(state, len(epoch))
            job.notify(done)
            _after_step(job, state, metrics, last=state.step == steps)
    return state


def _one_step(job: Job, state: State, indices: Sequence[int], steps: int) -> StepDone:
    """Runs the next step and reads what the monitor got."""
    start, step = time.perf_counter(), state.step + 1
    torch.manual_seed(step_seed(job.recipe.seed, step))
    rate = learning_rate_at(job.recipe, step, steps)
    monitor = ScalarMonitor(job.watch.phase)
    world = World(job.store, job.scratch, monitor)
    with job.watch.step(job.top, job.scratch):
        batches = run_step(
            job.top, job.examples, indices, job.states, world, job.recipe, job.plan, step, rate
        )
    loss, norm = monitor.read("loss"), monitor.read("grad_norm")
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise _not_finite(job, step, indices, loss, norm)
    return StepDone(
        step=step,
        epoch=state.epoch,
        loss=loss,
        trained_tokens=sum(len(batch.targets) for batch in batches),
        tokens=sum(job.examples[i].length for i in indices),
        learning_rate=rate,
        grad_norm=norm,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=job.watch.take(),
        steps=steps,
    )


def _advance(state: State, steps_in_epoch: int) -> None:
    state.step += 1
    state.step_in_epoch += 1
    if state.step_in_epoch == steps_in_epoch:
        state.epoch, state.step_in_epoch = state.epoch + 1, 0


def _after_step(job: Job, state: State, metrics: Any, *, last: bool) -> None:
    """Evaluates and saves where that is due; saves and stops where somebody pressed Ctrl-C."""
    epoch_ends = state.step_in_epoch == 0
    interrupted = job.interrupted()
    if job.evaluate and (last or _due(job.recipe.eval_every, state.step, epoch_ends)):
        _evaluate(job, state, metrics)
    last = last or _patience_lost(job.recipe, state)
    best = state.best_step == state.step
    if last or best or interrupted or _due(job.recipe.save_every, state.step, epoch_ends):
        job.watch.phase("save")
        os.fsync(metrics.fileno())  # a checkpoint is never ahead of its metrics, even after a power failure
        path = save_checkpoint(job.run, job.top, job.store, job.scratch, job.recipe, state)
        job.notify(Saved(state.step, path))
    if interrupted and not last:
        raise InterruptedRunError(
            f"stopped after step {state.step}; everything up to it is saved",
            remedy=f"Go on with: talik resume {quoted(job.run)}",
        )


def _due(every: int, step: int, epoch_ends: bool) -> bool:
    return step % every == 0 if every else epoch_ends


def _evaluate(job: Job, state: State, metrics: Any) -> None:
    assert job.evaluate is not None
    job.watch.phase("evaluate")
    evaluation, by_source = job.evaluate()
    # The base is what the tuned ones are compared with; it has no checkpoint to be the best.
    tuned = state.step > 0
    best = tuned and (state.best_loss is None or evaluation.loss < state.best_loss)
    if best:
        state.best_loss, state.best_step, state.worse = evaluation.loss, state.step, 0
    elif tuned:
        state.worse += 1
    record: dict[str, Any] = {"step": state.step, **asdict(evaluation)}
    each = {"by_source": {name: asdict(part) for name, part in by_source.items()}} if by_source else {}
    state.evaluations.append(record | each)
    record = {"step": state.step, "eval_loss": evaluation.loss, "eval_accuracy": evaluation.accuracy, **each}
    metrics.write(json.dumps(record) + "\n")
    metrics.flush()
    job.notify(Evaluated(state.step, evaluation, best, by_source))


def _patience_lost(recipe: Recipe, state: State) -> bool:
    return bool(recipe.early_stop) and state.worse >= recipe.early_stop


def _not_finite(job: Job, step: int, indices: Sequence[int], loss: float, norm: float) -> NonFiniteError:
    places = [str(job.examples[i].place) for i in indices]
    shown = ", ".join(places[:20]) + (f" and {len(places) - 20} more" if len(places) > 20 else "")
    return NonFiniteError(
        f"step {step}: the loss is {loss} and the gradient's norm {norm}; nothing after the last checkpoint "
        f"is kept. The step's examples: {shown}",
        remedy="Look at these examples, lower the learning rate, or train with --precision fp32.",
    )


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's randomness, so that a resumed run draws the same."""
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _open_metrics(run: Path, step: int) -> Any:
    """metrics.jsonl, open for appending, without what was written after `step`."""
    path = run / "metrics.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if _step_of(line) <= step))
    return path.open("a", encoding="utf-8")


def _step_of(line: str) -> int | float:
    """The step of a line of metrics; a line that was cut off by a kill belongs to no step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


def _without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}
