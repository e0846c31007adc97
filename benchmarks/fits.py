"""What fits on which machine: `talik plan` for well-known models on described GPUs and CPUs.

    python3 dev.py bench fits [--only MODEL] [--jobs N]
    python3 dev.py bench fits --tables                    the tables of results/fits.json once more

Each model is a folder with its published config.json and no weights. A plan without data is for one step of
four examples of 1,024 tokens, half of them trained. Machines are described in full: nothing is measured
here, and no GPU is needed. The tables go to stderr, for people; results/fits.json has every plan.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import init_empty_weights
from common import RESULTS, record
from transformers import AutoConfig, AutoModelForCausalLM

from talik.cli import main as talik

GIB = 1 << 30
LENGTH, BATCH_TOKENS = 1024, 4096  # tokens; the recipe's defaults are 2048 and 4096

# Billions of parameters, and the published config.json without what only concerns generation. A config that
# was copied wrongly has another count.
QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MODELS: dict[str, tuple[float, dict[str, Any]]] = {
    "Qwen2.5-7B-Instruct": (
        7.62,
        {
            **QWEN2,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
    ),
    "Llama-3.1-8B": (
        8.03,
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        },
    ),
    "Qwen3-8B": (
        8.19,
        {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": 151936,
            "hidden_size": 4096,
            "head_dim": 128,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 40960,
            "rope_theta": 1000000,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        },
    ),
    "Gemma-3-12B (text)": (
        11.77,  # 12.19 with the part that sees
        {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "vocab_size": 262208,
            "hidden_size": 3840,
            "head_dim": 256,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
            "sliding_window_pattern": 6,
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        },
    ),
    "Qwen2.5-32B-Instruct": (
        32.76,
        {
            **QWEN2,
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
    ),
}

# What is trained, the most parameters last. AdamW's state for everything takes hundreds of GB of disk.
THINGS = {
    "LoRA of all layers": ["--thaw", "all", "--lora", "rank=16"],
    "top 5 layers": ["--top-layers", "5"],
    "everything": [
        *("--thaw", "all", "--precision", "bf16-sr"),
        *("--optimizer", "adafactor", "--clip", "last"),
    ],
}

DISK = {"disk_free": "1 TiB"}
DISK_RATES = {"disk_read": "2 GB/s", "disk_write": "1 GB/s"}
# SMs and boost clock of NVIDIA's product page: 24 x 2.46 GHz x 512 FLOP a clock and SM; half of it in fp32.
RTX_4060 = {
    "matmul": {"fp32": 15.1e12, "bf16": 30.2e12},
    "copy": "272 GB/s",
    "to_device": "16 GB/s",
}


def gpu(processor: str, memory: str, ram: str, rates: dict[str, Any] | None = None) -> dict[str, Any]:
    """A description of a GPU, its RAM and its disk, as `--machine` takes it."""
    return {
        "device": "cuda",
        "processor": processor,
        "memory": memory,
        "ram": ram,
        "compute_capability": [8, 9],
        **DISK,
        "rates": {**(rates or {}), **DISK_RATES},
    }


def cpu(memory: str) -> dict[str, Any]:
    """A description of a machine without a GPU, as `--machine` takes it."""
    return {"device": "cpu", "threads": 8, "memory": memory, **DISK, "rates": DISK_RATES}


MACHINES = {
    "8 GB GPU": gpu("RTX 4060", "8188 MiB", "32 GiB", RTX_4060),
    "16 GB GPU": gpu("RTX 4060 Ti 16GB", "16380 MiB", "32 GiB"),
    "24 GB GPU": gpu("RTX 4090", "24564 MiB", "64 GiB"),
    "8 GiB RAM, no GPU": cpu("8 GiB"),
    "16 GiB RAM, no GPU": cpu("16 GiB"),
    "24 GiB RAM, no GPU": cpu("24 GiB"),
}
ASSUMED = (
    f"Steps of {BATCH_TOKENS:,} tokens in examples of {LENGTH:,}, half of them trained; bf16. GPUs: RTX 4060 "
    "and RTX 4060 Ti with 32 GiB of RAM, RTX 4090 with 64 GiB. 1 GiB of each memory is taken by other "
    "programs."
)
NOT_COMPARED = (
    "Plans for GPUs are computed from the sources of PyTorch and have not been compared with a device yet; "
    "those for CPUs have (benchmarks/results/plan.json, limits.json, seven-billion.json)."
)
DISK_AND_TIME = (
    "Disk: at most three checkpoints, the working copy and what is kept out of memory, without the cache of "
    "the trunk's results. Step: an estimate from peak rates (GPUs: the makers'; CPUs: 8 threads of 50 "
    "GFLOP/s) and a disk that reads 2 GB/s and writes 1 GB/s. Where a step waits for weights, one with more "
    "tokens takes less time per token."
)
TRAINED = (
    "Peaks in italics: the trained layers are streamed. LoRA of rank 16 and the top 5 layers: AdamW, fp32 "
    "masters. Everything: Adafactor, bf16 with stochastic rounding, --clip last."
)


def parameters(folder: Path) -> int:
    """Parameters of a model, which is made without memory for them; tied ones count once."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.tie_weights()
    return sum(weight.numel() for weight in model.parameters())


