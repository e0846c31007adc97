"""Renders the result of `talik check` as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from talik.check.result import Check, Group
from talik.data.preview import length_histogram
from talik.data.reading.rows import visible
from talik.data.report import CUT_KINDS

SHOWN = 10  # findings of each kind


def check_text(check: Check) -> str:
    """Renders all kinds of findings with their first places, problems first, and the statistics."""
    lines = [summary(check)]
    for group in check.groups():
        lines += ["", *_group_lines(group)]
    lines += ["", *(f"{name}: {value}" for name, value in numbers(check))]
    return "\n".join([*lines, "", length_histogram(check.statistics.lengths)])


def summary(check: Check) -> str:
    """Returns the numbers of rows, problems and notes in one line."""
    problems = _counted(check.problems, "problem") if check.problems else "no problem"
    return f"{_counted(check.rows, 'row')}: {problems}, {_counted(check.notes, 'note')}"


def numbers(check: Check) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each statistic."""
    counted = check.statistics.as_dict()
    yield "examples", f"{counted['examples']:,}"
    yield "tokens", f"{counted['tokens']:,}, {100 * counted['trained_share']:.1f} % of them trained"
    yield from ((f"at --max-length {length:,}", text) for length, text in cuts(check))
    yield "messages by role", ", ".join(f"{role} {n:,}" for role, n in counted["roles"].items())
    turns = counted["answers_in_a_conversation"].items()
    if turns:
        yield "answers in a conversation", ", ".join(f"{n} ({count:,} x)" for n, count in turns)
    if counted["answers_without_an_end_mark"]:
        yield "long answers that end without a mark", f"{counted['answers_without_an_end_mark']:,}"
    shares = ((name, 100 * share) for name, share in counted["scripts"].items() if share >= 0.0005)
    yield "letters by script", ", ".join(f"{name} {share:.1f} %" for name, share in shares)
    for name, count in counted["question_and_answer_scripts"].items():
        asked, _, said = name.partition(" - ")
        yield f"questions in {asked} with answers in {said}", f"{count:,}"
    yield from ((f"tokens of {name}", known_in_words(known)) for name, known in counted["tokenizer"].items())
    if check.unread:
        yield "fields not used", ", ".join(f"{visible(n)} ({c:,} rows)" for n, c in check.unread.items())
    if check.media:
        yield "rows with pictures, video or sound", f"{check.media:,}, left out (--drop-media)"
    yield from (("template", line) for line in check.facts)
    yield from (("plan", line) for line in check.plan)


def cuts(check: Check) -> Iterator[tuple[int, str]]:
    """Yields each length that some examples exceed, and what a cut there would lose."""
    meant = dict(
        zip(CUT_KINDS, ("lose all of the answer", "lose a part of it", "lose the end of turn"), strict=True)
    )
    for length, counted in check.statistics.cuts.items():
        if counted:
            lost = [f"{counted[kind]:,} {words}" for kind, words in meant.items() if counted[kind]]
            nothing = [f"{counted['tail cut']:,} lose nothing"] if counted["tail cut"] else []
            yield length, f"{sum(counted.values()):,} examples are longer: {', '.join([*lost, *nothing])}"


def known_in_words(known: dict[str, float]) -> str:
    """Describes how a tokenizer encodes a script."""
    words = [f"{known['bytes_per_token']:.1f} bytes each"]
    if known["single_byte_share"] >= 0.001:
        words.append(f"{100 * known['single_byte_share']:.1f} % are parts of a character")
    if known["unknown_share"]:
        words.append(f"{100 * known['unknown_share']:.2f} % are unknown")
    return ", ".join(words)


def _group_lines(group: Group) -> Iterator[str]:
    yield f"{group.severity}: {group.kind} ({group.count:,})"
    for one in group.findings[:SHOWN]:
        yield f"  {visible(one.place)}: {visible(one.text)}"
    if group.count > SHOWN:
        yield f"  and {group.count - SHOWN:,} more: --json and --html list up to 2,000 of a kind"
    for remedy in dict.fromkeys(one.remedy for one in group.findings[:3]):
        yield f"  -> {remedy}"


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"
