"""A conversation with a run or a model; answers are streamed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TextIteratorStreamer

from talik.base.errors import UsageError
from talik.base.events import Notify, Status, silent
from talik.base.files import read_json
from talik.data.templates.template import Template, template_of
from talik.data.templates.template_facts import facts_of, stops_of
from talik.kernels.bf16_matmul import bf16_as_fp32
from talik.machine.device import choose_device
from talik.model.folder import open_model
from talik.model.loading import load_model
from talik.training.loading import load_whole_model
from talik.training.run.checkpoints import load_weights
from talik.training.run.folder import is_run, open_run, result_checkpoint

# Defaults of generation configs that change greedy decoding; neutral values are passed in their place.
_UNBENT = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "encoder_repetition_penalty": 1.0,
}


def load_for_chat(
    target: str | Path, *, base: bool = False, date: str | None = None, notify: Notify = silent
) -> tuple[PreTrainedModel, Any]:
    """Loads a model, or a run with its trained weights (without them if `base`), and the tokenizer."""
    if is_run(target):
        run = open_run(target, notify)
        plan = run.plan.model_copy(update={"device": str(choose_device("auto"))})
        checkpoint = None if base else result_checkpoint(run.folder, notify)
        model, top = load_whole_model(run.recipe, plan, run.model)
        if checkpoint:
            load_weights(checkpoint, dict(top.parameters()))
        return model, run.model.tokenizer(date)
    if base:
        raise UsageError("--base is for a run; this is a model", where=target)
    folder = open_model(str(target), progress=lambda text: notify(Status("model", text)))
    dtype = folder.config.dtype
    assert dtype is None or isinstance(dtype, torch.dtype)
    return load_model(folder.path, dtype or torch.float32, choose_device("auto")), folder.tokenizer(date)


def chat_date(target: str | Path, date: str | None) -> str | None:
    """The date that a chat template writes in place of today's.

    Args:
        target: A run or a model.
        date: A date in ISO 8601, "run" for the date of the training, or None.

    Raises:
        UsageError: It is not a date, or the target is not a run with a date.
    """
    if date is None:
        return None
    if date == "run":
        file = Path(target) / "source.json"
        known = read_json(file).get("date") if file.is_file() else None
        if known is None:
            raise UsageError(
                "--date run: no date is kept there", where=target, remedy="Name a date: 2026-01-31"
            )
        return str(known)
    try:
        return datetime.fromisoformat(date).isoformat()
    except ValueError:
        raise UsageError(f"--date: {date!r} is not a date", remedy="Write it as 2026-01-31.") from None


@dataclass
class Talk:
    """A conversation with a model.

    The model reads its earlier answers as the ids it generated, as in training. If the template writes an
    earlier answer differently, the conversation is rendered again.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        messages: The messages so far; the first may be a system message.
        max_tokens: Maximum tokens of an answer.
        temperature: 0 for greedy decoding; otherwise the sampling temperature.
    """

    model: PreTrainedModel
    tokenizer: Any
    messages: list[dict[str, str]] = field(default_factory=list)
    max_tokens: int = 256
    temperature: float = 0.0
    _ids: list[int] = field(default_factory=list)  # ids of `_text`: the last prompt and its answer
    _text: str = ""

    def __post_init__(self) -> None:
        self._template = template_of(self.tokenizer)
        self._stops = stops_of(self.tokenizer, self.model.generation_config.eos_token_id)
        self._header = _tokens(self._template, facts_of(self._template).answer_header)
        # An end of turn that is an added but not a special token would be shown.
        ends = self.tokenizer.convert_ids_to_tokens(list(self._stops.ids))
        self._hidden = (*self._stops.texts, *(end for end in ends if end not in self._template.special))

    def ask(self, question: str) -> Iterator[str]:
        """Asks a question and yields the answer as it is generated, up to its end or `max_tokens`.

        Raises:
            UsageError: The chat template refuses the messages; the question is not added to them.
        """
        prompt, ids = self._prompt([*self.messages, {"role": "user", "content": question}])
        self.messages.append({"role": "user", "content": question})
        streamer = _Streamer(self.tokenizer, self._header)
        pieces = []
        for piece in _without(self._hidden, self._stream(ids, streamer)):
            pieces.append(piece)
            yield piece
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        self._ids = ids + streamer.ids
        self._text = prompt + self.tokenizer.decode(streamer.ids, skip_special_tokens=False)

    def _prompt(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        """The prompt and its ids; the ids of earlier answers stay as they were generated."""
        text = self._template.apply(messages, prompt=True)
        if isinstance(text, Exception):
            remedy = "Ask in another way, or leave the system message out."
            raise UsageError(f"The chat template refuses these messages: {text}", remedy=remedy)
        if self._text and text.startswith(self._text):
            return text, self._ids + _tokens(self._template, text[len(self._text) :])
        return text, _tokens(self._template, text)

    def _stream(self, ids: list[int], streamer: _Streamer) -> Iterator[str]:
        failed: list[BaseException] = []

        def generate() -> None:
            try:
                self._generate(ids, streamer)
            except BaseException as error:
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True, name="talik-answer")
        thread.start()
        yield from streamer
        thread.join()
        if failed:
            raise failed[0]

    def _generate(self, ids: list[int], streamer: _Streamer) -> None:
        inputs = torch.tensor([ids], device=self.model.device)
        drawn: dict[str, Any] = {"do_sample": True, "temperature": self.temperature}
        if not self.temperature:  # sampling values in the generation config would cause a warning
            drawn = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **_UNBENT}
        pad = self.tokenizer.pad_token_id
        texts = list(self._stops.texts)
        with bf16_as_fp32():
            self.model.generate(  # pyright: ignore[reportCallIssue]
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.max_tokens,
                eos_token_id=list(self._stops.ids),
                stop_strings=texts or None,
                tokenizer=self.tokenizer if texts else None,
                streamer=streamer,
                pad_token_id=pad if pad is not None else 0,
                **drawn,
            )


class _Streamer(TextIteratorStreamer):
    """Streams text without the header that the template writes before an answer, and keeps all ids."""

    def __init__(self, tokenizer: Any, header: list[int]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.ids: list[int] = []
        self._header, self._header_done, self._prompt_seen = header, not header, False

    def put(self, value: Any) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        new = value.flatten().tolist()
        self.ids += new
        if not self._header_done:
            if self.ids == self._header[: len(self.ids)]:
                return
            new = self._after_header()
        for token in new:
            super().put(torch.tensor([token]))

    def end(self) -> None:
        if not self._header_done:
            for token in self._after_header():
                super().put(torch.tensor([token]))
        super().end()

    def _after_header(self) -> list[int]:
        """The ids so far without the header."""
        self._header_done, size = True, len(self._header)
        return self.ids[size:] if self.ids[:size] == self._header else self.ids


def _tokens(template: Template, text: str) -> list[int]:
    """The ids of a rendered text, which contains its special tokens already."""
    return template.tokenizer(text, add_special_tokens=False)["input_ids"]


def _without(stops: tuple[str, ...], pieces: Iterator[str]) -> Iterator[str]:
    """A stream of text up to the first of `stops`; text that may begin a stop is held back."""
    held = ""
    for piece in pieces:
        held += piece
        at = min((held.find(stop) for stop in stops if stop in held), default=-1)
        if at >= 0:
            yield held[:at].rstrip()
            held = ""
            for _ in pieces:  # drop the rest of the answer
                pass
            return
        safe = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of a text that could begin `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
