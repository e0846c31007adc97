"""A run as one validated object. Every option, its default and its help are declared here, once.

The command line, recipe.yaml and docs/recipe.md derive from these fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from talik.base.errors import RecipeError, UsageError, numbered_list
from talik.recipe.aliases import own_names, why_unknown
from talik.recipe.data_source import DataSources
from talik.recipe.lora import parse_lora
from talik.recipe.thaw import PARTS, Thawed, check_thaw, parse_thaw

_ADAM = ("adamw", "adamw-8bit", "muon")
READ_BY = {
    **dict.fromkeys(("beta1", "beta2", "epsilon"), _ADAM),
    "momentum": ("sgd",),
}  # fields that only some optimizers read


class Recipe(BaseModel):
    """What is trained, on what, and how. Recipe and plan together determine the result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        description="a folder, a Hugging Face id, modelscope:ORG/NAME or a .gguf file", min_length=1
    )
    data: DataSources = Field(
        description="rows: files, folders, globs, - (standard input), hf:ORG/NAME or modelscope:ORG/NAME; in "
        "recipe.yaml also with weight, limit, format, input_field and output_field for each",
        min_length=1,
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")

    input_field: str | None = Field(
        default=None, description="the field that holds the input, in rows of your own"
    )
    output_field: str | None = Field(default=None, description="the field that holds the output")
    format: str | None = Field(
        default=None, description="the data format of the rows, in place of the recognised one"
    )
    bad_rows: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="what happens to rows that cannot be used: name them all and stop, or leave them out, "
        "counted, with the reasons in the run's rejected.jsonl",
    )
    drop_media: bool = Field(
        default=False,
        description="leave out rows with pictures, video or sound, counted",
    )
    control_tokens: Literal["refuse", "escape", "keep"] = Field(
        default="refuse",
        description="what happens to control tokens in the text of a row: refuse it, train them as ordinary "
        "text, or keep them as control tokens",
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        default="assistant", description="every assistant turn, the last one only, or every token"
    )
    train_reasoning: bool = Field(default=True, description="also train the reasoning of answers")
    max_length: int = Field(default=2048, ge=2, description="longest example, in tokens")
    too_long: Literal["drop", "cut", "refuse"] = Field(
        default="drop", description="what happens to longer examples; they are counted and shown in any case"
    )
    eval_data: DataSources | None = Field(
        default=None, description="rows to evaluate on, named like DATA; each source is reported separately"
    )
    held_out: float = Field(
        default=0.0,
        ge=0,
        description="questions in DATA held out for evaluation: a share below 1, or a whole number of them",
    )

    top_layers: int = Field(default=5, ge=1, description="train the last N layers and the final norm")
    thaw: str | None = Field(
        default=None,
        description="train these in place of the last N layers: all, layers.20-27, layers.3, top.5, norm, "
        "head or embeddings, several separated by commas; a tied head without the embeddings is untied",
    )
    lora: str | None = Field(
        default=None,
        description="train adapters on these layers in place of their weights: rank=16, then separated by "
        "commas alpha=32 (default: twice the rank), targets=all or q_proj+v_proj, dropout=0.05, dora",
    )
    precision: Literal["bf16", "bf16-sr", "fp32"] = Field(
        default="bf16",
        description="bf16 with fp32 masters; bf16 alone with stochastic rounding; fp32 throughout",
    )

    epochs: int = Field(default=2, ge=1, description="passes over the data")
    steps: int | None = Field(
        default=None, ge=1, description="stop after this many steps, in place of --epochs"
    )
    batch_tokens: int = Field(
        default=4096, ge=1, description="tokens of one step, at most (one example, at least)"
    )
    optimizer: Literal["adamw", "adamw-8bit", "adafactor", "muon", "sgd"] = Field(
        default="adamw",
        description="optimizer; muon updates the matrices of the layers, and AdamW the rest",
    )
    learning_rate: float = Field(default=5e-5, gt=0, lt=1, description="highest learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="learning-rate schedule after the warm-up"
    )
    warmup: float = Field(
        default=0.05, ge=0, le=1, description="share of the steps in which the learning rate rises from 0"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW: decay of the mean gradient")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW: decay of the mean squared gradient")
    epsilon: float = Field(default=1e-8, gt=0, description="AdamW: added to the denominator")
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="SGD: decay of the sum of gradients; 0: none"
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="decoupled weight decay of matrices; vectors are not decayed"
    )
    clip: Annotated[float, Field(ge=0)] | Literal["last"] = Field(
        default=1.0,
        description="largest norm of the gradient; 0 turns clipping off; last: clips to 1.0 by the previous "
        "step's norm, so that gradients need not be held until the global norm is known",
    )

    shuffle: Literal["seed", "file"] = Field(
        default="seed",
        description="order of the examples in an epoch: shuffled by the seed, or as in the data (curriculum)",
    )
    eval_every: int = Field(
        default=0, ge=0, description="evaluate every N steps; 0: at the end of every epoch"
    )
    save_every: int = Field(default=0, ge=0, description="save every N steps; 0: at the end of every epoch")
    keep: int = Field(default=1, ge=1, description="newest checkpoints to keep, in addition to the best one")
    early_stop: int = Field(
        default=0, ge=0, description="stop after N evaluations without a better loss; 0: never"
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="seed of the order, dropout, stochastic rounding and new adapters",
    )
    trunk: Literal["auto", "resident", "streamed"] = Field(
        default="auto",
        description="where the frozen weights are held while they run: in memory, or read from the files one "
        "layer at a time; the numbers are the same",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps, ...")
    cache: str | None = Field(
        default=None, description="folder of the cached hidden states; default: Talik's own"
    )
    cache_gb: float = Field(
        default=0.0,
        ge=0,
        description="largest size of all caches in that folder, in GB; the least recently used are deleted "
        "first; 0: no limit",
    )

    @property
    def max_norm(self) -> float:
        """The largest norm of the gradient; larger ones are clipped."""
        return 1.0 if self.clip == "last" else self.clip

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, given: Any) -> Any:
        return own_names(cast(dict[str, Any], given)) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        """Reports all contradictions between fields at once; each field by itself has been checked before."""
        wrong = [*self._wrong_evaluation(), *self._wrong_optimizer()]
        if (self.input_field is None) != (self.output_field is None):
            wrong.append("input_field and output_field go together: name both or neither")
        if self.thaw is not None:
            wrong += self._wrong_thaw(self.thaw)
        if self.lora is not None:
            wrong += self._wrong_lora(self.lora)
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    def _wrong_evaluation(self) -> Iterator[str]:
        if self.held_out > 1 and self.held_out % 1:
            yield "held_out is a share below 1 or a whole number of questions"
        if self.eval_data and self.held_out:
            yield "eval_data and held_out are two ways to evaluate: name one"
        if not (self.eval_data or self.held_out):
            for field in ("early_stop", "eval_every"):
                if getattr(self, field):
                    yield f"{field} needs something to evaluate on: name eval_data or held_out"

    def _wrong_optimizer(self) -> Iterator[str]:
        for field, readers in READ_BY.items():
            changed = getattr(self, field) != Recipe.model_fields[field].default
            if changed and self.optimizer not in readers:
                yield f"{field} is read by {', '.join(readers)} alone, not by {self.optimizer}: leave it out"

    def _wrong_thaw(self, line: str) -> Iterator[str]:
        if self.top_layers != Recipe.model_fields["top_layers"].default:
            yield "top_layers and thaw are two ways to say what is trained: name one"
        try:
            check_thaw(line)
        except UsageError as error:
            yield error.problem

    def _wrong_lora(self, line: str) -> Iterator[str]:
        named = [part.strip() for part in (self.thaw or "").split(",")]
        if parts := [part for part in named if part in PARTS]:
            yield f"lora puts adapters on layers; it cannot be combined with {', '.join(parts)} in thaw"
        try:
            parse_lora(line)
        except UsageError as error:
            yield error.problem

    def thawed(self, layers: int) -> Thawed:
        """The parts that are trained in a model with so many layers; with adapters, the adapted layers.

        Raises:
            UsageError: The recipe names layers that the model does not have.
        """
        wanted = parse_thaw(self.thaw or f"top.{self.top_layers},norm", layers)
        return wanted if self.lora is None else replace(wanted, parts=frozenset())


