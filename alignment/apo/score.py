"""What reward sources think of the answers in a file, asked as PPO asks them."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from alignment.apo.files import Placed, index_by_query, read_answers
from alignment.apo.queries import Query, QueryDataset, as_query, query_text, read_queries
from alignment.apo.resumable import ResumableOutput, digest
from alignment.apo.schemas import GOLDEN, Comparison, Samples
from alignment.apo.tool_arguments import ScoreArguments
from alignment.parallel.topology import topology
from alignment.ppo.build import load_text_rewards
from alignment.ppo.load import ACTOR, REWARD, load_scorer
from alignment.ppo.models.loading import resolve_model_directory
from alignment.ppo.models.placement import Placement
from alignment.ppo.models.tokenizer import Tokenizer, load_tokenizer
from alignment.ppo.models.value import load_value
from alignment.ppo.models.weights import weights_sha256
from alignment.ppo.rewards import RewardBatch, WeightedRewards
from alignment.ppo.rewards.divided import score_finite
from alignment.runtime.console import progress, say
from alignment.training.setup import load_named, weight_dtype
from data import load_dataset_modules
from data.builtin.apo import split_text

PASSES_PER_WRITE = 8  # forward passes of a device between two writes to the disk


class Answer(NamedTuple):
    """An answer to score; name: of its score; query: place of its query."""

    name: str
    query: int
    text: str


def score(args: ScoreArguments) -> None:
    """Score every answer of the file and write the file of scores; goes on where an earlier call was killed.

    Raises: UsageError or data.DataError, naming argument or file, for anything that cannot work; RunError if a source
        fails.
    """
    load_dataset_modules(args.dataset_modules)
    text_rewards = load_text_rewards(args)
    queries, answers = read_file(args.input_file, args.query_file)
    key = ACTOR if args.actor_model_name_or_path else REWARD
    tokenizer = load_named(key, load_tokenizer, getattr(args, key))
    prompts = QueryDataset(
        queries, tokenizer, max_length=args.max_prompt_len, template=args.prompt_template, truncation=args.truncation
    )
    say(prompts.report.summary())
    asked = args.asked() | {"answers": digest([[*queries[one.query][:2], one.name, one.text] for one in answers])}
    if args.reward_model_name_or_path:
        directory = load_named(REWARD, resolve_model_directory, args.reward_model_name_or_path)
        asked[f"weights of {REWARD}"] = weights_sha256(directory)
    output = ResumableOutput(args.output_file, asked, args.overwrite_output_file)
    by_place = {item["prompt_id"]: item for item in prompts}
    todo = [one for one in answers if one.name not in output.done and one.query in by_place]
    if todo:
        _score(_load_rewards(args, tokenizer, text_rewards), tokenizer, by_place, todo, output, args)
    output.finish({one.name: output.done[one.name]} for one in answers if one.name in output.done)
    say(f"{args.output_file}: {len(output.done)} scores of {len(prompts)} queries' answers")


def read_file(path: str, query_file: str | None = None) -> tuple[list[Query], list[Answer]]:
    """The queries of a file and, in its order, all its answers.

    An answer of a comparison, which may share its query_id with others, is named "<query_id>/<place in the file>:
    text_<k>", or "<place>:text_<k>" without a query_id.

    Args: query_file: has the queries of golden answers without theirs.
    Raises: UsageError for a malformed file, two different items of one query_id, or an answer without a query.
    """
    entries = read_answers(path)
    if isinstance(entries[0].item, Comparison):
        return _read_comparisons(entries)
    found, repeated = index_by_query(entries)
    if repeated:
        say(f"{path}: {repeated} repeated items left out")
    known = {query.query_id: query.text for query in read_queries(query_file)} if query_file else {}
    queries, answers = [], []
    for place, (query_id, entry) in enumerate(found.items()):
        queries.append(as_query(entry, query_text(entry, known)))
        texts = entry.item.answers if isinstance(entry.item, Samples) else {GOLDEN: entry.item.golden}
        answers += [Answer(f"{query_id}:{key}", place, text) for key, text in texts.items()]
    return queries, answers


def _read_comparisons(entries: list[Placed]) -> tuple[list[Query], list[Answer]]:
    queries, answers = [], []
    for place, (item, where) in enumerate(entries):
        name = str(place) if item.query_id is None else f"{item.query_id}/{place}"
        parts = [split_text(text) for text in item.text]
        queries.append(Query(name, item.text[0], parts[0][0], None, where))
        answers += [Answer(f"{name}:text_{k}", place, answer) for k, (_, answer) in enumerate(parts)]
    return queries, answers


def _load_rewards(args: ScoreArguments, tokenizer: Tokenizer, text_rewards: list[Any]) -> WeightedRewards:
    sources = list(text_rewards)
    if args.reward_model_name_or_path:
        options = {"score_type": "reward", "dtype": weight_dtype(args), "require_head": True}
        load = partial(load_value, placement=Placement.here(), **options)
        how = (tokenizer, args.prompt_template, args.per_device_eval_batch_size)
        sources.insert(0, load_scorer(REWARD, args.reward_model_name_or_path, load, *how))
    rewards = WeightedRewards(sources, args.reward_weights)
    rewards.check()
    return rewards


def _score(
    rewards: WeightedRewards,
    tokenizer: Tokenizer,
    prompts: dict[int, dict],
    todo: list[Answer],
    output: ResumableOutput,
    args: ScoreArguments,
) -> None:
    """Score the answers ``todo``, longest first: what does not fit shows at once, and like lengths stand together."""
    ids = {one.name: _response_ids(tokenizer, one.text) for one in todo}
    todo = sorted(todo, key=lambda one: -len(prompts[one.query]["input_ids"]) - len(ids[one.name]))
    size = args.per_device_eval_batch_size * PASSES_PER_WRITE * topology().data_size
    with progress(-(-len(todo) // size), 0, args, "scoring") as bar:
        for start in range(0, len(todo), size):
            part, began = todo[start : start + size], time.perf_counter()
            items = [prompts[one.query] for one in part]
            batch = RewardBatch(
                prompts=[item["prompt"] for item in items],
                responses=[one.text for one in part],
                finished=np.ones(len(part), dtype=bool),
                samples=[item["sample"] for item in items],
                prompt_ids=[item["input_ids"] for item in items],
                response_ids=[ids[one.name] for one in part],
            )
            scores, _ = score_finite(rewards, batch, [one.name for one in part])
            # The shortest decimal number of a float32 is read back as the same float32.
            output.add({one.name: float(str(value)) for one, value in zip(part, scores, strict=True)})
            bar.advance({"perf/answers_per_s": len(part) / (time.perf_counter() - began)})


def _response_ids(tokenizer: Tokenizer, answer: str) -> np.ndarray:
    """int64 [T], as data sets tokenise an answer: with its end-of-text token."""
    return np.array([*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], np.int64)
