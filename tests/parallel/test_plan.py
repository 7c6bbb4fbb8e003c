"""The plan's parameters and bytes against numbers worked by hand, and its verdicts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from alignment.parallel.layout import Layout
from alignment.parallel.plan import Plan, Sizes, plan
from alignment.parallel.plan.activations import Activations, Precision, precision_of
from alignment.parallel.plan.memory import Memory
from alignment.parallel.plan.models import ACTOR, CRITIC, MODEL, REWARD, Model
from alignment.parallel.plan.shapes import ModelShape
from alignment.runtime.faults import UsageError
from tests.parallel.llama2 import ACTOR_PART, EIGHT, LARGE, LAYERS, PPO_7B, SCORER_PART, SMALL, TINY, phases

# ---- parameters -----------------------------------------------------------------------------------------------------


def test_parameters_of_the_published_models():
    assert (SMALL.parameters, LARGE.parameters) == (6_738_415_616, 68_976_648_192)


shapes = st.builds(
    lambda heads, shared, size, wide, layers, vocab, tied, bias: ModelShape(
        heads * shared * size, 8 * wide, layers, heads * shared, heads, vocab, tied, bias
    ),
    st.sampled_from([8, 16]),
    st.integers(1, 4),
    st.sampled_from([2, 4]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)


@given(shapes, st.sampled_from([1, 2, 4, 8]), st.integers(1, 9), st.booleans())
def test_the_parts_of_all_ranks_make_the_whole_with_what_is_repeated(shape, tensor, stages, scores):
    assume(stages <= shape.num_hidden_layers)
    model = Model("model", shape, scores, trained=True)
    parts = tensor * sum(model.parameters(Layout(tensor=tensor, pipeline=stages), stage) for stage in range(stages))
    hidden, embedding = shape.hidden_size, shape.vocab_size * shape.hidden_size
    whole = shape.parameters + (hidden - (0 if shape.tie_word_embeddings else embedding)) * scores
    norms = (2 * shape.num_hidden_layers + 1 + scores) * hidden  # and the score head
    copies = embedding if shape.tie_word_embeddings and stages > 1 and not scores else 0
    undivided = embedding * ((not shape.tie_word_embeddings and not scores) + 1) if shape.vocab_size % tensor else 0
    repeated_copies = copies * (tensor if shape.vocab_size % tensor else 1)
    assert parts == whole + (tensor - 1) * (norms + undivided) + repeated_copies


@given(shapes, st.integers(1, 9), st.integers(0, 9), st.booleans())
def test_trained_parts_are_the_upper_layers_final_norm_and_own_head(shape, stages, unfrozen, scores):
    assume(stages <= shape.num_hidden_layers and unfrozen <= shape.num_hidden_layers)
    model = Model("model", shape, scores, True, unfrozen)
    trained = sum(model.trained_parameters(Layout(pipeline=stages), stage) for stage in range(stages))
    own_head = 0 if shape.tie_word_embeddings else shape.embedding_parameters()
    head = shape.hidden_size if scores else own_head
    assert trained == unfrozen * shape.layer_parameters() + shape.hidden_size + head
    frozen = replace(model, trained=False)
    assert sum(frozen.trained_parameters(Layout(pipeline=stages), stage) for stage in range(stages)) == 0


@given(st.integers(1, 90), st.integers(1, 20))
def test_stages_take_consecutive_layers_as_evenly_as_can_be(layers, stages):
    assume(stages <= layers)
    model = Model("model", replace(TINY, num_hidden_layers=layers), False, True)
    parts = [model.layers(Layout(pipeline=stages), stage) for stage in range(stages)]
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_bytes_per_parameter():
    assert precision_of(False, "O2") == Precision(4, 4, 8, 4)
    assert precision_of(True, "O2") == Precision(2, 2, 12, 2)
    assert precision_of(True, "O1") == Precision(4, 4, 8, 2)


def test_what_a_layer_of_the_7b_model_keeps_for_a_token():
    one = Activations(SMALL, Layout(), Precision(2, 2, 12, 2), rows=1, length=1024)
    norms, inputs, attention, mlp = 2 * 4096 * 10, 2 * 2 * 4096, 2 * 8 * 4096, 3 * 2 * 11008
    softmax = 6 * 32 * 1024
    assert one.kept == 1024 * (norms + inputs + attention + mlp + softmax)
    halved = replace(one, layout=Layout(tensor=2))
    assert halved.kept == 1024 * (norms + inputs + (attention + mlp + softmax) / 2)
    parallel = replace(one, layout=Layout(tensor=2, sequence_parallel=True))
    assert parallel.kept == 1024 * (5 * 2 * 4096 + (norms + attention + mlp + softmax) / 2)
    assert (halved.boundary, parallel.boundary, parallel.handed_on) == (2**23, 2**22, 2**23)


def test_ppo_of_7b_on_eight_devices():
    made = plan("ppo", EIGHT, PPO_7B, processes=8)
    assert made.layout == Layout(data=1, pipeline=1, sharding=4, tensor=2, sharding_stage=1)
    rollout, score, update = (phases(made)[phase, 0] for phase in ("rollout", "score", "update"))
    trained = ACTOR_PART + SCORER_PART
    for memory in (rollout, score, update):
        assert memory.weights == 2 * 2 * trained  # four models of two bytes
        assert memory.optimizer == 12 * trained / 4
    assert (rollout.gradients, score.gradients, update.gradients) == (0, 0, 2 * trained)
    # 16 rows of 1024 tokens and a prompt that the next may share; 32 layers, keys and values of 2048, two bytes
    assert rollout.cache == (16 * 1024 + 512) * 32 * 2 * 2048 * 2
    assert made.fits and made.needed_gb == update.total / 1e9
    assert made.verdict() == "fits: update needs 62.7 GB of a device's 80, the most of all phases"


def test_the_larger_of_logits_and_a_layer_at_work_counts():
    wide = replace(TINY, vocab_size=1000)
    sizes = Sizes(max_length=16, per_device_train_batch_size=2, recompute=True)
    with_logits = phases(plan("ppo", sizes, {ACTOR: wide, CRITIC: TINY}, 1))["update", 0]
    assert with_logits.logits == 2 * 16 * 1000 * 4 * 4  # the answers' tokens, four arrays of float32
    boundaries, final_norm = 4 * 2 * 32 * 8 * 4, 12 * 2 * 32 * 8
    assert with_logits.activations == boundaries + final_norm
    without = phases(plan("ppo", sizes, {ACTOR: replace(TINY, vocab_size=1), CRITIC: TINY}, 1))["update", 0]
    at_work = Activations(TINY, Layout(), Precision(4, 4, 8, 4), rows=2, length=32).backward
    assert (without.logits, without.activations) == (0, boundaries + at_work)


def offline(**changes) -> tuple[Plan, Memory]:
    made = plan("offline", replace(EIGHT, **changes), PPO_7B, processes=8)
    return made, phases(made)["update", 0]


def test_offline_policy_and_critic_learn_in_turn():
    names = {loss: [model.name for model in offline(policy_loss=loss)[0].models] for loss in ("awr", "bc", "ilql")}
    assert names["bc"] == ["actor", "reference", "reward"]
    assert names["awr"] == ["actor", "critic", "reference", "reward"]
    assert names["ilql"] == ["actor", "heads", "targets", "reference", "reward"]
    online, both = phases(plan("ppo", EIGHT, PPO_7B, 8))["update", 0], offline(policy_loss="awr")[1]
    assert (both.weights, both.optimizer) == (online.weights, online.optimizer)
    assert (both.gradients, online.gradients) == (2 * ACTOR_PART, 2 * (ACTOR_PART + SCORER_PART))
    fixed = offline(policy_loss="awr", critic_training="none")[1]
    assert (fixed.weights, fixed.optimizer) == (online.weights, 12 * ACTOR_PART / 4)
    assert fixed.logits == 4 * 512 * 16000 * (4 * 4 + 2)  # every token may be an answer's


def test_ilql_brings_heads_of_float32_on_the_last_stage():
    bc, ilql = (offline(policy_loss=loss)[1] for loss in ("bc", "ilql"))
    inner, value, column = 2 * 4096 * 4097, 2 * 4096 + 1, (2 * 4096 + 1) * 16000
    learnt = inner + value + 2 * (inner + column)
    assert ilql.weights - bc.weights == 4 * (learnt + 2 * (inner + column))
    assert ilql.optimizer - bc.optimizer == 8 * learnt / 4
    assert ilql.gradients - bc.gradients == 4 * learnt
    assert ilql.logits == 4 * 512 * 16000 * (4 * 7 + 2)
    staged = offline(policy_loss="ilql", pipeline_parallel_degree=2, sharding_parallel_degree=2)[0]
    heads = staged.models[1]
    assert [heads.parameters(staged.layout, stage) for stage in (0, 1)] == [0, learnt]


def sharded(stage: str, **changes) -> Memory:
    sizes = Sizes(sharding=stage, sharding_parallel_degree=4, **changes)
    return phases(plan("sft", sizes, {MODEL: SMALL}, processes=4))["update", 0]


def test_what_each_stage_of_sharding_divides():
    count, layer = SMALL.parameters, SMALL.layer_parameters()
    ends = count - 32 * layer
    first, second, third = (sharded(stage) for stage in ("stage1", "stage2", "stage3"))
    assert first.optimizer == second.optimizer == third.optimizer == 8 * count / 4
    assert first.weights == second.weights == 4 * count
    assert third.weights == 4 * (ends + 32 * layer / 4)
    assert (first.gathered, second.gathered, third.gathered) == (0, 0, 4 * layer)
    assert (first.gradients, second.gradients) == (4 * count, 4 * count / 4)
    assert third.gradients == 4 * count / 4 + 4 * (ends + layer)
    # Short sequences leave little to keep: then the end of a backward pass counts, with its gradients and their sums.
    assert sharded("stage2", max_length=8).gradients == 4 * count + 4 * count / 4


def test_a_pipeline_keeps_micro_batches_of_the_stages_to_come():
    sizes = Sizes(max_length=16, per_device_train_batch_size=1, gradient_accumulation_steps=3, recompute=True)
    made = plan("rm", replace(sizes, pipeline_parallel_degree=4), {MODEL: TINY}, processes=4)
    pair = 2 * 16 * 8 * 4  # both answers' hidden states, in bytes
    at_work = Activations(TINY, made.layout, Precision(4, 4, 8, 4), rows=2, length=16).backward
    kept = [phases(made)["update", stage].activations - at_work for stage in range(4)]
    assert kept == pytest.approx([3 * 2 * pair, 3 * 2 * pair, 2 * 2 * pair, pair])  # a layer's input, and what is sent


@pytest.mark.parametrize(
    ("mode", "tensor", "pipeline", "copied"),
    [
        (None, 2, 2, 0),
        ("single", 2, 2, SMALL.parameters),
        ("tensor_parallel", 2, 2, ACTOR_PART),
        ("tensor_parallel", 2, 1, 0),
        ("single", 1, 1, 0),
    ],
)
def test_a_copy_for_sampling_stays_where_the_layout_differs(mode, tensor, pipeline, copied):
    sizes = replace(EIGHT, eval_mode=mode, tensor_parallel_degree=tensor, pipeline_parallel_degree=pipeline)
    made = plan("ppo", replace(sizes, sharding_parallel_degree=2), PPO_7B, 8)
    assert {memory.copy for memory in made.memory} == {2 * copied}


def test_stage_3_brings_whole_models_to_sample_and_to_score():
    made = plan("ppo", replace(EIGHT, sharding="stage3"), PPO_7B, 8)
    rollout, score, update = (phases(made)[phase, 0] for phase in ("rollout", "score", "update"))
    assert rollout.gathered == score.gathered == 2 * LAYERS * 3 / 4
    assert update.gathered == 2 * LAYERS / 32
    copying = phases(plan("ppo", replace(made.sizes, eval_mode="single"), PPO_7B, 8))["rollout", 0]
    assert (copying.gathered, copying.copy) == (0, 2 * SMALL.parameters)  # the cache is larger than what is brought


def test_other_models_may_have_other_shapes_and_no_reward_model_takes_nothing():
    with_reward, without = PPO_7B | {CRITIC: TINY, REWARD: TINY}, {ACTOR: SMALL, CRITIC: TINY}
    first, second = (phases(plan("ppo", Sizes(), models, 1))["update", 0] for models in (with_reward, without))
    tiny_scorer = TINY.parameters - 10 * 8 + 8
    assert first.weights - second.weights == 4 * tiny_scorer
    assert second.optimizer == 8 * (SMALL.parameters + tiny_scorer)


degrees = st.sampled_from([1, 2, 4])


@given(degrees, degrees, degrees, st.booleans(), st.booleans(), st.sampled_from(["ppo", "offline", "rm", "sft"]))
def test_more_saving_never_needs_more(tensor, pipeline, sharding, bf16, sequence, stage):
    models = PPO_7B if stage in ("ppo", "offline") else {MODEL: SMALL}
    sizes = replace(
        EIGHT,
        tensor_parallel_degree=tensor,
        pipeline_parallel_degree=pipeline,
        sharding_parallel_degree=sharding,
        sequence_parallel=sequence and tensor > 1,
        bf16=bf16,
    )
    processes = tensor * pipeline * sharding * 2
    needed = plan(stage, sizes, models, processes).needed_gb
    assert needed <= plan(stage, replace(sizes, recompute=False), models, processes).needed_gb
    assert needed <= plan(stage, replace(sizes, per_device_train_batch_size=8), models, processes).needed_gb
    assert needed <= plan(stage, replace(sizes, sharding="", sharding_parallel_degree=-1), models, processes).needed_gb
    assert plan(stage, replace(sizes, num_layers_unfrozen=1), models, processes).needed_gb <= needed
    assert plan(stage, sizes, models, 2 * processes).needed_gb == needed  # data parallelism divides nothing


# ---- verdicts -------------------------------------------------------------------------------------------------------


def test_single_changes_that_are_enough_are_named_mild_ones_first():
    made = plan("ppo", replace(EIGHT, recompute=False), PPO_7B, 8)
    assert not made.fits and made.largest.phase == "update"
    assert [remedy.options.split()[0] for remedy in made.remedies] == [
        "--recompute",
        "--per_device_train_batch_size",
        "--sharding",
    ]
    for remedy in made.remedies:
        assert remedy.needed_gb <= 80
        changed = plan("ppo", replace(made.sizes, **remedy.changes), PPO_7B, 8)
        assert changed.needed_gb == remedy.needed_gb
    assert "; enough would be --recompute true (" in made.verdict()


def test_changes_are_combined_where_one_is_not_enough():
    made = plan("sft", Sizes(max_length=4096), {MODEL: SMALL}, processes=2)
    (remedy,) = made.remedies
    assert len(remedy.changes) > 1 and remedy.needed_gb <= 80
    assert plan("sft", replace(made.sizes, **remedy.changes), {MODEL: SMALL}, 2).needed_gb == remedy.needed_gb


def test_what_nothing_can_help():
    made = plan("sft", Sizes(max_length=64, bf16=True, fp16_opt_level="O2"), {MODEL: LARGE}, processes=1)
    assert made.verdict().startswith("does not fit: update needs 11")
    assert made.verdict().endswith("; use more processes as well")


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"tensor_parallel_degree": 3}, 8, '"tensor_parallel_degree" 3 * "pipeline_parallel_degree" 1'),
        ({"tensor_parallel_degree": 3}, 3, '"model_name_or_path": "tensor_parallel_degree": 3 does not divide'),
        ({"pipeline_parallel_degree": 64}, 64, '"model_name_or_path": "pipeline_parallel_degree": 64 is more'),
        ({"sharding_parallel_degree": 4}, 4, '"sharding_parallel_degree": 4 needs "sharding"'),
        ({"sharding": "stage1", "sharding_parallel_degree": 3}, 4, '"sharding_parallel_degree": 3 must divide'),
        ({"sharding": "stage2", "pipeline_parallel_degree": 2}, 4, '"sharding": "stage2" does not go with'),
        ({"sequence_parallel": True}, 4, '"sequence_parallel": true needs'),
        ({"num_layers_unfrozen": 33}, 1, '"num_layers_unfrozen": 33 is more than the model\'s 32 layers'),
    ],
)
def test_layouts_that_cannot_be(changes, processes, message):
    with pytest.raises(UsageError) as caught:
        plan("sft", replace(Sizes(), **changes), {MODEL: SMALL}, processes)
    assert str(caught.value).startswith(message)


def test_updates_take_as_many_sequences_as_they_compare():
    rjs, dpo = (Sizes(max_length=512, policy_update=update) for update in ("rjs", "dpo"))
    twice = replace(rjs, per_device_train_batch_size=16, per_device_eval_batch_size=16, evaluation_strategy="steps")
    assert phases(plan("update", rjs, {MODEL: SMALL}, 1)) == phases(plan("sft", rjs, {MODEL: SMALL}, 1))
    assert phases(plan("update", dpo, {MODEL: SMALL}, 1)) == phases(plan("sft", twice, {MODEL: SMALL}, 1))
    with pytest.raises(UsageError, match='"policy_update": "dpo" is not planned'):
        plan("update", replace(dpo, dpo_pairs="all"), {MODEL: SMALL}, 1)
