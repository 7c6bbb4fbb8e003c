"""Logged answers as rows: prompts, tokens, masks, scores, truncation, splits, and what a checkpoint keeps of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignment.ppo.offline.logged import MEASURED_FILE, LoggedDataset, Samples, read_answers
from alignment.runtime.faults import UsageError
from alignment.runtime.files import Files
from data import DataError, RawDataset, RawSample
from tests.models.tiny import tiny_tokenizer

EOS = 2
PAIRS = [
    RawSample(input="w5 w6 w7", answer="w8 w9", other_answer="w10", better=True),
    RawSample(input="w5", answer="w11 w12 w13", other_answer="w11 w12 w13", better=False),
    RawSample(input="w6 w7", answer="w14", reward=2, other_answer="w15 w16", other_reward=-1.5),
    RawSample(input="w9", answer="w17", reward=0.25),
]


class Fixed(RawDataset):
    """Samples given by the test."""

    def __init__(self, samples):
        self.samples = samples

    def __getitem__(self, index):
        return self.samples[index]

    def __len__(self):
        return len(self.samples)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(tokenizer):
    def build(samples, max_length=20, max_prompt_len=20, **options):
        options = {"template": "plain"} | options
        return LoggedDataset(
            [(Fixed(samples), 1)], tokenizer, max_length=max_length, max_prompt_len=max_prompt_len, **options
        )

    return build


def tokens(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_every_answer_is_a_row_and_equal_ones_are_one(make, tokenizer):
    dataset = make(PAIRS)
    logged = read_answers(dataset)
    texts = ["w8 w9", "w10", "w11 w12 w13", "w14", "w15 w16", "w17"]
    assert len(logged) == 6 and logged.experience.row.tolist() == list(range(6))
    assert logged.experience.prompt_id.tolist() == [0, 0, 1, 2, 2, 3]
    for row, text in enumerate(texts):
        experience, item = logged.experience, dataset[logged.origin[row][0]]
        answer = experience.response_ids[row][experience.response_mask[row]].tolist()
        assert answer == [*tokens(text, tokenizer), EOS]
        prompt = experience.prompt_ids[row][experience.prompt_mask[row]].tolist()
        assert prompt == item["input_ids"].tolist() == dataset.prompt_ids(item["prompt"])
        whole = experience.input_ids[row][experience.attention_mask[row]].tolist()
        assert whole == prompt + answer
    assert logged.experience.finished.all()
    assert logged.experience.prompt_mask[:, -1].all() and logged.experience.response_mask[:, 0].all()
    np.testing.assert_array_equal(logged.given, np.array([math.nan] * 3 + [2, -1.5, 0.25], np.float32))


def test_what_reward_sources_are_shown(make):
    logged = read_answers(make(PAIRS))
    batch = logged.reward_batch(np.array([4, 1]))
    assert batch.responses == ["w15 w16", "w10"] and batch.samples == [PAIRS[2], PAIRS[0]]
    assert batch.prompts == [logged.dataset[2]["prompt"], logged.dataset[0]["prompt"]]
    assert [ids[-1] for ids in batch.response_ids] == [EOS, EOS] and batch.finished.all()
    assert batch.prompt_ids[1].tolist() == logged.dataset[0]["input_ids"].tolist()


def test_a_prompt_makes_room_for_the_longer_answer_and_keeps_its_own_limit(make, tokenizer):
    sample = RawSample(input="w5 w6 w7 w8 w9 w10", answer="w11", other_answer="w12 w13 w14")
    whole = len(make([sample])[0]["input_ids"])
    short = make([sample], max_length=whole + 3)
    assert len(short[0]["input_ids"]) == whole - 1 and short.report.shortened == 1  # 3 words and EOS
    assert short[0]["input_ids"][-1] == tokens("w10", tokenizer)[-1] or "w10" in short[0]["prompt"]
    assert len(make([sample], max_length=20, max_prompt_len=whole - 2)[0]["input_ids"]) == whole - 2
    with pytest.raises(DataError, match="no sample is left"):
        make([sample], max_length=whole + 3, truncation="drop")
    with pytest.raises(DataError, match="max_length"):
        make([sample], max_length=whole + 3, truncation="error")


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (RawSample(input="w5"), "field 'answer' is missing"),
        (RawSample(answer="w5"), "field 'input' is missing"),
        (RawSample(input="w5", answer=3), "field 'answer' must be a text"),
        (RawSample(input="w5", answer="w6", reward="good"), "field 'reward' must be a finite number, got 'good'"),
        (RawSample(input="w5", answer="w6", reward=math.inf), "field 'reward' must be a finite number, got inf"),
        (RawSample(input="w5", answer="w6", reward=True), "field 'reward' must be a finite number, got True"),
        (
            RawSample(input="w5", answer="w6", other_answer="w7", other_reward=math.nan),
            "field 'other_reward' must be a finite number, got nan",
        ),
    ],
)
def test_bad_samples_are_named(make, sample, words):
    with pytest.raises(DataError, match=words) as caught:
        make([PAIRS[0], sample])
    assert "sample 1" in str(caught.value)


def test_a_split_keeps_the_answers_to_a_prompt_together(make):
    train, test = make(PAIRS * 3).split_train_test(0.5, seed=1)
    assert len(train) == len(test) == 6
    for part in (train, test):
        logged = read_answers(part)
        assert {place for place, _ in logged.origin} == set(range(6))
        assert [Samples(part)[i] for i in range(6)] == [item["sample"] for item in part]


def test_a_checkpoint_keeps_what_was_measured(make, tmp_path):
    logged, again = (read_answers(make(PAIRS)) for _ in range(2))
    random, mask = np.random.default_rng(0), logged.experience.response_mask
    for name in ("ref_log_probs", "values"):
        getattr(logged.experience, name)[:] = np.where(mask, random.normal(0, 1, mask.shape), 0)
    logged.experience.scores[:] = random.normal(0, 1, len(logged))
    logged.save_measured(Files(tmp_path))
    again.load_measured(tmp_path)
    for name in ("ref_log_probs", "values", "scores"):
        np.testing.assert_array_equal(getattr(again.experience, name), getattr(logged.experience, name))
    assert make(PAIRS).fingerprint == logged.dataset.fingerprint != make(PAIRS[:2]).fingerprint
    with pytest.raises(UsageError, match="cannot resume"):
        read_answers(make(PAIRS[:2])).load_measured(tmp_path)
    (tmp_path / MEASURED_FILE).write_bytes((tmp_path / MEASURED_FILE).read_bytes()[:50])
    with pytest.raises(UsageError, match="cannot resume.*logged.npz"):
        again.load_measured(tmp_path)
