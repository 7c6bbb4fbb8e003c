"""Export: any checkpoint becomes a directory that loads elsewhere; adapters are merged; bad calls say why."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddlenlp.peft import LoRAConfig, LoRAModel
from safetensors.numpy import load_file
from safetensors.paddle import save_file

from alignment.export import export_checkpoint
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.saving import save_model
from alignment.ppo.models.value import load_value
from alignment.runtime.faults import UsageError
from tests.models.reference import make_config, random_weights, write_checkpoint
from tests.models.test_tokenizer import write_json_tokenizer

IDS = paddle.to_tensor([[5, 7, 11, 3]])


@pytest.fixture
def base(tmp_path):
    config = make_config("llama", True)
    directory = write_checkpoint(tmp_path / "base", config, random_weights(config))
    write_json_tokenizer(directory)
    return directory


def logits(model):
    model.eval()
    with paddle.no_grad():
        return model(IDS, return_dict=True).logits.numpy()


def make_adapters(base, directory) -> np.ndarray:
    """Random adapters saved by PaddleNLP; returns the adapted model's logits."""
    config = LoRAConfig(r=4, lora_alpha=8, target_modules=[".*q_proj.*", ".*down_proj.*"], dtype="float32")
    adapted = LoRAModel(load_policy(base), config)
    for name, parameter in adapted.model.named_parameters():
        if "lora_" in name:
            parameter.set_value(paddle.randn(parameter.shape) * 0.2)
    adapted.save_pretrained(str(directory))
    return logits(adapted.model)


def test_policy_by_the_command(base, tmp_path):
    (base / "optimizer.safetensors").write_bytes(b"large")
    command = [sys.executable, "-m", "alignment.export", str(base), str(tmp_path / "out"), "--dtype", "bfloat16"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stderr
    assert "convert_from_torch=True" in result.stdout and "transformers.AutoModelForCausalLM" in result.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in files and "optimizer.safetensors" not in files
    expected = logits(load_policy(base))
    np.testing.assert_allclose(logits(load_policy(tmp_path / "out")), expected, atol=0.15 * np.abs(expected).max())
    again = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert again.returncode == 2 and again.stderr.strip().splitlines()[-1].startswith("error: OUTPUT")
    assert "Traceback" not in again.stderr


def test_stored_type_is_kept(base, tmp_path):
    export_checkpoint(str(base), tmp_path / "half", "bfloat16")
    export_checkpoint(str(tmp_path / "half"), tmp_path / "again")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "again"))
    assert one == other


def test_score_model(base, tmp_path):
    model = load_value(base)
    model.do_normalize, model.score_mean, model.score_var = True, 0.5, 2.0
    save_model(model, None, tmp_path / "reward")
    write_json_tokenizer(tmp_path / "reward")
    assert "load_value" in export_checkpoint(str(tmp_path / "reward"), tmp_path / "out")
    exported = load_value(tmp_path / "out", require_head=True)
    for one in (model, exported):
        one.eval()
    mask = paddle.ones(IDS.shape, dtype="bool")
    np.testing.assert_array_equal(exported(IDS, mask).numpy(), model(IDS, mask).numpy())


@pytest.mark.parametrize("form", ["pdparams", "safetensors"])
def test_adapters_are_merged(base, tmp_path, form):
    expected = make_adapters(base, tmp_path / "lora")
    if form == "safetensors":
        pickled = tmp_path / "lora" / "lora_model_state.pdparams"
        state = paddle.load(str(pickled))
        save_file({name: tensor for name, tensor in state.items()}, tmp_path / "lora" / "peft_model.safetensors")
        pickled.unlink()
    export_checkpoint(str(tmp_path / "lora"), tmp_path / "out", base=str(base))
    np.testing.assert_allclose(logits(load_policy(tmp_path / "out")), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - logits(load_policy(base))).max() > 0.1
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


class Attack:
    def __reduce__(self):
        return (print, ("executed",))


def test_bad_adapters(base, tmp_path, capsys):
    make_adapters(base, tmp_path / "lora")
    with pytest.raises(UsageError, match="--base MODEL"):
        export_checkpoint(str(tmp_path / "lora"), tmp_path / "out")
    with pytest.raises(UsageError, match="holds no LoRA adapters"):
        export_checkpoint(str(base), tmp_path / "out", base=str(base))
    pickled = tmp_path / "lora" / "lora_model_state.pdparams"
    good = pickle.loads(pickled.read_bytes())
    name = "llama.layers.0.self_attn.q_proj.lora_A"
    for content, message in (
        ({"a": Attack()}, "it calls builtins.print"),
        ({key: value for key, value in good.items() if key != name}, f"{name} is missing"),
        (good | {"other": np.zeros(2)}, "other is not a weight"),
        (good | {name: np.zeros([2, 2])}, f"{name} has shape"),
    ):
        pickled.write_bytes(pickle.dumps(content))
        with pytest.raises(UsageError, match=message):
            export_checkpoint(str(tmp_path / "lora"), tmp_path / "out", base=str(base))
    assert "executed" not in capsys.readouterr().out
    pickled.unlink()
    with pytest.raises(UsageError, match=r"no peft_model\.safetensors"):
        export_checkpoint(str(tmp_path / "lora"), tmp_path / "out", base=str(base))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out-*"))
