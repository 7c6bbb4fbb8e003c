"""Nothing that a path of the user's names is executed, but what he names to be."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.pickled_arrays import read_pickled_arrays
from alignment.ppo.models.tokenizer import load_tokenizer
from alignment.runtime.arguments import read_json_object
from alignment.runtime.faults import UsageError
from data import DataError, RawDataset
from tests.stages import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for part in ("alignment", "data") for path in (ROOT / part).rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "code", "runpy"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "paddle.load", "torch.load", "os.system", "os.popen", "yaml.load",
    "np.fromfile", "datasets.load_dataset", "pd.read_pickle", "jinja2.Template", "jinja2.Environment",
}  # fmt: skip
IMPORTERS = {"data/modules.py", "alignment/ppo/rewards/function.py", "alignment/runtime/document_arguments.py"}
"""The files that may import by name: what --dataset_modules and --reward_function name, and our own classes."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_execute_what_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {name.name.split(".")[0] for name in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module.split(".")[0] not in FORBIDDEN_MODULES
            assert node.module != "datasets" or "load_dataset" not in {name.name for name in node.names}
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert name not in FORBIDDEN_CALLS, name
            assert not name.endswith("np.load") or words.get("allow_pickle") == "False"
            assert words.get("trust_remote_code", "False") == "False" and words.get("shell", "False") == "False"
            importing = name in ("importlib.import_module", "importlib.util.spec_from_file_location")
            assert not importing or str(path.relative_to(ROOT)) in IMPORTERS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("clean") / "model")


