"""LoRA: a value worked by hand, one storage, gradients of adapters alone, directories that any reader understands."""

from __future__ import annotations

import json
import re

import numpy as np
import paddle
import pytest
from paddlenlp.peft import LoRAModel
from safetensors.numpy import load_file

from alignment.ppo.models.adapters import ADAPTERS, load_adapters, load_merged_policy, resume_adapters
from alignment.ppo.models.freezing import freeze
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.lora import (
    TARGETS,
    Base,
    LoRASettings,
    adapted_layers,
    adapter_parameters,
    add_adapters,
    effective_weight,
)
from alignment.ppo.models.policy import hidden_states, trunk
from alignment.ppo.models.saving import save_model
from alignment.ppo.models.value import load_value
from alignment.ppo.models.weights import weights_sha256
from alignment.runtime.faults import UsageError
from tests.models.heads import with_random_head
from tests.models.reference import make_config, random_weights, write_checkpoint

IDS = paddle.to_tensor([[5, 7, 11, 3, 2, 40]])
MASK = paddle.ones(IDS.shape, dtype="bool")
SETTINGS = LoRASettings(rank=2, alpha=4)


@pytest.fixture(params=[("llama", True), ("llama", False), ("qwen2", True)], ids=str)
def base(request, tmp_path):
    config = make_config(*request.param)
    return write_checkpoint(tmp_path / "base", config, random_weights(config))


def adapt(model, directory, settings=SETTINGS, seed=0):
    add_adapters(model, settings, Base(directory, weights_sha256(directory)), seed)
    return model


def randomize(model):
    """As after some training: every B, and a head, are no longer what they were."""
    for number, parameter in enumerate(adapter_parameters(model).values()):
        values = np.random.default_rng(number).normal(0, 0.2, parameter.shape)
        parameter.set_value(values.astype(np.float32))
    return model


def fill(parameter, entries):
    values = np.zeros(parameter.shape, dtype=np.float32)
    for place, value in entries.items():
        values[place] = value
    parameter.set_value(values)


def hidden_of(model):
    model.eval()
    with paddle.no_grad():
        return hidden_states(model, IDS, MASK).numpy()


def logits_of(model):
    model.eval()
    with paddle.no_grad():
        return model(IDS, attention_mask=MASK, return_dict=True).logits.numpy()


def test_a_value_worked_by_hand(base):
    layer = trunk(adapt(load_policy(base), base)).layers[0].self_attn.q_proj
    fill(layer.weight, {(0, 0): 10, (1, 0): 20})
    fill(layer.lora_A, {(0, 0): 1, (0, 1): 2, (1, 1): 3})
    fill(layer.lora_B, {(0, 0): 5, (1, 0): 7, (1, 5): 0.5})
    # alpha / rank = 2: [10 + 2 (1 5 + 2 7), 2 (2 0.5)] and [20 + 2 (3 7), 2 (3 0.5)] in columns 0 and 5
    np.testing.assert_array_equal(effective_weight(layer).numpy()[:3, [0, 5]], [[48, 2], [62, 3], [0, 0]])
    x = np.zeros([1, 32], dtype=np.float32)
    x[0, :2] = 1, -1
    bias = 0 if layer.bias is None else layer.bias.numpy()[[0, 5]]
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy()[0, [0, 5]] - bias, [-14, -1], atol=1e-5)


def test_an_adapted_model_starts_as_its_base_on_the_same_storage(base):
    reference = load_policy(base)
    freeze(reference)
    before = {parameter.data_ptr() for parameter in reference.parameters()}
    actor = adapt(load_policy(base, shared=reference), base)
    critic = adapt(load_value(base, "critic", shared=trunk(reference)), base)
    np.testing.assert_array_equal(logits_of(actor), logits_of(reference))
    np.testing.assert_array_equal(hidden_of(critic), hidden_of(reference))
    assert {parameter.data_ptr() for parameter in reference.parameters()} == before
    for model, lacking in ((actor, 0), (critic, 0 if reference.config.tie_word_embeddings else 1)):
        own = adapter_parameters(model)
        held = {p.data_ptr() for name, p in model.named_parameters() if name not in own}
        assert held <= before and len(held) == len(before) - lacking
        assert not before & {parameter.data_ptr() for parameter in own.values()}
    assert not {p.data_ptr() for p in adapter_parameters(actor).values()} & {
        p.data_ptr() for p in adapter_parameters(critic).values()
    }


def test_only_adapters_and_a_score_head_are_trained(base):
    policy, critic = adapt(load_policy(base), base), adapt(with_random_head(load_value(base, "critic")), base)
    policy(IDS, attention_mask=MASK, return_dict=True).logits.square().mean().backward()
    critic(IDS, MASK).square().mean().backward()
    for model in (policy, critic):
        found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        trained = {name for name, parameter in model.named_parameters() if not parameter.stop_gradient}
        layers = [f"layers.{number}." for number in range(3)]
        assert found == trained == set(adapter_parameters(model))
        assert len(found) == 3 * len(TARGETS) * 2 + (model is critic)
        assert all("lora_" in name or name == "score_head.weight" for name in found)
        assert all(sum(layer in name for name in found) == 14 for layer in layers)
        for name, parameter in adapter_parameters(model).items():
            assert bool(parameter.grad.any()) != name.endswith("lora_A")  # A's gradient passes through B, still zero


