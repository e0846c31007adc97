"""Chooses the fastest way to run that fits, and records why faster ones do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from talik.base.events import Notify, Status, silent
from talik.base.files import format_bytes
from talik.data.examples import Example
from talik.data.preparing.stored_examples import lengths_of
from talik.model.folder import ModelFolder
from talik.model.freeze import trained_parameters
from talik.plan.planned import Planned, Refusal
from talik.plan.seconds import offloaded_bytes, seconds_of, token_bytes
from talik.plan.target import Target, machine_here, target_of
from talik.plan.ways import Way, first_plan, ways_of
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.simulate.account import Break, Peak, Simulation, highest
from talik.simulate.fake_log import Routing
from talik.simulate.simulation import Subject, Workload, simulate, subject_of
from talik.simulate.work import assumed_examples, glimpse_of, padded_tokens, workload_of
from talik.training.run.checkpoints import checkpoint_bytes, checkpoints_at_once, scratch_bytes, state_bytes

KEPT_CAUSES = ("weights trained", "weights frozen", "gradients", "optimizer state")


def plan_run(
    recipe: Recipe,
    model: ModelFolder,
    examples: Sequence[Example] | None = None,
    evaluated: Sequence[Example] = (),
    *,
    target: Target | None = None,
    notify: Notify = silent,
) -> Planned:
    """Plans a run.

    Args:
        recipe: The recipe.
        model: The model; weights are not needed.
        examples: Examples to train on; without any, all are assumed to have the maximum length.
        evaluated: Examples to evaluate on.
        target: The machine and the memory the run may take; by default this machine with its free memory.
        notify: Gets the events.

    Raises:
        UsageError: The model cannot be trained as the recipe asks.
        ChainError: The model cannot be run as a chain.
    """
    target = target or target_of(machine_here(recipe.device, notify))
    assumed = None
    if examples is None:
        examples, assumed = assumed_examples(recipe)
        evaluated = examples if recipe.held_out or recipe.eval_data else ()
    search = Search(subject_of(recipe, model), examples, evaluated, target, notify)
    outcome = search.run()
    chosen, measured = outcome.chosen, target.now()
    if chosen.breaks is None and measured.account(chosen.simulation)[1]:
        # Planning itself has taken memory, and the chosen way no longer fits into the rest.
        search = Search(search.subject, examples, evaluated, measured, notify)
        outcome = search.run()
        chosen, measured = outcome.chosen, measured.now()
    plan, simulation = chosen.plan, chosen.simulation
    phases, breaks = measured.account(simulation)
    promised = {"program": measured.program} if measured.on_cpu else {}  # not in the memory of other devices
    promised |= {peak.phase: peak.bytes for peak in phases}
    return Planned(
        plan=plan.model_copy(update={"promised": promised}),
        target=measured,
        phases=phases,
        simulation=simulation,
        seconds=seconds_of(
            simulation, search.subject, plan, chosen.work, examples, evaluated, measured.machine
        ),
        disk=_disk(search.subject, plan, examples, evaluated),
        checkpoints=checkpoints_at_once(recipe),
        assumed=assumed,
        refused=outcome.refused,
        breaks=breaks,
        ram_bytes=max(p.bytes for p in phases) if measured.on_cpu else search.ram(plan),
        least=search.balanced_peak(chosen, measured) if simulation.routed else None,
    )


@dataclass(frozen=True, slots=True)
class Attempt:
    """A simulated plan and its memory on the target.

    Attributes:
        complete: False if only a glimpse of a step was simulated.
    """

    plan: Plan
    work: Workload
    simulation: Simulation
    phases: tuple[Peak, ...]
    breaks: Break | None
    complete: bool = True

    @property
    def peak(self) -> Peak:
        """The highest peak of all phases."""
        return highest(self.phases)


@dataclass(frozen=True, slots=True)
class Fits:
    """A way that fits the target."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Refused:
    """A way that does not fit the target."""

    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a search: the chosen or nearest attempt, and the ways that were refused before it."""

    chosen: Attempt
    refused: tuple[Refusal, ...]


class Search:
    """Evaluates ways in order of their speed until one fits a target.

    Attributes:
        first: The plan that all ways change.
        longest: Tokens of the longest training example.
    """

    def __init__(
        self,
        subject: Subject,
        examples: Sequence[Example],
        evaluated: Sequence[Example],
        target: Target,
        notify: Notify = silent,
    ) -> None:
        self.subject, self.target = subject, target
        self._examples, self._evaluated, self._notify = examples, evaluated, notify
        self._attempts: list[Attempt] = []
        self.longest = max(lengths_of(examples))
        self.first = first_plan(subject.recipe, subject.chain, target.machine.device, target.memory, notify)

    def run(self) -> Outcome:
        """Chooses the first way that fits; otherwise the one with the lowest peak."""
        every, refused = ways_of(self.first, self.longest), list[Refusal]()
        try:
            for way in every:
                match self.evaluate(way):
                    case Fits(attempt):
                        return Outcome(attempt, tuple(refused))
                    case Refused(refusal):
                        refused.append(refusal)
            return Outcome(self._nearest(every[-1]), tuple(refused))
        finally:
            self._attempts.clear()  # their logs take memory that the run needs

    def evaluate(self, way: Way) -> Fits | Refused:
        """Simulates a way, unless its sizes alone already show that it does not fit.

        A streamed step has many similar parts, so a glimpse of it is simulated first.
        """
        plan = way.apply(self.first)
        if refusal := self._refused_by_size(way, plan):
            return Refused(refusal)
        self._notify(Status("plan", f"simulating {way}"))
        attempt = self._attempt(plan, glimpse=plan.top == "streamed")
        if not (attempt.breaks or attempt.complete):
            attempt = self._attempt(plan)
        if attempt.breaks is None:
            return Fits(attempt)
        peak, change = attempt.peak.bytes, None
        if attempt.complete:
            change = f"--memory {in_mebibytes(self.target.needed(peak))}"
        return Refused(Refusal(way, peak, _why(attempt.breaks), change, simulated=attempt.complete))

    def simulate_plan(self, plan: Plan, *, glimpse: bool = False) -> Attempt:
        """Simulates a plan, or only a glimpse of its step if the whole step is much larger.

        The trunk is streamed if it does not fit in memory and streaming is allowed.
        """
        recipe, chain = self.subject.recipe, self.subject.chain
        work = workload_of(self._examples, self._evaluated, plan, recipe, chain)
        complete = not glimpse or len(work.steps) == 1
        if not complete:
            work = glimpse_of(work, plan, chain)
        attempt = self._simulated(plan, work, complete)
        trunk = max(peak.bytes for peak in attempt.phases if peak.phase == "trunk")
        if trunk > self.target.most and plan.trunk == "resident" != recipe.trunk:
            return self._simulated(plan.model_copy(update={"trunk": "streamed"}), work, complete)
        return attempt

    def balanced_peak(self, attempt: Attempt, target: Target) -> int:
        """The peak in bytes if a router chooses all experts equally often."""
        return highest(target.account(self._log_of(attempt.plan, attempt.work, "even"))[0]).bytes

    def ram(self, plan: Plan) -> int:
        """Approximate bytes of host RAM that a way takes on an accelerator.

        The program, buffers for transfers to the device, and offloaded tensors. Pinned memory for two layers
        is rounded up to powers of two (ATen/core/CachingHostAllocator.h).
        """
        chain = self.subject.chain
        layers = (sum(weight.nbytes for weight in layer.parameters()) for layer in chain.layers)
        size = self.target.program + max(weight.nbytes for weight in chain.model.parameters())
        if "streamed" in (plan.trunk, plan.top):
            size += 2 * (1 << (max(layers) - 1).bit_length())
        if plan.state == "ram":
            size += offloaded_bytes(self.subject, plan)
        return size + (_inputs(self.subject, plan, self._examples) if plan.inputs == "ram" else 0)

    def _attempt(self, plan: Plan, *, glimpse: bool = False) -> Attempt:
        self._attempts.append(self.simulate_plan(plan, glimpse=glimpse))
        return self._attempts[-1]

    def _nearest(self, thriftiest: Way) -> Attempt:
        """The attempt with the lowest peak, simulated completely; the thriftiest way if there is none."""
        lowest = min(self._attempts, key=lambda attempt: attempt.peak.bytes, default=None)
        if lowest is None:
            return self.simulate_plan(thriftiest.apply(self.first))
        return lowest if lowest.complete else self.simulate_plan(lowest.plan)

    def _simulated(self, plan: Plan, work: Workload, complete: bool) -> Attempt:
        simulation = self._log_of(plan, work, "same")
        return Attempt(plan, work, simulation, *self.target.account(simulation), complete)

    def _log_of(self, plan: Plan, work: Workload, routing: Routing) -> Simulation:
        with self.target.kernels():
            return simulate(self.subject, plan, work, routing)

    def _refused_by_size(self, way: Way, plan: Plan) -> Refusal | None:
        least = self._lower_bound(plan)
        if least > self.target.most:
            return Refusal(way, least, f"takes {format_bytes(least)} at least", None, simulated=False)
        if self.target.on_cpu or (ram := self.ram(plan)) <= self.target.ram:
            return None
        reason, change = f"takes {format_bytes(ram)} of host RAM", f"--ram {in_mebibytes(ram)}"
        return Refusal(way, least, reason, change, simulated=False)

    def _lower_bound(self, plan: Plan) -> int:
        """A lower bound of a plan's peak in bytes: tensors that every micro-batch size keeps in memory.

        A smaller micro-batch keeps at least its share of the saved activations of an attempt.
        """
        least = self._resident_bytes(plan)
        for attempt in self._attempts:
            share = min(1.0, plan.micro_batch_tokens / attempt.plan.micro_batch_tokens)
            alike = plan.recompute == attempt.plan.recompute and plan.state == attempt.plan.state
            if plan.top == "resident" and alike:
                causes = attempt.peak.causes
                fixed = sum(causes.get(cause, 0) for cause in KEPT_CAUSES)
                least = max(least, int(fixed + share * causes.get("saved activations", 0)))
        return least + (self.target.program if self.target.on_cpu else 0)

    def _resident_bytes(self, plan: Plan) -> int:
        """Bytes of weights, gradients and state that are in memory at the end of a backward."""
        recipe, chain = self.subject.recipe, self.subject.chain
        trained = trained_parameters(chain.model)
        if plan.top == "streamed":
            return scratch_bytes(trained, recipe) if plan.state == "memory" else 0
        layers = (weight.nbytes for layer in chain.layers[plan.cut :] for weight in layer.parameters())
        gradients = 4 * sum(weight.numel() for weight in trained.values())
        return sum(layers) + gradients + (state_bytes(trained, recipe) if plan.state == "memory" else 0)


def in_mebibytes(size: int) -> str:
    """A size for an option, rounded up: "1235MiB"."""
    return f"{-(-size // (1 << 20))}MiB"


def _disk(
    subject: Subject, plan: Plan, examples: Sequence[Example], evaluated: Sequence[Example]
) -> dict[str, int]:
    """The most bytes of the cache, the checkpoints and the working files."""
    tokens = sum(lengths_of(examples)) + sum(lengths_of(evaluated))
    trained = trained_parameters(subject.chain.model)
    weights = sum(parameter.nbytes for parameter in trained.values())
    work = {} if subject.recipe.lora else {"working copy": weights}  # adapters stay in memory
    if plan.state == "disk":
        work["optimizer state"] = offloaded_bytes(subject, plan)
    if plan.inputs == "disk":
        work["inputs"] = _inputs(subject, plan, examples)
    return {
        "cache": 0 if plan.cache == "none" else tokens * token_bytes(subject, plan),
        "checkpoints": checkpoint_bytes(trained, subject.recipe),
        **(work if plan.top == "streamed" else {}),
    }


def _inputs(subject: Subject, plan: Plan, examples: Sequence[Example]) -> int:
    """Approximate bytes of the layer inputs of a streamed step."""
    tokens = padded_tokens(examples, plan, subject.recipe, subject.chain)
    return tokens * token_bytes(subject, plan) * (plan.layers - plan.cut)


def _why(broken: Break) -> str:
    where = f" in {broken.block}" if broken.block else ""
    shape = " x ".join(map(str, broken.shape))
    return (
        f"{broken.phase}{where}: {broken.operator.removeprefix('aten::')} of {shape} "
        f"({format_bytes(broken.bytes)}) makes it {format_bytes(broken.total)}"
    )
