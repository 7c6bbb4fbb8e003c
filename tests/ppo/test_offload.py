"""Sets of tensors that leave the device: values, resident memory, nesting, errors; a GPU's transfers as CPU copies."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import paddle
import pytest

from alignment.ppo import offload_storage
from alignment.ppo.offload import Offloaded
from alignment.ppo.offload_storage import MappedFile, PinnedMemory
from alignment.runtime.bootstrap import return_freed_memory
from alignment.runtime.faults import RunError
from alignment.runtime.timing import PhaseTimer

MB = 1 << 20


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MB


def make_tensors(count=3, shape=(5, 7)):
    random = np.random.default_rng(0)
    return [paddle.to_tensor(random.normal(size=shape).astype(np.float32)) for _ in range(count)]


class HostCopies:
    """Paddle's transfers between a GPU and pinned memory, played by copies; ``fail_at``: the transfer that fails."""

    def __init__(self, monkeypatch):
        self.log, self.fail_at = [], None
        for name in ("offload", "reload"):
            monkeypatch.setattr(offload_storage, f"async_{name}", lambda source, _, name=name: self.copy(name, source))
        monkeypatch.setattr(offload_storage, "create_async_load", lambda: "stream")
        monkeypatch.setattr(PinnedMemory, "stream", None)

    def copy(self, name, source):
        if len(self.log) == self.fail_at:
            raise MemoryError("no room")
        self.log.append(name)
        return source.clone(), self

    def cuda_wait(self):
        self.log.append("wait")


def make_pinned():
    tensors = make_tensors(1)
    return Offloaded(lambda: tensors, PinnedMemory(), PhaseTimer())


@pytest.fixture(params=["file", "pinned"])
def make_set(request, tmp_path, monkeypatch):
    """make_set(tensors) -> Offloaded, for either kind of storage."""
    if request.param == "pinned":
        HostCopies(monkeypatch)
    return lambda find: Offloaded(
        find if callable(find) else lambda: find,
        PinnedMemory() if request.param == "pinned" else MappedFile(tmp_path),
        PhaseTimer(),
    )


def test_values_come_back_and_changes_stay(make_set):
    tensors = [*make_tensors(), paddle.to_tensor(2.5), paddle.arange(9)]
    before = [tensor.numpy().copy() for tensor in tensors]
    own = make_set(tensors)
    for number in range(3):
        assert not any(tensor._is_initialized() for tensor in tensors)
        with own.loaded(changes=True):
            for tensor, value in zip(tensors, before, strict=True):
                np.testing.assert_array_equal(tensor.numpy(), value * 2**number)
                assert tensor.shape == list(value.shape)
                paddle.assign(tensor + tensor, tensor)


def test_it_can_be_entered_again_inside(make_set):
    tensors = make_tensors()
    before = tensors[0].numpy().copy()
    own = make_set(tensors)
    with own.loaded():
        with own.loaded(changes=True):
            tensors[0].scale_(2.0)
        np.testing.assert_array_equal(tensors[0].numpy(), 2 * before)
    assert not tensors[0]._is_initialized()
    with own.loaded():
        np.testing.assert_array_equal(tensors[0].numpy(), 2 * before)


def test_an_exception_inside_leaves_nothing_behind_and_loses_nothing(make_set):
    tensors = make_tensors()
    before = [tensor.numpy().copy() for tensor in tensors]
    own = make_set(tensors)
    with pytest.raises(RuntimeError, match="no answer"), own.loaded(changes=True):
        tensors[0].scale_(3.0)
        raise RuntimeError("no answer")
    assert not any(tensor._is_initialized() for tensor in tensors)
    with own.loaded():
        np.testing.assert_array_equal(tensors[0].numpy(), 3 * before[0])
        np.testing.assert_array_equal(tensors[1].numpy(), before[1])


def test_tensors_that_appear_or_move_are_taken_along(make_set):
    tensors = make_tensors(2)
    own = make_set(lambda: tensors)
    with own.loaded(changes=True):
        tensors.append(paddle.full([3], 4.0))
        paddle.zeros(tensors[0].shape)._share_buffer_to(tensors[0])
    assert not any(tensor._is_initialized() for tensor in tensors)
    with own.loaded():
        assert [float(tensor.max()) for tensor in tensors[::2]] == [0.0, 4.0]


def test_resident_memory_falls_and_rises(tmp_path):
    size = 64 * MB // 4
    tensors = [paddle.full([size], float(i)) for i in range(4)]
    return_freed_memory()
    full = resident_mb()
    own = Offloaded(lambda: tensors, MappedFile(tmp_path), PhaseTimer())
    assert resident_mb() < full - 240
    for _ in range(2):
        with own.loaded(changes=True):
            for tensor in tensors:
                tensor.scale_(1.5)
            assert full - 20 < resident_mb() < full + 80
        assert resident_mb() < full - 240


