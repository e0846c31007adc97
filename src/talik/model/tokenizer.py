"""Loads tokenizers, and knows which files belong to one."""

from __future__ import annotations

import fnmatch
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from talik.base.errors import SourceError
from talik.base.files import read_json

PATTERNS = (
    *(
        "tokenizer*",
        "vocab*",
        "merges*",
        "special_tokens_map.json",
        "added_tokens.json",
        "*.model",
        "*.tiktoken",
    ),
    *("tekken.json", "*.codes", "spiece*", "chat_template*", "*.jinja"),
)
_NOW = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


def is_tokenizer_file(name: str) -> bool:
    """True if a file of this name belongs to a tokenizer."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in PATTERNS)


def load_tokenizer(folder: Path, date: str | None = None) -> Any:
    """Loads the tokenizer of a model folder, with the template of chat_template.json if it has no other.

    Args:
        folder: The model's folder.
        date: Date and time (ISO 8601) that the chat template writes in place of today's; templates ask for it
            by `strftime_now("%d %b %Y")`.

    Raises:
        SourceError: chat_template.json holds no template.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    file = folder / "chat_template.json"
    if tokenizer.chat_template is None and file.is_file():  # Transformers reads it for processors only
        try:
            template = read_json(file)["chat_template"]
        except (ValueError, KeyError, TypeError, RecursionError):
            template = None
        if not isinstance(template, str):
            problem = "holds no template: a JSON object with 'chat_template' is needed"
            raise SourceError(problem, where=file, remedy="Get the file again from where the model came.")
        tokenizer.chat_template = template
    if date is not None:
        fix_date(tokenizer, datetime.fromisoformat(date))
    return tokenizer


def fix_date(tokenizer: Any, now: datetime) -> None:
    """Replaces today's date by this one in a tokenizer's chat template."""
    text = tokenizer.chat_template
    if isinstance(text, dict):
        tokenizer.chat_template = {name: _dated(one, now) for name, one in text.items()}
    elif text is not None:
        tokenizer.chat_template = _dated(text, now)


def _dated(text: str, now: datetime) -> str:
    return _NOW.sub(lambda found: repr(now.strftime(found["format"])), text)
