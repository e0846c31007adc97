"""The plan of a run (plan.json): how it is carried out on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from talik.base.errors import RecipeError
from talik.base.files import read_json

Tier = Literal["memory", "ram", "disk"]  # the device's memory, host RAM, files


class Plan(BaseModel):
    """How a run is carried out: everything that was chosen for this machine. `resume` uses it unchanged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = Field(description="where the model is")
    threads: int = Field(description="threads of a CPU kernel; another number may round differently")
    cut: int = Field(description="the first trained layer")
    layers: int = Field(description="layers of the model")
    trunk: Literal["resident", "streamed"] = Field(
        description="where the frozen weights are held while they run: in memory, or one layer at a time"
    )
    top: Literal["resident", "streamed"] = Field(
        description="where the trained weights are held: in memory, or in a working copy on disk"
    )
    state: Tier = Field(
        default="memory", description="where masters, optimizer state and pending gradients are held"
    )
    inputs: Tier = Field(
        default="memory", description="streamed: where layer inputs are held for the backward"
    )
    cache: Literal["disk", "none"] = Field(
        description="where the trunk's hidden states are kept; none if the embeddings are trained"
    )
    trunk_batch_tokens: int = Field(description="tokens of a batch of the trunk")
    hidden_bytes: int = Field(
        description="bytes of hidden states held between layers of the trunk, about; sets the size of a shard"
    )
    micro_batch_tokens: int = Field(description="tokens of a micro-batch, padding included")
    loss_chunk: int = Field(description="trained positions whose logits exist at once")
    recompute: bool = Field(
        description="whether the backward recomputes each layer in place of keeping its activations"
    )
    promised: dict[str, int] = Field(
        default={},
        description="peak bytes of each phase, with the Python process, which is the key 'program'",
    )

    def tier(self, kind: str) -> Tier:
        """Where tensors of a kind ("input", "pending", "master", ...) are held while they are not in use."""
        if kind == "input":
            return self.inputs
        on_device = ("gradient", "norm", "pending") if self.top == "resident" else ("gradient", "norm")
        return "memory" if kind in on_device else self.state


def read_plan(path: Path) -> Plan:
    """Reads a plan.json.

    Raises:
        RecipeError: The file is missing, is not JSON, or belongs to another version.
    """
    if not path.is_file():
        raise RecipeError("there is no such plan", where=path.absolute(), remedy="Name a run's plan.json.")
    try:
        return Plan.model_validate(read_json(path, once=True))
    except ValidationError as error:
        problem = f"is not a plan of this version of Talik ({error.error_count()} fields differ)"
        remedy = "Go on with the version that the run began with, or begin a new run."
        raise RecipeError(problem, where=path, remedy=remedy) from None
    except ValueError as error:
        raise RecipeError(f"is not JSON: {error}", where=path, remedy="Name a run's plan.json.") from None
