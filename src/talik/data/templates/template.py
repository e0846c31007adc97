"""The chat template: a conversation -> text, as the model will be asked at inference.

Only the rendered text is used, so any template works. `template_facts` finds out what a template does, and `turns`
finds the text that the model learns to write.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import count
from typing import Any

import jinja2

from talik.base.errors import UsageError
from talik.data.messages import Message, ToolCall
from talik.data.templates.encoding import Encoder, encoder_of

# Errors that a template raises: by itself (an unknown role), or where an expression meets the wrong messages.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
PRIVATE_USE = range(0xE000, 0xF900)

Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template, or the plain one where it has none.

    Attributes:
        tokenizer: A tokenizer of Transformers.
        text: The template's source, or several by name.
        plain: Whether it is the plain template of Talik.
        encoder: Gives token ids with the characters that they cover.
        special: Tokens that only the template may write.
        added: All tokens that the tokenizer matches before it splits text.
        arguments_as_text: Whether the arguments of calls must be JSON text, not objects.
    """

    tokenizer: Any
    text: str | dict[str, str]
    plain: bool
    encoder: Encoder
    special: frozenset[str]
    added: frozenset[str]
    arguments_as_text: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        """Whose template it is, in words."""
        return "plain (the tokenizer has none)" if self.plain else "the tokenizer's"

    @property
    def begin(self) -> str | None:
        """The token that begins a text; None where the same token ends one."""
        bos = self.tokenizer.bos_token
        return None if bos == self.tokenizer.eos_token else bos

    @cached_property
    def ends(self) -> re.Pattern[str]:
        """Matches added tokens and blanks at the end of a text."""
        return re.compile(rf"(?:\s*(?:{any_of(self.added)}))+\s*\Z")

    @cached_property
    def token(self) -> re.Pattern[str]:
        """Matches one added token."""
        return re.compile(any_of(self.added))

    def source(self, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The template that a conversation with these tools is rendered by: some models have several."""
        if isinstance(self.text, str):
            return self.text
        name = "tool_use" if tools and "tool_use" in self.text else "default"
        if name not in self.text:
            raise UsageError(
                f"None of the model's chat templates ({', '.join(self.text)}) is named 'default'.",
                remedy="Name one of them 'default' in the model's tokenizer files.",
            )
        return self.text[name]

    def apply(
        self, chat: Chat, tools: Sequence[Mapping[str, Any]] = (), *, prompt: bool = False
    ) -> str | Exception:
        """The text of a chat, or what the template raised; `prompt`: up to where the assistant answers."""
        try:
            return self.tokenizer.apply_chat_template(
                chat,
                tools=list(tools) or None,
                chat_template=self.source(tools),
                add_generation_prompt=prompt,
                tokenize=False,
            )
        except TEMPLATE_ERRORS as error:
            return error

    def chat(self, messages: Sequence[Message]) -> Chat:
        """Messages as templates take them: those of Transformers' documentation.

        Calls without an id are numbered. A result without a call's id or a name gets those of the first call
        before it that has no result yet.
        """
        chat: Chat = []
        numbers, waiting = count(), deque[dict[str, Any]]()
        for message in messages:
            made: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.reasoning:
                made |= {"reasoning_content": message.reasoning, "reasoning": message.reasoning}
            if message.tool_calls:
                made["tool_calls"] = [self._call(call, next(numbers)) for call in message.tool_calls]
                waiting = deque(made["tool_calls"])
            names = {"name": message.name, "tool_call_id": message.call_id}
            if message.role == "tool" and (call := _answered(waiting, message.call_id)):
                names = {"name": message.name or call["function"]["name"], "tool_call_id": call["id"]}
            chat.append(made | {key: name for key, name in names.items() if name is not None})
        return chat

    def _call(self, call: ToolCall, number: int) -> dict[str, Any]:
        arguments = as_json(call.arguments) if self.arguments_as_text else call.arguments
        function = {"name": call.name, "arguments": arguments}
        return {"id": call.id or f"call{number:05d}", "type": "function", "function": function}


def _answered(waiting: deque[dict[str, Any]], call_id: str | None) -> dict[str, Any] | None:
    """Takes the call that a result answers out of those that wait for one."""
    found = next((call for call in waiting if call_id in (None, call["id"])), None)
    if found is not None:
        waiting.remove(found)
    return found


def plain_template(tokenizer: Any) -> str:
    """The template for a tokenizer that has none: "User: ...", "Assistant: ..." and the end token.

    It starts with the BOS token where the tokenizer itself would add one. Save it with the model, so that
    the model reads the same text later.
    """
    adds_bos = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return (
        ("{{ bos_token }}" if adds_bos else "")
        + "{% for message in messages %}"
        + "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
        + "{% if message.role == 'system' %}{{ message.content }}"
        + "{% elif message.role == 'user' %}{{ 'User: ' + message.content }}"
        + "{% else %}{{ 'Assistant: ' + message.content }}{{ eos_token }}{% endif %}"
        + "{% endfor %}"
        + "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
    )


def template_of(tokenizer: Any) -> Template:
    """The template to render with, of a tokenizer of Transformers.

    Raises:
        UsageError: The template is no template of Jinja, or the tokenizer cannot encode text.
    """
    encoder = encoder_of(tokenizer)
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    special = {token for token, is_special in added.items() if is_special} | set(tokenizer.all_special_tokens)
    plain = not tokenizer.chat_template
    text = plain_template(tokenizer) if plain else tokenizer.chat_template
    known = frozenset(special | added.keys())
    template = Template(tokenizer, text, plain, encoder, frozenset(special), known)
    _check(template)
    return _with_arguments(template)


def date_of(tokenizer: Any) -> str | None:
    """Today's date and time, if the tokenizer's template writes them: what a run keeps."""
    return datetime.now().isoformat(timespec="seconds") if asks_for_today(tokenizer) else None


def asks_for_today(tokenizer: Any) -> bool:
    """Whether the tokenizer's template writes today's date."""
    texts = tokenizer.chat_template or ""
    return any("strftime_now" in text for text in (texts.values() if isinstance(texts, dict) else [texts]))


def _check(template: Template) -> None:
    """UsageError for a template that Jinja cannot parse: its own fault, not that of any row."""
    for tools in ((), ({"type": "function", "function": {"name": "f"}},)):
        error = template.apply([{"role": "user", "content": "?"}], tools)
        if isinstance(error, jinja2.TemplateSyntaxError):
            raise UsageError(
                f"The model's chat template cannot be parsed: {error.message} (line {error.lineno}).",
                remedy="Correct the model's chat_template.jinja, or chat_template in tokenizer_config.json.",
            )


def _with_arguments(template: Template) -> Template:
    """The template with the arguments of calls as it takes them: objects, or their JSON text.

    Some templates join them to a text, which would write an object the way Python does.
    """
    call = ToolCall("talikcall", {"talikkey": "talikvalue"})
    messages = [Message("user", "?"), Message("assistant", "", tool_calls=(call,))]
    tools = ({"type": "function", "function": {"name": "talikcall", "description": "", "parameters": {}}},)
    written = template.apply(template.chat(messages), tools)
    if isinstance(written, str) and "'talikkey'" not in written:
        return template
    as_text = replace(template, arguments_as_text=True)
    written = as_text.apply(as_text.chat(messages), tools)
    return as_text if isinstance(written, str) and '"talikkey"' in written else template


def as_json(value: Any) -> str:
    """A value as JSON, without escapes for letters."""
    return json.dumps(value, ensure_ascii=False)


def any_of(tokens: frozenset[str] | set[str]) -> str:
    """A pattern for any of `tokens`, the longest first; one that matches nothing if there are none."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token) or "(?!)"
