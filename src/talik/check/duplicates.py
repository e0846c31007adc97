"""Finds rows that occur twice: exactly, nearly, with another answer, or in both training and evaluation.

For each row at most 350 bytes of hashes and signatures are kept. They are compared when all rows have been
added.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from talik.check.minhash import Signatures, common_pairs, grouped, words_of
from talik.data.messages import Conversation, Document
from talik.data.preparing.held_out import draws_limit, question_draw
from talik.data.reading.rows import Place

ALIKE = 0.8  # the share of word pairs that near duplicates have in common
LEAST_WORDS = 8  # shorter rows that differ only in case and punctuation are not near duplicates
LEAST_ANSWER = 30  # characters; a shorter answer to many questions is not noted
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_REMOVE_ONE = "Remove one of them."
_COLUMNS = {
    **dict.fromkeys(("file", "line", "length"), "q"),
    **dict.fromkeys(("whole", "words", "question", "asked", "answer", "said", "numbers"), "Q"),
    "draw": "d",
    "evaluation": "b",
}


@dataclass(frozen=True, slots=True)
class Repeat:
    """A finding about a row that repeats another row or its question or answer."""

    place: Place
    kind: str
    severity: str
    text: str
    remedy: str


@dataclass(slots=True)
class Duplicates:
    """The hashes of all rows that were added, as columns.

    The columns `whole`, `question` and `answer` are hashes of the exact texts; `asked`, `said` and `words`
    are hashes of the words without case and punctuation.
    """

    seed: int = 0
    held_out: float = 0.0
    questions: Signatures = field(default_factory=Signatures)
    answers: Signatures = field(default_factory=Signatures)
    columns: dict[str, array[float]] = field(
        default_factory=lambda: {name: array(kind) for name, kind in _COLUMNS.items()}
    )
    files: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])

    def learn(self, rows: Sequence[Conversation | Document]) -> None:
        """Finds the word pairs that many rows share, from a sample of the rows."""
        parts = [_parts(row) for row in rows]
        self.questions.common = common_pairs(words_of(question) for question, _, _ in parts)
        self.answers.common = common_pairs(words_of(answer) for _, answer, _ in parts)

    def add(self, row: Conversation | Document, *, evaluation: bool = False) -> None:
        """Adds a row."""
        question, answer, rest = _parts(row)
        asked, said = words_of(question), words_of(answer)
        number = len(self.columns["file"])
        self.questions.add(number, asked)
        self.answers.add(number, said)
        place = row.place
        values = {
            "file": self.files.setdefault((place.file, place.unit), len(self.files)),
            "line": place.line,
            "length": len(answer) if len(asked) + len(said) >= LEAST_WORDS else 0,
            "whole": _hash(question, answer, rest),
            "words": _hash(" ".join(asked), " ".join(said), rest),
            "question": _hash(question.strip(), rest),
            "asked": _hash(" ".join(asked) if asked else question, rest),
            "answer": _hash(answer.strip()),
            "said": _hash(" ".join(said) if said else answer),
            "numbers": _hash(*_NUMBER.findall(question), "", *_NUMBER.findall(answer)),
            "draw": question_draw(row, self.seed) if self.held_out else 1.0,
            "evaluation": evaluation,
        }
        for name, value in values.items():
            self.columns[name].append(value)

    def repeats(self) -> Iterator[Repeat]:
        """Yields all findings; call it after the last row was added."""
        if len(self.columns["file"]):
            yield from _Comparison(self).repeats()


class _Comparison:
    """Compares all rows. A row that was reported once as a duplicate is not reported again."""

    def __init__(self, seen: Duplicates) -> None:
        self._seen = seen
        self._files = list(seen.files)
        self._of = {name: np.array(column) for name, column in seen.columns.items()}
        self._other_set = "evaluation"
        given = self._of["evaluation"].astype(bool)
        self._held = given
        if seen.held_out and not given.any():
            self._other_set = "the held-out part"
            self._held = self._of["draw"] < draws_limit(self._of["draw"].tolist(), seen.held_out)
        self._reported: set[int] = set()

    def repeats(self) -> Iterator[Repeat]:
        yield from self._exact()
        yield from self._same_words()
        yield from self._other_answers()
        yield from self._shared_questions()
        yield from self._alike()
        yield from self._one_answer()

    def _exact(self) -> Iterator[Repeat]:
        for first, row in self._groups("whole", np.flatnonzero(self._of["evaluation"] == 0)):
            self._reported.add(row)
            yield self._repeat(row, "duplicate", "problem", f"the row is the same as {self._place(first)}")

    def _same_words(self) -> Iterator[Repeat]:
        candidates = (self._of["evaluation"] == 0) & (self._of["length"] > 0)
        for first, row in self._groups("words", np.flatnonzero(candidates)):
            if row not in self._reported:
                self._reported.add(row)
                text = f"the row has the same words as {self._place(first)}"
                yield self._repeat(row, "near duplicate", "problem", text)

    def _other_answers(self) -> Iterator[Repeat]:
        asked = (self._of["evaluation"] == 0) & (self._of["question"] != np.uint64(_NO_QUESTION))
        for first, row in self._groups("question", np.flatnonzero(asked)):
            if row not in self._reported and self._of["answer"][row] != self._of["answer"][first]:
                text = f"the question has a different answer in {self._place(first)}"
                remedy = "Keep both if both answers are right."
                yield self._repeat(row, "another answer", "note", text, remedy)

    def _shared_questions(self) -> Iterator[Repeat]:
        """Yields questions in both training and evaluation; they make the evaluation loss too low."""
        of = self._of
        keys = np.where(of["question"] == _NO_QUESTION, of["said"], of["asked"])  # the text of a document
        trained: dict[int, int] = {}
        for row in np.flatnonzero(~self._held).tolist() if self._held.any() else ():
            trained.setdefault(int(keys[row]), row)
        for row in np.flatnonzero(self._held).tolist():
            first = trained.get(int(keys[row]))
            if first is not None:
                self._reported.add(row)
                yield self._leak(row, first, "problem", "the question")

    def _alike(self) -> Iterator[Repeat]:
        pairs = {*self._seen.questions.alike(ALIKE)}
        answers = {*self._seen.answers.alike(ALIKE)}
        for first, row in sorted(pairs | answers, key=lambda pair: (pair[1], pair[0])):
            if row in self._reported or first in self._reported or not self._same("numbers", first, row):
                continue
            asked = self._same("asked", first, row)
            said = self._same("said", first, row)
            if not ((asked or (first, row) in pairs) and (said or (first, row) in answers)):
                if self._held[first] != self._held[row] and (first, row) in pairs:
                    yield self._leak(row, first, "note", "a similar question")
                continue
            # Two long questions with one short answer may only be about the same text.
            severity = "problem" if asked or (first, row) in answers else "note"
            self._reported.add(row)
            if self._held[first] != self._held[row]:
                yield self._leak(row, first, severity, "nearly the same row")
            else:
                text = f"the row is nearly the same as {self._place(first)}"
                yield self._repeat(row, "near duplicate", severity, text)

    def _one_answer(self) -> Iterator[Repeat]:
        """Yields long answers that many different questions have."""
        order, starts = grouped(self._of["answer"])
        sizes = np.bincount(starts, minlength=len(order))
        least = max(10, len(order) // 200)
        for start in np.flatnonzero(sizes >= least).tolist():
            rows = order[start : start + sizes[start]]
            questions = len(np.unique(self._of["question"][rows]))
            if questions >= least and self._of["length"][rows].min() >= LEAST_ANSWER:
                text = f"{questions:,} different questions have this answer"
                remedy = "Check the source: this may be an error message or a default in place of answers."
                yield self._repeat(int(rows[0]), "one answer to many questions", "note", text, remedy)

    def _groups(self, column: str, rows: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yields (first, row) for each row with the same value in a column as an earlier row."""
        order, starts = grouped(self._of[column][rows])
        later = np.flatnonzero(starts != np.arange(len(order)))
        pairs = zip(rows[order[starts[later]]].tolist(), rows[order[later]].tolist(), strict=True)
        yield from sorted(pairs, key=lambda pair: pair[1])

    def _same(self, column: str, first: int, row: int) -> bool:
        return self._of[column][first] == self._of[column][row]

    def _place(self, row: int) -> Place:
        file, unit = self._files[int(self._of["file"][row])]
        return Place(file, int(self._of["line"][row]), "row" if unit == "row" else "line")

    def _leak(self, row: int, first: int, severity: str, what: str) -> Repeat:
        kind = f"in training and {self._other_set.removeprefix('the ').removesuffix(' part')}"
        where = "is trained on" if self._held[row] else f"is in {self._other_set}"
        text = f"{what} {where}: {self._place(first)}"
        return self._repeat(row, kind, severity, text, "Remove it from one of them.")

    def _repeat(self, row: int, kind: str, severity: str, text: str, remedy: str = _REMOVE_ONE) -> Repeat:
        return Repeat(self._place(row), kind, severity, text, remedy)


def _parts(row: Conversation | Document) -> tuple[str, str, str]:
    """Returns the question (all text before the last answer), the last answer, and all other content."""
    if isinstance(row, Document):
        return "", row.text, ""
    *before, last = row.messages
    asked = "\n".join(m.content for m in before if m.role not in ("system", "developer"))
    others = [m.content for m in before if m.role in ("system", "developer")]
    calls = [repr((m.tool_calls, m.reasoning)) for m in row.messages if m.tool_calls or m.reasoning]
    roles = "" if len(row.messages) < 3 else " ".join(m.role for m in row.messages)
    return asked, last.content, "\n".join([*others, *calls, repr(row.tools) if row.tools else "", roles])


def _hash(*parts: str) -> int:
    joined = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")


_NO_QUESTION = _hash("", "")  # the hash of a document's question
