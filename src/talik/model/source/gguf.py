"""Converts a GGUF file to a folder with config.json, bfloat16 safetensors and a tokenizer, once."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from talik.base import files
from talik.base.errors import SourceError, TalikError
from talik.base.libraries import need_packages, one_line
from talik.base.system import home_folder, release_free_memory
from talik.model.source.older_readers import rewrite


def converted(file: Path, weights: bool, progress: Callable[[str], None]) -> Path:
    """The folder in Talik's home for a GGUF file; converted once per path, size and modification time."""
    from filelock import FileLock

    if (part := re.search(r"-\d{5}-of-(\d{5})\.gguf$", file.name)) and int(part[1]) > 1:
        remedy = f'Merge it first: llama-gguf-split --merge "{file}" merged.gguf'
        raise SourceError("is one part of a GGUF file that was split", where=file, remedy=remedy)
    stat = file.stat()
    key = files.fingerprint(str(file), str(stat.st_size), str(stat.st_mtime_ns))[:12]
    folder = home_folder() / "models" / f"{file.stem}-{key}"
    if not weights and not folder.exists():
        folder = folder.with_name(f"{folder.name}-config")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.exists():
            need_packages("gguf", "gguf", "accelerate", where=file)
            progress(f"reading {file.name} ({files.format_bytes(stat.st_size)}), once")
            with files.finished_folder(folder) as part, _reading_once():
                _convert(file, part, weights)
            release_free_memory()  # a plan would count freed memory as in use
    return folder


def _convert(file: Path, folder: Path, weights: bool) -> None:
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        model = _read_gguf(file, folder) if weights else None
        config = model.config if model else AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        vars(config).pop("_model_name_or_path", None)  # the title in the GGUF file
        (model or config).save_pretrained(folder)
        rewrite(folder)
    except TalikError:
        raise
    except Exception as error:  # tokenizers and readers of damaged files raise errors of many types
        remedy = "Is it wholly downloaded, and does Transformers know this architecture?"
        raise SourceError(f"cannot be read: {one_line(error)}", where=file, remedy=remedy) from error
    files.write_json(folder / "talik_source.json", {"file": str(file), "bytes": file.stat().st_size})


def _read_gguf(file: Path, folder: Path) -> Any:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    numbers = sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(str(file)).tensors)
    files.need_room(folder, numbers * torch.bfloat16.itemsize, f"{file.name} in bfloat16")
    plain = GgufConfig(dequantize=True)
    options: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "quantization_config": plain,
        "output_loading_info": True,
    }
    loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise SourceError(f"has no weights for {len(missing)} tensors: {', '.join(missing[:5])}", where=file)
    return model


@contextlib.contextmanager
def _reading_once() -> Iterator[None]:
    """Makes Transformers parse the header of a GGUF file once, not three times, and build its table of names
    once, not for every module: this halves the time of a conversion.
    """
    import gguf
    from transformers.utils import logging

    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        for name, function in own.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in own.items():
            setattr(gguf, name, function)
        logging.set_verbosity(verbosity)
