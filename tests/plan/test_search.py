"""The chosen way, the reasons why others are refused, and the changes that would fit."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from talik.base.errors import DoesNotFitError
from talik.cli.main import main
from talik.data.examples import Example, Span
from talik.data.reading.rows import Place
from talik.machine.machine import HERE, Machine, described_machine, this_machine
from talik.model.folder import ModelFolder
from talik.model.freeze import trained_parameters
from talik.plan.changes import ThriftiestWay, most_layers, smallest_changes
from talik.plan.planned import Planned
from talik.plan.report import plan_text, short_text
from talik.plan.search import KEPT_CAUSES, Refused, Search, plan_run
from talik.plan.target import LEAST_SLACK, Target, slack_of
from talik.plan.ways import Way, ways_of
from talik.recipe.recipe import Recipe
from talik.recipe.thaw import parse_thaw
from talik.simulate.simulation import subject_of
from talik.training.run.checkpoints import state_bytes

WIDE = {"hidden_size": 256, "intermediate_size": 640, "vocab_size": 512, "head_dim": 64}
WIDE |= {"max_position_embeddings": 4096}


LONG = 2048  # tokens: micro-batches get no smaller, so that there are few ways


def examples(*lengths: int) -> list[Example]:
    made = []
    for length in lengths:
        spans = (Span(0, length // 2, False), Span(length // 2, length, True))
        ids = array("i", ((7 * place + length) % 300 + 3 for place in range(length)))
        made.append(Example(ids, spans, Place("made.jsonl", 1)))
    return made


def target(memory: int, disk: int | None = None) -> Target:
    """A target on a described machine, so that the memory of this program does not count."""
    machine: Machine = replace(this_machine(), name="another")
    return Target(machine, memory, memory, disk, 0)


@pytest.fixture(scope="module")
def folder(build_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only a config."""
    made = tmp_path_factory.mktemp("wide")
    build_model("qwen2", **WIDE).config.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return Recipe(model=str(folder), data="-", top_layers=2, precision="fp32")


@pytest.fixture(scope="module")
def roomy(recipe: Recipe, folder: Path, machine_json: str) -> Planned:
    """With memory for everything."""
    return plan_run(recipe, ModelFolder(folder), examples(*[250] * 12), target=target(64 << 30))


def test_a_config_is_enough(recipe: Recipe, folder: Path) -> None:
    planned = plan_run(recipe, ModelFolder(folder), target=target(64 << 30))
    assert (
        planned.fits
        and planned.assumed is not None
        and "one step of 2 examples of 2,048 tokens" in planned.assumed
    )
    report = planned.as_dict()
    assert report["chosen"]["cut"] == 2 and report["estimate"] is None
    assert report["peak_bytes"]["cpu"] == max(phase["peak_bytes"] for phase in report["phases"])
    assert report["chosen"]["promised"]["backward"] == planned.plan.promised["backward"]
    assert report["seconds"]["total"] > report["seconds"]["epoch"] > 0 < report["seconds"]["trunk"]


def test_a_smaller_way_is_found_where_the_first_does_not_fit(
    roomy: Planned, recipe: Recipe, folder: Path
) -> None:
    assert roomy.plan.micro_batch_tokens == 2048 and not roomy.plan.recompute and not roomy.refused
    budget = int(roomy.peak.bytes * 0.75) + LEAST_SLACK
    smaller = plan_run(recipe, ModelFolder(folder), examples(*[250] * 12), target=target(budget))
    assert smaller.fits
    assert smaller.plan.micro_batch_tokens < 2048 or smaller.plan.recompute
    assert smaller.peak.bytes + slack_of(smaller.peak.bytes) <= budget
    refused = smaller.refused[0]
    assert refused.simulated and refused.peak_bytes == roomy.peak.bytes
    assert refused.change == f"--memory {-(-(roomy.peak.bytes + LEAST_SLACK + 1) // 2**20)}MiB"
    streamed = replace(roomy, plan=roomy.plan.model_copy(update={"top": "streamed", "state": "disk"}))
    assert "chosen: trunk resident, micro-batches of 2,048 tokens, trained layers streamed" in plan_text(
        streamed
    )
    assert "chosen: " in plan_text(smaller) and "refused: micro-batches of 2,048" in plan_text(smaller)


def test_proposed_changes_are_simulated(recipe: Recipe, folder: Path) -> None:
    sets = examples(LONG), []
    needed = ThriftiestWay(ModelFolder(folder), sets, target(64 << 30)).peak(recipe)
    tight = target(int(needed * 0.97) + LEAST_SLACK)
    refused = plan_run(recipe, ModelFolder(folder), *sets, target=tight)
    assert not refused.fits and refused.breaks is not None
    changes = {
        change.options: change for change in smallest_changes(refused, recipe, ModelFolder(folder), sets)
    }
    assert "--top-layers 1" in changes
    for options, change in changes.items():
        fits = change.peak_bytes + slack_of(change.peak_bytes) <= tight.memory
        assert fits or options.startswith("--memory")
    assert len(changes) > 1 and all(change.note == "" for change in changes.values())
    one = recipe.model_copy(update={"top_layers": 1})
    assert plan_run(one, ModelFolder(folder), *sets, target=tight).fits
    more = next(options for options in changes if options.startswith("--memory"))
    memory = int(more.removeprefix("--memory ").removesuffix("MiB")) << 20
    assert memory < target(0).needed(refused.refused[0].peak_bytes), "not that of the first way"
    assert plan_run(recipe, ModelFolder(folder), *sets, target=target(memory)).fits


