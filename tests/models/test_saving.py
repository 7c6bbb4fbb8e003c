"""Saved directories: exact round trip, the same bytes as the source, readable by PaddleNLP itself."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import AutoModelForCausalLM
from safetensors import safe_open
from safetensors.numpy import load_file

from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.saving import save_model
from tests.models.reference import LLAMA3, make_config, random_weights, write_checkpoint


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_weights_are_the_source(tmp_path, family, tied):
    config = make_config(family, tied, rope_scaling=LLAMA3 if family == "llama" else None, eos_token_id=[2, 3])
    weights = random_weights(config)
    save_model(load_policy(write_checkpoint(tmp_path / "a", config, weights)), None, tmp_path / "b")
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(saved[name], value)
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    for name, value in config.items():
        assert written.get(name) == value, name
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"] == [2, 3]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_paddlenlp_loads_it(tmp_path, family, tied):
    config = make_config(family, tied)
    model = load_policy(write_checkpoint(tmp_path / "a", config, random_weights(config)))
    save_model(model, None, tmp_path / "b")
    other = AutoModelForCausalLM.from_pretrained(str(tmp_path / "b"), convert_from_torch=True)
    ids = paddle.to_tensor([[5, 7, 11, 3]])
    model.eval()
    other.eval()
    ours, theirs = (one(ids, return_dict=True).logits.numpy() for one in (model, other))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6)  # models/cpu.py: the same arithmetic, regrouped


def test_cast(tmp_path):
    config = make_config("llama", True)
    weights = random_weights(config)
    model = load_policy(write_checkpoint(tmp_path / "a", config, weights))
    save_model(model, None, tmp_path / "b", dtype="bfloat16")
    with safe_open(tmp_path / "b" / "model.safetensors", framework="paddle") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {paddle.bfloat16}  # noqa: SIM118
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half = load_policy(tmp_path / "b").llama.norm.weight.numpy()
    np.testing.assert_allclose(half, weights["model.norm.weight"], rtol=2**-8)
    assert model.llama.norm.weight.dtype == paddle.float32
