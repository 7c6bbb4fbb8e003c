"""Trains ILQL for some steps in one layout and keeps what happened; test_ilql_layouts.py runs it and compares.

    python -m paddle.distributed.launch --nproc_per_node 2 tests/parallel/ilql_trajectory.py \
        MODEL OUT '{"tensor": 2}' ROWS [CHECKPOINT]

ROWS: of a micro-batch. CHECKPOINT: of an earlier run of this script, to go on with. OUT is an output directory with
metrics.jsonl, the answers of the last policy, shifted by its advantages, and checkpoint-2 and -4.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np  # noqa: E402

from alignment.parallel.collectives import barrier  # noqa: E402
from alignment.parallel.layout import Layout  # noqa: E402
from alignment.parallel.topology import join  # noqa: E402
from alignment.ppo.models.loading import load_policy  # noqa: E402
from alignment.ppo.models.placement import Placement  # noqa: E402
from alignment.ppo.models.saving import save_model  # noqa: E402
from alignment.ppo.offline.ilql_learner import IlqlLearner  # noqa: E402
from alignment.ppo.offline.ilql_model import add_heads, advantage_shift, save_heads  # noqa: E402
from alignment.ppo.reshard import Sampler  # noqa: E402
from alignment.ppo.rollout.protocol import Draw, SamplingParameters  # noqa: E402
from alignment.runtime.bootstrap import configure_paddle  # noqa: E402
from alignment.runtime.faults import run_main  # noqa: E402
from alignment.runtime.metrics import is_main_process  # noqa: E402
from alignment.training.checkpoint import load_training_state, save_checkpoint  # noqa: E402
from alignment.training.engine import OptimizerSettings, TrainingEngine  # noqa: E402
from tests.ppo.experiences import make_experience  # noqa: E402

STEPS, SAVED = 4, 2
# Adam divides by the gradient's size: without this epsilon, one of pure rounding moves a weight.
SETTINGS = OptimizerSettings(5e-3, 0.01, 0.9, 0.999, 1e-3, 1.0, "linear", 0.0, 1)
ARGUMENTS = {
    "ilql_tau": 0.7, "gamma": 0.95, "ilql_cql_scale": 0.1, "ilql_awac_scale": 1.0, "ilql_awac_beta": 0.5,
    "ilql_alpha": 0.3, "steps_for_target_q_sync": 2, "per_device_eval_batch_size": 3,
}  # fmt: skip
ANSWERS = make_experience(3, [3, 5, 2, 4, 6, 3, 2, 5, 4, 3, 4], [4, 2, 5, 1, 3, 6, 2, 4, 3, 5, 2])
BATCHES = [np.arange(8), np.arange(8, 11), np.arange(3, 11), np.arange(5)]  # some uneven


def sample(learner: IlqlLearner) -> dict[str, np.ndarray]:
    """Answers of the shifted policy, in the training layout, by both engines."""
    prompts = [ANSWERS.prompt_ids[i][ANSWERS.prompt_mask[i]] for i in range(4)]
    draws = [Draw(5, 0, i, 0) for i in range(4)]
    found = {}
    for fused in (False, True):
        sampler = Sampler(learner.actor, None, 4, fused)
        sampler.engine.adjust_logits = advantage_shift(learner.actor.model, 2.0)
        rollout = sampler.answer(prompts, draws, SamplingParameters(5, (2,), 3, top_k=20))
        found |= {f"{fused}/{name}": getattr(rollout, name) for name in ("response_ids", "log_probs")}
    return found


def save(out: Path, step: int, actor: TrainingEngine) -> None:
    def write(directory: Path) -> None:
        with actor.shards.whole_model():
            save_model(actor.model, None, directory)
            save_heads(actor.model, directory)

    save_checkpoint(out, step, write, actor, {})


def main() -> None:
    """See the module."""
    model, out, layout, rows, *checkpoint = sys.argv[1:]
    start, out = Path(checkpoint[0]) if checkpoint else None, Path(out)
    configure_paddle("cpu")
    join(Layout(**json.loads(layout)))
    policy = load_policy(start or model, placement=Placement.here())
    add_heads(policy, 3, start)
    actor = TrainingEngine(policy, SETTINGS, STEPS, "actor")
    learner = IlqlLearner(SimpleNamespace(**ARGUMENTS, per_device_train_batch_size=int(rows)), actor)
    done = load_training_state(start, actor)["step"] if start else 0
    metrics = []
    for step in range(done + 1, STEPS + 1):
        metrics.append({"step": step} | learner.update(ANSWERS, BATCHES[step - 1], step))
        if step in (SAVED, STEPS):
            save(out, step, actor)
    metrics.append({"step": STEPS + 1} | learner.measure(ANSWERS))
    answers = sample(learner)
    if is_main_process():
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        np.savez(out / "answers.npz", **answers)
    barrier()


if __name__ == "__main__":
    run_main(main)
