"""Tokenised data sets: contents, mixing, truncation, splits."""

from __future__ import annotations

import numpy as np
import pytest

from data import (
    DataError,
    PreferenceDataset,
    PromptOnlyDataset,
    RawDataset,
    RawSample,
    SafetyPreferenceDataset,
    SupervisedDataset,
)

EXCERPT = "hh-excerpt/test"


class Fixed(RawDataset):
    """Samples given by the test."""

    def __init__(self, samples):
        self.samples = samples

    def __getitem__(self, index):
        return self.samples[index]

    def __len__(self):
        return len(self.samples)


def keys(dataset):
    return [tuple(item["input_ids"].tolist()) for item in dataset]


def test_prompt_items(tokenizer):
    dataset = PromptOnlyDataset(EXCERPT, tokenizer)
    raw = RawDataset.load(EXCERPT)
    item = dataset[3]
    assert item["prompt_id"] == 3 and item["sample"] == raw[3] and item["input_ids"].dtype == np.int64
    assert tokenizer.decode(item["input_ids"]) == item["prompt"]
    assert item["prompt"].endswith(f"{raw[3]['input'][-1]}<|im_end|>\n<|im_start|>assistant\n")


def test_preference_items_put_the_better_answer_first(tokenizer):
    samples = [RawSample(input="q", answer="one", other_answer="two", better=flag) for flag in (True, False)]
    dataset = PreferenceDataset([Fixed(samples)], tokenizer)
    prompt = PromptOnlyDataset([Fixed(samples)], tokenizer)[0]["input_ids"].tolist()
    for item, (better, worse) in zip(dataset, (("one", "two"), ("two", "one")), strict=True):
        for name, answer in (("better", better), ("worse", worse)):
            expected = prompt + tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            assert item[f"{name}_input_ids"].tolist() == expected
        assert item["prompt_length"] == len(prompt)


def test_safety_signs(tokenizer):
    fields = {"input": "q", "answer": "one", "other_answer": "two", "is_safe": False, "is_other_safe": True}
    dataset = SafetyPreferenceDataset([Fixed([RawSample(**fields, safer=False)])], tokenizer)
    item = dataset[0]
    assert tokenizer.decode(item["safer_input_ids"]).endswith("two<|im_end|>")
    assert (item["safer_safety_sign"], item["unsafer_safety_sign"]) == (1, -1)


def test_supervised_labels_are_the_answers(tokenizer):
    samples = [
        RawSample(dialogue=["q1", "a1", "q2", "a2"]),
        RawSample(input="q", answer="bad", other_answer="good", better=False),
    ]
    dataset = SupervisedDataset([Fixed(samples)], tokenizer)
    first, second = dataset[0], dataset[1]
    assert tokenizer.decode(first["labels"][first["labels"] >= 0]) == "a1<|im_end|>a2<|im_end|>"
    assert tokenizer.decode(second["labels"][second["labels"] >= 0]) == "good<|im_end|>"
    text = tokenizer.decode(first["input_ids"])
    assert text.endswith(
        "q1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n"
        "<|im_start|>assistant\na2<|im_end|>"
    )
    for item in (first, second):
        marked = item["labels"] != -100
        assert (item["labels"][marked] == item["input_ids"][marked]).all()


def test_earlier_answers_that_the_template_rewrites_are_no_targets(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content | upper }}]{% endfor %}:"
    item = SupervisedDataset([Fixed([RawSample(dialogue=["q", "first", "r", "last"])])], tokenizer)[0]
    assert tokenizer.decode(item["input_ids"]) == "[Q][FIRST][R]:last<|im_end|>"
    assert tokenizer.decode(item["labels"][item["labels"] >= 0]) == "last<|im_end|>"


def test_earlier_answer_without_end_of_text_keeps_the_templates_own_end(tokenizer):
    item = SupervisedDataset([Fixed([RawSample(dialogue=["q", "one", "r", "two"])])], tokenizer, template="hh")[0]
    assert tokenizer.decode(item["labels"][item["labels"] >= 0]) == "two<|im_end|>"
    item = SupervisedDataset([Fixed([RawSample(dialogue=["q", "one", "r", "two"])])], tokenizer, template="pku")[0]
    assert tokenizer.decode(item["labels"][item["labels"] >= 0]) == "one<|im_end|>two<|im_end|>"


