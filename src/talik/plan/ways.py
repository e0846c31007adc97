"""The ways to run a recipe, fastest first, each simulated until one fits a budget; why the others do not."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from talik.data.batches import steps_of_epoch
from talik.data.labels import Example, Span
from talik.data.rows import Place
from talik.errors import UsageError
from talik.events import Notify, Said, silent
from talik.files import in_words
from talik.model.chain import Chain
from talik.plan.account import Break, Peak, Simulation
from talik.plan.simulate import Subject, Work, simulate, subject_of
from talik.plan.solve import plan_for
from talik.recipe import Plan, Recipe
from talik.system import anonymous_bytes, free_memory
from talik.train.cache import Group, groups_of

SLACK = 0.03  # of the promise: how far the process may be above it
LEAST_SLACK = 64 << 20  # bytes
STAY = ("weights trained", "weights frozen", "gradients", "optimizer state")
# What may change from way to way, fastest first: a backward that computes forwards again costs a third more.
WAYS: tuple[dict[str, Any], ...] = tuple(
    {"recompute": recompute, "micro_batch_tokens": tokens}
    for recompute in (False, True)
    for tokens in (2048, 1024, 512, 256)
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A way that does not fit: the bytes it takes (at least, where `simulated` is false) and why."""

    way: dict[str, Any]
    peak_bytes: int
    reason: str
    simulated: bool


@dataclass(frozen=True, slots=True)
class Planned:
    """What was chosen, or came nearest: its plan and peaks (the program's own memory included)."""

    plan: Plan
    phases: tuple[Peak, ...]
    budget: int
    slack: int
    assumed: str | None
    refused: tuple[Refusal, ...]
    breaks: Break | None

    @property
    def fits(self) -> bool:
        return self.breaks is None

    @property
    def peak(self) -> Peak:
        """The highest of all phases."""
        return max(self.phases, key=lambda peak: peak.bytes)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "fits": self.fits,
            "budget_bytes": self.budget,
            "slack_bytes": self.slack,
            "peak_bytes": {self.plan.device: self.peak.bytes},
            "phases": [
                {"name": p.phase, "peak_bytes": p.bytes, "causes": p.causes, "block": p.block}
                for p in self.phases
            ],
            "chosen": self.plan.model_dump() if self.fits else None,
            "assumed": self.assumed,
            "refused": [asdict(refusal) for refusal in self.refused],
            "breaks": asdict(self.breaks) if self.breaks else None,
        }


def plan_run(
    recipe: Recipe,
    folder: Path,
    examples: Sequence[Example] | None = None,
    *,
    memory: int | None = None,
    notify: Notify = silent,
) -> Planned:
    """Plans a run on the CPU in at most `memory` bytes of this process (default: what is free now).

    `examples` are those to train on; without them every one is taken to be as long as the recipe allows. Kept
    back for what no simulation sees: 3 % or 64 MiB. The folder needs no weights. Raises UsageError and
    ChainError for models that cannot be trained.
    """
    if recipe.device not in ("auto", "cpu"):
        raise UsageError(f"a run on {recipe.device!r} cannot be planned yet", remedy="Plan for --device cpu.")
    subject = subject_of(recipe, folder)
    first = plan_for(recipe, subject.chain, notify)
    program = anonymous_bytes()
    budget = memory or free_memory() + program
    slack = max(int(SLACK * budget), LEAST_SLACK)
    assumed = None
    if examples is None:
        examples, assumed = assumed_examples(recipe)
    search = _Search(subject, first, examples, budget - slack - program, program, notify)
    chosen = next((way for way in WAYS if search.fits(way)), None)
    plan, result = search.last if chosen else search.nearest
    broken = result.first_break(search.room)
    return Planned(plan, _with(program, result), budget, slack, assumed, tuple(search.refused), broken)


