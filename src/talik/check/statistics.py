"""Numbers of a data set: lengths, shares, roles, scripts, and how well the tokenizer knows them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from talik.data.examples import Example
from talik.data.messages import Conversation, Document

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
SAMPLE = 2000  # characters of each row whose scripts are counted


@dataclass(slots=True)
class Statistics:
    """Counts over all rows that can be used."""

    lengths: list[int] = field(default_factory=list)
    trained: int = 0
    longer: dict[int, int] = field(default_factory=lambda: dict.fromkeys(LENGTHS, 0))
    roles: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    bytes_of: Counter[str] = field(default_factory=Counter)
    tokens_of: Counter[str] = field(default_factory=Counter)

    def add_row(self, row: Conversation | Document) -> None:
        """Counts the messages and the scripts of a row."""
        if isinstance(row, Document):
            self.roles["(text)"] += 1
            self.scripts.update(map(script, row.text[:SAMPLE]))
            return
        self.roles.update(message.role for message in row.messages)
        self.turns[sum(message.role == "assistant" for message in row.messages)] += 1
        text = "".join(message.content for message in row.messages)[:SAMPLE]
        self.scripts.update(map(script, text))

    def add_examples(self, examples: Sequence[Example]) -> None:
        """Counts the tokens of examples."""
        for example in examples:
            self.lengths.append(example.length)
            self.trained += example.trained_tokens
            for length in LENGTHS:
                self.longer[length] += example.length > length

    def add_tokens(self, texts: Sequence[str], tokenizer: Any) -> None:
        """Counts bytes and tokens of some texts by their main script."""
        for text in texts:
            main = Counter(script(c) for c in text if c.isalpha()).most_common(1)
            if main:
                self.bytes_of[main[0][0]] += len(text.encode("utf-8", "surrogatepass"))
                self.tokens_of[main[0][0]] += len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def as_dict(self) -> dict[str, Any]:
        """The numbers for programs."""
        ordered, tokens = sorted(self.lengths), sum(self.lengths)
        letters = sum(n for name, n in self.scripts.items() if name != "other")
        at = (
            {share: ordered[-(-len(ordered) * share // 100) - 1] for share in (50, 90, 99, 100)}
            if ordered
            else {}
        )
        return {
            "examples": len(ordered),
            "tokens": tokens,
            "trained_tokens": self.trained,
            "trained_share": self.trained / tokens if tokens else 0.0,
            "length_percentiles": at,
            "examples_longer_than": {length: n for length, n in self.longer.items() if n},
            "roles": dict(self.roles),
            "answers_in_a_conversation": dict(sorted(self.turns.items())),
            "scripts": {
                name: round(n / letters, 4)
                for name, n in self.scripts.most_common()
                if name != "other" and letters
            },
            "bytes_per_token": {
                name: round(self.bytes_of[name] / n, 2) for name, n in self.tokens_of.items() if n
            },
        }


@lru_cache(1 << 16)
def script(character: str) -> str:
    """The writing system of a letter, by the first word of its Unicode name; "other" for all else."""
    if not character.isalpha():
        return "other"
    name = unicodedata.name(character, "other")
    first = name.split(" ", 1)[0]
    return {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}.get(first, first.capitalize())
