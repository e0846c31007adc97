"""CUDA's choice of attention kernels, and what each leaves in a fake trace."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from talik.simulate.cuda.attention import (
    AMPERE,
    Call,
    cuda_attention,
    efficient_backward_bytes,
    flash_backward_bytes,
    kernel_for,
)

TURING, ADA, HOPPER = (7, 5), (8, 9), (9, 0)
BF16 = torch.bfloat16


class Operators(TorchDispatchMode):
    """The names of the attention operators that ran, and what each was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.given: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(func):
            self.seen.append(str(func).split(".")[1].removeprefix("_scaled_dot_product_"))
            self.given.append((args, kwargs))
        return func(*args, **(kwargs or {}))


def tensors(
    sequence: int = 64,
    heads: int = 4,
    key_heads: int = 4,
    size: int = 64,
    value_size: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    options = {"dtype": BF16, "requires_grad": True, **options}
    return (
        torch.empty(2, heads, sequence, size, **options),
        torch.empty(2, key_heads, sequence, size, **options),
        torch.empty(2, key_heads, sequence, value_size or size, **options),
    )


def chosen(given: tuple[Tensor, Tensor, Tensor], device: tuple[int, int] = AMPERE, **changes: Any) -> str:
    rest = {"mask": None, "dropout": 0.0, "causal": False, "scale": None, "gqa": False}
    return kernel_for(Call(*given, **(rest | changes)), device)


def test_half_precision_without_a_mask_is_flash_attention_s() -> None:
    assert chosen(tensors()) == chosen(tensors(dtype=torch.float16), ADA) == "flash"
    assert chosen(tensors(key_heads=2), gqa=True) == "flash"
    assert chosen(tensors(size=60)) == "flash"  # padded


def test_a_mask_fp32_or_unequal_head_sizes_are_the_efficient_kernel_s() -> None:
    mask = torch.ones(64, 64, dtype=torch.bool)
    assert chosen(tensors(), mask=mask) == chosen(tensors(dtype=torch.float32)) == "efficient"
    assert chosen(tensors(size=192, value_size=128)) == "efficient"
    query, key, value = tensors()
    assert chosen((query[:, :, :32], key, value), causal=True) == "efficient"


def test_what_no_fused_kernel_takes_is_done_step_by_step() -> None:
    mask = torch.ones(64, 64, dtype=torch.bool)
    assert chosen(tensors(size=60), mask=mask) == "math"
    assert chosen(tensors(key_heads=2, dtype=torch.float32), gqa=True) == "math"
    assert chosen(tensors(key_heads=2), gqa=True, mask=mask) == "math"
    assert chosen(tensors(dtype=torch.float64)) == "math"
    query, key, value = tensors()
    assert chosen((query[0], key[0], value[0])) == "math"


def test_the_choice_depends_on_the_device() -> None:
    assert chosen(tensors(), TURING) == "math"  # no bf16
    assert chosen(tensors(dtype=torch.float16), TURING) == "efficient"
    assert chosen(tensors(dtype=torch.float16, size=60), TURING) == "math"
    assert chosen(tensors(dtype=torch.float32, size=6), TURING) == "efficient"
    assert chosen(tensors(), HOPPER) == chosen(tensors(), HOPPER, mask=torch.ones(64, 64)) == "cudnn"
    assert chosen(tensors(size=256), HOPPER) == chosen(tensors(size=60), HOPPER) == "flash"
    assert chosen(tensors(size=200), ADA) == "efficient"
    assert chosen(tensors(size=200, requires_grad=False), ADA) == chosen(tensors(size=256), ADA) == "flash"


CASES: dict[str, tuple[str, tuple[int, int], dict[str, Any], dict[str, Any]]] = {
    "causal": ("flash", AMPERE, {}, {"is_causal": True}),
    "grouped": ("flash", AMPERE, {"key_heads": 2}, {"enable_gqa": True, "is_causal": True}),
    "odd head size": ("flash", AMPERE, {"size": 60}, {"is_causal": True}),
    "scale": ("flash", AMPERE, {}, {"scale": 0.5}),
    "fp32": ("efficient", AMPERE, {"dtype": torch.float32}, {"is_causal": True}),
    "mask": ("efficient", AMPERE, {}, {"attn_mask": (2, 1)}),
    "odd mask": ("efficient", AMPERE, {"sequence": 63}, {"attn_mask": (2, 1)}),
    "cudnn": ("cudnn", HOPPER, {"key_heads": 2}, {"enable_gqa": True}),
    "cudnn mask": ("cudnn", HOPPER, {}, {"attn_mask": (2, 1)}),
    "math": ("math", TURING, {}, {"is_causal": True}),
    "math grouped": ("math", TURING, {"key_heads": 2}, {"enable_gqa": True}),
    "math mask": ("math", TURING, {"size": 60}, {"attn_mask": (2, 1)}),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_of_every_kernel_on_fake_cpu_tensors(case: str) -> None:
    kernel, device, shape, options = CASES[case]
    with FakeTensorMode(), cuda_attention(device), Operators() as operators:
        query, key, value = tensors(**shape)
        options: dict[str, Any] = dict(options)
        if shape_of_mask := options.get("attn_mask"):
            options["attn_mask"] = torch.ones(*shape_of_mask, *[query.shape[-2]] * 2, dtype=torch.bool)
        out = functional.scaled_dot_product_attention(query, key, value, **options)
        out.sum().backward()
    assert (out.shape, out.dtype, out.device.type) == (query.shape, query.dtype, "cpu")
    assert all(t.grad is not None and t.grad.shape == t.shape for t in (query, key, value))
    expected = [] if kernel == "math" else [f"{kernel}_attention", f"{kernel}_attention_backward"]
    assert operators.seen == expected


def test_flash_attention_gets_padded_heads_and_the_scale_of_what_they_were() -> None:
    with FakeTensorMode(), cuda_attention(), Operators() as operators:
        functional.scaled_dot_product_attention(*tensors(size=60, requires_grad=False))
    args, named = operators.given[0]
    assert [tensor.shape[-1] for tensor in args[:3]] == [64, 64, 64]
    assert named["scale"] == pytest.approx(60**-0.5)


def test_the_efficient_kernel_gets_a_mask_that_it_can_read_and_keeps_sums_for_training_only() -> None:
    for train in (True, False):
        with FakeTensorMode(), cuda_attention(), Operators() as operators, torch.set_grad_enabled(train):
            mask = torch.ones(2, 1, 63, 63, dtype=torch.bool)
            functional.scaled_dot_product_attention(*tensors(63), attn_mask=mask)
        _, _, _, given, sums = operators.given[0][0][:5]
        assert (given.shape, given.dtype) == ((2, 4, 63, 63), BF16)
        assert all(stride % 8 == 0 for stride in given.stride()[:-1])
        assert sums is train


def test_only_the_kernel_of_steps_keeps_the_square_of_the_sequence() -> None:
    def kept(sequence: int, device: tuple[int, int]) -> int:
        with FakeTensorMode(), cuda_attention(device):
            given = tensors(sequence)
            return _kept(lambda: functional.scaled_dot_product_attention(*given, is_causal=True))

    flash = kept(1024, AMPERE)
    assert flash == 4 * (2 * 4 * 1024 * 64 * 2) + 2 * 4 * 1024 * 4 + 24  # q, k, v, out; sums in fp32; seed
    assert kept(2048, AMPERE) - 24 == 2 * (flash - 24)
    assert kept(2048, HOPPER) < 2.01 * kept(1024, HOPPER)
    assert kept(2048, TURING) > 3 * kept(1024, TURING)


def _kept(run: Callable[[], Tensor]) -> int:
    """Bytes of the storages that are saved for the backward pass."""
    storages: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        out = run()
    assert out.numel()
    return sum(storages.values())


def test_the_function_itself_comes_back_also_after_an_error() -> None:
    original = functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), cuda_attention():
        assert functional.scaled_dot_product_attention is not original
        raise ZeroDivisionError
    assert functional.scaled_dot_product_attention is original
    with cuda_attention(HOPPER), cuda_attention():
        pass
    assert functional.scaled_dot_product_attention is original


def test_steps_and_masks_give_the_numbers_of_pytorch() -> None:
    """On real CPU tensors only the kernel of steps can run: the masks that are added are right."""
    torch.manual_seed(0)
    query, key, value = (torch.randn_like(tensor) for tensor in tensors(dtype=torch.float64, key_heads=2))
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    with cuda_attention():
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, expected)


