"""Combinations of the reward model's arguments that are refused before anything loads, and the separator's choice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from alignment.rm.arguments import GROUPS
from alignment.rm.run_reward import find_separator
from alignment.runtime.arguments import resolve
from alignment.runtime.faults import UsageError
from tests.models.tiny import tiny_tokenizer

MINIMUM = ["--output_dir=out", "--train_datasets=x"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--loss_type=token-wise", "--pooling_type=max"], '"pooling_type": "max" gives one score an answer'),
        (["--sep_token=w5"], "\"sep_token\": 'w5' needs \"add_sep_token\": true"),
        (["--rm_kl_coeff=0"], '"apo_loss_coeff": 0 leaves nothing to learn'),
        (["--calibrate_scores=true"], '"calibrate_scores": true needs held-out data'),
        (["--apo_sample_num=0"], "--apo_sample_num: .* a whole number >= 1"),
    ],
)
def test_refused(options, says):
    with pytest.raises(UsageError, match=says):
        resolve([*MINIMUM, *options], GROUPS)


def test_the_authors_settings_resolve():
    values = resolve([*MINIMUM, "--apo_loss_coeff=0.1", "--apo_sample_num=4", "--pooling_type=last"], GROUPS)
    assert (values["rm_kl_coeff"], values["apo_loss_type"], values["add_sep_token"]) == (1.0, "ranking", False)


def test_separator(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)

    def find(**arguments):
        defaults = {"add_sep_token": True, "sep_token": None, "model_name_or_path": "model"}
        return find_separator(SimpleNamespace(**defaults | arguments), tokenizer)

    assert find(add_sep_token=False) is None
    assert find() == tokenizer.eos_token_id and find(sep_token="w9") == 9
    with pytest.raises(UsageError, match="\"sep_token\": 'w5 w6' is no token of model"):
        find(sep_token="w5 w6")
    tokenizer.files.config["sep_token"] = "w8"
    assert find() == 8
