"""Rewards from a real, tiny Llama score model with real tokenizers of two vocabularies."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import paddle
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from alignment.ppo.models.config import read_config
from alignment.ppo.models.tokenizer import load_tokenizer
from alignment.ppo.models.value import build_score_model
from alignment.ppo.rewards import RewardBatch, WeightedRewards
from alignment.ppo.rewards.model import ModelReward
from alignment.runtime.faults import RunError
from tests.models.heads import with_random_head
from tests.models.reference import make_config

WORDS = ["how", "are", "you", "fine", "thanks", "and", "well", "?"]


def make_tokenizer(directory, words, adds_bos=False):
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<|end|>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    return load_tokenizer(directory)


@pytest.fixture
def score_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(make_config("llama", tied=True)))
    model = build_score_model(read_config(tmp_path), "reward", "float32")
    random = np.random.default_rng(3)
    for parameter in model.parameters():
        parameter.set_value(random.normal(0.0, 0.2, parameter.shape).astype("float32"))
    with_random_head(model)
    return model


@pytest.fixture
def actor(tmp_path):
    return make_tokenizer(tmp_path / "actor", WORDS)


def make_batch(tokenizer, texts, finished, eos=2):
    def encode(text):
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    prompts, responses = zip(*texts, strict=True)
    return RewardBatch(
        prompts=list(prompts),
        responses=list(responses),
        finished=np.array(finished),
        samples=[{"input": prompt} for prompt in prompts],
        prompt_ids=[encode(prompt) for prompt in prompts],
        response_ids=[
            np.append(encode(text), [eos] * done) for text, done in zip(responses, finished, strict=True)
        ],
    )  # fmt: skip


TEXTS = [
    ("how are you ?", "fine thanks"),
    ("you ?", "fine"),
    ("how ?", "well and well and fine"),
    ("and you ?", "well"),
]
FINISHED = [True, False, True, False]


def score_alone(model, ids):
    """The score of one unpadded sequence at its last token."""
    with paddle.no_grad():
        return float(model(paddle.to_tensor([list(ids)], dtype="int64"), paddle.ones([1, len(ids)], "bool"))[0, -1])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_reward_does_not_depend_on_the_batch(score_model, actor, batch_size):
    batch = make_batch(actor, TEXTS, FINISHED)
    rewards = ModelReward(score_model, actor, actor, batch_size)(batch)
    expected = [
        score_alone(score_model, np.append(prompt, response))
        for prompt, response in zip(batch.prompt_ids, batch.response_ids, strict=True)
    ]
    assert rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, expected, rtol=1e-4, atol=1e-6)
    assert np.ptp(expected) > 1e-2  # the sequences are told apart at all


def test_equal_vocabularies_keep_the_sampled_ids(score_model, actor, tmp_path):
    """Sampled ids may split a text otherwise than the tokenizer would; and an actor's own EOS is replaced."""
    twin = make_tokenizer(tmp_path / "twin", WORDS)
    batch = make_batch(actor, TEXTS[:1], [True], eos=3)
    batch.responses[0] = "something else"
    rewards = ModelReward(score_model, twin, actor)(batch)
    ids = [*batch.prompt_ids[0], *batch.response_ids[0][:-1], twin.eos_token_id]
    np.testing.assert_allclose(rewards, [score_alone(score_model, ids)], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("add_special_tokens", [False, True])
def test_other_vocabulary_is_tokenised_again(score_model, actor, tmp_path, add_special_tokens, served):
    other = make_tokenizer(tmp_path / "other", WORDS[::-1], adds_bos=True)
    batch = make_batch(actor, TEXTS, FINISHED)
    if served:
        batch = RewardBatch(batch.prompts, batch.responses, batch.finished, batch.samples)
    source = ModelReward(score_model, other, None if served else actor, add_special_tokens=add_special_tokens)
    bos = [1] if add_special_tokens else []
    expected = [
        score_alone(score_model, bos + [4 + WORDS[::-1].index(word) for word in f"{p} {r}".split()] + [2] * done)
        for (p, r), done in zip(TEXTS, FINISHED, strict=True)
    ]
    np.testing.assert_allclose(source(batch), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("as_sampled", [False, True])
def test_pooling_and_separator_are_the_models_own(score_model, actor, as_sampled):
    score_model.pooling_type, score_model.sep_token_id, score_model.config.eos_token_id = "last", 3, 2
    batch = make_batch(actor, TEXTS, FINISHED)
    rewards = ModelReward(score_model, actor, actor if as_sampled else None)(batch)
    separated = [
        [*prompt, 3, *response[: len(response) - done]]
        for prompt, response, done in zip(batch.prompt_ids, batch.response_ids, FINISHED, strict=True)
    ]
    expected = [score_alone(score_model, ids) for ids in separated]
    np.testing.assert_allclose(rewards, expected, rtol=1e-4, atol=1e-6)


def test_dropout_is_off_whenever_it_scores(score_model, actor):
    source, batch, modes = ModelReward(score_model, actor, actor, 16), make_batch(actor, TEXTS, FINISHED), []
    layers = score_model.trunk.layers
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: modes.append(layer.training))
    for _ in range(2):
        score_model.train()  # as a critic that shares it might leave it
        source(batch)
    assert modes == [False] * 2 * len(layers)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_sitting_out_meets_the_processes_that_score(score_model, actor, monkeypatch, batch_size):
    """Where sharding divides the parameters, all have to be there when they are brought together."""
    source, met = ModelReward(score_model, actor, actor, batch_size), []

    @contextmanager
    def whole_model():
        met.append(True)
        yield

    monkeypatch.setattr(source.pipeline.shards, "whole_model", whole_model)
    source(make_batch(actor, TEXTS, FINISHED))
    scoring = len(met)
    assert source.sit_out() is None
    assert 0 < scoring == len(met) - scoring


def test_too_long_empty_and_not_finite_are_named(score_model, actor):
    source = ModelReward(score_model, actor, actor, name="safety")
    with pytest.raises(RunError, match="'safety': 66 tokens to score, but it has 64 positions"):
        source(make_batch(actor, [("how ?", "well " * 64)], [False]))
    with pytest.raises(RunError, match="response 1 and its prompt are both empty"):
        source(make_batch(actor, [("how ?", "well"), ("", "")], [True, False]))
    score_model.score_mean, score_model.score_var, score_model.do_normalize = float("nan"), 1.0, True
    with pytest.raises(RunError, match="reward model 'safety' returned nan for response 0"):
        WeightedRewards([source])(make_batch(actor, TEXTS, FINISHED))
