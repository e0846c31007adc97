"""Statistics of a data set: lengths, cuts, roles, turns, scripts, and the tokens that each script needs."""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from talik.data.examples import Example
from talik.data.messages import Conversation, Document

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
SAMPLE = 2000  # characters of each row in which scripts are counted
MOST_TOKENISED = 2000  # characters of each text that are tokenised to measure its script
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ENDED = re.compile(r"[.!?。！？…:;)\]}>\"'”’」』`*|\d]\s*\Z")


@dataclass(slots=True)
class Statistics:
    """Counts over all rows that can be used.

    Attributes:
        lengths: The number of tokens of each example.
        trained: The number of trained tokens of each example.
        cuts: For each of LENGTHS, the number of longer examples by what a cut would lose.
        roles: The number of messages of each role.
        turns: The number of conversations with each number of answers.
        scripts: The number of letters of each script.
        pairs: The number of rows for each pair of scripts of question and answer.
        unended: The number of long answers without a punctuation mark at the end.
        tokenised: For each script, the numbers of bytes, tokens, unknown tokens and single-byte tokens.
    """

    lengths: array[int] = field(default_factory=lambda: array("q"))
    trained: array[int] = field(default_factory=lambda: array("q"))
    cuts: dict[int, Counter[str]] = field(default_factory=lambda: {length: Counter() for length in LENGTHS})
    roles: Counter[str] = field(default_factory=Counter[str])
    turns: Counter[int] = field(default_factory=Counter[int])
    scripts: Counter[str] = field(default_factory=Counter[str])
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    unended: int = 0
    tokenised: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])

    def add_row(self, row: Conversation | Document) -> tuple[str, str]:
        """Counts the messages and scripts of a row, and returns the scripts of its question and answer."""
        if isinstance(row, Document):
            self.roles["(text)"] += 1
            self.scripts.update(map(script, row.text[:SAMPLE]))
            return "other", "other"
        self.roles.update(message.role for message in row.messages)
        self.turns[sum(message.role == "assistant" for message in row.messages)] += 1
        self.scripts.update(map(script, "".join(message.content for message in row.messages)[:SAMPLE]))
        asked = [message.content for message in row.messages if message.role == "user"]
        answer = row.messages[-1].content
        self.unended += len(answer) > 200 and not _ENDED.search(answer)
        scripts = main_script("".join(asked)), main_script(answer)
        self.pairs[scripts] += 1
        return scripts

    def add_example(self, example: Example) -> None:
        """Counts the tokens of an example, and its loss at each of LENGTHS."""
        self.lengths.append(example.length)
        self.trained.append(example.trained_tokens)
        for length, counted in self.cuts.items():
            if example.length > length:
                counted[lost_at(example, length) or "tail cut"] += 1

    def add_tokens(self, texts: Sequence[str], tokenizer: Any) -> None:
        """Counts the bytes and tokens of texts by their main script."""
        for text in texts:
            if (main := main_script(text)) != "other":
                ids = tokenizer(text[:MOST_TOKENISED], add_special_tokens=False)["input_ids"]
                tokens = tokenizer.convert_ids_to_tokens(ids)
                counted = self.tokenised.setdefault(main, Counter())
                counted["bytes"] += len(text[:MOST_TOKENISED].encode("utf-8", "surrogatepass"))
                counted["tokens"] += len(ids)
                counted["unknown"] += sum(token == tokenizer.unk_token for token in tokens)
                counted["single bytes"] += sum(_is_part(token) for token in tokens)

    def as_dict(self) -> dict[str, Any]:
        """Returns the statistics in a form for programs."""
        ordered, tokens, trained = sorted(self.lengths), sum(self.lengths), sum(self.trained)
        letters = sum(n for name, n in self.scripts.items() if name != "other")
        shares = {n: round(count / letters, 4) for n, count in self.scripts.most_common() if n != "other"}
        return {
            "examples": len(ordered),
            "tokens": tokens,
            "trained_tokens": trained,
            "trained_share": trained / tokens if tokens else 0.0,
            "length_percentiles": {
                share: ordered[-(-len(ordered) * share // 100) - 1] for share in (50, 90, 99, 100) if ordered
            },
            "at_max_length": {length: dict(counted) for length, counted in self.cuts.items() if counted},
            "roles": dict(self.roles),
            "answers_in_a_conversation": dict(sorted(self.turns.items())),
            "answers_without_an_end_mark": self.unended,
            "scripts": shares,
            "question_and_answer_scripts": {
                f"{asked} - {said}": count
                for (asked, said), count in self.pairs.most_common()
                if asked != said and "other" not in (asked, said)
            },
            "tokenizer": {name: _known(counted) for name, counted in self.tokenised.items()},
        }


def lost_at(example: Example, length: int) -> str | None:
    """Returns the loss of a cut at a length, one of CUT_KINDS; None if no trained token would be lost."""
    trained = [span for span in example.spans if span.trained]
    if trained[-1].stop <= length:
        return None
    if trained[0].start >= length:
        return "prompt cut"
    return "end lost" if trained[-1].stop - 1 <= length else "answer cut"


def _known(counted: Counter[str]) -> dict[str, float]:
    tokens = counted["tokens"] or 1
    return {
        "bytes_per_token": round(counted["bytes"] / tokens, 2),
        "unknown_share": round(counted["unknown"] / tokens, 4),
        "single_byte_share": round(counted["single bytes"] / tokens, 4),
    }


def _is_part(token: str) -> bool:
    """True if a token is one byte of a character, by the names of SentencePiece and of byte-level BPE."""
    return _BYTE_TOKEN.fullmatch(token) is not None or (len(token) == 1 and token in _PARTS)


def _part_letters() -> frozenset[str]:
    """Returns the characters that byte-level BPE uses for the bytes 0x80 to 0xff (GPT-2's table)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return frozenset(
        chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(128, 256)
    )


_PARTS = _part_letters()


def main_script(text: str) -> str:
    """Returns the most frequent script of the first letters of a text; "other" if it has no letters."""
    counted = Counter(map(script, text[:400]))
    del counted["other"]
    return counted.most_common(1)[0][0] if counted else "other"


@lru_cache(1 << 16)
def script(character: str) -> str:
    """Returns the script of a letter, by the first word of its Unicode name; "other" for other characters."""
    if not character.isalpha():
        return "other"
    first = unicodedata.name(character, "other").split(" ", 1)[0]
    named = {"CJK": "Han", "IDEOGRAPHIC": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}
    return named.get(first, first.capitalize())
