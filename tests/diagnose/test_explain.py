"""Every common mistake is found in a script that contains it, and nothing in a correct script."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, PreTrainedModel

from talik.base.errors import SourceError, UsageError
from talik.data.labels import make_examples
from talik.data.messages import Conversation, Message
from talik.data.reading.rows import Place
from talik.diagnose.batch import batch_findings
from talik.diagnose.explanation import Explanation, explain
from talik.diagnose.loop import unchanged

Build = Callable[..., Any]
Batch = dict[str, Tensor]
CUT = 2  # of three layers the last is trained


@pytest.fixture(scope="module")
def build_model(build_model: Build) -> Build:
    """Three layers, because operators on fake tensors are slow."""
    return partial(build_model, num_hidden_layers=CUT + 1)


def habits(explained: Explanation) -> list[str]:
    return sorted(finding.habit for finding in explained.findings)


def frozen(model: Any, *, embeddings: bool = True) -> Any:
    """Only the last layer, the norm and a head of its own are trained."""
    for layer in model.model.layers[:CUT]:
        layer.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(not embeddings)
    return model.train()


def answered(tokenizer: Any, *texts: tuple[str, str]) -> Batch:
    """A correct, padded batch."""
    chats = [
        Conversation((Message("user", q), Message("assistant", a)), Place("made", i + 1))
        for i, (q, a) in enumerate(
            texts or (("What is 1 plus 2?", "3."), ("And 2 plus 5, please?", "It is 7."))
        )
    ]
    made, _ = make_examples(chats, tokenizer)
    length = max(example.length for example in made)
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([[*e.input_ids, *[pad] * (length - e.length)] for e in made]),
        "attention_mask": torch.tensor([[1] * e.length + [0] * (length - e.length) for e in made]),
        "labels": torch.tensor([[*e.labels, *[-100] * (length - e.length)] for e in made]),
    }


def large(positions: int = 256, trained: int = 64) -> Batch:
    ids = torch.arange(4 * positions).reshape(4, positions) % 300 + 3
    labels = ids.clone()
    labels[:, : positions - trained] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def offload(model: Any, folder: Path, where: str, layers: range) -> Any:
    """As accelerate does it for a device map with these layers on the disk or in the CPU's memory."""
    if where == "cpu":
        for index in layers:
            accelerate.cpu_offload(model.model.layers[index], execution_device=torch.device("cpu"))
        return model
    places: dict[str, Any] = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    places |= {f"model.layers.{i}": "disk" if i in layers else "cpu" for i in range(CUT + 1)}
    main: Any = "cpu"  # as a torch.device it would be taken for another than the map's
    return accelerate.dispatch_model(
        model, places, main_device=main, offload_dir=str(folder), force_hooks=True
    )


