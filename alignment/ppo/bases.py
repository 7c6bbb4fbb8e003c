"""PPO's models with LoRA: each set of base weights is read once and shared by all models that start from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import paddle

from alignment.ppo.models.adapters import ADAPTERS, is_adapter, load_adapters, read_settings
from alignment.ppo.models.freezing import freeze
from alignment.ppo.models.loading import load_policy, resolve_model_directory
from alignment.ppo.models.lora import Base, LoRASettings, add_adapters, is_adapted
from alignment.ppo.models.placement import Placement
from alignment.ppo.models.policy import trunk
from alignment.ppo.models.sharing import mark_shared
from alignment.ppo.models.value import ScoreModel, load_value
from alignment.ppo.models.weights import weights_sha256


@dataclass
class SharedBase:
    """Frozen weights in memory, and the models that compute with them, by role; the first of them read the weights.

    name: as the user calls the model.
    """

    name: str
    base: Base
    users: dict[str, paddle.nn.Layer] = field(default_factory=dict)

    @property
    def first(self) -> paddle.nn.Layer:
        """The model whose parameters the others share."""
        return next(iter(self.users.values()))


class Bases:
    """Loads reference, actor, reward model and critic, in this order, so that equal weights are in memory once.

    A reward model or critic shares the actor's base if it was read from the same directory, or if it is a checkpoint
    whose adapters were trained on weight files with the same SHA-256. Any other has its own frozen weights, which
    reward model and critic share if they start from the same directory.

    Args: settings: of new adapters; seed: of them; dtype: as load_policy's.
    """

    def __init__(self, settings: LoRASettings, seed: int, dtype: str) -> None:
        self.settings, self.seed = settings, seed
        self.how = {"dtype": dtype, "placement": Placement.here()}
        self.loaded: list[SharedBase] = []

    def load_reference(self, name: str) -> paddle.nn.Layer:
        """The frozen policy ``name``, which becomes the actor's base."""
        directory = resolve_model_directory(name).resolve()
        return self._add(name, directory, "reference", load_policy(directory, **self.how))

    def load_actor(self, recompute: bool) -> paddle.nn.Layer:
        """The reference's weights with new adapters."""
        shared = self.loaded[0]
        actor = load_policy(shared.base.directory, recompute=recompute, shared=shared.first, **self.how)
        add_adapters(actor, self.settings, shared.base, self.seed)
        shared.users["actor"] = actor
        return actor

    def load_reward(self, name: str, role: str = "reward") -> ScoreModel:
        """A trained reward model, frozen."""
        model = self._load_score(name, role, "reward", require_head=True)
        freeze(model)
        return model

    def load_critic(self, name: str, recompute: bool) -> ScoreModel:
        """A critic: adapters and head are trained; those of the checkpoint ``name``, or else new ones."""
        critic = self._load_score(name, "critic", "critic", recompute=recompute)
        if not is_adapted(critic):
            shared = next(shared for shared in self.loaded if critic in shared.users.values())
            add_adapters(critic, self.settings, shared.base, self.seed)
        return critic

    def mark_shared(self) -> None:
        """Tell every loaded model which of its parameters others have too; see alignment.ppo.models.sharing."""
        mark_shared([model for shared in self.loaded for model in shared.users.values()])

    def describe(self) -> str:
        """One line: which models share weights."""
        parts = []
        for shared in self.loaded:
            *others, last = shared.users
            roles = f"{', '.join(others)} and {last} share" if others else f"{last} alone has"
            parts.append(f"{roles} {shared.name}")
        return f"base weights in memory: {len(self.loaded)} ({'; '.join(parts)})"

    def _load_score(self, name: str, role: str, score_type: str, **options: object) -> ScoreModel:
        directory = resolve_model_directory(name).resolve()
        adapters = directory / ADAPTERS
        settings, sha256 = read_settings(adapters) if is_adapter(adapters) else (None, None)
        as_it_is = [shared for shared in self.loaded if shared.base.directory == directory]
        trained_on = [shared for shared in self.loaded if shared.base.sha256 == sha256]
        shared = next(iter(as_it_is + trained_on), None)
        if shared is None:
            return self._add(name, directory, role, load_value(directory, score_type, **options, **self.how))
        model = load_value(directory, score_type, shared=trunk(shared.first), **options, **self.how)
        if not as_it_is:
            add_adapters(model, settings, shared.base, self.seed)
            load_adapters(model, adapters)
        shared.users[role] = model
        return model

    def _add(self, name: str, directory: Path, role: str, model: paddle.nn.Layer) -> paddle.nn.Layer:
        freeze(model)
        self.loaded.append(SharedBase(name, Base(directory, weights_sha256(directory)), {role: model}))
        return model
