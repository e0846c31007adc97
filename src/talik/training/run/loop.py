"""The training loop: steps, metrics, evaluation, checkpoints, early stopping and interruption.

It reads the scalars that a step gave to the monitor, checks that they are finite, and reports events through
`notify`. It prints nothing.
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
from talik.data.preparing.stored_examples import lengths_of
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.training.memory.scratch import Scratch
from talik.training.memory.store import Store
from talik.training.run.checkpoints import RunState, save_checkpoint
from talik.training.run.feed import run_step
from talik.training.run.schedule import learning_rate_at
from talik.training.step.top import Top, World
from talik.training.trunk.interfaces import HiddenStates


class ScalarMonitor:
    """A monitor that stores the scalars of a step as tensors until the loop reads them."""

    def __init__(self, phase: Callable[[str, int], None] = lambda name, size: None) -> None:
        self._scalars: dict[str, Tensor] = {}
        self._phase = phase

    def phase(self, name: str, size: int = 0, /) -> None:
        self._phase(name, size)

    def scalar(self, name: str, value: Float[Tensor, ""]) -> None:
        self._scalars[name] = value

    def read(self, name: str) -> float:
        """The value of a scalar of the last step."""
        return self._scalars[name].item()


@runtime_checkable
class MemoryWatch(Protocol):
    """Measures the memory of a run by phase and step; `take` returns the peak since its last call."""

    def phase(self, name: str, size: int = 0, /) -> None: ...
    def step(self, top: Top, scratch: Scratch, /) -> AbstractContextManager[None]: ...
    def take(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that the training loop needs.

    Attributes:
        top: The trained part of the model.
        examples: The training data.
        states: The trunk's hidden states of the examples; None if there is no trunk.
        store: Loads the blocks of a streamed top.
        scratch: Gradients, masters, optimizer state and layer inputs.
        recipe: What is trained, and how.
        plan: How the run is carried out on this machine.
        run: The run folder.
        evaluate: Evaluates the model on the held-out data; None if there are none.
        watch: Measures memory.
        notify: Receives events.
        interrupted: Returns True after Ctrl-C.
    """

    top: Top
    examples: Sequence[Example]
    states: HiddenStates | None
    store: Store
    scratch: Scratch
    recipe: Recipe
    plan: Plan
    run: Path
    evaluate: Callable[[], tuple[Evaluation, dict[str, Evaluation]]] | None
    watch: MemoryWatch
    notify: Callable[[Any], None]
    interrupted: Callable[[], bool]


def count_steps(lengths: Sequence[int], recipe: Recipe) -> int:
    """The number of steps of the whole run."""
    if recipe.steps is not None:
        return recipe.steps
    epochs = range(recipe.epochs)
    return sum(len(_epoch(lengths, recipe, e)) for e in epochs)


def _epoch(lengths: Sequence[int], recipe: Recipe, epoch: int) -> list[list[int]]:
    return steps_of_epoch(lengths, recipe.batch_tokens, recipe.seed, epoch, recipe.shuffle)


def train_loop(job: Job, state: RunState) -> RunState:
    """Trains from `state` to the end.

    Raises:
        NonFiniteError: The loss or the gradient norm is not finite.
        InterruptedRunError: Ctrl-C was pressed; a checkpoint was saved.
    """
    lengths = lengths_of(job.examples)
    steps = count_steps(lengths, job.recipe)
    metrics = _open_metrics(job.run, state.step if state.step else -1)  # -1: no checkpoint yet
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


def _one_step(job: Job, state: RunState, indices: Sequence[int], steps: int) -> StepDone:
    """Runs the next step and reads its scalars."""
    start, step = time.perf_counter(), state.step + 1
    torch.manual_seed(step_seed(job.recipe.seed, step))
    rate = learning_rate_at(job.recipe, step, steps)
    monitor = ScalarMonitor(job.watch.phase)
    world = World(job.store, job.scratch, monitor)
    with job.watch.step(job.top, job.scratch):
        batches = run_step(
            top=job.top,
            examples=job.examples,
            indices=indices,
            states=job.states,
            world=world,
            recipe=job.recipe,
            plan=job.plan,
            step=step,
            learning_rate=rate,
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


def _advance(state: RunState, steps_in_epoch: int) -> None:
    state.step += 1
    state.step_in_epoch += 1
    if state.step_in_epoch == steps_in_epoch:
        state.epoch, state.step_in_epoch = state.epoch + 1, 0


def _after_step(job: Job, state: RunState, metrics: Any, *, last: bool) -> None:
    """Evaluates and saves when it is due; after Ctrl-C saves and raises InterruptedRunError."""
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
            f"the run was stopped after step {state.step}; everything up to it is saved",
            remedy=f"Continue it: talik resume {quoted(job.run)}",
        )


def _due(every: int, step: int, epoch_ends: bool) -> bool:
    return step % every == 0 if every else epoch_ends


def _evaluate(job: Job, state: RunState, metrics: Any) -> None:
    """Evaluates, records the result in state and metrics, and reports it."""
    assert job.evaluate is not None
    job.watch.phase("evaluate")
    evaluation, by_source = job.evaluate()
    best = _update_best(state, evaluation.loss)
    record: dict[str, Any] = {"step": state.step, **asdict(evaluation)}
    each = {"by_source": {name: asdict(part) for name, part in by_source.items()}} if by_source else {}
    state.evaluations.append(record | each)
    record = {"step": state.step, "eval_loss": evaluation.loss, "eval_accuracy": evaluation.accuracy, **each}
    metrics.write(json.dumps(record) + "\n")
    metrics.flush()
    job.notify(Evaluated(state.step, evaluation, best, by_source))


def _update_best(state: RunState, loss: float) -> bool:
    """Compares an evaluation with the best one; True if it is the best now.

    The first evaluation is the base model's, for comparison: it has no checkpoint and is never the best.
    """
    if state.step == 0:
        return False
    best = state.best_loss is None or loss < state.best_loss
    if best:
        state.best_loss, state.best_step, state.worse = loss, state.step, 0
    else:
        state.worse += 1
    return best


def _patience_lost(recipe: Recipe, state: RunState) -> bool:
    return bool(recipe.early_stop) and state.worse >= recipe.early_stop


def _not_finite(job: Job, step: int, indices: Sequence[int], loss: float, norm: float) -> NonFiniteError:
    places = [str(job.examples[i].place) for i in indices]
    shown = ", ".join(places[:20]) + (f" and {len(places) - 20} more" if len(places) > 20 else "")
    return NonFiniteError(
        f"step {step}: the loss is {loss} and the gradient norm {norm}; steps after the last checkpoint are "
        f"lost. The examples of this step: {shown}",
        remedy="Check these examples, lower the learning rate, or train with --precision fp32.",
    )


def step_seed(seed: int, step: int) -> int:
    """The seed of the random generators in one step, which is the same in a resumed run."""
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _open_metrics(run: Path, step: int) -> Any:
    """Opens metrics.jsonl for appending, after removing the lines of later steps than `step`."""
    path = run / "metrics.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if _step_of(line) <= step))
    return path.open("a", encoding="utf-8")


def _step_of(line: str) -> int | float:
    """The step of a line of metrics; infinity for a line that is incomplete after a kill."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


def _without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}
