"""Single changes of a recipe that make a run fit, each simulated; and the most layers that fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from talik.base.errors import DoesNotFitError
from talik.base.events import Notify, Status, silent
from talik.data.examples import Example
from talik.data.preparing.stored_examples import lengths_of, not_longer
from talik.model.folder import ModelFolder
from talik.plan.planned import Change, Planned
from talik.plan.search import KEPT_CAUSES, Search, in_mebibytes
from talik.plan.target import Target
from talik.plan.ways import ways_of
from talik.recipe.recipe import Recipe
from talik.recipe.thaw import Thawed, parse_thaw
from talik.simulate.account import highest
from talik.simulate.simulation import subject_of
from talik.simulate.work import assumed_examples

LIGHTER = {"fp32": "bf16", "bf16": "bf16-sr"}
SHORTEST = 64  # tokens of an example; smaller maximum lengths are not proposed


def smallest_changes(
    planned: Planned,
    recipe: Recipe,
    model: ModelFolder,
    sets: tuple[Sequence[Example] | None, Sequence[Example]],
    notify: Notify = silent,
) -> tuple[Change, ...]:
    """Finds single changes that would make a refused run fit: more memory, fewer layers, less precision, ...

    Each change is simulated by itself, in the way that takes the least memory. If host RAM or disk
    are too small, the changes say how much is needed.
    """
    target, others = planned.target, _other_memory(planned)
    if planned.breaks is None:
        return (Change(others, planned.peak.bytes),)
    thrift = ThriftiestWay(model, sets, target, notify)
    changes = [_more_memory(target, min(planned.peak.bytes, thrift.peak(recipe)), others)]
    if others or (target.on_cpu and target.program > target.most):  # no other single change would be enough
        return tuple(changes)
    wanted = recipe.thawed(planned.plan.layers)
    if layers := thrift.most_layers(recipe, replace(wanted, layers=wanted.layers[1:])):
        fewer = with_layers(recipe, wanted, layers)
        changes.append(Change(_option(fewer), thrift.peak(fewer)))
    for options, changed, note in _candidates(recipe, wanted, sets[0]):
        if _least(planned, recipe, changed) > target.most:
            continue
        if (peak := thrift.peak(changed)) <= target.most:
            changes.append(Change(options, peak, note))
    return tuple(changes)


def _other_memory(planned: Planned) -> str:
    """Options for host RAM and disk, if there is too little of them."""
    ram = planned.ram_bytes if planned.ram_missing else 0
    disk = planned.disk_bytes if planned.disk_missing else 0
    sizes = {"--ram": ram, "--disk": disk}
    return " ".join(f"{name} {in_mebibytes(size)}" for name, size in sizes.items() if size)


def _more_memory(target: Target, peak: int, others: str) -> Change:
    needed = target.needed(peak)
    note = "more than the machine has" if needed > target.machine.memory else ""
    return Change(f"--memory {in_mebibytes(needed)} {others}".rstrip(), peak, note)


def _least(planned: Planned, recipe: Recipe, changed: Recipe) -> int:
    """A lower bound in bytes for a changed recipe, from the causes that it shares with the refused plan."""
    causes = planned.peak.causes
    fixed = sum(causes.get(cause, 0) for cause in (*KEPT_CAUSES, "program"))
    if (changed.thaw, changed.optimizer) != (recipe.thaw, recipe.optimizer):
        return 0
    if recipe.precision == "fp32" != changed.precision:
        return 0
    without_masters = changed.precision == "bf16-sr" != recipe.precision
    masters = min(
        causes.get("optimizer state", 0), 2 * causes.get("weights trained", 0)
    )  # 4 bytes for each 2
    return fixed - (masters if without_masters else 0)


def _candidates(
    recipe: Recipe, wanted: Thawed, examples: Sequence[Example] | None
) -> Iterator[tuple[str, Recipe, str]]:
    """Changed recipes: the options, the recipe, and the effect on the data."""
    if lighter := LIGHTER.get(recipe.precision):
        yield f"--precision {lighter}", _with(recipe, precision=lighter), ""
    if recipe.trunk == "resident":
        yield "--trunk streamed", _with(recipe, trunk="streamed"), ""
    if recipe.optimizer == "adamw":
        yield "--optimizer adamw-8bit", _with(recipe, optimizer="adamw-8bit"), ""
    if "head" in wanted.parts and (wanted.layers or len(wanted.parts) > 1):
        without = _with(recipe, thaw=str(replace(wanted, parts=wanted.parts - {"head"})))
        yield _option(without), without, "without the head"
    longest = recipe.max_length if examples is None else max(lengths_of(examples))
    shorter = 1 << (longest - 1).bit_length() - 1  # the next power of two below
    if shorter >= SHORTEST:
        note = ""
        if examples is not None:
            dropped = sum(length > shorter for length in lengths_of(examples))
            note = f"{dropped:,} of {len(examples):,} examples are longer"
            if dropped == len(examples):
                return
        yield f"--max-length {shorter}", _with(recipe, max_length=shorter), note


def _with(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.model_copy(update=changes)


def with_layers(recipe: Recipe, wanted: Thawed, layers: int) -> Recipe:
    """The recipe with only the highest `layers` of its trained layers, and the same other parts."""
    if recipe.thaw is None:
        return _with(recipe, top_layers=layers)
    return _with(recipe, thaw=str(replace(wanted, layers=wanted.layers[-layers:])))


def _option(recipe: Recipe) -> str:
    """The command-line option that selects the trained layers and parts of a recipe."""
    return f"--top-layers {recipe.top_layers}" if recipe.thaw is None else f"--thaw {recipe.thaw}"


class ThriftiestWay:
    """Simulates recipes in the way that takes the least memory, with or without `streamed` ways."""

    def __init__(
        self,
        model: ModelFolder,
        sets: tuple[Sequence[Example] | None, Sequence[Example]],
        target: Target,
        notify: Notify = silent,
        *,
        streamed: bool = True,
    ) -> None:
        self._model, self._sets, self._target, self._notify = model, sets, target, notify
        self._streamed = streamed
        self._peaks: dict[str, int] = {}

    def peak(self, recipe: Recipe) -> int:
        """The planned peak of a recipe in bytes, for the examples within its maximum length."""
        key = recipe.model_dump_json()
        if key not in self._peaks:
            self._notify(Status("plan", f"simulating {_in_words(recipe)}"))
            examples, evaluated = self._examples(recipe)
            search = Search(subject_of(recipe, self._model), examples, evaluated, self._target)
            way = ways_of(search.first, search.longest, streamed=self._streamed)[-1]
            attempt = search.simulate_plan(way.apply(search.first))
            phases, _ = self._target.now().account(attempt.simulation)  # planning itself has taken memory
            self._peaks[key] = highest(phases).bytes
        return self._peaks[key]

    def _examples(self, recipe: Recipe) -> tuple[Sequence[Example], Sequence[Example]]:
        examples, evaluated = self._sets
        if examples is None:
            examples, _ = assumed_examples(recipe)
            evaluated = examples if recipe.held_out or recipe.eval_data else ()
        return not_longer(examples, recipe.max_length), not_longer(evaluated, recipe.max_length)

    def most_layers(self, recipe: Recipe, wanted: Thawed) -> int:
        """The largest number of the highest layers of `wanted` that fit; 0 if not even one fits.

        The number is guessed from the difference between two and three layers, then corrected by simulation:
        the last layer takes less than the others, because it is run at trained positions only.
        """

        def peak(layers: int) -> int:
            return self.peak(with_layers(recipe, wanted, layers))

        def fits(layers: int) -> bool:
            return peak(layers) <= self._target.most

        most = len(wanted.layers)
        for layers in (1, 2, 3):
            if layers > most or not fits(layers):
                return layers - 1
        step, room = max(1, peak(3) - peak(2)), self._target.most - peak(2)
        guess = min(most, max(3, 2 + room // step))
        while not fits(guess):
            guess -= 1
        # One more is tried unless the difference between layers rules it out.
        while guess < most and (guess - 1) * step < room + step // 2 and fits(guess + 1):
            guess += 1
        return guess


def most_layers(
    recipe: Recipe,
    model: ModelFolder,
    sets: tuple[Sequence[Example] | None, Sequence[Example]],
    target: Target,
    notify: Notify = silent,
) -> int:
    """The largest number of top layers that fit a target in memory; streamed if not even one fits.

    Raises:
        DoesNotFitError: One streamed layer does not fit either.
    """
    every = model.layers
    for streamed in (False, True):
        thrift = ThriftiestWay(model, sets, target, notify, streamed=streamed)
        if found := thrift.most_layers(recipe, parse_thaw(f"top.{every}", every)):
            break
    else:
        raise DoesNotFitError("not even one layer fits", remedy="Give it more memory (--memory).")
    return found


def _in_words(recipe: Recipe) -> str:
    what = recipe.thaw or f"top.{recipe.top_layers}"
    return (
        f"{what} in {recipe.precision} by {recipe.optimizer}, examples of up to "
        f"{recipe.max_length:,} tokens, the way that takes least"
    )