def test_a_set_that_stays_in_its_file_is_not_written_again(tmp_path, monkeypatch):
    tensors = make_tensors()
    own = Offloaded(lambda: tensors, MappedFile(tmp_path), PhaseTimer())
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    with own.loaded():
        pass
    with own.loaded(changes=True):
        tensors[0].scale_(2.0)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_loses_nothing(tmp_path):
    tensors = make_tensors()
    before = tensors[1].numpy().copy()
    with pytest.raises(RunError, match='"offload_level": cannot write to .*missing.*No such file'):
        Offloaded(lambda: tensors, MappedFile(tmp_path / "missing"), PhaseTimer())
    own = Offloaded(lambda: tensors, MappedFile(tmp_path), PhaseTimer())
    own.storage.folder = tmp_path / "missing"
    with pytest.raises(RunError, match="cannot write"), own.loaded(changes=True):
        paddle.zeros([5, 7])._share_buffer_to(tensors[0])  # must be written anew
    assert all(tensor._is_initialized() for tensor in tensors)
    own.storage.folder = tmp_path
    with own.loaded():
        np.testing.assert_array_equal(tensors[1].numpy(), before)
    assert not tensors[1]._is_initialized()


@pytest.mark.parametrize("fail_at", [3, 4])
def test_a_transfer_to_the_device_that_fails(monkeypatch, fail_at):
    copies, tensors = HostCopies(monkeypatch), make_tensors(2)
    own = Offloaded(lambda: tensors, PinnedMemory(), PhaseTimer())
    copies.fail_at = fail_at  # after offload, offload, wait
    with pytest.raises(MemoryError), own.loaded():
        pass
    assert not any(tensor._is_initialized() for tensor in tensors)
    assert copies.log[3:] == (["reload", "wait"] if fail_at == 4 else [])  # memory under way is not free yet
    copies.fail_at = None
    with own.loaded():
        assert all(tensor._is_initialized() for tensor in tensors)


def test_a_transfer_to_the_host_that_fails_leaves_all_on_the_device(monkeypatch):
    copies, tensors = HostCopies(monkeypatch), make_tensors(2)
    before = tensors[0].numpy().copy()
    own = Offloaded(lambda: tensors, PinnedMemory(), PhaseTimer())
    with pytest.raises(MemoryError), own.loaded(changes=True):
        tensors[0].scale_(2.0)
        copies.fail_at = len(copies.log) + 1
    assert all(tensor._is_initialized() for tensor in tensors)
    copies.fail_at = None
    with own.loaded():
        np.testing.assert_array_equal(tensors[0].numpy(), 2 * before)
    with own.loaded():
        np.testing.assert_array_equal(tensors[0].numpy(), 2 * before)


def test_what_travels_to_pinned_memory(monkeypatch):
    copies, layer = HostCopies(monkeypatch), paddle.nn.Linear(2, 2)
    layer.bias.stop_gradient = True
    own = Offloaded(layer.parameters, PinnedMemory(), PhaseTimer())
    steps = []
    for changes in (False, True):
        copies.log.clear()
        with own.loaded(changes):
            pass
        steps.append(list(copies.log))
    fetched = ["reload", "reload", "wait"]
    assert steps == [fetched, [*fetched, "offload", "wait"]]  # only the weight, and only when it may have changed


def test_the_next_set_is_fetched_ahead_once(monkeypatch):
    copies = HostCopies(monkeypatch)
    one, other = make_pinned(), make_pinned()
    one.following = other
    copies.log.clear()
    for _ in range(2):
        with one.loaded():
            pass
    assert copies.log == ["reload", "wait", "reload", "reload", "wait"]
    assert not other.find()[0]._is_initialized()
    with other.loaded():
        assert other.find()[0]._is_initialized()
    assert copies.log == ["reload", "wait", "reload", "reload", "wait", "wait"]
    with one.loaded(changes=True):  # learning leaves the memory to itself
        pass
    assert copies.log[6:] == ["reload", "wait", "offload", "wait"]


def test_a_prefetch_without_room_waits_until_it_is_needed(monkeypatch):
    copies = HostCopies(monkeypatch)
    one, other = make_pinned(), make_pinned()
    one.following = other
    copies.fail_at = len(copies.log) + 2
    with one.loaded():
        copies.fail_at = None
    with other.loaded():
        assert other.find()[0]._is_initialized()
