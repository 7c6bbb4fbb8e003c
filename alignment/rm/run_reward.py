"""Reward modelling: ``python run_reward.py config.json [--key value ...]``, also under paddle.distributed.launch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by path: `import alignment` and `import data` mean this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from alignment.ppo.models.placement import Placement
from alignment.ppo.models.tokenizer import load_tokenizer
from alignment.ppo.models.value import load_value
from alignment.rm.arguments import GROUPS
from alignment.rm.losses import ExponentialMovingAverage, RunningMeanStd
from alignment.rm.trainer import RewardTrainer
from alignment.runtime.faults import run_main
from alignment.training.checkpoint import find_checkpoint
from alignment.training.command import run_command
from alignment.training.setup import load_data, load_named, model_source, set_trained, weight_dtype
from data import PreferenceDataset


def build_normalizer(model_args: Any) -> RunningMeanStd | ExponentialMovingAverage | None:
    """The score normaliser that the arguments ask for."""
    if not model_args.normalize_score_during_training:
        return None
    if model_args.normalizer_type == "RunningMeanStd":
        return RunningMeanStd()
    return ExponentialMovingAverage(model_args.normalizer_momentum)


def build_trainer(model_args: Any, data_args: Any, args: Any) -> RewardTrainer:
    """Data first, for it fails fast; then the model, from the checkpoint where the run is resumed."""
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    source = model_source(args, model_args.model_name_or_path, checkpoint)
    tokenizer = load_named("model_name_or_path", load_tokenizer, source)
    train_set, eval_set = load_data(PreferenceDataset, data_args, args, tokenizer)
    model = load_named(
        "model_name_or_path",
        load_value,
        source,
        "reward",
        weight_dtype(args),
        args.recompute,
        do_normalize=False,
        seed=args.seed,
        placement=Placement.here(),
    )
    set_trained(model, args, model_args.model_name_or_path, checkpoint)
    normalizer = build_normalizer(model_args)
    return RewardTrainer(args, model, tokenizer, train_set, eval_set, checkpoint, normalizer=normalizer)


def main() -> None:
    """Run the stage that the command line describes."""
    run_command("rm", sys.argv[1:], GROUPS, build_trainer)


if __name__ == "__main__":
    run_main(main)
