"""Talking to a run or a model: answers come piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, TextIteratorStreamer

from talik.data.template import ends_of_turn, plain_template
from talik.errors import UsageError
from talik.events import Notify, Said, silent
from talik.machine import choose_device
from talik.model.chain import load_model
from talik.model.products import bf16_as_fp32
from talik.model.source import find_model
from talik.train.loading import load_whole
from talik.train.resume import load_weights
from talik.train.run_folder import is_run, load_tokenizer, open_run, result_checkpoint


def load_for_chat(
    target: str | Path, *, base: bool = False, notify: Notify = silent
) -> tuple[PreTrainedModel, Any]:
    """The model to talk to and its tokenizer: any model, or a run with what it trained (unless `base`)."""
    if is_run(target):
        run = open_run(target, notify)
        plan = run.plan.model_copy(update={"device": str(choose_device("auto"))})
        model, top = load_whole(run.recipe, plan, run.source.folder)
        if not base:
            load_weights(result_checkpoint(run.folder), dict(top.parameters()))
        return model, load_tokenizer(run.source.folder)
    if base:
        raise UsageError("--base is for a run: a model by itself has no other", where=target)
    folder = find_model(str(target), progress=lambda text: notify(Said("model", text))).folder
    dtype = AutoConfig.from_pretrained(folder, local_files_only=True).dtype
    assert dtype is None or isinstance(dtype, torch.dtype)
    return load_model(folder, dtype or torch.float32, choose_device("auto")), load_tokenizer(folder)


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    messages: list[dict[str, str]],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
) -> Iterator[str]:
    """The assistant's next turn, piece by piece as it is made.

    `temperature` 0 takes the likeliest token each time; else tokens are drawn. Ends at the end of the turn or
    after `max_tokens`.
    """
    inputs = prompt_ids(tokenizer, messages).to(model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if not temperature:  # a generation config with sampling values would warn
        drawn |= {"temperature": None, "top_p": None, "top_k": None}
    failed: list[BaseException] = []

    def generate() -> None:
        try:
            with bf16_as_fp32():
                model.generate(  # pyright: ignore[reportCallIssue]
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=max_tokens,
                    eos_token_id=ends_of_turn(tokenizer, model.generation_config.eos_token_id),
                    streamer=streamer,
                    pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
                    **drawn,
                )
        except BaseException as error:
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=generate, daemon=True, name="talik-answer")
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise failed[0]


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    """The conversation so far as (1, tokens), ready for an answer: by the template that training used."""
    return tokenizer.apply_chat_template(
        messages,
        chat_template=None if tokenizer.chat_template else plain_template(tokenizer),
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
