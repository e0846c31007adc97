"""Data formats: a golden sample of each, and rows that lack what their format needs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talik.base.errors import DataError, UsageError
from talik.data.formats.formats import FORMATS, conversations, converter_of, to_row
from talik.data.messages import Conversation, Document, Message, ToolCall
from talik.data.reading.rows import Place, Row, RowError


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
    ("input-target", {"Input": "q", "TARGET": "a"}, [(U, "q"), (A, "a")]),
    ("question-answer", {"question": "q", "answer": ["a"]}, [(U, "q"), (A, "a")]),
    (
        "question-response",
        {"question": "q", "response": "a", "system_prompt": "s"},
        [(S, "s"), (U, "q"), (A, "a")],
    ),
    ("query-response", {"query": "q", "response": "a", "history": []}, [(U, "q"), (A, "a")]),
    ("prompt-response", {"Prompt": "q", "Response": "a"}, [(U, "q"), (A, "a")]),
    ("user-assistant", {"user": "q", "assistant": "a"}, [(U, "q"), (A, "a")]),
    (
        "instruction-response",
        {"instruction": "i", "context": "c", "response": "a"},
        [(U, "i\n\nc"), (A, "a")],
    ),
    (
        "instruction",
        {"instruction": "i", "output": "a", "history": [["q1", "a1"], ["q2", "a2"]]},
        [(U, "q1"), (A, "a1"), (U, "q2"), (A, "a2"), (U, "i"), (A, "a")],
    ),
    (
        "messages",
        {"system": "s", "messages": [{"role": U, "content": "q"}, {"role": A, "content": "a"}]},
        [(S, "s"), (U, "q"), (A, "a")],
    ),
    (
        "messages",
        {
            "messages": [
                {"role": S, "content": ""},
                {"from": "human", "value": "q"},
                {"role": A, "content": "a"},
            ]
        },
        [(U, "q"), (A, "a")],
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "d"},
                {"role": U, "content": [{"type": "text", "text": "q"}, {"type": "text", "value": "!"}]},
                {"role": A, "content": [{"type": "text", "text": "a"}], "id": 5},
            ]
        },
        [("developer", "d"), (U, "q!"), (A, "a")],
    ),
    ("text", {"text": "t", "url": "u"}, []),
]


@pytest.mark.parametrize(("name", "fields", "expected"), GOLDEN)
def test_golden_samples(name: str, fields: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found, (conversation,) = conversations(rows_of(fields))
    assert found == name
    if isinstance(conversation, Document):
        assert (conversation.text, expected) == ("t", [])
        return
    assert conversation.messages == tuple(Message(*pair) for pair in expected)
    assert conversation.place == Place("rows.json", 1)


def test_every_format_has_a_golden_sample() -> None:
    assert {name for name, _, _ in GOLDEN} == set(FORMATS)


def test_named_fields() -> None:
    name, (conversation,) = conversations(rows_of({"问": "q", "答": "a", "output": 5}), "问", "答")
    assert name == "fields" and isinstance(conversation, Conversation)
    assert conversation.messages == (Message(U, "q"), Message(A, "a"))


def test_named_fields_may_have_capitals() -> None:
    _, (conversation,) = conversations(rows_of({"Frage": "q", "Antwort": "a"}), "Frage", "Antwort")
    assert isinstance(conversation, Conversation)
    assert conversation.messages == (Message(U, "q"), Message(A, "a"))


@pytest.mark.parametrize("extra", [{}, {"image": "x.png"}, {"chosen": "a", "rejected": "b"}])
def test_another_format_is_named_before_anything_else_is_checked(extra: dict[str, Any]) -> None:
    """A row of another format is refused for that, with media and preferences, too."""
    good, other = rows_of({"input": "q", "output": "a"}, {"prompt": "q", "completion": "a", **extra})
    converter = converter_of([good])
    with pytest.raises(
        RowError, match="the row has the format 'prompt-completion', and its file 'input-output'"
    ):
        converter.convert(other)


def test_media_and_preferences_are_named_before_missing_fields() -> None:
    """A row without the needed fields and of no other format."""
    converter = converter_of(rows_of({"input": "q", "output": "a"}))
    both = {"input": "q", "image": "x.png", "chosen": "a", "rejected": "b"}
    kinds: list[str] = []
    for taken_out in ((), ("image",), ("image", "chosen")):
        (row,) = rows_of({name: value for name, value in both.items() if name not in taken_out})
        with pytest.raises(RowError) as caught:
            converter.convert(row)
        kinds.append(caught.value.kind)
    assert kinds == ["media", "preferences", "missing field"]


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
    (
        {"input": "q", "output": "ab\ud83d"},
        "field 'output' contains half a character (\\ud83d) at position 2",
    ),
    ({"instruction": "i", "input": 5, "output": "a"}, "field 'input' must be a string, it is a number (5)"),
    ({"prompt": "q", "completion": [turn()]}, "must both be strings or both be lists"),
    ({"messages": "q"}, "field 'messages' must be a list of messages, it is a string"),
    ({"messages": []}, "field 'messages' must be a list of messages, it is a list ([])"),
    (chat(USER, "a"), "must be an object with 'role' and 'content', or 'from' and 'value', it is a string"),
    (chat(USER, {"role": A}), "field 'messages[1]' must be an object with 'role' and 'content'"),
    (
        chat(USER, turn("bot")),
        "field 'messages[1].role' is a string (\"bot\"); known are system, developer, user",
    ),
    (chat(USER, turn(None)), "field 'messages[1].role' is null"),
    (chat(USER, turn(A, None)), "field 'messages[1].content' must be a string, it is null"),
    (chat(USER, turn(A, "")), "field 'messages[1].content' is empty"),
    (
        chat(USER, turn(A, "a", tool_calls=[{}])),
        "field 'messages[1].tool_calls[0]' must be a call with a 'name'",
    ),
    (
        chat(USER, turn(A, "", tool_calls=[{"name": "f", "arguments": "{"}])),
        "tool_calls[0].arguments' is not valid JSON",
    ),
    (
        chat(turn(U, "q", tool_calls=[{"name": "f"}]), turn()),
        "field 'messages[0]' is the user's and has tool calls",
    ),
    (
        chat(USER, turn(A, "a", reasoning="r", thinking="t")),
        "has two different texts of reasoning: reasoning and thinking",
    ),
    (chat(USER, turn(A, "a", weight=0.5)), "field 'messages[1].weight' must be 0 or 1"),
    (chat(USER, turn(A, "a", weight=1, train=False)), "marks that contradict one another: weight, train"),
    (chat(USER, turn(A, "a", refusal="no")), "field 'messages[1].refusal' is not used, and its value is"),
    (
        chat(turn(U, [{"type": "image_url", "image_url": "u"}]), turn()),
        "has images (field 'messages[0].content[0]')",
    ),
    (chat(turn(U, [{"type": "riddle"}]), turn()), "field 'messages[0].content[0].type' is a string"),
    (chat(turn(), USER, turn()), "the conversation starts with an assistant message"),
    (chat(USER, USER, turn()), "messages 1 and 2 are both user messages"),
    (chat(USER, turn(), turn()), "messages 2 and 3 are both assistant messages"),
    (chat(turn("tool", "r"), turn()), "the conversation starts with a tool message"),
    (chat(USER, turn("tool", "r"), turn()), "message 2 is a tool result without a call before it"),
    ({**chat(USER, turn()), "images": ["a.png"]}, "the row has images (field 'images')"),
    ({**chat(USER, turn()), "label": False}, "field 'label' says whether the answer is good"),
    ({**chat(USER, turn()), "tools": "[{"}, "field 'tools' is not valid JSON"),
    ({**chat(USER, turn()), "tools": [{"description": "d"}]}, "must define a function with a 'name'"),
    ({**chat(USER, turn()), "sytem": "s"}, "field 'sytem' is not used; 'system' may be meant"),
    (
        {**chat(turn(S, "s"), USER, turn()), "system": "t"},
        "field 'system' differs from the system message in the list",
    ),
    (
        {**chat(USER, turn(A, "", tool_calls=[{"name": "g"}])), "tools": [{"name": "f"}]},
        "message 2 calls the tool 'g', which is not among the row's tools",
    ),
    (
        {"instruction": "i", "output": "a", "history": [["q"]]},
        "field 'history[0]' must be a pair of question and answer",
    ),
    ({"instruction": "i", "output": "a", "history": [["q", ""]]}, "field 'history[0][1]' is empty"),
    ({"question": "q", "answer": ["a", "b"]}, "field 'answer' has 2 answers"),
    ({"prompt": "q", "completion": "a", "label": "true"}, "field 'label' says whether the answer is good"),
    ({"text": " "}, "field 'text' is blank"),
    (chat(USER), "the conversation has no assistant message"),
    (chat(USER, turn(), USER), "the last message is a user message; it must be an assistant message"),
    (chat(USER, turn(S, "s"), turn()), "message 2 is a system message; only the first message may be one"),
    (chat(turn(S, "s"), turn(S, "s"), turn()), "message 2 is a system message"),
    ({"conversations": [{"from": "bing", "value": "q"}]}, "known are system, developer, user, human"),
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
        conversations(rows_of({"frage": "q", "antwort": "a"}))
    message = str(caught.value)
    assert message.startswith("rows.json:1: ") and "'frage', 'antwort'" in message
    assert "--input-field" in message and "--output-field" in message
    assert all(name in message for name in FORMATS)


def test_a_named_field_that_is_missing_comes_with_the_columns_that_exist() -> None:
    with pytest.raises(DataError) as caught:
        conversations(rows_of({"question": "q", "answer": "a"}), "question", "anser")
    message = str(caught.value)
    assert (
        "field 'anser' is missing; 'answer' may be a misspelling of it; the fields of the first row are"
        in message
    )


@pytest.mark.parametrize(("given", "said"), [(("q", None), "--output-field"), ((None, "a"), "--input-field")])
def test_one_named_field_alone_is_refused(given: tuple[str | None, str | None], said: str) -> None:
    with pytest.raises(UsageError, match=f"needs {said}"):
        conversations(rows_of({"q": "x", "a": "y"}), *given)


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, "é"]}'}}
F = {"type": "function", "function": {"name": "f"}}
CALLS = (ToolCall("f", {"x": [1, "é"]}, "c1"),)


def test_calls_results_and_tools_in_the_form_of_openai() -> None:
    turns = [
        USER,
        turn(A, None, tool_calls=[CALL], reasoning_content="r"),
        turn("tool", "5", tool_call_id="c1"),
        turn(),
    ]
    _, (made,) = conversations(rows_of({**chat(*turns), "tools": [{"name": "f"}]}))
    assert isinstance(made, Conversation)
    assert made.messages[1] == Message(A, "", "r", CALLS)
    assert made.messages[2] == Message("tool", "5", call_id="c1")
    assert made.tools == (F,)


def test_calls_and_results_in_the_form_of_sharegpt_are_one_answer() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "I look."},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "function_call", "value": '[{"name": "f", "arguments": {"x": 2}}]'},
        {"from": "observation", "value": "5"},
        {"from": "observation", "value": "6"},
        {"from": "gpt", "value": "a"},
    ]
    _, (made,) = conversations(rows_of({"conversations": turns, "tools": '[{"name": "f"}]'}))
    assert isinstance(made, Conversation)
    calls = (ToolCall("f", {"x": 1}), ToolCall("f", {"x": 2}))
    assert made.messages[1] == Message(A, "I look.", tool_calls=calls)
    assert [m.role for m in made.messages] == [U, A, "tool", "tool", A]


def test_parts_for_reasoning_calls_and_tools() -> None:
    parts = [
        {"type": "reasoning", "value": "r"},
        {"type": "text", "value": "a"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": [1, "é"]}, "id": "c1"}'},
    ]
    system = turn(S, [{"type": "text", "text": "s"}, {"type": "tools", "value": '[{"name": "f"}]'}])
    _, (made,) = conversations(rows_of(chat(system, USER, turn(A, parts), turn("tool", {"x": 5}), turn())))
    assert isinstance(made, Conversation)
    assert made.messages[2] == Message(A, "a", "r", CALLS) and made.tools == (F,)
    assert made.messages[3].content == '{"x": 5}'


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"loss_weight": 0.0}])
def test_a_marked_turn_is_not_trained(mark: dict[str, Any]) -> None:
    _, (made,) = conversations(rows_of(chat(USER, turn(A, "a", **mark), USER, turn(A, "b", weight=1))))
    assert isinstance(made, Conversation)
    assert [m.trained for m in made.messages] == [None, False, None, None]


def test_answers_in_a_prompt_are_not_trained() -> None:
    _, (made,) = conversations(rows_of({"prompt": [USER, turn(), USER], "completion": [turn(A, "b")]}))
    assert isinstance(made, Conversation)
    assert [m.trained for m in made.messages] == [None, False, None, None]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "a chosen and a rejected answer"),
        ({"chosen": [], "rejected": []}, "a chosen and a rejected answer"),
        ({"image": "a.png", "caption": "c"}, "the row has images"),
        ({"intruction": "i", "output": "a"}, "'intruction' may be a misspelling of 'instruction'"),
        ({"input": "i", "outputs": "a"}, "'outputs' may be a misspelling of 'output'"),
    ],
)
def test_rows_of_no_format_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        conversations(rows_of(fields))


def test_fields_that_are_not_read_are_counted() -> None:
    rows = rows_of(
        {"input": "q", "output": "a", "id": 1}, {"input": "q", "output": "a", "id": 0, "source": "s"}
    )
    converter = converter_of(rows)
    for row in rows:
        converter.convert(row)
    assert converter.unread == {"id": 2, "source": 1}


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
values = st.recursive(st.integers(-9, 9) | texts, lambda inner: st.dictionaries(texts, inner, max_size=2))
calls = st.tuples(texts, st.dictionaries(texts, values, max_size=3), st.none() | texts)
answers = st.tuples(texts, st.just("") | texts, st.lists(calls, max_size=2), st.sampled_from([None, False]))


@given(st.lists(st.tuples(texts, answers), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_written_row_is_read_as_the_same_conversation(turns: Any) -> None:
    messages: list[Message] = []
    for question, (answer, reasoning, called, trained) in turns:
        tool_calls = tuple(ToolCall(*call) for call in called)
        messages += [Message(U, question), Message(A, answer, reasoning, tool_calls, trained=trained)]
    made = Conversation(tuple(messages), Place("rows.json", 1))
    row = json.loads(json.dumps(to_row(made)))
    assert conversations(rows_of(row)) == ("messages", [made])


def test_messages_of_a_table_have_every_key_and_null_where_it_does_not_belong() -> None:
    keys = dict.fromkeys(["role", "from", "content", "value", "tool_calls", "name", "weight", "images"])
    turns = [{**keys, "from": "human", "value": "q"}, {**keys, "role": A, "content": "a"}]
    _, (made,) = conversations(rows_of({**chat(*turns), "tools": None, "system": None}))
    assert isinstance(made, Conversation) and made.messages == (Message(U, "q"), Message(A, "a"))
