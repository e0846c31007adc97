"""Reads the marks of templates that mark the answers: {% generation %} ... {% endgeneration %}."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from talik.data.reading.rows import RowError
from talik.data.templates.template import Chat, Template

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_marks(template: Template, tools: Sequence[Mapping[str, Any]]) -> bool:
    """True if the template marks answers."""
    return _MARKS.search(template.source(tools)) is not None


def marked_answer(
    chat: Chat, tools: Sequence[Mapping[str, Any]], template: Template, prompt: str, written: str
) -> tuple[int, int]:
    """Returns the range of characters of the last answer that the template marks, including its end of turn.

    Args:
        chat: The messages up to and including the answer.
        tools: The tool definitions for the template.
        template: A template with marks.
        prompt: The prompt, as rendered.
        written: The text after the prompt, up to the end of turn.

    Raises:
        RowError: The template marks nothing, or its marks differ from the text after the prompt by more than
            blanks.
    """
    text, spans = _marked(chat, tools, template)
    at, ours = len(prompt), len(prompt + written)
    own = [(start, stop) for start, stop in spans if stop > at]
    if not own or not text.startswith(prompt + written):
        problem = f"the chat template does not mark message {len(chat)}"
        raise RowError("marks of the chat template", problem)
    start, stop = min(start for start, _ in own), max(stop for _, stop in own)
    if text[min(start, at) : max(start, at)].strip() or text[ours:stop].strip():
        problem = (
            f"the chat template contradicts itself in message {len(chat)}: it marks "
            f"{text[start:stop][:80]!r} but its prompt asks for {written[:80]!r}"
        )
        raise RowError("marks of the chat template", problem)
    return start, max(stop, ours)


def _marked(
    chat: Chat, tools: Sequence[Mapping[str, Any]], template: Template
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a chat; returns the text and the ranges of characters that the template marks as answers."""
    from transformers.utils import chat_template_utils

    rendered, spans = cast(Any, chat_template_utils).render_jinja_template(
        conversations=[chat],
        tools=[dict(tool) for tool in tools] or None,
        chat_template=template.source(tools),
        return_assistant_tokens_mask=True,
        **template.tokenizer.special_tokens_map,
    )
    return rendered[0], [(int(start), int(stop)) for start, stop in spans[0]]
