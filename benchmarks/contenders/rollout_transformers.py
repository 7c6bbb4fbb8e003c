"""transformers' generate() in the peers' environment: fp32, left padding, as many threads as cores.

    python -m benchmarks.contenders.rollout_transformers CHANNEL DIRECTORY EOS PAD THREADS
"""

from __future__ import annotations

import sys
import time

import torch
from transformers import AutoModelForCausalLM

from benchmarks.contenders.serving import serve, versions_of
from benchmarks.counting import pad_left, useful_lengths


class Transformers:
    """Answers by model.generate; arguments as benchmarks.contenders.rollout_ours."""

    def __init__(self, directory: str, eos_token_id: int, pad_token_id: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.eos, self.pad = eos_token_id, pad_token_id

    def generate(self, prompts: list[list[int]], shortest: int, longest: int, number: int, chunk: int) -> dict:
        """As Ours.generate; ``chunk`` prompts at once, of like length."""
        torch.manual_seed(number)
        lengths = []
        started = time.perf_counter()
        ordered = sorted(prompts, key=len)
        for start in range(0, len(ordered), chunk):
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            # min_new_tokens does not count EOS: 1 would forbid an answer that ends at once.
            options |= {"min_new_tokens": shortest} if shortest > 1 else {}
            answers = self._answer(ordered[start : start + chunk], longest, **options)
            lengths += useful_lengths(answers.numpy(), [self.eos]).tolist()
        return {"seconds": time.perf_counter() - started, "tokens": sum(lengths), "lengths": lengths}

    def greedy(self, prompts: list[list[int]], longest: int) -> dict:
        """As Ours.greedy."""
        return {"answers": self._answer(prompts, longest, do_sample=False, min_new_tokens=longest).tolist()}

    @torch.inference_mode()
    def _answer(self, prompts: list[list[int]], longest: int, **options: object) -> torch.Tensor:
        ids, mask = map(torch.from_numpy, pad_left(prompts, self.pad))
        settings = {"eos_token_id": self.eos, "pad_token_id": self.pad, "max_new_tokens": longest, **options}
        return self.model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


def main() -> None:
    """Load, say hello, answer."""
    directory, eos_token_id, pad_token_id, threads = sys.argv[2:]
    torch.set_num_threads(int(threads))
    peer = Transformers(directory, int(eos_token_id), int(pad_token_id))
    serve(
        {"generate": peer.generate, "greedy": peer.greedy},
        versions=versions_of("torch", "transformers"),
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
