"""Policies: weights read from every form give the NumPy reference's logits; bad directories give one clear line."""

from __future__ import annotations

import http.server
import importlib
import json
import threading
from functools import partial

import numpy as np
import paddle
import pytest

from alignment.ppo.models.loading import load_policy
from alignment.runtime.faults import UsageError
from tests.models.reference import LLAMA3, logits, make_config, random_weights, write_checkpoint

IDS = [5, 7, 11, 3, 2, 40, 17]


@pytest.fixture(params=[("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False)], ids=str)
def checkpoint(request, tmp_path):
    config = make_config(*request.param)
    weights = random_weights(config)
    return write_checkpoint(tmp_path / "model", config, weights), config, weights


def run(model, ids, mask=None, position_ids=None):
    model.eval()
    with paddle.no_grad():
        return model(
            paddle.to_tensor(ids),
            attention_mask=None if mask is None else paddle.to_tensor(mask),
            position_ids=None if position_ids is None else paddle.to_tensor(position_ids),
            return_dict=True,
        ).logits.numpy()


def test_logits_match_reference(checkpoint):
    directory, config, weights = checkpoint
    actual = run(load_policy(directory), [IDS])[0]
    np.testing.assert_allclose(actual, logits(weights, config, IDS), rtol=1e-4, atol=1e-4)


def test_layers_share_one_table_of_positions(checkpoint):
    model = load_policy(checkpoint[0])
    tables = {id(layer.rotary_emb) for layer in model.sublayers() if hasattr(layer, "rotary_emb")}
    assert len(tables) == 1 < model.config.num_hidden_layers


def test_padding_on_either_side_changes_nothing(checkpoint):
    directory, config, weights = checkpoint
    model = load_policy(directory)
    expected = logits(weights, config, IDS)
    for left, right in ((3, 0), (0, 3), (2, 1)):
        ids = [[9] * left + IDS + [9] * right]
        mask = np.array([[False] * left + [True] * len(IDS) + [False] * right])
        positions = np.clip(mask.cumsum(-1) - 1, 0, None)
        actual = run(model, ids, mask, positions)[0, left : left + len(IDS)]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_cached_decoding_of_left_padded_rows(checkpoint):
    directory, config, weights = checkpoint
    model = load_policy(directory)
    model.eval()
    pad, seen = 2, 4
    mask = paddle.to_tensor([[False] * pad + [True] * seen])
    positions = (mask.astype("int64").cumsum(-1) - 1).clip(min=0)
    cache, ids, steps = None, paddle.to_tensor([[9] * pad + IDS[:seen]]), []
    for token in [*IDS[seen:], None]:
        out = model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, return_dict=True
        )
        cache = out.past_key_values
        steps.append(out.logits[0, -1].numpy())
        ids = paddle.to_tensor([[token or 0]])
        mask = paddle.concat([mask, paddle.ones([1, 1], dtype="bool")], axis=1)
        positions = positions[:, -1:] + 1
    np.testing.assert_allclose(np.stack(steps), logits(weights, config, IDS)[seen - 1 :], rtol=1e-4, atol=1e-4)


def test_sharded_and_paddlenlp_forms(checkpoint, tmp_path):
    directory, config, weights = checkpoint
    expected = run(load_policy(directory), [IDS])
    sharded = write_checkpoint(tmp_path / "sharded", config, weights, shards=3)
    np.testing.assert_array_equal(run(load_policy(sharded), [IDS]), expected)
    load_policy(directory).save_pretrained(str(tmp_path / "paddle"), safe_serialization=True)
    np.testing.assert_array_equal(run(load_policy(tmp_path / "paddle"), [IDS]), expected)


def test_llama3_rope_scaling(tmp_path):
    ids = np.random.default_rng(1).integers(3, 48, size=40).tolist()
    config = make_config("llama", True, rope_scaling=LLAMA3)
    weights = random_weights(config)
    actual = run(load_policy(write_checkpoint(tmp_path, config, weights)), [ids])[0]
    np.testing.assert_allclose(actual, logits(weights, config, ids), rtol=1e-4, atol=1e-4)
    unscaled = logits(weights, config | {"rope_scaling": None}, ids)
    assert np.abs(actual - unscaled).max() > 1e-2


def test_transformers_5_rope_parameters(tmp_path):
    config = make_config("llama", True)
    weights = random_weights(config)
    written = {key: value for key, value in config.items() if key != "rope_theta"}
    written["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    actual = run(load_policy(write_checkpoint(tmp_path, written, weights)), [IDS])[0]
    np.testing.assert_allclose(actual, logits(weights, config, IDS), rtol=1e-4, atol=1e-4)


def test_dtypes(checkpoint):
    directory, _, weights = checkpoint
    if paddle.get_device() == "cpu":
        with pytest.raises(UsageError, match="dtype: bfloat16 needs a GPU"):
            load_policy(directory, dtype="bfloat16")
    else:
        half = load_policy(directory, dtype="bfloat16")
        assert {parameter.dtype for parameter in half.parameters()} == {paddle.bfloat16}
        stored = half.state_dict()[f"{half.base_model_prefix}.norm.weight"].astype("float32").numpy()
        np.testing.assert_allclose(stored, weights["model.norm.weight"], rtol=2**-8)
    with pytest.raises(UsageError, match="dtype: 'half' is not one of"):
        load_policy(directory, dtype="half")


def test_recompute_gives_the_same_gradients(checkpoint):
    directory = checkpoint[0]
    gradients = []
    for recompute in (False, True):
        model = load_policy(directory, recompute=recompute)
        model(paddle.to_tensor([IDS]), return_dict=True).logits.square().mean().backward()
        gradients.append([parameter.grad.numpy() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        np.testing.assert_allclose(recomputed, plain, rtol=1e-5, atol=1e-6)


def fails(directory, pattern):
    with pytest.raises(UsageError, match=pattern) as caught:
        load_policy(directory)
    assert "\n" not in str(caught.value)


def test_bad_directories(tmp_path):
    config = make_config("llama", False)
    weights = random_weights(config)
    good = write_checkpoint(tmp_path / "good", config, weights)
    fails(tmp_path / "absent", "no such directory")
    fails(good / "config.json", "is a file")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no config.json")
    content = (good / "model.safetensors").read_bytes()
    for name, damaged in (("truncated", content[:-100]), ("garbage", b"\xff" * 64), ("nothing", b"")):
        broken = write_checkpoint(tmp_path / name, config, weights)
        (broken / "model.safetensors").write_bytes(damaged)
        fails(broken, "model.safetensors: corrupt or truncated")
    (broken / "model.safetensors").unlink()
    fails(broken, "no model.safetensors")
    (broken / "config.json").write_text("{")
    fails(broken, "config.json: not readable as JSON")
    sharded = write_checkpoint(tmp_path / "sharded", config, weights, shards=2)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    fails(sharded, "no model-00002-of-00002.safetensors")


def test_weights_that_do_not_fit(tmp_path):
    config = make_config("llama", False)
    weights = random_weights(config)
    few = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    fails(write_checkpoint(tmp_path / "few", config, few), r"lacks weights model\.layers\.1\.mlp\.down_proj\.weight")
    more = weights | {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, dtype=np.float32)}
    fails(write_checkpoint(tmp_path / "more", config, more), "unknown weights model.layers.0.self_attn.q_proj.bias")
    deep = random_weights(config | {"num_hidden_layers": 4})
    fails(write_checkpoint(tmp_path / "deep", config, deep), r"unknown weights model\.layers\.3\.input_layernorm")
    wide = write_checkpoint(tmp_path / "wide", config | {"intermediate_size": 41}, weights)
    fails(wide, r"mlp\.\w+_proj\.weight has shape")


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral"},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"head_dim": 16},
        {"hidden_act": "gelu"},
        {"use_sliding_window": True},
        {"attention_bias": True},
        {"attention_dropout": 0.1},
        {"hidden_size": None},
    ],
    ids=str,
)
def test_unsupported_settings_are_named(tmp_path, change):
    config = make_config("llama", True) | change
    fails(write_checkpoint(tmp_path, config, {}), next(iter(change)))


def test_hub_name_downloads_once(tmp_path, monkeypatch):
    """PaddleNLP's downloader fetches from a server on this machine; the second load needs no server."""
    bos_download = importlib.import_module("paddlenlp.utils.download.bos_download")

    config = make_config("qwen2", True)
    weights = random_weights(config)
    write_checkpoint(tmp_path / "site" / "models" / "community" / "someone" / "tiny", config, weights, shards=2)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_type}/community/{repo_id}/{filename}"
    monkeypatch.setattr(bos_download, "ENDPOINT", address)
    monkeypatch.setattr(bos_download, "BOS_URL_TEMPLATE_WITHOUT_REVISION", template)
    monkeypatch.setattr(bos_download, "MODEL_HOME", str(tmp_path / "home"))
    for _ in range(2):
        actual = run(load_policy("someone/tiny"), [IDS])[0]
        np.testing.assert_allclose(actual, logits(weights, config, IDS), rtol=1e-4, atol=1e-4)
    fails("someone/absent", "hub has no such model")
    server.shutdown()
    server.server_close()
    fails("someone/absent", "download failed|no such model")
    assert json.loads((tmp_path / "home" / "someone" / "tiny" / "config.json").read_text())["model_type"] == "qwen2"
