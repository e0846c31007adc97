"""The time of a run: simulated FLOPs and bytes over the rates of a machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from talik.data.batches import steps_of_epoch
from talik.data.examples import Example
from talik.data.preparing.stored_examples import lengths_of
from talik.machine.machine import Machine
from talik.machine.rates import Rates
from talik.model.block import REST, TAIL, Block
from talik.model.freeze import trained_parameters
from talik.recipe.plan import Plan
from talik.simulate.account import Simulation
from talik.simulate.simulation import Subject, Workload, enough_layers
from talik.training.run.checkpoints import scratch_bytes, state_bytes
from talik.training.step.top import make_top
from talik.training.step.update import needs_global_norm

PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "bf16-sr": "bf16"}


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of the trunk, of one epoch with its evaluations, and of the whole run without its start."""

    trunk: float
    epoch: float
    total: float


def seconds_of(
    result: Simulation,
    subject: Subject,
    plan: Plan,
    work: Workload,
    examples: Sequence[Example],
    evaluated: Sequence[Example],
    machine: Machine,
) -> Seconds:
    """Seconds of the simulated phases, each scaled from its tokens to all tokens.

    A phase takes its FLOPs over the rate of matrix products, plus the bytes moved by other operators over the
    rate of copies. A streamed trunk waits for the disk if that is slower.
    """
    recipe, rates = subject.recipe, machine.rates
    rate = rates.matmul["fp32" if machine.without_bf16 else PRECISIONS[recipe.precision]]

    def of_phase(name: str) -> float:
        return result.flops.get(name, 0) / rate + result.moved.get(name, 0) / rates.copy

    lengths = lengths_of(examples)
    tokens, held_out = sum(lengths), sum(lengths_of(evaluated))
    layers = max(1, enough_layers(subject.chain, plan.cut))
    share = plan.cut / layers * (tokens + held_out) / sum(group.tokens for group in work.groups)
    trunk = of_phase("trunk") * share
    if plan.trunk == "streamed":
        shards = 1 + (tokens + held_out) * token_bytes(subject, plan) // plan.hidden_bytes
        trunk = max(trunk, shards * _file_bytes(subject, plan.cut) / min(rates.disk_read, rates.to_device))
    in_steps = sum(lengths[i] for step in work.steps for i in step)
    steps = len(steps_of_epoch(lengths, recipe.batch_tokens, recipe.seed, 0, recipe.shuffle))
    epoch = sum(map(of_phase, ("forward", "loss", "backward"))) * tokens / in_steps
    epoch += of_phase("update") * steps / len(work.steps)
    if plan.top == "streamed":
        epoch = max(epoch, steps * _moving(subject, plan, rates))
    if plan.state == "ram":  # both directions, in the update, which waits for it
        epoch += steps * 2 * offloaded_bytes(subject, plan) / rates.to_device
    evaluation = 0.0
    if work.evaluated and held_out:
        evaluation = of_phase("evaluate") * held_out / sum(work.examples[i].length for i in work.evaluated)
    epoch += evaluation * (steps / recipe.eval_every if recipe.eval_every else 1)
    epochs = recipe.epochs if recipe.steps is None else recipe.steps / steps
    return Seconds(trunk, epoch, trunk + epochs * epoch + evaluation)


def _moving(subject: Subject, plan: Plan, rates: Rates) -> float:
    """Seconds in which a step of a streamed top reads its weights and writes the changed ones."""
    recipe, chain = subject.recipe, subject.chain
    top, sizes = make_top(chain, trained_parameters(chain.model), plan.cut), Counter[Block]()
    for name, own in chain.model.named_parameters(remove_duplicate=False):  # tied heads, too
        block = Block.of_part(chain.parts.part(name))
        sizes[TAIL if block == REST else block] += own.nbytes
    read = written = 0
    for block in dict.fromkeys([*top.blocks, TAIL]):
        # Forward, backward, and once more in the update by the global norm; adapters are always in memory.
        times = (1 if block == TAIL else 2) + bool(
            needs_global_norm(recipe) and recipe.lora is None and top.blocks.get(block)
        )
        read += times * sizes[block]
        written += sum(own.nbytes for name, own in top.of(block) if top.last_block(name) == block)
    if plan.state == "disk":
        read, written = read + offloaded_bytes(subject, plan), written + offloaded_bytes(subject, plan)
    return read / min(rates.disk_read, rates.to_device) + written / rates.disk_write


def offloaded_bytes(subject: Subject, plan: Plan) -> int:
    """Bytes of offloaded optimizer state and pending gradients."""
    bytes_of = scratch_bytes if plan.top == "streamed" else state_bytes
    return bytes_of(trained_parameters(subject.chain.model), subject.recipe)


def token_bytes(subject: Subject, plan: Plan) -> int:
    """Bytes of one token in the cache."""
    return subject.chain.width_at(plan.cut) * subject.chain.dtype_at(plan.cut).itemsize


def _file_bytes(subject: Subject, cut: int) -> int:
    """Bytes of the layers below the cut, as they are in memory."""
    layers = subject.chain.layers[:cut]
    return sum(weight.nbytes for layer in layers for weight in layer.parameters())
