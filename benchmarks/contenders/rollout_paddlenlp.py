"""PaddleNLP's generate() as installed: nothing of this toolkit is imported, and none of its CPU settings apply.

    python -m benchmarks.contenders.rollout_paddlenlp CHANNEL DIRECTORY EOS PAD
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import paddle
from paddlenlp.transformers import AutoModelForCausalLM

from benchmarks.contenders.serving import serve, versions_of
from benchmarks.counting import pad_left, useful_lengths


def load(directory: str) -> paddle.nn.Layer:
    """The fp32 model of a directory in Hugging Face form, by links: PaddleNLP leaves a copy beside what it reads."""
    with tempfile.TemporaryDirectory() as links:
        for file in Path(directory).iterdir():
            if file.suffix != ".pdparams":  # such a copy
                (Path(links) / file.name).symlink_to(file)
        return AutoModelForCausalLM.from_pretrained(links, convert_from_torch=True, dtype="float32")


class PaddleNLP:
    """Answers by model.generate; arguments as benchmarks.contenders.rollout_transformers."""

    def __init__(self, directory: str, eos_token_id: int, pad_token_id: int) -> None:
        self.model = load(directory)
        self.model.eval()
        self.eos, self.pad = eos_token_id, pad_token_id

    def generate(self, prompts: list[list[int]], shortest: int, longest: int, number: int, chunk: int) -> dict:
        """As Transformers.generate."""
        paddle.seed(number)
        lengths = []
        started = time.perf_counter()
        ordered = sorted(prompts, key=len)
        for start in range(0, len(ordered), chunk):
            options = {"decode_strategy": "sampling", "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            options |= {"min_new_tokens": shortest} if shortest > 1 else {}
            answers = self._answer(ordered[start : start + chunk], longest, **options)
            lengths += useful_lengths(answers.numpy(), [self.eos]).tolist()
        return {"seconds": time.perf_counter() - started, "tokens": sum(lengths), "lengths": lengths}

    def greedy(self, prompts: list[list[int]], longest: int) -> dict:
        """As Ours.greedy."""
        options = {"decode_strategy": "greedy_search", "min_new_tokens": longest}
        return {"answers": self._answer(prompts, longest, **options).tolist()}

    @paddle.no_grad()
    def _answer(self, prompts: list[list[int]], longest: int, **options: object) -> paddle.Tensor:
        ids, mask = map(paddle.to_tensor, pad_left(prompts, self.pad))
        settings = {"eos_token_id": self.eos, "pad_token_id": self.pad, "max_new_tokens": longest, **options}
        return self.model.generate(ids, attention_mask=mask, **settings)[0]


def main() -> None:
    """Load, say hello, answer."""
    directory, eos_token_id, pad_token_id = sys.argv[2:]
    peer = PaddleNLP(directory, int(eos_token_id), int(pad_token_id))
    serve(
        {"generate": peer.generate, "greedy": peer.greedy},
        versions=versions_of("paddlepaddle", "paddlenlp"),
        threads=None,
    )


if __name__ == "__main__":
    main()
