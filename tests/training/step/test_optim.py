"""The optimizers against those of PyTorch and Transformers, and their common properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from helpers.training import freeze_top, make_recipe
from helpers.updates import HEAD, MATRIX, RATE, noise, prepared, train, weights
from talik.base.errors import RecipeError
from talik.recipe.recipe import READ_BY, Recipe, checked_recipe
from talik.training.memory.keys import gradient as gradient_key
from talik.training.memory.keys import master
from talik.training.run.schedule import learning_rate_at
from talik.training.step import optim as optim_module
from talik.training.step import update as update_module
from talik.training.step.optim import OPTIMIZERS, optimizer_of, round_stochastically_
from talik.training.step.update import (
    InPlace,
    MasterRounding,
    StochasticRounding,
    rounding_of,
    state_forms,
    update,
)


def assert_same(
    recipe: Recipe,
    theirs: Callable[[list[nn.Parameter], float], Any],
    *shape: int,
    name: str = MATRIX,
    close: float = 1e-6,
) -> None:
    """Compares twenty updates with those of a reference optimizer."""
    ours, reference = weights(*shape), weights(*shape)
    optimizer = theirs([reference], recipe.weight_decay if len(shape) > 1 else 0.0)

    def compare(step: int, gradient: Tensor) -> None:
        reference.grad = gradient
        optimizer.step()
        assert torch.allclose(ours, reference, rtol=close, atol=close), step

    train(name, ours, recipe, noise(*shape), after=compare)
    assert not torch.allclose(ours, weights(*shape), atol=1e-2)


def adamw(parameters: list[nn.Parameter], decay: float) -> Any:
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=decay)


def adafactor(parameters: list[nn.Parameter], decay: float) -> Any:
    fixed: Any = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    return Adafactor(parameters, lr=RATE, weight_decay=decay, **fixed)


def muon(parameters: list[nn.Parameter], decay: float) -> Any:
    return torch.optim.Muon(parameters, lr=RATE, weight_decay=decay, adjust_lr_fn="match_rms_adamw")


class DecoupledSGD(torch.optim.SGD):
    """SGD with decoupled weight decay: PyTorch's adds it to the gradient."""

    def __init__(self, parameters: list[nn.Parameter], decay: float, momentum: float) -> None:
        super().__init__(parameters, lr=RATE, momentum=momentum)
        self.kept = 1 - RATE * decay

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(self.kept)
        return super().step(closure)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(40, 24), (1000,)])
def test_adamw_is_pytorchs(decay: float, shape: tuple[int, ...]) -> None:
    assert_same(make_recipe(weight_decay=decay), adamw, *shape)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 8, 12), (50,)])
def test_adafactor_is_transformers(shape: tuple[int, ...]) -> None:
    assert_same(make_recipe(optimizer="adafactor", weight_decay=0.1), adafactor, *shape)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_muon_is_pytorchs(shape: tuple[int, ...]) -> None:
    """Up to rounding in bf16, in which both orthogonalise."""
    assert_same(make_recipe(optimizer="muon", weight_decay=0.1), muon, *shape, close=RATE * 2**-8)


def test_muon_takes_experts_one_by_one() -> None:
    recipe, stack, gradient = make_recipe(optimizer="muon"), weights(3, 8, 12), noise(3, 8, 12)
    alone = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    train(MATRIX, stack, recipe, gradient)
    for index, matrix in enumerate(alone):
        train(MATRIX, matrix, recipe, lambda step, index=index: gradient(step)[index])
        assert torch.equal(stack[index], matrix)


@pytest.mark.parametrize(
    ("name", "shape"),
    [(HEAD, (40, 24)), ("model.layers.3.norm.weight", (24,)), ("model.layers.3.conv.weight", (24, 1, 4))],
)
def test_muon_leaves_the_rest_to_adamw(name: str, shape: tuple[int, ...]) -> None:
    assert_same(make_recipe(optimizer="muon", weight_decay=0.1), adamw, *shape, name=name)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "mixtral", "opt"])
