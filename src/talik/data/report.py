"""The options for making examples, and the counts of rows, examples and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from talik.data.reading.rows import SHOWN, Place
from talik.data.templates.template_facts import TemplateFacts

TrainOn = Literal["assistant", "last", "all"]
TooLong = Literal["drop", "cut", "refuse"]
ControlTokens = Literal["refuse", "escape", "keep"]
CUT_KINDS = ("prompt cut", "answer cut", "end lost")  # the loss if an example is cut at the greatest length


@dataclass(slots=True)
class Counted:
    """A count, and the first ten places."""

    count: int = 0
    places: list[Place] = field(default_factory=list[Place])

    def add(self, place: Place) -> None:
        """Adds one."""
        self.count += 1
        if len(self.places) < SHOWN:
            self.places.append(place)


@dataclass(slots=True)
class Report:
    """The counts of rows, examples and tokens.

    Attributes:
        rows: Conversations and documents.
        template: A description of the chat template.
        facts: The facts about the chat template.
        examples: Examples.
        tokens: Tokens of the examples, after cutting.
        trained_tokens: Trained tokens of the examples, after cutting.
        longest: The number of tokens of the longest example, before cutting.
        too_long: Examples over the greatest length, by what a cut would lose (CUT_KINDS).
        dropped: Examples over the greatest length that were dropped.
        cut: Examples over the greatest length that were cut and lost trained tokens.
        tails_cut: Examples that only lost masked tokens after the last trained one.
        ends_added: Answers that got the tokenizer's end token, because the template writes no end of turn.
        boundary_merged: Examples with a token that covers characters of both the prompt and the answer.
        split_turns: Conversations that became several examples, because the template writes earlier answers
            differently.
        thoughts: Answers whose reasoning the template drops, or whose empty reasoning was closed.
        documents: Documents.
        pieces: The examples that the documents were split into.
        quoted: Examples with control tokens that are encoded as ordinary text.
        developers: Conversations whose developer message has become a system message.
    """

    rows: int
    template: str
    facts: TemplateFacts | None = None
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    too_long: dict[str, Counted] = field(default_factory=lambda: {kind: Counted() for kind in CUT_KINDS})
    dropped: int = 0
    cut: int = 0
    tails_cut: int = 0
    ends_added: int = 0
    boundary_merged: int = 0
    split_turns: int = 0
    thoughts: int = 0
    documents: int = 0
    pieces: int = 0
    quoted: int = 0
    developers: int = 0

    @classmethod
    def counts(cls) -> list[str]:
        """Returns the names of the attributes that are numbers."""
        others = ("template", "facts", "too_long")
        return [item.name for item in fields(cls) if item.name not in others]

    def merge(self, other: Report) -> None:
        """Adds the counts of more rows."""
        for name in (item.name for item in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "longest":
                self.longest = max(mine, theirs)
            elif isinstance(mine, int):
                setattr(self, name, mine + theirs)
        for kind, counted in other.too_long.items():
            self.too_long[kind].count += counted.count
            self.too_long[kind].places = (self.too_long[kind].places + counted.places)[:SHOWN]


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """The options for making examples: the fields of a recipe with the same names."""

    train_on: TrainOn = "assistant"
    max_length: int = 2048
    too_long: TooLong = "drop"
    control_tokens: ControlTokens = "refuse"
    train_reasoning: bool = True
