"""Reward modelling: ``python run_reward.py config.json [--key value ...]``, also under paddle.distributed.launch."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by path: `import alignment` and `import data` mean this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from alignment.ppo.models.placement import Placement
from alignment.ppo.models.tokenizer import Tokenizer, load_tokenizer
from alignment.ppo.models.value import ScoreModel, load_value
from alignment.rm.arguments import GROUPS
from alignment.rm.losses import ExponentialMovingAverage, RunningMeanStd
from alignment.rm.trainer import RewardTrainer
from alignment.runtime.faults import UsageError, run_main
from alignment.training.checkpoint import find_checkpoint
from alignment.training.command import run_command
from alignment.training.setup import load_data, load_named, model_source, set_trained, weight_dtype
from data import ComparisonDataset


def build_normalizer(model_args: Any) -> RunningMeanStd | ExponentialMovingAverage | None:
    """The score normaliser that the arguments ask for."""
    if not model_args.normalize_score_during_training:
        return None
    if model_args.normalizer_type == "RunningMeanStd":
        return RunningMeanStd()
    return ExponentialMovingAverage(model_args.normalizer_momentum)


def find_separator(model_args: Any, tokenizer: Tokenizer) -> int | None:
    """Id of the token between prompt and answer, or None; raises UsageError if the vocabulary has no such token."""
    if not model_args.add_sep_token:
        return None
    token = model_args.sep_token or tokenizer.files.special_token("sep_token") or tokenizer.eos_token
    found = tokenizer.token_to_id(token)
    if found is None:
        raise UsageError(f'"sep_token": {token!r} is no token of {model_args.model_name_or_path}; name one that is')
    return found


def set_reading(model: ScoreModel, pooling_type: str, sep_token_id: int | None, eos_token_id: int) -> None:
    """How the model reads an answer, as its checkpoints will say.

    Raises: UsageError if it has been trained to read otherwise.
    """
    trained, wanted = (model.pooling_type, model.sep_token_id), (pooling_type, sep_token_id)
    if not model.head_is_new and trained != wanted:
        raise UsageError(
            f'"pooling_type": "{pooling_type}" with sep_token_id {sep_token_id}, but this reward model was trained '
            f'with "{trained[0]}" and sep_token_id {trained[1]}'
        )
    model.pooling_type, model.sep_token_id = wanted
    model.config.eos_token_id = eos_token_id  # what "last" passes over


def build_trainer(model_args: Any, data_args: Any, args: Any) -> RewardTrainer:
    """Data first, for it fails fast; then the model, from the checkpoint where the run is resumed."""
    checkpoint = find_checkpoint(args.resume_from_checkpoint)
    source = model_source(args, model_args.model_name_or_path, checkpoint)
    tokenizer = load_named("model_name_or_path", load_tokenizer, source)
    separator = find_separator(model_args, tokenizer)
    kind = partial(ComparisonDataset, sep_token_id=separator)
    train_set, eval_set = load_data(kind, data_args, args, tokenizer, checkpoint)
    model = load_named(
        "model_name_or_path",
        load_value,
        source,
        "reward",
        weight_dtype(args),
        args.recompute,
        do_normalize=False,
        placement=Placement.here(),
    )
    set_reading(model, model_args.pooling_type, separator, tokenizer.eos_token_id)
    set_trained(model, args, model_args.model_name_or_path, checkpoint)
    normalizer = build_normalizer(model_args)
    return RewardTrainer(args, model, tokenizer, train_set, eval_set, checkpoint, normalizer=normalizer)


def main() -> None:
    """Run the stage that the command line describes."""
    run_command("rm", sys.argv[1:], GROUPS, build_trainer)


if __name__ == "__main__":
    run_main(main)
