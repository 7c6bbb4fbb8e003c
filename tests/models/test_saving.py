"""Saved directories: exact round trip, the same bytes as the source, readable by PaddleNLP itself."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import AutoModelForCausalLM
from safetensors import safe_open
from safetensors.numpy import load_file

from alignment.parallel.layout import Layout
from alignment.parallel.topology import Topology
from alignment.ppo.models import weights as weight_files
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.placement import Placement
from alignment.ppo.models.saving import save_model
from alignment.runtime.bootstrap import tensor_views
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


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True)])
def test_pipeline_stages_write_the_source_in_parts(tmp_path, monkeypatch, family, tied, stages):
    """As the processes of a pipeline do it, one after another; the result loads as any sharded checkpoint."""
    config = make_config(family, tied)
    weights = random_weights(config)
    source = write_checkpoint(tmp_path / "a", config, weights)
    models = [load_policy(source, placement=Placement(stages=stages, stage=stage)) for stage in range(stages)]
    skip = {"lm_head.weight"} if tied else set()
    names = [list(weight_files.huggingface_weights(model, skip)) for model in models]
    monkeypatch.setattr(weight_files, "gather_objects", lambda own, group: names)
    for stage, model in enumerate(models):
        monkeypatch.setattr(weight_files, "topology", lambda: Topology(Layout(pipeline=stages), stage=stage))  # noqa: B023
        monkeypatch.setenv("PADDLE_TRAINER_ID", str(stage))
        save_model(model, None, tmp_path / "b")
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i + 1:05d}-of-{stages:05d}.safetensors" for i in range(stages)]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    saved = [load_file(file) for file in files]
    assert sorted(name for part in saved for name in part) == sorted(weights)
    for part in saved:
        for name, value in part.items():
            np.testing.assert_array_equal(value, weights[name])
    monkeypatch.undo()
    save_model(load_policy(source), None, tmp_path / "whole")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "b" / name).read_text() == (tmp_path / "whole" / name).read_text()
    other = load_policy(tmp_path / "b")
    for name, parameter in load_policy(source).named_parameters():
        np.testing.assert_array_equal(dict(other.named_parameters())[name].numpy(), parameter.numpy())


def test_other_processes_of_a_stage_write_nothing(tmp_path, monkeypatch):
    """Those with the same weights; a model directory has one writer a stage."""
    config = make_config("llama", True)
    model = load_policy(write_checkpoint(tmp_path / "a", config, random_weights(config)))
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    place = Topology(Layout(data=2), data_rank=1)
    monkeypatch.setattr(weight_files, "topology", lambda: place)
    assert weight_files.huggingface_weights(model) == {}
    save_model(model, None, tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def test_cast(tmp_path):
    config = make_config("llama", True)
    weights = random_weights(config)
    model = load_policy(write_checkpoint(tmp_path / "a", config, weights))
    save_model(model, None, tmp_path / "b", dtype="bfloat16")
    # the reader views bytes as numbers, which a test before this one may have switched off
    with tensor_views(), safe_open(tmp_path / "b" / "model.safetensors", framework="paddle") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {paddle.bfloat16}  # noqa: SIM118
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half = load_policy(tmp_path / "b").llama.norm.weight.numpy()
    np.testing.assert_allclose(half, weights["model.norm.weight"], rtol=2**-8)
    assert model.llama.norm.weight.dtype == paddle.float32
