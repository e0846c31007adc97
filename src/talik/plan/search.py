"""Chooses the fastest way to run that fits, and records why faster ones do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from talik.base.events import Notify, Status, silent
from talik.base.files import format_bytes
from talik.data.examples import Example
from talik.data.preparing.store import lengths_of
from talik.model.folder import ModelFolder
from talik.model.freeze import trained_parameters
from talik.plan import ways
from talik.plan.planned import Planned, Refusal
from talik.plan.seconds import offloaded_bytes, seconds_of, token_bytes
from talik.plan.target import Target, machine_here, target_of
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.simulate.account import Break, Peak, Simulation
from talik.simulate.fake_log import Routing
from talik.simulate.simulation import Subject, Work, simulate, subject_of
from talik.simulate.work import assumed_examples, glimpse_of, padded_tokens, work_of
from talik.training.run.checkpoints import checkpoint_bytes, scratch_bytes, state_bytes

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
    done = search.run()
    search.forget()
    plan, result, target = done.plan, done.result, search.target.now()
    phases, breaks = target.account(result)
    least = search.least(done) if result.routed else None
    promised = {"program": target.program} if target.on_cpu else {}  # not in the memory of other devices
    promised |= {peak.phase: peak.bytes for peak in phases}
    return Planned(
        plan=plan.model_copy(update={"promised": promised}),
        target=target,
        phases=phases,
        simulation=result,
        seconds=seconds_of(result, search.subject, plan, done.work, examples, evaluated, target.machine),
        disk=_disk(search.subject, plan, examples, evaluated),
        assumed=assumed,
        refused=tuple(search.refused),
        breaks=breaks,
        ram_bytes=max(p.bytes for p in phases) if target.on_cpu else search.ram(plan),
        least=least,
    )


@dataclass(frozen=True, slots=True)
class Tried:
    """A simulated way and its memory on the target; `whole`, or only a glimpse of it."""

    plan: Plan
    work: Work
    result: Simulation
    phases: tuple[Peak, ...]
    breaks: Break | None
    whole: bool = True

    @property
    def peak(self) -> Peak:
        """The highest peak of all phases."""
        return max(self.phases, key=lambda peak: peak.bytes)


@dataclass(slots=True)
class Search:
    """Tries ways in order of their speed until one fits."""

    subject: Subject
    examples: Sequence[Example]
    evaluated: Sequence[Example]
    target: Target
    notify: Notify = silent
    refused: list[Refusal] = field(default_factory=list)
    _tried: list[Tried] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens of the longest training example."""
        return max(lengths_of(self.examples))

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
        return size + (_inputs(self.subject, plan, self.examples) if plan.inputs == "ram" else 0)

    def run(self) -> Tried:
        """The first way that fits; otherwise the one with the lowest peak."""
        first = self.first()
        every = [(first.model_copy(update=way), way) for way in ways.ways_of(first, self.longest)]
        for plan, way in every:
            if self._fits(plan, way):
                return self._tried[-1]
        least = min(self._tried, key=lambda tried: tried.peak.bytes, default=None)
        thrifty, _ = every[-1]
        if least is None or not least.whole:
            least = self.try_plan(thrifty if least is None else least.plan)
        return least

    def forget(self) -> None:
        """Drops the simulations, which take memory that the run needs."""
        self._tried.clear()

    def first(self) -> Plan:
        """The plan that all ways start from."""
        device = self.target.machine.device
        memory = self.target.memory
        return ways.first_plan(self.subject.recipe, self.subject.chain, device, memory, self.notify)

    def try_plan(self, plan: Plan, *, whole: bool = True) -> Tried:
        """Simulates a plan, or only a glimpse of it if the whole is much larger.

        The trunk is streamed if it does not fit in memory and streaming is allowed.
        """
        recipe, chain = self.subject.recipe, self.subject.chain
        work = work_of(self.examples, self.evaluated, plan, recipe, chain)
        whole = whole or len(work.steps) == 1
        if not whole:
            work = glimpse_of(work, plan, chain)
        tried = self._simulated(plan, work, "same", whole)
        trunk = max(peak.bytes for peak in tried.phases if peak.phase == "trunk")
        if trunk > self.target.most and plan.trunk == "resident" != recipe.trunk:
            return self._simulated(plan.model_copy(update={"trunk": "streamed"}), work, "same", whole)
        return tried

    def least(self, tried: Tried) -> int:
        """The peak if a router always chooses the same experts."""
        return self._simulated(tried.plan, tried.work, "even").peak.bytes

    def _simulated(self, plan: Plan, work: Work, routing: Routing, whole: bool = True) -> Tried:
        with self.target.kernels():
            result = simulate(self.subject, plan, work, routing)
        self.target = (
            self.target.now()
        )  # planning itself also takes memory, which is then missing for the run
        return Tried(plan, work, result, *self.target.account(result), whole)

    def _fits(self, plan: Plan, way: dict[str, Any]) -> bool:
        """True if a way fits, by simulation unless a lower bound already shows that it does not; records
        refusals.

        A streamed step has many similar parts, so a glimpse of it is simulated first.
        """
        if (least := self._least(plan)) > self.target.most:
            reason = f"takes {format_bytes(least)} at least"
            self.refused.append(Refusal(way, least, reason, None, simulated=False))
            return False
        if not self.target.on_cpu and (ram := self.ram(plan)) > self.target.ram:
            reason = f"takes {format_bytes(ram)} of host RAM"
            self.refused.append(Refusal(way, least, reason, f"--ram {in_mebibytes(ram)}", simulated=False))
            return False
        self.notify(Status("plan", f"simulating {ways.in_words(way)}"))
        tried = self.try_plan(plan, whole=plan.top == "resident")
        self._tried.append(tried)
        if not (tried.breaks or tried.whole):
            tried = self.try_plan(plan)
            self._tried.append(tried)
        if tried.breaks:
            self._refuse(way, tried, tried.breaks)
        return tried.breaks is None

    def _refuse(self, way: dict[str, Any], tried: Tried, broken: Break) -> None:
        peak = tried.peak.bytes
        change = f"--memory {in_mebibytes(self.target.needed(peak))}" if tried.whole else None
        self.refused.append(Refusal(way, peak, _why(broken), change, simulated=tried.whole))

    def _least(self, plan: Plan) -> int:
        """A lower bound for a way, in bytes: the tensors that every micro-batch size keeps in memory.

        A smaller micro-batch keeps at least its share of the saved activations.
        """
        least = self._resident_bytes(plan)
        for tried in self._tried:
            share = min(1.0, plan.micro_batch_tokens / tried.plan.micro_batch_tokens)
            alike = plan.recompute == tried.plan.recompute and plan.state == tried.plan.state
            if plan.top == "resident" and alike:
                causes = tried.peak.causes
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
