"""Training and resuming: puts all parts together. Nothing here prints; `notify` gets the events.

train(Recipe(model="folder", data="rows.jsonl"), "runs/first")
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from talik.base.errors import DoesNotFitError, UsageError, collect_errors
from talik.base.events import Notify, Progress, Status, StepDone, silent
from talik.base.files import need_room, quoted, write_json
from talik.base.system import configure_allocators, deferred_interrupt
from talik.data.dataset import Data, check_files, check_positions, examples_fingerprint, keep_facts, read_sets
from talik.data.reading.sources import whole_source
from talik.data.templates.template import date_of
from talik.diagnose.run import BROKEN
from talik.kernels.bf16_matmul import bf16_as_fp32
from talik.machine.device import choose_device
from talik.machine.limits import hard_limit
from talik.model.adapters import idle_adapters
from talik.model.folder import ModelFolder
from talik.model.source.source import Source, find_model
from talik.model.tokenizer import load_tokenizer
from talik.model.weights.digests import remembered
from talik.plan.promise import Promise, broken_fields
from talik.plan.report import short_text, slow_precision
from talik.plan.search import plan_run
from talik.plan.target import machine_here, slack_of, target_of
from talik.plan.ways import check_plan
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe, check_layers
from talik.training.loading import RunModel, describe_trained, open_run_model
from talik.training.run.checkpoint_digests import verified
from talik.training.run.checkpoints import RunState, clear_unfinished, latest_checkpoint, load_checkpoint
from talik.training.run.evaluation import evaluate_ranges
from talik.training.run.folder import (
    Run,
    check_new,
    check_same_data,
    only_process,
    open_run,
    refuse_run,
    start_run,
)
from talik.training.run.loop import Job, train_loop
from talik.training.run.results import Result, earlier_memory, result_of
from talik.training.step.step import prepare_top
from talik.training.trunk.trunk import trunk_states


def train(
    recipe: Recipe,
    run: str | Path,
    *,
    plan: Plan | None = None,
    memory: int | None = None,
    enforce: bool = False,
    notify: Notify = silent,
) -> Result:
    """Trains by a recipe into a new run folder.

    Args:
        recipe: What is trained, on what, and how.
        run: The run folder; it must be new.
        plan: A plan to carry out; by default the fastest that fits is chosen.
        memory: Bytes the run may take; by default the free memory.
        enforce: Make the planned peak a hard limit.
        notify: Gets the events (talik.base.events).

    Raises:
        UsageError: The recipe, the model's files or the data are wrong; raised before the folder is made.
        DoesNotFitError: No way to run it fits.
        InterruptedRunError: Ctrl-C was pressed; a checkpoint has been saved.
        TalikError: See talik.base.errors for the others.
    """
    configure_allocators()
    if plan is not None and memory is not None:
        raise UsageError("a plan says what a run takes: give either plan or memory")
    folder = Path(run)
    collect_errors(partial(check_new, folder), partial(check_files, recipe))
    source = find_model(
        recipe.model, revision=recipe.revision, progress=lambda text: notify(Status("model", text))
    )
    notify(Status("model", f"{recipe.model} in {source.folder}"))
    model = ModelFolder.of(source)
    check_layers(recipe, model.layers)
    date = date_of(model.tokenizer())
    sets = _read_sets(recipe, model, date, notify)
    check_positions(model.config, *sets)
    if plan is None:
        plan = _planned(recipe, source, model, folder, sets, memory, notify)
    else:
        check_plan(plan, recipe, model)
    _limit(plan, enforce)  # raises before the folder is made
    if not remembered(source.folder):
        notify(Status("model", "hashing the weights (once per file)"))
    started = start_run(
        folder, _findable(recipe, source), plan, source, model, examples_fingerprint(*sets), date
    )
    keep_facts(folder, *sets)
    return _carry_out(started, *sets, enforce, notify)


def resume(run: str | Path, *, enforce: bool = False, notify: Notify = silent) -> Result:
    """Continues a run from its newest checkpoint, bit for bit as if it had not been stopped."""
    configure_allocators()
    opened = open_run(run, notify)
    choose_device(opened.plan.device)
    sets = _read_sets(opened.recipe, opened.model, opened.date, notify)
    check_same_data(opened, examples_fingerprint(*sets))
    return _carry_out(opened, *sets, enforce, notify)


def _planned(
    recipe: Recipe,
    source: Source,
    model: ModelFolder,
    folder: Path,
    sets: tuple[Data, Data | None],
    memory: int | None,
    notify: Notify,
) -> Plan:
    """Chooses a plan. A refused one is kept in the run's folder for `talik explain`."""
    machine = machine_here(recipe.device, notify)
    examples, evaluated = (data.examples if data else [] for data in sets)
    target = replace(
        target_of(machine, memory=memory), disk=None
    )  # the room is checked below, in the folder of the run
    planned = plan_run(recipe, model, examples, evaluated, target=target, notify=notify)
    for line in short_text(planned):
        notify(Status("plan", line))
    if not planned.fits:
        refuse_run(folder, _findable(recipe, source), planned.as_dict())
        raise DoesNotFitError(
            planned.problem, remedy=f"See why, and what would fit: talik explain {quoted(folder)}"
        )
    need_room(folder, planned.disk_bytes - planned.disk["cache"], "the run's checkpoints and working files")
    if note := slow_precision(recipe, machine):
        notify(Status("note", note))
    return planned.plan


