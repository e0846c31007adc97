"""Loss and gradients of a step against the plain model with the same frozen parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.training import freeze_top, gradients, make_plan, micro_batch, plain_gradients, plain_loss
from talik.data.examples import Example
from talik.kernels.cross_entropy import cross_entropy
from talik.training.memory.keys import gradient as gradient_key
from talik.training.memory.scratch import MemoryScratch
from talik.training.memory.store import ResidentStore
from talik.training.run.loop import ScalarMonitor
from talik.training.step.loss import chunked_loss
from talik.training.step.step import forward_backward, run_top
from talik.training.step.top import World

TOP = "top.2,norm"
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, TOP),
    ("qwen2", {"tie_word_embeddings": True}, TOP),
    ("qwen2", {"tie_word_embeddings": True}, "top.2,norm,head"),
    ("qwen3", {"tie_word_embeddings": False}, "top.2,norm,head"),
    ("gemma2", {"final_logit_softcapping": 5.0}, TOP),
    ("gpt2", {}, TOP),
    ("gpt_neox", {}, "top.2,norm,head"),
    ("granite", {"logits_scaling": 4.0}, TOP),
    ("cohere", {}, TOP),
    ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64}, TOP),
    ("mixtral", {"num_local_experts": 4}, TOP),
    ("phi3", {}, TOP),
    ("qwen2", {}, "layers.1,layers.3,head"),
    ("llama", {}, "layers.2"),
]


@pytest.mark.parametrize(("family", "changes", "thaw"), CASES)
def test_error_is_at_most_twice_that_of_plain_fp32(
    build_model: Callable[..., Any],
    examples: list[Example],
    family: str,
    changes: dict[str, Any],
    thaw: str,
) -> None:
    model = build_model(family, **changes)
    model.config._experts_implementation = "eager"  # the only one that knows float64
    top = freeze_top(model, thaw)
    exact_loss, exact = plain_gradients(copy.deepcopy(model).double(), examples)
    plain_value, plain = plain_gradients(model, examples)
    model.zero_grad()
    loss, ours = gradients(top, examples, [[0, 3], [1, 2], [4], [5]])
    assert ours.keys() == plain.keys() == exact.keys()
    # The rounding error of one fp32 number: smaller errors are not compared.
    assert abs(loss - exact_loss) <= max(2 * abs(plain_value - exact_loss), 2**-23 * exact_loss)
    for name in exact:
        floor = 2**-23 * exact[name].norm()
        error, allowed = (ours[name] - exact[name]).norm(), 2 * (plain[name] - exact[name]).norm()
        assert error <= allowed + floor, name


def test_micro_batches_do_not_matter(build_model: Callable[..., Any], examples: list[Example]) -> None:
    """The loss is the sum over the trained tokens divided by their count, for any micro-batches."""
    top = freeze_top(build_model("qwen2"))
    one_loss, one = gradients(top, examples, [[0, 1, 2, 3, 4, 5]])
    many_loss, many = gradients(top, examples, [[i] for i in range(6)])
    assert many_loss == pytest.approx(one_loss, rel=1e-6)
    for name in one:
        assert torch.allclose(one[name], many[name], rtol=1e-4, atol=1e-6), name


def test_gradients_accumulate_in_fp32(build_model: Callable[..., Any], examples: list[Example]) -> None:
    """In bf16, 64 equal micro-batches give 64 times the gradient of one."""
    top = freeze_top(build_model("qwen2", dtype=torch.bfloat16))
    _, one = gradients(top, examples, [[0]])
    _, many = gradients(top, examples, [[0]] * 64)  # each weighs 1/64 of the one
    for name in one:
        assert torch.allclose(one[name], many[name], rtol=0.01, atol=1e-5 + 0.01 * one[name].abs().max()), (
            name
        )
        assert many[name].dtype == torch.float32


def test_chunked_loss_in_a_users_own_loop(build_model: Callable[..., Any], examples: list[Example]) -> None:
    """The public loss has the value and gradients of the model's own, also if the caller scales it."""
    model = build_model("qwen2", tie_word_embeddings=True)
    top = freeze_top(model, "top.2,norm,head")
    batch = micro_batch(top, examples[:2])
    labels = torch.full_like(batch.input_ids, -100)
    for row, example in zip(labels, examples[:2], strict=True):
        row[: example.length] = torch.tensor(example.labels)
    count = sum(e.trained_tokens for e in examples[:2])
    expected = plain_loss(model, examples[:2], count)
    (expected * 3).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = chunked_loss(top.chain, run_top(top, batch), labels, chunk=5)
    (loss * 3).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in wanted.items():
        found = dict(model.named_parameters())[name].grad
        assert found is not None and torch.allclose(found, gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_recomputed_layers_give_the_same_gradients(
    build_model: Callable[..., Any], examples: list[Example], family: str
) -> None:
    top = freeze_top(build_model(family))
    batches = [micro_batch(top, examples)]
    count = sum(len(batch.targets) for batch in batches)
    found = []
    for recompute in (False, True):
        scratch = MemoryScratch(torch.device("cpu"))
        for name, parameter in top.parameters():
            scratch.zeros(gradient_key(name), parameter.shape, torch.float32)
        world = World(ResidentStore(), scratch, ScalarMonitor())
        loss = forward_backward(top, batches, world, make_plan(top, recompute=recompute), count)
        found.append([loss, *(scratch[gradient_key(name)] for name, _ in top.parameters())])
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_cross_entropy_in_pieces(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient equal softmax cross-entropy in float64, for any size of a slice."""
    monkeypatch.setattr("talik.kernels.cross_entropy.ROWS", rows * 300)
    torch.manual_seed(0)
    logits, targets = (8 * torch.randn(40, 300)).to(dtype), torch.randint(300, (40,))
    exact = logits.double().requires_grad_()
    wanted = F.cross_entropy(exact, targets, reduction="sum") / 16
    wanted.backward()
    gradient = torch.empty_like(logits)
    loss = cross_entropy(logits, targets, 16, gradient)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert exact.grad is not None
    assert torch.allclose(gradient.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-8)
    assert cross_entropy(logits, targets, 16).equal(loss)
