"""The public styles of chat templates: each in a variant of our own, with its tokens and what a model writes.

`styles/NAME.jinja` is the template. `written` says by hand what the model is to write after a prompt, its end
of turn included; the tests compare it with what Talik trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from helpers.small_tokenizers import untrained
from talik.data.messages import Message

FOLDER = Path(__file__).parents[1] / "data" / "styles"
Written = Callable[[Message, str], str]


@dataclass(frozen=True)
class Style:
    """A style of chat template.

    Attributes:
        written: (message, prompt) -> the text that the model writes after the prompt.
        eos: The tokenizer's end token.
        bos: Its begin token.
        special: More special tokens, with blanks between.
        added: Added tokens that are not special: decoding keeps them.
        metaspace: Whether blanks are encoded in SentencePiece's way.
        rstrip: Whether control tokens swallow the blanks after them.
        refused: The cases that cannot be written in this style: their names, and words of the error.
        facts: What `facts_of` must find, where it is not the usual.
        tail: What the template writes after the last end of turn, other than one line break.
        arguments_as_text: Whether the arguments of calls must be JSON text.
    """

    written: Written
    eos: str
    bos: str | None = None
    special: str = ""
    added: str = ""
    metaspace: bool = False
    rstrip: bool = False
    refused: Mapping[Any, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    tail: str = ""
    arguments_as_text: bool = False


def thought(message: Message) -> str:
    """The reasoning of an answer, from its field or from tags in its text."""
    if message.reasoning:
        return message.reasoning.strip()
    return message.content.partition("</think>")[0].replace("<think>", "").strip() if in_tags(message) else ""


def in_tags(message: Message) -> bool:
    """Whether an answer's reasoning stands in its text."""
    return "</think>" in message.content


def rest(message: Message) -> str:
    """The text of an answer without its reasoning."""
    return message.content.partition("</think>")[2] if in_tags(message) else message.content


