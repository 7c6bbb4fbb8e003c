"""What leaves the device while it is idle (``offload_level``), and where to.

    freeze_model    reward model, reference and judge, but for scoring
    train_model     weights of actor and critic, but for sampling, scoring, learning and saving; what eval_mode copies
    optimizer       moments and float32 weights of actor and critic, but for learning and saving

On a CPU a set of tensors lies in an unlinked file in output_dir: a place that the user chose for files of that size
and that, unlike many a /tmp, is seldom memory itself. Loading maps the file, and the tensors become the mapping, with
no copy. Releasing drops the mapping, and the system writes what has changed when it likes. On a GPU a set lies in
pinned host memory; the set that scores next is fetched on a stream of its own while the one before computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import paddle

from alignment.parallel.pipeline import Pipeline
from alignment.ppo.offload_storage import MappedFile, PinnedMemory, Storage, file_system
from alignment.runtime.bootstrap import return_freed_memory
from alignment.runtime.console import say
from alignment.runtime.timing import PhaseTimer
from alignment.training.engine import TrainingEngine


class Offloaded:
    """A set of tensors that has memory on the device only within ``loaded()``.

    Args:
        find: gives the tensors of the set, which may be others each time (an optimizer's appear with its first step).
        storage: where their values are meanwhile.
        timer: told of the phase "offload".

    Attributes: following: the set that is wanted after this one, where it can be fetched ahead.
    """

    def __init__(self, find: Callable[[], Sequence[paddle.Tensor]], storage: Storage, timer: PhaseTimer) -> None:
        self.find, self.storage, self.timer = find, storage, timer
        self.users, self.changed = 0, True
        self.away: Sequence[paddle.Tensor] = []
        self.following: Offloaded | None = None
        self._release()

    @contextmanager
    def loaded(self, changes: bool = False) -> Iterator[None]:
        """Within it, and within others around or inside it, the tensors are on the device.

        Args: changes: whether their values may change.
        Raises: RunError or Paddle's out-of-memory error if they cannot come or go; all or none are then on the device,
            and no value is lost.
        """
        if not self.users:
            self._load()
        self.users, self.changed = self.users + 1, self.changed or changes
        try:
            if self.following is not None and not changes:  # learning needs the memory itself
                self.following.prefetch()
            yield
        finally:
            self.users -= 1
            if not self.users:
                self._release()

    def prefetch(self) -> None:
        """Begin to bring the tensors, if they are away and there is memory for them."""
        if self.away:
            with suppress(MemoryError):
                self.storage.prefetch()

    def _load(self) -> None:
        if self.away:
            with self.timer("offload"):
                for tensor, value in zip(self.away, self.storage.fetch(), strict=True):
                    value._share_buffer_to(tensor)
                self.away = []

    def _release(self) -> None:
        with self.timer("offload"):
            tensors = [tensor for tensor in self.find() if is_on_device(tensor)]
            self.storage.keep(tensors, self.changed)
            for tensor in tensors:
                tensor._clear_data()
            self.away, self.changed = tensors, False
            return_freed_memory()


class Offload:
    """Registers models and optimizers as ``offload_level`` says; what it does not name stays as it is.

    Args:
        levels: some of OFFLOAD_LEVELS (alignment.ppo.arguments).
        folder: for a CPU's files.
        timer: told of the phase "offload".
    """

    def __init__(self, levels: Sequence[str], folder: Path, timer: PhaseTimer) -> None:
        self.levels, self.folder, self.timer = levels, folder, timer
        self.models: list[Offloaded] = []  # in the order of their use, which starts again after the last
        self.on_gpu = paddle.get_device().startswith("gpu")
        if levels and not self.on_gpu and file_system(folder) in ("tmpfs", "ramfs"):
            say(f'notice: "offload_level" frees nothing in {folder}, which is memory; take an "output_dir" on a disk')

    def add_frozen(self, passes: Pipeline, in_turn: bool = True) -> None:
        """A model that never changes: the next in the order of use, or if not ``in_turn`` one used now and then."""
        if "freeze_model" in self.levels:
            self._add_model(passes, in_turn)

    def add_trained(self, engine: TrainingEngine) -> None:
        """The next model in the order of use, with its optimizer."""
        engine.spares_memory = bool(self.levels)  # else what freed memory is in pieces adds up, step by step
        if "train_model" in self.levels:
            self._add_model(engine.pipeline)
        if "optimizer" in self.levels and engine.optimizer is not None:
            engine.optimizer_home = Offloaded(engine.optimizer_tensors, self._storage(), self.timer).loaded

    def _add_model(self, passes: Pipeline, in_turn: bool = True) -> None:
        model = Offloaded(partial(_own_parameters, passes.model), self._storage(), self.timer)
        passes.shards.home = model.loaded
        if not in_turn:
            return
        self.models.append(model)
        for one, following in zip(self.models, self.models[1:] + self.models[:1], strict=True):
            one.following = following

    def _storage(self) -> Storage:
        return PinnedMemory() if self.on_gpu else MappedFile(self.folder)


def _own_parameters(model: paddle.nn.Layer) -> list[paddle.Tensor]:
    """Those that no other model computes with; base weights that LoRA shares are wanted in every phase."""
    shared = getattr(model, "shared_parameters", frozenset())
    return [parameter for parameter in model.parameters() if parameter.name not in shared]


def is_on_device(tensor: paddle.Tensor) -> bool:
    """Whether a tensor has memory on the device that computes; on a GPU Adam keeps its powers of beta on the CPU."""
    on_gpu = paddle.get_device().startswith("gpu")
    return tensor._is_initialized() and tensor.size > 0 and tensor.place.is_gpu_place() == on_gpu