def _findable(recipe: Recipe, source: Source) -> Recipe:
    """The recipe with absolute paths, so that the run can be resumed from any folder."""
    fields = ["cache"] + (["model"] if source.kind in ("folder", "gguf") else [])
    paths = {field: getattr(recipe, field) for field in fields}
    found = {k: str(Path(v).absolute()) for k, v in paths.items() if v}
    sets = {"data": recipe.data, "eval_data": recipe.eval_data}
    found |= {name: tuple(map(whole_source, sources)) for name, sources in sets.items() if sources}
    return recipe.model_copy(update=found)


def _read_sets(
    recipe: Recipe, model: ModelFolder, date: str | None, notify: Notify
) -> tuple[Data, Data | None]:
    if date is not None:
        notify(
            Status(
                "note",
                f"the chat template writes a date; this run has {date} for it, now and when it goes on",
            )
        )
    load = partial(load_tokenizer, model.path, date)
    sets = read_sets(recipe, model.tokenizer(date), load=load, notify=notify)
    for data in sets:
        if data is not None:
            notify(data)
    return sets


def _carry_out(run: Run, data: Data, evaluation: Data | None, enforce: bool, notify: Notify) -> Result:
    """Checks the chain, runs the trunk once, and trains from the newest checkpoint."""
    # The sampling thread starts before the limit is set: a low limit would leave no room for it.
    with only_process(run.folder), Promise(run.plan) as promise, _limit(run.plan, enforce) as again:
        promise.between = again
        (run.folder / BROKEN).unlink(missing_ok=True)
        try:
            promise.phase("load")  # checked against the limit, which may be below what is in use
            result = _train(run, data, evaluation, promise, _logged(run.folder, notify))
        except Exception as error:
            if (broken := promise.broken_by(error, run.folder)) is None:
                raise
            write_json(run.folder / BROKEN, broken_fields(broken, promise))
            raise broken from None
        write_json(run.folder / "results.json", result.as_dict())
    return result


def _limit(plan: Plan, enforce: bool) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """The hard limit of a run: its planned peak and a slack; nothing without `enforce`."""
    if not enforce:
        return contextlib.nullcontext(lambda: None)
    if not (most := max(plan.promised.values(), default=0)):
        raise UsageError("--enforce: the plan has no planned peaks", remedy="Leave --enforce or --plan out.")
    return hard_limit(torch.device(plan.device), most + slack_of(most))


def _train(run: Run, data: Data, evaluation: Data | None, promise: Promise, notify: Notify) -> Result:
    started = time.perf_counter()
    clear_unfinished(run.folder)
    newest = latest_checkpoint(run.folder)
    checkpoint = verified(newest) if newest else None  # before anything slow
    torch.set_num_threads(run.plan.threads)
    loaded = open_run_model(run.recipe, run.plan, run.model)
    notify(Status("trained", describe_trained(loaded, run.recipe)))
    sets = [one.examples for one in (data, evaluation) if one is not None]
    with bf16_as_fp32(), contextlib.ExitStack() as stack:
        promise.phase("trunk")
        states = stack.enter_context(trunk_states(loaded, sets, run.recipe, notify))
        promise.phase("load")
        top, store, evaluate = loaded.top(), loaded.store, None
        if evaluation is not None:
            evaluate = partial(
                evaluate_ranges, top, evaluation.examples, states[1], run.plan, store, evaluation.ranges
            )
        scratch = stack.enter_context(loaded.working(top, run.folder / "work", checkpoint))
        prepare_top(top, run.recipe, store, scratch)
        state = load_checkpoint(checkpoint, top, scratch) if checkpoint else RunState()
        if checkpoint:
            notify(Status("resumed", f"after step {state.step}, from {checkpoint}"))
        interrupted = stack.enter_context(deferred_interrupt())
        job = Job(
            top=top,
            examples=data.examples,
            states=states[0],
            store=store,
            scratch=scratch,
            recipe=run.recipe,
            plan=run.plan,
            run=run.folder,
            evaluate=evaluate,
            watch=promise,
            notify=_noting_idle_adapters(loaded, notify),
            interrupted=interrupted,
        )
        state = train_loop(job, state)
    promise.phase("end")
    notify(Status("memory", promise.describe()))
    memory = promise.table(earlier_memory(run.folder))
    return result_of(run.folder, state, time.perf_counter() - started, memory)


def _noting_idle_adapters(loaded: RunModel, notify: Notify) -> Notify:
    """`notify`, with a note after the first step if some adapters got no gradient."""

    def both(event: Any) -> None:
        notify(event)
        if isinstance(event, StepDone) and event.step == 1 and (idle := idle_adapters(loaded.chain.model)):
            notify(Status("note", f"no gradient reached the adapters on {', '.join(idle)} in the first step"))

    return both


def _logged(folder: Path, notify: Notify) -> Notify:
    """`notify`, which also writes every event except progress to the run's log.txt."""

    def both(event: Any) -> None:
        if not isinstance(event, Progress):
            with (folder / "log.txt").open("a", encoding="utf-8") as log:
                text = f"{event.topic}: {event.text}" if isinstance(event, Status) else str(event)
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        notify(event)

    return both
