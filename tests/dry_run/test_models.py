"""Small random models of a run's shape, and what stands in for a model that is not here."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest

from alignment.dry_run.models import find_models, small_fields, write_small_models
from alignment.parallel.layout import Layout, check_model
from alignment.parallel.plan.shapes import SHAPES, read_shape
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.tokenizer import load_tokenizer
from alignment.ppo.models.value import load_value
from alignment.runtime.faults import UsageError
from tests.models.reference import LLAMA3
from tests.models.tiny import tiny_tokenizer
from tests.stages import write_reward_model, write_tiny_model

LAYOUTS = (Layout(), Layout(tensor=2, pipeline=2), Layout(tensor=8, pipeline=4))


@pytest.mark.parametrize("name", sorted(path.name for path in SHAPES.iterdir()))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_small_shapes_keep_kind_and_ratios(tmp_path, name, layout):
    file, tokenizer = SHAPES / name / "config.json", tiny_tokenizer(tmp_path)
    fields = small_fields(file, tokenizer, layout)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    small, full = read_shape(tmp_path), read_shape(file)
    assert small.num_attention_heads * full.num_key_value_heads == full.num_attention_heads * small.num_key_value_heads
    assert (small.tie_word_embeddings, small.attention_bias) == (full.tie_word_embeddings, full.attention_bias)
    original = json.loads(file.read_text())
    for kept in ("model_type", "rope_theta", "rope_scaling", "max_position_embeddings"):
        assert fields.get(kept) == original.get(kept)
    check_model(small, layout.tensor, layout.pipeline)
    assert small.vocab_size == len(tokenizer) and small.parameters < 4e7


def test_the_runs_own_models_keep_tokenizer_rope_and_head(tmp_path):
    policy = write_tiny_model(tmp_path / "policy", tied=False, rope_scaling=LLAMA3, num_hidden_layers=5)
    reward = write_reward_model(tmp_path / "reward", family="qwen2", pooling_type="last", sep_token_id=9)
    values = {
        "actor_model_name_or_path": str(policy),
        "reward_model_name_or_path": str(reward),
        "reward_critic_model_name_or_path": str(reward),
        "model_config": "llama2-7b",
        "reward_model_config": None,
    }
    originals, notes = find_models(values)
    assert notes == [] and [model.name for model in originals] == [str(policy), str(reward)]
    written = write_small_models(originals, tmp_path / "small")
    small = load_policy(written[str(policy)])
    assert small.config.num_hidden_layers == 2 and small.config.rope_scaling["factor"] == LLAMA3["factor"]
    assert load_tokenizer(written[str(policy)]).get_vocab() == load_tokenizer(policy).get_vocab()
    ids = paddle.to_tensor([[5, 6, 7]])
    assert 0 < small(ids)[0].numpy().std() < np.inf
    scorer = load_value(written[str(reward)], require_head=True)
    assert scorer.config.model_type == "qwen2" and not scorer.head_is_new
    assert (scorer.pooling_type, scorer.sep_token_id) == ("last", 9)


def test_what_stands_in_for_models_that_are_not_here(tmp_path):
    policy = write_tiny_model(tmp_path / "policy")
    missing = ("reward_model_name_or_path", "reward_critic_model_name_or_path")
    names = {"actor_model_name_or_path": str(policy), **dict.fromkeys(missing, "./nowhere"), "model_config": None}
    for config, expected in ((None, policy / "config.json"), ("qwen2-7b", SHAPES / "qwen2-7b" / "config.json")):
        (first, second), notes = find_models(names | {"reward_model_config": config})
        assert first.is_here and not second.is_here
        assert (second.config, second.tokenizer, second.scores) == (expected, policy, True)
        assert notes == [
            f"reward_model_name_or_path: ./nowhere is not on this machine; the shape is {expected.parent.name}'s, "
            "the tokenizer policy's"
        ]


def test_directories_that_are_no_models_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match='^"model_name_or_path": .*empty: no config.json'):
        find_models({"model_name_or_path": str(tmp_path / "empty"), "model_config": None})
    with pytest.raises(UsageError, match='^"model_config": no-such-shape: No such file'):
        find_models({"model_name_or_path": "./nowhere", "model_config": "no-such-shape"})
