"""What must be set before Paddle loads, and right after.

Paddle's bundled MKL takes a slow path on AMD processors and one thread unless told otherwise; both are read from the
environment when the library loads, so `prepare_environment` runs from `alignment/__init__.py` and imports no Paddle.
OMP_NUM_THREADS stays as it is: Paddle's launcher sets it to 1 for every worker and Paddle warns about any other value,
while MKL_NUM_THREADS is read by the matrix products that matter.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator

_THREADS_MARK = "ALIGNMENT_AUTO_THREADS"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names in malloc.h
_NOISY_PACKAGES = ("paddle", "paddlenlp", "_distutils_hack", "setuptools", "visualdl", "google", "jieba", "datasets")
_NOISY_LOGGERS = re.compile(
    r"(paddle|PaddleNLP|utils\.cpp_extension|Dynamic-to-Static|auto_parallel|hapi|ELASTIC|FLEET|ps_usr_print_log"
    r"|aistudio_sdk|jieba|datasets|urllib3|huggingface_hub|matplotlib|.*Pass$)"
)


def is_debug() -> bool:
    """Whether ALIGNMENT_DEBUG asks for tracebacks and third-party messages."""
    return os.environ.get("ALIGNMENT_DEBUG", "0").lower() not in ("", "0", "false", "no")


def has_gpu() -> bool:
    """Whether this machine shows an NVIDIA device to this process; asks no driver and loads no library."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/dev/dxg")


def thread_count() -> int:
    """Threads for this process: the cores it may use, shared by the launcher's processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_processes = int(os.environ.get("PADDLE_LOCAL_SIZE") or 1)
    return max(1, min(cores, _container_cores()) // max(1, local_processes))


def compute_threads() -> int:
    """Threads of the computing kernels: ``MKL_NUM_THREADS`` where it is set, else ``thread_count``."""
    return int(os.environ.get("MKL_NUM_THREADS") or thread_count())


def _container_cores() -> int:
    """Whole cores that the container's CPU quota allows (cgroup v2, then v1); a huge number without a quota."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
    except OSError:
        try:
            with (
                open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as first,
                open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as second,
            ):
                quota, period = first.read().strip(), second.read().strip()
        except OSError:
            return 1 << 30
    return 1 << 30 if quota in ("max", "-1") else max(1, int(quota) // int(period))


def prepare_environment() -> None:
    """Sets the variables that Paddle reads while loading; a value the user set is kept. Safe to call again."""
    if not has_gpu():
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
        threads = str(thread_count())
        # A count chosen here is inherited by workers, which share the machine and must choose again.
        if os.environ.get("MKL_NUM_THREADS") in (None, os.environ.get(_THREADS_MARK)):
            os.environ["MKL_NUM_THREADS"] = os.environ[_THREADS_MARK] = threads
    if not is_debug():
        os.environ.setdefault("GLOG_minloglevel", "2")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        _ignore_third_party_warnings()


def distrust_working_directory() -> None:
    """Where ``python -m`` runs a module of this package, look for modules in the working directory last, not first.

    A folder with a downloaded model or data set in it may also hold a file that is named like a module.
    """
    if sys.argv[:1] == ["-m"] and sys.path[:1] == [os.getcwd()] and not os.path.isdir("alignment/runtime"):
        sys.path.append(sys.path.pop(0))


def configure_paddle(device: str = "auto", debug: bool = False) -> str:
    """Sets Paddle's device and thread count, and quiets third-party loggers unless `debug` or ALIGNMENT_DEBUG.

    `device`: "auto" (a GPU if there is one), "cpu" or "gpu". Raises UsageError for "gpu" where there is none.
    Returns the device's name as Paddle spells it: "cpu" or "gpu:N", N being the launcher's choice for this process.
    Call it once per process before the first tensor, after every `import paddlenlp` it should quiet.
    """
    import paddle

    usable = paddle.is_compiled_with_cuda() and has_gpu()
    if device == "gpu" and not usable:
        from alignment.runtime.faults import UsageError

        reason = (
            "no NVIDIA device is visible" if paddle.is_compiled_with_cuda() else "this Paddle is built for the CPU"
        )
        raise UsageError(f'"device": "gpu" is not possible: {reason}')
    if usable and device != "cpu":
        paddle.set_device("gpu")
        name = paddle.get_device()
    else:
        paddle.set_device("cpu")
        paddle.base.core.set_num_threads(compute_threads())
        # Transposed views are copied element by element when a CPU kernel reads them; transposing at once is faster.
        paddle.set_flags({"FLAGS_use_stride_kernel": False})
        _keep_freed_memory()
        name = "cpu"
    if not (debug or is_debug()):
        quiet_third_parties()
    return name


def _keep_freed_memory() -> None:
    """Has glibc keep up to 1 GiB of freed memory: Paddle allocates every result anew, and fresh pages cost a fifth."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        for setting in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(setting, 1 << 30)


def return_freed_memory() -> None:
    """Has glibc give back to the system what ``_keep_freed_memory`` had it keep."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def tensor_views() -> Iterator[None]:
    """Allows Tensor.view, which needs the kernels that `configure_paddle` turns off on a CPU."""
    import paddle

    flag = "FLAGS_use_stride_kernel"
    before = paddle.get_flags([flag])
    paddle.set_flags({flag: True})
    try:
        yield
    finally:
        paddle.set_flags(before)


def quiet_third_parties() -> None:
    """Raises the level of every loaded third-party logger to ERROR and ignores their Python warnings."""
    _ignore_third_party_warnings()  # again: libraries reset the filters while they load
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and _NOISY_LOGGERS.match(name):
            logger.setLevel(logging.ERROR)


def _ignore_third_party_warnings() -> None:
    for package in _NOISY_PACKAGES:
        warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
