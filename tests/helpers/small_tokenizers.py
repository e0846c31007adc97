"""Small fast tokenizers, made on the spot, with the kinds of chat template that models come with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CORPUS = """system user assistant model You are a helpful assistant. Be brief. Answer in one word.
Hello there! How are you? I am fine, thanks. What is 2 + 3? It is 5. User Assistant INST think
Translate this into English: guten Tag good day Name a colour. Blue is a colour.
The sky is blue and the grass is green. def f(x):
    return x + 1
"""

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (  # knows no generation prompt, and puts the system message into the first question
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' %}"
    "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + ns.system + m.content.strip() + ' [/INST]' }}"
    "{% set ns.system = '' %}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim "
    "+ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
QWEN3 = (  # thoughts of earlier answers are dropped; the last answer always has a place for them
    "{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
UNENDED = (  # no end-of-turn token after an answer; the next question's mark is no BOS
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """A tokenizer to make: its template, its control tokens, and the ways in which tokenizers differ."""

    template: str | None
    bos: str | None
    eos: str
    others: tuple[str, ...] = ()
    metaspace: bool = False
    trims_offsets: bool = False
    adds_bos: bool = False


KINDS = {
    "chatml": Kind(CHATML, "<|im_start|>", "<|im_end|>"),
    "llama3": Kind(
        LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
        trims_offsets=True,
        adds_bos=True,
    ),
    "llama2": Kind(LLAMA2, "<s>", "</s>", metaspace=True),
    "gemma": Kind(GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), metaspace=True),
    "qwen3": Kind(QWEN3, None, "<|im_end|>", ("<|im_start|>",)),
    "none": Kind(None, "<s>", "</s>", adds_bos=True),
    "unended": Kind(UNENDED, None, "</s>", trims_offsets=True),
}


@cache
def make_tokenizer(name: str) -> Any:
    """The tokenizer of that name; pad is the end token, the case that hides end-of-turn tokens elsewhere."""
    kind = KINDS[name]
    backend = untrained(metaspace=kind.metaspace)
    control = {token: token for token in (kind.bos, kind.eos, *kind.others) if token}
    backend.add_special_tokens(list(control))
    steps: list[Any] = [processors.ByteLevel(trim_offsets=True)] if kind.trims_offsets else []
    if kind.adds_bos and kind.bos:
        bos = (kind.bos, backend.token_to_id(kind.bos))
        steps.append(processors.TemplateProcessing(single=f"{kind.bos} $A", special_tokens=[bos]))
    if steps:
        backend.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=kind.bos, eos_token=kind.eos, pad_token=kind.eos
    )
    tokenizer.chat_template = kind.template
    return tokenizer


def untrained(*, metaspace: bool) -> Tokenizer:
    """A tokenizer without added tokens: SentencePiece's way with blanks (`metaspace`), or of bytes."""
    return _sentencepiece() if metaspace else _byte_level()


def _byte_level() -> Tokenizer:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary, merges = _whole_words(split, sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """Words with a mark for the space before them, and bytes for unknown characters, as Llama 2 has."""
    split = pre_tokenizers.Metaspace(prepend_scheme="never")
    alphabet = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\n"]
    alphabet += [chr(code) for code in range(33, 127)]
    vocabulary, merges = _whole_words(split, alphabet)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = split
    marks = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(marks)
    return tokenizer


def _whole_words(split: Any, alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merges that put the corpus's words together letter by letter: no trainer, the same in every version."""
    merges: dict[tuple[str, str], None] = {}
    lines = [CORPUS, *CORPUS.split()]
    for word, _ in (piece for line in lines for piece in split.pre_tokenize_str(line)):
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    pieces = [*alphabet, *(left + right for left, right in merges)]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, list(merges)
