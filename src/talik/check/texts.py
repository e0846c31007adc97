"""Checks of the texts of a row: each entry of TEXT_CHECKS finds one kind of problem."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from talik.data.messages import Conversation, Document


@dataclass(frozen=True, slots=True)
class TextCheck:
    """One kind of problem in a text.

    Attributes:
        kind: A few words, the same for all such rows.
        find: Gives the part of a text that is wrong, or None.
        remedy: What to do.
        severity: "problem", or "note" for what may well be meant.
        answers: Whether only answers are looked at.
    """

    kind: str
    find: Callable[[str], str | None]
    remedy: str
    severity: str = "problem"
    answers: bool = False


def _pattern(pattern: str, flags: int = 0) -> Callable[[str], str | None]:
    compiled = re.compile(pattern, flags)

    def find(text: str) -> str | None:
        found = compiled.search(text)
        return found[0] if found else None

    return find


# UTF-8 that was read as Windows-1252: a capital A with a mark, and a sign that hardly ever follows it.
_MOJIBAKE = (
    r"[ÃÂ][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
    r"|â€[\u0080-\u00bf™œž“”˜¦]|ï»¿|å[\u0080-\u00bf][\u0080-\u00bf]"
)
TEXT_CHECKS = (
    TextCheck("wrong encoding", _pattern(_MOJIBAKE), "Read the source again in its own encoding."),
    TextCheck("replacement character", _pattern("\ufffd+"), "Characters were lost: get the text again."),
    TextCheck("NUL character", _pattern("\0"), "Remove it."),
    TextCheck(
        "control character",
        _pattern(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]"),
        "Remove it: nobody types these, and a model would learn to write them.",
    ),
    TextCheck(
        "text direction",
        _pattern("[\u202a-\u202e\u2066-\u2069]"),
        "Remove the marks of direction: they show another text than is trained.",
    ),
    TextCheck(
        "HTML entity",
        _pattern(r"&(?:amp|lt|gt|quot|nbsp|#\d{2,5});", re.I),
        "Unescape the text once.",
        "note",
    ),
    TextCheck(
        "HTML tag",
        _pattern(r"</?(?:p|br|div|span|b|ul|li|td|tr)(?:\s[^<>]*)?/?>", re.I),
        "Remove the tags if they are not meant.",
        "note",
    ),
    TextCheck(
        "escaped line break",
        _pattern(r"(?<![\\\w:/])\\n(?=[A-Z\u4e00-\u9fff\-*\d ])"),
        "The text holds backslash and n: decode it once more.",
        "note",
    ),
    TextCheck(
        "zero-width character",
        _pattern("[\u200b\u2060\ufeff]"),
        "Remove it: it changes the tokens and cannot be seen.",
        "note",
    ),
    TextCheck(
        "placeholder",
        _pattern(
            r"\A\s*(?:todo|tbd|n/?a|null|none|nan|undefined|lorem ipsum.*|\.{2,}|-+|\?+|xxx+)\s*\Z",
            re.I | re.S,
        ),
        "Write the answer, or take the row out.",
        answers=True,
    ),
    TextCheck(
        "unfilled template",
        _pattern(
            r"\{\{\s*\w+\s*\}\}|<(?:your|insert)[ _][^<>]{1,40}>|\[(?:your|insert) [^\[\]]{1,40}\]", re.I
        ),
        "Fill it in, or take the row out.",
        "note",
    ),
    TextCheck(
        "refusal",
        _pattern(r"\bas an ai (?:language )?model\b|作为一个?(?:AI|人工智能)(?:语言)?(?:模型|助手)", re.I),
        "The model learns to answer like this: keep such rows only if that is meant.",
        "note",
        answers=True,
    ),
    TextCheck(
        "media placeholder", _pattern(r"<(?:image|video|audio)>"), "Talik trains text only: take it out."
    ),
)


@dataclass(frozen=True, slots=True)
class TextProblem:
    """A problem in a text of a row; `field` names the text."""

    field: str
    kind: str
    text: str
    remedy: str
    severity: str


def text_problems(row: Conversation | Document) -> Iterator[TextProblem]:
    """The problems in the texts of a row, each kind once for each text."""
    for field, text, is_answer in _texts(row):
        for check in TEXT_CHECKS:
            found = check.find(text) if is_answer or not check.answers else None
            if found is not None:
                shown = found if len(found) <= 40 else f"{found[:37]}..."
                yield TextProblem(field, check.kind, f"{field} holds {shown!r}", check.remedy, check.severity)
    if isinstance(row, Conversation):
        yield from _answer_problems(row)


def _texts(row: Conversation | Document) -> Iterator[tuple[str, str, bool]]:
    if isinstance(row, Document):
        yield "text", row.text, False
        return
    for number, message in enumerate(row.messages, start=1):
        yield f"message {number} ({message.role})", message.content, message.role == "assistant"
        if message.reasoning:
            yield f"the reasoning of message {number}", message.reasoning, True


def _answer_problems(row: Conversation) -> Iterator[TextProblem]:
    """Answers that repeat the question."""
    for number, (before, message) in enumerate(zip(row.messages, row.messages[1:], strict=False), start=2):
        same = normalised(before.content) == normalised(message.content)
        if message.role == "assistant" and before.role == "user" and same and len(message.content) > 15:
            field = f"message {number} (assistant)"
            remedy = "Write the answer, or take the row out."
            yield TextProblem(
                field, "answer repeats the question", f"{field} is the question again", remedy, "problem"
            )


def normalised(text: str) -> str:
    """A text without case, and with one blank between words."""
    return " ".join(text.casefold().split())
