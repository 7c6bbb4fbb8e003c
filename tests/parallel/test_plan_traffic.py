"""What a rank sends, against numbers worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alignment.parallel.plan import Sizes, plan
from alignment.parallel.plan.models import MODEL
from tests.parallel.llama2 import ACTOR_PART, EIGHT, LAYERS, PPO_7B, SCORER_PART, SMALL, TINY


def test_what_a_rank_sends_with_ppo_of_7b_on_eight_devices():
    (sent,) = plan("ppo", EIGHT, PPO_7B, processes=8).traffic
    trained = ACTOR_PART + SCORER_PART
    assert sent.gradients == pytest.approx(2 * 3 / 4 * 4 * trained)
    assert sent.weights == pytest.approx(3 / 4 * 4 * trained)
    # 4 micro-batches, 32 layers, 2 forward, 5 backward and 2 recomputed sums, each sending half its bytes twice: actor
    # and critic on 4 x 1024 tokens, texts on 4 x 512
    assert sent.tensor == 4 * 32 * 9 * (2 * 4 * 1024 + 4 * 512) * 4096 * 2
    assert (sent.pipeline, sent.iteration) == (0, 0)
    assert sent.total == sent.gradients + sent.weights + sent.tensor


def test_sharded_gradients_and_layers_travel_with_every_micro_batch():
    sizes = Sizes(gradient_accumulation_steps=3, sharding="stage2", sharding_parallel_degree=2, bf16=True)
    (second,) = plan("sft", sizes, {MODEL: TINY}, processes=4).traffic
    count, layers = TINY.parameters, 4 * TINY.layer_parameters()
    assert second.gradients == 3 * 4 * count / 2 + 2 * (4 * count / 2) / 2  # to owners; owners among themselves
    assert second.weights == 4 * count / 2
    (third,) = plan("sft", replace(sizes, sharding="stage3"), {MODEL: TINY}, processes=4).traffic
    assert third.gradients == second.gradients
    assert third.weights == 3 * 4 * 2 * layers / 2 + 4 * (count - layers) / 2  # forward and backward; what is no layer
    half = replace(sizes, sharding="stage3", num_layers_unfrozen=2)
    (third,) = plan("sft", half, {MODEL: TINY}, processes=4).traffic
    assert third.weights == 3 * 4 * 1.5 * layers / 2 + 4 * (10 * 8 + 8) / 2


def test_stages_send_to_their_neighbours_what_those_can_use():
    sizes = Sizes(max_length=16, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    sizes = replace(sizes, pipeline_parallel_degree=4)
    once = 3 * 2 * 16 * 8 * 4
    sent = [traffic.pipeline for traffic in plan("sft", sizes, {MODEL: TINY}, 4).traffic]
    assert sent == [once, 2 * once, 2 * once, once]
    sizes = replace(sizes, num_layers_unfrozen=2)  # stages 0 and 1 learn nothing
    sent = [traffic.pipeline for traffic in plan("sft", sizes, {MODEL: TINY}, 4).traffic]
    assert sent == [once, once, once, once]


def test_both_ends_of_a_pipeline_sum_a_tied_embedding():
    tied = replace(TINY, tie_word_embeddings=True)
    sizes = Sizes(pipeline_parallel_degree=4)
    assert [t.gradients for t in plan("sft", sizes, {MODEL: tied}, 4).traffic] == [4 * 10 * 8, 0, 0, 4 * 10 * 8]
    assert [t.gradients for t in plan("rm", sizes, {MODEL: tied}, 4).traffic] == [0, 0, 0, 0]


def test_what_sampling_and_scoring_gather():
    sizes = replace(EIGHT, eval_mode="single")
    copy = 2 * (SMALL.parameters - ACTOR_PART)
    assert plan("ppo", sizes, PPO_7B, 8).traffic[0].iteration == copy
    brought = 5 * 4 * LAYERS * 3 / 4  # four models to score, the actor to sample
    sizes = replace(sizes, sharding="stage3")
    assert plan("ppo", sizes, PPO_7B, 8).traffic[0].iteration == pytest.approx(copy + brought)
    assert plan("ppo", replace(sizes, eval_mode=None), PPO_7B, 8).traffic[0].iteration == pytest.approx(brought)
