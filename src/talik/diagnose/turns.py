"""Identifies prompts, answers and ends of turns in a batch, by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from talik.data.examples import IGNORED
from talik.data.templates.facts import stops_of
from talik.data.templates.template import TEMPLATE_ERRORS
from talik.diagnose.findings import Finding

QUESTION, ANSWER = "talik asks", "talik answers"


@dataclass(frozen=True, slots=True)
class _Row:
    """A row without its padding: ids, which of them are trained, and the text of each without blanks."""

    ids: list[int]
    trained: list[bool]
    texts: list[str]


def turn_findings(ids: Tensor, labels: Tensor, mask: Any, tokenizer: Any) -> Iterator[Finding]:
    """Trained prompt tokens, and an end of turn that is never trained."""
    if tokenizer is None:
        return
    rows = [row for row in _rows(ids, labels, mask, tokenizer) if any(row.trained[1:])]
    header, ends = _header(tokenizer), _ends(tokenizer)
    prompt = sum(_trained_prompt(row, header, ends) for row in rows) if header else 0
    if prompt:
        what = f"{prompt:,} tokens of prompts are trained: the model learns to write questions, too."
        line = f"labels[:prompt_length] = {IGNORED}  # prompt_length: up to the answer's first token"
        yield Finding("prompt-trained", what, "labels", prompt, "tokens", line)
    if rows and not any(_trains_end(row, ends) for row in rows):
        yield _endless(rows, ends, tokenizer)


def _rows(ids: Tensor, labels: Tensor, mask: Any, tokenizer: Any) -> Iterator[_Row]:
    there = mask != 0 if isinstance(mask, Tensor) and mask.shape == ids.shape else ids == ids
    for own, label, kept in zip(ids, labels, there, strict=True):
        tokens = own[kept].tolist()
        texts = ["".join(text.split()) for text in tokenizer.batch_decode([[token] for token in tokens])]
        yield _Row(tokens, (label[kept] != IGNORED).tolist(), texts)


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


def _trained_prompt(row: _Row, header: str, ends: set[int]) -> int:
    """The number of trained prompt tokens; blanks and the first token do not count."""
    text, stops = "".join(row.texts), list(accumulate(map(len, row.texts)))
    prompt, count, at = True, 0, text.find(header)
    if at < 0:
        return 0
    for place, (token, stop) in enumerate(zip(row.ids, stops, strict=True)):
        if prompt and at >= 0 and stop > at + len(header):
            prompt = False
        count += prompt and place > 0 and row.trained[place] and bool(row.texts[place])
        if not prompt and token in ends:
            prompt, at = True, text.find(header, stop)
    return count


def _trains_end(row: _Row, ends: set[int]) -> bool:
    return any(trained and token in ends for token, trained in zip(row.ids, row.trained, strict=True))


def _endless(rows: list[_Row], ends: set[int], tokenizer: Any) -> Finding:
    """The finding for rows with trained answers of which none trains an end of turn."""
    name = tokenizer.convert_ids_to_tokens(min(ends)) if ends else "an end token"
    written = any(token in ends for row in rows for token in row.ids[_last_trained(row) + 1 :])
    if written:
        why = f"{name} follows the answers and is masked in every row ({len(rows):,})"
        line = f"labels[attention_mask == 0] = {IGNORED}  # by the mask; not labels == tokenizer.pad_token_id"
        if tokenizer.pad_token_id in ends:
            why += ", because it is the pad token as well"
    else:
        why = f"{name} stands after no answer of any row ({len(rows):,})"
        line = "answer_ids = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False).input_ids"
    return Finding("masked-end", f"{why}: the model never learns to stop.", "labels", len(rows), "rows", line)


def _last_trained(row: _Row) -> int:
    return max(place for place, trained in enumerate(row.trained) if trained)
