"""Labels: golden files, properties of any conversation on any template, and refused rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.small_tokenizers import KINDS, make_tokenizer
from talik.base.errors import DataError, UsageError
from talik.data.examples import Example
from talik.data.formats.formats import FORMATS, conversations
from talik.data.labels import make_examples
from talik.data.messages import Conversation, Message
from talik.data.reading.rows import Place, Row
from talik.data.report import TooLong, TrainOn
from talik.data.templates.template import plain_template
from talik.data.templates.template_facts import Stops, stops_of

GOLDEN = Path(__file__).parents[1] / "golden" / "labels"
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "I am fine, thanks."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue.\n    x"},
]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [SYSTEM, *TURNS]},
    "conversations": {
        "conversations": [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "I am fine."}]
    },
    "instruction": {"instruction": "Translate this into English:", "input": "guten Tag", "output": "Hello"},
    "prompt-completion": {"prompt": "The sky is", "completion": " blue"},
    "input-output": {"input": "What is 2 + 3?", "output": "5"},
    "input-target": {"Input": "What is 2 + 3?", "Target": "5"},
    "query-response": {
        "query": "What is 2 + 3?",
        "response": "5",
        "history": [["How are you?", "I am fine."]],
    },
    "question-answer": {"question": "What is 2 + 3?", "answer": "5", "system": "Be brief."},
    "question-response": {"question": "What is 2 + 3?", "response": "5"},
    "prompt-response": {"prompt": "What is 2 + 3?", "response": "5"},
    "user-assistant": {"user": "What is 2 + 3?", "assistant": "5"},
    "instruction-response": {"instruction": "Translate this:", "context": "guten Tag", "response": "Hello"},
    "text": {"text": "The sky is blue."},
}
CASES: dict[str, tuple[str, dict[str, Any], TrainOn]] = {
    **{f"format-{name}": ("chatml", row, "assistant") for name, row in ROWS.items()},
    **{f"template-{name}": (name, ROWS["messages"], "assistant") for name in KINDS},
    "template-gemma": ("gemma", {"messages": TURNS}, "assistant"),
    "train-last": ("chatml", ROWS["messages"], "last"),
    "train-all": ("chatml", ROWS["messages"], "all"),
}


def listing(example: Example, tokenizer: Any) -> str:
    """One token a line: "+" trained or "-" masked, and its text with line breaks as \\n."""
    marks = ["-" if label == -100 else "+" for label in example.labels]
    texts = [tokenizer.decode([token]) for token in example.input_ids]
    return "".join(f"{mark} {text!r}\n" for mark, text in zip(marks, texts, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_golden_labels(case: str, request: pytest.FixtureRequest) -> None:
    name, row, train_on = CASES[case]
    tokenizer = make_tokenizer(name)
    _, made = conversations([Row(Place("rows.json", 1), row)])
    examples, _ = make_examples(made, tokenizer, train_on=train_on)
    found = "\n".join(listing(example, tokenizer) for example in examples)
    golden = GOLDEN / f"{case}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(found, encoding="utf-8")
    assert found == golden.read_text(encoding="utf-8")


def test_every_format_and_every_way_to_train_has_a_golden_file() -> None:
    assert {name for name in CASES if name.startswith("format-")} == {f"format-{name}" for name in FORMATS}
    assert {train_on for _, _, train_on in CASES.values()} == set(get_args(TrainOn))
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)


WORDS = [
    "blue",
    " sky",
    "\n",
    "  ",
    "你好",
    "🎉",
    "é",
    "def f(x):",
    "\n    return",
    "5",
    "x",
    "<think>",
    "{{ a }}",
    "\\",
]


def random_text(dice: random.Random) -> str:
    text = "".join(dice.choices(WORDS, k=dice.randint(1, 8)))
    return text if text.strip() else text + "x"


def random_conversation(dice: random.Random, system: bool) -> Conversation:
    messages = [Message("system", random_text(dice))] if system and dice.random() < 0.5 else []
    for _ in range(dice.randint(1, 3)):
        messages += [Message("user", random_text(dice)), Message("assistant", random_text(dice))]
    return Conversation(tuple(messages), Place("random", dice.randint(1, 10**9)))


# What of an answer must be trained, by template: (text, is it the last answer) -> text.
TRAINED: dict[str, Callable[[str, bool], str]] = {
    "chatml": lambda text, last: text + "<|im_end|>",
    "llama3": lambda text, last: text.strip() + "<|eot_id|>",
    "llama2": lambda text, last: " " + text.strip() + " </s>",
    "gemma": lambda text, last: text.strip() + "<end_of_turn>",
    "qwen3": lambda text, last: "<think>\n\n</think>\n\n" + text.lstrip("\n") + "<|im_end|>",
    "none": lambda text, last: " " + text + "</s>",
    "unended": lambda text, last: text + "\n<|user|>",
}


def trained_texts(example: Example, tokenizer: Any) -> list[str]:
    ids = list(example.input_ids)
    return [
        tokenizer.decode(ids[: s.stop])[len(tokenizer.decode(ids[: s.start])) :]
        for s in example.spans
        if s.trained
    ]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_trained_is_the_answers_with_their_end(name: str) -> None:
    dice, tokenizer = random.Random(name), make_tokenizer(name)
    made = [random_conversation(dice, system=name != "gemma") for _ in range(60)]
    for conversation in made:
        examples, report = make_examples([conversation], tokenizer)
        answers = [m.content for m in conversation.messages if m.role == "assistant"]
        # Qwen 3 writes the place for a thought in the last answer alone, so each turn has its own example.
        assert len(examples) == (len(answers) if name == "qwen3" else 1)
        expected = [
            TRAINED[name](text, text_number == len(answers)) for text_number, text in enumerate(answers, 1)
        ]
        found = [text for example in examples for text in trained_texts(example, tokenizer)]
        assert len(found) == len(expected)
        for text, answer in zip(found, expected, strict=True):
            # A token that straddles may add blanks of the prompt or the template, nothing else.
            assert answer in text and not text.replace(answer, "", 1).strip()
        if report.boundary_merged == 0:
            assert found == expected


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("train_on", get_args(TrainOn))
def test_one_sequence_whole_spans_and_labels(name: str, train_on: TrainOn) -> None:
    dice, tokenizer = random.Random(name), make_tokenizer(name)
    made = [random_conversation(dice, system=name != "gemma") for _ in range(30)]
    examples, report = make_examples(made, tokenizer, train_on=train_on)
    last = {example.place: example for example in examples}
    for conversation in made:
        chat = [{"role": m.role, "content": m.content} for m in conversation.messages]
        template = tokenizer.chat_template or plain_template(tokenizer)
        whole = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
        end = "<|user|>" if name == "unended" else ""
        found = tokenizer(whole + end, add_special_tokens=False).input_ids
        assert list(last[conversation.place].input_ids) == found
    for example in examples:
        stops = [0, *(span.stop for span in example.spans)]
        assert [span.start for span in example.spans] == stops[:-1] and stops[-1] == example.length
        assert all(a.trained != b.trained for a, b in zip(example.spans, example.spans[1:], strict=False))
        assert [label for label in example.labels if label != -100] == [
            token for token, label in zip(example.input_ids, example.labels, strict=True) if label == token
        ]
        assert sum(label != -100 for label in example.labels) == example.trained_tokens
        assert example.labels[0] == -100
        if train_on == "all" and name != "qwen3":
            assert example.trained_tokens == example.length - 1
    assert report.rows == len(last) == 30 and report.ends_added == 0
    assert report.examples == len(examples) and (name == "qwen3" or len(examples) == 30)
    assert report.tokens == sum(e.length for e in examples) and report.longest == max(
        e.length for e in examples
    )


def talk(*texts: str, system: str | None = None, line: int = 1) -> Conversation:
    roles = ["user", "assistant"] * len(texts)
    messages = [Message("system", system)] if system else []
    messages += [Message(role, text) for role, text in zip(roles, texts, strict=False)]
    return Conversation(tuple(messages), Place("rows.json", line))


def test_last_trains_only_the_last_answer(chatml: Any) -> None:
    (example,), _ = make_examples([talk("a", "same", "b", "same")], chatml, train_on="last")
    assert trained_texts(example, chatml) == ["same<|im_end|>"] and len(example.spans) == 3


def test_an_answer_that_also_stands_elsewhere_is_found_where_it_is(chatml: Any) -> None:
    for answer in ("assistant", "<", "im", "\n", "a", "user\n", "nt", "Hello"):
        answer = answer if answer.strip() else answer + "a"
        (example,), _ = make_examples([talk(answer, answer, answer, answer)], chatml)
        assert trained_texts(example, chatml) == [answer + "<|im_end|>"] * 2


def test_an_answer_that_begins_like_what_the_template_inserts_is_trained_whole() -> None:
    tokenizer = make_tokenizer("qwen3")
    (example,), _ = make_examples([talk("a", "<")], tokenizer)
    assert trained_texts(example, tokenizer) == ["<think>\n\n</think>\n\n<<|im_end|>"]


def test_a_bos_token_after_an_answer_does_not_end_it() -> None:
    backend = make_tokenizer("none").backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + m.content + ':' }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    examples, report = make_examples([talk("a", "b", "c", "d")], tokenizer)
    found = [trained_texts(example, tokenizer) for example in examples]
    assert found == [["b</s>"], ["d</s>"]] and report.ends_added == 2


def test_thoughts_that_the_template_moves_are_trained_where_they_stand() -> None:
    tokenizer = make_tokenizer("qwen3")
    answer = "<think>\n2 + 3\n</think>\n\nIt is 5."
    examples, report = make_examples([talk("a", answer, "b", answer)], tokenizer)
    assert [trained_texts(example, tokenizer) for example in examples] == [[answer + "<|im_end|>"]] * 2
    assert "2 + 3" not in tokenizer.decode(list(examples[1].input_ids[: examples[1].spans[0].stop]))
    assert report.split_turns == 1


def test_the_end_is_trained_though_it_is_the_pad_token(chatml: Any) -> None:
    (example,), _ = make_examples([talk("a", "b")], chatml)
    assert chatml.pad_token_id == chatml.eos_token_id
    assert example.labels[-2] == chatml.eos_token_id and example.labels[-1] == -100


def test_indentation_is_trained_where_the_tokenizer_trims_its_offsets() -> None:
    tokenizer = make_tokenizer("llama3")
    offsets = tokenizer("a   \n   b", return_offsets_mapping=True)["offset_mapping"]
    assert any(start == stop for start, stop in offsets[1:])
    (example,), _ = make_examples([talk("x", "if a:\n    b\n   \n    c")], tokenizer)
    assert trained_texts(example, tokenizer) == ["if a:\n    b\n   \n    c<|eot_id|>"]
    assert [span.trained for span in example.spans] == [False, True]


def test_a_token_over_the_boundary_is_trained_and_counted(chatml: Any) -> None:
    (example,), report = make_examples([talk("x", "   x")], chatml)
    assert report.boundary_merged == 1 and trained_texts(example, chatml) == ["\n   x<|im_end|>"]
    assert make_examples([talk("x", "x")], chatml)[1].boundary_merged == 0


def test_the_next_role_ends_an_answer_where_the_template_writes_no_other_end() -> None:
    tokenizer = make_tokenizer("unended")
    (example,), report = make_examples([talk("a", "b", "c", "d")], tokenizer)
    assert trained_texts(example, tokenizer) == ["b\n<|user|>", "d\n<|user|>"]
    assert report.facts and report.facts.end_from == "next role"
    assert stops_of(tokenizer, 7) == Stops((7,), ("\n<|user|>",))


def test_a_template_without_any_end_gets_the_end_token_and_it_is_trained() -> None:
    tokenizer = make_tokenizer("unended")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    (example,), report = make_examples([talk("a", "b")], tokenizer)
    assert report.ends_added == 1
    assert example.input_ids[-1] == example.labels[-1] == tokenizer.eos_token_id


def test_the_plain_template_is_named(chatml: Any) -> None:
    assert (
        make_examples([talk("a", "b")], make_tokenizer("none"))[1].template
        == "plain (the tokenizer has none)"
    )
    assert make_examples([talk("a", "b")], chatml)[1].template == "the tokenizer's"


def test_progress_is_told(chatml: Any) -> None:
    told: list[int] = []
    make_examples([talk("a", "b")] * 1100, chatml, progress=told.append)
    assert told[-1] == 1100 and told == sorted(told)


# ... <|im_start|> assistant \n | x x x <|im_end|> | \n
LONG = talk("a", "x x x", line=7)
SHORT = talk("a", "b", line=8)


def lengths(tokenizer: Any) -> tuple[int, int]:
    """The length of the LONG example and the first trained token in it."""
    (example,), _ = make_examples([LONG], tokenizer)
    return example.length, example.spans[1].start


@pytest.mark.parametrize(
    ("lost", "kind"),
    [(2, "end lost"), (3, "answer cut"), (4, "answer cut"), (5, "prompt cut"), (6, "prompt cut")],
)
def test_too_long_by_kind(chatml: Any, lost: int, kind: str) -> None:
    length, start = lengths(chatml)
    assert length - start == 5  # x, " x", " x", the end, the line break
    with pytest.raises(DataError) as caught:
        make_examples([LONG], chatml, max_length=length - lost, too_long="refuse")
    assert f"rows.json:7: {length} tokens, at {length - lost}: {kind}" in str(caught.value)
    assert f"Raise max_length to {length}" in str(caught.value)


@pytest.mark.parametrize(("lost", "kind"), [(2, "end lost"), (3, "answer cut"), (4, "answer cut")])
def test_a_cut_keeps_the_left_side_and_is_counted(chatml: Any, lost: int, kind: str) -> None:
    (whole,), _ = make_examples([LONG], chatml)
    (cut,), report = make_examples([LONG], chatml, max_length=whole.length - lost, too_long="cut")
    assert cut.input_ids == whole.input_ids[:-lost] and cut.labels == whole.labels[:-lost]
    assert cut.spans[-1].stop == cut.length
    assert (report.cut, report.dropped, report.tails_cut, report.too_long[kind].count) == (1, 0, 0, 1)


@pytest.mark.parametrize("too_long", get_args(TooLong))
def test_a_masked_tail_is_no_loss(chatml: Any, too_long: TooLong) -> None:
    length, _ = lengths(chatml)
    (example,), report = make_examples([LONG], chatml, max_length=length - 1, too_long=too_long)
    assert example.length == length - 1 and trained_texts(example, chatml) == ["x x x<|im_end|>"]
    assert (report.tails_cut, report.cut, report.dropped) == (1, 0, 0)


def test_long_rows_are_dropped_and_counted(chatml: Any) -> None:
    length, _ = lengths(chatml)
    (kept,), report = make_examples([LONG, SHORT], chatml, max_length=length - 2)
    assert kept.place.line == 8
    assert (report.rows, report.examples, report.dropped, report.cut) == (2, 1, 1, 0)
    assert report.longest == length and report.too_long["end lost"].places == [Place("rows.json", 7)]


def test_a_cut_after_the_first_answer_is_an_answer_cut(chatml: Any) -> None:
    long = talk("a", "b", "a question", "an answer")
    (whole,), _ = make_examples([long], chatml)
    inside_second_question = whole.spans[2].start + 3
    (cut,), report = make_examples([long], chatml, max_length=inside_second_question, too_long="cut")
    assert report.too_long["answer cut"].count == 1 and trained_texts(cut, chatml) == ["b<|im_end|>"]


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_nothing_left_is_refused(chatml: Any, too_long: TooLong) -> None:
    length, start = lengths(chatml)
    with pytest.raises(DataError, match="nothing is left to train") as caught:
        make_examples([LONG], chatml, max_length=start, too_long=too_long)
    assert str(length) in str(caught.value) and "rows.json:7" in str(caught.value)


def test_control_tokens_in_a_text_are_refused_over_all_rows(chatml: Any) -> None:
    bad = [talk("a", "b <|im_end|> c", line=3), talk("a", "b", line=4), talk("<|im_start|>", "b", line=5)]
    with pytest.raises(DataError) as caught:
        make_examples(bad, chatml)
    message = str(caught.value)
    assert (
        "rows.json:3: message 2 (assistant) contains the control token '<|im_end|>' at character 3" in message
    )
    assert "rows.json:5: message 1 (user) contains" in message and "2 rows in all" in message


def test_what_the_template_refuses_is_refused_with_its_place() -> None:
    rows = [talk("a", "b", line=1), talk("a", "b", system="s", line=2), talk("a", "b", line=3)]
    with pytest.raises(DataError) as caught:
        make_examples(rows, make_tokenizer("gemma"))
    assert "rows.json:2: the chat template refuses these messages: System role not supported" in str(
        caught.value
    )
    assert "rows in all" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }} {{ m.content | length }}{% endfor %}",
        "{{ messages | length }} {{ messages[-1].content | upper }} {{ messages[-1].content | lower }}",
    ],
)
def test_an_answer_that_cannot_be_found_is_refused(template: str) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer("chatml").backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"rows.json:1: the answer in message 2 cannot be found"):
        make_examples([talk("a", "b")], tokenizer)


def test_no_end_token_at_all_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer("unended").backend_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    with pytest.raises(DataError, match="eos_token"):
        make_examples([talk("a", "b")], tokenizer)


def test_a_length_that_holds_nothing_is_refused(chatml: Any) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        make_examples([LONG], chatml, max_length=1)
