"""Checks the texts of a row: each entry of TEXT_CHECKS finds one kind of problem."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from talik.check.encodings import misread
from talik.data.messages import Conversation, Document

Find = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class TextCheck:
    """One kind of problem in a text.

    Attributes:
        kind: The kind of problem: a few words, the same for all such rows.
        find: Returns the part of a text with the problem, or None.
        remedy: The action to take.
        severity: "problem", or "note" for text that may be intended.
        answers: True to check answers only.
        certain: Returns True for a text in which a note is certainly a problem.
    """

    kind: str
    find: Find
    remedy: str
    severity: str = "problem"
    answers: bool = False
    certain: Callable[[str], bool] = lambda text: False


def _pattern(pattern: str, flags: int = 0) -> Find:
    compiled = re.compile(pattern, flags)

    def find(text: str) -> str | None:
        found = compiled.search(text)
        return found[0] if found else None

    return find


_CODE = re.compile(r"[{}<>`=\\|$│]|\w\(|html|xml|escape|entit|转义|实体", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{2,5}|#x[0-9a-f]{2,5});", re.IGNORECASE)
_ESCAPED = re.compile(r"(?<![\\\w:/])\\n(?=[A-Z\u4e00-\u9fff\-*\d \\])|(?<=[.!?。！？])\\n")
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufefc]")
_INVISIBLE = "\u200b\u2060\ufeff\u00ad"


def _is_prose(text: str) -> bool:
    """True if a text, without its entities, is neither code nor about markup."""
    return not _CODE.search(_ENTITY.sub("", text))


def _has_no_line(text: str) -> bool:
    """True if a text has escapes in place of line breaks and contains no code."""
    return "\n" not in text and not re.search(r"[\"'`{}()=;]", text.replace("\\n", ""))


def _repeats_itself(text: str) -> str | None:
    """Returns the start of a text that repeats a few words, like the output of a model that does not stop."""
    words = text.split()
    if len(words) < 60 or len(set(words)) * 12 > len(words):
        return None
    return " ".join(words[:8]) if any(word.isalpha() for word in words) else None


_WRITE = "Write the answer, or remove the row."
TEXT_CHECKS = (
    TextCheck("wrong encoding", misread, "Read the source again in its own encoding."),
    TextCheck("replacement character", _pattern("\ufffd+"), "Characters were lost: get the text again."),
    TextCheck("NUL character", _pattern("\0"), "Remove it."),
    TextCheck(
        "control character",
        _pattern(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]"),
        "Remove it: it was not typed, and a model would learn to write it.",
    ),
    TextCheck(
        "text direction",
        _pattern("[\u202a-\u202e\u2066-\u2069]"),
        "Remove the direction marks: the text is shown in another order than it is trained.",
        "note",
        certain=lambda text: not _RIGHT_TO_LEFT.search(text),
    ),
    TextCheck(
        "HTML entity", _pattern(_ENTITY.pattern, re.I), "Unescape the text once.", "note", certain=_is_prose
    ),
    TextCheck(
        "HTML tag",
        _pattern(r"</?(?:p|br|div|span|ul|li|td|tr|font)(?:\s[^<>]*)?/?>", re.I),
        "Remove the tags if they are not intended.",
        "note",
    ),
    TextCheck(
        "escaped line break",
        _pattern(_ESCAPED.pattern),
        "The text contains a backslash and an n: decode it once more.",
        "note",
        certain=_has_no_line,
    ),
    TextCheck(
        "zero-width character",
        _pattern(f"[{_INVISIBLE}]"),
        "Remove it: it is invisible and changes the tokens.",
        "note",
        certain=lambda text: re.search(f"[a-zA-Z][{_INVISIBLE[:3]}][a-zA-Z]", text) is not None,
    ),
    TextCheck(
        "private character",
        _pattern("[\ue000-\uf8ff]"),
        "Replace it: it has a meaning in one font only.",
        "note",
    ),
    TextCheck(
        "placeholder",
        _pattern(
            r"\A\W*(?:todo|tbd|fixme|lorem ipsum\b.*|xxx+)\W*\Z|\A\s*(?:\.{2,}|…+|-+|_+)\s*\Z", re.I | re.S
        ),
        _WRITE,
        answers=True,
    ),
    TextCheck("missing value", _pattern(r"\A\s*(?:n/a|null|nan|#n/a)\.?\s*\Z", re.I), _WRITE, answers=True),
    TextCheck(
        "missing value", _pattern(r"\A\s*(?:none|undefined|nil)\.?\s*\Z", re.I), _WRITE, "note", answers=True
    ),
    TextCheck("answer is one sign", _pattern(r"\A\s*[^\w\s]\s*\Z"), _WRITE, "note", answers=True),
    TextCheck(
        "answer is only a link",
        _pattern(r"\A\s*(?:https?://|www\.)\S+\s*\Z"),
        "Write the content of the page, or remove the row: a model would learn to invent links.",
        "note",
        answers=True,
    ),
    TextCheck(
        "unfilled template",
        _pattern(
            r"\{\{\s*\w+\s*\}\}|<(?:your|insert)[ _][^<>]{1,40}>|\[(?:your|insert) [^\[\]]{1,40}\]", re.I
        ),
        "Fill it in, or remove the row.",
        "note",
    ),
    TextCheck(
        "unfilled template",
        lambda text: (
            found[0]
            if (found := re.search(r"(?<![\w$\\{}#^_])\{[a-z_]{3,30}\}(?!\})", text))
            and len(text) < 2000
            and not re.search(r"[<>`=\\|$^]|\w\(", text)
            else None
        ),
        "Fill it in, or remove the row.",
        "note",
    ),
    TextCheck(
        "refusal",
        _pattern(
            r"\bas an? (?:AI|artificial intelligence)(?: language)? (?:model|assistant)\b"
            r"|作为一个?(?:AI|人工智能)(?:语言)?(?:模型|助手)",
            re.I,
        ),
        "The model learns to answer like this: keep such rows only if that is intended.",
        "note",
        answers=True,
    ),
    TextCheck(
        "repeats itself", _repeats_itself, "Remove the row, or shorten the answer.", "note", answers=True
    ),
    TextCheck(
        "media placeholder", _pattern(r"<(?:image|video|audio)>"), "Talik trains text only: remove it."
    ),
)
# Turn marks in the templates of other models.
FOREIGN_MARKS = re.compile(
    r"<\|(?:im_start|im_end|endoftext|begin_of_text|eot_id|start_header_id|end_header_id|eom_id|end|user|"
    r"assistant|system|channel|message)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<｜(?:User|Assistant)｜>"
    r"|^### ?(?:Human|Assistant)\s*:",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class TextProblem:
    """A problem in a text of a row; `field` is the name of the text."""

    field: str
    kind: str
    text: str
    remedy: str
    severity: str


def text_problems(row: Conversation | Document) -> Iterator[TextProblem]:
    """Yields the problems in the texts of a row, each kind once for each text."""
    for field, text, is_answer in texts_with_roles(row):
        for check in TEXT_CHECKS:
            found = check.find(text) if is_answer or not check.answers else None
            if found is not None:
                severity = "problem" if check.severity == "problem" or check.certain(text) else "note"
                shown = f"contains {_shown(found)}"
                yield TextProblem(field, check.kind, shown, check.remedy, severity)
    if isinstance(row, Conversation):
        yield from _answer_problems(row)


def texts_with_roles(row: Conversation | Document) -> Iterator[tuple[str, str, bool]]:
    """Yields the name of each text of a row, the text, and True for an answer."""
    if isinstance(row, Document):
        yield "text", row.text, False
        return
    for number, message in enumerate(row.messages, start=1):
        yield f"message {number} ({message.role})", message.content, message.role == "assistant"
        if message.reasoning:
            yield f"the reasoning of message {number}", message.reasoning, False


def _shown(part: str) -> str:
    """Quotes a part of a text, cut to 50 characters, with invisible characters escaped."""
    shown = ascii(part) if not part.isprintable() else repr(part)
    return shown if len(shown) <= 50 else f"{shown[:47]}..."


def _answer_problems(row: Conversation) -> Iterator[TextProblem]:
    """Yields the answers that repeat their question."""
    for number, (before, message) in enumerate(zip(row.messages, row.messages[1:], strict=False), start=2):
        same = _normalised(before.content) == _normalised(message.content)
        if message.role == "assistant" and before.role == "user" and same and len(message.content) > 15:
            field = f"message {number} (assistant)"
            yield TextProblem(field, "answer repeats the question", "repeats the question", _WRITE, "problem")


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())
