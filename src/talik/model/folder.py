"""A local model folder, opened once by a command and passed on."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from talik.model.source.source import Source, find_model
from talik.model.tokenizer import load_tokenizer
from talik.model.weights.hollow import hollow_model
from talik.model.weights.safetensors_file import Entry, read_tables


class ModelFolder:
    """A folder with config.json and, if they were downloaded, weights and tokenizer.

    Each part is read when it is first asked for, and only once.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, config: PreTrainedConfig | None = None) -> None:
        """Opens a folder.

        Args:
            path: The folder.
            config: Its config, if it has been read already.
        """
        self.path = path
        self._read = config
        self._tokenizers: dict[str | None, Any] = {}

    def __repr__(self) -> str:
        return f"ModelFolder({str(self.path)!r})"

    @classmethod
    def of(cls, source: Source) -> ModelFolder:
        """The folder of a source, with the config that was read when the source was checked."""
        return cls(source.folder, source.config)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The parsed config.json. Shared by all callers: copy it before a change."""
        if self._read is not None:
            return self._read
        return AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)

    @property
    def text_config(self) -> Any:
        """The part of the config that describes the language model."""
        return self.config.get_text_config(decoder=True)

    @property
    def layers(self) -> int:
        """The number of layers of the language model."""
        return self.text_config.num_hidden_layers

    def tokenizer(self, date: str | None = None) -> Any:
        """The tokenizer.

        Args:
            date: Date and time (ISO 8601) that the chat template writes in place of today's.
        """
        if date not in self._tokenizers:
            self._tokenizers[date] = load_tokenizer(self.path, date)
        return self._tokenizers[date]

    @cached_property
    def tables(self) -> dict[Path, dict[str, Entry]]:
        """For each weight file, the place, dtype and shape of every tensor in it."""
        return read_tables(self.path)

    def hollow(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
        """A model without weights (see `hollow_model`), a new one each time: callers freeze and adapt it."""
        return hollow_model(self.path, dtype, device, copy.deepcopy(self.config))


def open_model(name: str, **options: Any) -> ModelFolder:
    """Finds a model by any name (see `find_model`, which takes the options) and opens its folder."""
    return ModelFolder.of(find_model(name, **options))