def test_chosen_layers_only(base):
    model = adapt(load_policy(base), base, LoRASettings(2, 4, ("k_proj", "down_proj")))
    assert {name.split(".")[-1] for name, _ in adapted_layers(model)} == {"k_proj", "down_proj"}
    assert len(list(adapted_layers(model))) == 6


def test_A_depends_on_seed_and_name_alone(base):
    one, same, other = (adapt(load_policy(base), base, seed=seed) for seed in (1, 1, 2))
    drawn = {name: layer.lora_A.numpy() for name, layer in adapted_layers(one)}
    for name, layer in adapted_layers(same):
        np.testing.assert_array_equal(layer.lora_A.numpy(), drawn[name])
        assert not layer.lora_B.any()
    for name, layer in adapted_layers(other):
        assert not np.isclose(layer.lora_A.numpy(), drawn[name]).any()
    for name, values in drawn.items():
        bound = values.shape[0] ** -0.5
        assert np.abs(values).max() <= bound and values.std() == pytest.approx(bound / 3**0.5, rel=0.35), name
    assert len({values.tobytes() for values in drawn.values()}) == len(drawn)


def test_no_dropout(base):
    model = randomize(adapt(load_policy(base), base))
    expected = logits_of(model)
    model.train()
    with paddle.no_grad():
        np.testing.assert_array_equal(model(IDS, attention_mask=MASK, return_dict=True).logits.numpy(), expected)


def test_a_saved_policy_is_merged_and_its_adapters_load_in_paddlenlp(base, tmp_path):
    model = randomize(adapt(load_policy(base), base))
    expected = logits_of(model)
    save_model(model, None, tmp_path / "saved")
    close = {"rtol": 1e-5, "atol": 1e-5 * np.abs(expected).max()}
    assert np.abs(expected - logits_of(load_policy(base))).max() > 0.1
    np.testing.assert_allclose(logits_of(load_policy(tmp_path / "saved")), expected, **close)
    np.testing.assert_allclose(logits_of(load_merged_policy(base, tmp_path / "saved" / ADAPTERS)), expected, **close)
    theirs = LoRAModel.from_pretrained(load_policy(base), str(tmp_path / "saved" / ADAPTERS))
    np.testing.assert_allclose(logits_of(theirs.model), expected, **close)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert not any("lora" in name for name in stored)


@pytest.mark.parametrize("score", [False, True])
def test_adapters_come_back_to_the_last_bit(base, tmp_path, score):
    def build():
        return adapt(with_random_head(load_value(base)) if score else load_policy(base), base)

    model = randomize(build())
    save_model(model, None, tmp_path / "saved")
    again = build()
    resume_adapters(again, tmp_path / "saved")
    for name, parameter in adapter_parameters(model).items():
        np.testing.assert_array_equal(adapter_parameters(again)[name].numpy(), parameter.numpy())
    assert ("score_head.weight" in adapter_parameters(again)) == score
    np.testing.assert_array_equal(hidden_of(again), hidden_of(model))


def test_adapters_of_another_model_are_refused(base, tmp_path):
    save_model(adapt(load_policy(base), base), None, tmp_path / "saved")
    save_model(adapt(load_value(base), base), None, tmp_path / "score")
    with pytest.raises(UsageError, match='"lora_rank": 3, but .*saved was trained with 2'):
        resume_adapters(adapt(load_policy(base), base, LoRASettings(3, 4)), tmp_path / "saved")
    with pytest.raises(UsageError, match='"lora_target_modules"'):
        resume_adapters(adapt(load_policy(base), base, LoRASettings(2, 4, ("q_proj",))), tmp_path / "saved")
    with pytest.raises(UsageError, match=re.escape("score_head.weight is in the file or in the model")):
        load_adapters(adapt(load_policy(base), base), tmp_path / "score" / ADAPTERS)
    wider = adapt(load_policy(base), base, LoRASettings(3, 4))
    with pytest.raises(UsageError, match="has shape .*, the model needs"):
        load_adapters(wider, tmp_path / "saved" / ADAPTERS)
    config = json.loads((base / "config.json").read_text())
    other = write_checkpoint(tmp_path / "other", config, random_weights(config, seed=1))
    with pytest.raises(UsageError, match="other is not the model that the adapters in .*saved belong to"):
        resume_adapters(adapt(load_policy(other), other), tmp_path / "saved")


def test_a_score_model_takes_a_policys_adapters_and_keeps_its_head(base, tmp_path):
    policy = randomize(adapt(load_policy(base), base))
    save_model(policy, None, tmp_path / "saved")
    critic = adapt(with_random_head(load_value(base)), base)
    head = critic.score_head.weight.numpy()
    load_adapters(critic, tmp_path / "saved" / ADAPTERS)
    np.testing.assert_array_equal(hidden_of(critic), hidden_of(policy))
    np.testing.assert_array_equal(critic.score_head.weight.numpy(), head)


def test_models_of_other_shapes_share_nothing(base, tmp_path):
    config = json.loads((base / "config.json").read_text()) | {"intermediate_size": 48}
    other = write_checkpoint(tmp_path / "other", config, random_weights(config))
    with pytest.raises(UsageError, match="layers.0.mlp.gate_proj.weight, so they cannot share"):
        load_policy(other, shared=load_policy(base))


def test_the_layers_of_a_model_read_one_rotary_table(base):
    layers = list(trunk(load_policy(base)).layers)
    assert len({layer.self_attn.rotary_emb.cos_cached.data_ptr() for layer in layers}) == 1 < len(layers)
