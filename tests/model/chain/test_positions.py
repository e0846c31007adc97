"""The last layer at some positions alone, beside the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.tiny_models import tiny_model
from talik.model.chain.chain import Chain, run_layers

FOUND = {
    "llama": ("self_attn.q_proj", "self_attn.o_proj", "mlp"),
    "gpt2": ("attn.c_proj", "mlp"),  # query, key and value are one product
    "gpt_neox": ("attention.dense", "mlp"),  # attention and MLP side by side
    "opt": ("self_attn.q_proj", "self_attn.out_proj"),  # it flattens what goes into its MLP
    "mixtral": ("self_attn.q_proj", "self_attn.o_proj", "mlp"),
    "gemma2": ("self_attn.q_proj", "self_attn.o_proj", "mlp"),
    "deepseek_v3": ("self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.o_proj", "mlp"),
    "mamba": ("mixer.out_proj",),
    "falcon_h1": ("feed_forward", "mamba.out_proj", "self_attn.q_proj", "self_attn.o_proj"),
    "gpt_oss": ("self_attn.q_proj", "self_attn.o_proj"),
    "gemma3n_text": (),  # it hands on several streams
}
ROWS = torch.tensor([2, 3, 7, 15, 20, 31])  # of 3 times 11


@pytest.mark.parametrize("name", list(FOUND))
def test_only_what_the_trained_positions_need_is_run(name: str) -> None:
    model = tiny_model(name)
    chain = Chain(model)
    assert chain._facts.alone == FOUND[name]
    tokens: dict[str, list[int]] = {part: [] for part in FOUND[name]}
    for part, counts in tokens.items():
        module = chain.layers[-1].get_submodule(part)
        vars(module)["forward"] = partial(counted, module.forward, counts)
    whole, some = (last_layer(chain, rows) for rows in (None, ROWS))
    assert tokens == {part: [33, len(ROWS)] for part in FOUND[name]}
    torch.testing.assert_close(some.flatten(0, 1)[ROWS], whole.flatten(0, 1)[ROWS], rtol=1e-5, atol=1e-5)


def counted(own: Callable[[Tensor], Any], counts: list[int], hidden: Tensor) -> Any:
    counts.append(hidden.shape[:2].numel())
    return own(hidden)


def last_layer(chain: Chain, rows: Tensor | None) -> Tensor:
    ids = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(0))
    skeleton = chain.skeleton(ids)
    with torch.no_grad():
        return run_layers(chain, range(len(chain.layers)), skeleton.embedded, skeleton.calls, rows)


class Mixed(nn.Module):
    """An MLP that shows every token a little of those before it."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, hidden: Tensor) -> Tensor:
        return self.own(hidden) + hidden.cumsum(1)


def test_what_mixes_tokens_is_run_at_all_of_them_and_so_is_what_it_mixes() -> None:
    model: Any = tiny_model("llama")
    model.model.layers[-1].mlp = Mixed(model.model.layers[-1].mlp)
    assert Chain(model)._facts.alone == ("mlp.own",)


def test_no_position_but_the_trained_ones_gets_the_layers_result() -> None:
    chain = Chain(tiny_model("llama"))
    whole, some = (last_layer(chain, rows).flatten(0, 1) for rows in (None, ROWS))
    others = [row for row in range(33) if row not in ROWS]
    assert (some[others] - whole[others]).abs().amin(0).max() > 1e-3


def test_layers_before_the_last_are_run_whole() -> None:
    chain = Chain(tiny_model("llama"))
    skeleton = chain.skeleton(torch.arange(3, 36).view(3, 11))
    with torch.no_grad():
        whole, some = (chain.layer(0, skeleton.embedded, skeleton.calls[0], rows) for rows in (None, ROWS))
    assert torch.equal(whole, some)


def test_what_chooses_keys_is_run_at_all_positions() -> None:
    """However few tokens are looked at: of so few sparse attention's indexer chooses all."""
    alone = Chain(tiny_model("deepseek_v32", index_topk=64))._facts.alone
    assert alone and not [name for name in alone if "indexer" in name]
