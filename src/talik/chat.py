"""Talking to a run or a model: answers come piece by piece."""

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
from talik.data.templates.facts import facts_of, stops_of
from talik.data.templates.template import Template, template_of
from talik.kernels.bf16_matmul import bf16_as_fp32
from talik.machine.device import choose_device
from talik.model.folder import open_model
from talik.model.loading import load_model
from talik.training.loading import load_whole_model
from talik.training.run.checkpoints import load_weights
from talik.training.run.folder import is_run, open_run, result_checkpoint

# A model's own defaults that bend what is likeliest; they hold only where somebody asks for them.
_UNBENT = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "encoder_repetition_penalty": 1.0,
}


def load_for_chat(
    target: str | Path, *, base: bool = False, date: str | None = None, notify: Notify = silent
) -> tuple[PreTrainedModel, Any]:
    """The model to talk to and its tokenizer: any model, or a run with what it trained (unless `base`)."""
    if is_run(target):
        run = open_run(target, notify)
        plan = run.plan.model_copy(update={"device": str(choose_device("auto"))})
        checkpoint = None if base else result_checkpoint(run.folder, notify)
        model, top = load_whole_model(run.recipe, plan, run.model)
        if checkpoint:
            load_weights(checkpoint, dict(top.parameters()))
        return model, run.model.tokenizer(date)
    if base:
        raise UsageError("--base is for a run: a model by itself has no other", where=target)
    folder = open_model(str(target), progress=lambda text: notify(Status("model", text)))
    dtype = folder.config.dtype
    assert dtype is None or isinstance(dtype, torch.dtype)
    return load_model(folder.path, dtype or torch.float32, choose_device("auto")), folder.tokenizer(date)


def chat_date(target: str | Path, date: str | None) -> str | None:
    """The date that a chat template gets for today's: one in ISO 8601, or with "run" the one of the training.

    Raises:
        UsageError: It is no date, or the target is no run with one.
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
        raise UsageError(f"--date: {date!r} is no date", remedy="Write it as 2026-01-31.") from None


@dataclass
class Talk:
    """A conversation with a model.

    The model reads its own answers as the ids that it wrote, as training showed it whole sequences of ids.
    Where the template writes an earlier answer in another way, the conversation is rendered anew.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        messages: The messages so far; a system message may be the first.
        max_tokens: Tokens of an answer, at most.
        temperature: 0 takes the likeliest token each time; else tokens are drawn.
    """

    model: PreTrainedModel
    tokenizer: Any
    messages: list[dict[str, str]] = field(default_factory=list)
    max_tokens: int = 256
    temperature: float = 0.0
    _ids: list[int] = field(default_factory=list)  # of `_text`, the prompt of the last answer and the answer
    _text: str = ""

    def __post_init__(self) -> None:
        self._template = template_of(self.tokenizer)
        self._stops = stops_of(self.tokenizer, self.model.generation_config.eos_token_id)
        self._header = _tokens(self._template, facts_of(self._template).answer_header)
        # An end that is an added token but no special one would be shown.
        ends = self.tokenizer.convert_ids_to_tokens(list(self._stops.ids))
        self._hidden = (*self._stops.texts, *(end for end in ends if end not in self._template.special))

    def ask(self, question: str) -> Iterator[str]:
        """Asks a question; yields the answer piece by piece, up to the end of the turn or `max_tokens`.

        Raises:
            UsageError: The chat template refuses the messages; the question is forgotten then.
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
        """The text up to the next answer, and its ids: those of the last answer stay as they were made."""
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
        if not self.temperature:  # a generation config with sampling values would warn
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
    """Text as it comes, without the header that the template writes before an answer; the ids of all."""

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
        """The ids so far that are not the header."""
        self._header_done, size = True, len(self._header)
        return self.ids[size:] if self.ids[:size] == self._header else self.ids


def _tokens(template: Template, text: str) -> list[int]:
    """The ids of a rendered text: the template has written its special tokens."""
    return template.tokenizer(text, add_special_tokens=False)["input_ids"]


def _without(stops: tuple[str, ...], pieces: Iterator[str]) -> Iterator[str]:
    """A stream of text up to the first of `stops`; text that may begin one is held until it is known."""
    held = ""
    for piece in pieces:
        held += piece
        at = min((held.find(stop) for stop in stops if stop in held), default=-1)
        if at >= 0:
            yield held[:at].rstrip()
            held = ""
            for _ in pieces:  # the rest of what was generated
                pass
            return
        safe = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text could begin `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
