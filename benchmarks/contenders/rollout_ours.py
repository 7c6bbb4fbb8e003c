"""This toolkit's rollout, and the prompts that all contenders answer.

    python -m benchmarks.contenders.rollout_ours CHANNEL ENGINE MODEL BATCH_SIZE
"""

from __future__ import annotations

import sys
import time

import numpy as np
import paddle

from alignment.ppo.models.loading import load_policy, resolve_model_directory
from alignment.ppo.models.tokenizer import load_tokenizer
from alignment.ppo.rollout.choose import build_engine
from alignment.ppo.rollout.protocol import Draw, SamplingParameters
from alignment.runtime.bootstrap import configure_paddle, thread_count
from alignment.runtime.faults import run_main
from benchmarks.contenders.serving import serve, versions_of
from data import PromptOnlyDataset

PROMPTS = "hh-excerpt/train"
SEED = 0


class Ours:
    """Answers by a rollout engine; every answer's randomness follows from run number and place in the list."""

    def __init__(self, engine: str, model_name: str, batch_size: int) -> None:
        self.model = load_policy(model_name)
        self.tokenizer = load_tokenizer(model_name)
        self.engine = build_engine(self.model, batch_size, use_fusemt=engine == "fused")

    def prompts(self, count: int) -> dict:
        """The first ``count`` HH prompts in the model's chat template, as token ids."""
        dataset = PromptOnlyDataset({PROMPTS: f"{count}/-1"}, self.tokenizer, max_length=1024)
        return {"prompts": [dataset[index]["input_ids"].tolist() for index in range(len(dataset))]}

    def generate(self, prompts: list[list[int]], shortest: int, longest: int, number: int) -> dict:
        """Sampled answers of ``shortest`` to ``longest`` tokens, EOS included; ``number`` of the run is the seed."""
        rows = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        draws = [Draw(SEED, number, prompt_id, 0) for prompt_id in range(len(rows))]
        sampling = self._sampling(longest, min_new_tokens=shortest)
        started = time.perf_counter()
        rollout = self.engine.generate(rows, draws, sampling)
        seconds = time.perf_counter() - started
        lengths = rollout.response_mask.sum(-1)
        return {"seconds": seconds, "tokens": int(lengths.sum()), "lengths": lengths.tolist()}

    def greedy(self, prompts: list[list[int]], longest: int) -> dict:
        """The likeliest tokens, ``longest`` of them: all contenders should agree."""
        rows = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        draws = [Draw(SEED, 0, prompt_id, 0) for prompt_id in range(len(rows))]
        sampling = self._sampling(longest, min_new_tokens=longest, temperature=0.0)
        return {"answers": self.engine.generate(rows, draws, sampling).response_ids.tolist()}

    def _sampling(self, longest: int, **settings: float) -> SamplingParameters:
        tokenizer = self.tokenizer
        return SamplingParameters(longest, (tokenizer.eos_token_id,), tokenizer.pad_token_id, **settings)


def count_parameters(model: paddle.nn.Layer) -> dict[str, int]:
    """{"body", "head"}: entries of the matrices in the layers, and of the output matrix."""
    sizes = {name: int(np.prod(value.shape)) for name, value in model.named_parameters() if value.ndim == 2}
    head = model.config.vocab_size * model.config.hidden_size
    body = sum(size for name, size in sizes.items() if "embed_tokens" not in name and "lm_head" not in name)
    return {"body": body, "head": head}


def main() -> None:
    """Load, say hello, answer."""
    engine, model_name, batch_size = sys.argv[2:]
    configure_paddle("cpu")
    ours = Ours(engine, model_name, int(batch_size))
    serve(
        {"prompts": ours.prompts, "generate": ours.generate, "greedy": ours.greedy},
        versions=versions_of("paddlepaddle", "paddlenlp"),
        threads=thread_count(),
        directory=str(resolve_model_directory(model_name).resolve()),
        eos_token_id=ours.tokenizer.eos_token_id,
        pad_token_id=ours.tokenizer.pad_token_id,
        parameters=count_parameters(ours.model),
    )


if __name__ == "__main__":
    run_main(main)
