"""bf16 products by way of fp32, beside those that the processor makes of bf16 itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from talik.kernels.bf16_matmul import bf16_as_fp32, fp32_in_use, grouped_mm, linear, mm
from talik.model.chain.verify import verify_chain


def half(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("piece", [1 << 20, 300])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(5, 7, 70), (90, 16, 33), (6, 99, 8), (1, 40, 40), (40, 0, 3)]
)
def test_each_number_is_a_sum_in_fp32_rounded_once(
    rows: int, inner: int, columns: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("talik.kernels.bf16_matmul.PIECE", piece)
    for one in (half(rows, inner), half(inner, rows).T):
        for other in (half(inner, columns, seed=1), half(columns, inner, seed=1).T):
            ours, exact = mm(one, other), one.double() @ other.double()
            assert ours.is_contiguous()
            # half a unit in the last place of bf16, and what fp32 sums may be off
            off = one.double().abs() @ other.double().abs() * 2**-22
            assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 + off).all()
            bias = half(columns, seed=2)
            exact += bias.double()
            assert ((mm(one, other, bias).double() - exact).abs() <= exact.abs() * 2**-8 + off + 1e-7).all()


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_has_the_gradients_of_torchs(trained: tuple[bool, bool], bias: bool) -> None:
    found = []
    for function in (linear, F.linear):
        hidden, weight = half(2, 9, 24), half(50, 24, seed=1)
        added = half(50, seed=2).requires_grad_() if bias else None
        hidden.requires_grad_(trained[0])
        weight.requires_grad_(trained[1])
        kept: list[Tensor] = []
        with saved_tensors_hooks(lambda tensor, to=kept: to.append(tensor) or tensor, lambda tensor: tensor):
            out = function(hidden, weight, added)
        out.backward(half(2, 9, 50, seed=3))
        found.append((out, hidden.grad, weight.grad, added.grad if added is not None else None, len(kept)))
    for ours, theirs in zip(*found, strict=True):
        if isinstance(ours, Tensor):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-5)
        else:
            assert ours == theirs  # nothing is kept for a gradient that nobody wants


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_have_the_gradients_of_torchs(trained: tuple[bool, bool], transposed: bool) -> None:
    """One expert has no rows, one has fewer than are worth it, and a few rows belong to none."""
    ends, found = torch.tensor([9, 9, 11, 30], dtype=torch.int32), []
    for function in (grouped_mm, F.grouped_mm):
        rows = half(34, 16).requires_grad_(trained[0])
        weights = half(4, 24, 16, seed=1) if transposed else half(4, 16, 24, seed=1)
        weights.requires_grad_(trained[1])
        out = function(rows, weights.transpose(1, 2) if transposed else weights, offs=ends)
        out[:30].backward(half(30, 24, seed=2))
        found.append((out[:30], rows.grad if rows.grad is None else rows.grad[:30], weights.grad))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-5)
    assert not grouped_mm(half(34, 16), half(4, 16, 24), offs=ends)[30:].any()


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, x),
    "matmul": lambda x: x @ x.T,
    "experts": lambda x: F.grouped_mm(
        x[:, :16].clone(), x[:16, :16].repeat(2, 1, 1), offs=torch.tensor([9, 20], dtype=torch.int32)
    ),
    "addmm": lambda x: torch.addmm(x, x, x.T),
    "addmm with a bias": lambda x: torch.addmm(x[0], x, x.T),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True)[0],
    "convolution": lambda x: F.conv1d(x, x[:, :1, None].repeat(1, 20, 1)),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_it_is_what_layers_call_in_there_and_nothing_else(name: str) -> None:
    half_precise, seen = half(20, 20), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch.Tag.core in func.tags or "attention" in func.name() or func.namespace == "talik":
                seen.append((func.name(), {a.dtype for a in args if isinstance(a, Tensor)}))
            return func(*args, **kwargs or {})

    def multiplied() -> set[torch.dtype]:
        named = ("mm", "attention", "convolution")
        return set().union(*(dtypes for func, dtypes in seen if any(part in func for part in named)))

    with bf16_as_fp32(True):
        assert fp32_in_use()
        with Watch():
            out = CALLS[name](half_precise)
        assert out.dtype == torch.bfloat16
        assert multiplied() == {torch.float32} or [f for f, _ in seen if f.startswith("talik::")]
        seen.clear()
        single = CALLS[name](half_precise.float())
    assert not fp32_in_use()
    with bf16_as_fp32(False):
        theirs = CALLS[name](half_precise)
    torch.testing.assert_close(out, theirs, rtol=2**-6, atol=2**-5)
    assert torch.equal(single, CALLS[name](half_precise.float()))


def test_what_is_read_more_than_multiplied_stays_as_it_is() -> None:
    one, weight = half(1, 1, 24), half(50, 24, seed=1)
    with bf16_as_fp32(True):
        assert not by_fp32(one, weight)
        assert by_fp32(one.expand(1, 9, -1), weight)


def by_fp32(hidden: Tensor, weight: Tensor) -> bool:
    return F.linear(hidden, weight.requires_grad_()).grad_fn.name() == "_LinearBackward"  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "mixtral"])
def test_the_chain_is_the_models_own_forward_there_too(kind: str, build_model: Callable[..., Any]) -> None:
    model = build_model(kind, dtype=torch.bfloat16)
    ids = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    with bf16_as_fp32(True):
        assert verify_chain(model, ids) == 0


def test_gradients_are_as_near_to_fp32s_as_the_processors_own(build_model: Callable[..., Any]) -> None:
    model = build_model("llama", dtype=torch.bfloat16)
    ids = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for dtype, as_fp32 in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model.to(dtype).zero_grad()
        with bf16_as_fp32(as_fp32):
            model(input_ids=ids, labels=ids).loss.backward()
        found.append([parameter.grad.float().clone() for parameter in model.parameters()])
    exact, theirs, ours = (torch.cat([gradient.flatten() for gradient in of]) for of in found)
    assert 0 < (ours - exact).norm() <= 1.2 * (theirs - exact).norm()
