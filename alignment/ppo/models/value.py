"""Score models: a transformer with a linear head, as reward model (one score an answer) or critic (one a token)."""

from __future__ import annotations

from pathlib import Path

import paddle
from paddle import nn
from paddlenlp.transformers import LlamaModel, PretrainedConfig, Qwen2Model

from alignment.ppo.models.config import SCORE_ARCHITECTURE, read_config
from alignment.ppo.models.loading import TIED_HEAD, build, resolve_model_directory
from alignment.ppo.models.placement import WHOLE, Placement
from alignment.ppo.models.policy import hidden_states, trunk
from alignment.ppo.models.pooling import last_positions, pool, take
from alignment.ppo.models.sharing import build_sharing
from alignment.ppo.models.weights import WeightFiles, check_sizes, load_weights
from alignment.runtime.faults import UsageError

SCORE_TYPES = ("reward", "critic")
HEAD = "score_head.weight"
_TRUNKS = {"llama": LlamaModel, "qwen2": Qwen2Model}

class ScoreModel(nn.Layer):
    """Scores every position of a sequence.

    Attributes:
        config: PaddleNLP configuration of the trunk.
        score_type: "reward" or "critic".
        do_normalize: whether scores are shifted and scaled by ``score_mean`` and ``score_var``.
        score_mean, score_var: statistics that a reward model's training measured; saved in config.json.
        pooling_type: which states a reward model's score is made of (alignment.ppo.models.pooling); saved likewise.
        sep_token_id: the token that a reward model wants between prompt and answer, or None; saved likewise.
        head_is_new: the head was initialised here, not read from a checkpoint.
    """

    base_model_prefix = "trunk"

    def __init__(self, trunk: nn.Layer, score_type: str, placement: Placement) -> None:
        super().__init__()
        self.trunk = trunk
        self.config = trunk.config
        self.placement, self.ties_ends = placement, False
        if self.placement.is_last:
            self.score_head = nn.Linear(trunk.config.hidden_size, 1, bias_attr=False)
        self.score_type = score_type
        self.do_normalize = False
        self.score_mean, self.score_var = 0.0, 1.0
        self.pooling_type, self.sep_token_id = "eos", None
        self.head_is_new = True

    def forward(self, input_ids: paddle.Tensor, attention_mask: paddle.Tensor) -> paddle.Tensor:
        """Scores float32 [B, L] of a model that is whole; those at padding mean nothing.

        Args: input_ids: int64 [B, L]; attention_mask: bool [B, L], True at real tokens, padded on either side.
        """
        return self.scores(hidden_states(self, input_ids, attention_mask))

    def scores(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """float32 [...] from final hidden states [..., H]; normalised if ``do_normalize``."""
        scores = self.score_head(hidden).squeeze(-1).astype("float32")
        return (scores - self.score_mean) / self.score_var**0.5 if self.do_normalize else scores

    def answer_scores(
        self, hidden: paddle.Tensor, input_ids: paddle.Tensor, attention_mask: paddle.Tensor
    ) -> paddle.Tensor:
        """A reward model's scores float32 [B] of prompts with their answers; a row's depends on no other row.

        Args: final hidden states [B, L, H], int64 [B, L], bool [B, L] (True at real tokens, padded on either side).
        """
        return self.scores(pool(hidden, input_ids, attention_mask, self.pooling_type, self.config.eos_token_id))


def end_scores(scores: paddle.Tensor, attention_mask: paddle.Tensor) -> paddle.Tensor:
    """Score at each row's last real token, whichever side is padded.

    Args:
        scores: float32 [B, L]; attention_mask: bool [B, L] with at least one True a row.
    Returns: float32 [B].
    """
    return take(scores, last_positions(attention_mask))


def load_value(
    name_or_path: str | Path,
    score_type: str = "reward",
    dtype: str = "float32",
    recompute: bool = False,
    require_head: bool = False,
    do_normalize: bool | None = None,
    placement: Placement = WHOLE,
    shared: nn.Layer | None = None,
) -> ScoreModel:
    """A score model from a saved one, or from a causal language model, whose head is then new.

    Args:
        name_or_path, dtype, recompute, placement: as in ``load_policy``.
        score_type: "reward" or "critic"; a critic may start from a reward model's directory and takes its head.
        require_head: refuse a directory without a score head (a reward model must be a trained one).
        do_normalize: apply the saved score statistics; None: as saved for a reward model, never for a critic.
        shared: a transformer with these weights: its parameters serve this model too, and only the head is read.
    Raises:
        UsageError: as ``load_policy``; no score head although one is required; statistics that cannot be applied.
    """
    if score_type not in SCORE_TYPES:
        raise UsageError(f"score_type: {score_type!r} is not one of {', '.join(SCORE_TYPES)}")
    directory = resolve_model_directory(name_or_path)
    config = read_config(directory)
    files = WeightFiles(directory)
    check_sizes(files, config)
    has_head = HEAD in files.names()
    if require_head and not has_head:
        raise UsageError(f"{directory}: not a reward model (its weights have no {HEAD}); train one with run_reward.py")
    config.architectures = [SCORE_ARCHITECTURE[config.model_type]]
    model = build_score_model(config, score_type, dtype, recompute, placement, shared)
    head = {HEAD}
    if shared is None:
        load_weights(
            model, files, "trunk", heads=head if has_head else (), skip=() if has_head else head, ignore={TIED_HEAD}
        )
    elif has_head and placement.is_last:
        set_head(model, files.read(HEAD))
    model.head_is_new = not has_head
    if not has_head and placement.is_last:
        initialize_head(model)
    _restore_statistics(model, config, directory, do_normalize)
    return model


def build_score_model(
    config: PretrainedConfig,
    score_type: str,
    dtype: str,
    recompute: bool = False,
    placement: Placement = WHOLE,
    shared: nn.Layer | None = None,
) -> ScoreModel:
    """This process's part of an untrained score model in ``dtype``, on the parameters of ``shared`` if it is given."""

    def build_trunk() -> nn.Layer:
        return build(_TRUNKS[config.model_type], config, dtype, recompute, placement)

    model = ScoreModel(build_trunk() if shared is None else build_sharing(build_trunk, shared), score_type, placement)
    if placement.is_last:
        model.score_head.to(dtype=dtype)
    if score_type == "reward" and getattr(config, "pooling_type", None):  # not of a language model
        model.pooling_type, model.sep_token_id = config.pooling_type, config.sep_token_id
    return model


def add_value_head(policy: nn.Layer, checkpoint: Path | None = None) -> ScoreModel:
    """A critic on the policy's own layers. Its head becomes a parameter of the policy, with whom it learns.

    ``policy.scores`` is then the critic's, so that one pass of the policy gives log-probabilities and values.

    Args: checkpoint: of such a critic, whose head is read instead of a new one.
    Raises: UsageError if ``checkpoint`` has no head of this size.
    """
    critic = ScoreModel(trunk(policy), "critic", policy.placement)
    critic.ties_ends = policy.ties_ends
    critic.head_is_new = checkpoint is None
    if policy.placement.is_last:
        critic.score_head.to(dtype=policy.config.dtype)
        if checkpoint is None:
            initialize_head(critic)
        else:
            set_head(critic, WeightFiles(checkpoint).read(HEAD))
        policy.score_head = critic.score_head
    policy.scores = critic.scores
    return critic


def set_head(model: ScoreModel, values: paddle.Tensor) -> None:
    """Fill the head from ``values``, [H, 1] or as Hugging Face stores it [1, H].

    Raises: UsageError for another size.
    """
    weight = model.score_head.weight
    if values.size != weight.size:
        raise UsageError(f"{HEAD} has shape {values.shape}, the model needs {weight.shape}")
    weight.set_value(values.reshape(weight.shape).astype(weight.dtype))


def initialize_head(model: ScoreModel) -> None:
    """Set the head to 0, so that scores begin equal and only what is learnt parts them.

    A head drawn from N(0, 1/(H+1)) (Stiennon et al. 2020, "Learning to summarize from human feedback", app. B) gives
    scores of deviation 1 of its own. They need a large data set to fade; after hundreds of pairs they are most of what
    the model says about a policy's answers (docs/reward-models.md has the measurement).
    """
    set_head(model, paddle.zeros([model.config.hidden_size, 1]))


def _restore_statistics(model: ScoreModel, config: PretrainedConfig, directory: Path, wanted: bool | None) -> None:
    mean, var = getattr(config, "score_mean", None), getattr(config, "score_var", None)
    if mean is not None and var is not None:
        model.score_mean, model.score_var = float(mean), float(var)
    saved = model.score_type == "reward" and bool(getattr(config, "do_normalize", False))
    model.do_normalize = saved if wanted is None else wanted
    if model.do_normalize and (mean is None or var is None or not model.score_var > 0):
        raise UsageError(f"{directory / 'config.json'}: no score_mean and positive score_var to normalise scores with")
