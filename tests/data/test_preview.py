"""Previews: every token, its mask without colour, complete characters, no control sequences."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from helpers.small_tokenizers import KINDS, make_tokenizer
from talik.data.examples import Example
from talik.data.labels import make_examples
from talik.data.messages import Conversation, Message
from talik.data.preview import length_histogram, preview_html, preview_text
from talik.data.reading.rows import Place


def made(tokenizer: Any, question: str, answer: str) -> Example:
    messages = (Message("user", question), Message("assistant", answer))
    (example,), _ = make_examples([Conversation(messages, Place("rows.json", 7))], tokenizer)
    return example


def test_the_text_of_a_conversation(chatml: Any) -> None:
    text = preview_text(made(chatml, "你好 🎉", "Hello\n  \x1b[31m蓝"), chatml)
    head, *lines = text.plain.split("\n")
    assert head == "rows.json:7  43 tokens, 12 trained; lines marked + are trained, \u00b7 is between tokens"
    assert [line.replace("\u00b7", "") for line in lines] == [
        "  <|im_start|>system\\n",
        "  You are a helpful assistant.<|im_end|>\\n",
        "  <|im_start|>user\\n",
        "  你好 🎉<|im_end|>\\n",
        "  <|im_start|>assistant\\n",
        "+ Hello\\n",
        "+   \\x1b[31m蓝<|im_end|>",
        "  \\n",
        "",
    ]


def test_trained_and_masked_differ_in_style(chatml: Any) -> None:
    text = preview_text(made(chatml, "a", "Hello"), chatml)
    styles = {text.plain[s.start : s.end]: str(s.style) for s in text.spans}
    assert styles["Hello"].startswith("bold") and not styles["user"].startswith("bold")


@pytest.mark.parametrize("name", KINDS)
def test_no_character_is_lost_or_broken(name: str) -> None:
    tokenizer, answer = make_tokenizer(name), "蓝色 é 👩‍👩‍👧 def f(x):  return"
    plain = preview_text(made(tokenizer, "你好 there you", answer), tokenizer).plain.replace("\u00b7", "")
    assert "\ufffd" not in plain and answer in plain and "你好 there you" in plain


def test_a_replacement_character_of_the_data_is_shown(chatml: Any) -> None:
    assert "a\u00b7\ufffd" in preview_text(made(chatml, "q", "a\ufffdb"), chatml).plain


def test_every_token_ends_where_one_can_see_it(chatml: Any) -> None:
    """Without colour: a dot or the end of a line after each token, whole characters in one piece."""
    example = made(chatml, "a", "Hello there")
    *_, answer, _, _ = preview_text(example, chatml).plain.split("\n")
    tokens = [
        chatml.decode([token])
        for token, label in zip(example.input_ids, example.labels, strict=True)
        if label >= 0
    ]
    assert answer == "+ " + "\u00b7".join(tokens) and len(tokens) > 2


def test_what_has_no_shape_is_escaped(chatml: Any) -> None:
    """A right-to-left override would reorder the line; a backslash of the data is not one of ours."""
    plain = preview_text(made(chatml, "q", "a\u202eb\u00a0c \\n \u200bd"), chatml).plain.replace("\u00b7", "")
    assert "a\\u202eb\\xa0c \\\\n \\u200bd" in plain


class Tokens(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.kind, self.inside, self.found = "", False, [("", "", "")][:0]
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.inside = self.inside or tag == "pre"
        if self.inside and tag == "span":
            self.found.append((dict(attrs)["class"] or "", dict(attrs)["title"] or "", ""))

    def handle_data(self, data: str) -> None:
        if self.inside and self.found:
            kind, ids, text = self.found[-1]
            self.found[-1] = (kind, ids, text + data)


def test_the_page_has_every_token_and_is_escaped(chatml: Any) -> None:
    example = made(chatml, "<script>alert(1)</script>", "a & b <i>{x}</i> 蓝")
    page = preview_html([example, example], chatml)
    parser = Tokens()
    parser.feed(page)
    assert "script" not in parser.tags and "i" not in parser.tags and "rows.json:7" in page
    ids = [int(token) for _, title, _ in parser.found for token in title.split()]
    assert ids == list(example.input_ids) * 2
    trained = [int(t) for kind, title, _ in parser.found if kind == "trained" for t in title.split()]
    assert trained == [label for label in example.labels if label != -100] * 2
    assert "&lt;" in page and "&amp;" in page
    assert not re.search(r"https?://|src=|href=", page)


def test_the_histogram_counts_every_example() -> None:
    text = length_histogram([*range(1, 101), 1000], width=20)
    lines = text.split("\n")
    assert sum(int(line.split()[-1]) for line in lines[:-1]) == 101
    assert lines[0].startswith("    1 -   100 | " + "#" * 20 + " 100")
    assert lines[-1] == "101 examples: 50 % up to 51, 90 % up to 91, 99 % up to 100, longest 1,000 tokens"
    assert text.isascii()


@pytest.mark.parametrize("lengths", [[], [1], [1, 1], [7] * 3])
def test_the_histogram_of_few(lengths: list[int]) -> None:
    assert ("no examples" in length_histogram(lengths)) == (not lengths)