def as_json(value: Any) -> str:
    """A value as the templates' `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False)


def calls(message: Message, form: str, between: str) -> str:
    """The calls of a message, each in a form with NAME, ARGS and ID."""
    texts = [
        form.replace("NAME", call.name)
        .replace("ID", call.id or f"call{n:05d}")
        .replace("ARGS", as_json(call.arguments))
        for n, call in enumerate(message.tool_calls)
    ]
    return between.join(texts)


def plain(end: str, before: str = "", *, strip: bool = False) -> Written:
    """An answer as it is, or without blanks around, and its end."""
    return lambda message, _: before + (message.content.strip() if strip else message.content) + end


def llama3_1(message: Message, _: str) -> str:
    said = calls(message, '{"name": "NAME", "parameters": ARGS}', "") or message.content.strip()
    return said + "<|eot_id|>"


def llama4(message: Message, _: str) -> str:
    called = calls(message, '{"name": "NAME", "parameters": ARGS}', "")
    end = f"<|python_start|>{called}<|python_end|><|eom|>" if called else "<|eot|>"
    return message.content.strip() + end


def mistral_v3(message: Message, _: str) -> str:
    called = calls(message, '{"name": "NAME", "arguments": ARGS, "id": "ID"}', ", ")
    return (f"[TOOL_CALLS] [{called}]" if called else " " + message.content.strip()) + "</s>"


def mistral_v7(message: Message, _: str) -> str:
    called = calls(message, '{"name": "NAME", "arguments": ARGS, "id": "ID"}', ", ")
    return (f"[TOOL_CALLS][{called}]" if called else message.content) + "</s>"


def qwen2_5(message: Message, _: str) -> str:
    called = calls(message, '<tool_call>\n{"name": "NAME", "arguments": ARGS}\n</tool_call>', "\n")
    return "\n".join(part for part in (message.content, called) if part) + "<|im_end|>"


def qwen3(message: Message, _: str) -> str:
    called = calls(message, '<tool_call>\n{"name": "NAME", "arguments": ARGS}\n</tool_call>', "\n")
    said = "\n".join(part for part in (rest(message).lstrip("\n"), called) if part)
    return f"<think>\n{thought(message)}\n</think>\n\n{said}<|im_end|>"


def qwen3_5(message: Message, prompt: str) -> str:
    assert prompt.endswith("<think>\n")
    called = []
    for call in message.tool_calls:
        values = [
            f"<parameter={key}>\n{value if isinstance(value, str) else as_json(value)}\n</parameter>\n"
            for key, value in call.arguments.items()
        ]
        called.append(f"<tool_call>\n<function={call.name}>\n{''.join(values)}</function>\n</tool_call>")
    said = "\n\n".join(part for part in (rest(message).strip(), "\n".join(called)) if part)
    return f"{thought(message)}\n</think>\n\n{said}<|im_end|>"


def deepseek_v3(message: Message, _: str) -> str:
    form = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGS\n```<｜tool▁call▁end｜>"
    called = calls(message, form, "\n")
    said = f"<｜tool▁calls▁begin｜>{called}<｜tool▁calls▁end｜>" if called else message.content
    return said + "<｜end▁of▁sentence｜>"


def deepseek_r1(message: Message, prompt: str) -> str:
    assert prompt.endswith("<think>\n")
    return f"{thought(message)}\n</think>\n\n{rest(message).lstrip(chr(10))}<｜end▁of▁sentence｜>"


def glm4(message: Message, _: str) -> str:
    called = calls(message, "NAME\nARGS", "<|assistant|>")
    return f"{called}<|observation|>" if called else f"\n{message.content}<|user|>"


def glm4_5(message: Message, _: str) -> str:
    called = []
    for call in message.tool_calls:
        values = [
            f"<arg_key>{key}</arg_key>\n"
            f"<arg_value>{value if isinstance(value, str) else as_json(value)}</arg_value>\n"
            for key, value in call.arguments.items()
        ]
        called.append(f"\n<tool_call>{call.name}\n{''.join(values)}</tool_call>")
    said = "\n" + rest(message).strip() if rest(message).strip() else ""
    end = "<|observation|>" if called else "<|user|>"
    return f"\n<think>{thought(message)}</think>{said}{''.join(called)}{end}"


def gpt_oss(message: Message, _: str) -> str:
    analysis = message.reasoning or (message.content if message.tool_calls else "")
    before = f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant" if analysis else ""
    if message.tool_calls:
        return before + calls(
            message, " to=functions.NAME<|channel|>commentary json<|message|>ARGS<|call|>", ""
        )
    return f"{before}<|channel|>final<|message|>{message.content}<|return|>"


def command_r(message: Message, _: str) -> str:
    called = calls(message, '{"tool_name": "NAME", "parameters": ARGS}', ", ")
    if called:
        before = message.content + "\n" if message.content else ""
        return f"{before}Action: ```json\n[{called}]```<|END_OF_TURN_TOKEN|>"
    return message.content.strip() + "<|END_OF_TURN_TOKEN|>"


def granite3(message: Message, _: str) -> str:
    called = calls(message, '{"name": "NAME", "arguments": ARGS}', ", ")
    return message.content + (f"<|tool_call|>[{called}]" if called else "") + "<|end_of_text|>"


def smollm3(message: Message, _: str) -> str:
    before = f"<think>\n{message.reasoning}\n</think>\n\n" if message.reasoning else ""
    return before + message.content.lstrip("\n") + "<|im_end|>"


SENTENCE = "<｜end▁of▁sentence｜>"
IM = "<|im_start|> <|im_end|>"
ROLES = "<|user|> <|assistant|> <|system|> <|observation|>"

CALLS = ("one call", "two calls", "nested arguments", "call beside text", "call last", "reasoning and a call")
NO_TOOLS = dict.fromkeys((*CALLS, "tools not called"), "does not write tool definitions")
CALLS_DROPPED = dict.fromkeys(
    (*CALLS, "call without tools"), "does not write the call of 'weather' in message"
)
CALLS_DROPPED_WITHOUT_TOOLS = {"call without tools": CALLS_DROPPED["call without tools"]}
NO_CALLS = CALLS_DROPPED | NO_TOOLS
REASONED = ("reasoning", "reasoning in all", "reasoning in one", "reasoning and a call")
NO_REASONING = dict.fromkeys(REASONED, "does not write the reasoning of message 2")
NO_THOUGHT = dict.fromkeys((*REASONED, "thought in content"), "asks for an answer without reasoning")
PLAIN = NO_REASONING | NO_CALLS
CONTENT_DROPPED = {"call beside text": "the answer in message 2 cannot be found"}
CONTRADICTING = dict.fromkeys(
    (
        *("one turn", "three turns", "system", "blanks", "thought in content", "Chinese", "developer"),
        "first answer not trained",
    ),
    "contradicts itself in message",
)

STYLES: dict[str, Style] = {
    "chatml": Style(plain("<|im_end|>"), "<|im_end|>", special="<|im_start|>", refused=PLAIN),
    "llama2": Style(
        plain(" </s>", " ", strip=True),
        "</s>",
        "<s>",
        metaspace=True,
        refused=PLAIN,
        facts={"developer": False},
    ),
    "llama3": Style(
        plain("<|eot_id|>", strip=True),
        "<|end_of_text|>",
        "<|begin_of_text|>",
        "<|start_header_id|> <|end_header_id|> <|eot_id|>",
        refused=PLAIN,
    ),
    "llama3_1": Style(
        llama3_1,
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<|start_header_id|> <|end_header_id|> <|eom_id|> <|python_tag|> <|end_of_text|>",
        refused=NO_REASONING | CONTENT_DROPPED | {"two calls": "only supports single tool-calls"},
    ),
    "llama4": Style(
        llama4,
        "<|eot|>",
        "<|begin_of_text|>",
        "<|header_start|> <|header_end|> <|eom|> <|python_start|> <|python_end|>",
        refused=NO_REASONING,
    ),
    "mistral_v1": Style(
        plain("</s>"),
        "</s>",
        "<s>",
        metaspace=True,
        refused=PLAIN | dict.fromkeys(("system", "developer"), "roles must alternate"),
        facts={"developer": False},
    ),
    "mistral_v3": Style(
        mistral_v3,
        "</s>",
        "<s>",
        "[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
        metaspace=True,
        refused=NO_REASONING | CONTENT_DROPPED,
        facts={"developer": False},
    ),
    "mistral_v7": Style(
        mistral_v7,
        "</s>",
        "<s>",
        "[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
        "[SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
        refused=NO_REASONING | CONTENT_DROPPED,
        facts={"developer": False},
    ),
    "gemma2": Style(
        plain("<end_of_turn>", strip=True),
        "<eos>",
        "<bos>",
        "<start_of_turn> <end_of_turn>",
        metaspace=True,
        refused=PLAIN | dict.fromkeys(("system", "developer"), "System role not supported"),
        facts={"developer": False},
    ),
    "gemma3": Style(
        plain("<end_of_turn>", strip=True),
        "<eos>",
        "<bos>",
        "<start_of_turn> <end_of_turn>",
        metaspace=True,
        refused=PLAIN,
        facts={"developer": False},
    ),
    "phi3": Style(
        plain("<|end|>"),
        "<|endoftext|>",
        "<s>",
        "<|system|> <|user|> <|assistant|> <|end|>",
        metaspace=True,
        rstrip=True,
        refused=PLAIN,
        tail="\n<|endoftext|>",
    ),
    "phi4": Style(plain("<|im_end|>"), "<|endoftext|>", "<|endoftext|>", f"{IM} <|im_sep|>", refused=PLAIN),
    "qwen2_5": Style(
        qwen2_5, "<|im_end|>", special="<|im_start|>", added="<tool_call> </tool_call>", refused=NO_REASONING
    ),
    "qwen3": Style(
        qwen3,
        "<|im_end|>",
        special="<|im_start|>",
        added="<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>",
        facts={"developer": False},
    ),
    "qwen3_5": Style(
        qwen3_5,
        "<|im_end|>",
        special="<|im_start|>",
        added="<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>",
        facts={"developer": False},
    ),
    "deepseek_v3": Style(
        deepseek_v3,
        SENTENCE,
        "<｜begin▁of▁sentence｜>",
        added="<｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> "
        "<｜tool▁call▁end｜> <｜tool▁sep｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> "
        "<｜tool▁output▁begin｜> <｜tool▁output▁end｜>",
        refused=NO_REASONING | NO_TOOLS,
        arguments_as_text=True,
        facts={"developer": False},
    ),
    "deepseek_v3_1": Style(
        plain(SENTENCE),
        SENTENCE,
        "<｜begin▁of▁sentence｜>",
        added="<｜User｜> <｜Assistant｜> <think> </think>",
        refused=NO_THOUGHT | NO_CALLS,
        facts={"developer": False},
    ),
    "deepseek_r1": Style(
        deepseek_r1,
        SENTENCE,
        "<｜begin▁of▁sentence｜>",
        added="<｜User｜> <｜Assistant｜> <think> </think>",
        refused=NO_CALLS,
        facts={"developer": False},
    ),
    "glm4": Style(
        glm4, "<|endoftext|>", special=f"[gMASK] <sop> {ROLES}", refused=NO_REASONING | CONTENT_DROPPED
    ),
    "glm4_5": Style(
        glm4_5,
        "<|endoftext|>",
        special=f"[gMASK] <sop> {ROLES}",
        added="<think> </think> <tool_call> </tool_call> <arg_key> </arg_key> <arg_value> </arg_value>",
        facts={"developer": False},
    ),
    "gpt_oss": Style(
        gpt_oss,
        "<|return|>",
        "<|startoftext|>",
        "<|start|> <|end|> <|message|> <|channel|> <|call|> <|constrain|> <|endoftext|>",
        refused={"two calls": "does not write the call"},
    ),
    "command_r": Style(
        command_r,
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
        "<|START_OF_TURN_TOKEN|>",
        "<|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>",
        refused=NO_REASONING | CALLS_DROPPED_WITHOUT_TOOLS,
        facts={"developer": False},
    ),
    "granite3": Style(
        granite3,
        "<|end_of_text|>",
        "<|end_of_text|>",
        "<|start_of_role|> <|end_of_role|> <|tool_call|>",
        refused=NO_REASONING,
    ),
    "olmo2": Style(plain("<|endoftext|>"), "<|endoftext|>", "<|endoftext|>", refused=PLAIN),
    "smollm3": Style(
        smollm3,
        "<|im_end|>",
        special="<|im_start|> <|endoftext|>",
        added="<think> </think>",
        refused=CALLS_DROPPED,
        facts={"developer": False},
    ),
    "internlm2": Style(plain("<|im_end|>"), "</s>", "<s>", IM, metaspace=True, refused=PLAIN),
    "yi": Style(
        plain("<|im_end|>"),
        "<|im_end|>",
        "<|startoftext|>",
        added="<|im_start|>",
        metaspace=True,
        refused=PLAIN,
        facts={"developer": False},
    ),
    "baichuan2": Style(
        plain("<reserved_106>"),
        "</s>",
        "<s>",
        added="<reserved_106> <reserved_107>",
        metaspace=True,
        refused=PLAIN,
    ),
    "chatglm2": Style(plain("\n\n</s>"), "</s>", "<s>", metaspace=True, refused=PLAIN),
    "chatglm3": Style(
        plain("<|user|>", "\n "), "</s>", None, f"[gMASK] sop {ROLES}", metaspace=True, refused=PLAIN
    ),
    "falcon": Style(plain("\nUser:", " "), "<|endoftext|>", refused=PLAIN, facts={"developer": False}),
    "zephyr": Style(plain("</s>", "\n"), "</s>", "<s>", metaspace=True, refused=PLAIN),
    "vicuna": Style(plain("</s>", " ", strip=True), "</s>", "<s>", metaspace=True, refused=PLAIN),
    "alpaca": Style(plain("\n\n### Instruction:"), "</s>", "<s>", metaspace=True, refused=PLAIN),
    "marks_trl": Style(plain("<|im_end|>\n"), "<|im_end|>", special="<|im_start|>", refused=PLAIN),
    "marks_without_end": Style(plain("<|im_end|>"), "<|im_end|>", special="<|im_start|>", refused=PLAIN),
    "marks_contradicting": Style(
        plain("<|im_end|>"), "<|im_end|>", special="<|im_start|>", refused=CONTRADICTING | PLAIN
    ),
}


@cache
def tokenizer_of(name: str) -> Any:
    """A small tokenizer with the tokens and the template of a style."""
    style = STYLES[name]
    backend = untrained(metaspace=style.metaspace)
    special = [token for token in (style.bos, style.eos, *style.special.split()) if token]
    backend.add_special_tokens(
        [AddedToken(token, rstrip=style.rstrip, normalized=False) for token in special]
    )
    backend.add_tokens([AddedToken(token, normalized=False) for token in style.added.split()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=style.bos, eos_token=style.eos)
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    tool_use = FOLDER / f"{name}_tool_use.jinja"
    tokenizer.chat_template = (
        {"default": text, "tool_use": tool_use.read_text(encoding="utf-8").removesuffix("\n")}
        if tool_use.exists()
        else text
    )
    return tokenizer