def test_muon_knows_a_layers_matrices_by_name(build_model: Callable[..., Any], kind: str) -> None:
    recipe = make_recipe(optimizer="muon")
    top = freeze_top(build_model(kind), "top.2,norm,head")
    for name, parameter in top.parameters():
        layer = top.chain.parts.part(name).startswith("layer")
        state = optimizer_of(name, parameter.shape, recipe).state
        assert ("momentum" in state) == (layer and parameter.dim() > 1), name


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_pytorchs(momentum: float) -> None:
    recipe = make_recipe(optimizer="sgd", momentum=momentum, weight_decay=0.1)
    assert_same(recipe, lambda parameters, decay: DecoupledSGD(parameters, decay, momentum), 40, 24)
    assert len(optimizer_of(MATRIX, torch.Size([40, 24]), recipe).state) == (momentum > 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch, precision: str, optimizer: str) -> None:
    """Only sums in another order may round differently."""
    trained = []
    for size in (1 << 24, 256 * 7):
        monkeypatch.setattr(update_module, "UPDATE_SLICE", size)
        monkeypatch.setattr(optim_module, "UPDATE_SLICE", size)
        weight = nn.Parameter(weights(40, 128).to(torch.float32 if precision == "fp32" else torch.bfloat16))
        recipe = make_recipe(optimizer=optimizer, precision=precision)
        train(MATRIX, weight, recipe, noise(40, 128), steps=3)
        trained.append(weight.detach().float())
    if optimizer in ("adafactor", "muon"):
        assert torch.allclose(*trained, rtol=2**-7, atol=1e-4)
    else:
        assert torch.equal(*trained)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_is_changed_in_place(optimizer: str) -> None:
    """State may be in a mapped file, so its tensors must not be replaced."""
    recipe, weight = make_recipe(optimizer=optimizer, precision="bf16"), weights(64, 64)
    scratch = prepared(MATRIX, weight, recipe)
    forms = state_forms(MATRIX, weight, recipe)
    places = {key: scratch[key].data_ptr() for key in forms}
    before = {key: scratch[key].clone() for key in forms}
    scratch[gradient_key(MATRIX)] = noise(64, 64)(1)
    update(MATRIX, weight, scratch, recipe, scale=torch.tensor(0.5), step=1, learning_rate=RATE)
    assert gradient_key(MATRIX) not in scratch and len(list(scratch.values())) == len(forms)
    for key, (shape, dtype) in forms.items():
        assert (scratch[key].shape, scratch[key].dtype) == (shape, dtype)
        assert scratch[key].data_ptr() == places[key] and not torch.equal(scratch[key], before[key])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_masters_the_change_is_right_on_average(optimizer: str) -> None:
    """Many steps smaller than the spacing of bf16 numbers add up to the same change as in fp32."""
    gradient, ways = noise(128, 512), []
    for precision in ("fp32", "bf16-sr"):
        start = weights(128, 512).detach().bfloat16()
        weight = nn.Parameter(start.clone() if precision == "bf16-sr" else start.float())
        recipe = make_recipe(optimizer=optimizer, precision=precision, weight_decay=0.0)
        scratch = prepared(MATRIX, weight, recipe)
        assert master(MATRIX) not in scratch
        for step in range(1, 11):
            scratch[gradient_key(MATRIX)] = gradient(0).abs().add_(0.1)
            update(MATRIX, weight, scratch, recipe, scale=None, step=step, learning_rate=1e-3)
        ways.append((weight.detach().float() - start.float()).flatten().double())
    exact, rounded = ways
    assert torch.dot(rounded, exact) / exact.square().sum() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("field", READ_BY)
