"""Comparison with TRL: equal ids and, for its training templates, equal masks."""

from __future__ import annotations

import random
from importlib import resources
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.small_tokenizers import make_tokenizer
from talik.data.labels import make_examples
from talik.data.messages import Conversation, Message
from talik.data.reading.rows import Place

pytest.importorskip("trl", reason="TRL is not installed")


def with_template_of_trl(name: str, template: str) -> Any:
    like = make_tokenizer(name)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=like.backend_tokenizer, bos_token=like.bos_token, eos_token=like.eos_token
    )
    file = resources.files("trl") / "chat_templates" / template
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


def talks(count: int) -> list[Conversation]:
    dice = random.Random(3)
    words = ["Hello", " there", " is blue", "\n", "你好", "🎉", " def f(x):", "."]
    made = []
    for number in range(count):
        texts = [
            "x" + "".join(dice.choices(words, k=dice.randint(1, 9))) for _ in range(2 * dice.randint(1, 3))
        ]
        roles = ["user", "assistant"] * len(texts)
        messages = [Message(role, text) for role, text in zip(roles, texts, strict=False)]
        made.append(Conversation((Message("system", "Be brief."), *messages), Place("rows", number)))
    return made


def trl_masks(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Tokenises as TRL's SFTTrainer does with assistant_only_loss."""
    chat = [{"role": m.role, "content": m.content} for m in conversation.messages]
    made = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    return made["input_ids"], made["assistant_masks"]


def test_llama3_is_identical() -> None:
    tokenizer = with_template_of_trl("llama3", "llama3_training.jinja")
    made = talks(60)
    examples, _ = make_examples(made, tokenizer)
    for conversation, example in zip(made, examples, strict=True):
        ids, masks = trl_masks(tokenizer, conversation)
        assert list(example.input_ids) == ids
        assert example.labels == [token if mask else -100 for token, mask in zip(ids, masks, strict=True)]


def test_qwen2_5_differs_only_in_the_line_breaks_around_the_answer() -> None:
    tokenizer = with_template_of_trl("chatml", "qwen2_5_training.jinja")
    (line_break,) = tokenizer("\n").input_ids
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    made = talks(60)
    examples, _ = make_examples(made, tokenizer)
    for conversation, example in zip(made, examples, strict=True):
        ids, masks = trl_masks(tokenizer, conversation)
        assert list(example.input_ids) == ids
        more = [
            i
            for i, (label, mask) in enumerate(zip(example.labels, masks, strict=True))
            if mask != (label != -100)
        ]
        assert all(masks[i] and ids[i] == line_break for i in more)
        answers = sum(message.role == "assistant" for message in conversation.messages)
        assert len(more) == 2 * answers
        assert all(ids[i - 1] == end or ids[i - 2] == start for i in more)