def checked_recipe(given: dict[str, Any], where: object = None) -> Recipe:
    """Makes a recipe of unchecked fields.

    Args:
        given: The fields.
        where: The file that they come from, for the error.

    Raises:
        RecipeError: Fields are wrong; all of them are named.
    """
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        raise RecipeError(
            numbered_list(_sentences(error)),
            where=where,
            remedy="`talik train --help` lists every field with its default.",
        ) from None


def _sentences(error: ValidationError) -> list[str]:
    """One sentence for each wrong field. pydantic reports a field of several types once for each type."""
    problems: dict[str, list[str]] = {}
    contradictions: list[str] = []
    for problem in error.errors():
        if not problem["loc"]:
            contradictions += problem["msg"].removeprefix("Value error, ").splitlines()
            continue
        field = ".".join(str(part) for part in problem["loc"] if not re.search(r"[-\[]", str(part)))
        problems.setdefault(field, []).append(_sentence(field, problem))
    fields = [" or ".join([first, *map(_expected, rest)]) for first, *rest in problems.values()]
    return fields + contradictions


def _sentence(field: str, problem: Any) -> str:
    if problem["type"] == "missing":
        return f"{field}: is missing"
    if problem["type"] == "extra_forbidden":
        return f"{field}: {why_unknown(field)}"
    return f"{field}: {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _expected(sentence: str) -> str:
    return sentence.rpartition("input should be ")[2]


def check_layers(recipe: Recipe, layers: int) -> None:
    """Raises UsageError if the recipe trains layers that the model does not have."""
    if recipe.thaw is None and recipe.top_layers > layers:
        raise UsageError(
            f"top_layers is {recipe.top_layers}, and {recipe.model} has {layers} layers",
            remedy=f"Choose --top-layers between 1 and {layers}.",
        )
    recipe.thawed(layers)
