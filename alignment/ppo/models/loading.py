"""Policies: a causal language model from a directory, a hub name or the embedded default."""

from __future__ import annotations

import json
from pathlib import Path

import paddle
from paddle.nn.initializer import Constant, set_global_initializer
from paddlenlp.transformers import LlamaForCausalLM, PretrainedConfig, Qwen2ForCausalLM
from paddlenlp.transformers.model_utils import no_init_weights
from paddlenlp.utils.download import resolve_file_path

from alignment.ppo.models.config import CAUSAL_ARCHITECTURE, SCORE_ARCHITECTURE, read_config, read_json
from alignment.ppo.models.cpu import speed_up_on_cpu
from alignment.ppo.models.default import DEFAULT_MODEL_ALIASES, ensure_default_model
from alignment.ppo.models.placement import WHOLE, Placement, configure, follow_lengths, keep_stage
from alignment.ppo.models.sharing import build_sharing, share_rotary_tables
from alignment.ppo.models.tokenizer_files import TOKENIZER_FILES
from alignment.ppo.models.weights import INDEX_FILE, SINGLE_FILE, WeightFiles, check_sizes, load_weights, part_names
from alignment.runtime.faults import UsageError

DTYPES = ("float32", "bfloat16", "float16")
TIED_HEAD = "lm_head.weight"
_CAUSAL = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}


def load_policy(
    name_or_path: str | Path,
    dtype: str = "float32",
    recompute: bool = False,
    placement: Placement = WHOLE,
    shared: paddle.nn.Layer | None = None,
) -> paddle.nn.Layer:
    """A PaddleNLP Llama or Qwen2 causal language model with every weight read from safetensors.

    Args:
        name_or_path: "default" (or "smollm2-135m-instruct"), a local directory in PaddleNLP or Hugging Face form, the
            output directory of a stage (its newest checkpoint), or a name on PaddleNLP's hub.
        dtype: "float32", on a GPU also "bfloat16" or "float16".
        recompute: recompute activations of each layer in the backward pass instead of keeping them.
        placement: the part of the model to build and read; default: all of it.
        shared: a policy that was read from there already: its parameters serve this one too, and nothing is read.
    Returns: the model in training mode, all parameters trainable.
    Raises:
        UsageError: directory, config.json or weights missing, corrupt, of an unsupported kind, or a score model.
    """
    directory = resolve_model_directory(name_or_path)
    config = read_config(directory)
    if stored_architecture(directory) == SCORE_ARCHITECTURE[config.model_type]:
        raise UsageError(f"{directory}: a score model (reward or critic) cannot serve as a language model")
    config.architectures = [CAUSAL_ARCHITECTURE[config.model_type]]
    if shared is not None:
        return build_sharing(lambda: build_policy(config, dtype, recompute, placement), shared)
    files = WeightFiles(directory)
    check_sizes(files, config)
    model = build_policy(config, dtype, recompute, placement)
    tied = {TIED_HEAD} if config.tie_word_embeddings else set()
    load_weights(model, files, model.base_model_prefix, heads={TIED_HEAD} - tied, skip=tied, ignore=tied)
    return model


def build_policy(
    config: PretrainedConfig, dtype: str, recompute: bool, placement: Placement = WHOLE
) -> paddle.nn.Layer:
    """``build`` of the causal language model that ``config`` describes."""
    return build(_CAUSAL[config.model_type], config, dtype, recompute, placement)


def build(
    kind: type, config: PretrainedConfig, dtype: str, recompute: bool, placement: Placement = WHOLE
) -> paddle.nn.Layer:
    """This process's part of a PaddleNLP model of class ``kind``, all zero: ``load_weights`` fills every parameter.

    Drawing random values first would take most of the loading time and shift the process's random state.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if dtype != "float32" and paddle.get_device() == "cpu":
        raise UsageError(f"dtype: {dtype} needs a GPU (Paddle has no {dtype} matrix product on CPUs); use float32")
    config.dtype = dtype
    config.recompute = recompute
    configure(config, placement)
    count = config.num_hidden_layers
    config.num_hidden_layers = len(placement.layers(count))
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    set_global_initializer(Constant(0.0), Constant(0.0))
    try:
        with no_init_weights():
            model = kind(config)
    finally:
        set_global_initializer(None)
        paddle.set_default_dtype(before)
        config.num_hidden_layers = count
    body = getattr(model, model.base_model_prefix, model)
    keep_stage(model, body, placement, count)
    share_rotary_tables(body)
    if placement.sequence_parallel:
        follow_lengths(body)
    speed_up_on_cpu(model)
    if recompute:
        model.recompute_enable()
    return model


def stored_architecture(directory: Path) -> str | None:
    """First entry of "architectures" in a directory's config.json."""
    return next(iter(read_json(directory / "config.json").get("architectures") or ()), None)


def resolve_model_directory(name_or_path: str | Path) -> Path:
    """Local directory that holds the model, converting the default or downloading a hub name if need be.

    Raises:
        UsageError: neither a directory nor a name that can be downloaded.
    """
    name = str(name_or_path)
    if name in DEFAULT_MODEL_ALIASES:
        return ensure_default_model()
    path = Path(name).expanduser()
    if path.is_dir():
        return newest_checkpoint(path)
    if path.is_file():
        raise UsageError(f"model {name!r}: is a file; name the directory that holds config.json and the weights")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UsageError(f"model {name!r}: no such directory")
    return download_model(name)


def newest_checkpoint(path: Path) -> Path:
    """``path``, or where it is a stage's output directory (it has no config.json) its newest checkpoint-N.

    If the run was told to load_best_model_at_end, it is its best checkpoint instead.
    """
    found = [file.parent for file in path.glob("checkpoint-*/config.json") if file.parent.name[11:].isdigit()]
    if (path / "config.json").exists() or not found:
        return path
    newest = max(found, key=lambda part: int(part.name[11:]))
    best = path / f"checkpoint-{_best_step(newest)}"
    return best if best in found else newest


def _best_step(checkpoint: Path) -> int | None:
    """Of its run, if that was told to load the best."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return state["best_step"] if state["load_best_model_at_end"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def download_model(name: str) -> Path:
    """Fetch ``owner/name`` with PaddleNLP's downloader into its cache (``$PPNLP_HOME``); returns the directory."""

    def fetch(files: str | list[str]) -> str | None:
        try:
            return resolve_file_path(name, files)
        except Exception as error:  # the downloader raises anything from ValueError to requests' own errors
            reason = str(error).strip().splitlines()
            raise UsageError(
                f"model {name!r}: no such directory, and the download failed ({reason[0] if reason else error!r})"
            ) from error

    config = fetch("config.json")
    if config is None:
        raise UsageError(f"model {name!r}: no such directory, and PaddleNLP's hub has no such model")
    weights = fetch([INDEX_FILE, SINGLE_FILE])
    if weights is None:
        raise UsageError(
            f"model {name!r}: the hub has no safetensors of it; save it once with PaddleNLP's "
            "save_pretrained(directory, safe_serialization=True) and name that directory"
        )
    if weights.endswith(INDEX_FILE):
        for shard in part_names(read_json(Path(weights))):
            fetch(shard)
    for file in TOKENIZER_FILES:
        fetch(file)
    return Path(config).parent
