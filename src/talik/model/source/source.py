"""Finds a model by any name and returns a local folder with config.json, safetensors weights and a tokenizer.

    find_model("Qwen/Qwen2.5-7B-Instruct").folder

The folder has been checked and can be loaded; errors say what was looked for, where, and what to run. No
pickle file is read, no code of a model is run, and only the hub libraries' caches and Talik's home are
written.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from talik.base import files
from talik.base.errors import SourceError
from talik.base.libraries import need_packages, one_line
from talik.model.source.gguf import converted
from talik.model.weights.index import index_of, weight_map

_SMALL = [
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.codes", "tokenizer*", "vocab*", "merges*"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*"),
]
_NOT_USED = ["*/*", "consolidated*", "adapter_*"]  # the same weights in other layouts, and adapters
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_HEADS = re.compile("ForMaskedLM|Classification|ForQuestionAnswering|ForMultipleChoice")
_HOLDS = "A model's folder holds config.json, model.safetensors (or its shards) and the tokenizer's files."


@dataclass(frozen=True, slots=True)
class Source:
    """A model on this computer.

    Attributes:
        folder: The local folder.
        origin: The name it was found by.
        kind: Where it comes from.
        revision: The commit of a hub model.
        config: The parsed config.json.
    """

    folder: Path
    origin: str
    kind: Literal["folder", "hub", "modelscope", "gguf"]
    revision: str | None
    config: Any = field(default=None, repr=False, compare=False)  # set once the folder has been checked


def find_model(
    model: str,
    *,
    revision: str | None = None,
    weights: bool = True,
    offline: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Source:
    """Finds a causal language model, and downloads or converts it if necessary.

    Args:
        model: A folder, a GGUF file, `modelscope:Org/Name`, or `Org/Name` on the Hugging Face Hub; tried in
            this order.
        revision: Branch, tag or commit of a hub model.
        weights: Whether weights are needed; otherwise config.json and tokenizer are enough.
        offline: Use only files that have been downloaded.
        progress: Gets one line before a conversion.

    Raises:
        SourceError: The model is not found, not complete, or not supported.
        NoRoomError: There is no room for a conversion.
    """
    path = _as_path(model)
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if gguf := _gguf_file(path):
        source = Source(converted(gguf, weights, progress), model, "gguf", None)
    elif path.is_dir():
        source = Source(path.absolute(), model, "folder", None)
    elif model.startswith("modelscope:"):
        source = _from_modelscope(model, revision, weights, offline)
    elif re.match(r"[A-Za-z]:|[./~]", model) or "\\" in model or model.count("/") > 1 or path.is_file():
        raise _no_such_path(path)
    else:
        source = _from_hub(model, revision, weights, offline)
    return replace(source, config=_check(source, weights))


def _as_path(model: str) -> Path:
    if not model.strip() or "\0" in model:
        raise SourceError(
            "no model was named", remedy="Name a folder, a .gguf file, or a model such as Org/Name."
        )
    with contextlib.suppress(RuntimeError):  # "~name" of a user that does not exist
        return Path(model).expanduser()
    return Path(model)


def _no_such_path(path: Path) -> SourceError:
    if path.is_file():
        return SourceError(
            "is a file, not a model", where=path.absolute(), remedy=f"Name its folder: {path.parent}"
        )
    if sys.platform != "win32" and (drive := re.match(r"([A-Za-z]):[\\/](.*)", str(path))):
        there = f"/mnt/{drive[1].lower()}/{drive[2]}".replace("\\", "/")
        return SourceError("is a path of Windows", where=path, remedy=f"Under WSL its name is {there}")
    parent = path.absolute().parent
    if not parent.is_dir():
        return SourceError("no such folder, nor the one above it", where=path.absolute())
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()])
    remedy = f"In {parent} there is: {', '.join(near)}" if near else None
    return SourceError("no such folder or file", where=path.absolute(), remedy=remedy)


def _gguf_file(path: Path) -> Path | None:
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path.absolute()
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(entry for entry in path.absolute().iterdir() if entry.suffix.lower() == ".gguf")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise SourceError(
            f"holds {len(found)} GGUF files: {names}", where=path, remedy="Name one of the files."
        )
    return found[0] if found else None


# Checks of every folder


def _check(source: Source, weights: bool) -> Any:
    """Checks a folder and returns its parsed config."""
    file = source.folder / "config.json"
    if not file.is_file():
        raise SourceError("no config.json", where=source.folder, remedy=_what_else(source) or _HOLDS)
    try:
        config = files.read_json(file)
        kind = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        remedy = "Is it the model's own config.json, wholly downloaded?"
        raise SourceError("is not a model's config: no model_type", where=file, remedy=remedy) from error
    _check_kind(config, kind, file)
    parsed = _check_config(config, kind, file)
    _check_generation_config(source.folder)
    if weights:
        _check_weights(source)
    return parsed


def _check_generation_config(folder: Path) -> None:
    """Raises SourceError for a generation config that Transformers would refuse during the export."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return
    try:
        if not isinstance(files.read_json(file), dict):
            raise ValueError("it is not a JSON object")
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # fields are checked by various code
        remedy = "Correct the field, or remove the file: it only holds defaults for generating text."
        raise SourceError(
            f"Transformers does not accept it: {one_line(error)}", where=file, remedy=remedy
        ) from None


