"""What a rank sends, against numbers worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alignment.parallel.plan import Sizes, plan
from alignment.parallel.plan.models import MODEL
from tests.parallel.llama2 import ACTOR_PART, EIGHT, PPO_7B, SCORER_PART, SMALL, TINY


def test_what_a_rank_sends_with_ppo_of_7b_on_eight_devices():
    (sent,) = plan("ppo", EIGHT, PPO_7B, processes=8).traffic
    trained = ACTOR_PART + SCORER_PART
    assert sent.gradients == pytest.approx(2 * 3 / 4 * 4 * trained)
    assert sent.weights == pytest.approx(3 / 4 * 4 * trained)
    # 4 micro-batches, 32 layers, 2 forward, 5 backward and 2 recomputed sums, each sending half its bytes twice: actor
    # and critic on 4 x 1024 tokens, texts on 4 x 512
    assert sent.tensor == 4 * 32 * 9 * (2 * 4 * 1024 + 4 * 512) * 4096 * 2
    assert (sent.pipeline, sent.rollout) == (0, 0)
    assert sent.total == sent.gradients + sent.weights + sent.tensor


def test_sharded_gradients_travel_with_every_micro_batch():
    sizes = Sizes(gradient_accumulation_steps=3, sharding="stage2", sharding_parallel_degree=2, bf16=True)
    sizes = replace(sizes, fp16_opt_level="O2")
    (second,) = plan("sft", sizes, {MODEL: TINY}, processes=4).traffic
    count = TINY.parameters
    assert second.gradients == 3 * 4 * count / 2 + 2 * (4 * count / 2) / 2  # to owners; owners among themselves
    assert second.weights == 4 * count / 2
    (third,) = plan("sft", replace(sizes, sharding="stage3"), {MODEL: TINY}, processes=4).traffic
    assert (third.gradients, third.weights) == (second.gradients, 3 * 2 * 2 * count / 2)


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


def test_what_sampling_gathers():
    sizes = replace(EIGHT, eval_mode="single", per_device_prompt_batch_size=32)
    assert plan("ppo", sizes, PPO_7B, 8).traffic[0].rollout == 2 * (SMALL.parameters - ACTOR_PART)
    sizes = replace(sizes, eval_mode=None, sharding="stage3")  # 2 batches of 512 tokens, 3 / 4 of the weights each
    assert plan("ppo", sizes, PPO_7B, 8).traffic[0].rollout == 2 * 512 * 2 * ACTOR_PART * 3 / 4
