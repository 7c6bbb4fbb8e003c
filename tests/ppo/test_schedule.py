"""Continuous batching, simulated: every token finds in the cache what came before it, and nothing is read twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.ppo.rollout.balance import ExpectedLengths, share_out
from alignment.ppo.rollout.limits import fair_length, shortest
from alignment.ppo.rollout.schedule import DECODING, FREE, Schedule

prompt_lists = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)


class Simulation:
    """Runs a schedule whose "model" notes at every place of the cache the text that led to it."""

    def __init__(self, prompts: list[list[int]], lengths: list[int], slots: int, rows: int) -> None:
        self.texts = [list(prompt) for prompt in prompts]
        self.lengths, self.rows, self.passes = lengths, max(rows, slots), 0
        self.begun = [len(prompt) for prompt in prompts]
        self.schedule = Schedule([np.asarray(prompt, np.int64) for prompt in prompts], slots, max(lengths), rows)
        self.cache: dict[int, tuple[int, ...]] = {}
        self.remembered: dict[int, tuple[int, ...]] = {}

    def run(self) -> None:
        while not self.schedule.is_done:
            self.step()
            self.passes += 1

    def step(self) -> None:
        schedule = self.schedule
        step = schedule.next_pass()
        assert len(step.tokens) <= self.rows and len(step.tokens) + len(step.remembered)
        ends = []
        for token, position, slot in zip(step.tokens, step.positions, step.slots, strict=True):
            text = self.texts[schedule.answer[slot]]
            assert text[position] == token
            self.cache[schedule.tables[slot, position]] = tuple(text[: position + 1])
        for position, slot in zip(step.positions, step.slots, strict=True):
            text = self.texts[schedule.answer[slot]]
            for earlier in range(position + 1):
                assert self.cache[schedule.tables[slot, earlier]] == tuple(text[: earlier + 1])
            ends.append(tuple(text[: position + 1]))
        known = [ends[row] for row in step.wanted]
        for row, prompt in step.to_keep:
            self.remembered[prompt] = known[row]
        known += [self.remembered[int(prompt)] for prompt in step.remembered]
        self.draw(step.drawing, [known[source] for source in step.sources])

    def draw(self, slots: np.ndarray, texts: list[tuple[int, ...]]) -> None:
        """Each slot draws from the logits of exactly its own text."""
        assert len(set(slots.tolist())) == len(slots)
        answers = self.schedule.answer[slots]
        assert texts == [tuple(self.texts[answer]) for answer in answers]
        tokens = 100 * (answers + 1) + [len(self.texts[answer]) for answer in answers]  # no two texts go on alike
        self.schedule.record(slots, tokens)
        for slot, answer, token in zip(slots, answers, tokens, strict=True):
            self.texts[answer].append(int(token))
            if len(self.texts[answer]) - self.begun[answer] == self.lengths[answer]:
                self.schedule.finish(slot)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(prompt_lists, st.integers(1, 6), st.integers(1, 30), st.randoms(use_true_random=False))
def test_every_token_sees_its_own_text_and_every_answer_gets_its_tokens(prompts, slots, rows, random):
    lengths = [random.randint(1, 6) for _ in prompts]
    simulation = Simulation(prompts, lengths, slots, rows)
    simulation.run()
    assert [len(text) - begun for text, begun in zip(simulation.texts, simulation.begun, strict=True)] == lengths
    beginnings = {tuple(prompt[: i + 1]) for prompt in prompts for i in range(len(prompt))}
    assert simulation.schedule.computed_prompt_tokens == len(beginnings)  # each is computed once
    held = simulation.schedule.references
    assert held.max() == 1 and held.sum() == len(max(prompts))  # the last prompt's; all else is free again
    assert simulation.schedule.free_count == simulation.schedule.places - held.sum()


def test_a_finished_slot_takes_the_next_answer_at_once():
    """Slots 2, answers of 1, 4, 2 and 1 tokens to one prompt: slot 0 works on 0, 2, 3 while slot 1 draws its four."""
    simulation = Simulation([[1, 2]] * 4, [1, 4, 2, 1], 2, 8)
    answers = []
    while not simulation.schedule.is_done:
        simulation.step()
        answers.append(simulation.schedule.answer.tolist())
    assert answers == [[-1, 1], [2, 1], [-1, 1], [-1, -1]]


def test_long_prompts_do_not_hold_up_answers_that_are_being_drawn():
    simulation = Simulation([[0], [1] * 9], [5, 1], 2, 4)
    lengths = []
    while not simulation.schedule.is_done:
        simulation.step()
        lengths.append(len(simulation.texts[0]) - 1)
    assert lengths == [1, 2, 3, 4, 5][: len(lengths)]


def test_paused_slots_draw_nothing():
    schedule = Schedule([np.array([1]), np.array([2])], 2, 4, 8)
    step = schedule.next_pass()
    schedule.record(step.drawing, np.array([7, 8]))
    step = schedule.next_pass(np.array([True, False]))
    assert step.drawing.tolist() == [1] and step.tokens.tolist() == [8]
    assert schedule.state.tolist() == [DECODING, DECODING] != FREE


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 120))
def test_fair_length_is_the_greatest_that_fits(lengths, budget):
    length = fair_length(np.asarray(lengths), budget)
    assert np.minimum(lengths, length).sum() <= budget
    assert np.minimum(lengths, length + 1).sum() > budget or length >= max(lengths)


@pytest.mark.parametrize(("lengths", "budget", "expected"), [([4, 4, 4], 12, 12), ([2, 9, 9], 12, 5), ([9, 9], 3, 1)])
def test_fair_length_by_hand(lengths, budget, expected):
    """Two tokens to the short one leave ten for the others; all fit: the budget itself."""
    assert fair_length(np.asarray(lengths), budget) == expected


def test_shortest_prefers_the_smaller_sample_number():
    kept = shortest(np.array([5, 3, 5, 9]), np.array([2, 3, 0, 1]), 2)
    assert kept.tolist() == [False, True, True, False]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.1, 50), max_size=20), st.integers(1, 5))
def test_parts_are_disjoint_whole_and_even(costs, count):
    parts = [share_out(costs, index, count) for index in range(count)]
    assert sorted(sum(parts, [])) == list(range(len(costs)))
    loads = [sum(costs[item] for item in part) for part in parts]
    assert max(loads) <= sum(costs) / count + max(costs, default=0)


def test_expected_lengths_follow_what_was_drawn():
    expected = ExpectedLengths()
    expected.update(np.array([4, 4, 7]), np.array([10, 20, 60]))
    assert (expected.of(4), expected.of(7), expected.of(9)) == (15, 60, 30)
    resumed = ExpectedLengths()
    resumed.load_state_dict(json.loads(json.dumps(expected.state_dict())))
    assert (resumed.of(4), resumed.of(7), resumed.of(9)) == (15, 60, 30)
