"""The fused engine writes the greedy text that transformers writes, for 50 real prompts.

Runs where torch and transformers are installed; see tests/test_export_transformers.py.
"""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest

from alignment.ppo.models.default import ensure_default_model
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.tokenizer import load_tokenizer
from alignment.ppo.rollout.choose import build_engine
from alignment.ppo.rollout.protocol import Draw, SamplingParameters
from data import PromptOnlyDataset
from tests.models.test_default import needs_package
from tests.test_export_transformers import PYTHON

pytestmark = [pytest.mark.skipif(PYTHON is None, reason="torch and transformers are not installed"), pytest.mark.slow]

TIE = 1e-4  # logits nearer than this are one number to a float32 sum of hundreds of terms
WITH_TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
request = json.load(open(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval()
answers = []
for ids in request["prompts"]:
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=request["length"],
        eos_token_id=request["eos"], pad_token_id=request["eos"][0], output_logits=True, return_dict_in_generate=True,
    )
    best = [logits[0].topk(2).values for logits in out.logits]
    answers.append({"ids": out.sequences[0, len(ids):].tolist(), "gaps": [float(top[0] - top[1]) for top in best]})
print(json.dumps(answers))
"""


@needs_package
def test_greedy_text_is_that_of_transformers(tmp_path):
    """Where a text differs, transformers' two likeliest tokens are a tie at the first difference."""
    directory = ensure_default_model()
    tokenizer = load_tokenizer(directory)
    dataset = PromptOnlyDataset({"hh-excerpt/test": "50"}, tokenizer, max_length=160)
    prompts = [dataset[index]["input_ids"] for index in range(50)]
    sampling = SamplingParameters(
        max_new_tokens=24, eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id, temperature=0
    )
    rollout = build_engine(load_policy(directory), 16, use_fusemt=True).generate(
        prompts, [Draw(0, 0, i, 0) for i in range(50)], sampling
    )
    request = {"model": str(directory), "prompts": [ids.tolist() for ids in prompts], "length": 24}
    file = tmp_path / "request.json"
    file.write_text(json.dumps(request | {"eos": list(sampling.eos_token_ids)}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MKL_")}
    result = subprocess.run(
        [PYTHON, "-c", WITH_TRANSFORMERS, str(file)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    differing = 0
    for row, theirs in enumerate(json.loads(result.stdout.splitlines()[-1])):
        ours = rollout.response_ids[row][rollout.response_mask[row]]
        expected = np.asarray(theirs["ids"])
        if len(ours) != len(expected) or (ours != expected).any():
            first = int(np.argmax(ours[: len(expected)] != expected[: len(ours)]))
            assert theirs["gaps"][first] < TIE, (row, first, theirs["gaps"][first])
            differing += 1
    assert differing <= 2
