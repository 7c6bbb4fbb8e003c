"""A tiny model, a user's own data and reward in files outside the checkout, and the stages' real commands on them."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from alignment.ppo.models.lora import Base, LoRASettings, adapted_layers, add_adapters
from alignment.ppo.models.saving import save_model
from alignment.ppo.models.tokenizer import load_tokenizer
from alignment.ppo.models.value import load_value
from alignment.ppo.models.weights import weights_sha256
from tests.models.heads import with_random_head
from tests.models.reference import make_config, random_weights, write_checkpoint
from tests.warm import Warm

CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "sft": CHECKOUT / "alignment/sft/run_sft.py",
    "rm": CHECKOUT / "alignment/rm/run_reward.py",
    "ppo": CHECKOUT / "alignment/ppo/run_ppo.py",
    "offline": CHECKOUT / "alignment/ppo/run_offline.py",
    "update": CHECKOUT / "alignment/apo/run_update.py",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER_DATA = '''
from data import RawDataset, RawSample

ANIMALS = ["cat", "dog", "owl", "fox", "hen", "cow", "pig", "ant", "bee", "elk", "emu", "yak"]


class Animals(RawDataset):
    NAME = "animals"

    def __init__(self, path=None):
        self.data = [(a, b) for a in ANIMALS for b in ANIMALS if a != b]

    def __getitem__(self, index):
        first, second = self.data[index]
        return RawSample(
            input=f"Say {first}" + " please" * (index % 3),
            answer=first * (1 + index % 2),
            other_answer=second,
            better=True,
        )

    def __len__(self):
        return len(self.data)


class ScoredAnimals(Animals):
    NAME = "scored-animals"

    def __getitem__(self, index):
        first, second = self.data[index]
        answers = [second, first, first + second, first * 2][: 2 + index % 3]
        scores = [0.0, 1.0, 0.5, 1.0] if index % 5 else [1.0] * 4
        return RawSample(input=f"Say {first}", answers=answers, scores=scores[: len(answers)])


class Games(Animals):
    """Two to four answers, some tied; every other time a golden one over samples."""

    NAME = "games"

    def __getitem__(self, index):
        first, second = self.data[index]
        answers = [first, second, first + second, second * 2][: 2 + index % 3]
        more = {"type": "apo"} if index % 2 else {}
        return RawSample(input=f"Say {first}", answers=answers, scores=[1, 0, 0, 0.5][: len(answers)], **more)
'''
USER_REWARD = '''
def count_vowels(responses):
    return [sum(letter in "aeiou" for letter in text) / 4 for text in responses]


def broken(responses):
    raise ValueError("no reward today")


def not_a_number(responses):
    return [float("nan")] * len(responses)


def too_few(responses):
    return [0.0] * (len(responses) - 1)
'''
SHARED = {
    "train_datasets": "animals:24/-1",
    "eval_datasets": "animals:6/-1",
    "dataset_modules": ["user_data.py"],
    "max_length": 40,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-4,  # Adam divides by the gradient's size: without this, one of pure rounding moves a weight
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
    "weight_decay": 0.01,
    "max_steps": 3,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 3,
    "disable_tqdm": True,
}
ARGUMENTS = {
    "sft": SHARED | {"model_name_or_path": "model", "output_dir": "sft", "per_device_train_batch_size": 8},
    "rm": SHARED
    | {
        "model_name_or_path": "model",
        "output_dir": "rm",
        "per_device_train_batch_size": 8,
        "regularization": 0.01,
        "normalize_score_during_training": True,
        "evaluation_strategy": "steps",
        "eval_steps": 2,
    },
    "ppo": SHARED
    | {
        "actor_model_name_or_path": "model",
        "output_dir": "ppo",
        "reward_function": "user_reward.py:count_vowels",
        "max_prompt_len": 24,
        "max_new_tokens": 6,
        "per_device_prompt_batch_size": 4,
        "num_return_sequences": 2,
        "per_device_train_batch_size": 4,
        "update_iters": 2,
        "normalize_advantage": True,
        "normalize_reward": True,
        "kl_coeff": 0.1,
        "missing_eos_penalty": 0.5,
        "entropy_coeff": 0.01,
        "ptx_coeff": 0.5,
        "ptx_datasets": "animals:10/-1",
        "evaluation_strategy": "steps",
        "eval_steps": 2,
    },
    "offline": SHARED
    | {
        "actor_model_name_or_path": "model",
        "output_dir": "offline",
        "reward_function": "user_reward.py:count_vowels",
        "max_prompt_len": 24,
        "max_new_tokens": 6,
        "per_device_train_batch_size": 8,
        "critic_training": "joint",
        "critic_refresh": 2,
        "evaluation_strategy": "steps",
        "eval_steps": 2,
    },
    "update": SHARED
    | {
        "model_name_or_path": "model",
        "output_dir": "update",
        "policy_update": "dpo",
        "per_device_train_batch_size": 8,
        "evaluation_strategy": "steps",
        "eval_steps": 2,
    },
}


def write_tokenizer(directory: Path) -> int:
    """A byte-level BPE tokenizer with a chat template; returns the size of its vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["Say please user assistant cat dog owl"] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return backend.get_vocab_size()


