"""The same fine-tuning by Talik, by Transformers' Trainer and by TRL's SFTTrainer: one contestant a process.

    python contestants.py NAME JOB.json

For `bench versus`, which writes the job and reads what the contestant leaves in its file `result`. Everything
below the top is frozen, embeddings too. Trainer and SFTTrainer get the tokens and labels that Talik makes of
the rows, so that all of them train the same tokens; they hold fp32 weights and compute in bf16 by autocast,
as people run them. TRL is in an environment of its own, where of Talik only `machine` is used, which measures
memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from talik import SETTLED
from talik.machine.peak_memory import PeakMemory


def talik(job: dict[str, Any], phase: Callable[[str], None]) -> dict[str, Any]:
    """Its own defaults: a checkpoint at the end of every epoch, and an export that is verified."""
    import talik
    from talik.base.events import Status, StepDone

    at: dict[str, float] = {}
    steps: list[StepDone] = []

    def note(event: Any) -> None:
        if isinstance(event, Status):
            at[event.topic] = time.perf_counter()
        elif isinstance(event, StepDone):
            steps.append(event)

    recipe = talik.Recipe(
        model=job["model"],
        data=job["rows"],
        **{
            name: job[name] for name in ("precision", "epochs", "top_layers", "batch_tokens", "learning_rate")
        },
    )
    phase("train")
    start = time.perf_counter()
    done = talik.train(recipe, Path(job["folder"]) / "run", notify=note)
    all_seconds = time.perf_counter() - start
    phase("save")
    talik.export(Path(job["folder"]) / "run", job["out"])
    by_epoch: list[list[tuple[float, int]]] = [[] for _ in range(job["epochs"])]
    for step in steps:
        by_epoch[step.epoch].append((step.loss, step.trained_tokens))
    in_steps, in_trunk = sum(step.seconds for step in steps), at["trunk"] - at["chain"]
    return {
        "training_seconds": done.seconds,
        "parts": {
            "data, plan, digests": all_seconds - done.seconds,
            "trunk": in_trunk,
            "steps": in_steps,
            "loading, check, checkpoints": done.seconds - in_steps - in_trunk,
        },
        "steps": done.steps,
        "losses": [mean_loss(epoch) for epoch in by_epoch],
    }


def trainer(job: dict[str, Any], phase: Callable[[str], None]) -> dict[str, Any]:
    """Transformers' Trainer."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    made = Trainer(
        model=frozen_model(job),
        args=TrainingArguments(**arguments(job)),
        train_dataset=examples(job),  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    return carry_out(made, job, phase)


def trl(job: dict[str, Any], phase: Callable[[str], None]) -> dict[str, Any]:
    """TRL's SFTTrainer with its own loss in chunks, and without the checkpointing that is on by default.

    That would compute every layer twice, and put the frozen ones back into the graph.
    """
    return sft(job, phase, gradient_checkpointing=False)


def trl_defaults(job: dict[str, Any], phase: Callable[[str], None]) -> dict[str, Any]:
    """TRL's SFTTrainer as it comes."""
    return sft(job, phase)


def sft(job: dict[str, Any], phase: Callable[[str], None], **options: Any) -> dict[str, Any]:
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    made = SFTTrainer(
        model=frozen_model(job),
        args=SFTConfig(**arguments(job), **options),
        train_dataset=Dataset.from_list(examples(job)),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    return carry_out(made, job, phase)


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Talik's defaults as TrainingArguments; nothing is saved on the way."""
    return {
        "output_dir": str(Path(job["folder"]) / "trainer"),
        "num_train_epochs": job["epochs"],
        "per_device_train_batch_size": job["batch_size"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.01,
        "bf16": job["precision"] == "bf16",
        "use_cpu": not torch.accelerator.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def examples(job: dict[str, Any]) -> list[dict[str, list[int]]]:
    return [json.loads(line) for line in Path(job["examples"]).read_text(encoding="utf-8").splitlines()]


def frozen_model(job: dict[str, Any]) -> Any:
    """The model in fp32; nothing but its last layers and the final norm requires a gradient."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model.requires_grad_(False)
    for module in (*model.model.layers[-job["top_layers"] :], model.model.norm):
        module.requires_grad_(True)
    return model


def carry_out(made: Any, job: dict[str, Any], phase: Callable[[str], None]) -> dict[str, Any]:
    """Trains and saves; the trained tokens of every step are counted as its batch is made."""
    counts: list[int] = []
    collate = made.data_collator

    def counted(rows: Any) -> Any:
        batch = collate(rows)
        counts.append(int((batch["labels"][:, 1:] != -100).sum()))
        return batch

    made.data_collator = counted
    phase("train")
    start = time.perf_counter()
    made.train()
    seconds = time.perf_counter() - start
    phase("save")
    made.save_model(job["out"])
    losses = [line["loss"] for line in made.state.log_history if "grad_norm" in line]
    steps = list(zip(losses, counts, strict=True))
    size = len(steps) // job["epochs"]
    return {
        "training_seconds": seconds,
        "steps": len(steps),
        "losses": [mean_loss(steps[i * size : (i + 1) * size]) for i in range(job["epochs"])],
    }


def mean_loss(steps: list[tuple[float, int]]) -> float:
    """Over all trained tokens of some steps, each given by its mean loss and its trained tokens."""
    return sum(loss * count for loss, count in steps) / sum(count for _, count in steps)


CONTESTANTS = {"talik": talik, "trainer": trainer, "trl": trl, "trl-defaults": trl_defaults}


def main(name: str, file: str) -> None:
    if name != "talik":  # as its users run it: without what importing talik sets
        for setting in SETTLED:
            os.environ.pop(setting, None)
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    with PeakMemory(torch.device("cpu")) as peak:
        peak.phase("load")
        result = CONTESTANTS[name](job, peak.phase)
    Path(job["result"]).write_text(json.dumps({**result, "peak_bytes": peak.phases}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
