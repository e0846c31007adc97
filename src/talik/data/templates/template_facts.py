"""Facts about a chat template, found by rendering small conversations with it.

They are shown by `talik preview`, kept in the run folder, and used where a conversation is rendered: how an
answer ends, and which token or text stops the model afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from talik.data.messages import Message, ToolCall
from talik.data.templates.template import Template, asks_for_today, template_of

Q1, A1, Q2, A2, Q3 = "talikq1", "talika1", "talikq2", "talika2", "talikq3"
_TOOL = {
    "type": "function",
    "function": {"name": "taliktool", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a chat template does.

    Attributes:
        generation_prompt: The text after the last message with which it asks for an answer; "" where it adds
            none.
        answer_header: The text that the model is asked to write before an answer, such as a channel's name.
        ends: The tokens and texts that end an answer, the one after a plain answer first.
        added_end: The text to add after an answer for which the template writes none of `ends`; "" where none
            is needed.
        added_call_end: The same after an answer that calls tools.
        end_from: Where `ends` come from: "template", "next role" (the opening of the next message ends an
            answer) or "tokenizer" (the template writes no end, so the tokenizer's end token is added).
        system: Whether a system message is "written", "refused" or "dropped".
        default_system: The system message that the template writes where there is none.
        developer: Whether the role "developer" is written.
        tools: Whether definitions of tools are written.
        reasoning: "written" from its own field, "dropped", or "dropped from earlier answers".
        trims: Whether blanks around an answer are dropped.
        prefix_preserving: Whether an answer stands in a longer conversation as the model wrote it.
        today: Whether it writes today's date.
    """

    generation_prompt: str
    answer_header: str
    ends: tuple[str, ...]
    added_end: str
    added_call_end: str
    end_from: str
    system: str
    default_system: str
    developer: bool
    tools: bool
    reasoning: str
    trims: bool
    prefix_preserving: bool
    today: bool

    def as_dict(self) -> dict[str, Any]:
        """The facts for programs."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The facts in words, one a line."""
        found = [f"an answer ends with {' or '.join(map(repr, self.ends))}" + _FROM[self.end_from]]
        if self.generation_prompt:
            found.append(f"the generation prompt is {self.generation_prompt!r}")
        if self.default_system:
            found.append(f"it adds a system message where there is none: {_short(self.default_system)}")
        if self.system != "written":
            found.append(f"system messages are {self.system}")
        if not self.prefix_preserving:
            found.append("an answer is written in another way once the conversation goes on")
        found.append(f"reasoning is {self.reasoning}; tools are {'written' if self.tools else 'not written'}")
        if self.trims:
            found.append("blanks around an answer are dropped")
        if self.today:
            found.append("it writes today's date, which a run keeps")
        return found


_FROM = {
    "template": "",
    "next role": ", which opens the next message: the template writes no other end",
    "tokenizer": ", the tokenizer's end token: the template writes no end",
}


def _short(text: str) -> str:
    shown = repr(text.strip())
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def facts_of(template: Template) -> Facts:
    """Renders probe conversations and reads off what the template does."""
    user, answer = Message("user", Q1), Message("assistant", A1)
    prompt, whole = _text(template, [user], prompt=True), _text(template, [user, answer])
    longer = _text(template, [user, answer, Message("user", Q2)], prompt=True)
    end, source, added = _end(template, whole, longer)
    call_end, added_call_end = _call_end(template)
    ends = dict.fromkeys(found for found in (_name_of(template, end), call_end) if found)
    system, default = _system(template, whole)
    return Facts(
        generation_prompt=_generation_prompt(template, prompt, _text(template, [user])),
        answer_header=_after(whole, prompt).partition(A1)[0] if whole.startswith(prompt) else "",
        ends=tuple(ends),
        added_end=added,
        added_call_end=added_call_end or added,
        end_from=source,
        system=system,
        default_system=default,
        developer="taliks" in _text(template, [Message("developer", "taliks"), user]),
        tools="taliktool" in _text(template, [user], tools=[_TOOL], prompt=True),
        reasoning=_reasoning(template),
        trims=f" {A1}  \n" not in _text(template, [user, Message("assistant", f" {A1}  \n")]),
        prefix_preserving=bool(prompt)
        and whole.startswith(prompt)
        and longer.startswith(whole.partition(A1)[0] + A1 + end),
        today=asks_for_today(template.tokenizer),
    )


def _text(
    template: Template, messages: list[Message], tools: Sequence[Any] = (), prompt: bool = False
) -> str:
    """The rendered text; "" where the template refuses."""
    text = template.apply(template.chat(messages), tools, prompt=prompt)
    return text if isinstance(text, str) else ""


