"""Useful tokens, and prompts padded for engines that need it."""

from __future__ import annotations

import numpy as np

from benchmarks.counting import pad_left, useful_lengths

EOS = 2


def test_tokens_count_up_to_and_including_the_first_eos():
    ids = np.array([[5, 6, EOS, EOS, EOS], [5, EOS, 7, EOS, 8], [EOS, EOS, EOS, EOS, EOS], [5, 6, 7, 8, EOS]])
    assert useful_lengths(ids, [EOS]).tolist() == [3, 2, 1, 5]


def test_answers_without_eos_count_whole():
    assert useful_lengths(np.array([[5, 6, 7], [5, EOS, 7]]), [EOS]).tolist() == [3, 2]


def test_any_of_several_ids_ends_an_answer():
    assert useful_lengths(np.array([[5, 9, EOS, 7], [EOS, 9, 5, 7]]), (EOS, 9)).tolist() == [2, 1]


def test_padding_goes_to_the_left_and_its_id_may_occur_in_prompts():
    ids, mask = pad_left([[EOS, 5], [3, EOS, 4, 6]], EOS)
    assert ids.tolist() == [[EOS, EOS, EOS, 5], [3, EOS, 4, 6]]
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