def test_the_attention_of_transformers_is_reached(build_model: Callable[..., Any]) -> None:
    model = build_model("qwen2", dtype=BF16)
    assert model.config._attn_implementation == "sdpa"
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_attention(), Operators() as operators:
        model(input_ids=torch.ones(1, 16, dtype=torch.long), use_cache=False)
    assert len(operators.seen) == 4 and set(operators.seen) <= {"flash_attention", "efficient_attention"}


def test_what_flash_attention_s_backward_pass_allocates() -> None:
    """Qwen2.5-7B at 1,024 tokens: 28 heads of 128, 4 of keys."""
    sums = 28 * 1024 * 4
    assert flash_backward_bytes(1, 28, 1024, 128) == sums + sums * 128
    assert flash_backward_bytes(1, 28, 1024, 128, 28) == sums + sums * 128
    assert flash_backward_bytes(1, 28, 1024, 128, 4) == sums + sums * 128 + 2 * (28 * 1024 * 128 * 2)
    assert flash_backward_bytes(1, 1, 1, 130) == 128 * 4 + 128 * 192 * 4


@pytest.mark.parametrize(
    ("size", "itemsize", "capability", "elements"),
    [
        (64, 2, (8, 0), 1024 * 64),  # dq alone: dk and dv are in registers
        (128, 2, (8, 0), 1024 * 128),
        (128, 2, ADA, 1024 * 128 + 2 * 3 * 1024 * 128),  # dk and dv, of keys in 200 // 56 parts
        (80, 2, ADA, 1024 * 128),
        (128, 4, ADA, 1024 * 128),
        (80, 4, TURING, 1024 * 128),
    ],
)
def test_what_the_efficient_kernel_allocates_for_itself(
    size: int, itemsize: int, capability: tuple[int, int], elements: int
) -> None:
    taken = efficient_backward_bytes(2, 28, 1000, 1000, size, itemsize, capability)
    assert taken == 4 * 2 * 28 * (1000 + elements)


def test_the_efficient_kernel_s_tiles_are_those_of_the_installed_torch() -> None:
    """In order: the first that is large enough, and fits the device's shared memory, is taken."""
    header = "include/ATen/native/transformers/cuda/mem_eff_attention/kernels/cutlassB.h"
    text = (Path(torch.__file__).parent / header).read_text(encoding="utf-8")
    offered = re.findall(r"cb\(.*fmha_cutlassB_bf16_aligned_(\d+x\d+_k\d+)_sm80\)", text)
    assert offered == [
        "64x64_k32",
        "64x64_k64",
        "128x64_k96",
        "128x128_k128",
        "64x64_k128",
        "128x64_k65536",
        "64x64_k65536",
    ]