def checkpointed(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old name is the one that people use
        model.gradient_checkpointing_enable()
    return model


def saved_in_reality(model: Any, batch: Batch, layers: int) -> int:
    """Bytes of storages other than parameters that autograd saves while the first layers run."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    inside = [False]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if inside[0] and storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def turn(value: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            inside[0] = value

        return hook

    handles = [
        h
        for layer in model.model.layers[:layers]
        for h in (layer.register_forward_pre_hook(turn(True)), layer.register_forward_hook(turn(False)))
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    for handle in handles:
        handle.remove()
    return sum(saved.values())


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_nothing_is_found_in_a_right_script(build_model: Build, tokenizer: Any, kind: str) -> None:
    model = build_model(kind)
    model.requires_grad_(False)
    layers = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
    layers[-1].requires_grad_(True)
    explained = explain(model.train(), answered(tokenizer), tokenizer)
    assert not explained.findings
    assert explained.peak is not None and explained.peak.bytes > sum(p.nbytes for p in model.parameters())
    assert explained.why == "layer 2: its own parameters are trained"
    assert str(explained).startswith("nothing found")


def test_nothing_is_found_in_full_fine_tuning_or_without_a_batch_s_labels(
    build_model: Build, tokenizer: Any
) -> None:
    model, batch = checkpointed(build_model("qwen2").train()), answered(tokenizer)
    assert not explain(model, batch, tokenizer).findings
    assert not explain(model, {"input_ids": batch["input_ids"]}).findings


def test_embeddings_that_still_require_a_gradient(build_model: Build, tokenizer: Any) -> None:
    model, batch = frozen(build_model("qwen2"), embeddings=False), answered(tokenizer)
    explained = explain(model, {**batch, "use_cache": False}, tokenizer)
    (finding,) = explained.findings
    assert (finding.habit, finding.where) == ("trainable-embeddings", "model.embed_tokens.weight")
    assert finding.what.startswith("layer 0 to layer 1:")
    real = saved_in_reality(model, batch, CUT)
    assert abs(finding.number - real) < 0.12 * real
    exec(finding.line, {"model": model})
    assert not explain(model, batch, tokenizer).findings


def test_a_head_tied_to_the_embeddings_is_named(build_model: Build, tokenizer: Any) -> None:
    model = frozen(build_model("qwen2", tie_word_embeddings=True), embeddings=False)
    (finding,) = explain(model, answered(tokenizer)).findings
    assert finding.habit == "trainable-embeddings" and "tied" in finding.what


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_offloaded_layers_whose_copies_are_kept(
    build_model: Build, tokenizer: Any, tmp_path: Path, where: str
) -> None:
    model, batch = frozen(build_model("qwen2"), embeddings=False), answered(tokenizer)
    size = sum(p.nbytes for p in model.model.layers[0].parameters() if p.dim() > 1)
    offload(model, tmp_path, where, range(CUT))
    explained = explain(model, batch, tokenizer)
    assert habits(explained) == ["offloaded", "trainable-embeddings"]
    found = next(finding for finding in explained.findings if finding.habit == "offloaded")
    norms = 2 * 32 * 4  # whose copies are kept, too
    assert CUT * size <= found.number <= CUT * (size + norms)
    before = [p.device for p in model.parameters()]
    exec(found.line, {"model": model})
    assert not explain(model, batch, tokenizer).findings
    assert [p.device for p in model.parameters()] == before
    assert model(**batch).loss.isfinite()


def test_layers_that_a_device_map_left_on_the_disk(
    build_model: Build, tokenizer: Any, tmp_path: Path
) -> None:
    build_model("qwen2").save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i < CUT else "cpu" for i in range(CUT + 1)}
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=str(tmp_path / "away")
    )
    explained = explain(frozen(model, embeddings=False), answered(tokenizer), tokenizer)
    assert habits(explained) == ["offloaded", "trainable-embeddings"]
    assert not explain(frozen(model), answered(tokenizer), tokenizer).findings


def test_checkpointing_puts_the_trunk_back(build_model: Build, tokenizer: Any) -> None:
    model, batch = frozen(checkpointed(build_model("qwen2"))), answered(tokenizer)
    explained = explain(model, batch, tokenizer)
    assert explained.peak is not None, explained.assumed
    (finding,) = explained.findings
    assert finding.habit == "checkpointing" and "make_inputs_require_grads" in finding.what
    exec(finding.line, {"model": model})
    assert not explain(model, batch, tokenizer).findings


def test_somebody_s_own_hook_is_named(build_model: Build, tokenizer: Any) -> None:
    def wake(module: nn.Module, args: Any, out: Any) -> Any:
        return (out[0] if isinstance(out, tuple) else out).requires_grad_()

    model = frozen(build_model("qwen2"))
    model.model.layers[0].register_forward_hook(wake)
    (finding,) = explain(model, answered(tokenizer)).findings
    assert finding.habit == "in-the-graph" and "wake" in finding.what and "layers.0" in finding.where
    assert finding.what.startswith("layer 0 to layer 1")


def test_trained_layers_that_are_offloaded(build_model: Build, tokenizer: Any, tmp_path: Path) -> None:
    model, batch = frozen(build_model("qwen2")), answered(tokenizer)
    weights = sum(p.nbytes for p in model.model.layers[CUT].parameters())
    offload(model, tmp_path, "disk", range(CUT, CUT + 1))
    (finding,) = explain(model, batch, tokenizer).findings
    assert (finding.habit, finding.number) == ("offloaded-top", weights)
    assert '"model.layers.2": 0' in finding.line
    model(**batch).loss.backward()
    assert all(p.grad is None for p in model.model.layers[CUT].parameters())


def test_logits_that_are_the_larger_part_of_the_peak(build_model: Build) -> None:
    model, batch = frozen(build_model("qwen2", vocab_size=50_000)), large()
    model.lm_head.requires_grad_(False)
    explained = explain(model, batch)
    (finding,) = explained.findings
    assert finding.habit == "full-logits"
    assert finding.number % (4 * 256 * 50_000 * 4) == 0 and finding.number >= 2 * 4 * 256 * 50_000 * 4
    keep = (batch["labels"][:, 1:] != -100).any(0).nonzero().squeeze(1)
    assert not explain(model, {**batch, "logits_to_keep": keep}).findings
    assert not explain(model, large(positions=8, trained=4)).findings


def test_the_line_against_large_logits_gives_the_same_loss(build_model: Build) -> None:
    model, names = frozen(build_model("qwen2", vocab_size=50_000)), {"torch": torch}
    model.lm_head.requires_grad_(False)
    (finding,) = explain(model, large()).findings
    small = large(positions=12, trained=5)
    own = {"model": model, **names, **small}
    exec(finding.line, own)
    assert torch.allclose(own["loss"], model(**small).loss)


def test_batches_with_a_dimension_too_many(build_model: Build, tokenizer: Any) -> None:
    batch = {key: value[:, None] for key, value in answered(tokenizer).items()}
    explained = explain(frozen(build_model("qwen2")), batch, tokenizer)
    (finding,) = explained.findings
    assert finding.habit == "extra-dimension" and str(tuple(batch["labels"].shape)) in finding.what
    assert explained.peak is not None  # of the batch as it was meant


def wrong_labels(tokenizer: Any) -> dict[str, tuple[list[str], Batch]]:
    right = answered(tokenizer)
    ids, mask, labels = right["input_ids"], right["attention_mask"], right["labels"]
    other = torch.where(labels.roll(-7, 1) == -100, -100, labels.roll(-7, 1))
    alone = ids.masked_fill(mask == 0, -100)
    return {
        "prompt": (["prompt-trained"], {**right, "labels": alone}),
        "all masked": (["nothing-trained"], {**right, "labels": torch.full_like(labels, -100)}),
        "other length": (["two-sequences"], {**right, "labels": labels[:, :-3]}),
        "elsewhere": (["two-sequences"], {**right, "labels": other}),
        "shifted": (["shifted-labels"], {**right, "labels": labels.roll(-1, 1)}),
        "end masked": (
            ["masked-end"],
            {**right, "labels": labels.masked_fill(ids == tokenizer.pad_token_id, -100)},
        ),
        "padding": (
            ["padding-trained"],
            {**right, "labels": labels.masked_scatter(mask == 0, ids[mask == 0])},
        ),
        "no token": (
            ["outside-vocabulary"],
            {**right, "input_ids": ids.clone().index_fill(1, torch.tensor([0]), 9999)},
        ),
    }


@pytest.mark.parametrize(
    "case",
    ["prompt", "all masked", "other length", "elsewhere", "shifted", "end masked", "padding", "no token"],
)
def test_labels_that_cannot_be_right(build_model: Build, tokenizer: Any, case: str) -> None:
    expected, batch = wrong_labels(tokenizer)[case]
    found = batch_findings(build_model("qwen2"), batch, tokenizer)
    assert [finding.habit for finding in found] == expected


def test_the_collator_that_masks_every_pad_token(build_model: Build, tokenizer: Any) -> None:
    right = answered(tokenizer)
    rows = [
        ids[mask == 1].tolist() for ids, mask in zip(right["input_ids"], right["attention_mask"], strict=True)
    ]
    collated = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": row} for row in rows])
    found = batch_findings(build_model("qwen2"), collated, tokenizer)
    assert sorted(finding.habit for finding in found) == ["masked-end", "prompt-trained"]
    prompts = next(finding for finding in found if finding.habit == "prompt-trained")
    assert 0 < prompts.number < sum(map(len, rows))


def test_answers_without_an_end(build_model: Build, tokenizer: Any) -> None:
    right = answered(tokenizer, ("What is 1 plus 2?", "1 plus 2 is 3."))
    last = int((right["labels"][0] != -100).nonzero().max())
    batch = {key: value[:, :last] for key, value in right.items()}
    (finding,) = batch_findings(build_model("qwen2"), batch, tokenizer)
    assert finding.habit == "masked-end" and "no answer is followed by" in finding.what


@pytest.mark.parametrize("prompt", ["masked", "trained"])
def test_a_masked_end_before_a_line_break_of_the_template(
    build_model: Build, tokenizer: Any, prompt: str
) -> None:
    """The template writes a line break after every end of turn."""
    right = answered(tokenizer, ("What is 1 plus 2?", "1 plus 2 is 3."))
    ids, end = right["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(ids[0, -2:]) == "<|im_end|>\n"
    labels = (ids if prompt == "trained" else right["labels"]).masked_fill(ids == end, -100)
    found = batch_findings(build_model("qwen2"), {**right, "labels": labels}, tokenizer)
    (finding,) = (finding for finding in found if finding.habit == "masked-end")
    assert "<|im_end|> follows the answers and is masked" in finding.what
    assert [finding.habit for finding in found if finding.habit != "masked-end"] == (
        ["prompt-trained"] if prompt == "trained" else []
    )


def test_an_end_of_the_next_question_is_not_that_of_an_answer(build_model: Build, tokenizer: Any) -> None:
    """Two turns whose answers have no end of turn of their own."""
    turns = (("user", "1 plus 1?"), ("assistant", "2."), ("user", "And 3?"), ("assistant", "5."))
    chat = Conversation(tuple(Message(*turn) for turn in turns), Place("made", 1))
    (made,), _ = make_examples([chat], tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pairs = [p for p in zip(made.input_ids, made.labels, strict=True) if p != (end, end)]
    ids, labels = (torch.tensor([list(values)]) for values in zip(*pairs, strict=True))
    (finding,) = batch_findings(build_model("qwen2"), {"input_ids": ids, "labels": labels}, tokenizer)
    assert finding.habit == "masked-end" and "no answer is followed by <|im_end|>" in finding.what


def test_a_conversation_of_several_turns_is_right(build_model: Build, tokenizer: Any) -> None:
    turns = (("user", "1 plus 1?"), ("assistant", "2."), ("user", "And 3?"), ("assistant", "5."))
    chat = Conversation(tuple(Message(*turn) for turn in turns), Place("made", 1))
    made, _ = make_examples([chat], tokenizer)
    batch = {"input_ids": torch.tensor([list(made[0].input_ids)]), "labels": torch.tensor([made[0].labels])}
    model = build_model("qwen2")
    assert not batch_findings(model, batch, tokenizer)
    (finding,) = batch_findings(model, {**batch, "labels": batch["input_ids"]}, tokenizer)
    assert finding.habit == "prompt-trained"
    blanks = sum(not tokenizer.decode([t]).strip() for t in made[0].input_ids)
    masked = made[0].length - 1 - made[0].trained_tokens  # the first token is never trained
    assert finding.number < masked <= finding.number + blanks


def test_a_budget_that_is_too_small(build_model: Build, tokenizer: Any) -> None:
    model, batch = frozen(build_model("qwen2")), answered(tokenizer)
    peak = explain(model, batch).peak
    assert peak is not None and not explain(model, batch, budget=peak.bytes).findings
    (finding,) = explain(model, batch, budget=peak.bytes - 1).findings
    assert finding.habit == "does-not-fit" and finding.number == peak.bytes


def test_the_model_is_as_before(build_model: Build, tokenizer: Any) -> None:
    model: PreTrainedModel = checkpointed(frozen(build_model("qwen2"), embeddings=False))
    weights = {name: (id(p), p._version, p.grad) for name, p in model.named_parameters()}
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks), m.training) for m in model.modules()]
    state, seed = list(vars(model)), torch.get_rng_state()
    explain(model, answered(tokenizer), tokenizer)
    assert weights == {name: (id(p), p._version, p.grad) for name, p in model.named_parameters()}
    assert hooks == [
        (dict(m._forward_hooks), dict(m._forward_pre_hooks), m.training) for m in model.modules()
    ]
    assert state == list(vars(model)) and torch.equal(seed, torch.get_rng_state())


def test_a_model_that_cannot_be_simulated_is_explained_as_far_as_can_be(
    build_model: Build, tokenizer: Any
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no kernel for fakes")

    model, batch = frozen(build_model("qwen2")), answered(tokenizer)
    model.model.layers[1].register_forward_pre_hook(fails)
    explained = explain(model, {key: value[:, None] for key, value in batch.items()})
    assert habits(explained) == ["extra-dimension"] and explained.peak is None
    assert "RuntimeError: no kernel for fakes" in str(explained)
    assert explained.as_dict()["findings"][0]["unit"] == "dimensions"


def test_a_module_gets_its_attributes_back() -> None:
    module = nn.Linear(2, 2)
    weight = module.weight
    with pytest.raises(RuntimeError), unchanged(module):
        module._parameters["weight"] = nn.Parameter(torch.zeros(1))
        setattr(module, "extra", 1)  # noqa: B010
        raise RuntimeError
    assert module.weight is weight and not hasattr(module, "extra")


def test_batches_and_models_of_other_kinds_are_refused(build_model: Build, tokenizer: Any) -> None:
    right = answered(tokenizer, ("What is 1 plus 2?", "1 plus 2 is 3."))
    with pytest.raises(UsageError, match="no tensor input_ids"):
        explain(build_model("qwen2"), {key: value.tolist() for key, value in right.items()})
    with pytest.raises(SourceError):
        explain(torch.nn.Linear(2, 2), right)
