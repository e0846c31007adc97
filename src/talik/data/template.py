"""A conversation -> its whole text by the chat template, and the characters of every answer in it.

The template is only ever asked for text, so any template works whose answers can be found in what it gives.
Where they cannot be found for certain, that is an error with its place, never a guess.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from tokenizers import Tokenizer

from talik.data.messages import Conversation
from talik.errors import UsageError

# What a template raises: by itself (an unknown role), or where an expression meets the wrong messages.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)
PRIVATE_USE = range(0xE000, 0xF900)

Chat = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """The characters `start:stop` of an answer; from `content_stop` on they are its end-of-turn."""

    start: int
    content_stop: int
    stop: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model reads it; `ended` if an end-of-turn token follows the last answer."""

    text: str
    answers: tuple[Answer, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class Template:
    """The tokenizer's chat template, or the plain one (`chat_template`), and the tokens only it may write.

    `backend` gives the same ids as `tokenizer`, and each token with all the characters that it covers.
    """

    tokenizer: Any
    backend: Tokenizer
    chat_template: str | None
    control: re.Pattern[str]
    end_of_turn: re.Pattern[str]

    @property
    def name(self) -> str:
        """Whose template it is, in words."""
        return "plain (the tokenizer has none)" if self.chat_template else "the tokenizer's"


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
    """The template to render with. Raises UsageError for a tokenizer that cannot say where its tokens lie."""
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"the tokenizer ({type(tokenizer).__name__}) does not say which characters its tokens cover",
            remedy="Use a model whose folder has a tokenizer.json.",
        )
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    # A BOS that follows an answer opens the next turn; it does not end this one.
    ends = special - {tokenizer.bos_token} | {tokenizer.eos_token} - {None}
    plain = None if tokenizer.chat_template else plain_template(tokenizer)
    end_of_turn = re.compile(rf"\s*(?:{_any_of(ends).pattern})")
    return Template(tokenizer, _untrimmed(tokenizer), plain, _any_of(special), end_of_turn)


def ends_of_turn(tokenizer: Any, known: int | list[int] | None) -> list[int]:
    """The `known` ids that end an answer, and the one that the template writes and training teaches."""
    ids = [known] if isinstance(known, int) else list(known or ())
    template, answer = template_of(tokenizer), "talik"
    (text,) = _apply([[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]], template)
    if isinstance(text, Exception):
        return ids
    end = template.end_of_turn.match(text, text.rfind(answer) + len(answer))
    token = tokenizer.convert_tokens_to_ids(end.group().strip()) if end else tokenizer.eos_token_id
    return ids if token is None or token in ids else [*ids, token]


def _untrimmed(tokenizer: Any) -> Tokenizer:
    """A copy without the step that adds special tokens: it also takes blanks out of the tokens' ranges."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    backend.no_padding()
    backend.no_truncation()
    return backend


def render(conversations: Sequence[Conversation], template: Template) -> list[Rendered | str]:
    """Each conversation's text and answers, or what is wrong with it, in words."""
    chats = [[{"role": m.role, "content": m.content} for m in c.messages] for c in conversations]
    texts = _apply(chats, template)
    turns = [[i for i, message in enumerate(chat) if message["role"] == "assistant"] for chat in chats]
    opened = [chat[:i] for chat, found in zip(chats, turns, strict=True) for i in found]
    prompts = iter(_apply(opened, template, add_generation_prompt=True))
    rendered: list[Rendered | str] = []
    for chat, text, found in zip(chats, texts, turns, strict=True):
        before = [next(prompts) for _ in found]
        if isinstance(text, Exception):
            rendered.append(f"the chat template refuses these messages: {text}")
        else:
            rendered.append(_find_answers(chat, text, found, before, template))
    return rendered


def _apply(
    chats: list[Chat], template: Template, add_generation_prompt: bool = False
) -> list[str | Exception]:
    """Renders all at once, which is faster; one by one, to know which, only if the template raises."""

    def apply(some: list[Chat]) -> list[str]:
        return template.tokenizer.apply_chat_template(
            some,
            chat_template=template.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )

    try:
        return [*apply(chats)]
    except TEMPLATE_ERRORS as error:
        return (
            [error] if len(chats) == 1 else [_apply([c], template, add_generation_prompt)[0] for c in chats]
        )


def _find_answers(
    chat: Chat, text: str, turns: list[int], prompts: list[str | Exception], template: Template
) -> Rendered | str:
    """From the last answer to the first: each lies before the start of the next."""
    answers: list[Answer] = []
    ended = False
    limit = len(text)
    for turn, prompt in zip(reversed(turns), reversed(prompts), strict=True):
        found = _find_content(chat, text, turn, prompt, limit, template)
        if found is None:
            return f"the answer in message {turn + 1} cannot be found in what the chat template writes"
        start, content_stop = found
        end = template.end_of_turn.match(text, content_stop, limit)
        if not answers:
            ended = end is not None
        # Without an end-of-turn, what the template writes after the last answer leads to the added end token.
        without = content_stop if answers else len(text)
        answers.append(Answer(start, content_stop, end.end() if end else without))
        limit = start
    return Rendered(text, tuple(reversed(answers)), ended)


def _find_content(
    chat: Chat, text: str, turn: int, prompt: str | Exception, limit: int, template: Template
) -> tuple[int, int] | None:
    """The characters from the end of the prompt, as inference will render it, to the end of the answer."""
    start = len(prompt) if isinstance(prompt, str) and text.startswith(prompt) else None
    content = chat[turn]["content"].lstrip()
    if start is not None and start < limit:
        at = start + len(text[start:limit]) - len(text[start:limit].lstrip())
        if not text.startswith(content, at):
            content = content.rstrip()
        stop = at + len(content)
        # There is only one place where it can be: the second rendering would say the same.
        if text.startswith(content, at) and text.find(content, at + 1, limit) < 0:
            return start, stop
    before, after = _around(chat, text, turn, template)
    if start is None and before is not None and text.startswith(before):
        start = len(before)
    if start is None or after is None or not text.endswith(after):
        return None
    stop = len(text) - len(after)
    return (start, stop) if start < stop <= limit else None


def _around(chat: Chat, text: str, turn: int, template: Template) -> tuple[str | None, str | None]:
    """What the template writes before and after a message, found by writing a mark in its place."""
    mark = next(chr(code) * 3 for code in PRIVATE_USE if chr(code) not in text)
    marked = [*chat[:turn], {**chat[turn], "content": mark}, *chat[turn + 1 :]]
    (whole,) = _apply([marked], template)
    if isinstance(whole, Exception) or whole.count(mark) != 1:
        return None, None
    before, _, after = whole.partition(mark)
    return before, after


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """Matches any of `tokens`, the longest first; nothing if there are none."""
    return re.compile(
        "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)"
    )
