"""Data formats: one golden sample each, and every row that does not hold what its format needs."""

from __future__ import annotations

from typing import Any

import pytest

from talik.data.formats import FORMATS, conversations
from talik.data.messages import Message
from talik.data.rows import Place, Row
from talik.errors import DataError, UsageError


def rows_of(*fields: dict[str, Any]) -> list[Row]:
    return [Row(Place("rows.json", line), row) for line, row in enumerate(fields, start=1)]


S, U, A = "system", "user", "assistant"
GOLDEN: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    (
        "messages",
        {"messages": [{"role": S, "content": "s"}, {"role": U, "content": "q"}, {"role": A, "content": "a"}]},
        [(S, "s"), (U, "q"), (A, "a")],
    ),
    (
        "conversations",
        {"id": 7, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [(U, "q"), (A, "a")],
    ),
    (
        "conversations",
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [(S, "s"), (U, "q"), (A, "a")],
    ),
    ("instruction", {"instruction": "i", "input": "x", "output": "a"}, [(U, "i\n\nx"), (A, "a")]),
    ("instruction", {"instruction": "i", "input": "", "output": "a"}, [(U, "i"), (A, "a")]),
    (
        "instruction",
        {"instruction": "i", "input": None, "output": "a", "system": "s"},
        [(S, "s"), (U, "i"), (A, "a")],
    ),
    ("prompt-completion", {"prompt": "q", "completion": " a"}, [(U, "q"), (A, " a")]),
    (
        "prompt-completion",
        {"prompt": [{"role": U, "content": "q"}], "completion": [{"role": A, "content": "a"}]},
        [(U, "q"), (A, "a")],
    ),
    ("input-output", {"input": "q", "output": "a", "source": 5}, [(U, "q"), (A, "a")]),
]


@pytest.mark.parametrize(("name", "fields", "expected"), GOLDEN)
def test_golden_samples(name: str, fields: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found, (conversation,) = conversations(rows_of(fields))
    assert found == name
    assert conversation.messages == tuple(Message(*pair) for pair in expected)
    assert conversation.place == Place("rows.json", 1)


def test_every_format_has_a_golden_sample() -> None:
    assert {name for name, _, _ in GOLDEN} == set(FORMATS)


def test_named_fields() -> None:
    name, (conversation,) = conversations(rows_of({"问": "q", "答": "a", "output": 5}), "问", "答")
    assert name == "fields"
    assert conversation.messages == (Message(U, "q"), Message(A, "a"))


def turn(role: Any = A, content: Any = "a", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


USER = turn(U, "q")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": "q", "output": 5}, "field 'output' must be a string, it is a number (5)"),
    ({"input": "q", "output": None}, "field 'output' must be a string, it is null"),
    ({"input": "q", "output": ["a"]}, "field 'output' must be a string, it is a list ([\"a\"])"),
    ({"input": "q", "output": {"text": "a"}}, 'it is an object ({"text": "a"})'),
    ({"input": "q", "output": True}, "it is a boolean (true)"),
    ({"input": "q", "output": ""}, "field 'output' is empty"),
    ({"input": "q", "output": " \n"}, "field 'output' is blank"),
    ({"input": "", "output": "a"}, "field 'input' is empty"),
    ({"input": "q", "output": "ab\ud83d"}, "field 'output' holds half a character (\\ud83d) at position 2"),
    ({"instruction": "i", "input": 5, "output": "a"}, "field 'input' must be a string, it is a number (5)"),
    ({"prompt": "q", "completion": [turn()]}, "must both be strings or both be lists"),
    ({"messages": "q"}, "field 'messages' must be a list of messages, it is a string"),
    ({"messages": []}, "field 'messages' must be a list of messages, it is a list ([])"),
    (chat(USER, "a"), "field 'messages[1]' must be an object with 'role' and 'content', it is a string"),
    (chat(USER, {"role": A}), "field 'messages[1]' must be an object with 'role' and 'content'"),
    (
        chat(USER, turn("bot")),
        "field 'messages[1].role' is a string (\"bot\"); known are system, user, assistant",
    ),
    (chat(USER, turn(None)), "field 'messages[1].role' is null"),
    (chat(USER, turn(A, None)), "field 'messages[1].content' must be a string, it is null"),
    (chat(USER, turn(A, "")), "field 'messages[1].content' is empty"),
    (chat(USER, turn(A, "a", tool_calls=[{}])), "field 'messages[1].tool_calls' cannot be trained"),
    (chat(USER), "no message is the assistant's"),
    (chat(USER, turn(), USER), "the last message is the user's; it must be the assistant's"),
    (chat(USER, turn(S, "s"), turn()), "a system message must come first"),
    (chat(turn(S, "s"), turn(S, "s"), turn()), "a system message must come first, and only once"),
    ({"conversations": [{"from": "bing", "value": "q"}]}, "known are human, gpt, system"),
]


@pytest.mark.parametrize(("fields", "said"), WRONG)
def test_a_row_that_cannot_be_used_is_refused_with_its_place(fields: dict[str, Any], said: str) -> None:
    name = next(n for n, form in FORMATS.items() if fields.keys() >= set(form.needs))
    good = next(sample for n, sample, _ in GOLDEN if n == name)
    with pytest.raises(DataError) as caught:
        conversations(rows_of(good, fields, good))
    assert str(caught.value).startswith("rows.json:2: ") and said in str(caught.value)
    assert caught.value.remedy


def test_all_wrong_rows_are_counted_in_one_error() -> None:
    good, bad = {"input": "q", "output": "a"}, {"input": "q"}
    with pytest.raises(DataError) as caught:
        conversations(rows_of(good, *[bad] * 12, {"output": 7, "input": "q"}))
    message = str(caught.value)
    assert "rows.json:2: field 'output' is missing; the format 'input-output' needs it" in message
    assert "rows.json:11: " in message and "rows.json:12" not in message and "13 rows in all" in message


def test_mixed_formats_are_refused_with_the_first_line_of_each() -> None:
    with pytest.raises(DataError) as caught:
        conversations(rows_of({"input": "q", "output": "a"}, {"prompt": "q", "completion": "a"}))
    assert "'input-output' first in rows.json:1, 'prompt-completion' first in rows.json:2" in str(
        caught.value
    )


def test_unknown_fields_are_named_with_the_known_formats_and_the_remedy() -> None:
    with pytest.raises(DataError) as caught:
        conversations(rows_of({"question": "q", "answer": "a"}))
    message = str(caught.value)
    assert message.startswith("rows.json:1: ") and "'question', 'answer'" in message
    assert "--input-field" in message and "--output-field" in message
    assert all(name in message for name in FORMATS)


def test_a_named_field_that_is_missing_comes_with_the_columns_that_exist() -> None:
    with pytest.raises(DataError) as caught:
        conversations(rows_of({"question": "q", "answer": "a"}), "question", "anser")
    assert "field 'anser' is missing; the fields of the first row are 'question', 'answer'" in str(
        caught.value
    )


@pytest.mark.parametrize(("given", "said"), [(("q", None), "--output-field"), ((None, "a"), "--input-field")])
def test_one_named_field_alone_is_refused(given: tuple[str | None, str | None], said: str) -> None:
    with pytest.raises(UsageError, match=f"needs {said}"):
        conversations(rows_of({"q": "x", "a": "y"}), *given)
