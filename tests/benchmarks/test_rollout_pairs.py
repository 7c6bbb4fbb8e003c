"""What a setting's result says, with contenders whose speed is known."""

from __future__ import annotations

import pytest

from benchmarks.limit import Limit
from benchmarks.rollout_pairs import Rollouts, Setting, scale

LIMIT = Limit(bytes_per_s=4e6, flops_per_s=2e9, body=900_000, head=100_000)  # a step takes 1 s, or 1 ms a row
PROMPTS = [[7] * length for length in (3, 1, 2, 5)]


class Fake:
    """Gives ``rate`` tokens a second; at its ``best`` number of prompts at once, twice as many."""

    def __init__(self, rate: float, best: int | None = None, answers: tuple[int, ...] = (1, 2, 3)) -> None:
        self.rate, self.best, self.answers, self.asked = rate, best, list(answers), []

    def ask(self, do: str, **request) -> dict:
        if do == "greedy":
            return {"answers": [self.answers for _ in request["prompts"]]}
        self.asked.append(request)
        rate = self.rate * (2 if self.best and request["chunk"] == self.best else 1)
        tokens = len(request["prompts"]) * request["longest"]
        lengths = [request["longest"]] * len(request["prompts"])
        return {"seconds": tokens / rate, "tokens": tokens, "lengths": lengths}


def test_ratios_and_share_of_the_limit():
    rollouts = Rollouts(Fake(2.0), {"transformers": Fake(0.5)}, LIMIT)
    result = rollouts.compare(Setting("batch", PROMPTS, 10, 10), {"transformers": 3})
    assert result["vs_transformers"] == pytest.approx(4.0)
    assert len(result["peers"]["transformers"]["pairs"]) == 3
    limit = 40 / (9 + (2 * 900_000 * 11 + 2 * 100_000 * 4) / 2e9)
    assert result["fraction_of_bandwidth_limit"] == pytest.approx(2.0 / limit)
    assert result["peers"]["transformers"]["fraction_of_bandwidth_limit"] == pytest.approx(0.5 / limit)


def test_both_get_the_same_prompts_also_where_a_peer_gets_fewer():
    ours, slow = Fake(2.0), Fake(0.1)
    result = Rollouts(ours, {"paddlenlp": slow}, LIMIT).compare(
        Setting("hh", PROMPTS, 1, 32), {"paddlenlp": 2}, {"paddlenlp": 3}
    )
    timed = [request for request in ours.asked if request["longest"] == 32 and len(request["prompts"]) == 3]
    assert [request["prompts"] for request in timed] == [request["prompts"] for request in slow.asked[1:]]
    assert (result["prompts"], result["peers"]["paddlenlp"]["prompts"]) == (4, 3)
    # ours is described on all prompts, with runs of its own
    assert [len(run["lengths"]) for run in result["ours"]["runs"]] == [4, 4]


def test_without_peers_ours_is_measured_alone():
    result = Rollouts(Fake(2.0), {}, LIMIT).compare(Setting("batch", PROMPTS, 4, 4), {"transformers": 5})
    assert len(result["ours"]["runs"]) == 5
    assert result["ours"]["tokens_per_s"] == pytest.approx(2.0)
    assert not [name for name in result if name.startswith("vs_")]


@pytest.mark.parametrize("best", [16, 32, 64])
def test_peer_answers_as_many_at_once_as_is_fastest_for_it(best):
    peer = Fake(1.0, best)
    rollouts = Rollouts(Fake(4.0), {"transformers": peer}, LIMIT)
    result = rollouts.compare(Setting("hh", [[7]] * 64, 1, 8), {"transformers": 1})
    assert result["peers"]["transformers"]["prompts_at_once"] == best
    assert result["vs_transformers"] == pytest.approx(2.0)


def test_agreement_is_the_share_of_equal_greedy_tokens():
    peers = {"transformers": Fake(1.0), "paddlenlp": Fake(1.0, answers=(1, 9, 3))}
    assert Rollouts(Fake(1.0), peers, LIMIT).agreement(PROMPTS) == {
        "transformers": 1.0,
        "paddlenlp": pytest.approx(2 / 3),
    }


def test_scaling_covers_batches_and_lengths_without_paddlenlp():
    rollouts = Rollouts(Fake(2.0), {"transformers": Fake(1.0), "paddlenlp": Fake(0.1)}, LIMIT)
    result = scale([[7]] * 64, rollouts.compare, 2)
    assert [point["prompts"] for point in result["batch"]] == [1, 2, 4, 8, 16, 32, 64]
    assert [(point["prompts"], point["longest"]) for point in result["length"]] == [(8, n) for n in (16, 32, 64, 128)]
    assert all(list(point["peers"]) == ["transformers"] for point in result["batch"] + result["length"])
