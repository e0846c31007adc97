"""Runs the plain loop on fake tensors: `model(**batch).loss.backward()` and AdamW.

The model is not changed and nothing is allocated for it: its parameters are replaced by fakes, and offloaded
weights are copied in for the forward of their module, as accelerate does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talik.model.anatomy import Parts, parts_of
from talik.model.chain.probe import tensors_in
from talik.simulate.account import Simulation, account, levels
from talik.simulate.fake_log import fake_world
from talik.simulate.storage_log import StorageLog

STEPS = 2  # in the second step the optimizer state exists during the backward

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """A block in the first forward: whether it is part of the graph, and bytes.

    Attributes:
        alive: All allocated bytes after it.
        kept: Bytes that it saved for the backward.
        copies: Bytes of frozen weights copied in for it and kept by autograd.
    """

    name: str
    in_graph: bool
    alive: int
    kept: int
    copies: int


@dataclass(frozen=True, slots=True)
class Loop:
    """Two steps of the plain loop: memory, blocks, and numbers in trained parameters.

    Attributes:
        trained: Numbers in parameters that require a gradient.
        learning: Those that got one.
    """

    simulation: Simulation
    blocks: tuple[BlockMemory, ...]
    trained: int
    learning: int


@dataclass
class _BlockRecords:
    """By block: whether its input or result required a gradient, and where its forward ends in the log."""

    in_graph: dict[str, bool]
    ends: dict[str, int]


def run_loop(
    model: nn.Module, batch: Batch, offloaded: Collection[nn.Module] = (), loss: Loss | None = None
) -> Loop:
    """Runs two steps of the plain loop on fakes of the model's parameters, which need not be loaded.

    The model is restored afterwards in any case.

    Args:
        model: The model.
        batch: The arguments of its forward.
        offloaded: Modules whose weights are copied in for their forward.
        loss: A function of model and batch; by default the model's own loss.
    """
    parts, seen = parts_of(model), _BlockRecords({}, {})
    foreach = any(parameter.is_cuda for parameter in model.parameters())  # PyTorch's default
    trained = {id(weight): weight.numel() for weight in model.parameters() if weight.requires_grad}
    with ExitStack() as stack:
        for context in (unchanged(model), torch.random.fork_rng(devices=[]), torch.enable_grad()):
            stack.enter_context(context)
        log = stack.enter_context(fake_world(model, "cuda" if foreach else "cpu"))
        _without_accelerate(model)
        resident = _fake_parameters(model, {id(module) for module in offloaded}, log)
        stack.enter_context(_brought_in(offloaded, log))
        stack.enter_context(_watched(model, parts, log, seen))
        _steps(model, _on_cpu(batch), loss or model_loss, resident, foreach, log)
        learning = sum(weight.numel() for weight in resident if weight.grad is not None)
    return Loop(account(log), _blocks(log, seen), sum(trained.values()), learning)


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss; without labels or with selected logits, fp32 cross-entropy of the logits."""
    if "labels" in batch and "logits_to_keep" not in batch:
        return model(**batch).loss
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits.float().flatten(0, 1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


@contextmanager
def unchanged(model: nn.Module) -> Generator[None]:
    """Restores attributes, parameters, buffers and hooks of every module afterwards."""

    def tables(module: nn.Module) -> list[dict[Any, Any]]:
        return [vars(module), *(value for value in vars(module).values() if isinstance(value, dict))]

    before = [(table, dict(table)) for module in model.modules() for table in tables(module)]
    try:
        yield
    finally:
        for table, values in before:
            table.clear()
            table.update(values)


def _fake_parameters(model: nn.Module, offloaded: set[int], log: StorageLog) -> list[nn.Parameter]:
    """Replaces all parameters by fakes, except for offloaded modules; ties are kept."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(module) not in offloaded:
                if id(weight) not in made:
                    made[id(weight)] = _fake_of(weight, log)
                module._parameters[name] = made[id(weight)]
    return list(made.values())


def _fake_of(weight: Tensor, log: StorageLog) -> nn.Parameter:
    memory = torch.empty(weight.shape, dtype=weight.dtype)
    log.mark([memory], "weights trained" if weight.requires_grad else "weights frozen")
    return nn.Parameter(memory, weight.requires_grad)


class _NoTransfer:
    """Replaces accelerate's hook and moves nothing."""

    def __init__(self, hook: Any) -> None:
        self.no_grad = getattr(hook, "no_grad", False)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def post_forward(self, module: nn.Module, out: Any) -> Any:
        return out


def _without_accelerate(model: nn.Module) -> None:
    for module in model.modules():
        if "_hf_hook" in vars(module):
            vars(module)["_hf_hook"] = _NoTransfer(vars(module)["_hf_hook"])


@contextmanager
def _brought_in(offloaded: Collection[nn.Module], log: StorageLog) -> Generator[None]:
    """Inside the context, offloaded weights are copied in for the forward of their module.

    Only autograd can keep the copies.
    """

    def bring(own: dict[str, Any], module: nn.Module, args: Any) -> None:
        for name, weight in own.items():
            module._parameters[name] = None if weight is None else _fake_of(weight, log)

    def drop(own: dict[str, Any], module: nn.Module, args: Any, out: Any) -> None:
        module._parameters.update(own)

    with ExitStack() as stack:
        for module in offloaded:
            own = dict(module._parameters)
            stack.callback(module.register_forward_pre_hook(partial(bring, own)).remove)
            stack.callback(module.register_forward_hook(partial(drop, own)).remove)
        yield


@contextmanager
def _watched(model: nn.Module, parts: Parts, log: StorageLog, seen: _BlockRecords) -> Generator[None]:
    """Inside the context, the log records the running block and the start of the loss; `seen` is filled."""
    layers: Any = model.get_submodule(parts.layers)
    blocks = {"embeddings": model.get_submodule(parts.embedding)}
    blocks |= {f"layer {index}": layer for index, layer in enumerate(layers)}
    with ExitStack() as stack:
        for name, module in blocks.items():
            watch = _BlockWatch(name, log, seen)
            stack.callback(module.register_forward_pre_hook(watch.enters, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(watch.leaves).remove)
        if parts.head is not None:
            head = model.get_submodule(parts.head)
            stack.callback(head.register_forward_pre_hook(lambda *_: _begin_loss(log), prepend=True).remove)
        yield


def _begin_loss(log: StorageLog) -> None:
    if log.phase_now == "forward":
        log.phase("loss")
    log.block = "tail"


class _BlockWatch:
    """The hooks of one block."""

    def __init__(self, name: str, log: StorageLog, seen: _BlockRecords) -> None:
        self._name, self._log, self._seen = name, log, seen
        self._began = 0

    def enters(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._log.block, self._began = self._name, len(self._log.births)
        self._seen.in_graph.setdefault(self._name, _needs_gradient((args, kwargs)))

    def leaves(self, module: nn.Module, args: Any, out: Any) -> None:
        log = self._log
        if log.phase_now == "backward":
            for made in log.births[self._began :]:
                made.cause = made.cause or ("recomputed" if not made.dead else None)
            return
        self._seen.ends.setdefault(self._name, len(log.events) - 1)
        self._seen.in_graph[self._name] |= _needs_gradient(out)
        log.block = "around the layers"
        for tensor in tensors_in(out):
            if tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self._log.block = self._name


def _needs_gradient(value: Any) -> bool:
    return any(tensor.requires_grad for tensor in tensors_in(value))


def _on_cpu(batch: Batch) -> dict[str, Any]:
    """The batch without entries that no model takes (texts); integers are real, floats fake."""
    taken = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            taken[name] = torch.empty(value.shape, dtype=value.dtype, requires_grad=value.requires_grad)
        elif isinstance(value, (Tensor, bool, int)):
            taken[name] = value.cpu() if isinstance(value, Tensor) else value
    return taken


def _steps(
    model: nn.Module,
    batch: Batch,
    loss_of: Loss,
    resident: list[nn.Parameter],
    foreach: bool,
    log: StorageLog,
) -> None:
    trained = [weight for weight in resident if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=foreach) if trained else None
    for step in range(STEPS):
        log.phase("forward")
        loss = loss_of(model, batch)
        log.phase("backward")
        if loss.requires_grad:
            loss.backward()
        log.mark([weight.grad for weight in trained if weight.grad is not None], "gradients")
        del loss
        log.phase("update")
        if optimizer is not None:
            optimizer.step()
            states = (value for state in optimizer.state.values() for value in state.values())
            log.mark([value for value in states if isinstance(value, Tensor)], "optimizer state")
            if step < STEPS - 1:
                optimizer.zero_grad()


def _blocks(log: StorageLog, seen: _BlockRecords) -> tuple[BlockMemory, ...]:
    end = next(number for number, phase in log.marks if phase in ("loss", "backward"))
    kept: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    for made in log.alive(end - 1):
        if made.phase == "forward" and made.cause == "weights frozen":
            copies[made.block] += made.bytes
        elif made.phase == "forward" and made.cause == "saved activations":
            kept[made.block] += made.bytes
    wanted = set(seen.ends.values())
    after = {number: total for number, _, total in levels(log) if number in wanted}
    return tuple(
        BlockMemory(name, seen.in_graph[name], after[number], kept[name], copies[name])
        for name, number in seen.ends.items()
    )
