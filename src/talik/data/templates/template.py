"""Renders conversations to text with the chat template, as at inference.

Only the rendered text is used, so any template works. `template_facts` finds out what a template does, and
`turns` finds the text that the model learns to write.
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
from talik.data.reading.rows import is_object
from talik.data.templates.encoding import Encoder, encoder_of

# Errors that a template raises: its own (an unknown role), or those of an expression that gets unexpected
# messages.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
PRIVATE_USE = range(0xE000, 0xF900)

Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template, or Talik's plain one if the tokenizer has none.

    Attributes:
        tokenizer: A tokenizer of Transformers.
        text: The source of the template, or of several templates by name.
        plain: True for the plain template of Talik.
        encoder: Encodes the rendered text.
        special: The tokens that only the template may write.
        added: All tokens that the tokenizer matches before it splits text.
        arguments_as_text: True if the template needs the arguments of tool calls as JSON text, not as
            objects.
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
        """A description of the origin of the template."""
        return "plain (the tokenizer has none)" if self.plain else "the tokenizer's"

    @property
    def begin(self) -> str | None:
        """The token that begins a text; None if the same token also ends one."""
        bos = self.tokenizer.bos_token
        return None if bos == self.tokenizer.eos_token else bos

    @cached_property
    def ends(self) -> re.Pattern[str]:
        """The pattern of added tokens and blanks at the end of a text."""
        return re.compile(rf"(?:\s*(?:{any_of(self.added)}))+\s*\Z")

    @cached_property
    def token(self) -> re.Pattern[str]:
        """The pattern of one added token."""
        return re.compile(any_of(self.added))

    def source(self, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Returns the source for a conversation with these tools: some models have several templates."""
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
        """Renders a chat, or returns the template's error. `prompt`: with the generation prompt."""
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
        """Returns messages in the form that templates take, as in the documentation of Transformers.

        Tool calls without an id get a number. A tool result without a call id or a name gets those of the
        first earlier call without a result.
        """
        chat: Chat = []
        numbers, unanswered = count(), deque[dict[str, Any]]()
        for message in messages:
            made: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.reasoning:
                made |= {"reasoning_content": message.reasoning, "reasoning": message.reasoning}
            if message.tool_calls:
                made["tool_calls"] = [self._call(call, next(numbers)) for call in message.tool_calls]
                unanswered = deque(made["tool_calls"])
            names = {"name": message.name, "tool_call_id": message.call_id}
            if message.role == "tool" and (call := _answered(unanswered, message.call_id)):
                names = {"name": message.name or call["function"]["name"], "tool_call_id": call["id"]}
            chat.append(made | {key: name for key, name in names.items() if name is not None})
        return chat

    def _call(self, call: ToolCall, number: int) -> dict[str, Any]:
        arguments = as_json(call.arguments) if self.arguments_as_text else call.arguments
        function = {"name": call.name, "arguments": arguments}
        return {"id": call.id or f"call{number:05d}", "type": "function", "function": function}


def _answered(unanswered: deque[dict[str, Any]], call_id: str | None) -> dict[str, Any] | None:
    """Removes and returns the call that a tool result answers."""
    found = next((call for call in unanswered if call_id in (None, call["id"])), None)
    if found is not None:
        unanswered.remove(found)
    return found


def plain_template(tokenizer: Any) -> str:
    """Returns the template for a tokenizer without one: "User: ...", "Assistant: ..." and the end token.

    It starts with the BOS token if the tokenizer itself would add one. Save it with the model, so that the
    model later gets prompts of the same form.
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
    """Returns the template of a tokenizer of Transformers.

    Raises:
        UsageError: The template is not a valid Jinja template, or the tokenizer cannot encode text.
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
    """Returns the date and time that a run keeps if the template writes today's date; else None."""
    return datetime.now().isoformat(timespec="seconds") if asks_for_today(tokenizer) else None


def asks_for_today(tokenizer: Any) -> bool:
    """True if the tokenizer's template writes today's date."""
    template: Any = tokenizer.chat_template or ""
    sources: list[str] = list(template.values()) if is_object(template) else [template]
    return any("strftime_now" in source for source in sources)


def _check(template: Template) -> None:
    """Raises a UsageError for a template that Jinja cannot parse."""
    tool: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
    for tools in ((), (tool,)):
        error = template.apply([{"role": "user", "content": "?"}], tools)
        if isinstance(error, jinja2.TemplateSyntaxError):
            raise UsageError(
                f"The model's chat template cannot be parsed: {error.message} (line {error.lineno}).",
                remedy="Correct the model's chat_template.jinja, or chat_template in tokenizer_config.json.",
            )


def _with_arguments(template: Template) -> Template:
    """Returns the template with `arguments_as_text` set if it needs that.

    Some templates concatenate the arguments to a text, which would write an object as its Python repr.
    """
    call = ToolCall("talikcall", {"talikkey": "talikvalue"})
    messages = [Message("user", "?"), Message("assistant", "", tool_calls=(call,))]
    function: dict[str, Any] = {"name": "talikcall", "description": "", "parameters": {}}
    tools = ({"type": "function", "function": function},)
    written = template.apply(template.chat(messages), tools)
    if isinstance(written, str) and "'talikkey'" not in written:
        return template
    as_text = replace(template, arguments_as_text=True)
    written = as_text.apply(as_text.chat(messages), tools)
    return as_text if isinstance(written, str) and '"talikkey"' in written else template


def as_json(value: Any) -> str:
    """Returns a value as JSON, without escapes for letters that are not ASCII."""
    return json.dumps(value, ensure_ascii=False)


def any_of(tokens: frozenset[str] | set[str]) -> str:
    """Returns a pattern of any of the tokens, the longest first; without tokens it matches nothing."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token) or "(?!)"
