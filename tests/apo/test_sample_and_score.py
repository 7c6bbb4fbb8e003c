"""Sampling and scoring: what is drawn and asked, going on after an interruption, and one result in every layout."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest

from alignment.apo import resumable
from alignment.apo.files import read_items, write_items
from alignment.apo.queries import draw_number
from alignment.apo.sample import sample
from alignment.apo.schemas import Samples
from alignment.apo.score import score
from alignment.apo.tool_arguments import SampleArguments, ScoreArguments
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.tokenizer import load_tokenizer
from alignment.ppo.models.value import load_value
from alignment.ppo.rollout.choose import build_engine
from alignment.ppo.rollout.protocol import Draw, SamplingParameters
from alignment.runtime.arguments import parse
from alignment.runtime.faults import UsageError
from data import RawDataset, get_template
from tests.stages import CHECKOUT, run, write_project, write_reward_model

SAMPLE = {
    "model_name_or_path": "model", "datasets": "animals:7/-1", "dataset_modules": ["user_data.py"],
    "max_prompt_len": 24, "max_new_tokens": 6, "num_return_sequences": 3, "seed": 5, "top_k": 200,
    "per_device_prompt_batch_size": 2, "output_file": "samples.jsonl",
}  # fmt: skip
SCORE = {
    "reward_model_name_or_path": "reward", "input_file": "known.jsonl", "max_prompt_len": 24,
    "per_device_eval_batch_size": 1, "output_file": "scores.jsonl",
}  # fmt: skip
ANSWERS = {i: {f"sample_{k}": "cat dog"[: 1 + (5 * i + 3 * k) % 7] for k in range(3)} for i in range(1, 7)}
KNOWN = [{"query_id": i, "query": f"Say {'owl ' * i}", **answers} for i, answers in ANSWERS.items()]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = write_project(tmp_path_factory.mktemp("project"))
    write_reward_model(folder / "reward")
    (folder / "sample.json").write_text(json.dumps(SAMPLE))
    (folder / "score.json").write_text(json.dumps(SCORE))
    write_items(folder / "known.jsonl", KNOWN)
    registered = dict(RawDataset._registry)
    RawDataset._registry.pop("animals", None)  # another module's tests may have theirs
    yield folder
    RawDataset._registry.clear()
    RawDataset._registry.update(registered)


@pytest.fixture
def do(project, monkeypatch):
    """(tool, overrides) -> bytes of the file it writes."""
    monkeypatch.chdir(project)

    def call(tool, output, *overrides):
        arguments = SampleArguments if tool is sample else ScoreArguments
        (project / output).unlink(missing_ok=True)
        words = [f"{tool.__name__}.json", "--output_file", output, *map(str, overrides)]
        tool(parse(words, [arguments])[0])
        return (project / output).read_bytes()

    return call


def test_answers_are_those_of_the_engine_for_their_draws(do, project):
    do(sample, "samples.jsonl")
    items = [entry.item for entry in read_items(project / "samples.jsonl", Samples)]
    animals = RawDataset.load("animals")
    assert len(items) == 7 and all(list(item.answers) == ["sample_0", "sample_1", "sample_2"] for item in items)
    tokenizer, engine = load_tokenizer(project / "model"), build_engine(load_policy(project / "model"), 4, True)
    eos = tokenizer.eos_token_id
    how = SamplingParameters(max_new_tokens=6, eos_token_ids=(2, eos), pad_token_id=0, top_k=200)
    for item in items:
        name, _, place = item.query_id.rpartition("/")
        assert name == "animals" and item.query == animals[int(place)]["input"]
        prompt = tokenizer(get_template("chat").prompt([item.query], tokenizer), add_special_tokens=False)["input_ids"]
        for k in range(3):
            drawn = engine.generate([np.array(prompt)], [Draw(5, 0, draw_number(item.query_id), k)], how)
            text = tokenizer.decode(drawn.response_ids[0][drawn.response_mask[0]].tolist(), skip_special_tokens=True)
            assert item.answers[f"sample_{k}"] == text


def test_a_query_has_the_same_answers_beside_others_and_in_a_file(do, project):
    whole = do(sample, "whole.jsonl", "--per_device_prompt_batch_size", 5)
    assert whole == do(sample, "again.jsonl", "--rollout_batch_size", 2)
    rows = [json.loads(line) for line in whole.decode().split("\n")[:-1]]
    queries = [{"query_id": row["query_id"], "query": row["query"], "golden": "g"} for row in rows[::-2]]
    write_items(project / "queries.json", queries)
    part = do(sample, "part.json", "--datasets", "null", "--input_file", "queries.json")
    assert json.loads(part) == rows[::-2]
    other = do(sample, "other.jsonl", "--seed", 6)
    assert all(one != two for one, two in zip(whole.split(b"\n")[:-1], other.split(b"\n")[:-1], strict=True))


def test_answers_end_before_a_stop_string(do, project):
    do(sample, "whole.jsonl")
    plain = [one.item for one in read_items(project / "whole.jsonl", Samples)]
    stop = next(text[2] for item in plain for text in item.answers.values() if len(text) > 3 and text[2].isalnum())
    do(sample, "stopped.jsonl", "--stop_strings", stop)
    for item, cut in zip(plain, read_items(project / "stopped.jsonl", Samples), strict=True):
        assert cut.item.answers == {key: text.split(stop)[0] for key, text in item.answers.items()}


class Killed(BaseException):
    """In place of SIGKILL."""


def die(*_):
    raise Killed


@pytest.mark.parametrize(("tool", "batches"), [(sample, 4), (score, 3)])
def test_a_killed_run_goes_on_to_the_same_bytes(do, project, monkeypatch, tool, batches):
    whole, output = do(tool, "whole.jsonl"), project / f"cut_{tool.__name__}.jsonl"
    append, written = resumable._append, []

    def write_and_die(path, line):
        """The header and one batch are written, the second half of the next never comes; then one batch a start."""
        if len(written) == 2:
            with path.open("a") as file:
                file.write(json.dumps(line)[:-20])
            raise Killed
        written.append(line)
        append(path, line)

    monkeypatch.setattr(resumable, "_append", write_and_die)
    starts = 0
    while not output.exists():
        starts += 1
        try:
            do(tool, output.name)
        except Killed:
            del written[1:]
    assert output.read_bytes() == whole and starts == batches
    assert not output.with_name(f"{output.name}.partial.jsonl").exists()


def test_unfinished_results_go_on_with_the_same_arguments_alone(do, project, monkeypatch, capsys):
    whole, hh = do(score, "whole.jsonl"), ("--prompt_template", "hh")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(resumable, "write_items", die)
        do(score, "cut.jsonl")
    with pytest.raises(UsageError, match='cut.jsonl was begun with "prompt_template": "chat", which is "hh" now'):
        do(score, "cut.jsonl", *hh)
    write_items(project / "known.jsonl", KNOWN[1:])
    with pytest.raises(UsageError, match='begun with "answers": '):
        do(score, "cut.jsonl")
    write_items(project / "known.jsonl", KNOWN)
    capsys.readouterr()
    assert do(score, "cut.jsonl") == whole
    assert "cut.jsonl.partial.jsonl: going on after 18 finished results" in capsys.readouterr().out

    words = ["score.json", "--output_file", "cut.jsonl", *hh]
    with pytest.raises(UsageError, match='"output_file": cut.jsonl exists already; .*"overwrite_output_file": true'):
        score(parse(words, [ScoreArguments])[0])
    overwrite = parse([*words, "--overwrite_output_file"], [ScoreArguments])[0]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(resumable, "write_items", die)
        score(overwrite)
    assert (project / "cut.jsonl").read_bytes() == whole  # until the new one is there
    score(overwrite)
    assert "going on after 18" in capsys.readouterr().out
    assert (project / "cut.jsonl").read_bytes() == do(score, "other.jsonl", *hh) != whole


def test_scores_are_those_of_each_answer_alone(do, project):
    found = [json.loads(line) for line in do(score, "scores.jsonl", "--per_device_eval_batch_size", 4).splitlines()]
    names = [f"{item['query_id']}:sample_{k}" for item in KNOWN for k in range(3)]
    assert [list(one) for one in found] == [[name] for name in names]
    tokenizer, model = load_tokenizer(project / "reward"), load_value(project / "reward")
    model.eval()
    for item in KNOWN:
        prompt = get_template("chat").prompt([item["query"].strip()], tokenizer)
        for k in range(3):
            parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, item[f"sample_{k}"])]
            ids = [*parts[0], *parts[1], tokenizer.eos_token_id]
            with paddle.no_grad():
                alone = float(model(paddle.to_tensor([ids]), paddle.ones([1, len(ids)], dtype="bool"))[0, -1])
            (value,) = found.pop(0).values()
            assert value == pytest.approx(alone, rel=1e-4, abs=1e-6)


def test_every_kind_of_file_and_source_is_scored(do, project):
    function = ("--reward_model_name_or_path", "null", "--actor_model_name_or_path", "model", "--reward_function",
                "user_reward.py:count_vowels")  # fmt: skip
    golden = [{"query_id": 2, "golden": "aa"}, {"query_id": "x:y", "query": "q", "golden": "e"}]
    write_items(project / "golden.json", golden)
    found = do(score, "g.jsonl", "--input_file", "golden.json", "--query_file", "known.jsonl", *function)
    assert [json.loads(line) for line in found.splitlines()] == [{"2:golden": 0.5}, {"x:y:golden": 0.25}]
    with pytest.raises(UsageError, match=r'golden.json, item 1 \(line 2\): field "query": missing; give it, or have'):
        do(score, "g.jsonl", "--input_file", "golden.json", *function)
    pair = {"text": ["q<sep>aa", "q<sep>b"], "scores": [1, 0], "query_id": "p"}
    write_items(project / "pairs.jsonl", [pair, pair, {"text": ["r<sep>o"], "scores": [1]}])
    found = do(score, "p.json", "--input_file", "pairs.jsonl", *function)
    names = {"p/0:text_0": 0.5, "p/0:text_1": 0.0, "p/1:text_0": 0.5, "p/1:text_1": 0.0, "2:text_0": 0.25}
    assert json.loads(found) == [{name: value} for name, value in names.items()]
    both = do(score, "both.jsonl", *function[4:], "--reward_weights", "1", "100")
    alone = do(score, "alone.jsonl")
    texts = [text for answers in ANSWERS.values() for text in answers.values()]
    for line, other, text in zip(both.splitlines(), alone.splitlines(), texts, strict=True):
        (value,), (model,) = json.loads(line).values(), json.loads(other).values()
        assert value == pytest.approx(model + 25 * sum(letter in "aeiou" for letter in text), rel=1e-4)


@pytest.mark.parametrize(
    ("tool", "words", "message"),
    [
        (sample, ["--input_file", "known.jsonl"], 'give either "input_file" or "datasets"'),
        (sample, ["--query_file", "known.jsonl"], '"query_file": known.jsonl needs golden answers in "input_file"'),
        (sample, ["--temperature", 0], '"temperature": 0 gives "num_return_sequences": 3 equal answers'),
        (sample, ["--stop_strings", '[""]'], '"stop_strings": "" would end every answer'),
        (sample, ["--max_new_tokens", 60], '"max_new_tokens": sequences of .* than the model\'s 64 positions'),
        (sample, ["--tensor_parallel_degree", 2], '"tensor_parallel_degree" 2'),
        (score, ["--input_file", "null"], '"input_file": required'),
        (score, ["--reward_model_name_or_path", "null"], "no reward: set one of"),
        (score, ["--reward_model_name_or_path", "null", "--reward_function", "a:b"], '"actor_model_name_or_path": '),
        (score, ["--reward_model_name_or_path", "model"], '"reward_model_name_or_path": .*not a reward model'),
    ],
)
def test_what_cannot_work_is_refused(do, tool, words, message):
    with pytest.raises(UsageError, match=message):
        do(tool, "refused.jsonl", *words)


TP2, PP2 = ("--tensor_parallel_degree", 2), ("--pipeline_parallel_degree", 2)


def assert_same_in_layout(project, do, processes, *words):
    for tool in (sample, score):
        expected = do(tool, "one.jsonl")
        script = CHECKOUT / f"alignment/apo/run_{tool.__name__}.py"
        output = f"{tool.__name__}_many.jsonl"
        (project / output).unlink(missing_ok=True)
        own = ("--output_file", output, *words)
        status, shown = run(project, tool.__name__, *own, processes=processes, script=script)
        assert status == 0, shown
        if tool is sample:
            assert (project / output).read_bytes() == expected
            continue
        files = (project / output).read_text(), expected.decode()
        one, many = ([next(iter(json.loads(line).items())) for line in text.splitlines()] for text in files)
        assert [name for name, _ in one] == [name for name, _ in many]
        np.testing.assert_allclose([value for _, value in one], [value for _, value in many], rtol=1e-4, atol=1e-6)


@pytest.mark.layouts
def test_data_parallel_processes_give_the_same_files(project, do):
    assert_same_in_layout(project, do, 2)


@pytest.mark.layouts_full
@pytest.mark.parametrize(("processes", "words"), [(2, TP2), (2, PP2), (4, TP2), (4, (*TP2, *PP2))], ids=str)
def test_divided_models_give_the_same_files(project, do, processes, words):
    assert_same_in_layout(project, do, processes, *words)