def test_a_field_that_an_optimizer_does_not_read_is_refused(field: str) -> None:
    given = {"model": "-", "data": "-", field: 0.5}
    for optimizer in OPTIMIZERS:
        if optimizer in READ_BY[field]:
            assert getattr(checked_recipe({**given, "optimizer": optimizer}), field) == 0.5
        else:
            with pytest.raises(
                RecipeError, match=f"{field} is read by .*{READ_BY[field][-1]} alone.*{optimizer}"
            ):
                checked_recipe({**given, "optimizer": optimizer})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_fields_said_to_be_read_are(optimizer: str) -> None:
    """Exactly the listed fields change an update."""
    for field, readers in READ_BY.items():
        ended = []
        for value in (Recipe.model_fields[field].default, 0.3):
            recipe = make_recipe(optimizer=optimizer).model_copy(update={field: value})
            several = [weights(16, 16), weights(16)]
            for parameter in several:
                train(MATRIX, parameter, recipe, noise(*parameter.shape), steps=3)
            ended.append(torch.cat([parameter.detach().flatten() for parameter in several]))
        assert torch.equal(*ended) == (optimizer not in readers), field


def test_the_recipe_names_every_optimizer() -> None:
    assert get_args(Recipe.model_fields["optimizer"].annotation) == tuple(OPTIMIZERS)
    assert set(READ_BY) <= set(Recipe.model_fields)
    assert {name for readers in READ_BY.values() for name in readers} <= set(OPTIMIZERS)


def test_stochastic_rounding_is_right_on_average_and_keeps_bf16_numbers() -> None:
    torch.manual_seed(0)
    exact = torch.full((200_000,), 1.0 + 0.3 * 2**-7)  # 0.3 of the way to the next bf16 number
    target = torch.empty(exact.shape, dtype=torch.bfloat16)
    round_stochastically_(target, exact)
    assert set(target.tolist()) == {1.0, 1.0 + 2**-7}
    assert target.double().mean().item() == pytest.approx(exact[0].item(), abs=3e-5)
    already = torch.randn(1000).bfloat16()
    target = torch.empty_like(already)
    round_stochastically_(target, already.float())
    assert torch.equal(target, already)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_rises_then_falls(schedule: str) -> None:
    recipe = make_recipe(schedule=schedule, warmup=0.1, learning_rate=0.01)
    rates = [learning_rate_at(recipe, step, 100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.001 * i for i in range(1, 11)])
    assert max(rates) == pytest.approx(0.01)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert (rates[-1] == pytest.approx(0.01)) if schedule == "constant" else (0 < rates[-1] < 2e-4)
    assert learning_rate_at(make_recipe(warmup=0.0), 1, 1) > 0


def test_each_precision_has_its_rounding() -> None:
    bf16, fp32 = (nn.Parameter(torch.arange(4.0, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    for precision, parameter, kind in (
        ("bf16", bf16, MasterRounding),
        ("bf16-sr", bf16, StochasticRounding),
        ("bf16-sr", fp32, InPlace),
        ("fp32", fp32, InPlace),
    ):
        recipe = make_recipe(precision=precision)
        scratch = prepared(MATRIX, parameter, recipe)
        rounding = rounding_of(MATRIX, parameter, scratch, recipe, 1)
        assert type(rounding) is kind, precision
        weight = rounding.exact(rounding.source.detach())
        assert weight.dtype == torch.float32
        shared = weight.data_ptr() == rounding.source.data_ptr()
        assert shared == (kind is not StochasticRounding)  # only then the update is made on a copy
        target = parameter.detach().clone()
        rounding.store(target, weight + 0.5)
        assert torch.equal(target, parameter) == (kind is InPlace)


def test_the_noise_of_a_step_depends_on_the_parameter_and_the_step() -> None:
    recipe, parameter = make_recipe(precision="bf16-sr"), nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    scratch, found = prepared(MATRIX, parameter, recipe), []
    for name, step in ((MATRIX, 1), (MATRIX, 1), (MATRIX, 2), (HEAD, 1)):
        target = torch.zeros(64, dtype=torch.bfloat16)
        rounding_of(name, parameter, scratch, recipe, step).store(target, torch.full((64,), 1 + 2**-9))
        found.append(target)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])
