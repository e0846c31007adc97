"""The tokenizer files of an export, from which every reader builds the tokenizer of the training."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from talik.base.errors import TalikError
from talik.base.events import Notify, Status
from talik.base.files import read_json, write_json, write_text
from talik.model.source.older_readers import older_tokenizer
from talik.model.tokenizer import load_tokenizer

PROBES = (  # texts that reveal differences between tokenizers
    *(
        "What is 12345.67 plus 1?",
        " two  blanks   and\ttabs\n\n\nlines \r\n",
        "We'll SAY it's DON'T",
        "naïve Ｆｕｌｌ ﬁ",
    ),
    *(
        "你好，世界。今天2024年",
        "Привет, как дела?",
        "👩‍🔬🏽 é\u0301",
        "def f(x):\n    return x**2  # ok",
        "<|im_end|></s>",
    ),
)


def write_tokenizer(folder: Path, tokenizer: Any, notify: Notify) -> None:
    """Writes tokenizer.json and tokenizer_config.json so that readers build the tokenizer of the training.

    The source's own files are kept if they do that. For some model types Transformers 5 ignores the rules in
    tokenizer.json and uses its own; then the file is written with the rules in use.

    Raises:
        TalikError: No variant of the files gives the same tokenizer.
    """
    json_file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    own: str | None = None
    texts = [own]
    if json_file.is_file() and tokenizer.is_fast:
        own, used = json_file.read_text(encoding="utf-8"), _bare(tokenizer.backend_tokenizer)
        texts = [own, used.to_str(pretty=True)]
        if _probed(_bare(Tokenizer.from_str(own))) != _probed(used):
            texts.reverse()
    for text, fields in product(texts, _tokenizer_configs(folder, tokenizer)):
        if text is not None and text != json_file.read_text(encoding="utf-8"):
            write_text(json_file, text)
        if fields and fields != (read_json(config_file) if config_file.is_file() else {}):
            write_json(config_file, fields)
        if _same_tokenizer(folder, tokenizer):
            if text != own:
                kind = type(tokenizer).__name__
                said = (
                    f"tokenizer.json has the rules of {kind} now, by which Transformers read it in training"
                )
                notify(Status("export", said))
            return
    raise TalikError("no tokenizer files could be written that give the tokenizer of the training")


def _tokenizer_configs(folder: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Variants of tokenizer_config.json: with the keys of older readers, and unchanged."""
    file, fast = folder / "tokenizer_config.json", (folder / "tokenizer.json").is_file()
    own = read_json(file) if file.is_file() else {}
    fields = {key: value for key, value in own.items() if key != "auto_map"}
    if (folder / "config.json").is_file():
        return [older_tokenizer(fields, fast=fast), own]
    # A PEFT folder has no config.json that would name the class.
    kinds = [type(tokenizer).__name__, "TokenizersBackend"]
    return [older_tokenizer({**fields, "tokenizer_class": kind}, fast=fast) for kind in kinds]


def _bare(backend: Tokenizer) -> Tokenizer:
    """A copy of a tokenizer without truncation and padding."""
    backend = copy.deepcopy(backend)
    backend.no_padding()
    backend.no_truncation()
    return backend


def _probed(backend: Tokenizer) -> list[list[int]]:
    """The ids of texts that reveal differences between tokenizers."""
    return [one.ids for one in backend.encode_batch(list(PROBES), add_special_tokens=False)]


def _same_tokenizer(folder: Path, tokenizer: Any) -> bool:
    """True if the folder gives the same ids and special tokens; chat templates are not compared."""

    def facts(one: Any) -> tuple[Any, ...]:
        ids = _bare(one.backend_tokenizer).to_str() if one.is_fast else one.get_vocab()
        return ids, one.special_tokens_map, one.model_max_length, one.padding_side

    try:
        return facts(load_tokenizer(folder)) == facts(tokenizer)
    except Exception:  # Transformers raises errors of many types for inconsistent files
        return False
