"""Counts of what became of the rows, and the options that decide it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from talik.data.reading.rows import SHOWN, Place
from talik.data.templates.template_facts import Facts

TrainOn = Literal["assistant", "last", "all"]
TooLong = Literal["drop", "cut", "refuse"]
ControlTokens = Literal["refuse", "escape", "keep"]
KINDS = ("prompt cut", "answer cut", "end lost")


@dataclass(slots=True)
class Counted:
    """How many, and the places of the first ten."""

    count: int = 0
    places: list[Place] = field(default_factory=list)

    def add(self, place: Place) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.places) < SHOWN:
            self.places.append(place)


@dataclass(slots=True)
class Report:
    """Counts of what became of the rows; `longest` is counted before anything is cut, the tokens after.

    Attributes:
        rows: Conversations and documents.
        template: The chat template in words, and `facts` about it.
        too_long: Examples over the greatest length, by what a cut would lose.
        tails_cut: Examples over it only by masked tokens after the last trained one: nothing is lost.
        ends_added: Answers that got the tokenizer's end token, because the template writes no end of turn.
        boundary_merged: Examples with a token that covers characters of the prompt and of the answer.
        split_turns: Conversations that became several examples, because the template writes earlier answers
            in another way.
        thoughts: Answers whose reasoning the template drops or whose empty thought was closed.
        documents: Documents; `pieces` are the examples that they were split into.
        quoted: Examples in which control tokens are quoted as ordinary text.
        developers: Conversations whose developer message has become a system message.
    """

    rows: int
    template: str
    facts: Facts | None = None
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    too_long: dict[str, Counted] = field(default_factory=lambda: {kind: Counted() for kind in KINDS})
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
        """The names of the attributes that are numbers."""
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
    """How examples are made of conversations; the fields of a Recipe of the same names."""

    train_on: TrainOn = "assistant"
    max_length: int = 2048
    too_long: TooLong = "drop"
    control_tokens: ControlTokens = "refuse"
    train_reasoning: bool = True