def _after(text: str, start: str) -> str:
    return text[len(start) :] if start and text.startswith(start) else ""


def _end(template: Template, whole: str, longer: str) -> tuple[str, str, str]:
    """The text that ends a plain answer, where that comes from, and what to add after the last answer."""
    last, middle = whole.partition(A1)[2], longer.partition(A1)[2].partition(Q2)[0]
    if token := first_token(template, last):
        return token, "template", ""
    if token := first_token(template, middle):
        return token, "next role", token
    opening = middle.rstrip()
    if opening.strip() and opening.strip() != template.begin and middle == _second_opening(template):
        return opening, "next role", opening.removeprefix(last)
    end = template.tokenizer.eos_token or ""
    return end, "tokenizer", end


def _name_of(template: Template, end: str) -> str:
    """The token of an end of turn; where it is a text, with the line breaks before it."""
    return end.strip() if end.strip() in template.added else end.strip(" ")


def _generation_prompt(template: Template, prompt: str, asked: str) -> str:
    """The end of a prompt that the same messages without a generation prompt do not have."""
    alike = common_prefix(prompt, asked)
    cut = next((t.start() for t in template.token.finditer(prompt) if t.start() < alike < t.end()), alike)
    return prompt[cut:]


def common_prefix(first: str, second: str) -> int:
    """How many characters two texts have in common at their start."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


def first_token(template: Template, text: str) -> str:
    """The blanks and the added token at the start of a text; "" if there is none, or it is the BOS token."""
    blanks = len(text) - len(text.lstrip())
    found = template.token.match(text, blanks)
    return "" if found is None or found[0] == template.begin else text[: found.end()]


def _second_opening(template: Template) -> str:
    """The text between a second answer and a third question: another one where turns are numbered."""
    texts = [Message("user", Q1), Message("assistant", A1), Message("user", Q2), Message("assistant", A2)]
    text = _text(template, [*texts, Message("user", Q3)], prompt=True)
    return text.partition(A2)[2].partition(Q3)[0]


def _call_end(template: Template) -> tuple[str, str]:
    """The token that ends an answer which calls a tool; the text to add where the template writes none."""
    asked = Message("user", Q1)
    called = Message("assistant", "", tool_calls=(ToolCall("taliktool", {"key": "talikvalue"}),))
    whole = _text(template, [asked, called], [_TOOL])
    if "talikvalue" not in whole:
        return "", ""
    run = template.ends.search(whole)
    if specials := [t for t in template.token.findall(run[0]) if t in template.special] if run else []:
        return specials[-1], ""
    longer = _text(template, [asked, called, Message("tool", Q2, name="taliktool")], [_TOOL], prompt=True)
    added = first_token(template, _after(longer, whole))
    return added.strip(), added


def _system(template: Template, whole: str) -> tuple[str, str]:
    """What becomes of a system message, and the one that is written where there is none."""
    messages = [Message("system", "taliks"), Message("user", Q1), Message("assistant", A1)]
    text = template.apply(template.chat(messages))
    if isinstance(text, Exception):
        return "refused", ""
    if "taliks" not in text:
        return "dropped", ""
    before, _, after = text.partition("taliks")
    head, rest = whole.partition(Q1)[0], after.partition(Q1)[0]
    default = head.startswith(before) and head.endswith(rest) and len(head) > len(before) + len(rest)
    return "written", head[len(before) : len(head) - len(rest)] if default else ""


def _reasoning(template: Template) -> str:
    """Whether the template writes an answer's reasoning, in the last answer and in an earlier one."""
    answer = Message("assistant", A1, reasoning="talikr1")
    last = _text(template, [Message("user", Q1), answer])
    earlier = _text(template, [Message("user", Q1), answer, Message("user", Q2)], prompt=True)
    if "talikr1" not in last:
        return "dropped"
    return "written" if "talikr1" in earlier else "dropped from earlier answers"


@dataclass(frozen=True, slots=True)
class Stops:
    """What stops an answer while it is generated: token ids, and texts where an end is no token."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


def stops_of(tokenizer: Any, known: int | list[int] | None = None) -> Stops:
    """What ends an answer: the `known` ids, and the ends that the template writes and training teaches.

    Raises:
        UsageError: The chat template cannot be parsed.
    """
    template = template_of(tokenizer)
    ids = [known] if isinstance(known, int) else list(known or ())
    ends = facts_of(template).ends
    ids += [tokenizer.convert_tokens_to_ids(end) for end in ends if end in template.added]
    return Stops(tuple(dict.fromkeys(ids)), tuple(end for end in ends if end not in template.added))
