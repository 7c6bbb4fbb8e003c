"""``python -m alignment.export CHECKPOINT OUTPUT``: any checkpoint as a directory for inference."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from alignment.runtime.bootstrap import configure_paddle
from alignment.runtime.command_line import CommandParser
from alignment.runtime.faults import UsageError, run_main

DTYPES = ("float32", "bfloat16", "float16")


def export_checkpoint(checkpoint: str, output: Path, dtype: str | None = None, base: str | None = None) -> str:
    """Write the model of ``checkpoint`` to ``output``: weights, config, tokenizer; no training state.

    Args:
        checkpoint: directory of a policy or score model, or of LoRA adapters that PaddleNLP saved.
        output: directory to create; it appears complete or not at all.
        dtype: of the written weights; None: as stored.
        base: the model that LoRA adapters belong to, if their lora_config.json does not name it.
    Returns: what was written and how to load it, as text.
    Raises:
        UsageError: nothing to export, the output is already there, or a base model is missing or not needed.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"OUTPUT {output}: already exists; name a new directory")
    model, tokenizer, stored = load_checkpoint(checkpoint, base)
    from alignment.ppo.models.saving import save_model

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        save_model(model, tokenizer, partial, dtype or stored)
        partial.chmod(0o755)
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return describe(model, output, dtype or stored)


def load_checkpoint(checkpoint: str, base: str | None):
    """The model in float32, its tokenizer, and the type its weights are stored in."""
    from alignment.ppo.models import adapters
    from alignment.ppo.models.loading import load_policy, resolve_model_directory
    from alignment.ppo.models.tokenizer import load_tokenizer
    from alignment.ppo.models.tokenizer_files import TokenizerFiles
    from alignment.ppo.models.value import HEAD, load_value
    from alignment.ppo.models.weights import WeightFiles

    directory = resolve_model_directory(checkpoint)
    if adapters.is_adapter(directory):
        base = base or adapters.base_of(directory)
        if base is None:
            raise UsageError(f"{directory}: holds LoRA adapters; name the model they belong to with --base MODEL")
        own = TokenizerFiles(directory).config
        model = adapters.load_merged_policy(base, directory)
        return model, load_tokenizer(directory if own else base), WeightFiles(resolve_model_directory(base)).dtype()
    if base is not None:
        raise UsageError(f"--base {base}: {directory} holds no LoRA adapters")
    files = WeightFiles(directory)
    model = load_value(directory, require_head=True) if HEAD in files.names() else load_policy(directory)
    return model, load_tokenizer(directory), files.dtype()


def describe(model, output: Path, dtype: str) -> str:
    """One line on the result, and the lines of Python that load it."""
    from alignment.ppo.models.value import ScoreModel

    count = sum(parameter.size for parameter in model.parameters())
    if isinstance(model, ScoreModel):
        return (
            f"wrote {output}: {model.score_type} model, {int(count) / 1e6:.1f}M parameters, {dtype}\n"
            f'load it with: alignment.ppo.models.value.load_value("{output}", require_head=True)'
        )
    return (
        f"wrote {output}: language model, {int(count) / 1e6:.1f}M parameters, {dtype}\n"
        "load it with\n"
        f'  PaddleNLP:    paddlenlp.transformers.AutoModelForCausalLM.from_pretrained("{output}", '
        f'convert_from_torch=True, dtype="{dtype}")\n'
        f'  transformers: transformers.AutoModelForCausalLM.from_pretrained("{output}", torch_dtype="{dtype}")'
    )


def main() -> None:
    """Parse the command line and export."""
    parser = CommandParser(prog="python -m alignment.export", description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint directory, or LoRA adapters of PaddleNLP")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="directory to create")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the written weights (default: as stored)")
    parser.add_argument("--base", metavar="MODEL", help="model that LoRA adapters belong to")
    arguments = parser.parse_args()
    configure_paddle()
    print(export_checkpoint(arguments.checkpoint, arguments.output, arguments.dtype, arguments.base))


if __name__ == "__main__":
    run_main(main)
