"""When the metrics of a run ask for a person: one Rule an alert. The checks are pure functions of metric rows.

Thresholds are no arguments: where one is crossed something is wrong, and the advice names what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Row = dict[str, float]  # finite values by metric
Rows = Sequence[Row]

START = LATEST = 5  # rows whose means stand for "at the start" and "now": one row alone is mostly noise
RATIO_ERROR = 0.05**2  # mean (ratio - 1)^2; rounding gives 1e-12 in float32 and about 0.01^2 in bfloat16
KL_A_TOKEN = 0.5  # nats: the policy finds its tokens 1.6 times as likely as the reference does; healthy runs: < 0.1
NEGATIVE_KL = -0.1  # nats an answer; no KL is below 0, and estimates of few answers come back above it in 5 rows
MORE_REWARD = 1.0  # in deviations of single answers at the start: far outside the noise of a mean
MORE_LENGTH = 2.0  # times
MORE_REPETITION = 0.2  # of the n-grams; good prose has under 0.05
MORE_VALUE_LOSS = 5.0  # times; scores that spread as the policy learns double it, not more
CRITIC_ROWS = 20  # a new critic may take some to be better than a constant
LOW_ENTROPY = 0.1  # nats a token: sampling is nearly greedy
LESS_ENTROPY = 0.25  # times; a policy that was sure from the start has not collapsed
MORE_LOSS, NOISE = 1.5, 0.1  # times and nats: worse than untrained, beyond a batch's luck
MORE_HELD_OUT_LOSS = 1.2  # times the best


class Rule(NamedTuple):
    """An alert.

    metrics: rows without a finite value of each do not count. first, last: rows of the start and latest rows that
    ``check`` is given, in this order; it gives the values to show, or None where all is well. seen, advice: format
    strings, of the values by metric and of the arguments.
    """

    name: str
    metrics: tuple[str, ...]
    first: int
    last: int
    check: Callable[[Rows], Row | None]
    seen: str
    advice: str

    def tell(self, values: Row, args: Any) -> str:
        """One line: what is seen, its likely cause, and the arguments to change with their values."""
        return f"{self.seen.format_map({'v': values})}: {self.advice.format_map(_Named(args))}"


class _Named(dict):
    """{key} of a format string becomes the argument with its value, or what it is called where a stage has none."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.args = args

    def __missing__(self, key: str) -> str:
        value = getattr(self.args, key, None)
        return f'"{key}"' if value is None else f'"{key}" ({value})'


def mean(rows: Rows, name: str) -> float:
    """Of one metric."""
    return sum(row[name] for row in rows) / len(rows)


def check_ratio(rows: Rows) -> Row | None:
    """Sampling and training are two policies before the first step."""
    return rows[-1] if rows[-1]["val/ratio_start_error"] > RATIO_ERROR else None


def check_large_kl(rows: Rows) -> Row | None:
    """Far from the reference, a token."""
    a_token = mean(rows, "objective/kl") / mean(rows, "rollout/length_mean")
    return rows[-1] if a_token > KL_A_TOKEN else None


def check_negative_kl(rows: Rows) -> Row | None:
    """Below 0 by more than chance."""
    below = all(row["objective/kl"] < 0 for row in rows) and mean(rows, "objective/kl") < NEGATIVE_KL
    return rows[-1] if below else None


def check_hacking(rows: Rows) -> Row | None:
    """The reward is up, and answers are much longer or repeat themselves."""
    before, now = rows[:START], rows[START:]
    rise = mean(now, "rollout/reward_mean") - mean(before, "rollout/reward_mean")
    longer = mean(now, "rollout/length_mean") > MORE_LENGTH * mean(before, "rollout/length_mean")
    repeats = mean(now, "rollout/repetition_rate") - mean(before, "rollout/repetition_rate") > MORE_REPETITION
    hacked = rise > MORE_REWARD * mean(before, "rollout/reward_std") and (longer or repeats)
    return rows[-1] if hacked else None


def check_value_loss(rows: Rows) -> Row | None:
    """Much larger than at the start."""
    before, now = mean(rows[:START], "loss/value_avg"), mean(rows[START:], "loss/value_avg")
    return {"loss/value_avg": now} if now > MORE_VALUE_LOSS * before else None


def check_critic(rows: Rows) -> Row | None:
    """No better than a constant, all the time."""
    return rows[-1] if all(row["critic/vf_explained_var"] < 0 for row in rows) else None


def check_truncated(rows: Rows) -> Row | None:
    """No answer ended by itself."""
    return rows[-1] if all(row["rollout/truncated_rate"] == 1 for row in rows) else None


