"""The models of a stage, and what of each one rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alignment.parallel.layout import Layout, check_model, layers_of_stage
from alignment.parallel.plan.arguments import ACTOR_STAGES, RAGGED, Sizes
from alignment.parallel.plan.shapes import ModelShape, find_config, read_shape
from alignment.ppo.models.default import DEFAULT_MODEL_NAME
from alignment.runtime.faults import UsageError

ACTOR, CRITIC, REWARD, JUDGE, MODEL = (
    "actor_model_name_or_path",
    "reward_critic_model_name_or_path",
    "reward_model_name_or_path",
    "judge_model_name_or_path",
    "model_name_or_path",
)


@dataclass(frozen=True)
class Model:
    """One model of a stage. Counts are of parameters on one rank of a pipeline stage.

    name: "actor", "critic", "reference", "reward", "judge", or "model" where there is one only.

    scores: it ends in a score head [H, 1] instead of a language-model head.
    unfrozen: trained upper layers; None: everything is trained. Means nothing where ``trained`` is False.
    """

    name: str
    shape: ModelShape
    scores: bool
    trained: bool
    unfrozen: int | None = None
    recompute: bool = False

    def layers(self, layout: Layout, stage: int) -> range:
        """Layers of the stage."""
        return layers_of_stage(self.shape.num_hidden_layers, layout.pipeline, stage)

    def trained_layers(self, layout: Layout, stage: int) -> int:
        """How many layers of the stage are trained."""
        layers = self.layers(layout, stage)
        if not self.trained or self.unfrozen is None:
            return len(layers) * self.trained
        frozen = self.shape.num_hidden_layers - self.unfrozen
        return len(range(max(layers.start, frozen), layers.stop))

    def parameters(self, layout: Layout, stage: int) -> int:
        """The layers of the stage; on stage 0 the embedding; on the last one final norm and head.

        A tied head is the embedding itself, so a last stage that is not also the first holds a copy.
        """
        embeddings = (stage == 0) + self._has_head_matrix(layout, stage)
        return self._count(layout, stage, len(self.layers(layout, stage)), embeddings)

    def trained_parameters(self, layout: Layout, stage: int) -> int:
        """Those with a gradient: the trained layers, final norm and a head of its own, or everything."""
        if not self.trained or self.unfrozen is None:
            return self.parameters(layout, stage) * self.trained
        own_head = self._has_head_matrix(layout, stage) and not self.shape.tie_word_embeddings
        return self._count(layout, stage, self.trained_layers(layout, stage), int(own_head))

    def layer_parameters(self, layout: Layout, stage: int) -> int:
        """Those of the layers alone, which ZeRO stage 3 divides."""
        return len(self.layers(layout, stage)) * self.shape.layer_parameters(layout.tensor)

    def _has_head_matrix(self, layout: Layout, stage: int) -> bool:
        is_last = stage == layout.pipeline - 1
        return is_last and not self.scores and (layout.pipeline > 1 or not self.shape.tie_word_embeddings)

    def _count(self, layout: Layout, stage: int, layers: int, embeddings: int) -> int:
        shape = self.shape
        last = (shape.hidden_size * (1 + self.scores)) * (stage == layout.pipeline - 1)
        each, ends = shape.layer_parameters(layout.tensor), shape.embedding_parameters(layout.tensor)
        return layers * each + embeddings * ends + last


@dataclass(frozen=True)
class Heads(Model):
    """ILQL's heads on the policy's last stage, float32 always (alignment.ppo.offline.ilql_heads): V and two Q, which
    are trained, or the copies of the two, which are not."""

    def layers(self, layout: Layout, stage: int) -> range:
        """None: a head is no layer of the model."""
        return range(0)

    def trained_layers(self, layout: Layout, stage: int) -> int:
        """None."""
        return 0

    def parameters(self, layout: Layout, stage: int) -> int:
        """Two matrices with their biases each: [H, 2 H], and [2 H, columns]; a Q head has the vocabulary's columns."""
        hidden, columns = self.shape.hidden_size, self.shape.vocabulary_part(layout.tensor)
        inner = 2 * hidden * (hidden + 1)
        values = (inner + 2 * hidden + 1) * self.trained
        return (values + 2 * (inner + (2 * hidden + 1) * columns)) * (stage == layout.pipeline - 1)

    def trained_parameters(self, layout: Layout, stage: int) -> int:
        """All of them, or none."""
        return self.parameters(layout, stage) * self.trained


def heads_on(actor: Model) -> tuple[Heads, Heads]:
    """Those that learn, and the target heads."""
    return Heads("heads", actor.shape, True, True), Heads("targets", actor.shape, True, False)


