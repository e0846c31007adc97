"""python3 dev.py bench trunk [DTYPE] [TOKENS] [LAYERS] [FOLDER]: the streamed trunk at Qwen2.5-7B's shape.

Random weights in files (17.4 GB for 32 layers, made once in FOLDER, default: a temporary one that is
removed), read cold, under a hard limit on private memory. Each measurement is a process of its own: a pass
over LAYERS layers (28), then over 8, 16 and 32 layers with at least 1,024 tokens, whose peaks must be equal.
DTYPE is bf16, or fp32 where the processor has no bf16 instructions. Nothing else may run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import best_seconds, record
from transformers import Qwen2Config

from talik.base.events import silent
from talik.base.files import need_room, write_json
from talik.base.system import drop_pages
from talik.data.examples import Example, Span
from talik.data.reading.rows import Place
from talik.kernels.bf16_matmul import bf16_as_fp32
from talik.machine.peak_memory import PeakMemory
from talik.model.folder import ModelFolder
from talik.model.weights.hollow import hollow_model
from talik.model.weights.safetensors_file import read_tables, write_tensors
from talik.plan.ways import choose
from talik.recipe.recipe import Recipe
from talik.training.loading import open_run_model
from talik.training.trunk.cache import groups_of, open_cache
from talik.training.trunk.trunk import TrunkInput, trunk_pass

SHAPE = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MOST = 32  # layers
MULTIPLIES = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944  # weights of one layer that multiply
LIMIT = {"bf16": 2.5, "fp32": 5.0}  # GiB of anonymous memory
LENGTHS = (128, 256, 512, 1024, 2048)


def make_weights(folder: Path) -> None:
    """A file for the embeddings, one for each layer, one for the tail, under the names that Qwen2 has."""
    config = Qwen2Config(**SHAPE, num_hidden_layers=MOST)
    config.save_pretrained(folder)
    names: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, tensor in hollow_model(folder, torch.bfloat16).state_dict().items():
        part = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        names.setdefault(part, []).append((name, tuple(tensor.shape)))
    need_room(folder, 18 << 30, "the weights")
    noise = torch.randn(16 << 20).mul_(0.02).to(torch.bfloat16)
    for part, tensors in names.items():
        with (folder / f"{part}.safetensors").open("wb") as file:
            write_tensors(file, [(name, torch.bfloat16, shape) for name, shape in tensors])
            for _, shape in tensors:
                left = torch.Size(shape).numel()
                while left:
                    piece = noise[: min(left, noise.numel())]
                    file.write(piece.view(torch.uint8).numpy())
                    left -= piece.numel()
            os.fsync(file.fileno())
    write_json(folder / "parts.json", {part: [name for name, _ in of] for part, of in names.items()})


def model_of(folder: Path, layers: int) -> Path:
    """The same files as a model of fewer layers."""
    own = folder / f"layers-{layers}"
    if not own.exists():
        own.mkdir()
        Qwen2Config(**SHAPE, num_hidden_layers=layers).save_pretrained(own)
        parts = json.loads((folder / "parts.json").read_text(encoding="utf-8"))
        used = {part: of for part, of in parts.items() if not part.isdigit() or int(part) < layers}
        for part in used:
            os.link(folder / f"{part}.safetensors", own / f"{part}.safetensors")
        weight_map = {name: f"{part}.safetensors" for part, of in used.items() for name in of}
        write_json(own / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return own


def made_examples(tokens: int) -> list[Example]:
    """About as many tokens in examples of each length that is short beside `tokens`."""
    made, lengths = [], [length for length in LENGTHS if length <= tokens // 8]
    for length in lengths:
        for _ in range(max(1, tokens // len(lengths) // length)):
            ids = array("i", torch.randint(0, SHAPE["vocab_size"], (length,)).tolist())
            made.append(Example(ids, (Span(0, length, True),), Place("made", len(made) + 1)))
    return made


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the layer's largest product, as the trunk does it: 2,048 tokens through up_proj."""
    tokens, weight = torch.randn(2048, 3584).to(dtype), torch.randn(18944, 3584).to(dtype)
    return 2 * 2048 * 3584 * 18944 / best_seconds(lambda: F.linear(tokens, weight), 2)


def measure(folder: str, layers: str, tokens: str, dtype: str) -> None:
    """In a process of its own, under the limit: one pass; prints a line of JSON."""
    torch.manual_seed(0)
    model = model_of(Path(folder), int(layers))
    recipe = Recipe.model_validate(
        {"model": "-", "data": "-", "precision": dtype, "thaw": "norm,head", "trunk": "streamed"}
    )
    plan = choose(recipe, ModelFolder(model))
    loaded = open_run_model(recipe, plan, ModelFolder(model))
    examples = made_examples(int(tokens))
    groups = groups_of(examples, plan.trunk_batch_tokens)
    for table in read_tables(model).values():
        for entry in table.values():
            with entry.file.open("rb") as file:
                drop_pages(file.fileno(), 0, 0)
    traffic = loaded.store.traffic
    with tempfile.TemporaryDirectory(dir=folder) as root, PeakMemory(torch.device("cpu"), 0.01) as peak:
        width, kept = loaded.chain.width_at(plan.cut), loaded.chain.dtype_at(plan.cut)
        cache = open_cache(Path(root), {}, width, kept)
        peak.take()
        start = time.perf_counter()
        with bf16_as_fp32(), loaded.trunk() as store, cache.writing():
            work = [TrunkInput(group, examples) for group in groups]
            trunk_pass(loaded.chain, plan, work, store, cache, silent)
        seconds, most = time.perf_counter() - start, peak.take()
    done = sum(group.tokens for group in groups)
    print(
        json.dumps(
            {
                "layers": plan.cut,
                "tokens": done,
                "seconds": seconds,
                "flops": 2 * MULTIPLIES * plan.cut * done / seconds,
                "waited_share": traffic.waited / seconds,
                "gigabytes_read": traffic.bytes / 1e9,
                "peak_gib": most / 2**30,
            }
        )
    )


def limited(limit: float, *arguments: object) -> dict[str, Any]:
    """`measure` in a child that may have so many GiB of private memory (RLIMIT_DATA)."""

    def limit_data() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 2**30),) * 2)

    small = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # what is freed goes back
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *map(str, arguments)],
        env=os.environ | small,
        preexec_fn=limit_data,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(dtype: str = "bf16", tokens: str = "16384", layers: str = "28", folder: str | None = None) -> None:
    place = Path(folder) if folder else Path(tempfile.mkdtemp(prefix="talik-trunk-"))
    place.mkdir(exist_ok=True)
    try:
        if not (place / "parts.json").exists():
            make_weights(place)
        kind = torch.float32 if dtype == "fp32" else torch.bfloat16
        before = product_rate(kind)
        whole = limited(LIMIT[dtype], place, layers, tokens, dtype)
        rate = max(before, product_rate(kind))
        depths = [limited(LIMIT[dtype], place, n, max(1024, int(tokens) // 16), dtype) for n in (8, 16, 32)]
        peaks = [depth["peak_gib"] for depth in depths]
        record(
            f"trunk-{dtype}",
            {
                "what": f"Qwen2.5-7B's shape, random weights, trunk streamed from files, {dtype}",
                "limit_gib": LIMIT[dtype],
                "matrix_product_gflops": rate / 1e9,
                "share_of_rate": whole["flops"] / rate,
                **whole,
                "depths": depths,
                "peak_spread": max(peaks) / min(peaks) - 1,
            },
        )
    finally:
        if folder is None:
            shutil.rmtree(place)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
