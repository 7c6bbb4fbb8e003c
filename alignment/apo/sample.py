"""A policy's answers to queries, drawn as PPO draws them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from alignment.apo.queries import Query, QueryDataset, draw_number, load_queries, read_queries
from alignment.apo.resumable import ResumableOutput, digest
from alignment.apo.schemas import Samples
from alignment.apo.tool_arguments import SampleArguments
from alignment.parallel.topology import topology
from alignment.ppo.build import sampling_of
from alignment.ppo.models.freezing import freeze
from alignment.ppo.models.loading import load_policy, resolve_model_directory
from alignment.ppo.models.placement import Placement
from alignment.ppo.models.policy import passes_of
from alignment.ppo.models.tokenizer import Tokenizer, load_tokenizer
from alignment.ppo.models.weights import weights_sha256
from alignment.ppo.reshard import Sampler
from alignment.ppo.rollout.balance import share_out
from alignment.ppo.rollout.protocol import Draw
from alignment.runtime.console import progress, say
from alignment.training.setup import check_positions, load_named, weight_dtype
from data import load_dataset_modules

MODEL = "model_name_or_path"
ITERATION = 0  # of PPO's that draws answers: here the seed alone tells one run from another


def sample(args: SampleArguments) -> None:
    """Answer every query and write the file of samples; goes on where an earlier call was killed.

    Raises: UsageError or data.DataError, naming argument or file, for anything that cannot work.
    """
    load_dataset_modules(args.dataset_modules)
    if args.input_file:
        queries = read_queries(args.input_file, args.query_file)
    else:
        queries = load_queries(args.datasets, args.data_seed)
    tokenizer = load_named(MODEL, load_tokenizer, args.model_name_or_path)
    prompts = QueryDataset(
        queries, tokenizer, max_length=args.max_prompt_len, template=args.prompt_template, truncation=args.truncation
    )
    say(prompts.report.summary())
    directory = load_named(MODEL, resolve_model_directory, args.model_name_or_path)
    asked = args.asked() | {
        "queries": digest([[query.query_id, query.text] for query in queries]),
        f"weights of {MODEL}": weights_sha256(directory),
    }
    output = ResumableOutput(args.output_file, asked, args.overwrite_output_file)
    todo = [item for item in prompts if queries[item["prompt_id"]].query_id not in output.done]
    if todo:
        longest = max(len(item["input_ids"]) for item in prompts)
        _answer(Responder(args, tokenizer, longest), queries, todo, output, args)
    finished = (query for query in queries if query.query_id in output.done)
    output.finish(_as_samples(query, output.done[query.query_id]) for query in finished)
    say(f"{args.output_file}: {args.num_return_sequences} answers to each of {len(prompts)} queries")


class Responder:
    """The policy of the arguments, and how it is to answer.

    Args: longest: tokens of the longest prompt.
    """

    def __init__(self, args: SampleArguments, tokenizer: Tokenizer, longest: int) -> None:
        options = {"dtype": weight_dtype(args), "placement": Placement.here()}
        policy = load_named(MODEL, load_policy, args.model_name_or_path, **options)
        check_positions("max_new_tokens", policy, longest + args.max_new_tokens)
        freeze(policy)
        policy.eval()
        self.tokenizer, self.seed, self.count = tokenizer, args.seed, args.num_return_sequences
        self.sampling = sampling_of(args, policy, tokenizer)
        decode = partial(tokenizer.decode, skip_special_tokens=False)
        self.sampler = Sampler(passes_of(policy), None, args.rollout_batch_size, args.use_fusemt, decode)

    def answer(self, prompts: Sequence[Any], query_ids: Sequence[str]) -> tuple[list[list[str]], int]:
        """``count`` answers to each prompt (int64 [L]), and how many tokens were drawn for them.

        All processes are given the same prompts, answer a share of them each, and return all answers.
        """
        own = share_out([len(ids) for ids in prompts], *self.sampler.part)
        rows = [(i, k) for i in own for k in range(self.count)]
        draws = [Draw(self.seed, ITERATION, draw_number(query_ids[i]), k) for i, k in rows]
        rollout = self.sampler.answer([prompts[i] for i, _ in rows], draws, self.sampling)
        texts = [
            self._decode(ids[mask].tolist())
            for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
        ]
        answers: list[list[str]] = [[""] * self.count for _ in prompts]
        parts = self.sampler.gather((rows, texts, rollout.drawn_tokens))
        for part_rows, part_texts, _ in parts:
            for (i, k), text in zip(part_rows, part_texts, strict=True):
                answers[i][k] = text
        return answers, sum(drawn for _, _, drawn in parts)

    def _decode(self, ids: list[int]) -> str:
        """The answer, up to a stop string."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ends = [place for stop in self.sampling.stop_strings if (place := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]


def _answer(
    responder: Responder, queries: list[Query], todo: list[dict], output: ResumableOutput, args: SampleArguments
) -> None:
    """Answer the prompts ``todo``, batch after batch."""
    size = args.per_device_prompt_batch_size * topology().data_size
    with progress(-(-len(todo) // size), 0, args, "sampling") as bar:
        for start in range(0, len(todo), size):
            batch, began = todo[start : start + size], time.perf_counter()
            names = [queries[item["prompt_id"]].query_id for item in batch]
            answers, tokens = responder.answer([item["input_ids"] for item in batch], names)
            output.add(dict(zip(names, answers, strict=True)))
            bar.advance({"perf/drawn_tokens_per_s": tokens / (time.perf_counter() - began)})


def _as_samples(query: Query, answers: list[str]) -> dict[str, Any]:
    columns = {f"sample_{k}": answer for k, answer in enumerate(answers)}
    return Samples.model_validate({"query_id": query.query_id, "query": query.text, **columns}).to_json()
