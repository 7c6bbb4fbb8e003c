"""Rollout tokens a second on a CPU against transformers.generate and PaddleNLP.generate.

    python -m benchmarks.rollout --json rollout.json

hh64    64 HH prompts under the chat template, natural stopping, up to 128 new tokens
batch8  8 of them, exactly 64 new tokens
--scaling adds 1 to 64 prompts at 32 new tokens, and 16 to 128 new tokens for 8 prompts, without PaddleNLP

All sample at temperature 1 from the whole vocabulary, in fp32, and only tokens up to and including EOS count. A pair
is a run of ours, then one of the peer, with the same prompts; shown is the median of the pairs' ratios of tokens a
second. Each engine draws its own random numbers, so answers, and their lengths, differ. Loading and a first run are
not timed. In hh64 peers answer, in groups of like length, as many prompts at once as is fastest for them in a trial.
PaddleNLP runs without this toolkit's CPU settings. fraction_of_bandwidth_limit: see benchmarks.limit.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from alignment.runtime.faults import run_main
from benchmarks.limit import Limit
from benchmarks.machine import core_count, describe_machine, measure_machine, versions_of
from benchmarks.options import build_parser, find_peer_python, own_python, positive, whole
from benchmarks.paired import Contender
from benchmarks.results import run
from benchmarks.rollout_pairs import Rollouts, Setting, scale
from benchmarks.rollout_report import draw, show

SCALED_PROMPTS = 64


def main() -> None:
    """Measure, show, write."""
    run(parse_options(), measure, show, draw)


def parse_options() -> argparse.Namespace:
    """The command line. Raises: UsageError."""
    parser = build_parser("benchmarks.rollout", __doc__.splitlines()[0])
    parser.add_argument("--prompts", type=positive, default=64, help="prompts of the setting hh64")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="of the setting hh64")
    parser.add_argument("--batch-size", type=positive, default=64, help="rows that our engine decodes together")
    parser.add_argument("--paddlenlp-pairs", type=whole, help="pairs with PaddleNLP; 0: none; default: as --pairs")
    parser.add_argument("--paddlenlp-prompts", type=positive, help="prompts in those of hh64; default: as --prompts")
    parser.add_argument("--scaling", action="store_true", help="also over batch and length")
    parser.add_argument("--scaling-pairs", type=positive, default=2, help="pairs at each point of --scaling")
    options = parser.parse_args()
    options.peer_python = find_peer_python(options.peer_python)
    if options.paddlenlp_pairs is None:
        options.paddlenlp_pairs = options.pairs
    return options


def measure(options: argparse.Namespace, stack: ExitStack) -> dict:
    """Everything that is shown and written."""
    machine = describe_machine() | measure_machine()
    ours, peers = start(options, stack)
    machine["packages"] = versions_of("numpy")
    for contender in (ours, *peers.values()):
        machine["packages"] |= contender.hello["versions"]
    limit = Limit(machine["read_gb_per_s"] * 1e9, machine["gemm_gflops_per_s"] * 1e9, **ours.hello["parameters"])
    rollouts = Rollouts(ours, peers, limit)
    prompts = ours.ask("prompts", count=max(options.prompts, SCALED_PROMPTS))["prompts"]
    pairs = {"transformers": options.pairs, "paddlenlp": options.paddlenlp_pairs}
    hh64 = Setting("hh64", prompts[: options.prompts], 1, options.max_new_tokens)
    batch8 = Setting("batch8", prompts[:8], 64, 64)
    fewer = {"paddlenlp": options.paddlenlp_prompts}
    return {
        "benchmark": "rollout",
        "engine": options.engine,
        "machine": machine,
        "greedy_agreement": rollouts.agreement(prompts[:4]),
        "settings": {"hh64": rollouts.compare(hh64, pairs, fewer), "batch8": rollouts.compare(batch8, pairs)},
        "scaling": scale(prompts, rollouts.compare, options.scaling_pairs) if options.scaling else None,
    }


def start(options: argparse.Namespace, stack: ExitStack) -> tuple[Contender, dict[str, Contender]]:
    """Ours and the peers, loaded one after another; they end with ``stack``."""
    module = "benchmarks.contenders.rollout_"
    settings = [options.engine, options.model, str(options.batch_size)]
    ours = stack.enter_context(Contender("ours", f"{module}ours", own_python(), settings, plain=False))
    common = [str(ours.hello[key]) for key in ("directory", "eos_token_id", "pad_token_id")]
    wanted = {
        "transformers": (options.peer_python, [*common, str(core_count())]),
        "paddlenlp": (own_python() if options.paddlenlp_pairs else None, common),
    }
    peers = {
        name: stack.enter_context(Contender(name, module + name, python, arguments))
        for name, (python, arguments) in wanted.items()
        if python
    }
    return ours, peers


if __name__ == "__main__":
    run_main(main)
