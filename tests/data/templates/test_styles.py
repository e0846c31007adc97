"""Every style of chat template against an independent reference: prompts, answers and masks."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from helpers.template_styles import STYLES, tokenizer_of
from talik.base.errors import DataError
from talik.data.examples import Example
from talik.data.labels import make_examples
from talik.data.messages import Conversation, Message, ToolCall
from talik.data.reading.rows import Place
from talik.data.templates.template import template_of
from talik.data.templates.template_facts import facts_of, stops_of
from talik.model.tokenizer import fix_date

GOLDEN = Path(__file__).parents[2] / "golden" / "styles"
Q, Q2 = Message("user", "How are you?"), Message("user", "Name a colour.")
A, A2 = Message("assistant", "I am fine, thanks."), Message("assistant", "Blue is a colour.")
THOUGHT = Message("assistant", "It is 5.", reasoning="2 + 3 gives {5}.")
TAGGED = Message("assistant", "<think>\nSay blue.\n</think>\n\nBlue.")
WEATHER = ToolCall("weather", {"city": "Oslo"})
NESTED = ToolCall(
    "weather", {"city": 'the "old" town', "where": {"lat": 59.9, "tags": ["a", "b"]}, "days": 2}
)
CALL = Message("assistant", "", tool_calls=(WEATHER,))
CALLS = Message("assistant", "", tool_calls=(WEATHER, NESTED))
RESULT = Message("tool", "5 degrees", name="weather")
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
)

CASES: dict[str, tuple[Message, ...]] = {
    "one turn": (Q, A),
    "three turns": (Q, A, Q2, A2, Q, A),
    "system": (Message("system", "Be brief."), Q, A, Q2, A2),
    "blanks": (Q, Message("assistant", "  \n Blue  sky \n\n"), Q2, A2),
    "reasoning": (Q, THOUGHT),
    "reasoning in all": (Q, THOUGHT, Q2, THOUGHT),
    "reasoning in one": (Q, THOUGHT, Q2, A2),
    "thought in content": (Q, TAGGED, Q2, TAGGED),
    "one call": (Q, CALL, RESULT, A2),
    "two calls": (Q, CALLS, RESULT, RESULT, A2),
    "nested arguments": (Q, Message("assistant", "", tool_calls=(NESTED,)), RESULT, A2),
    "call beside text": (Q, replace(CALL, content="I look."), RESULT, A2),
    "call last": (Q, A, Q2, CALL),
    "reasoning and a call": (Q, replace(CALL, reasoning="Look first."), RESULT, THOUGHT, Q2, THOUGHT),
    "call without tools": (Q, CALL, RESULT, A2),
    "tools not called": (Q, A, Q2, A2),
    "Chinese": (Message("user", "你好"), Message("assistant", "你好！🎉"), Q, A),
    "developer": (Message("developer", "Be brief."), Q, A),
    "first answer not trained": (Q, replace(A, trained=False), Q2, A2),
}
# The thought at the start of what is written; the prompt may have opened it.
REASONING = re.compile(
    r"(<\|channel\|>final<\|message\|>)?\s*(<think>)?\n?(Say blue\.|2 \+ 3 gives \{5\}\.|Look first\.)?\n?"
    r"</think>\s*"
    r"|<\|channel\|>analysis<\|message\|>(2 \+ 3 gives \{5\}\.|Look first\.)"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "assistant": {},
    "last": {"train_on": "last"},
    "all": {"train_on": "all"},
    "no reasoning": {"train_reasoning": False},
}


def conversation(case: str) -> Conversation:
    messages = CASES[case]
    calls = any(message.tool_calls for message in messages) and case != "call without tools"
    tools = TOOLS if calls or case == "tools not called" else ()
    return Conversation(messages, Place("rows", 1), tools)


def as_chat(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """The messages as a program that serves the model sends them."""
    chat, ids = [], []
    for message in messages:
        made: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            made |= {name: message.reasoning for name in ("reasoning_content", "thinking")}
        if message.tool_calls:
            ids = [f"call{n:05d}" for n in range(len(message.tool_calls))]
            made["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for id, call in zip(ids, message.tool_calls, strict=True)
            ]
        if message.role == "tool":
            made |= {"name": message.name, "tool_call_id": ids.pop(0)}
        chat.append(made)
    return chat


class Reference:
    """The expected examples of a case, from each rendered prompt and each answer written by hand."""

    def __init__(self, name: str, case: str) -> None:
        self.tokenizer, style = tokenizer_of(name), STYLES[name]
        self.tools = [dict(tool) for tool in conversation(case).tools] or None
        messages = CASES[case]
        if messages[0].role == "developer" and style.facts.get("developer") is False:
            messages = (replace(messages[0], role="system"), *messages[1:])
        self.chat = as_chat(messages)
        if style.arguments_as_text:
            for call in (call for m in self.chat for call in m.get("tool_calls", ())):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        self.messages, self.written = messages, style.written

    def prompt(self, turn: int) -> str:
        return self.tokenizer.apply_chat_template(
            self.chat[:turn], tools=self.tools, add_generation_prompt=True, tokenize=False
        )

    def examples(self, train_on: str) -> list[list[tuple[str, str]]]:
        """Groups of (prompt, written): turns whose prompts continue the text before share an example."""
        turns = [i for i, m in enumerate(self.messages) if m.role == "assistant"]
        if train_on != "all":
            turns = [i for i in turns if self.messages[i].trained is not False]
        groups: list[list[tuple[str, str]]] = []
        for turn in turns[-1:] if train_on == "last" else turns:
            prompt = self.prompt(turn)
            made = (prompt, self.written(self.messages[turn], prompt))
            if groups and prompt.startswith("".join(groups[-1][-1])):
                groups[-1].append(made)
            else:
                groups.append([made])
        return groups


def mask(example: Example) -> list[bool]:
    return [label != -100 for label in example.labels]


@pytest.mark.parametrize(("name", "case"), list(itertools.product(STYLES, CASES)))
def test_each_answer_follows_its_prompt_and_is_what_the_layout_says(name: str, case: str) -> None:
    if case in STYLES[name].refused:
        with pytest.raises(DataError, match=STYLES[name].refused[case]):
            make_examples([conversation(case)], tokenizer_of(name))
        return
    reference = Reference(name, case)
    for options in OPTIONS.values():
        train_on = options.get("train_on", "assistant")
        made, _ = make_examples([conversation(case)], reference.tokenizer, **options)
        groups = reference.examples(train_on)
        assert len(made) == len(groups)
        before = ""
        for example, group in zip(made, groups, strict=True):
            text = check_text(example, group, name)
            trained = [(len(prompt), len(prompt + written)) for prompt, written in group]
            if train_on == "all":
                trained = [(common(before, group[0][0]), len(text))]
            if "train_reasoning" in options:
                trained = [without_reasoning(text, *span) for span in trained]
            check_mask(example, text, trained, reference.tokenizer)
            before = text


def common(first: str, second: str) -> int:
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in alike)


def check_text(example: Example, group: list[tuple[str, str]], name: str) -> str:
    """The text of an example: the last prompt, what is written, and only what a template writes after it."""
    tokenizer, expected = tokenizer_of(name), "".join(group[-1])
    for prompt, written in group:
        assert expected.startswith(prompt + written)
    text = tokenizer.decode(example.input_ids)
    if STYLES[name].rstrip:  # the blanks after control tokens are in no token
        assert "".join(text.split()).startswith("".join(expected.split()))
        text = expected + STYLES[name].tail
    assert text.removeprefix(expected) in {"", "\n", STYLES[name].tail}
    assert text.startswith(expected)
    assert list(example.input_ids) == tokenizer(text, add_special_tokens=False).input_ids
    return text


def without_reasoning(text: str, start: int, stop: int) -> tuple[int, int]:
    """The answer without its thought, if it has one."""
    found = REASONING.match(text, start)
    return (found.end() if found else start), stop


def check_mask(example: Example, text: str, trained: list[tuple[int, int]], tokenizer: Any) -> None:
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    expected = [any(max(a, start) < min(b, stop) for start, stop in trained) for a, b in offsets]
    expected[0] = False
    assert mask(example) == expected


def listing(example: Example, tokenizer: Any) -> str:
    """One token a line: "+" trained or "-" masked, and its text."""
    texts = [tokenizer.decode([token]) for token in example.input_ids]
    return "".join(f"{'+' if on else '-'} {text!r}\n" for on, text in zip(mask(example), texts, strict=True))


GOLDENS = {
    "chatml": "system",
    "llama2": "system",
    "llama3_1": "one call",
    "mistral_v3": "two calls",
    "gemma3": "system",
    "phi3": "three turns",
    "qwen2_5": "two calls",
    "qwen3": "reasoning and a call",
    "qwen3_5": "reasoning and a call",
    "deepseek_r1": "reasoning in all",
    "glm4_5": "reasoning and a call",
    "gpt_oss": "reasoning and a call",
}


def golden(name: str, found: str, request: pytest.FixtureRequest) -> str:
    """The golden text of a name; with --update-golden the found text is written first."""
    file = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        file.write_text(found, encoding="utf-8")
    return file.read_text(encoding="utf-8")


def on_a_day(name: str) -> Any:
    """The tokenizer of a style, whose template writes one date every day."""
    tokenizer = tokenizer_of.__wrapped__(name)
    fix_date(tokenizer, datetime(2026, 1, 2))
    return tokenizer


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_masks_of_the_most_used_styles(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = on_a_day(name)
    examples, _ = make_examples([conversation(GOLDENS[name])], tokenizer)
    found = "\n".join(listing(example, tokenizer) for example in examples)
    assert found == golden(name, found, request)


def test_golden_facts(request: pytest.FixtureRequest) -> None:
    found = ""
    for name in STYLES:
        facts = facts_of(template_of(on_a_day(name)))
        today = facts_of(template_of(tokenizer_of(name))).today
        lines = [f"    {key}: {value!r}" for key, value in {**facts.as_dict(), "today": today}.items()]
        found += "\n".join([name, *lines, ""])
    assert found == golden("facts", found, request)


@pytest.mark.parametrize("name", STYLES)
def test_every_end_that_is_trained_stops_an_answer(name: str) -> None:
    tokenizer = tokenizer_of(name)
    stops = stops_of(tokenizer, tokenizer.eos_token_id)
    for case in CASES.keys() - STYLES[name].refused.keys():
        for written in (
            written for group in Reference(name, case).examples("assistant") for _, written in group
        ):
            last = tokenizer(written.rstrip(), add_special_tokens=False).input_ids[-1]
            assert last in stops.ids or any(text in written for text in stops.texts)
            # Nothing before the end stops it.
            assert (
                sum(token in stops.ids for token in tokenizer(written, add_special_tokens=False).input_ids)
                <= 1
            )
