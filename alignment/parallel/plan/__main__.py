"""python -m alignment.parallel.plan ARGUMENTS.json [--key value ...] --processes N"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from alignment.parallel.plan.arguments import ACTOR_STAGES, Options, Sizes, read_arguments
from alignment.parallel.plan.models import find_shapes
from alignment.parallel.plan.planning import plan
from alignment.parallel.plan.tables import markdown, show
from alignment.runtime.faults import RunError, UsageError, run_main


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan. Raises: UsageError for bad input, RunError if the run would not fit."""
    options, sizes = read_arguments(sys.argv[1:] if argv is None else argv, "python -m alignment.parallel.plan")
    stage = _stage(options, sizes)
    shapes = find_shapes(stage, sizes, options.model_config, options.reward_model_config)
    made = plan(stage, sizes, shapes, options.processes, options.device_memory_gb)
    if options.markdown:
        print(markdown(made))
    else:
        show(made)
    if not made.fits:
        raise RunError(made.verdict())
    print(made.verdict())


def _stage(options: Options, sizes: Sizes) -> str:
    """The option, or what the file's model says; the two must not differ."""
    names_actor = sizes.actor_model_name_or_path is not None
    if options.stage is None and not names_actor:
        raise UsageError(
            'command line: --stage: no "actor_model_name_or_path" is given; say whether it is rm, sft or update'
        )
    if options.stage and names_actor != (options.stage in ACTOR_STAGES):
        given = "is" if names_actor else "is not"
        raise UsageError(f'command line: --stage: {options.stage}, but "actor_model_name_or_path" {given} given')
    return options.stage or "ppo"


if __name__ == "__main__":
    run_main(main)
