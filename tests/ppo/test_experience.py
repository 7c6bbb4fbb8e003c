"""Taking rows and merging ranks' parts lose nothing, and the whole does not depend on who had which part."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.ppo.experience import Targets, merge
from tests.ppo.experiences import assert_same, make_experience

quick = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
row_lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=8)


def make(seed, lengths):
    return make_experience(seed, *map(list, zip(*lengths, strict=True)))


@quick
@given(seeds, row_lengths, st.data())
def test_rows_keep_their_content_and_lose_shared_padding(seed, lengths, data):
    whole = make(seed, lengths)
    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8)))
    part = whole.take(rows)
    assert len(part) == len(rows)
    assert part.prompt_ids.shape[1] == max(lengths[row][0] for row in rows)
    assert part.response_ids.shape[1] == max(lengths[row][1] for row in rows)
    for field in fields(whole):
        before, after = getattr(whole, field.name), getattr(part, field.name)
        for i, row in enumerate(rows):
            if before.ndim == 1:
                assert after[i] == before[row]
            else:
                side = "prompt_mask" if field.name.startswith("prompt") else "response_mask"
                kept, old = getattr(part, side)[i], getattr(whole, side)[row]
                np.testing.assert_array_equal(after[i][kept], before[row][old])
    assert part.prompt_mask[:, -1].all()  # padding is on the left of prompts
    assert part.response_mask[:, 0].all()  # and on the right of answers


@quick
@given(seeds, row_lengths, st.randoms(use_true_random=False), st.integers(1, 4))
def test_merging_gives_the_whole_whatever_the_partition(seed, lengths, random, ranks):
    whole = make(seed, lengths)
    shares = [[] for _ in range(ranks)]
    for row in random.sample(range(len(lengths)), len(lengths)):
        random.choice(shares).append(row)  # a rank may have none
    assert_same(merge([whole.take(np.array(share, dtype=int)) for share in shares]), whole)


@quick
@given(seeds, row_lengths)
def test_lengths_and_side_by_side(seed, lengths):
    experience = make(seed, lengths)
    assert experience.lengths.tolist() == [answer for _, answer in lengths]
    assert experience.attention_mask.sum(-1).tolist() == [sum(pair) for pair in lengths]
    for i, (prompt, answer) in enumerate(lengths):
        text = experience.input_ids[i][experience.attention_mask[i]]
        expected = [*experience.prompt_ids[i][-prompt:], *experience.response_ids[i][:answer]]
        assert text.tolist() == expected


def test_targets_are_cut_like_their_rows():
    experience = make_experience(1, [2, 3, 1], [4, 2, 1])
    targets = Targets(experience.values, experience.log_probs)
    rows = np.array([2, 1])
    taken = targets.take(rows, experience.take(rows).response_ids.shape[1])
    np.testing.assert_array_equal(taken.advantages, experience.values[[2, 1], :2])
    np.testing.assert_array_equal(taken.returns, experience.log_probs[[2, 1], :2])
