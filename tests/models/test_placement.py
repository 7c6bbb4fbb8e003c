"""Parts of a model: every parameter is in one of them, and together they compute what the whole does."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.parallel.layout import check_model, layers_of_stage
from alignment.ppo.models.freezing import set_trainable_layers
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.placement import WHOLE, Placement, is_copy, is_tied, own_slice
from alignment.ppo.models.policy import hidden_states, language_model_head, trunk
from alignment.ppo.models.saving import save_model
from alignment.ppo.models.value import load_value
from alignment.ppo.models.weights import huggingface_weights
from alignment.runtime.faults import UsageError
from tests.models.heads import with_random_head
from tests.models.reference import make_config, random_weights, write_checkpoint

LAYERS = 3
FAMILIES = [("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False)]
KINDS = [(*family, score) for family in FAMILIES for score in (False, True)]
quick = settings(max_examples=60, deadline=None, derandomize=True)


def layers_and_stages(most: int):
    return st.integers(1, most).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count)))


def places(stages: int) -> list[Placement]:
    return [Placement(stages=stages, stage=stage) for stage in range(stages)]


# ---- which layers and parameters belong to a stage ------------------------------------------------------------------


@quick
@given(layers_and_stages(90))
def test_stages_take_consecutive_layers_evenly_and_the_middle_more(numbers):
    count, stages = numbers
    parts = [layers_of_stage(count, stages, stage) for stage in range(stages)]
    assert [layer for part in parts for layer in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert set(sizes) <= {count // stages, count // stages + 1}
    larger = [stage for stage, size in enumerate(sizes) if size > count // stages]
    assert len(larger) == count % stages
    if larger:  # side by side, as many smaller ones before as after them (or one fewer)
        assert larger == list(range(larger[0], larger[-1] + 1))
        assert stages - 1 - larger[-1] - larger[0] in (0, 1)


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model_on_disk(request, tmp_path_factory):
    """(directory, load(placement) -> model): a policy or score model of three layers."""
    family, tied, score = request.param
    config = make_config(family, tied, num_hidden_layers=LAYERS)
    directory = write_checkpoint(tmp_path_factory.mktemp("model"), config, random_weights(config))
    if not score:
        return directory, lambda placement=WHOLE: load_policy(directory, placement=placement)
    save_model(with_random_head(load_value(directory)), None, directory / "score")
    return directory / "score", lambda placement=WHOLE: load_value(directory / "score", placement=placement)


@pytest.fixture(scope="module")
def whole(model_on_disk):
    return model_on_disk[1]()


def is_tied_policy(model) -> bool:
    return model.config.tie_word_embeddings and hasattr(model, "lm_head")


def names_of(model) -> dict[str, paddle.Tensor]:
    return dict(model.named_parameters())


def stored_names(model, layers: int) -> set[str]:
    """Names in memory and in both kinds of files, of a model like ``model`` that has so many layers."""
    own = {*names_of(model), *model.state_dict(), *huggingface_weights(model)}
    middle = [name for name in own if ".layers.1." in name]
    rest = {name for name in own if ".layers." not in name}
    return rest | {name.replace(".1.", f".{layer}.", 1) for name in middle for layer in range(layers)}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(layers_and_stages(11))
def test_every_name_is_on_one_stage_and_a_tied_embedding_on_both_ends(whole, numbers):
    layers, stages = numbers
    ties = stages > 1 and is_tied_policy(whole)
    names = stored_names(whole, layers)
    assert sum(name.endswith(f".layers.{layers - 1}.mlp.up_proj.weight") for name in names) == 2
    for name in names:
        holders = [place.stage for place in places(stages) if place.holds(name, layers, ties)]
        if ".layers." in name:
            (stage,) = holders
            assert int(name.split(".layers.")[1].split(".")[0]) in layers_of_stage(layers, stages, stage)
        elif name.endswith("embed_tokens.weight"):
            assert holders == ([0, stages - 1] if ties else [0])
        else:
            assert holders == [stages - 1]


# ---- slices of matrices ---------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 8), st.sampled_from([None, 0, 1]), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_slices_side_by_side_are_the_whole(tensor, axis, rows, columns, as_array):
    shape = [rows * (tensor if axis == 0 else 1), columns * (tensor if axis == 1 else 1)]
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    parameter = SimpleNamespace(is_distributed=axis is not None, split_axis=axis)
    parts = [
        own_slice(matrix if as_array else paddle.to_tensor(matrix), parameter, Placement(tensor, rank))
        for rank in range(tensor)
    ]
    if axis is None:
        assert all((np.asarray(part) == matrix).all() for part in parts)
    else:
        assert {tuple(part.shape) for part in parts} == {(rows, columns)}
        np.testing.assert_array_equal(np.concatenate([np.asarray(part) for part in parts], axis), matrix)


# ---- models in parts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3])
def parts(request, model_on_disk):
    return [model_on_disk[1](place) for place in places(request.param)]


def test_a_stage_has_its_weights_and_no_others(parts, whole):
    everything, found = names_of(whole), []
    for part in parts:
        held = {n for n in everything if part.placement.holds(n, LAYERS, part.ties_ends)}
        assert names_of(part).keys() == held and held
        for name, parameter in part.named_parameters():
            np.testing.assert_array_equal(parameter.numpy(), everything[name].numpy())
        found += [name for name in held if not is_copy(name, part)]
    assert sorted(found) == sorted(everything)
    assert parts[0].ties_ends == is_tied_policy(whole) and not whole.ties_ends
    copies = [(part.placement.stage, name) for part in parts for name in names_of(part) if is_copy(name, part)]
    tied = [(part.placement.stage, name) for part in parts for name in names_of(part) if is_tied(name, part)]
    embedding = next(name for name in everything if name.endswith("embed_tokens.weight"))
    last = len(parts) - 1
    assert copies == ([(last, embedding)] if is_tied_policy(whole) else [])
    assert tied == ([(0, embedding), (last, embedding)] if is_tied_policy(whole) else [])


def make_batch():
    """Left padding, right padding, none."""
    ids = np.random.default_rng(1).integers(4, 48, [3, 9])
    mask = np.ones([3, 9], bool)
    mask[0, :4] = mask[1, 7:] = False
    return paddle.to_tensor(ids), paddle.to_tensor(mask)


def run_stages(parts) -> tuple[list[paddle.Tensor], list[paddle.Tensor | None]]:
    """What every stage gave, and what it received, to take a gradient of."""
    ids, mask = make_batch()
    outputs, received = [], [None]
    for part in parts:
        outputs.append(hidden_states(part, ids, mask, received=received[-1]))
        received.append(outputs[-1].detach())
        received[-1].stop_gradient = False
    return outputs, received[:-1]


def results(model, hidden) -> paddle.Tensor:
    """Scores [B, L] or logits [B, L, V] of the real tokens."""
    return model.scores(hidden) if hasattr(model, "score_head") else language_model_head(model, hidden)


def test_stages_one_after_the_other_are_the_whole(parts, whole):
    mask = make_batch()[1].numpy()
    with paddle.no_grad():
        expected, actual = hidden_states(whole, *make_batch()), run_stages(parts)[0][-1]
        np.testing.assert_allclose(actual.numpy()[mask], expected.numpy()[mask], atol=1e-6)
        for one, other in zip(results(parts[-1], actual), results(whole, expected), strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-5)


def loss_of(model, hidden) -> paddle.Tensor:
    mask = make_batch()[1].astype("float32")
    scores = results(model, hidden)
    return (scores.square() * (mask if scores.ndim == 2 else mask.unsqueeze(-1))).mean()


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_stages_are_those_of_the_whole(parts, whole, recompute):
    """Both copies of a tied embedding take part."""
    for model in (whole, *parts):
        model.train()
        trunk(model).enable_recompute = recompute
        model.clear_gradients()
    loss_of(whole, hidden_states(whole, *make_batch())).backward()
    outputs, received = run_stages(parts)
    loss_of(parts[-1], outputs[-1]).backward()
    for output, following in zip(outputs[-2::-1], received[:0:-1], strict=True):
        paddle.autograd.backward([output], [following.grad])
    total: dict[str, np.ndarray] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            total[name] = total.get(name, 0) + parameter.grad.numpy()
    for name, parameter in whole.named_parameters():
        gradient = parameter.grad.numpy()
        assert abs(gradient).max() > 0, name
        np.testing.assert_allclose(total[name], gradient, atol=2e-5 * abs(gradient).max(), err_msg=name)
    for model in (whole, *parts):
        trunk(model).enable_recompute = False
        model.clear_gradients()


@pytest.mark.parametrize("unfrozen", [-1, 0, 1, 2, LAYERS])
def test_stages_train_what_the_whole_trains(model_on_disk, parts, unfrozen):
    whole, names, total = model_on_disk[1](), set(), 0
    count = set_trainable_layers(whole, unfrozen)
    for part in parts:
        here = set_trainable_layers(part, unfrozen)
        sizes = {name: int(p.size) for name, p in part.named_parameters() if not p.stop_gradient}
        assert here == sum(sizes.values())
        names |= sizes.keys()
        total += sum(size for name, size in sizes.items() if not is_copy(name, part))
        set_trainable_layers(part, -1)
    assert names == {name for name, p in whole.named_parameters() if not p.stop_gradient} and total == count


def test_what_stages_store_is_what_the_whole_stores(parts, whole):
    skip = {"lm_head.weight"} if is_tied_policy(whole) else set()
    expected = huggingface_weights(whole, skip)
    stored = [huggingface_weights(part, skip) for part in parts]
    assert sorted(name for weights in stored for name in weights) == sorted(expected)
    for weights in stored:
        for name, value in weights.items():
            np.testing.assert_array_equal(value.numpy(), expected[name].numpy())


@pytest.mark.parametrize("load", [load_policy, load_value])
def test_every_stage_checks_the_whole_checkpoint(tmp_path, load):
    """So that all processes end with the same line; more layers than the configuration says are another model."""
    config = make_config("llama", False, num_hidden_layers=LAYERS)
    weights = random_weights(config)
    lacking = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(LAYERS)]
    lacking += ["model.embed_tokens.weight", "model.norm.weight"]
    lacking += ["lm_head.weight"] if load is load_policy else []  # of no use to a score model
    checkpoints = [
        ({other: value for other, value in weights.items() if other != name}, f"lacks weights {name}")
        for name in lacking
    ]
    deep = random_weights(config | {"num_hidden_layers": LAYERS + 1})
    checkpoints.append((deep, f"has unknown weights model.layers.{LAYERS}.input_layernorm.weight"))
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}
    checkpoints.append((weights | bias, "has unknown weights model.layers.0.self_attn.q_proj.bias"))
    for number, (stored, message) in enumerate(checkpoints):
        directory = write_checkpoint(tmp_path / str(number), config, stored)
        for place in places(2):
            with pytest.raises(UsageError, match=re.escape(f"{directory}: the checkpoint {message}")):
                load(directory, placement=place)


# ---- what a model's shape allows ------------------------------------------------------------------------------------

SHAPE = {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 40, "num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("change", "tensor", "stages", "line"),
    [
        ({}, 8, 1, "tensor 8 does not divide num_attention_heads = 12; what does: 1, 2, 4"),
        ({}, 3, 1, "tensor 3 does not divide num_key_value_heads = 4; what does: 1, 2, 4"),
        ({"intermediate_size": 42}, 4, 1, "tensor 4 does not divide intermediate_size = 42; what does: 1, 2"),
        ({"num_key_value_heads": 3}, 2, 1, "tensor 2 does not divide num_key_value_heads = 3; what does: 1"),
        ({}, 1, 7, "pipeline 7 is more than 6 layers"),
    ],
)
def test_a_model_that_cannot_be_divided_so(change, tensor, stages, line):
    with pytest.raises(UsageError) as caught:
        check_model(SimpleNamespace(**SHAPE | change), tensor, stages)
    kind, _, rest = line.partition(" ")
    assert str(caught.value).replace("the model's ", "") == f'"{kind}_parallel_degree": {rest}'


@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 3), (4, 6)])
def test_a_model_that_can(tensor, stages):
    check_model(SimpleNamespace(**SHAPE), tensor, stages)


def test_loading_says_so(tmp_path):
    config = make_config("llama", True, num_hidden_layers=LAYERS)
    directory = write_checkpoint(tmp_path, config, random_weights(config))
    for load in (load_policy, load_value):
        with pytest.raises(UsageError, match='"pipeline_parallel_degree": 4 is more than the model\'s 3 layers'):
            load(directory, placement=Placement(stages=4))
        with pytest.raises(UsageError, match=r'"tensor_parallel_degree": 3 does not divide .*; what does: 1, 2$'):
            load(directory, placement=Placement(tensor=3))
