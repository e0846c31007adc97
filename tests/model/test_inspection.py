"""A config is said in exact numbers and in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.weightless import tiny
from talik.base.errors import SourceError, UsageError
from talik.model.inspection import inspect_model, inspection_text

QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "vocab_size": 152064,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A folder with nothing but Qwen2.5-7B's config.json."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    return tmp_path


def test_qwen_in_numbers(qwen: Path) -> None:
    inspection = inspect_model(str(qwen / "config.json"), top_layers=5)
    own, layer, matrix = inspection.anatomy, 233_057_792, 152_064 * 3584
    assert own.parameters == 7_615_616_512 and own.bytes == 2 * own.parameters and not own.tied
    assert own.layers == (layer,) * 28
    assert [own.parts[part] for part in ("embeddings", "norm", "head", "other")] == [matrix, 3584, matrix, 0]
    assert own.facts == {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "num_hidden_layers": 28,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "max_position_embeddings": 32768,
    }
    assert (inspection.first, inspection.top) == (23, 5 * layer + 3584)
    top = json.loads(json.dumps(inspection.as_dict()))["top"]
    assert top["layers"] == [23, 27] and top["bytes"] == 2 * (5 * layer + 3584)
    assert top["share"] == pytest.approx(0.15301, abs=1e-5)


def test_qwen_in_words(qwen: Path) -> None:
    assert inspection_text(inspect_model(str(qwen))).replace(str(qwen), "QWEN") == (
        "QWEN: qwen2, run by Transformers' Qwen2ForCausalLM\n"
        "\n"
        "vocab_size 152064: the model knows 152,064 tokens, and answers each position with as many scores "
        "(594.0 KiB in float32).\n"
        "hidden_size 3584: between layers every token is 3,584 numbers (7.0 KiB).\n"
        "intermediate_size 18944: inside a layer's MLP every token is 18,944 numbers, "
        "5.3 times hidden_size.\n"
        "num_attention_heads 28: attention looks at the text in 28 ways, its query heads.\n"
        "num_key_value_heads 4: 28 query heads share 4 key/value heads, 7 to 1, "
        "so keys and values take 1/7 of the memory.\n"
        "num_hidden_layers 28: layers 0 to 27 run one after the other.\n"
        "tie_word_embeddings False: the embeddings and the head are two matrices; "
        "training one leaves the other as it is.\n"
        "dtype bfloat16: a number takes 2 bytes, the whole model 14.2 GiB.\n"
        "max_position_embeddings 32768: a text can have up to 32,768 tokens, answer included.\n"
        "\n"
        "embeddings                      544,997,376    7.2%     1.0 GiB\n"
        "28 layers of 233,057,792      6,525,618,176   85.7%    12.2 GiB\n"
        "norm                                  3,584    0.0%     7.0 KiB\n"
        "head                            544,997,376    7.2%     1.0 GiB\n"
        "all                           7,615,616,512  100.0%    14.2 GiB\n"
        "\n"
        "Training the last 5 would train layers 23..27 and the final norm: "
        "1,165,292,544 parameters, 15.3% of the model, 2.2 GiB."
    )


@pytest.mark.parametrize("top_layers", [0, 29])
def test_more_layers_than_there_are(qwen: Path, top_layers: int) -> None:
    with pytest.raises(UsageError, match=rf"{top_layers} top layers of a model with 28 layers(.|\n)*1 to 28"):
        inspect_model(str(qwen), top_layers=top_layers)


def test_a_config_that_lacks_names(tmp_path: Path) -> None:
    config = tiny("mamba2").config.to_dict() | {"dtype": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    inspection = inspect_model(str(tmp_path), top_layers=1)
    text = inspection_text(inspection)
    assert "num_attention_heads -: the config of mamba2 has none." in text
    assert "dtype -: the config of mamba2 has none; sizes below are counted as float32." in text
    assert inspection.anatomy.item_bytes == 4 and "would train layer 3 and the final norm" in text
    json.dumps(inspection.as_dict())


def test_a_config_that_does_not_build(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, "layer_types": None, "num_attention_heads": 0}))
    with pytest.raises(SourceError, match=r"config\.json: Transformers"):
        inspect_model(str(tmp_path))
