"""One setting of benchmarks.rollout: its pairs with each peer, and what they say."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.limit import Limit
from benchmarks.paired import Contender, alternate, median_ratio, median_speed

WARM_UP_TOKENS, GREEDY_TOKENS, SHORT_TRIAL = 8, 16, 16
CHUNKS = {"transformers": (64, 32, 16), "paddlenlp": (64, 16)}


@dataclass(frozen=True)
class Setting:
    """Prompts, as token ids, and how many tokens an answer has, EOS included."""

    name: str
    prompts: list[list[int]]
    shortest: int
    longest: int


@dataclass(frozen=True)
class Rollouts:
    """Loaded contenders, and the machine's limit for their model."""

    ours: Contender
    peers: dict[str, Contender]
    limit: Limit

    def agreement(self, prompts: list[list[int]]) -> dict[str, float]:
        """Share of each peer's greedy tokens that are ours: 1 unless weights, masks or positions differ."""
        expected, *others = (
            sum(contender.ask("greedy", prompts=prompts, longest=GREEDY_TOKENS)["answers"], [])
            for contender in (self.ours, *self.peers.values())
        )
        return {
            name: statistics.mean(a == b for a, b in zip(expected, tokens, strict=True))
            for name, tokens in zip(self.peers, others, strict=True)
        }

    def compare(self, setting: Setting, pairs: dict[str, int], fewer: dict[str, int] | None = None) -> dict:
        """Pairs with every peer that is there, and how near the machine's limit ours came.

        Args: pairs: how many with each; fewer: how many of the prompts with some, where not all.
        """
        shape = {"prompts": len(setting.prompts), "shortest": setting.shortest, "longest": setting.longest}
        with_peers, own = {}, []
        self._warm_up(setting)
        for name in (name for name in self.peers if pairs[name]):
            asked = setting.prompts[: (fewer or {}).get(name)]
            part = Setting(setting.name, asked, setting.shortest, setting.longest)
            with_peers[name] = self._pairs(name, part, pairs[name])
            own += [pair["ours"] for pair in with_peers[name]["pairs"] if len(asked) == len(setting.prompts)]
        own = own or [self._time_ours(setting, number) for number in range(max(pairs.values()))]
        ratios = {f"vs_{name}": found["ratio"] for name, found in with_peers.items()}
        limits = [run["limit_tokens_per_s"] for run in own]
        fraction = median_fraction(own)
        ours = {"tokens_per_s": median_speed(own), "limit_tokens_per_s": statistics.median(limits), "runs": own}
        return shape | ratios | {"fraction_of_bandwidth_limit": fraction, "ours": ours, "peers": with_peers}

    def _pairs(self, name: str, setting: Setting, count: int) -> dict:
        peer = self.peers[name]
        chunk = self._choose_chunk(name, setting)
        print(f"{setting.name}, {len(setting.prompts)} prompts: ours and {name}, {chunk} at once", flush=True)
        ours = functools.partial(self._time_ours, setting)
        done = alternate(ours, functools.partial(self._time, peer, setting, chunk=chunk), count)
        theirs = [pair["peer"] for pair in done]
        return {
            "ratio": median_ratio(done),
            "tokens_per_s": median_speed(theirs),
            "fraction_of_bandwidth_limit": median_fraction(theirs),
            "prompts": len(setting.prompts),
            "prompts_at_once": chunk,
            "pairs": done,
        }

    def _choose_chunk(self, name: str, setting: Setting) -> int:
        """How many prompts at once are fastest for the peer; the trials warm it up as well.

        Trials are whole runs, for how long an answer makes others wait decides; PaddleNLP would take an hour for them.
        """
        peer, count = self.peers[name], len(setting.prompts)
        longest = setting.longest if name == "transformers" else min(setting.longest, SHORT_TRIAL)
        trial = Setting(setting.name, setting.prompts, min(setting.shortest, longest), longest)
        sizes = [size for size in CHUNKS[name] if size < count and setting.shortest == 1]
        if not sizes:
            self._time(peer, trial, 0, chunk=count)
            return count
        sizes = sorted({*sizes, min(count, CHUNKS[name][0])})
        return max(sizes, key=lambda size: median_speed([self._time(peer, trial, 0, chunk=size)]))

    def _warm_up(self, setting: Setting) -> None:
        tokens = min(setting.longest, WARM_UP_TOKENS)
        self._time_ours(Setting(setting.name, setting.prompts, min(setting.shortest, tokens), tokens), 0)

    def _time_ours(self, setting: Setting, number: int) -> dict:
        return self._time(self.ours, setting, number)

    def _time(self, contender: Contender, setting: Setting, number: int, **options: int) -> dict:
        """One run: seconds, tokens, the answers' lengths, and what the machine's limit would be for those lengths."""
        request = {"prompts": setting.prompts, "shortest": setting.shortest, "longest": setting.longest}
        run = contender.ask("generate", number=number, **request, **options)
        limit = self.limit.tokens_per_s([len(prompt) for prompt in setting.prompts], run["lengths"])
        return run | {"limit_tokens_per_s": limit}


def median_fraction(runs: list[dict]) -> float:
    """Median of the runs' tokens a second as a share of the limit for their lengths."""
    return statistics.median(run["tokens"] / run["seconds"] / run["limit_tokens_per_s"] for run in runs)


def scale(prompts: list[list[int]], compare: Callable[[Setting, dict[str, int]], dict], pairs: int) -> dict:
    """Results over the number of prompts and over the length of answers, with transformers if it is there."""
    counts = {"transformers": pairs, "paddlenlp": 0}
    by_batch = [Setting(f"{rows} x 32", prompts[:rows], 32, 32) for rows in (1, 2, 4, 8, 16, 32, 64)]
    by_length = [Setting(f"8 x {tokens}", prompts[:8], tokens, tokens) for tokens in (16, 32, 64, 128)]
    return {
        "batch": [compare(setting, counts) for setting in by_batch],
        "length": [compare(setting, counts) for setting in by_length],
    }
