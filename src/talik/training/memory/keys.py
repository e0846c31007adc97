"""Names of the tensors in the scratch.

A key is written as `kind/name`, for example "master/model.norm.weight"; files in the run's working folder and
tensors in a checkpoint bear this text.
"""

from __future__ import annotations

from dataclasses import dataclass

GRADIENT, PENDING, MASTER, INPUT = "gradient", "pending", "master", "input"


@dataclass(frozen=True, slots=True)
class Key:
    """The name of one tensor in the scratch.

    Attributes:
        kind: Decides where the tensor is stored (`Plan.tier`): "gradient", "pending", "master", "input",
            "norm", or a tensor of the optimizer's state ("exp_avg", "momentum", ...).
        name: The parameter that the tensor belongs to, or a place in the model; empty for "norm".
    """

    kind: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}" if self.name else self.kind

    @classmethod
    def parse(cls, text: str) -> Key:
        """Reads a key from its text."""
        kind, _, name = text.partition("/")
        return cls(kind, name)


NORM = Key("norm")  # the gradient norm of the last step


def gradient(name: str) -> Key:
    """The gradient of a parameter while it is accumulated or used for the update; fp32."""
    return Key(GRADIENT, name)


def pending(name: str) -> Key:
    """The gradient of a parameter while it waits for the norm of all, or for a tied block; fp32."""
    return Key(PENDING, name)


def master(name: str) -> Key:
    """The fp32 master of a bf16 parameter."""
    return Key(MASTER, name)


def layer_input(layer: int, batch: int) -> Key:
    """The hidden states that one micro-batch of the step passes into a layer."""
    return Key(INPUT, f"{layer}/{batch}")


def layer_of_input(key: Key) -> int | None:
    """The layer that a tensor is the input of; None for every other kind of tensor."""
    return int(key.name.partition("/")[0]) if key.kind == INPUT else None
