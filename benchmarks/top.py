"""python3 dev.py bench top [fp32|bf16]: trunk and step at SmolLM2-135M's shape against the machine's limit.

Random weights. Prints tokens a second, floating-point operations a second, and their share of the rate that
this machine multiplies matrices of the same precision with, measured in the same run; the same step by plain
Transformers (whole model, frozen below, padded batch, full logits) beside it. Nothing else may run.
"""

from __future__ import annotations

import random
import sys
import tempfile
from array import array
from pathlib import Path

import torch
import torch.nn.functional as F
from common import best_seconds, record
from transformers import AutoModelForCausalLM, LlamaConfig

from talik.data.batches import collate, equal_length_groups, micro_batches
from talik.data.examples import Example, Span
from talik.data.reading.rows import Place
from talik.kernels.bf16_matmul import bf16_as_fp32
from talik.machine.rates import matmul_rate
from talik.model.chain.chain import Chain, run_layers
from talik.model.folder import ModelFolder
from talik.model.freeze import freeze
from talik.plan.ways import choose
from talik.recipe.recipe import Recipe
from talik.training.memory.scratch import MemoryScratch
from talik.training.memory.store import ResidentStore
from talik.training.step.loss import trained_positions
from talik.training.step.step import train_step
from talik.training.step.top import MicroBatch, World, make_top
from talik.training.step.update import prepare

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LAYER = 576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536  # parameters that multiply, of one layer
HEAD = 49152 * 576


class Nobody:
    """A monitor that keeps nothing."""

    def scalar(self, name: str, value: torch.Tensor) -> None:
        pass

    def phase(self, name: str, size: int = 0, /) -> None:
        pass


def made_examples(tokens: int) -> list[Example]:
    """Lengths like short questions and answers, a fifth of the tokens trained."""
    dice, made = random.Random(0), []
    while sum(e.length for e in made) < tokens:
        length = dice.randint(30, 90)
        ids = array("i", [dice.randrange(3, 49000) for _ in range(length)])
        spans = (Span(0, length * 4 // 5, False), Span(length * 4 // 5, length, True))
        made.append(Example(ids, spans, Place("made", len(made) + 1)))
    return made


def run_trunk(chain: Chain, cut: int, input_ids: torch.Tensor) -> torch.Tensor:
    """The hidden states at the cut for unpadded examples."""
    skeleton = chain.skeleton(input_ids)
    with torch.inference_mode():
        return run_layers(chain, range(cut), skeleton.embedded, skeleton.calls)


def main(precision: str = "fp32") -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    recipe = Recipe.model_validate({"model": "-", "data": "-", "precision": precision, "batch_tokens": 1024})
    config = LlamaConfig(**SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        plan = choose(recipe, ModelFolder(Path(folder)))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    trained = freeze(model, "top.5,norm")
    top = make_top(Chain(model), trained)
    examples = made_examples(1024)
    lengths = [e.length for e in examples]
    tokens, rows = sum(lengths), sum(e.trained_tokens for e in examples)
    rate = matmul_rate(dtype, torch.device("cpu"), 1024)

    groups = equal_length_groups(lengths, plan.trunk_batch_tokens)
    inputs = [torch.tensor([list(examples[i].input_ids) for i in group]) for group in groups]
    with bf16_as_fp32():
        trunk = best_seconds(lambda: [run_trunk(top.chain, top.cut, ids) for ids in inputs])

    batches = []
    for group in micro_batches(range(len(examples)), lengths, plan.micro_batch_tokens):
        batch = collate([examples[i] for i in group], 0)
        hidden = torch.randn(*batch["input_ids"].shape, 576).to(dtype)
        batches.append(MicroBatch(batch["input_ids"], hidden, *trained_positions(batch["labels"])))
    world = World(ResidentStore(), MemoryScratch(torch.device("cpu")), Nobody())
    prepare(top.parameters(), recipe, world.scratch)
    with bf16_as_fp32():
        step = best_seconds(lambda: train_step(top, batches, world, recipe, plan, step=1, learning_rate=1e-6))
    whole = collate(examples, 0)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-6, fused=True)

    def plain() -> None:
        logits = model(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), whole["labels"][:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    plain_seconds = best_seconds(plain)
    trunk_operations = 2 * 25 * LAYER * tokens
    step_operations = 6 * 5 * LAYER * tokens + 4 * HEAD * rows
    record(
        f"top-{precision}",
        {
            "what": f"SmolLM2-135M's shape, random weights, {tokens} tokens, {rows} trained, {precision}",
            "matrix_product_gflops": rate / 1e9,
            "trunk_tokens_per_second": tokens / trunk,
            "trunk_share_of_rate": trunk_operations / trunk / rate,
            "step_tokens_per_second": tokens / step,
            "step_share_of_rate": step_operations / step / rate,
            "plain_step_seconds_over_ours": plain_seconds / step,
            "two_epochs_plain_over_ours": 2 * plain_seconds / (trunk + 2 * step),
        },
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