def _check_kind(config: dict[str, Any], kind: str, file: Path) -> None:
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as classes

    if kind not in classes and (own := config.get("auto_map")):
        code = own.get("AutoModelForCausalLM") or ", ".join(map(str, own.values()))
        problem = f"model_type {kind!r} needs the model's own code ({code}), and Talik runs none"
        remedy = f"Transformers {__version__} has no class for it; a later version may."
        raise SourceError(problem, where=file, remedy=remedy)
    heads = [name for name in config.get("architectures") or [] if _OTHER_HEADS.search(name)]
    if kind not in classes or heads:
        what = f"model_type {kind!r}" + (f" saved as {heads[0]}" if heads else "")
        remedy = f"Talik trains the causal language models of Transformers ({__version__} here)."
        raise SourceError(f"{what} is not a causal language model", where=file, remedy=remedy)


def _check_config(config: dict[str, Any], kind: str, file: Path) -> Any:
    from transformers import AutoConfig

    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "by an unnamed method")
        remedy = "Training needs plain weights: name the model that this one was made from."
        raise SourceError(f"the weights are quantised ({method})", where=file, remedy=remedy)
    try:
        parsed = AutoConfig.from_pretrained(file.parent, trust_remote_code=False)
    except Exception as error:  # every family has its own checks
        raise SourceError(f"Transformers does not accept it: {one_line(error)}", where=file) from error
    if getattr(parsed, "is_encoder_decoder", False):
        remedy = "Talik trains models that continue one sequence."
        raise SourceError(f"model_type {kind!r} is an encoder-decoder", where=file, remedy=remedy)
    return parsed


def _check_weights(source: Source) -> None:
    folder, shards = source.folder, ["model.safetensors"]
    if index := index_of(folder):
        shards = sorted(set(weight_map(index).values()))
    elif not (folder / shards[0]).is_file():
        raise SourceError("no model.safetensors", where=folder, remedy=_what_else(source) or _HOLDS)
    if missing := [name for name in shards if not (folder / name).is_file()]:
        problem = f"{len(missing)} of {len(shards)} files of weights are missing: {', '.join(missing)}"
        raise SourceError(problem, where=folder, remedy="Download the model again; what is there is kept.")
    if pointers := [name for name in shards if _is_pointer(folder / name)]:
        problem = f"Git LFS pointers in place of weights: {', '.join(pointers)}"
        raise SourceError(problem, where=folder, remedy=f'Fetch the weights: git -C "{folder}" lfs pull')


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(32).startswith(b"version https://git-lfs")


