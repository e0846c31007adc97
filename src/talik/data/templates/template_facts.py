"""Finds facts about a chat template by rendering small conversations with it.

`talik preview` shows them, the run folder keeps them, and rendering uses them: how an answer ends, and which
token or text stops the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from talik.data.messages import Message, ToolCall
from talik.data.templates.template import Template, asks_for_today, template_of

Q1, A1, Q2, A2, Q3 = "talikq1", "talika1", "talikq2", "talika2", "talikq3"
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "taliktool", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """The behaviour of a chat template.

    Attributes:
        generation_prompt: The text after the last message that asks for an answer; "" if there is none.
        answer_header: The text that the model writes before an answer, such as the name of a channel.
        ends: The tokens and texts that end an answer; first the one after an answer without tool calls.
        added_end: The text to add after an answer if the template writes none of `ends`; "" if it always
            writes one.
        added_call_end: The same after an answer that calls tools.
        end_from: The origin of `ends`: "template", "next role" (the start of the next message ends an answer)
            or "tokenizer" (the template writes no end, so the tokenizer's end token is added).
        system: "written", "refused" or "dropped": the treatment of a system message.
        default_system: The system message that the template adds to a conversation without one.
        developer: True if messages with the role "developer" are written.
        tools: True if tool definitions are written.
        reasoning: "written", "dropped", or "dropped from earlier answers": the treatment of the reasoning
            field.
        trims: True if blanks around an answer are removed.
        prefix_preserving: True if an earlier answer is written as it was when it was the last one.
        today: True if the template writes today's date.
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
        """Returns the facts in a form for programs."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Describes the facts in words, one a line."""
        found = [f"an answer ends with {' or '.join(map(repr, self.ends))}" + _FROM[self.end_from]]
        if self.generation_prompt:
            found.append(f"the generation prompt is {self.generation_prompt!r}")
        if self.default_system:
            found.append(f"it adds a system message if there is none: {_short(self.default_system)}")
        if self.system != "written":
            found.append(f"system messages are {self.system}")
        if not self.prefix_preserving:
            found.append("an answer is written differently when the conversation continues")
        found.append(f"reasoning is {self.reasoning}; tools are {'written' if self.tools else 'not written'}")
        if self.trims:
            found.append("blanks around an answer are removed")
        if self.today:
            found.append("it writes today's date; a run keeps the date of its start")
        return found


_FROM = {
    "template": "",
    "next role": ", the start of the next message: the template writes no other end",
    "tokenizer": ", the tokenizer's end token: the template writes no end",
}


def _short(text: str) -> str:
    shown = repr(text.strip())
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def facts_of(template: Template) -> TemplateFacts:
    """Finds the facts about a template by rendering probe conversations."""
    user, answer = Message("user", Q1), Message("assistant", A1)
    prompt, whole = _text(template, [user], prompt=True), _text(template, [user, answer])
    longer = _text(template, [user, answer, Message("user", Q2)], prompt=True)
    end, source, added = _end(template, whole, longer)
    call_end, added_call_end = _call_end(template)
    ends = dict.fromkeys(found for found in (_name_of(template, end), call_end) if found)
    system, default = _system(template, whole)
    return TemplateFacts(
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
    """Renders messages; "" if the template refuses them."""
    text = template.apply(template.chat(messages), tools, prompt=prompt)
    return text if isinstance(text, str) else ""


def _after(text: str, start: str) -> str:
    """Returns the rest of a text after its start; "" if it does not start so."""
    return text[len(start) :] if start and text.startswith(start) else ""


def _end(template: Template, whole: str, longer: str) -> tuple[str, str, str]:
    """Finds the end of an answer.

    Args:
        template: The template.
        whole: A question and an answer, rendered.
        longer: The same with one more question.

    Returns:
        The text that ends an answer, its origin (`TemplateFacts.end_from`), and the text to add after the
        last answer.
    """
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
    """Returns the token of an end of turn; if it is not a token, its text without outer spaces."""
    return end.strip() if end.strip() in template.added else end.strip(" ")


def _generation_prompt(template: Template, prompt: str, asked: str) -> str:
    """Returns the end of a prompt that the same messages without a generation prompt do not have."""
    alike = common_prefix(prompt, asked)
    cut = next((t.start() for t in template.token.finditer(prompt) if t.start() < alike < t.end()), alike)
    return prompt[cut:]


def common_prefix(first: str, second: str) -> int:
    """Returns the length of the common prefix of two texts, by bisection."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


def first_token(template: Template, text: str) -> str:
    """Returns the added token at the start of a text, with blanks before it; "" for none or BOS."""
    blanks = len(text) - len(text.lstrip())
    found = template.token.match(text, blanks)
    return "" if found is None or found[0] == template.begin else text[: found.end()]


def _second_opening(template: Template) -> str:
    """Returns the text between a second answer and a third question, which varies if turns are numbered."""
    texts = [Message("user", Q1), Message("assistant", A1), Message("user", Q2), Message("assistant", A2)]
    text = _text(template, [*texts, Message("user", Q3)], prompt=True)
    return text.partition(A2)[2].partition(Q3)[0]


def _call_end(template: Template) -> tuple[str, str]:
    """Returns the token that ends an answer with a tool call, and the text to add if it is not written."""
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
    """Finds the treatment of a system message (`TemplateFacts.system`), and the default system message."""
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
    """Finds the treatment of the reasoning (`TemplateFacts.reasoning`)."""
    answer = Message("assistant", A1, reasoning="talikr1")
    last = _text(template, [Message("user", Q1), answer])
    earlier = _text(template, [Message("user", Q1), answer, Message("user", Q2)], prompt=True)
    if "talikr1" not in last:
        return "dropped"
    return "written" if "talikr1" in earlier else "dropped from earlier answers"


@dataclass(frozen=True, slots=True)
class Stops:
    """The token ids that stop generation, and the texts for ends that are not tokens."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


def stops_of(tokenizer: Any, known: int | list[int] | None = None) -> Stops:
    """Returns the stops of a tokenizer: known ids, and the ends of answers that training teaches.

    Args:
        tokenizer: A tokenizer of Transformers.
        known: Ids that stop generation already, such as `eos_token_id`.

    Raises:
        UsageError: The chat template cannot be parsed.
    """
    template = template_of(tokenizer)
    ids = [known] if isinstance(known, int) else list(known or ())
    ends = facts_of(template).ends
    ids += [tokenizer.convert_tokens_to_ids(end) for end in ends if end in template.added]
    return Stops(tuple(dict.fromkeys(ids)), tuple(end for end in ends if end not in template.added))
