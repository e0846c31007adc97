"""The memory of a simulated run on a CUDA device: allocator pages, libraries, and the context.

A simulation counts the bytes of tensors. A device holds more: storages are rounded and lie in pages that may
be half empty; libraries and kernels allocate workspaces that no operator shows; the context comes on top.
Computed from the sources of PyTorch 2.13, not measured on a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from talik.machine.machine import Machine
from talik.simulate.account import Break, Peak, Simulation, allocated_by_cause, highest, levels
from talik.simulate.cuda.allocator import MIB, Allocator, follow, least_capacity
from talik.simulate.cuda.attention import (
    AMPERE,
    cuda_attention,
    efficient_backward_bytes,
    flash_backward_bytes,
)
from talik.simulate.storage_log import Storage, StorageLog

# parseChosenWorkspaceSize in aten/src/ATen/cuda/CublasHandlePool.cpp; from the caching allocator (#89027,
# #95668). Which capabilities from 9.0 on have the larger one went back and forth (#175344, #182669): here
# all. cuBLASLt uses the same (torch/backends/cuda/__init__.py, TORCH_CUBLASLT_UNIFIED_WORKSPACE).
WORKSPACE = 2 * (4096 << 10) + 8 * (16 << 10)  # :4096:2:16:8
WORKSPACE_FROM_9_0 = 32 * MIB
# One for each thread that multiplies, as handles are (thread_local in getCurrentCUDABlasHandle): the one that
# runs forward, and autograd's, which begins to multiply in these phases.
AUTOGRAD = frozenset({"loss", "backward"})
PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"))

# No reliable figure is published. Bare contexts with lazily loaded kernels: 256 MiB (RTX 3090, CUDA 12.8,
# InvokeAI #9413), 426 MiB (RTX 6000 Ada, CUDA 13.0, unsloth-zoo #1053), "around 400 MB" (pytorch #109888).
BARE_CONTEXTS = {"RTX 3090": 256 * MIB, "RTX 6000 Ada": 426 * MIB}
BARE_CONTEXT = 448 * MIB
LOADED_KERNELS = 320 * MIB  # a guess: kernels of PyTorch, cuBLAS and cuDNN that a training step loads

# Backward passes of attention, each of which makes dq, dk and dv. cuDNN's own graph keeps what flash
# attention does (CompositeSDPABackwardNode of cudnn-frontend 1.x); the workspace of its engines is unknown.
FLASH = "aten::_scaled_dot_product_flash_attention_backward"
CUDNN = "aten::_scaled_dot_product_cudnn_attention_backward"
EFFICIENT = "aten::_scaled_dot_product_efficient_attention_backward"
RESULTS = 3


@dataclass(frozen=True, slots=True)
class Demand:
    """The requests to the allocator: storages of a log, and those of libraries and kernels (larger keys).

    Attributes:
        events: As for `allocator.replay`.
        numbers: The event of the log that each of them belongs to.
    """

    log: StorageLog
    events: list[tuple[int, int]]
    numbers: list[int]

    def storage(self, index: int) -> Storage:
        """The storage of an event; for one of a library, that of the calling operator."""
        return self.log.storage(self.numbers[index])

    def changes(self) -> Iterator[tuple[str, int]]:
        """Yields for every event its cause, and the bytes by which it changes the allocated memory."""
        births = self.log.births
        for key, size in self.events:
            yield births[key].cause or "workspace" if key < len(births) else "libraries", size


@dataclass(frozen=True, slots=True)
class DeviceAccount:
    """A simulated run on a CUDA device.

    Attributes:
        phases: As `Simulation.phases`, with the causes "libraries" (workspaces and context) and "allocator"
            (rounding, and pages that are partly empty).
        capacity: Bytes of device memory with which the whole run succeeds; the highest phase takes all of
            them.
        context: Bytes of these outside the allocator.
    """

    phases: tuple[Peak, ...]
    capacity: int
    context: int
    demand: Demand

    @property
    def peak(self) -> Peak:
        """The highest peak of all phases."""
        return highest(self.phases)

    def first_break(self, budget: int) -> Break | None:
        """The first allocation that fails on a device with `budget` bytes for this process.

        `total` is what the device would have to hold with it, in whole pages.
        """
        allocator, events = Allocator(budget - self.context), self.demand.events
        done = sum(1 for _ in follow(events, allocator))
        if done == len(events):
            return None
        made, size = self.demand.storage(done), events[done][1]
        total = self.context + allocator.held + allocator.pages_for(size)
        return Break(made.phase, made.block, made.operator, made.shape, size, total)


def target(machine: Machine) -> AbstractContextManager[None]:
    """Inside the context, a simulation uses the attention kernels of a machine's device.

    Only for NVIDIA devices; others keep the CPU's kernels (see `attention.cuda_attention`).
    """
    on_cuda = machine.device.partition(":")[0] == "cuda"
    return cuda_attention(machine.compute_capability) if on_cuda else nullcontext()


def on_cuda(simulation: Simulation, machine: Machine, *, context: int | None = None) -> DeviceAccount:
    """The memory of a run on a machine's CUDA device, if it was simulated inside `target(machine)`.

    Expandable segments are assumed (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True). `context`: measured
    bytes outside the allocator; otherwise they are estimated. Workspaces of libraries other than cuBLAS and
    of kernels other than attention are not included.
    """
    demand = demand_of(simulation.log, machine.compute_capability)
    if context is None:
        context = context_bytes(machine.processor)
    needed = least_capacity(demand.events)
    return DeviceAccount(_peaks(demand, needed, context), needed + context, context, demand)


def library_workspace(compute_capability: tuple[int, int] | None) -> int:
    """Bytes that the first product of a thread allocates for cuBLAS and keeps; the larger value for None.

    CUBLAS_WORKSPACE_CONFIG is not read.
    """
    return WORKSPACE if compute_capability and compute_capability < (9, 0) else WORKSPACE_FROM_9_0


def context_bytes(name: str | None) -> int:
    """Bytes of device memory of a process outside the allocator; a rough estimate.

    They depend on the device (`name`), the driver and CUDA. To measure: the decrease of mem_get_info() since
    the process began, minus torch.cuda.memory_reserved().
    """
    bare = (size for part, size in BARE_CONTEXTS.items() if part in (name or ""))
    return next(bare, BARE_CONTEXT) + LOADED_KERNELS


def demand_of(log: StorageLog, compute_capability: tuple[int, int] | None) -> Demand:
    """Adds the allocations of libraries and kernels to a log, each after the operator that calls them."""
    workspace = {number: (size, stays) for number, size, stays in _workspace(log, compute_capability)}
    demand, key = Demand(log, [], []), len(log.births)
    for number, (_, change) in enumerate(log.changes()):
        new = [(log.key(number), change)]
        if number in workspace:
            size, stays = workspace[number]
            new += [(key, size)] if stays else [(key, size), (key, -size)]
            key += 1
        demand.events.extend(new)
        demand.numbers.extend([number] * len(new))
    return demand


def _workspace(
    log: StorageLog, compute_capability: tuple[int, int] | None
) -> Iterator[tuple[int, int, bool]]:
    """Allocations that no operator shows: the preceding event, bytes, and whether they stay."""
    when = [number for number, event in enumerate(log.events) if event >= 0]  # storages were born
    products = [key for key, made in enumerate(log.births) if made.operator in PRODUCTS]
    of_autograd = [key for key in products if log.births[key].phase in AUTOGRAD]
    for key in {*products[:1], *of_autograd[:1]}:
        yield when[key], library_workspace(compute_capability), True
    for operator in (FLASH, CUDNN, EFFICIENT):
        keys = [key for key, made in enumerate(log.births) if made.operator == operator]
        for first in keys[::RESULTS]:
            of_query, of_key = log.births[first : first + 2]
            size = _attention_bytes(of_query, of_key, compute_capability or AMPERE)
            yield when[first + RESULTS - 1], size, False


def _attention_bytes(of_query: Storage, of_key: Storage, compute_capability: tuple[int, int]) -> int:
    """Workspace of a backward of attention, by its results for query and key."""
    batch, heads, sequence, size = of_query.shape
    key_heads, keys = of_key.shape[1:3]
    if of_query.operator == EFFICIENT:
        itemsize = of_query.bytes // (batch * heads * sequence * size)
        return efficient_backward_bytes(batch, heads, sequence, keys, size, itemsize, compute_capability)
    return flash_backward_bytes(batch, heads, sequence, size, key_heads)


def _peaks(demand: Demand, capacity: int, context: int) -> tuple[Peak, ...]:
    """The peak of every phase with the least sufficient capacity, all of which the highest phase takes."""
    highest = _highest(demand, capacity)
    top = max(highest, key=lambda phase: highest[phase][:2])
    held = {phase: capacity if phase == top else pages for phase, (pages, *_) in highest.items()}
    wanted = {index: phase for phase, (*_, index) in highest.items()}
    peaks: dict[str, Peak] = {}
    for index, allocated in enumerate(allocated_by_cause(demand.changes())):
        if index in wanted:
            phase, made = wanted[index], demand.storage(index)
            outside = {"libraries": allocated["libraries"] + context}
            outside |= {"allocator": held[phase] - allocated.total()}
            causes = {cause: size for cause, size in (allocated | outside).items() if size}
            peaks[phase] = Peak(phase, held[phase] + context, causes, made.block, made.operator)
    return tuple(peaks[phase] for phase in held if phase in peaks)


def _highest(demand: Demand, capacity: int) -> dict[str, tuple[int, int, int]]:
    """The moment of most pages in each phase: their bytes, those of the storages in them, and the event."""
    allocator = Allocator(capacity)
    phases = [phase for _, phase, _ in levels(demand.log)]
    highest = {phase: (0, 0, -1) for _, phase in demand.log.marks}
    for index in follow(demand.events, allocator):
        phase = phases[demand.numbers[index]]
        highest[phase] = max(highest[phase], (allocator.held, allocator.allocated, index))
    return highest