class _Search:
    """Way after way for one subject, in `room` bytes beside the program's own."""

    def __init__(
        self,
        subject: Subject,
        first: Plan,
        examples: Sequence[Example],
        room: int,
        program: int,
        notify: Notify,
    ) -> None:
        self.subject, self.first, self.examples, self.notify = subject, first, examples, notify
        self.room, self.program = room, program
        self.refused: list[Refusal] = []
        self._done: list[tuple[Plan, Simulation]] = []

    @property
    def last(self) -> tuple[Plan, Simulation]:
        return self._done[-1]

    @property
    def nearest(self) -> tuple[Plan, Simulation]:
        """The simulated way that takes least."""
        return min(self._done, key=lambda done: done[1].peak.bytes)

    def fits(self, way: dict[str, Any]) -> bool:
        """Whether a way fits, by simulation, unless another's has shown that it cannot; notes why not."""
        plan = self.first.model_copy(update=way)
        if self._done and (least := self._least(plan)) > self.room:
            reason = f"takes {in_words(least + self.program)} at least"
            self.refused.append(Refusal(way, least + self.program, reason, simulated=False))
            return False
        self.notify(Said("plan", f"simulating {_in_words(way)}"))
        work = work_of(self.examples, plan, self.subject.recipe, self.subject.chain)
        plan, result = _with_trunk(self.subject, plan, work, self.room)
        self._done.append((plan, result))
        if broken := result.first_break(self.room):
            peak, reason = result.peak.bytes + self.program, _why(broken, self.program)
            self.refused.append(Refusal(way, peak, reason, simulated=True))
        return broken is None

    def _least(self, plan: Plan) -> int:
        """Bytes that a way takes at least: weights, gradients and optimizer state stay, whatever the way.

        Of what is saved for the backward a smaller micro-batch keeps its share at least.
        """
        least = 0
        for known, result in self._done:
            causes = result.peak.causes
            fixed = sum(causes.get(cause, 0) for cause in STAY)
            share = min(1.0, plan.micro_batch_tokens / known.micro_batch_tokens)
            saved = share * causes.get("saved activations", 0) if plan.recompute == known.recompute else 0
            least = max(least, int(fixed + saved))
        return least


def _with_trunk(subject: Subject, plan: Plan, work: Work, room: int) -> tuple[Plan, Simulation]:
    """The simulated plan, with the trunk streamed where it does not fit resident and may be."""
    result = simulate(subject, plan, work)
    trunk = max(peak.bytes for peak in result.phases if peak.phase == "trunk")
    if trunk <= room or plan.trunk == "streamed" or subject.recipe.trunk == "resident":
        return plan, result
    plan = plan.model_copy(update={"trunk": "streamed"})
    return plan, simulate(subject, plan, work)


def work_of(examples: Sequence[Example], plan: Plan, recipe: Recipe, chain: Chain) -> Work:
    """The steps and groups that take most: the step of the longest example, and the one with most tokens."""
    lengths = [example.length for example in examples]
    epochs = range(1 if recipe.steps else recipe.epochs)
    steps = [
        step for epoch in epochs for step in steps_of_epoch(lengths, recipe.batch_tokens, recipe.seed, epoch)
    ]
    longest = max(steps, key=lambda step: max(lengths[i] for i in step))
    fullest = max(steps, key=lambda step: sum(lengths[i] for i in step))
    evaluated = sorted(range(len(lengths)), key=lambda i: -lengths[i])[
        : max(1, plan.micro_batch_tokens // max(lengths))
    ]
    groups = _last_shard(groups_of(examples, plan.trunk_batch_tokens), plan, chain)
    wanted = evaluated if recipe.held_out or recipe.eval_data else []
    return Work(examples, groups, [longest, fullest], wanted)


def _last_shard(groups: Sequence[Group], plan: Plan, chain: Chain) -> list[Group]:
    """The longest groups that are held at once between the trunk's layers; a shorter one takes no more."""
    token_bytes = chain.width(0) * chain.handed_on(0).itemsize
    chosen: list[Group] = []
    while len(chosen) < len(groups) and sum(g.tokens for g in chosen) * token_bytes < plan.hidden_bytes:
        chosen.insert(0, groups[len(groups) - 1 - len(chosen)])
    return chosen


def assumed_examples(recipe: Recipe) -> tuple[list[Example], str]:
    """A step of examples as long as the recipe allows, the last half of each trained, and that in words."""
    length, count = recipe.max_length, max(1, recipe.batch_tokens // recipe.max_length)
    spans = (Span(0, length // 2, False), Span(length // 2, length, True))
    made = [
        Example(array("i", [3 + number]) * length, spans, Place("assumed", number + 1))
        for number in range(count)
    ]
    return made, f"every example has {length:,} tokens, half of them trained (name DATA for the true lengths)"


def _with(program: int, result: Simulation) -> tuple[Peak, ...]:
    """The peaks with the interpreter's and the libraries' own memory."""
    return tuple(
        Peak(p.phase, p.bytes + program, {"program": program, **p.causes}, p.block, p.operator)
        for p in result.phases
    )


def _why(broken: Break, program: int) -> str:
    where = f" in {broken.block}" if broken.block else ""
    shape = " x ".join(map(str, broken.shape))
    return (
        f"{broken.phase}{where}: {broken.operator.removeprefix('aten::')} of {shape} "
        f"({in_words(broken.bytes)}) makes it {in_words(broken.total + program)}"
    )


def _in_words(way: dict[str, Any]) -> str:
    recomputed = ", layers recomputed in the backward" if way["recompute"] else ""
    return f"micro-batches of {way['micro_batch_tokens']:,} tokens{recomputed}"
