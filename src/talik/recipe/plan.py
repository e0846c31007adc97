"""The plan of a run (plan.json): how it is carried out on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from talik.base.errors import RecipeError
from talik.base.files import read_json

Tier = Literal["memory", "ram", "disk"]  # the device's memory, the RAM beside it, files


class Plan(BaseModel):
    """How a run is carried out: what was chosen for this machine. Resume never chooses again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = Field(description="where the model is")
    threads: int = Field(description="threads of a CPU kernel; another number may round differently")
    cut: int = Field(description="the first trained layer")
    layers: int = Field(description="layers of the model")
    trunk: Literal["resident", "streamed"] = Field(
        description="where the frozen weights are while they run: in memory, or one layer at a time"
    )
    top: Literal["resident", "streamed"] = Field(
        description="where the trained weights are: in memory, or in a working copy and one layer at a time"
    )
    state: Tier = Field(
        default="memory", description="where masters, optimizer state and gradients that wait are"
    )
    inputs: Tier = Field(
        default="memory", description="streamed: where what goes into each layer waits for the backward"
    )
    cache: Literal["disk", "none"] = Field(
        description="where the trunk's hidden states are kept; none where the embeddings are trained"
    )
    trunk_batch_tokens: int = Field(description="tokens that go through the trunk at once")
    hidden_bytes: int = Field(
        description="what is held between the trunk's layers, about; a shard of the data"
    )
    micro_batch_tokens: int = Field(description="tokens that go through the top at once, padding included")
    loss_chunk: int = Field(description="trained positions whose logits exist at once")
    recompute: bool = Field(description="whether the backward runs each layer again, with nothing kept of it")
    promised: dict[str, int] = Field(
        default={},
        description="memory that each phase takes at most, in bytes, the program's included; it alone, too",
    )

    def tier(self, kind: str) -> Tier:
        """Where tensors of a kind ("input", "pending", "master", ...) are while they wait."""
        if kind == "input":
            return self.inputs
        on_device = ("gradient", "norm", "pending") if self.top == "resident" else ("gradient", "norm")
        return "memory" if kind in on_device else self.state


def read_plan(path: Path) -> Plan:
    """The plan of a plan.json. RecipeError for a file that is missing or none of this version."""
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