@pytest.mark.parametrize(
    ("proportion", "size"), [(1, 80), (0.25, 20), ("1/4", 20), ("7/-1", 7), (2.5, 200), ("90/-1", 90)]
)
def test_proportions(proportion, size, tokenizer):
    dataset = PromptOnlyDataset({EXCERPT: proportion}, tokenizer)
    assert len(dataset) == size == dataset.report.kept
    assert [item["prompt_id"] for item in dataset] == list(range(size))
    counts = np.unique(keys(dataset) and [hash(key) for key in keys(dataset)], return_counts=True)[1]
    assert counts.max() - counts.min() <= 1 and len(counts) == min(size, 80)


def test_seed_alone_decides(tokenizer):
    part = PromptOnlyDataset(f"{EXCERPT}:0.5", tokenizer, seed=1)
    assert keys(part) == keys(PromptOnlyDataset(f"{EXCERPT}:0.5", tokenizer, seed=1))
    assert keys(part) != keys(PromptOnlyDataset(f"{EXCERPT}:0.5", tokenizer, seed=2))
    mixed = PromptOnlyDataset(f"hh-excerpt/train:0.1,{EXCERPT}:0.5", tokenizer, seed=1)
    assert keys(mixed)[-40:] == keys(part)


def test_zero_leaves_out_and_nothing_left_is_an_error(tokenizer):
    assert len(PromptOnlyDataset({"alpaca": 0, EXCERPT: 1}, tokenizer)) == 80
    with pytest.raises(DataError, match="no sample is left"):
        PromptOnlyDataset({EXCERPT: 0}, tokenizer)
    with pytest.raises(DataError, match=r"no sample is left; .*80 samples over 3 tokens dropped"):
        PromptOnlyDataset(EXCERPT, tokenizer, max_length=3)
    with pytest.raises(DataError, match="dataset 'Fixed' is empty"):
        PromptOnlyDataset([Fixed([])], tokenizer)


def test_duplicate_prompts_go_within_a_data_set_only(tokenizer):
    samples = [RawSample(input=text) for text in ("a", ["a"], "b", "a")] + [RawSample(input="a", system="s")]
    dataset = PromptOnlyDataset([Fixed(samples), Fixed([RawSample(input="a")])], tokenizer)
    assert [item["sample"]["input"] for item in dataset] == ["a", "b", "a", "a"]
    assert dataset.report.duplicates == 2


def test_equal_answers_are_left_out_and_counted(tokenizer):
    pair = {"input": "q", "answer": "x", "better": True}
    samples = [RawSample(**pair, other_answer="x"), RawSample(**pair, other_answer="y")]
    dataset = PreferenceDataset([Fixed(samples)], tokenizer)
    assert (len(dataset), dataset.report.identical) == (1, 1)
    assert dataset.report.summary() == "PreferenceDataset: 1 samples from Fixed (1 pairs with equal answers removed)"


