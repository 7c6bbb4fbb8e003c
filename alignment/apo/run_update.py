"""Policy updates: ``python run_update.py config.json [--key value ...]``, also under paddle.distributed.launch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by path: `import alignment` and `import data` mean this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from alignment.apo.update_arguments import GROUPS
from alignment.apo.update_data import dataset_kind
from alignment.apo.update_trainer import TRAINERS
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.placement import Placement
from alignment.ppo.models.tokenizer import load_tokenizer
from alignment.runtime.faults import run_main
from alignment.training.checkpoint import find_checkpoint
from alignment.training.command import run_command
from alignment.training.setup import load_data, load_named, model_source, set_trained, weight_dtype
from alignment.training.trainer import StageTrainer


def build_trainer(model_args: Any, data_args: Any, args: Any) -> StageTrainer:
    """Data first, for it fails fast; then the model, from the checkpoint where the run is resumed."""
    checkpoint = find_checkpoint(args.resume_from_checkpoint)
    source = model_source(args, model_args.model_name_or_path, checkpoint)
    tokenizer = load_named("model_name_or_path", load_tokenizer, source)
    train_set, eval_set = load_data(dataset_kind(args), data_args, args, tokenizer, checkpoint)
    model = load_named(
        "model_name_or_path", load_policy, source, weight_dtype(args), args.recompute, Placement.here()
    )
    set_trained(model, args, model_args.model_name_or_path, checkpoint)
    return TRAINERS[args.policy_update](args, model, tokenizer, train_set, eval_set, checkpoint)


def main() -> None:
    """Run the stage that the command line describes."""
    run_command("update", sys.argv[1:], GROUPS, build_trainer)


if __name__ == "__main__":
    run_main(main)