@pytest.fixture
def trap(tmp_path, model):
    """A model directory, and its parent to stand in, full of files that are named like modules."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    names = "json numpy datasets safetensors tokenizers alpaca modeling_llama sitecustomize".split()
    for place in (tmp_path, folder):
        for name in names:
            (place / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    return folder


def assert_nothing_ran(folder):
    assert not list(folder.parent.glob("executed*"))


class Attack:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place / "executed"), "w")


def test_a_model_directory_executes_nothing(trap, monkeypatch):
    monkeypatch.chdir(trap.parent)
    config = json.loads((trap / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_llama.Model"}, "trust_remote_code": True}
    (trap / "config.json").write_text(json.dumps(config))
    content = pickle.dumps({"a": Attack(trap.parent)})
    for name in ("model_state.pdparams", "pytorch_model.bin", "tokenizer.pkl"):
        (trap / name).write_bytes(content)
    load_policy(trap)
    load_tokenizer(trap)
    (trap / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="weights must be safetensors"):
        load_policy(trap)
    assert_nothing_ran(trap)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "AutoModelForCausalLM", "AutoTokenizer", "utils", "Attack", 3])
def test_a_tokenizer_class_must_be_one(trap, kind):
    """Any other class of PaddleNLP by that name would read model_state.pdparams, a pickle."""
    (trap / "tokenizer.json").unlink()
    (trap / "vocab.json").write_text("{}")
    (trap / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "eos_token": "x"}))
    (trap / "model_state.pdparams").write_bytes(pickle.dumps({"a": Attack(trap.parent)}))
    with pytest.raises(UsageError, match="tokenizer_class .* is unknown"):
        load_tokenizer(trap)
    assert_nothing_ran(trap)


def test_a_data_script_is_not_run_though_paddlenlp_would_trust_it(trap, monkeypatch):
    import paddlenlp.datasets  # noqa: F401  (replaces datasets.load_dataset)

    monkeypatch.chdir(trap.parent)
    folder = trap.parent / "tatsu-lab" / "alpaca"
    folder.mkdir(parents=True)
    shutil.copy(trap / "alpaca.py", folder)
    with pytest.raises(DataError, match="dataset 'alpaca'"):
        RawDataset.load("alpaca")
    assert_nothing_ran(trap)


def test_running_a_module_beside_such_files(trap):
    """python -m puts the working directory first; this package puts it last."""
    command = [sys.executable, "-m", "alignment.apo.select", "--samples", "a.json", "--scores", "b", "--output", "c"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    (trap.parent / "sitecustomize.py").unlink()
    done = subprocess.run(command, cwd=trap.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "a.json: No such file" in done.stderr, done.stderr
    assert_nothing_ran(trap)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/inside.safetensors"])
def test_an_index_names_files_beside_it(trap, name):
    (trap / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UsageError, match="not a safetensors index .*is not the name of a file beside it"):
        load_policy(trap)


def header(content, length=None):
    text = json.dumps(content).encode() if isinstance(content, dict) else content
    return (len(text) if length is None else length).to_bytes(8, "little") + text


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        header(b"{}", 2**63),
        header(b"{}", 10**9),
        header(b"[" * 10_000),
        header({"a": TENSOR}),
        header({"a": TENSOR | {"data_offsets": [0, 2**62]}}) + bytes(8),
        header({"a": TENSOR | {"shape": [2**40, 2**40]}}) + bytes(8),
        header({"a": TENSOR, "b": TENSOR}) + bytes(8),
        header({"a": TENSOR | {"data_offsets": [8, 0]}}) + bytes(8),
        header({"a": TENSOR | {"dtype": "OBJECT"}}) + bytes(8),
    ],
)
def test_false_safetensors(trap, content):
    (trap / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="model.safetensors: corrupt or truncated safetensors file") as fault:
        load_policy(trap)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vocab_size", "embed_tokens.weight has shape"),
        ("hidden_size", "embed_tokens.weight has shape"),
        ("intermediate_size", "up_proj.weight has shape"),
        ("num_hidden_layers", "the checkpoint lacks weights of 1099511627776 layers"),
        ("max_position_embeddings", "must be an integer from 1 to 16777216"),
    ],
)
def test_a_config_that_is_larger_than_its_weights(trap, name, reason):
    """Otherwise a few bytes would have the process ask for terabytes."""
    config = json.loads((trap / "config.json").read_text())
    (trap / "config.json").write_text(json.dumps(config | {name: 2**40, "head_dim": None}))
    with pytest.raises(UsageError, match=reason):
        load_policy(trap)


@pytest.mark.parametrize("protocol", [3, 4])
def test_pickled_arrays_are_read_and_nothing_else(tmp_path, protocol):
    path = tmp_path / "arrays"
    random = np.random.default_rng(0)
    arrays = {
        "wide": random.normal(size=(2, 3)).astype("f4"),
        "turned": np.asfortranarray(random.normal(size=(3, 4))),
        "bfloat16": np.arange(300, dtype="u2"),
    }
    good = pickle.dumps(arrays | {"StructuredToParameterName@@": {"a": "b"}}, protocol)
    path.write_bytes(good)
    read = read_pickled_arrays(path)
    assert read.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(read[name], value)
    objects = np.array([Attack(tmp_path)], dtype=object)
    pairs = np.array([(1, 2)], dtype=[("x", "f4"), ("y", "f4")])
    for content in ({"a": Attack(tmp_path)}, {"a": objects}, {"a": pairs}, {"a": np.arange(3, dtype=">f4")}, [1]):
        path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(ValueError, match="^its? "):
            read_pickled_arrays(path)
    for _ in range(300):
        damaged = bytearray(good)
        for place in random.integers(len(good), size=3):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged[: random.integers(1, len(good))])
        with pytest.raises(ValueError):
            read_pickled_arrays(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["pipe", "device", "long", "deep", "half", "digits", "array"])
def test_false_argument_files(name, tmp_path, monkeypatch):
    monkeypatch.setattr("data.limits.read_text.__defaults__", (9999,))
    path, reason = tmp_path / "argument.json", "is no regular file"
    if name == "pipe":
        os.mkfifo(path)
    elif name == "device":
        path.symlink_to("/dev/zero")
    else:
        content, reason = {
            "long": ('{"a": "' + "x" * 9999 + '"}', "bytes are more than the limit of 9999"),
            "deep": ('{"a":' * 1000 + "1" + "}" * 1000, "lists and objects are nested more than 64 deep"),
            "half": ('{"a": "\\ud800"}', "a text has half of a surrogate pair"),
            "digits": ('{"a": 1' + "0" * 5000 + "}", "a whole number has more than 4300 digits"),
            "array": ("[]", "must hold one JSON object"),
        }[name]
        path.write_text(content)
    with pytest.raises(UsageError, match=reason) as fault:
        read_json_object(path)
    assert str(fault.value).startswith(str(path)) and "\n" not in str(fault.value)


def test_weights_may_hold_other_files_names_but_no_other_files(trap):
    save_file({"a": np.zeros(2, "f4")}, trap / "other.safetensors")
    (trap / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    with pytest.raises(UsageError, match="the checkpoint lacks weights"):
        load_policy(trap)
