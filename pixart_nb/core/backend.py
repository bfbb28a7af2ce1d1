"""Device, dtype and threads. No other file asks MindSpore for the device.

Every other module of ``core`` imports MindSpore from here (``from pixart_nb.core.backend import ms``), so that it is
set up before the first operator runs.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.errors import PixArtNBError, delayed_interrupt

os.environ.setdefault("GLOG_v", "3")  # MindSpore reads it once, at import: errors only
with delayed_interrupt():
    if "google.protobuf" in sys.modules:
        from pixart_nb.core.own_protobuf import import_mindspore

        import_mindspore()
    import mindspore as ms
    from mindspore import ops

#: Largest number of bytes of one chunk of attention scores on the CPU. It bounds memory and suits the cache.
ATTENTION_CHUNK_BYTES = 32 * 2**20
#: Long names of the dtypes by those in configurations.
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
#: Devices that the kit computes on.
DEVICES = ("CPU", "Ascend")
#: Parts of the names of supported Ascend devices: Atlas A2 and A3. Older ones have no flash attention.
ASCEND_MODELS = ("910B", "910_93")
#: Seconds within which MindSpore's new threads take their names, also on a busy machine.
_NAMING_SECONDS = 0.2


def _set_up() -> str:
    """Choose the device (``PIXART_NB_DEVICE``, or MindSpore's default) and return its name."""
    asked = os.environ.get("PIXART_NB_DEVICE", "")
    if asked not in ("", *DEVICES):
        raise PixArtNBError(f"PIXART_NB_DEVICE is {asked!r}; expected {' or '.join(DEVICES)}, or leave it out")
    device = asked or ms.get_context("device_target")
    try:
        ms.set_device(device)
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason is given")
        raise PixArtNBError(
            f"device {device} cannot be opened: {reason.partition('. ')[0]}. {_environment_fix()}, or compute on the "
            "CPU (PIXART_NB_DEVICE=CPU, device_target: CPU)"
        ) from None
    if device == "CPU":
        ms.runtime.launch_blocking()  # asynchronous launching is 2-15 times slower on the CPU
        if asked != "CPU" and has_ascend_host():
            warnings.warn(
                f"this machine looks like an Ascend host, but MindSpore computes on the CPU. {_environment_fix()}. "
                "PIXART_NB_DEVICE=CPU chooses the CPU without this warning",
                stacklevel=3,
            )
        if _version(ms.__version__) >= (2, 9):
            warnings.warn(
                f"MindSpore {ms.__version__} computes convolutions about 70 times slower on the CPU than 2.8. "
                "Install mindspore 2.8.x for work on the CPU.",
                stacklevel=3,
            )
    else:
        ms.device_context.ascend.op_precision.conv_allow_hf32(False)  # convolutions of float32 in float32
    return device


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def has_ascend_host() -> bool:
    """Return True if the machine has Ascend devices (``/dev/davinci*``), or CANN's environment is set."""
    return bool(os.environ.get("ASCEND_HOME_PATH")) or any(Path("/dev").glob("davinci[0-9]*"))


def _environment_fix() -> str:
    """Return what makes MindSpore find CANN."""
    if os.environ.get("ASCEND_HOME_PATH"):
        return "CANN's environment is set; compare its version with docs/ascend.md and run pixart-nb doctor"
    toolkits = ("ascend-toolkit", "cann")  # the second from CANN 8.5 on
    roots = Path("/usr/local/Ascend"), Path.home() / "Ascend"
    scripts = [root / toolkit / "set_env.sh" for root in roots for toolkit in toolkits]
    script = next((path for path in scripts if path.is_file()), scripts[0])
    return f"Run `source {script}` in this shell first, before Python starts"


_DEVICE = _set_up()
_GRAPH_MODE = False


@cache
def pin_threads() -> None:
    """Pin each thread of MindSpore's pool on the CPU to a core of its own. Call it before long work.

    The thread that calls an operator waits by spinning, and the system keeps moving the computing threads out of its
    way, which makes matrix products 10-30% slower. Nothing is done where there are more cores than threads, outside of
    Linux, and with ``PIXART_NB_PIN_THREADS=0``.
    """
    switched_off = os.environ.get("PIXART_NB_PIN_THREADS") == "0"
    if on_ascend() or switched_off or not hasattr(os, "sched_setaffinity"):
        return
    ops.silu(ms.Tensor([0.0], ms.float32)).asnumpy()  # MindSpore starts the pool with the first result
    cores = sorted(os.sched_getaffinity(0))
    threads = _pool_threads(len(cores))
    if len(threads) >= len(cores):
        for thread, core in zip(threads, itertools.cycle(cores), strict=False):
            with suppress(OSError):  # a system that does not allow it
                os.sched_setaffinity(thread, {core})


@cache
def thread_count() -> int:
    """Return the number of threads that compute parts of an array with NumPy or oneDNN, which release the GIL."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _helpers() -> ThreadPoolExecutor:
    """Return the threads that compute beside the calling one, each pinned to a core as those of ``pin_threads`` are.

    Beside threads of MindSpore that wait by spinning, two threads would often share a core. The calling one is free:
    when other processes keep a core busy, it computes more of the parts on another.
    """
    switched_off = os.environ.get("PIXART_NB_PIN_THREADS") == "0" or not hasattr(os, "sched_setaffinity")
    cores = iter(() if switched_off else sorted(os.sched_getaffinity(0)))

    def pin() -> None:
        for core in itertools.islice(cores, 1):
            with suppress(OSError):  # a system that does not allow it
                os.sched_setaffinity(threading.get_native_id(), {core})

    return ThreadPoolExecutor(max(1, thread_count() - 1), thread_name_prefix="numpy", initializer=pin)


def in_threads(work: Callable, jobs: Sequence) -> None:
    """Call ``work`` for every job, by the calling thread and its helpers, each taking the next job that is left."""
    left = iter(jobs)

    def take() -> None:
        for job in left:
            work(job)

    helpers = [_helpers().submit(take) for _ in range(min(thread_count(), len(jobs)) - 1)]
    try:
        take()
    finally:
        for helper in helpers:
            if not helper.cancel():  # it has started
                helper.result()


def thread_slices(length: int, least: int = 1) -> list[slice]:
    """Split ``length`` rows evenly among the threads, if each gets at least ``least``."""
    count = min(thread_count(), max(1, length // least))
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory for the next allocation inside the block, and return it to the system afterwards.

    The C library of Linux otherwise returns the memory of each large array at once, and the system clears it again for
    the next one: a quarter of the time of a training step of XL/2 on the CPU. Nothing is done with another C library.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        change, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    threshold, top = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    change(threshold, 2**30)
    change(top, -1)  # never
    try:
        yield
    finally:
        change(threshold, 2**25)  # the largest that the C library chooses by itself
        change(top, 2**26)
        trim(0)


def _pool_threads(expected: int = 0) -> list[int]:
    """Return the ids of the computing threads; waits a moment for ``expected``, as each takes its name late."""
    end = time.monotonic() + _NAMING_SECONDS
    while True:
        threads = []
        for task in Path("/proc/self/task").glob("*"):
            with suppress(OSError):  # it has ended
                if (task / "comm").read_text().startswith(("ActorThread", "KernelThread")):
                    threads.append(int(task.name))
        if len(threads) >= expected or time.monotonic() > end:
            return sorted(threads)
        time.sleep(0.002)


def device_name() -> str:
    """Return the name of the device in use: ``"CPU"`` or ``"Ascend"``."""
    return _DEVICE


def on_ascend() -> bool:
    """Return True if the fused Ascend operators are used."""
    return _DEVICE == "Ascend"


def leave_graph_mode() -> None:
    """Switch MindSpore from graph mode, which the networks of this package are not written for, to PyNative mode."""
    if ms.get_context("mode") == ms.GRAPH_MODE:
        warnings.warn("MindSpore was in graph mode; it is in PyNative mode now, which pixart_nb needs", stacklevel=3)
        ms.set_context(mode=ms.PYNATIVE_MODE)


def set_graph_mode(on: bool) -> None:
    """Compile the blocks of the transformer on Ascend (``mode: 0``), or run them operator by operator (``mode: 1``)."""
    global _GRAPH_MODE
    _GRAPH_MODE = on


def graph_mode() -> bool:
    """Return True if the blocks of the transformer are compiled."""
    return _GRAPH_MODE


def free_device_memory() -> int | None:
    """Return the free bytes of the Ascend device (not run on Ascend), or None on a CPU."""
    if not on_ascend():
        return None
    (ms.Tensor([0.0], ms.float32) + 1).asnumpy()  # opens the device, which otherwise reports nothing
    return ms.hal.get_device_properties(0).free_memory


def check_device(target: str = "", name: str | None = None) -> None:
    """Refuse a ``device_target`` that this process does not compute on, and an Ascend device before Atlas A2.

    ``name`` is that of the device, by default what MindSpore says.
    """
    if target and target != device_name():
        raise PixArtNBError(
            f"device_target is {target}, but MindSpore was started on {device_name()}; set PIXART_NB_DEVICE={target} "
            "before Python starts" + (f". {_environment_fix()}" if target == "Ascend" else "")
        )
    if on_ascend():
        name = ms.hal.get_device_name(0) if name is None else name
        if name and not any(model in name for model in ASCEND_MODELS):
            raise PixArtNBError(
                f"{name} is not supported: flash attention needs Atlas A2 (910B) or newer. Compute on the CPU with "
                "PIXART_NB_DEVICE=CPU"
            )


def cann_versions() -> tuple[str, list[str]]:
    """Return the version of the CANN that is in the environment, or "", and the versions that MindSpore accepts."""
    info = Path(os.environ.get("ASCEND_HOME_PATH") or "/nowhere") / "compiler" / "version.info"
    match = re.search(r"Version=(\d+\.\d+)", info.read_text()) if info.is_file() else None
    with suppress(ImportError, AttributeError):  # names that are MindSpore's own
        from mindspore.run_check._check_version import AscendEnvChecker

        return match[1] if match else "", list(AscendEnvChecker("").version)
    return match[1] if match else "", []


def to_numpy(x: ms.Tensor) -> np.ndarray:
    """Return a tensor as an array, float32."""
    return x.astype(ms.float32).asnumpy()


def as_array(x: Any) -> np.ndarray:
    """Return a tensor, or what NumPy takes for an array, as an array of its own dtype."""
    return np.asarray(x.asnumpy() if isinstance(x, ms.Tensor) else x)


def as_tensor(x: ms.Tensor | np.ndarray) -> ms.Tensor:
    """Return an array as a tensor; a tensor stays as it is."""
    return x if isinstance(x, ms.Tensor) else ms.Tensor(x)


def supported_dtype(dtype: str | type | np.dtype | ms.Type) -> ms.Type:
    """Return the dtype to compute in: the CPU only stores bfloat16, so it becomes float32 there."""
    dtype = dtype_from_name(dtype)
    return ms.float32 if dtype == ms.bfloat16 and not on_ascend() else dtype


def dtype_from_name(dtype: Any) -> ms.Type:
    """Return the MindSpore dtype of a name (``fp32``, ``fp16``, ``bf16``, a long name) or of a dtype of any library."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    name = str(name).lower().rpartition(".")[2]
    name = DTYPE_NAMES.get(name, name)
    if name not in DTYPE_NAMES.values():
        raise PixArtNBError(
            f"dtype {dtype!r} is unknown; expected float32, float16 or bfloat16 (or fp32, fp16, bf16), as a name, a "
            "NumPy dtype or a MindSpore dtype"
        )
    return getattr(ms, name)


class WorkerError(PixArtNBError):
    """Another worker ended, or could not be reached."""

    def __init__(self, error: Exception):
        reason = str(error).splitlines()[0].strip() if str(error) else type(error).__name__
        # msrun shows the lines of its coordinating process that have the word Error
        super().__init__(
            "Error: this worker cannot continue, probably because another worker ended or could not be reached "
            f"({reason}). The logs in msrun's log_dir tell why. The saved state is complete: run the same command "
            "again to resume."
        )


def join_workers() -> tuple[int, int]:
    """Join the other workers that ``msrun`` started; return the rank of this one and their number.

    Raises ``PixArtNBError`` outside of ``msrun``, and ``WorkerError``. In the process that only coordinates the workers
    it does not return.
    """
    if "MS_ROLE" not in os.environ:
        raise PixArtNBError(
            "use_parallel is on, but msrun did not start this process; start it with msrun, or leave use_parallel out"
        )
    from mindspore import communication

    try:
        communication.init()
    except RuntimeError as error:
        raise WorkerError(error) from error
    return communication.get_rank(), communication.get_group_size()


def fuse_collectives() -> None:
    """Let MindSpore join the AllReduce operators of a compiled graph that have the same ``fusion`` number."""
    ms.set_auto_parallel_context(comm_fusion={"allreduce": {"mode": "auto", "config": None}})
