"""What is learnt from among scored samples: the best of them, the best against the worst, or all in their order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from alignment.apo.files import Placed, index_by_query
from alignment.apo.schemas import Comparison, Samples, Selected
from alignment.runtime.faults import UsageError
from data.builtin.apo import SEPARATOR
from data.builtin.apo_samples import ANSWER

MODES = ("best", "pairs", "ranking")


def read_scores(entries: Iterable[Placed]) -> tuple[dict[str, dict[str, float]], int]:
    """{query_id: {answer key: score}}, and how many scores a later, different one of the same answer replaced."""
    found: dict[str, dict[str, float]] = {}
    replaced = 0
    for item, _ in entries:
        for name, score in item.root.items():
            query_id, _, key = name.rpartition(":")
            scores = found.setdefault(query_id, {})
            replaced += scores.get(key, score) != score
            scores[key] = score
    return found, replaced


def rank(answers: Mapping[str, str], scores: Mapping[str, float], keep_duplicates: bool = False) -> list[str]:
    """Keys of the answers that are not empty, best first, of equal scores the lower number first.

    Of answers that are equal but for space around them only the first of these stays, unless ``keep_duplicates``.
    """
    keys = [key for key in answers if answers[key].strip()]
    keys.sort(key=lambda key: (-scores[key], int(ANSWER.fullmatch(key)[1])))
    if keep_duplicates:
        return keys
    first: dict[str, str] = {}
    for key in keys:
        first.setdefault(answers[key].strip(), key)
    return list(first.values())


def select(
    samples: list[Placed],
    scores: Mapping[str, Mapping[str, float]],
    mode: str = "best",
    min_margin: float = 0.0,
    keep_duplicates: bool = False,
) -> tuple[list[Selected | Comparison], Counter[str]]:
    """The selected items, in the samples' order, and how many were left out, by why.

    Args:
        scores: of each query_id, by answer key.
        mode: best: samples with their best answer as target and their scores; ranking: the same, but with the ranked
            answers alone, best first; pairs: a comparison of the best with the worst answer, where they differ.
        min_margin: least difference between the scores of the best and the worst answer.

    Raises: UsageError for a bad ``min_margin``, an answer without a score beside others that have one, different items
        of one query_id, or if nothing is left.
    """
    if not 0 <= min_margin < math.inf:
        raise UsageError(f"min_margin: {min_margin} is not allowed; it must be a finite number >= 0")
    items, repeated = index_by_query(samples)
    unknown = len(scores.keys() - items.keys())
    chosen, counts = [], Counter({"repeated items": repeated, "scored queries without samples": unknown})
    for query_id, entry in items.items():
        item, own = entry.item, _own_scores(entry, scores.get(query_id, {}))
        if not own:
            counts["items without scores"] += 1
            continue
        keys = rank(item.answers, own, keep_duplicates)
        margin = own[keys[0]] - own[keys[-1]] if keys else 0.0
        if not keys:
            counts["items with nothing but empty answers"] += 1
        elif mode == "pairs" and margin <= 0:
            counts["items without a better and a worse answer"] += 1
        elif margin < min_margin:
            counts[f"items with a margin below {min_margin:g}"] += 1
        else:
            chosen.append(_SELECT[mode](item, own, keys))
    if not chosen:
        raise UsageError(f"no item is left of {len(samples)}: {dict(+counts)}")
    return chosen, counts


def _own_scores(entry: Placed, scores: Mapping[str, float]) -> dict[str, float]:
    """The scores of an item's answers, in the answers' order: of all that are not empty, or of none."""
    item, where = entry
    own = {key: scores[key] for key in item.answers if key in scores}
    for key, answer in item.answers.items():
        if own and key not in own and answer.strip():
            raise UsageError(f'{where}: field "{key}": has no score, but {", ".join(own)} of the same query have')
    return own


def _select_best(item: Samples, scores: dict[str, float], keys: list[str]) -> Selected:
    return _selected(item, item.answers, item.answers[keys[0]], scores)


def _select_ranking(item: Samples, scores: dict[str, float], keys: list[str]) -> Selected:
    answers = {key: item.answers[key] for key in keys}
    return _selected(item, answers, answers[keys[0]], {key: scores[key] for key in keys})


def _select_pair(item: Samples, scores: dict[str, float], keys: list[str]) -> Comparison:
    ends = (keys[0], keys[-1])
    text = [f"{item.query}{SEPARATOR}{item.answers[key]}" for key in ends]
    return Comparison(text=text, scores=[scores[key] for key in ends], query_id=item.query_id)


def _selected(item: Samples, answers: Mapping[str, str], target: str, scores: dict[str, float]) -> Selected:
    values: dict[str, Any] = item.to_json()
    for key in item.answers:
        del values[key]
    return Selected.model_validate(values | answers | {"target": target, "scores": scores})


_SELECT = {"best": _select_best, "pairs": _select_pair, "ranking": _select_ranking}
