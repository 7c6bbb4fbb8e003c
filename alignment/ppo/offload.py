"""What leaves the device while it is idle (``offload_level``), and where to.

    freeze_model    reward model and reference, but for scoring
    train_model     weights of actor and critic, but for sampling, scoring, learning and saving
    optimizer       moments and float32 weights of actor and critic, but for learning and saving

On a CPU a set of tensors lies in an unlinked file in output_dir: a place that the user chose for files of that size
and that, unlike many a /tmp, is seldom memory itself. Loading maps the file, and the tensors *are* the mapping, without
a copy; releasing drops the mapping, and the system writes what has changed when it likes. On a GPU a set lies in pinned
host memory; the set that scores next is fetched on a stream of its own while the one before computes.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import paddle
from paddle.base.framework import EagerParamBase
from paddle.incubate.tensor.manipulation import async_offload, async_reload, create_async_load

from alignment.parallel.pipeline import Pipeline
from alignment.runtime.bootstrap import return_freed_memory
from alignment.runtime.console import say
from alignment.runtime.faults import RunError
from alignment.runtime.timing import PhaseTimer
from alignment.training.engine import TrainingEngine

ALIGNMENT_BYTES = 64  # as Paddle's own allocations: kernels read whole cache lines


class Storage(Protocol):
    """Keeps the values of one set of tensors while they are off the device."""

    def keep(self, tensors: Sequence[paddle.Tensor], changed: bool) -> None:
        """Have their values, of which only ``changed`` ones may differ from the last. On an error nothing is lost."""

    def prefetch(self) -> None:
        """Begin to fetch, without waiting."""

    def fetch(self) -> list[paddle.Tensor]:
        """The values on the device, in the order of ``keep``."""


class MappedFile(Storage):
    """A file in ``folder`` that nobody else sees and that ends with the process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.size = folder, None, 0
        self.layout: list[tuple[int, np.dtype, list[int]]] = []  # offset, type and shape of each tensor
        self.addresses: list[int] = []  # of the tensors while they are the mapping

    def keep(self, tensors: Sequence[paddle.Tensor], changed: bool) -> None:
        """As Storage.keep; a tensor that still is the mapping needs no writing. Raises RunError on a full disk."""
        if self.addresses != [tensor.data_ptr() for tensor in tensors]:
            try:
                self._write(tensors)
            except OSError as error:
                raise RunError(f'"offload_level": cannot write to {self.folder}: {error.strerror or error}') from error
        self.addresses = []

    def prefetch(self) -> None:
        if self.file is not None and hasattr(os, "posix_fadvise"):  # pages that had to leave the system's cache
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def fetch(self) -> list[paddle.Tensor]:
        if not self.layout:
            return []
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # all at once: a fault for each page takes longer
        mapping = mmap.mmap(self.file.fileno(), self.size, flags=flags)
        arrays = [
            np.frombuffer(mapping, dtype, int(np.prod(shape)), offset).reshape(shape)
            for offset, dtype, shape in self.layout
        ]
        self.addresses = [array.ctypes.data for array in arrays]
        return [paddle.utils.dlpack.from_dlpack(array.__dlpack__()) for array in arrays]

    def _write(self, tensors: Sequence[paddle.Tensor]) -> None:
        file, layout, end = tempfile.TemporaryFile(dir=self.folder), [], 0
        for tensor in tensors:
            value = tensor.numpy()
            layout.append((end, value.dtype, list(value.shape)))
            file.seek(end)
            file.write(value)
            end += -(-value.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        file.truncate(end)  # flushes too
        self.file, self.layout, self.size = file, layout, end


class PinnedMemory(Storage):
    """Copies in pinned host memory. One stream carries the transfers of all sets, apart from the stream of compute."""

    stream: Any = None

    def __init__(self) -> None:
        PinnedMemory.stream = PinnedMemory.stream or create_async_load()
        self.copies: list[tuple[paddle.Tensor, paddle.Tensor]] = []  # tensor, copy on the host
        self.coming: list[tuple[paddle.Tensor, Any]] = []  # value on the device, its transfer

    def keep(self, tensors: Sequence[paddle.Tensor], changed: bool) -> None:
        """As Storage.keep; a frozen parameter travels to the host only once."""
        known = {id(tensor): copy for tensor, copy in self.copies}
        copies, transfer = [], None
        for tensor in tensors:
            is_frozen = isinstance(tensor, EagerParamBase) and tensor.stop_gradient
            copy = known.get(id(tensor)) if is_frozen or not changed else None
            if copy is None:
                copy, transfer = async_offload(tensor.detach(), self.stream)
            copies.append((tensor, copy))
        if transfer is not None:  # the last: a stream keeps the order. What computes next may overwrite the memory
            transfer.cuda_wait()
        self.copies = copies

    def prefetch(self) -> None:
        self.coming = self.coming or [async_reload(copy, self.stream) for _, copy in self.copies]

    def fetch(self) -> list[paddle.Tensor]:
        self.prefetch()
        coming, self.coming = self.coming, []
        if coming:
            coming[-1][1].cuda_wait()  # the stream of compute waits, this process does not
        return [value for value, _ in coming]


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

    def add_frozen(self, passes: Pipeline) -> None:
        """The next model in the order of use, which never changes."""
        if "freeze_model" in self.levels:
            self._add_model(passes)

    def add_trained(self, engine: TrainingEngine) -> None:
        """The next model in the order of use, with its optimizer."""
        if "train_model" in self.levels:
            self._add_model(engine.pipeline)
        if "optimizer" in self.levels and engine.optimizer is not None:
            engine.optimizer_home = Offloaded(engine.optimizer_tensors, self._storage(), self.timer).loaded

    def _add_model(self, passes: Pipeline) -> None:
        model = Offloaded(passes.model.parameters, self._storage(), self.timer)
        passes.shards.home = model.loaded
        self.models.append(model)
        for one, following in zip(self.models, self.models[1:] + self.models[:1], strict=True):
            one.following = following

    def _storage(self) -> Storage:
        return PinnedMemory() if self.on_gpu else MappedFile(self.folder)


def is_on_device(tensor: paddle.Tensor) -> bool:
    """Whether a tensor has memory on the device that computes; on a GPU Adam keeps its powers of beta on the CPU."""
    on_gpu = paddle.get_device().startswith("gpu")
    return tensor._is_initialized() and tensor.size > 0 and tensor.place.is_gpu_place() == on_gpu


def file_system(folder: Path) -> str:
    """Type of the file system that ``folder`` is on, e.g. "ext4"; "" where the system does not say."""
    device = os.stat(folder).st_dev
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    own = [line.split() for line in lines if line.split()[2] == f"{os.major(device)}:{os.minor(device)}"]
    return own[0][own[0].index("-") + 1] if own else ""