def plans(folder: Path, machines: Path) -> dict[str, Any]:
    """Every plan of one model: for each machine each thing to train."""
    found: list[dict[str, Any]] = []
    for machine in MACHINES:
        for thing, options in THINGS.items():
            print(f"{folder.name}: {machine}, {thing}", file=sys.stderr)
            given = [*options, "--machine", str(machines / f"{machine}.yaml"), "--json"]
            given += ["--max-length", str(LENGTH), "--batch-tokens", str(BATCH_TOKENS)]
            start, out = time.perf_counter(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as said:
                code = talik(["plan", str(folder), *given])
            if code not in (0, 3):
                raise RuntimeError(f"talik plan ended with {code}: {said.getvalue()}")
            seconds = time.perf_counter() - start
            row = {"machine": machine, "thing": thing, **short(json.loads(out.getvalue()))}
            found.append({**row, "planned_in_seconds": round(seconds, 1)})
    return {"parameters": parameters(folder), "plans": found}


def short(plan: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a plan: sizes in bytes, times in seconds; of one that does not fit, what would help."""
    kept = {name: plan[name] for name in ("fits", "budget_bytes", "peak_bytes", "slack_bytes", "disk_bytes")}
    if plan["fits"]:
        return {**kept, "way": way(plan["chosen"]), "step_seconds": plan["seconds"]["epoch"]}
    broken = plan["breaks"]
    where = " ".join(broken[name] for name in ("phase", "block") if broken[name]) if broken else None
    return {
        **kept,
        "breaks_in": where,
        "would_fit": {change["options"]: change["peak_bytes"] for change in plan["changes"]},
    }


def way(chosen: dict[str, Any]) -> str:
    """How a run is carried out, in a few words."""
    trained = "streamed" if chosen["top"] == "streamed" else "resident"
    places = {"memory": "in memory", "ram": "in RAM", "disk": "on disk"}
    words = [f"trained layers {trained}", f"optimizer state {places[chosen['state']]}"]
    if chosen["recompute"] and chosen["top"] == "resident":
        words.append("layers recomputed")
    return ", ".join([*words, f"micro-batches of {chosen['micro_batch_tokens']:,} tokens"])


def largest_table(found: dict[str, Any]) -> str:
    """Of each model and machine the largest thing to train that fits, with its promised peak."""
    lines = [f"| model | {' | '.join(MACHINES)} |", "|---" * (1 + len(MACHINES)) + "|"]
    for model, of in found.items():
        cells = [
            largest([plan for plan in of["plans"] if plan["machine"] == machine]) for machine in MACHINES
        ]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def largest(of_machine: list[dict[str, Any]]) -> str:
    """As in "top 5: 5.9 GiB"; THINGS are in the order of how much they train."""
    fitting = [plan for plan in of_machine if plan["fits"]]
    return f"{fitting[-1]['thing']}: {size(device_peak(fitting[-1]))}" if fitting else "nothing"


def peaks_table(found: dict[str, Any]) -> str:
    """Promised peaks of each thing to train, on each machine; of plans that stream, in italics."""
    lines = [f"| model | trained | {' | '.join(MACHINES)} |", "|---" * (2 + len(MACHINES)) + "|"]
    for model, of in found.items():
        for thing in THINGS:
            cells = [peak(plan) for plan in of["plans"] if plan["thing"] == thing]
            lines.append(f"| {model} | {thing} | {' | '.join(cells)} |")
    return "\n".join(lines)


def peak(plan: dict[str, Any]) -> str:
    """As in "5.9 GiB", in italics where the trained layers are streamed."""
    if not plan["fits"]:
        return "does not fit"
    shown = size(device_peak(plan))
    return f"*{shown}*" if "layers streamed" in plan["way"] else shown


def whole_table(found: dict[str, Any]) -> str:
    """Every plan in a line."""
    lines = ["| model | machine | trained | peak | RAM | disk | step | how |", "|---" * 8 + "|"]
    for model, of in found.items():
        for plan in of["plans"]:
            if plan["fits"]:
                spent, how = time_of(plan["step_seconds"]), plan["way"]
            else:
                change = next(iter(plan["would_fit"]), "")
                spent, how = "", f"would fit with {change}" if change else ""
            ram = size(plan["peak_bytes"]["ram"]) if "cuda" in plan["peak_bytes"] else ""
            disk = size(plan["disk_bytes"])
            cells = (model, plan["machine"], plan["thing"], peak(plan), ram, disk, spent, how)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def device_peak(plan: dict[str, Any]) -> int:
    """Bytes of the GPU's memory, or of the RAM where there is no GPU."""
    return plan["peak_bytes"].get("cuda", plan["peak_bytes"]["ram"])


def size(number: int) -> str:
    return f"{number / GIB:.1f} GiB" if number < 100 * GIB else f"{number / GIB:,.0f} GiB"


def time_of(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def child(model: str, place: Path) -> dict[str, Any]:
    """All plans of one model, in a process of its own."""
    command = [sys.executable, __file__, "--child", str(place / model), str(place)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(only: list[str], jobs: int) -> None:
    start = time.perf_counter()
    names = [name for name in MODELS if not only or name in only]
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(jobs) as pool:
        place = Path(made)
        for name, fields in MACHINES.items():
            (place / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **fields}), encoding="utf-8")
        for name in names:
            (place / name).mkdir()
            (place / name / "config.json").write_text(json.dumps(MODELS[name][1]), encoding="utf-8")
        by_size = sorted(names, key=lambda name: -MODELS[name][0])  # the longest first
        done = dict(zip(by_size, pool.map(lambda name: child(name, place), by_size), strict=True))
    found = {name: done[name] for name in names}
    for name in names:
        billions = found[name]["parameters"] / 1e9
        if abs(billions - MODELS[name][0]) > 0.01:
            raise ValueError(f"{name} has {billions:.2f} billion parameters, and not {MODELS[name][0]}")
    if not only:
        said = {"assumed": ASSUMED, "devices": NOT_COMPARED, "disk and time": DISK_AND_TIME}
        values = {**said, "machines": MACHINES, "options": THINGS}
        record("fits", {**values, "seconds": round(time.perf_counter() - start), "models": found})
    show(found)


def show(found: dict[str, Any]) -> None:
    """Prints the tables, and what they take for granted."""
    tables = largest_table(found), peaks_table(found), whole_table(found)
    print("\n\n".join((*tables, TRAINED, ASSUMED, NOT_COMPARED, DISK_AND_TIME)), file=sys.stderr)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--child"]:
        of_model, beside = Path(sys.argv[2]), Path(sys.argv[3])
        print(json.dumps(plans(of_model, beside)))
    else:
        parser = argparse.ArgumentParser("dev.py bench fits")
        parser.add_argument("--only", action="append", choices=list(MODELS), default=[])
        parser.add_argument("--jobs", type=int, default=2, help="models that are planned at once")
        parser.add_argument("--tables", action="store_true", help="show the recorded results")
        given = parser.parse_args()
        if given.tables:
            show(json.loads((RESULTS / "fits.json").read_text(encoding="utf-8"))["models"])
        else:
            main(given.only, given.jobs)
