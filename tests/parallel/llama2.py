"""Llama 2's shapes, a tiny one, and PaddleNLP's layout for 8 devices: what the plan's tests plan."""

from __future__ import annotations

from pathlib import Path

from alignment.parallel.plan import Plan, Sizes
from alignment.parallel.plan.memory import Memory
from alignment.parallel.plan.models import ACTOR, CRITIC, REWARD
from alignment.parallel.plan.shapes import ModelShape, read_shape

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "config" / "shapes"
SMALL, LARGE = read_shape(SHAPES / "llama2-7b"), read_shape(SHAPES / "llama2-70b" / "config.json")
TINY = ModelShape(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=10,
)
PPO_7B = {ACTOR: SMALL, CRITIC: SMALL, REWARD: SMALL}
# The layout of PaddleNLP's ppo_argument.json for 8 devices, with the micro-batches of config/llama.
EIGHT = Sizes(
    max_length=512,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    per_device_eval_batch_size=16,
    ptx_coeff=16.0,
    bf16=True,
    fp16_opt_level="O2",
    recompute=True,
    tensor_parallel_degree=2,
    sharding="stage1",
    sharding_parallel_degree=4,
)
# One rank's parameters of the 7B model at tensor degree 2: 32 layers, half of embedding and head, the final norm.
LAYERS = 32 * ((4 * 4096**2 + 3 * 4096 * 11008) // 2 + 2 * 4096)
ACTOR_PART, SCORER_PART = LAYERS + 32000 * 4096 + 4096, LAYERS + 16000 * 4096 + 2 * 4096


def phases(made: Plan) -> dict[tuple[str, int], Memory]:
    """By phase and pipeline stage."""
    return {(memory.phase, memory.stage): memory for memory in made.memory}