def write_tiny_model(directory: Path, **options: Any) -> Path:
    """A random model that draws its tokens almost evenly; options as ``_tiny``."""
    return write_checkpoint(directory, *_tiny(directory, **options))


def write_reward_model(directory: Path, **options: Any) -> Path:
    """A random reward model; options as ``write_tiny_model``."""
    config, weights = _tiny(directory, **options)
    weights.pop("lm_head.weight", None)
    head = np.random.default_rng(5).normal(0, 0.3, [1, config["hidden_size"]]).astype(np.float32)
    score = {"architectures": [config["architectures"][0].replace("CausalLM", "Score")], "score_type": "reward"}
    return write_checkpoint(directory, config | score, weights | {"score_head.weight": head})


def write_adapted_reward_model(directory: Path, base: Path) -> Path:
    """A reward model as a LoRA run on ``base`` saves it, its adapters and head random."""
    model = with_random_head(load_value(base), 5)
    add_adapters(model, LoRASettings(rank=3, alpha=3), Base(base.resolve(), weights_sha256(base)), seed=5)
    for number, (_, layer) in enumerate(adapted_layers(model)):
        values = np.random.default_rng([5, number]).normal(0, 0.1, layer.lora_B.shape)
        layer.lora_B.set_value(values.astype(np.float32))
    save_model(model, load_tokenizer(base), directory)
    return directory


def _tiny(
    directory: Path,
    family: str = "llama",
    tied: bool = True,
    vocab_size: int | None = None,
    num_hidden_layers: int = 2,
    scale: float = 1 / 6,
    **changes: Any,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Configuration and weights, the matrices' entries of deviation 0.3 * scale; vocab_size: or the tokenizer's."""
    tokens = write_tokenizer(directory)
    sizes = {"vocab_size": vocab_size or tokens, "num_hidden_layers": num_hidden_layers, **changes}
    config = make_config(family, tied, **sizes)
    weights = {name: value * scale if value.ndim > 1 else value for name, value in random_weights(config, 1).items()}
    return config, weights


def write_project(folder: Path) -> Path:
    """What a user would have: model/, user_data.py, user_reward.py, and one JSON file a stage."""
    write_tiny_model(folder / "model")
    (folder / "user_data.py").write_text(USER_DATA)
    (folder / "user_reward.py").write_text(USER_REWARD)
    for stage, arguments in ARGUMENTS.items():
        (folder / f"{stage}.json").write_text(json.dumps(arguments))
    return folder


def run(
    folder: Path, stage: str, *overrides: object, processes: int = 0, script: Path | None = None, **environment: str
) -> tuple[int, str]:
    """(exit status, everything shown) of a stage's command in ``folder``; processes > 0: under Paddle's launcher.

    Without a launcher it is forked from a process that has Paddle loaded.
    """
    words, environment = (script or SCRIPTS[stage], f"{stage}.json", *overrides), {**os.environ, **environment}
    if not processes:
        job = _warm().run(folder, *words, **environment)
        return job.wait()[0], job.shown
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-u", *launcher, *map(str, words)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


@cache
def _warm() -> Warm:
    """The one of this process."""
    stack = ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(TemporaryDirectory())
    return stack.enter_context(Warm(Path(folder)))


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def weights_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """The model's tensors in a checkpoint, and those of its adapters and of ILQL's heads where it has some."""
    patterns = ("model*.safetensors", "adapters/peft_model*.safetensors", "ilql_heads.safetensors")
    files = [file for pattern in patterns for file in sorted(checkpoint.glob(pattern))]
    return {name: value for file in files for name, value in load_file(file).items()}
