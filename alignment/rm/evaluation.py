"""What a reward model's held-out scores say: by kind of pair and by source, how calibrated, how distributed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignment.rm.metrics import (
    Calibration,
    calibration_curve,
    calibration_errors,
    fit_temperature,
    negative_log_likelihood,
    preference_accuracy,
    preference_metrics,
)

Arrays = dict[str, np.ndarray]
ROLES = ("chosen", "rejected", "golden", "sample")  # of an answer: in a comparison by people, or by APO


def roles_of(batch: Arrays) -> np.ndarray:
    """int64 [N], places in ROLES: whether an answer has its item's highest score, and whether the item is APO's.

    Args: batch: of data.ComparisonCollator.
    """
    highest = np.full(len(batch["is_apo"]), -np.inf)
    np.maximum.at(highest, batch["item"], batch["scores"])
    return 2 * batch["is_apo"][batch["item"]] + (batch["scores"] < highest[batch["item"]])


def coins_of(input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
    """uint32 [N]: a checksum of each row's tokens, which knows nothing of how people liked it.

    Of a pair, the row with the smaller one counts as the first: an order that is the same in every layout.

    Args: int64 [N, L] and bool [N, L].
    """
    rows = zip(input_ids, attention_mask, strict=True)
    return np.array([zlib.crc32(ids[mask].astype("<i8").tobytes()) for ids, mask in rows], dtype=np.uint32)


def kind_metrics(pairs: Arrays) -> dict[str, float]:
    """{human,apo}/{loss,accuracy}, of the kinds that there are; nothing where none is APO's.

    Args: pairs: loss, better, worse float [P], is_apo bool [P].
    """
    metrics = {}
    for name, chosen in (("human", ~pairs["is_apo"]), ("apo", pairs["is_apo"])):
        if chosen.any() and pairs["is_apo"].any():
            metrics[f"{name}/loss"] = float(pairs["loss"][chosen].astype(np.float64).mean())
            metrics[f"{name}/accuracy"] = preference_accuracy(pairs["better"][chosen], pairs["worse"][chosen])
    return metrics


def held_out_metrics(rows: Arrays, sources: Sequence[str]) -> dict[str, float]:
    """Calibration in one order, ``preference_metrics`` of each source if there are several, scores by role.

    Args:
        rows: what RewardTrainer.micro_batch reports, of all held-out samples.
        sources: names of the data sets; those of equal name count together.
    """
    errors = calibration_errors(one_order_curve(rows))
    metrics = {f"{name}_one_order": value for name, value in errors.items()}
    names = np.array(sources)[rows["source"]]
    for source in dict.fromkeys(sources) if len(set(names)) > 1 else ():
        own = names == source
        if own.any():
            by_source = preference_metrics(rows["better"][own], rows["worse"][own])
            metrics |= {f"{source}/{name}": value for name, value in by_source.items()}
    for role, scores in scores_by_role(rows).items():
        metrics |= {f"{role}/mean_reward": float(scores.mean()), f"{role}/reward_std": float(scores.std())}
    return metrics


def one_order_curve(rows: Arrays) -> Calibration:
    """The reliability curve with each pair in one order, of which ``worse_first`` says what it is."""
    margins = (rows["better"] - rows["worse"]).astype(np.float64)
    first = ~rows["worse_first"]
    return calibration_curve(np.where(first, margins, -margins), first, both_orders=False)


def scores_by_role(rows: Arrays) -> dict[str, np.ndarray]:
    """float64 scores of the answers of each role that there is."""
    scores = rows["score"].astype(np.float64)
    found = {name: scores[rows["role"] == number] for number, name in enumerate(ROLES)}
    return {name: values for name, values in found.items() if values.size}


def peoples_pairs(rows: Arrays) -> Arrays:
    """better, worse and worse_first [P] of the pairs that people compared; of all where there are no such."""
    chosen = ~rows["is_apo"] | rows["is_apo"].all()
    return {name: rows[name][chosen] for name in ("better", "worse", "worse_first")}


def calibrate(rows: Arrays) -> dict[str, float]:
    """The temperature that fits people's held-out choices, and ECE, ACE, MCE and likelihood before and after it.

    APO's pairs say nothing of what people choose and are left out.
    """
    pairs = peoples_pairs(rows)
    margins = (pairs["better"] - pairs["worse"]).astype(np.float64)
    temperature = fit_temperature(margins)
    metrics = {"calibration/temperature": temperature}
    for when, scaled in (("before", margins), ("after", margins / temperature)):
        errors = calibration_errors(calibration_curve(scaled, np.ones_like(scaled)))
        errors["nll"] = negative_log_likelihood(scaled)
        metrics |= {f"calibration/{name}_{when}": value for name, value in errors.items()}
    return metrics


def describe_curve(curve: Calibration) -> dict[str, Any]:
    """A reliability curve as plain JSON: lists by bin, its edges among them, and its errors."""
    lists = {name: values.tolist() for name, values in curve._asdict().items()}
    return {"edges": np.linspace(0, 1, len(curve.count) + 1).tolist(), **lists, **calibration_errors(curve)}
