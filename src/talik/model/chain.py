"""A model as a chain of blocks, each run by the model's own code: embed -> layer 0 .. L-1 -> tail.

This is the only file that knows how Transformers models are built. The *skeleton forward* runs the model's
own forward with every layer's forward replaced by a recorder that notes what the layer would have got (masks,
positions, rotary tables) and hands the hidden states on. Any layer then runs by itself, in any order. The
*tail* is the model's own forward with the last layer's forward replaced by one that returns given hidden
states, so final norms, soft-capping and scaling are the model's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from talik.errors import ChainError, SourceError
from talik.model.anatomy import parts_of


@dataclass(frozen=True, slots=True)
class Call:
    """What one layer is called with, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _AllRecorded(Exception):
    """Ends a skeleton forward after the last layer."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What the model does around its layers for one batch: the embedded tokens and every layer's call."""

    embedded: Float[Tensor, "batch sequence hidden"]
    calls: tuple[Call, ...]


class Chain:
    """The blocks of a causal language model from Transformers; the model itself is left as it is.

    Raises ChainError for a model whose layers are not called once each, in order, with hidden states that
    they hand on.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.parts = parts_of(model)
        self.layers: list[nn.Module] = list(model.get_submodule(self.parts.layers))  # pyright: ignore[reportArgumentType]
        self.embedding = model.get_submodule(self.parts.embedding)
        self._returns = self._probe()

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings."""
        return self.embedding.weight.dtype  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    def handed_on(self, cut: int) -> torch.dtype:
        """The dtype of what goes into layer `cut`: fp32 in a bf16 model that keeps its residual in fp32."""
        return self._dtypes[cut]

    @property
    def hidden_size(self) -> int:
        return self._hidden_size

    def skeleton(
        self,
        input_ids: Int[Tensor, "batch sequence"],
        attention_mask: Int[Tensor, "batch sequence"] | None = None,
        *,
        embed: bool = True,
    ) -> Skeleton:
        """Runs the model's own forward without its layers. No gradient flows through what it returns.

        Without `embed` the embeddings are not looked up: `embedded` is zeros, the calls are the same.
        """
        calls: list[Call] = []

        def record(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            calls.append(Call(args, kwargs))
            seen.append(hidden)
            if len(calls) == len(self.layers):
                raise _AllRecorded  # the tail, with the logits of every token, is not wanted
            return hidden

        seen: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(contextlib.suppress(_AllRecorded))
            for layer, wrap in zip(self.layers, self._returns, strict=True):
                stack.enter_context(_forward(layer, _standing_in(record, wrap)))
            if not embed:
                stack.enter_context(self._no_embedding())
            self._run(input_ids, attention_mask)
        return Skeleton(seen[0], tuple(calls))

    def layer(
        self, index: int, hidden: Float[Tensor, "batch sequence hidden"], call: Call
    ) -> Float[Tensor, "batch sequence hidden"]:
        """One layer by itself, with the gradient mode that the caller is in."""
        out = self.layers[index](hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def tail(
        self, hidden: Float[Tensor, "batch sequence hidden"]
    ) -> Float[Tensor, "batch sequence vocabulary"]:
        """The logits of what the last layer handed on; positions do not matter here."""

        def given(_: Tensor, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Tensor:
            return hidden

        def handed_on(hidden: Tensor, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Tensor:
            return hidden

        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with contextlib.ExitStack() as stack:
            for layer, wrap in zip(self.layers[:-1], self._returns, strict=False):
                stack.enter_context(_forward(layer, _standing_in(handed_on, wrap)))
            stack.enter_context(_forward(self.layers[-1], _standing_in(given, self._returns[-1])))
            stack.enter_context(self._no_embedding())
            return self._run(ids, None).logits

    def _run(self, input_ids: Tensor, attention_mask: Tensor | None) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    def _no_embedding(self) -> contextlib.AbstractContextManager[None]:
        def zeros(ids: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, self._embedding_size, dtype=self.dtype, device=ids.device)

        return _forward(self.embedding, zeros)

    def _probe(self) -> list[Callable[[Tensor], Any]]:
        """Runs two tokens through the model to see what each layer returns and that each is called once."""
        returned: list[tuple[int, Any]] = []
        embedded: list[Any] = []
        into: list[torch.dtype] = []
        hooks = [
            layer.register_forward_hook(lambda _m, _a, out, i=i: returned.append((i, out)))
            for i, layer in enumerate(self.layers)
        ]
        hooks.append(self.embedding.register_forward_hook(lambda _m, _a, out: embedded.append(out)))
        hooks.append(
            self.layers[0].register_forward_pre_hook(
                lambda _m, args, kwargs: into.append((args[0] if args else kwargs["hidden_states"]).dtype),
                with_kwargs=True,
            )
        )
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        try:
            with torch.no_grad(), _evaluating(self.model):
                self._run(ids, None)
        finally:
            for hook in hooks:
                hook.remove()
        called = [i for i, _ in returned]
        if called != list(range(len(self.layers))):
            raise ChainError(
                f"{type(self.model).__name__} calls its layers in the order {called}, "
                f"and a chain needs 0 to {len(self.layers) - 1}, once each"
            )
        self._embedding_size = embedded[0].shape[-1]
        outputs = [out for _, out in returned]
        self._dtypes = [into[0], *(_first(out).dtype for out in outputs)]
        self._hidden_size = _first(outputs[0]).shape[-1]
        return [_wrap_as(out) for out in outputs]


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _wrap_as(out: Any) -> Callable[[Tensor], Any]:
    """How a layer that returned `out` hands hidden states on: bare, or first in a tuple.

    What else was in the tuple (attention weights, mostly) becomes None: a model that needs it fails at once.
    """
    if isinstance(out, Tensor):
        return lambda hidden: hidden
    if isinstance(out, tuple) and isinstance(out[0], Tensor):
        rest = (None,) * (len(out) - 1)
        return lambda hidden: (hidden, *rest)
    raise ChainError(f"a layer hands on a {type(out).__name__} where hidden states were expected")


def _standing_in(act: Callable[..., Tensor], wrap: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            return wrap(act(args[0], args[1:], kwargs))
        kwargs = dict(kwargs)
        return wrap(act(kwargs.pop("hidden_states"), (), kwargs))

    return forward


@contextlib.contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` with another forward: everything else asked of it is still answered by itself."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode, every module's own mode put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def first_trained_layer(chain: Chain) -> int:
    """The cut: the first layer that has a trained parameter, or the number of layers if none has."""
    trained = (any(p.requires_grad for p in layer.parameters()) for layer in chain.layers)
    return next((i for i, yes in enumerate(trained) if yes), len(chain.layers))


@torch.no_grad()
def verify_chain(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch sequence"],
    attention_mask: Int[Tensor, "batch sequence"] | None = None,
) -> float:
    """The largest absolute difference between the logits of the model's plain forward and of the chain.

    Twice: from layer 0, and from the cut with the calls of a fresh skeleton. The cut is the first layer with
    a trained parameter (the middle one if every layer is trained, or none). Same shapes and kernels, so 0.0
    is the only good answer; positions where `attention_mask` is 0 are left out; inf stands for a difference
    that is not a number.
    """
    chain = Chain(model)
    cut = first_trained_layer(chain)
    if not 0 < cut < len(chain.layers):
        cut = len(chain.layers) // 2
    with _evaluating(model):
        plain = chain._run(input_ids, attention_mask).logits
        skeleton = chain.skeleton(input_ids, attention_mask)
        at_cut = run_layers(chain, range(cut), skeleton.embedded, skeleton.calls)
        whole = chain.tail(run_layers(chain, range(cut, len(chain.layers)), at_cut, skeleton.calls))
        fresh = chain.skeleton(input_ids, attention_mask, embed=False)
        top = chain.tail(run_layers(chain, range(cut, len(chain.layers)), at_cut, fresh.calls))
    counted = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    gaps = [(logits - plain).float()[counted.bool()].abs().max().item() for logits in (whole, top)]
    return max(float("inf") if gap != gap else gap for gap in gaps)


def run_layers(
    chain: Chain,
    indices: range,
    hidden: Float[Tensor, "batch sequence hidden"],
    calls: tuple[Call, ...],
) -> Float[Tensor, "batch sequence hidden"]:
    """Layers one after the other."""
    for index in indices:
        hidden = chain.layer(index, hidden, calls[index])
    return hidden


def load_model(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The causal LM in a local folder, as Transformers loads it, in eval mode. No remote code, no pickle."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # Transformers would fill them with random numbers
        shown = ", ".join(missing[:5])
        raise SourceError(f"the weights lack {len(missing)} tensors: {shown}", where=folder)
    return model.to(torch.device(device)).eval()