def models_of(stage: str, sizes: Sizes, shapes: Mapping[str, ModelShape], layout: Layout) -> tuple[Model, ...]:
    """The models that the stage holds at once, trained ones first.

    Args: shapes: by argument, as ``find_shapes`` gives them.
    Raises: UsageError for a model that the layout cannot divide, more unfrozen layers than it has, LoRA, or
        samples of any size.
    """
    if sizes.lora:
        raise UsageError('"lora": true is not planned: set it to false for an upper bound')
    if sizes.sequences(stage) is None:
        raise UsageError(f'"policy_update": "{sizes.policy_update}" is not planned: {RAGGED}')
    for key, shape in shapes.items():
        try:
            check_model(shape, layout.tensor, layout.pipeline)
        except UsageError as fault:
            raise UsageError(f'"{key}": {fault}') from None
    if stage not in ACTOR_STAGES:
        unfrozen = _unfrozen("num_layers_unfrozen", sizes.num_layers_unfrozen, shapes[MODEL])
        return (Model("model", shapes[MODEL], stage == "rm", True, unfrozen, sizes.recompute),)
    models = _learners(stage, sizes, shapes)
    models.append(Model("reference", shapes[ACTOR], False, False))
    judges = (("reward", REWARD), ("judge", JUDGE))
    return (*models, *(Model(name, shapes[key], True, False) for name, key in judges if key in shapes))


def _learners(stage: str, sizes: Sizes, shapes: Mapping[str, ModelShape]) -> list[Model]:
    """Actor and critic, or ILQL's heads; a critic on the actor's layers is a vector more, which is not counted."""
    actor_unfrozen = _unfrozen("num_layers_unfrozen", sizes.num_layers_unfrozen, shapes[ACTOR])
    actor = Model("actor", shapes[ACTOR], False, True, actor_unfrozen, sizes.recompute)
    if stage == "offline" and sizes.policy_loss in ("bc", "ilql"):
        return [actor, *heads_on(actor)] if sizes.policy_loss == "ilql" else [actor]
    if sizes.critic_shares_trunk:
        return [actor]
    recompute, unfrozen = sizes.critic_recompute, sizes.critic_num_layers_unfrozen
    recompute = sizes.recompute if recompute is None else recompute
    unfrozen = sizes.num_layers_unfrozen if unfrozen is None else unfrozen
    critic_unfrozen = _unfrozen("critic_num_layers_unfrozen", unfrozen, shapes[CRITIC])
    learns = stage == "ppo" or sizes.critic_training != "none"
    return [actor, Model("critic", shapes[CRITIC], True, learns, critic_unfrozen, recompute)]


def _unfrozen(key: str, layers: int | None, shape: ModelShape) -> int | None:
    if layers is not None and layers > shape.num_hidden_layers:
        raise UsageError(f'"{key}": {layers} is more than the model\'s {shape.num_hidden_layers} layers')
    return None if layers == -1 else layers


def find_shapes(
    stage: str, sizes: Sizes, model_config: str | None = None, reward_config: str | None = None
) -> dict[str, ModelShape]:
    """Shapes by the argument that names the model.

    model_config stands for the policy (or the one model), reward_config for the reward model and a critic that starts
    from it. A reward model, judge or critic that is not on this machine is taken to have the policy's shape.

    Raises: UsageError if there is no config.json of the policy, or one is no good.
    """
    key = ACTOR if stage in ACTOR_STAGES else MODEL
    name = getattr(sizes, key) or DEFAULT_MODEL_NAME
    source = model_config or find_config(name)
    if not source:
        raise UsageError(f'"{key}": no config.json of {name!r} here; name one of the same sizes with --model_config')
    shapes = {key: read_shape(source)}
    if stage in ACTOR_STAGES:
        shapes |= _judges(sizes, shapes[ACTOR], reward_config)
    return shapes


def _judges(sizes: Sizes, actor: ModelShape, reward_config: str | None) -> dict[str, ModelShape]:
    """Of reward model and judge, if there are any, and of the critic, which starts from the first if not told more."""
    reward, critic = sizes.reward_model_name_or_path, sizes.reward_critic_model_name_or_path
    judge = sizes.judge_model_name_or_path
    shapes = {JUDGE: _shape_or(find_config(judge), actor)} if judge else {}
    start = actor
    if reward or reward_config:
        start = shapes[REWARD] = _shape_or(reward_config or find_config(reward), actor)
    if critic in (None, reward):
        return shapes | {CRITIC: start}
    return shapes | {CRITIC: _shape_or(find_config(critic), actor)}


def _shape_or(source: str | Path | None, other: ModelShape) -> ModelShape:
    return read_shape(source) if source else other
