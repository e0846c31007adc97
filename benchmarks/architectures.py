"""Which causal-LM architectures of the installed Transformers the chain gives exactly, each as a tiny model.

    python3 dev.py bench architectures             all of them, and writes docs/supported-models.md
    python3 dev.py bench architectures qwen2 opt   these, printed only

Each name has a child process with 3 GiB, one thread and a minute. Ends with 1 if any differs.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import platform
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from talik.base.errors import ChainError, UsageError
from talik.model.chain.chain import Chain, first_trained_layer, run_layers
from talik.model.chain.verify import verify_chain
from talik.model.freeze import freeze

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.loading_check import loaded_differently  # noqa: E402  # pyright: ignore[reportMissingImports]
from helpers.tiny_models import tiny_model  # noqa: E402  # pyright: ignore[reportMissingImports]

PAGE = ROOT / "docs" / "supported-models.md"
COMMAND = "python3 dev.py bench architectures"
MEMORY, SECONDS, LENGTHS = 3 * 2**30, 60, (12, 9, 7)


@dataclass(frozen=True)
class Row:
    """What was found of one name. `state` is one of supported, refused, differs and not built."""

    name: str
    state: str
    forward: str = ""
    gradient: str = ""
    weights: str = ""
    lowest: str = ""
    reason: str = ""


def batch(padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of unlike lengths."""
    ids = torch.randint(5, 250, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    for row, length in zip(mask, LENGTHS, strict=True):
        row[: length if padding == "right" else None][-length:] = 1
    return ids, mask


def rows_and_targets(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of right-padded rows whose next token is trained, flat, and those tokens."""
    width = ids.shape[1]
    places = [(r, c) for r, length in enumerate(LENGTHS) for c in range(length // 2, length - 1)]
    return torch.tensor([r * width + c for r, c in places]), torch.stack([ids[r, c + 1] for r, c in places])


def plain_gradients(model: Any, trained: list[str]) -> list[torch.Tensor]:
    """The whole model on one padded batch, by plain PyTorch, in the model's own precision."""
    ids, mask = batch("right")
    rows, targets = rows_and_targets(ids)
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)  # XGLM makes a constant in the default dtype
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.set_default_dtype(before)
    loss = F.cross_entropy(logits.flatten(0, 1)[rows], targets)
    named = dict(model.named_parameters())
    return gradients(loss, [named[name] for name in trained])


def chain_gradients(model: Any, trained: list[str]) -> list[torch.Tensor]:
    """The trunk row by row, unpadded; the top on the padded batch, without a mask; gathered rows."""
    chain, (ids, _) = Chain(model), batch("right")
    cut, depth = first_trained_layer(chain), len(chain.layers)
    hidden = torch.zeros(*ids.shape, chain.width_at(cut), dtype=chain.dtype_at(cut))
    for row, length in enumerate(LENGTHS):
        alone = chain.skeleton(ids[row : row + 1, :length])
        with torch.inference_mode():
            below = run_layers(chain, range(cut), alone.embedded, alone.calls)
        hidden[row, :length] = below[0].clone()
    fresh = chain.skeleton(ids, embed=False)
    rows, targets = rows_and_targets(ids)
    out = run_layers(chain, range(cut, depth), hidden, fresh.calls).flatten(0, 1)[rows]
    loss = F.cross_entropy(chain.tail(out[None])[0], targets)
    named = dict(model.named_parameters())
    return gradients(loss, [named[name] for name in trained])


def gradients(loss: torch.Tensor, parameters: list[Any]) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def errors(model: Any, trained: list[str]) -> tuple[float, float]:
    """The error of the chain's gradients and of plain fp32's against float64, each relative to its norm."""
    model.config.get_text_config(decoder=True)._experts_implementation = "eager"  # the only one in float64
    exact = plain_gradients(copy.deepcopy(model).double(), trained)
    norm = sum(g.norm() ** 2 for g in exact) ** 0.5

    def error(found: list[torch.Tensor]) -> float:
        return (sum((f - e).norm() ** 2 for f, e in zip(found, exact, strict=True)) ** 0.5 / norm).item()

    return error(chain_gradients(model, trained)), error(plain_gradients(model, trained))


def examine(name: str) -> Row:
    notes = []
    try:
        model = tiny_model(name)
    except Exception as error:
        notes.append(f"its text decoder alone; the whole: {type(error).__name__}: {str(error).strip()[:60]}")
        try:
            model = tiny_model(name, whole=False)
        except Exception:
            return Row(name, "not built", reason=f"{type(error).__name__}: {error}"[:200])
    try:
        chain = Chain(model)
        wanted = max(len(chain.layers) - 2, 1)
        cut, why = chain.lowest_cut(wanted)
        trained = list(freeze(model, f"top.{len(chain.layers) - cut},norm"))
        forward = max(verify_chain(model, *batch(padding)) for padding in ("right", "left"))
        ours, theirs = errors(model, trained)
        weights = reading(model)
    except (ChainError, UsageError) as error:
        holds = "cannot be run" not in error.problem or wants_more_than_tokens(model)
        return Row(name, "refused" if holds else "not run", reason=error.problem)
    except Exception as error:
        return Row(name, "not run", reason=f"{type(error).__name__}: {error}"[:200])
    exact = forward == 0 and ours <= 2 * theirs + 2**-23
    lowest = f"{cut} of {len(chain.layers)}" if why else "any"
    notes += [why] if why else []
    notes += ["embeddings are looked up for the top"] if chain.calls_need_embeddings else []
    return Row(
        name, "supported" if exact and not weights.startswith("not") else "differs", f"{forward:.1g}",
        f"{ours:.1e} ({theirs:.1e})", weights, lowest, "; ".join(notes),
    )  # fmt: skip


def reading(model: Any) -> str:
    """Whether the model's weights, saved in bf16, are read as Transformers loads them."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.to(torch.bfloat16).save_pretrained(folder)
            AutoModelForCausalLM.from_pretrained(folder)
        except Exception as error:  # a decoder that is a part of something else
            return f"({type(error).__name__} in Transformers)"
        return "not equal" if loaded_differently(Path(folder), torch.bfloat16) else "equal"


def wants_more_than_tokens(model: Any) -> bool:
    """Whether the model's own forward turns tokens alone down, by its own check of its arguments."""
    try:
        model(input_ids=batch("right")[0])
    except ValueError:
        return True
    except Exception:
        return False
    return False


def child(name: str, pipe: Any) -> None:
    """In a process of its own, so that a model built too large ends there."""
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    try:
        pipe.send(examine(name))
    except BaseException as error:
        pipe.send(Row(name, "not run", reason=f"{type(error).__name__}: {error}"[:200]))


def survey(name: str, context: Any) -> Row:
    here, there = context.Pipe()
    process = context.Process(target=child, args=(name, there))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(SECONDS) else Row(name, "not run", reason=f"more than {SECONDS} s")
    except EOFError:
        return Row(name, "not run", reason="its process died")
    finally:
        process.kill()
        process.join()


def page(rows: list[Row]) -> str:
    counts = Counter(row.state for row in rows)
    lines = [
        "# Supported models",
        "",
        f"Written by `{COMMAND}`. Transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, fp32, eager attention, on a CPU. Every causal-LM name of "
        f"Transformers as a tiny random model: **{counts['supported']}** of {len(rows)} supported, "
        f"**{counts['refused']}** refused by name, **{counts['differs']}** differ, "
        f"{counts['not built']} not built, {counts['not run']} not run.",
        "",
        "*forward*: the largest difference between the model's own forward and the chain: every layer with "
        "the arguments of a fresh skeleton, in order and in reverse, and the tail; padded right and left; 0 "
        "is exact. *gradient*: of all trained parameters from the cut, the relative error against float64, "
        "and in brackets that of plain PyTorch in fp32; at most twice that. *weights*: whether every tensor "
        "and buffer, read block by block from a saved bf16 checkpoint, is what `from_pretrained` loads. "
        "*lowest cut*: where layers share state, the cut moves below it (asked for: the top two).",
        "",
        "| name | result | forward | gradient | weights | lowest cut | reason |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reason = row.reason.replace("|", "\\|").replace("\n", " ")
        lines.append(
            f"| {row.name} | {row.state} | {row.forward} | {row.gradient} | {row.weights} | {row.lowest} "
            f"| {reason} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    warnings.filterwarnings("ignore")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    transformers.logging.set_verbosity_error()
    names, rows = sys.argv[1:] or list(NAMES), []
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    for name in names:
        rows.append(survey(name, context))
        row = rows[-1]
        print(
            f"{name:26} {row.state:10} {row.forward} {row.gradient} {row.weights} {row.lowest} {row.reason}",
            flush=True,
        )
    print(Counter(row.state for row in rows))
    if names == list(NAMES):
        PAGE.write_text(page(rows), encoding="utf-8")
    return int(any(row.state == "differs" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
