"""A small training problem, and the same problem in plain PyTorch."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from talik.base.events import silent
from talik.data.batches import collate
from talik.data.examples import Example, Span
from talik.data.reading.rows import Place
from talik.model.chain.chain import Chain, run_layers
from talik.model.folder import ModelFolder
from talik.model.freeze import freeze
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.recipe.thaw import parse_thaw
from talik.training.loading import RunModel, open_run_model
from talik.training.memory.keys import gradient
from talik.training.memory.scratch import MemoryScratch
from talik.training.memory.store import ResidentStore
from talik.training.run.evaluation import evaluate_top
from talik.training.run.feed import run_step
from talik.training.run.loop import ScalarMonitor
from talik.training.step.loss import trained_positions
from talik.training.step.step import forward_backward, prepare_top
from talik.training.step.top import MicroBatch, Top, World, make_top
from talik.training.trunk.trunk import trunk_states

Trained = tuple[dict[str, torch.Tensor], list[float]]


def make_examples(lengths: tuple[int, ...] = (9, 14, 14, 6, 11, 20), seed: int = 0) -> list[Example]:
    """Random tokens; the last half of each example is trained."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, length in enumerate(lengths):
        ids = array("i", torch.randint(3, 380, (length,), generator=generator).tolist())
        spans = (Span(0, length // 2, False), Span(length // 2, length, True))
        made.append(Example(ids, spans, Place("made.jsonl", number + 1)))
    return made


def make_plan(of: Top, /, **changes: Any) -> Plan:
    fields = {
        "device": "cpu",
        "threads": 1,
        "cut": of.cut,
        "layers": len(of.chain.layers),
        "trunk": "resident",
        "top": "resident",
        "cache": "disk",
        "trunk_batch_tokens": 64,
        "hidden_bytes": 1 << 30,
        "micro_batch_tokens": 40,
        "loss_chunk": 7,
        "recompute": False,
    }
    return Plan.model_validate({**fields, **changes})


def make_recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({"model": "-", "data": "-", "thaw": "top.2,norm", **changes})


def load_from(model: Any, folder: Path, *, thaw: str = "top.2,norm", **changes: Any) -> RunModel:
    """Saves a model and opens it as a run does: `thaw` is trained, and the trunk is streamed."""
    model.save_pretrained(folder)
    precision = "fp32" if model.dtype == torch.float32 else "bf16"
    recipe = make_recipe(precision=precision, thaw=thaw)
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    plan = make_plan(top_at(Chain(model), parse_thaw(thaw, count).cut), **{"trunk": "streamed", **changes})
    return open_run_model(recipe, plan, ModelFolder(folder))


def top_at(chain: Chain, cut: int) -> Top:
    """A top with this cut and no blocks."""
    return Top(chain, cut, {})


def freeze_top(model: Any, thaw: str = "top.2,norm") -> Top:
    trained = freeze(model, thaw)
    return make_top(Chain(model), trained)


def run_trunk(chain: Chain, cut: int, input_ids: torch.Tensor) -> torch.Tensor:
    """The hidden states at the cut for unpadded examples."""
    skeleton = chain.skeleton(input_ids)
    with torch.inference_mode():
        return run_layers(chain, range(cut), skeleton.embedded, skeleton.calls)


def micro_batch(top: Top, examples: list[Example]) -> MicroBatch:
    """A padded micro-batch; the trunk ran over each example alone, without padding."""
    batch = collate(examples, pad_id=0)
    width, dtype = top.chain.width_at(top.cut), top.chain.dtype_at(top.cut)
    hidden = torch.zeros(*batch["input_ids"].shape, width, dtype=dtype)
    for row, example in zip(hidden, examples, strict=True):
        row[: example.length] = run_trunk(top.chain, top.cut, torch.tensor([list(example.input_ids)]))[0]
    return MicroBatch(batch["input_ids"], hidden, *trained_positions(batch["labels"]))


def plain_loss(model: Any, examples: list[Example], count: int) -> torch.Tensor:
    """The usual loss: the whole model on padded batches, cross-entropy over shifted labels."""
    batch = collate(examples, pad_id=0)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    wanted = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat = logits[:, :-1].flatten(0, 1).to(wanted)
    return F.cross_entropy(flat, batch["labels"][:, 1:].flatten(), reduction="sum") / count


def gradients(top: Top, examples: list[Example], groups: list[list[int]]) -> tuple[float, dict[str, Any]]:
    """Talik's loss and the gradient of every trained parameter, over micro-batches of these examples."""
    scratch = MemoryScratch(torch.device("cpu"))
    for name, parameter in top.parameters():
        scratch.zeros(gradient(name), parameter.shape, torch.float32)
    batches = [micro_batch(top, [examples[i] for i in group]) for group in groups]
    count = sum(len(batch.targets) for batch in batches)
    world = World(ResidentStore(), scratch, ScalarMonitor())
    loss = forward_backward(top, batches, world, make_plan(top), count)
    return loss.item(), {name: scratch[gradient(name)] for name, _ in top.parameters()}


def step_of_all(
    loaded: RunModel, top: Top, examples: list[Example], states: Any, world: World, recipe: Any, *, step: int
) -> list[MicroBatch]:
    """One step over all examples."""
    return run_step(
        top=top,
        examples=examples,
        indices=range(len(examples)),
        states=states,
        world=world,
        recipe=recipe,
        plan=loaded.plan,
        step=step,
        learning_rate=0.01,
    )


def plain_gradients(model: Any, examples: list[Example]) -> tuple[float, dict[str, Any]]:
    """The same in plain PyTorch: one padded batch through the whole model."""
    model.zero_grad()
    count = sum(e.trained_tokens for e in examples)
    loss = plain_loss(model, examples, count)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def trained(model: Any, folder: Path, recipe: Any, *, steps: int = 2, **plan: Any) -> Trained:
    """The trained weights after a few steps; loss and norm of each step, then the loss of an evaluation."""
    examples = make_examples((9, 14, 14, 6, 11, 20))
    loaded = load_from(model, folder / "model", thaw=recipe.thaw, **plan)
    recipe = recipe.model_copy(update={"cache": str(folder / "cache")})
    numbers: list[float] = []
    with trunk_states(loaded, [examples], recipe, silent) as [states]:
        top = loaded.top()
        with loaded.working(top, folder / "work") as scratch:
            prepare_top(top, recipe, loaded.store, scratch)
            for step in range(1, steps + 1):
                monitor = ScalarMonitor()
                world = World(loaded.store, scratch, monitor)
                step_of_all(loaded, top, examples, states, world, recipe, step=step)
                numbers += [monitor.read("loss"), monitor.read("grad_norm")]
            numbers.append(evaluate_top(top, examples, states, loaded.plan, loaded.store).loss)
            found = {}
            for block in top.blocks:
                loaded.store.get(block)
                found |= {name: own.detach().clone() for name, own in top.of(block)}
                loaded.store.release(block)
        assert not (folder / "work").exists()
    return found, numbers


def assert_same(one: Trained, other: Trained) -> None:
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name
