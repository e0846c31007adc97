"""Numbers of a data set: lengths, cuts, shares, roles, scripts, and how well the tokenizer knows them."""

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
SAMPLE = 2000  # characters of each row whose scripts are counted
MOST_TOKENISED = 2000  # characters of each script's sample that are tokenised at a time
LOST = ("prompt cut", "answer cut", "end lost")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ENDED = re.compile(r"[.!?。！？…:;)\]}>\"'”’」』`*|\d]\s*\Z")


@dataclass(slots=True)
class Statistics:
    """Counts over all rows that can be used."""

    lengths: array[int] = field(default_factory=lambda: array("q"))
    trained: array[int] = field(default_factory=lambda: array("q"))
    cuts: dict[int, Counter[str]] = field(default_factory=lambda: {length: Counter() for length in LENGTHS})
    roles: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    unended: int = 0
    tokenised: dict[str, Counter[str]] = field(default_factory=dict)

    def add_row(self, row: Conversation | Document) -> tuple[str, str]:
        """Counts the messages and the scripts of a row; returns the scripts of question and answer."""
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
        """Counts the tokens of an example, and what it would lose at each of LENGTHS."""
        self.lengths.append(example.length)
        self.trained.append(example.trained_tokens)
        for length, counted in self.cuts.items():
            if example.length > length:
                counted[lost_at(example, length) or "tail cut"] += 1

    def add_tokens(self, texts: Sequence[str], tokenizer: Any) -> None:
        """Counts bytes and tokens of some texts by their main script."""
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
        """The numbers for programs."""
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
    """What a cut at a length would lose: one of LOST, or None if nothing that is trained."""
    trained = [span for span in example.spans if span.trained]
    if trained[-1].stop <= length:
        return None
    if trained[0].start >= length:
        return LOST[0]
    return LOST[2] if trained[-1].stop - 1 <= length else LOST[1]


def _known(counted: Counter[str]) -> dict[str, float]:
    tokens = counted["tokens"] or 1
    return {
        "bytes_per_token": round(counted["bytes"] / tokens, 2),
        "unknown_share": round(counted["unknown"] / tokens, 4),
        "single_byte_share": round(counted["single bytes"] / tokens, 4),
    }


def _is_part(token: str) -> bool:
    """True if a token is one byte of a character: by SentencePiece's name for it, or byte-level BPE's."""
    return _BYTE_TOKEN.fullmatch(token) is not None or (len(token) == 1 and token in _PARTS)


def _part_letters() -> frozenset[str]:
    """The letters that byte-level BPE writes for the bytes 0x80 to 0xff (GPT-2's table)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return frozenset(
        chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(128, 256)
    )


_PARTS = _part_letters()


def main_script(text: str) -> str:
    """The script of most letters of a text's start; "other" if it has no letter."""
    counted = Counter(map(script, text[:400]))
    del counted["other"]
    return counted.most_common(1)[0][0] if counted else "other"


@lru_cache(1 << 16)
def script(character: str) -> str:
    """The writing system of a letter, by the first word of its Unicode name; "other" for all else."""
    if not character.isalpha():
        return "other"
    first = unicodedata.name(character, "other").split(" ", 1)[0]
    named = {"CJK": "Han", "IDEOGRAPHIC": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}
    return named.get(first, first.capitalize())
