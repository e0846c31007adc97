"""One answer: the text that a model is asked to write after a prompt, its end, and its reasoning."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from talik.data.messages import Message
from talik.data.reading.rows import RowError
from talik.data.templates.content_checks import NOT_WRITTEN, not_found, thought_of
from talik.data.templates.template import PRIVATE_USE, Chat, Template, as_json
from talik.data.templates.template_facts import Facts, common_prefix

_OPENED = re.compile(r"<(think\w*|thought|reasoning)>\s*\Z|\[(THINK)\]\s*\Z")  # a prompt that opens a thought
_EMPTY = re.compile(r"\s*<think>\s*</think>\s*")
_CLOSING = re.compile(r"\s*(?:</(?:think\w*|thought|reasoning)>|\[/THINK\])\s*")
_CLOSED = re.compile(rf"{_CLOSING.pattern}\Z")  # a prompt that asks for an answer without a thought


def aligned(
    chat: Chat,
    index: int,
    tools: Sequence[Mapping[str, Any]],
    template: Template,
    facts: Facts,
    prompt: str,
    whole: str,
) -> str:
    """The text of an answer where the conversation with it does not begin with the prompt.

    A mark in place of the answer shows where the template writes it. The answer begins after the generation
    prompt before the mark, or where the texts before the mark and of the prompt end alike.
    """
    mark = next(chr(code) * 3 for code in PRIVATE_USE if chr(code) not in whole)
    marked = template.apply([*chat[:index], {**chat[index], "content": mark}], tools)
    if isinstance(marked, Exception) or marked.count(mark) != 1:
        raise not_found(index + 1)
    before = marked.partition(mark)[0]
    asks = _asked_after(chat[index - 1], prompt) or _unopened(facts.generation_prompt)
    found = before.rfind(asks) if asks.strip() else -1
    if found >= 0 and whole.startswith(before[: found + len(asks)]):
        return whole[found + len(asks) :]
    alike = before[len(before) - common_prefix(before[::-1], prompt[::-1]) :]
    if (chat[index - 1]["content"] or "").strip()[-16:] not in alike or not whole.startswith(before):
        raise not_found(index + 1)
    return whole[len(before) :]


def _asked_after(message: Mapping[str, Any], prompt: str) -> str:
    """The end of a prompt from its last message's text on; "" where that text does not stand in it."""
    text = (message["content"] or "").strip()
    for form in (text, as_json(text)[1:-1]):
        at = prompt.rfind(form) if form else -1
        if at >= 0:
            return form + _unopened(prompt[at + len(form) :])
    return ""


def _unopened(text: str) -> str:
    """The end of a prompt without a thought that it opens or leaves empty."""
    return _OPENED.sub("", _EMPTY.sub("", text))


def with_thought(message: Message, prompt: str, written: str, template: Template) -> str:
    """An answer with its reasoning, where the template drops it or the prompt has opened a thought.

    The prompt is what the model will be asked. After it the model writes the whole answer, whatever the
    template keeps of it later.
    """
    opened = _OPENED.search(prompt)
    thought = thought_of(message)
    if thought and thought in written:
        return written
    if opened is None and thought and _CLOSED.search(prompt):
        problem = "the chat template asks for an answer without reasoning, and this one has some"
        raise RowError(NOT_WRITTEN, problem, "reasoning")
    if opened is None and (not thought or "</think>" not in template.source(())):
        return written
    if opened is not None and not thought and _CLOSING.match(written):
        return written  # the template closes the thought itself
    name = (opened[1] or opened[2]) if opened else "think"
    close = f"[/{name}]" if name == "THINK" else f"</{name}>"
    written = _EMPTY.sub("", written, count=1) if _EMPTY.match(written) else written
    opening = "" if opened else "<think>\n"
    return f"{opening}{thought}\n{close}\n\n{written.lstrip(chr(10))}"


def end_in(written: str, template: Template, facts: Facts) -> tuple[int, int | None]:
    """Where the content of an answer ends, and where its end of turn does; None if it has none."""
    run = template.ends.search(written)
    tokens = list(template.token.finditer(written, run.start())) if run else []
    found = next((token for token in tokens if token[0] in facts.ends), None)
    if found is None:
        special = [t for t in tokens if t[0] in template.special and t[0] != template.begin]
        found = special[-1] if special else None
    if found is None:
        return len(written.rstrip()), None
    return len(written[: found.start()].rstrip()), found.end()


def reasoning_stop(message: Message, written: str) -> int:
    """How many characters of an answer are its reasoning, tags included."""
    thought = thought_of(message)
    if not thought:  # the template's place for one, opened in the answer or by the prompt
        empty = _EMPTY.match(written) or _CLOSING.match(written)
        return empty.end() if empty else 0
    at = written.find(thought)
    if at < 0:
        return 0
    closing = _CLOSING.match(written, at + len(thought))
    return closing.end() if closing else at + len(thought)