def test_the_most_layers_that_fit(recipe: Recipe, folder: Path) -> None:
    sets = examples(LONG), []
    thrift = ThriftiestWay(ModelFolder(folder), sets, target(64 << 30), streamed=False)
    peaks = [thrift.peak(recipe.model_copy(update={"top_layers": n})) for n in (1, 2, 3, 4)]
    assert peaks == sorted(peaks)
    for layers, peak in enumerate(peaks, start=1):
        known = ThriftiestWay(ModelFolder(folder), sets, target(peak + LEAST_SLACK), streamed=False)
        known._peaks = thrift._peaks  # nothing is simulated again
        assert known.most_layers(recipe, parse_thaw("top.4", 4)) == layers
    with pytest.raises(DoesNotFitError, match="not even one layer"):
        most_layers(recipe, ModelFolder(folder), sets, target(peaks[0] // 4 + LEAST_SLACK))


def test_a_way_is_refused_by_its_sizes_alone(
    recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients and AdamW's state of two trained layers, without a simulation."""
    search = Search(subject_of(recipe, ModelFolder(folder)), examples(LONG), [], target(64 << 30))
    tried = search.simulate_plan(search.first)
    (backward,) = (peak for peak in tried.phases if peak.phase == "backward")
    stays = sum(backward.causes.get(cause, 0) for cause in KEPT_CAUSES)
    assert 0.9 * stays < search._resident_bytes(search.first) <= stays
    tight = Search(
        subject_of(recipe, ModelFolder(folder)), examples(LONG), [], target(stays // 2 + LEAST_SLACK)
    )
    monkeypatch.setattr("talik.plan.search.simulate", None)
    found = tight.evaluate(Way(micro_batch_tokens=LONG))
    assert isinstance(found, Refused) and not found.refusal.simulated


def test_a_way_is_chosen_again_if_planning_itself_took_the_memory(
    roomy: Planned, recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first way fits the target, and no longer if the program is measured after the simulation."""
    tight = target(roomy.peak.bytes + LEAST_SLACK)
    grown = replace(tight, program=roomy.peak.bytes // 4)
    monkeypatch.setattr(Target, "now", lambda _: grown)
    planned = plan_run(recipe, ModelFolder(folder), examples(*[250] * 12), target=tight)
    assert planned.fits and planned.target is grown and planned.plan.promised["program"] == grown.program
    assert planned.refused[0].peak_bytes == roomy.peak.bytes + grown.program


@pytest.mark.parametrize("inputs", ["memory", "disk"])
def test_a_glimpse_of_a_streamed_step_has_the_peaks_of_the_step(
    recipe: Recipe, folder: Path, inputs: str
) -> None:
    """Except in the update, until which the glimpse holds the pending micro-batches too long."""
    search = Search(subject_of(recipe, ModelFolder(folder)), examples(*[250] * 9), [], target(64 << 30))
    way = {"top": "streamed", "recompute": True, "micro_batch_tokens": 256, "inputs": inputs}
    plan = search.first.model_copy(update=way)
    glimpse, whole = (
        {peak.phase: peak.bytes for peak in search.simulate_plan(plan, glimpse=glimpse).phases}
        for glimpse in (True, False)
    )
    for phase in whole:
        rel = 0.03 if phase == "update" else 0.001
        assert glimpse[phase] == pytest.approx(whole[phase], rel=rel), phase


def test_a_disk_that_is_too_small_does_not_fit(roomy: Planned, recipe: Recipe, folder: Path) -> None:
    assert roomy.fits and roomy.disk["cache"] == 12 * 250 * 256 * 4
    short = replace(roomy, target=target(64 << 30, disk=roomy.disk_bytes - 1))
    assert not short.fits and short.disk_missing == 1
    assert "the disk lacks 1 B" in plan_text(short) and short.problem == "the disk lacks 1 B"
    (change,) = smallest_changes(short, recipe, ModelFolder(folder), (examples(250), []))
    assert change.options == f"--disk {-(-short.disk_bytes // 2**20)}MiB"


def test_a_device_keeps_in_ram_or_on_disk_what_it_has_no_room_for(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
    build_model("qwen2", **{**WIDE, **sizes}).config.save_pretrained(tmp_path)
    recipe = Recipe(model=str(tmp_path), data="-", top_layers=3)
    made, gpu = examples(LONG), Target(described_machine("RTX 4090"), 8 << 30, 32 << 30, None, 1 << 30)
    search = Search(subject_of(recipe, ModelFolder(tmp_path)), made, [], gpu)
    plans = [way.apply(search.first) for way in ways_of(search.first, LONG)][2:]
    tiers = [("resident", "memory"), ("resident", "ram"), ("streamed", "ram"), ("streamed", "ram")]
    assert [(plan.top, plan.state) for plan in plans] == [*tiers, ("streamed", "disk")]
    peaks = [search.simulate_plan(plan).peak.bytes for plan in plans[:3]]
    assert peaks[0] > peaks[1] > peaks[2]
    state = state_bytes(trained_parameters(search.subject.chain.model), recipe)
    assert search.ram(plans[1]) - search.ram(plans[0]) == state
    little = replace(gpu, memory=gpu.needed(peaks[2]), ram=search.ram(plans[0]) + state)
    planned = plan_run(recipe, ModelFolder(tmp_path), made, target=little)
    assert planned.fits and planned.plan.state == planned.plan.inputs == "disk"
    assert "streamed from a working copy, optimizer state and layer inputs on disk" in plan_text(planned)
    for text in (plan_text(planned), "\n".join(short_text(planned)), str(planned.as_dict()["estimate"])):
        assert "have not been compared with a device" in text
    refused = next(r for r in planned.refused if r.way.inputs == "ram")
    assert "of host RAM" in refused.reason
    more = int(str(refused.change).removeprefix("--ram ").removesuffix("MiB")) << 20
    enough = plan_run(recipe, ModelFolder(tmp_path), made, target=replace(little, ram=more))
    assert enough.fits and (enough.plan.top, enough.plan.state) == ("streamed", "ram")


def test_experts_have_a_range(build_model: Callable[..., Any], tmp_path: Path) -> None:
    build_model("mixtral", num_local_experts=4, hidden_size=64, intermediate_size=160).config.save_pretrained(
        tmp_path
    )
    recipe = Recipe(model=str(tmp_path), data="-", top_layers=1, precision="fp32", max_length=128)
    planned = plan_run(recipe, ModelFolder(tmp_path), examples(100, 90), target=target(64 << 30))
    assert planned.least is not None
    assert 0 < planned.least <= planned.peak.bytes


def test_the_trunk_is_streamed_where_it_does_not_fit(recipe: Recipe, folder: Path) -> None:
    one = recipe.model_copy(update={"thaw": "norm,head"})
    search = Search(subject_of(one, ModelFolder(folder)), examples(64, 64), [], target(64 << 30))
    tried = search.simulate_plan(search.first)
    trunk = max(peak.bytes for peak in tried.phases if peak.phase == "trunk")
    assert tried.plan.trunk == "resident"
    search = Search(
        subject_of(one, ModelFolder(folder)), examples(64, 64), [], target(trunk - 1 + LEAST_SLACK)
    )
    plan = search.first.model_copy(update={"trunk": "resident"})
    assert search.simulate_plan(plan).plan.trunk == "streamed"


def test_the_command_says_what_does_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["plan", str(folder), "--top-layers", "2"]
    assert main([*options, "--memory", "100MiB", "--json"]) == 3
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert not report["fits"] and report["breaks"]["bytes"] > 0 and len(report["refused"]) > 1
    assert report["changes"][0]["options"].startswith("--memory")
    assert "no way to run this fits 100.0 MiB: " in err and "are missing" in err and "--memory" in err
    assert main([*options, "--memory", "plenty"]) == 2
    assert main(["plan", str(folder), "--top-layers", "9"]) == 2
    assert main([*options, "--memory", "0"]) == 3
    assert main([*options, "--machine", "T4", "--device", "cpu"]) == 2
    assert main([*options, "--picture", "memory.gif"]) == 2
    err = capsys.readouterr().err
    assert "0 B" in err and "leave out --device" in err and err.count("cannot be a .gif") == 1


def test_assumed_examples_are_limited_by_the_positions_of_the_model(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["plan", str(model_folder), "--top-layers", "1"]
    assert main(plan) == 0
    assert "16 examples of 256 tokens" in capsys.readouterr().out
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"input": "What?", "output": "Yes. " * 300}), encoding="utf-8")
    assert main([*plan, str(rows)]) == 2
    assert "the model has 256 positions" in capsys.readouterr().err


def test_the_command_plans_for_free_memory_and_chooses_layers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(folder), "--top-layers", "auto"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("fits: ") and "program" in out and HERE not in out


def test_fewer_layers_are_proposed_for_layers_given_by_name(recipe: Recipe, folder: Path) -> None:
    """The proposal is the --thaw option with fewer of the named layers."""
    sets = examples(64, 64), []
    named = Recipe(model=str(folder), data="-", thaw="layers.0-1,layers.3,head", precision="fp32")
    needed = ThriftiestWay(ModelFolder(folder), sets, target(64 << 30)).peak(named)
    tight = target(int(needed * 0.98) + LEAST_SLACK)
    refused = plan_run(named, ModelFolder(folder), *sets, target=tight)
    assert not refused.fits and refused.plan.cut == 0
    options = {change.options for change in smallest_changes(refused, named, ModelFolder(folder), sets)}
    assert "--thaw top.1,head" in options