@pytest.mark.parametrize("limit", [60, 90, 130, 10_000])
def test_truncation_keeps_answers_and_generation_prompt(limit, tokenizer):
    whole = PreferenceDataset(EXCERPT, tokenizer)
    cut = PreferenceDataset(EXCERPT, tokenizer, max_length=limit)
    size = [max(len(item["better_input_ids"]), len(item["worse_input_ids"])) for item in whole]
    assert cut.report.shortened + cut.report.dropped == sum(length > limit for length in size)
    assert cut.report.kept + cut.report.dropped == len(whole)
    answers = {tuple(item["better_input_ids"][item["prompt_length"] :]) for item in whole}
    for item in cut:
        assert max(len(item["better_input_ids"]), len(item["worse_input_ids"])) <= limit
        assert tuple(item["better_input_ids"][item["prompt_length"] :]) in answers
        prompt = tokenizer.decode(item["better_input_ids"][: item["prompt_length"]])
        assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_prompts_lose_their_oldest_text(tokenizer):
    samples = [RawSample(input=["old question", "old answer", "what is the new question about?"])]
    whole = PromptOnlyDataset([Fixed(samples)], tokenizer)[0]
    last = PromptOnlyDataset([Fixed([RawSample(input=samples[0]["input"][2])])], tokenizer)[0]
    for limit in range(len(last["input_ids"]), len(whole["input_ids"])):
        assert keys(PromptOnlyDataset([Fixed(samples)], tokenizer, max_length=limit)) == [tuple(last["input_ids"])]
    item = PromptOnlyDataset([Fixed(samples)], tokenizer, max_length=len(last["input_ids"]) - 3)[0]
    text = item["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    assert 0 < len(text) < len(samples[0]["input"][2]) and samples[0]["input"][2].endswith(text)
    assert tokenizer.decode(item["input_ids"]) == item["prompt"]


def test_supervised_drops_old_exchanges_first(tokenizer):
    dialogue = ["first question here", "first answer", "second question", "second answer"]
    full = SupervisedDataset([Fixed([RawSample(dialogue=dialogue)])], tokenizer)
    cut = SupervisedDataset(
        [Fixed([RawSample(dialogue=dialogue)])], tokenizer, max_length=len(full[0]["input_ids"]) - 1
    )
    short = SupervisedDataset([Fixed([RawSample(dialogue=dialogue[2:])])], tokenizer)
    assert keys(cut) == keys(short) and cut.report.shortened == 1


def test_drop_and_error_policies(tokenizer):
    limit = 60
    lengths = [len(item["input_ids"]) for item in PromptOnlyDataset(EXCERPT, tokenizer)]
    over = sum(length > limit for length in lengths)
    dataset = PromptOnlyDataset(EXCERPT, tokenizer, max_length=limit, truncation="drop")
    assert 0 < over == dataset.report.dropped and dataset.report.shortened == 0 and len(dataset) == 80 - over
    assert [item["prompt_id"] for item in dataset] == [place for place, size in enumerate(lengths) if size <= limit]
    first = next(place for place, size in enumerate(lengths) if size > limit)
    message = f"'hh-excerpt/test', sample {first}, file .*: {lengths[first]} tokens are more than max_length 60"
    with pytest.raises(DataError, match=message):
        PromptOnlyDataset(EXCERPT, tokenizer, max_length=limit, truncation="error")


def test_bad_arguments(tokenizer):
    with pytest.raises(DataError, match="truncation must be one of prompt, drop, error, got 'left'"):
        PromptOnlyDataset(EXCERPT, tokenizer, truncation="left")
    with pytest.raises(DataError, match="max_length must be at least 1, got 0"):
        PromptOnlyDataset(EXCERPT, tokenizer, max_length=0)
    tokenizer.eos_token_id = None
    with pytest.raises(DataError, match="no end-of-text token"):
        PromptOnlyDataset(EXCERPT, tokenizer)


def test_split_keeps_prompt_ids(tokenizer):
    dataset = PromptOnlyDataset(EXCERPT, tokenizer)
    train, test = dataset.split_train_test(0.25, seed=0)
    ids = [[item["prompt_id"] for item in part] for part in (train, test)]
    assert sorted(ids[0] + ids[1]) == list(range(80)) and len(ids[1]) == 20 == test.report.kept
    assert all(item["input_ids"].tolist() == dataset[item["prompt_id"]]["input_ids"].tolist() for item in test)
    assert len(dataset) == 80 == dataset.report.kept


def test_missing_safety_fields_are_named(tokenizer):
    message = (
        "dataset 'hh-excerpt/test', sample 0, file .*: field 'safer' is missing; SafetyPreferenceDataset needs input"
    )
    with pytest.raises(DataError, match=message):
        SafetyPreferenceDataset(EXCERPT, tokenizer)


def test_a_part_has_a_fingerprint_of_its_own(tokenizer):
    whole, again = (PromptOnlyDataset(EXCERPT, tokenizer) for _ in range(2))
    prints = {whole.fingerprint, *(part.fingerprint for part in whole.split_train_test(0.5))}
    assert len(prints) == 3 and again.fingerprint in prints
    assert {part.fingerprint for part in again.split_train_test(0.5)} < prints