def check_entropy(rows: Rows) -> Row | None:
    """Nearly none is left of what there was."""
    before, now = (mean(part, "policy/entropy_avg") for part in (rows[:START], rows[START:]))
    return {"policy/entropy_avg": now} if now < min(LOW_ENTROPY, LESS_ENTROPY * before) else None


def check_reward_spread(rows: Rows) -> Row | None:
    """All answers of an iteration are worth the same."""
    return rows[-1] if all(row["rollout/reward_std"] == 0 for row in rows) else None


def check_loss(rows: Rows) -> Row | None:
    """Worse than at the start."""
    before, now = mean(rows[:START], "loss"), mean(rows[START:], "loss")
    return {"loss": now} if now > MORE_LOSS * before + NOISE else None


def check_held_out_loss(rows: Rows) -> Row | None:
    """Twice in a row well above where it was."""
    best, *latest = (row["eval/loss"] for row in rows)
    return rows[-1] if best > 0 and min(latest) > MORE_HELD_OUT_LOSS * best else None


RULES = (
    Rule(
        "ratio-off-at-start", ("val/ratio_start_error",), 0, 1, check_ratio,
        "before the first step of an iteration the ratio is off 1 by {v[val/ratio_start_error]:.3g} (mean square)",
        "sampling and training use different probabilities; look at {temperature}, dropout in the model's "
        "configuration and {rollout_batch_size}, or set {use_fusemt} to false",
    ),
    Rule(
        "kl-exploding", ("objective/kl", "rollout/length_mean"), 0, LATEST, check_large_kl,
        "the KL to the reference is {v[objective/kl]:.3g} nats an answer of {v[rollout/length_mean]:.3g} tokens",
        "the policy runs away from its start; raise {kl_coeff} or lower {learning_rate}",
    ),
    Rule(
        "kl-negative", ("objective/kl",), 0, LATEST, check_negative_kl,
        "the KL to the reference is {v[objective/kl]:.3g} nats an answer, which no KL can be",
        "answers come from another distribution than the policy's; set {top_p} to 1, {top_k} to 0 and "
        "{repetition_penalty} to 1",
    ),
    Rule(
        "reward-hacking",
        ("rollout/reward_mean", "rollout/reward_std", "rollout/length_mean", "rollout/repetition_rate"),
        START, LATEST, check_hacking,
        "the reward rose to {v[rollout/reward_mean]:.3g} while answers grew to {v[rollout/length_mean]:.3g} tokens, "
        "{v[rollout/repetition_rate]:.0%} of them repeated",
        "the policy may exploit the reward; read samples.jsonl, raise {kl_coeff}, or mend the reward",
    ),
    Rule(
        "value-loss-diverging", ("loss/value_avg",), START, LATEST, check_value_loss,
        "the value loss is {v[loss/value_avg]:.3g}, more than 5 times that of the start",
        "the critic's steps are too long, or scores grow; lower {critic_learning_rate} (or {learning_rate}), or set "
        "{score_scaling}",
    ),
    Rule(
        "critic-not-learning", ("critic/vf_explained_var",), 0, CRITIC_ROWS, check_critic,
        "the critic explains less than a constant would ({v[critic/vf_explained_var]:.3g}), 20 rows in a row",
        "it learns too slowly or its values are held back; raise {critic_learning_rate} or {clip_range_value}, or "
        "set {score_scaling}",
    ),
    Rule(
        "all-answers-truncated", ("rollout/truncated_rate",), 0, LATEST, check_truncated,
        "no answer ended by itself, 5 rows in a row",
        "the limit is too low, or the policy has not learnt to end; raise {max_new_tokens} or {missing_eos_penalty}",
    ),
    Rule(
        "entropy-collapsed", ("policy/entropy_avg",), START, LATEST, check_entropy,
        "the entropy is {v[policy/entropy_avg]:.3g} nats a token, less than a quarter of that of the start",
        "all answers become alike; raise {entropy_coeff} or {kl_coeff}, or lower {learning_rate}",
    ),
    Rule(
        "reward-without-spread", ("rollout/reward_std",), 0, LATEST, check_reward_spread,
        "all answers got the same reward, 5 rows in a row",
        "there is nothing to learn from; look at the reward source, raise {num_return_sequences} or {temperature}",
    ),
    Rule(
        "loss-diverging", ("loss",), START, LATEST, check_loss,
        "the loss is {v[loss]:.3g}, more than half above that of the start",
        "the steps are too long; lower {learning_rate}, or raise {warmup_ratio}",
    ),
    Rule(
        "held-out-loss-rising", ("eval/loss",), 0, 3, check_held_out_loss,
        "the held-out loss is {v[eval/loss]:.3g}, a fifth above what it was two evaluations before",
        "the model learns its samples by heart; stop earlier ({num_train_epochs}, {max_steps}) or lower "
        "{learning_rate}",
    ),
)  # fmt: skip
