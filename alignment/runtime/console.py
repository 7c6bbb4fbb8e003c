"""What a person sees while a stage runs: a progress bar, a summary table, sample answers. Rank 0 only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from alignment.runtime.metrics import is_main_process

HEADLINES = {  # metric: its short name beside the bar
    "loss": "loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "objective/scores": "score",
    "rollout/reward_mean": "reward",
    "objective/kl": "kl",
    "rollout/length_mean": "length",
    "loss/policy_avg": "policy",
    "loss/value_avg": "value",
    "perf/iteration_s": "s/step",
    "perf/drawn_tokens_per_s": "tokens/s",
    "perf/answers_per_s": "answers/s",
}
_PLAIN_LINES = 20  # a run without a terminal prints about so many progress lines
_PLAIN_WIDTH = 110
_LONGEST_CELL = 400
_PROMPT_END = 160  # a prompt's last characters are what the answer answers


class Progress:
    """Counts steps; on a terminal as a bar, elsewhere (log files, the launcher) as a line now and then."""

    def __init__(self, total: int, start: int, bar: tqdm | None) -> None:
        self.total, self.done, self._bar, self._start = total, start, bar, start
        self._started = time.perf_counter()

    def advance(self, metrics: Mapping[str, float] | None = None) -> None:
        """One step more, with the metrics of that step."""
        self.done += 1
        words = [f"{short}={metrics[name]:.4g}" for name, short in HEADLINES.items() if metrics and name in metrics]
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(words), refresh=False)
            self._bar.update()
        elif is_main_process() and (self.done % max(1, self.total // _PLAIN_LINES) == 0 or self.done == self.total):
            print(f"step {self.done}/{self.total}  {' '.join(words)}  {self._left()}".rstrip(), flush=True)

    def _left(self) -> str:
        """Time to go, by the average step so far."""
        rate = (time.perf_counter() - self._started) / (self.done - self._start)
        seconds = round(rate * (self.total - self.done))
        return f"{seconds // 60}:{seconds % 60:02d} left" if seconds else ""


@contextmanager
def progress(total: int, start: int, args: Any, label: str = "training") -> Iterator[Progress]:
    """A `Progress` from step `start` to `total`; no bar with args.disable_tqdm or where stderr is no terminal."""
    wanted = is_main_process() and sys.stderr.isatty() and not getattr(args, "disable_tqdm", False)
    bar = tqdm(total=total, initial=start, desc=label, dynamic_ncols=True) if wanted else None
    try:
        yield Progress(total, start, bar)
    finally:
        if bar is not None:
            bar.close()


def show_summary(title: str, rows: Mapping[str, Any]) -> None:
    """A table of names and values at the end of a stage."""
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in rows.items():
        table.add_row(Text(name), Text(f"{value:.4g}" if isinstance(value, float) else str(value)))
    _show(table)


def show_samples(title: str, samples: Sequence[Mapping[str, Any]], limit: int = 4) -> None:
    """A table of the first `limit` sample answers: mappings with prompt, answer, reward, length and finished."""
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=2)
    table.add_column("answer", ratio=3)
    table.add_column("reward", justify="right")
    table.add_column("tokens", justify="right")
    for sample in samples[:limit]:
        prompt, answer = sample["prompt"].strip(), sample["answer"].strip()
        mark = "" if sample["finished"] else " (cut)"
        table.add_row(
            Text(prompt if len(prompt) <= _PROMPT_END else "..." + prompt[-_PROMPT_END:]),
            Text(answer if len(answer) <= _LONGEST_CELL else answer[:_LONGEST_CELL] + "..."),
            f"{sample['reward']:.3f}",
            f"{sample['length']}{mark}",
        )
    _show(table)


def say(line: str) -> None:
    """One line on stdout, above a running bar."""
    if is_main_process():
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def _show(table: Table) -> None:
    if not is_main_process():
        return
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    with tqdm.external_write_mode():
        console.print(table)
