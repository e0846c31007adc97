"""Finds the text of one answer after its prompt, the end of the answer, and its reasoning."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from talik.data.messages import Message
from talik.data.reading.rows import RowError
from talik.data.templates.content_checks import NOT_WRITTEN, not_found, thought_of
from talik.data.templates.template import PRIVATE_USE, Chat, Template, as_json
from talik.data.templates.template_facts import TemplateFacts, common_prefix

# The end of a prompt that opens a thought.
_OPENED = re.compile(r"<(think\w*|thought|reasoning)>\s*\Z|\[(THINK)\]\s*\Z")
_EMPTY = re.compile(r"\s*<think>\s*</think>\s*")
_CLOSING = re.compile(r"\s*(?:</(?:think\w*|thought|reasoning)>|\[/THINK\])\s*")
_CLOSED = re.compile(rf"{_CLOSING.pattern}\Z")  # the end of a prompt for an answer without reasoning


def aligned(
    chat: Chat,
    index: int,
    tools: Sequence[Mapping[str, Any]],
    template: Template,
    facts: TemplateFacts,
    prompt: str,
    whole: str,
) -> str:
    """Finds the text of an answer if the rendered conversation does not start with the prompt.

    The conversation is rendered again with a mark in place of the answer. The answer begins after the
    generation prompt that precedes the mark; if there is none, it begins at the mark, provided that the text
    before the mark ends like the prompt.

    Args:
        chat: The messages.
        index: The index of the answer.
        tools: The tool definitions for the template.
        template: The template.
        facts: The facts about the template.
        prompt: The rendered messages before the answer, with the generation prompt.
        whole: The rendered messages up to and including the answer.

    Raises:
        RowError: The answer cannot be found.
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
    """Returns a prompt from the text of its last message on; "" if the text is not in it."""
    text = (message["content"] or "").strip()
    for form in (text, as_json(text)[1:-1]):
        at = prompt.rfind(form) if form else -1
        if at >= 0:
            return form + _unopened(prompt[at + len(form) :])
    return ""


def _unopened(text: str) -> str:
    """Removes an opened or empty thought from the end of a prompt."""
    return _OPENED.sub("", _EMPTY.sub("", text))


def with_thought(message: Message, prompt: str, written: str, template: Template) -> str:
    """Adds reasoning that the template drops to an answer, and closes a thought that the prompt has opened.

    At inference the model writes the whole answer after the prompt, including reasoning that the template
    removes later.

    Args:
        message: The answer.
        prompt: The rendered prompt.
        written: The text of the answer as the template writes it.
        template: The template.

    Raises:
        RowError: The prompt asks for an answer without reasoning, and this answer has some.
    """
    opened = _OPENED.search(prompt)
    thought = thought_of(message)
    if thought and thought in written:
        return written
    if opened is None and thought and _CLOSED.search(prompt):
        problem = "the chat template asks for an answer without reasoning, but this answer has some"
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


def end_in(written: str, template: Template, facts: TemplateFacts) -> tuple[int, int | None]:
    """Returns the end of the content of an answer, and the end of its end of turn or None."""
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
    """Returns the number of characters of the reasoning at the start of an answer, including tags."""
    thought = thought_of(message)
    if not thought:  # an empty thought, opened in the answer or by the prompt
        empty = _EMPTY.match(written) or _CLOSING.match(written)
        return empty.end() if empty else 0
    at = written.find(thought)
    if at < 0:
        return 0
    closing = _CLOSING.match(written, at + len(thought))
    return closing.end() if closing else at + len(thought)