def _what_else(source: Source) -> str | None:
    """What to do about a model whose weights exist only in another format."""
    names, hub_name = _names_at(source), source.origin.removeprefix("modelscope:")
    if source.kind != "folder" and (ggufs := [name for name in names if name.endswith(".gguf")]):
        tool = "hf download" if source.kind == "hub" else "modelscope download --model"
        return f"It holds GGUF files; download one and name it: {tool} {hub_name} {ggufs[0]} --local-dir ."
    if not any(Path(name).suffix in _PICKLES for name in names):
        return None
    whole = source.origin if source.kind == "hub" else str(source.folder)
    return (
        "Its weights are pickles, which can run code when they are read. If you trust them, convert them:\n"
        '  python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"m = {whole!r}; M.from_pretrained(m, dtype='auto').save_pretrained('converted'); "
        "T.from_pretrained(m).save_pretrained('converted')\""
    )


def _names_at(source: Source) -> list[str]:
    if source.kind == "hub":
        from huggingface_hub import HfApi

        with contextlib.suppress(Exception):  # offline, only downloaded files are known
            return sorted(HfApi().list_repo_files(source.origin, revision=source.revision))
    return sorted(entry.name for entry in source.folder.iterdir())


# Hubs


def _from_hub(model: str, revision: str | None, weights: bool, offline: bool) -> Source:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=[*_SMALL, *(["*.safetensors"] if weights else [])],
            ignore_patterns=_NOT_USED,
            local_files_only=offline,
        )
    except Exception as error:  # the library's errors share no public base class
        raise _hub_error(model, revision, offline, error) from error
    return Source(Path(folder), model, "hub", Path(folder).name)


def _hub_error(model: str, revision: str | None, offline: bool, error: Exception) -> SourceError:
    from huggingface_hub import constants, errors

    where, here = f"{constants.ENDPOINT}/{model}", Path(model).absolute()
    if isinstance(error, errors.HFValidationError):
        return SourceError(f"neither a folder ({here}) nor a model's id", where=repr(model))
    if isinstance(error, errors.GatedRepoError):
        remedy = "Accept its terms on that page, then log in: hf auth login"
        return SourceError("its owner asks you to accept terms first", where=where, remedy=remedy)
    if isinstance(error, errors.RepositoryNotFoundError):
        remedy = f"Check the name (there is no folder {here} either). If it is private: hf auth login"
        return SourceError("no such model, or a private one", where=where, remedy=remedy)
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(f"the model has no revision {revision!r}", where=where)
    if isinstance(error, errors.LocalEntryNotFoundError) and (offline or constants.HF_HUB_OFFLINE):
        remedy = f"With a connection: hf download {model}" + (f" --revision {revision}" if revision else "")
        problem = f"{model} is not, or not wholly, in the Hugging Face cache, and this is offline"
        return SourceError(problem, where=constants.HF_HUB_CACHE, remedy=remedy)
    remedy = f"Run it again; files that came whole are kept. Another way, if it is there: modelscope:{model}"
    problem = f"there is no folder {here}, and the download failed: {one_line(error)}"
    return SourceError(problem, where=where, remedy=remedy)


def _from_modelscope(model: str, revision: str | None, weights: bool, offline: bool) -> Source:
    need_packages("modelscope", "modelscope", where=model)
    from modelscope.hub.snapshot_download import snapshot_download

    name = model.removeprefix("modelscope:")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some versions print to stdout
            folder = snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*_SMALL, *(["*.safetensors"] if weights else [])],
                ignore_patterns=_NOT_USED,
                local_files_only=offline,
            )
    except Exception as error:  # the errors of the library have no common base class across versions
        command = f"modelscope download --model {name}" + (f" --revision {revision}" if revision else "")
        problem = "not on this computer, and this is offline" if offline else "the download failed"
        remedy = f"{'With a connection' if offline else 'Check the name, then run again'}: {command}"
        raise SourceError(f"{problem}: {one_line(error)}", where=model, remedy=remedy) from error
    return Source(Path(folder), model, "modelscope", revision)
