"""Where tensors are while they are off the device: a CPU's in a memory-mapped file, a GPU's in pinned host memory."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import paddle
from paddle.base.framework import EagerParamBase
from paddle.incubate.tensor.manipulation import async_offload, async_reload, create_async_load

from alignment.runtime.faults import RunError

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
        """Have the system read the file ahead."""
        if self.file is not None and hasattr(os, "posix_fadvise"):  # pages that had to leave the system's cache
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def fetch(self) -> list[paddle.Tensor]:
        """As Storage.fetch: tensors that are the mapping, without a copy. Raises OSError if it cannot be mapped."""
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
        copies, transfers = [], []
        try:
            for tensor in tensors:
                is_frozen = isinstance(tensor, EagerParamBase) and tensor.stop_gradient
                copy = known.get(id(tensor)) if is_frozen or not changed else None
                if copy is None:
                    copy, transfer = async_offload(tensor.detach(), self.stream)
                    transfers.append(transfer)
                copies.append((tensor, copy))
        finally:
            _await_last(transfers)
        self.copies = copies

    def prefetch(self) -> None:
        """As Storage.prefetch. Raises MemoryError on a full device; what was under way has then arrived."""
        if self.coming:
            return
        coming: list[tuple[paddle.Tensor, Any]] = []
        try:
            for _, copy in self.copies:
                coming.append(async_reload(copy, self.stream))
        except BaseException:
            _await_last([transfer for _, transfer in coming])
            raise
        self.coming = coming

    def fetch(self) -> list[paddle.Tensor]:
        """As Storage.fetch; compute waits for the transfers. Raises MemoryError as ``prefetch``."""
        self.prefetch()
        coming, self.coming = self.coming, []
        _await_last([transfer for _, transfer in coming])
        return [value for value, _ in coming]


def _await_last(transfers: Sequence[Any]) -> None:
    """Let compute, which would use or overwrite the memory, begin after these; this process goes on."""
    if transfers:  # a stream keeps the order
        transfers[-1].cuda_wait()


def file_system(folder: Path) -> str:
    """Type of the file system that ``folder`` is on, e.g. "ext4"; "" where the system does not say."""
    device = os.stat(folder).st_dev
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    own = [line.split() for line in lines if line.split()[2] == f"{os.major(device)}:{os.minor(device)}"]
    return own[0][own[0].index("-") + 1] if own else ""
