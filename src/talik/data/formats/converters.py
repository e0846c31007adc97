"""Converts the fields of each data format to messages, or to the text of a document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from talik.data.formats.fields import WRONG_TYPE, Fields, text
from talik.data.formats.message_lists import read_messages
from talik.data.formats.tools import Tools
from talik.data.messages import Message
from talik.data.reading.rows import RowError, describe, is_list

Converted = tuple[list[Message], Tools] | str


def openai_messages(fields: Fields) -> Converted:
    """Converts a list of messages as OpenAI writes them."""
    return _list(fields, "messages")


def sharegpt(fields: Fields) -> Converted:
    """Converts a list of messages as ShareGPT writes them."""
    return _list(fields, "conversations")


def _list(fields: Fields, name: str) -> Converted:
    messages, tools = read_messages(fields.named(name), fields.get(name))
    return _with_system(fields, messages), tools


def prompt_completion(fields: Fields) -> Converted:
    """Converts a prompt and a completion: two texts, or two lists of messages as TRL writes them."""
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if is_list(prompt) != is_list(completion):
        problem = "fields 'prompt' and 'completion' must both be strings or both be lists of messages"
        raise RowError(WRONG_TYPE, problem, "prompt")
    if not is_list(prompt):
        return _pair(fields, fields.text("prompt"), fields.text("completion"))
    asked, tools = read_messages(fields.named("prompt"), prompt)
    answered, more = read_messages(fields.named("completion"), completion)
    asked = [replace(m, trained=False) if m.role == "assistant" else m for m in asked]
    return _with_system(fields, asked) + answered, tools + more


def instruction(*answers: str) -> Callable[[Fields], Converted]:
    """Returns the converter for an instruction, an optional input, and an answer in a named field."""

    def convert(fields: Fields) -> Converted:
        question = fields.text("instruction")
        for name in ("input", "context"):
            more = fields.optional(name)
            question += f"\n\n{more}" if more else ""
        answer = next(name for name in answers if name in fields)
        return _pair(fields, question, fields.text(answer))

    return convert


def two_fields(
    asked: str, answered: str, answer: Callable[[Fields, str], str] = Fields.text
) -> Callable[[Fields], Converted]:
    """Returns the converter for a question and an answer in two named fields."""

    def convert(fields: Fields) -> Converted:
        return _pair(fields, fields.text(asked), answer(fields, answered))

    return convert


def one_answer(fields: Fields, name: str) -> str:
    """Returns the answer in a field: a text, or a list with one text."""
    value, own = fields.get(name), fields.named(name)
    if is_list(value) and len(value) == 1:
        return text(f"{own}[0]", value[0])
    if is_list(value) and value:
        problem = f"field '{own}' has {len(value)} answers; one is needed"
        raise RowError("several answers", problem, own)
    return text(own, value)


def _pair(fields: Fields, question: str, answer: str) -> Converted:
    turns = [Message("user", question), Message("assistant", answer)]
    return [*_with_system(fields, []), *_history(fields), *turns], ()


def _with_system(fields: Fields, messages: list[Message]) -> list[Message]:
    """Adds the system message of the field 'system' or 'system_prompt', and removes an empty one."""
    if messages and messages[0].role in ("system", "developer") and not messages[0].content.strip():
        messages = messages[1:]
    system = fields.optional("system") or fields.optional("system_prompt")
    if not system:
        return messages
    if messages and messages[0].role in ("system", "developer"):
        if messages[0].content.strip() == system.strip():
            return messages
        raise RowError(
            "two system messages", "field 'system' differs from the system message in the list", "system"
        )
    return [Message("system", system), *messages]


def _history(fields: Fields) -> list[Message]:
    """Reads the earlier pairs of question and answer from the field 'history'."""
    value, own = fields.get("history"), fields.named("history")
    if value in (None, "", []):
        return []
    if not is_list(value):
        raise RowError(WRONG_TYPE, f"field '{own}' must be a list of pairs, it is {describe(value)}", own)
    messages: list[Message] = []
    for index, pair in enumerate(value):
        if not is_list(pair) or len(pair) != 2:
            problem = f"field '{own}[{index}]' must be a pair of question and answer, it is {describe(pair)}"
            raise RowError(WRONG_TYPE, problem, f"{own}[{index}]")
        messages.append(Message("user", text(f"{own}[{index}][0]", pair[0])))
        messages.append(Message("assistant", text(f"{own}[{index}][1]", pair[1])))
    return messages


def document(fields: Fields) -> Converted:
    """Returns the text of a document."""
    return fields.text("text")
