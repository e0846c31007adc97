"""Identifies prompts, answers and ends of turns in a batch, by the tokenizer's chat template."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from talik.data.examples import IGNORED
from talik.data.templates.template import TEMPLATE_ERRORS
from talik.data.templates.template_facts import stops_of
from talik.diagnose.findings import Finding

QUESTION, ANSWER = "talik asks", "talik answers"


@dataclass(frozen=True, slots=True)
class _Row:
    """A row without its padding: ids, which of them are trained, and the text of each without blanks."""

    ids: list[int]
    trained: list[bool]
    texts: list[str]

    def answers(self, header: str, ends: set[int]) -> Iterator[range]:
        """The positions of each answer, its end of turn included, as training would label them.

        Args:
            header: The text of the template before an answer, without blanks; not empty.
            ends: Ids that end a turn. An answer without one lasts until the end of the row.
        """
        text, stops = "".join(self.texts), list(accumulate(map(len, self.texts)))
        at = text.find(header)
        while at >= 0:
            first = bisect_right(stops, at + len(header))  # the first token that reaches beyond the header
            places = (place for place in range(first, len(self.ids)) if self.ids[place] in ends)
            last = next(places, len(self.ids) - 1)
            yield range(first, last + 1)
            at = text.find(header, stops[last])


def turn_findings(ids: Tensor, labels: Tensor, mask: Any, tokenizer: Any) -> Iterator[Finding]:
    """Trained prompt tokens, and an end of turn that is never trained."""
    if tokenizer is None:
        return
    rows = [row for row in _rows(ids, labels, mask, tokenizer) if any(row.trained[1:])]
    header, ends = _header(tokenizer), _ends(tokenizer)
    answers = [list(row.answers(header, ends)) if header else [] for row in rows]
    prompt = sum(map(_trained_prompt, rows, answers))
    if prompt:
        what = f"{prompt:,} tokens of prompts are trained: the model learns to write questions, too."
        line = f"labels[:prompt_length] = {IGNORED}  # prompt_length: up to the answer's first token"
        yield Finding("prompt-trained", what, "labels", prompt, "tokens", line)
    if rows and not any(_trains_end(row, ends) for row in rows):
        masked = any(_has_masked_end(*pair, ends) for pair in zip(rows, answers, strict=True))
        yield _endless(len(rows), masked, ends, tokenizer)


def _rows(ids: Tensor, labels: Tensor, mask: Any, tokenizer: Any) -> Iterator[_Row]:
    there = mask != 0 if isinstance(mask, Tensor) and mask.shape == ids.shape else ids == ids
    for own, label, kept in zip(ids, labels, there, strict=True):
        tokens: list[int] = own[kept].tolist()
        texts = ["".join(text.split()) for text in tokenizer.batch_decode([[token] for token in tokens])]
        trained: list[bool] = (label[kept] != IGNORED).tolist()
        yield _Row(tokens, trained, texts)


def _header(tokenizer: Any) -> str:
    """The text that the template writes before an answer, without blanks; empty if it cannot be found."""
    asked = [{"role": "user", "content": QUESTION}]
    try:
        text: str = tokenizer.apply_chat_template(asked, tokenize=False)
        opened: str = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        if opened == text or not opened.startswith(text):
            asked.append({"role": "assistant", "content": ANSWER})
            whole: str = tokenizer.apply_chat_template(asked, tokenize=False)
            opened, text = whole[: whole.index(ANSWER)], whole[: whole.index(QUESTION) + len(QUESTION)]
    except TEMPLATE_ERRORS:
        return ""
    return "".join(opened[len(text) :].split())


def _ends(tokenizer: Any) -> set[int]:
    known = {tokenizer.eos_token_id} - {None}
    return known | set(stops_of(tokenizer).ids) if getattr(tokenizer, "is_fast", False) else known


def _trained_prompt(row: _Row, answers: list[range]) -> int:
    """The number of trained tokens outside the answers; blanks and the first token do not count."""
    if not answers:
        return 0
    expected = {place for answer in answers for place in answer}
    tokens = enumerate(zip(row.trained, row.texts, strict=True))
    return sum(trained and bool(text) for place, (trained, text) in tokens if place and place not in expected)


def _trains_end(row: _Row, ends: set[int]) -> bool:
    return any(trained and token in ends for token, trained in zip(row.ids, row.trained, strict=True))


def _has_masked_end(row: _Row, answers: list[range], ends: set[int]) -> bool:
    """True if an end of turn, which is not trained, follows a trained answer; blanks may be between them."""
    if not answers:  # the template's header is unknown
        return any(token in ends for token in row.ids[_last_trained(row, range(len(row.ids))) + 1 :])
    return any(
        row.ids[answer[-1]] in ends
        and (last := _last_trained(row, answer)) >= 0
        and not any(row.texts[last + 1 : answer[-1]])
        for answer in answers
        if answer
    )


def _last_trained(row: _Row, places: range) -> int:
    return max((place for place in places if row.trained[place]), default=-1)


def _endless(rows: int, masked: bool, ends: set[int], tokenizer: Any) -> Finding:
    """The finding for rows with trained answers of which none trains an end of turn."""
    name = tokenizer.convert_ids_to_tokens(min(ends)) if ends else "an end token"
    if masked:
        why = f"{name} follows the answers and is masked in every row ({rows:,})"
        line = f"labels[attention_mask == 0] = {IGNORED}  # by the mask; not labels == tokenizer.pad_token_id"
        if tokenizer.pad_token_id in ends:
            why += ", because it is the pad token as well"
    else:
        why = f"no answer is followed by {name} in any row ({rows:,})"
        line = "answer_ids = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False).input_ids"
    return Finding("masked-end", f"{why}: the model never learns to stop.", "labels", rows, "rows", line)
