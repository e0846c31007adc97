"""Properties of labels: for any small template exactly the answers and their ends are trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.small_tokenizers import make_tokenizer
from talik.data.labels import make_examples
from talik.data.messages import Conversation, Message
from talik.data.reading.rows import Place

# Every text stands between two of these tokens, so that no token crosses its boundaries.
OPENINGS = ("<|start_header_id|>", "<|end_header_id|>")
END = "<|eot_id|>"
TEXTS = st.text(st.sampled_from("ab5x .\né你🎉{}"), min_size=1, max_size=10).filter(str.strip)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("llama3")


@st.composite
def templates(draw: st.DrawFn) -> tuple[str, str]:
    """A template that writes any texts around the messages, and the text that it writes after each answer."""
    words = st.sampled_from(["", "user", "assistant:", "Q", "\n"])
    asked, answered = (draw(words) + draw(st.sampled_from(OPENINGS)) for _ in range(2))
    asked_end = draw(st.sampled_from(["", END])) + draw(words) + OPENINGS[1]
    tail = draw(st.sampled_from(["", "\n", "\n\n"]))
    begin = draw(st.sampled_from(["", "<|begin_of_text|>"]))
    template = (
        f"{{{{ {begin!r} }}}}{{% for m in messages %}}{{% if m.role == 'assistant' %}}"
        f"{{{{ {answered!r} + m.content + {END + tail!r} }}}}"
        f"{{% else %}}{{{{ {asked!r} + m.content + {asked_end!r} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {answered!r} }}}}{{% endif %}}"
    )
    return template, END


@given(
    template=templates(), turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), last=st.booleans()
)
def test_the_answers_and_their_ends_are_trained(
    tokenizer: Any, template: tuple[str, str], turns: list[tuple[str, str]], last: bool
) -> None:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template, end = template
    messages = [
        Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    row = Conversation(tuple(messages), Place("rows.json", 1))
    (example,), report = make_examples([row], tokenizer, train_on="last" if last else "assistant")
    assert report.boundary_merged == 0 and report.ends_added == 0
    answers = [answer + end for _, answer in turns]
    trained = [
        tokenizer.decode(example.input_ids[span.start : span.stop]) for span in example.spans if span.trained
    ]
    assert trained == (answers[-1:] if last else answers)
    chat = [{"role": message.role, "content": message.content} for message in messages]
    assert tokenizer.decode(list(example.input_ids)) == tokenizer.apply_chat_template(chat, tokenize=False)
