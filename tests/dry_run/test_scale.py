"""The arguments of the one step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from alignment.dry_run.scale import scale_down, without_parallelism
from alignment.parallel.layout import Layout, least_processes, resolve_layout
from alignment.ppo.arguments import GROUPS
from alignment.runtime.arguments import resolve

few = st.integers(1, 9)


def resolved(**options: object) -> dict:
    given = {"output_dir": "out", "train_datasets": "x", "reward_function": "a:b", **options}
    return resolve([f"--{name}={value}" for name, value in given.items()], GROUPS)


@given(rows=few, accumulation=few, answers=few, times=few, layers=st.integers(0, 9), sharding=st.integers(1, 4))
def test_a_valid_run_stays_valid(rows, accumulation, answers, times, layers, sharding):
    run = resolved(
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        num_return_sequences=answers,
        per_device_prompt_batch_size=rows * accumulation * times,
        num_layers_unfrozen=layers,
        rollout_token_budget=rows * accumulation * times * answers * sharding,
        rollout_batch_size=9,
        total_episodes=1000,
        max_length=times + 1,
    )
    small = scale_down(run, Layout(sharding=sharding), own_tokenizer=True)
    again = resolved(**{key: value for key, value in small.items() if key in SCALED and value is not None})
    assert {key: again[key] for key in SCALED} == {key: small[key] for key in SCALED}
    drawn = small["per_device_prompt_batch_size"] * small["num_return_sequences"]
    assert drawn <= 16 and small["rollout_token_budget"] >= drawn * sharding
    assert small["num_layers_unfrozen"] <= 1 and small["total_episodes"] is None and small["max_steps"] == 1


SCALED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_return_sequences",
    "per_device_prompt_batch_size",
    "num_layers_unfrozen",
    "rollout_token_budget",
    "rollout_batch_size",
    "max_length",
    "max_prompt_len",
    "max_new_tokens",
)


def test_a_pipeline_has_a_layer_for_each_stage_and_objectives_stay():
    run = resolved(num_layers_unfrozen=3, policy_loss="apa", apa_lambda=0.3, lora_rank=5, learning_rate=0.2)
    small = scale_down(run, Layout(pipeline=4), own_tokenizer=True)
    assert small["num_layers_unfrozen"] == 3
    for name in ("policy_loss", "apa_lambda", "lora_rank", "learning_rate", "kl_coeff", "update_iters", "seed"):
        assert small[name] == run[name]


def test_another_tokenizer_gets_room():
    run = resolved(max_length=40, max_prompt_len=24, max_new_tokens=6, truncation="error") | {"sep_token": "<0x01>"}
    own, other = (scale_down(run, Layout(), own_tokenizer=own) for own in (True, False))
    assert [own[n] for n in ("max_length", "max_prompt_len", "max_new_tokens")] == [40, 24, 6]
    assert [other[n] for n in ("max_length", "max_prompt_len", "max_new_tokens")] == [128, 64, 6]
    assert own["truncation"] == "prompt"
    assert (own["sep_token"], other["sep_token"]) == ("<0x01>", None)


def test_a_dry_run_of_one_process_takes_the_layout_for_granted():
    degrees = {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 3, "sharding": "stage1"}
    run = resolved(dry_run=True, sharding_parallel_degree=4, sequence_parallel=True, **degrees)
    assert least_processes(run) == 24
    assert resolve_layout(without_parallelism(run), 1) == Layout()
