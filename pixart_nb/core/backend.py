"""Which device this is, and the operators that depend on it.

Every other module of ``core`` takes MindSpore from here (``from pixart_nb.core.backend import ms``), so that the
set-up below has run before the first operator does. No other file asks for the device.
"""

from __future__ import annotations

import os
import time
import warnings
from contextlib import suppress
from functools import cache
from itertools import cycle
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore reads it once, at import: errors only

import mindspore as ms
from mindspore import ops

from pixart_nb.core.errors import PixArtNBError

#: Bytes that one chunk of attention scores may take on the CPU. It bounds memory and keeps the chunk near the cache.
ATTENTION_CHUNK_BYTES = 32 * 2**20
#: Ascend's flash attention wants a head size that is a multiple of this.
FLASH_HEAD_MULTIPLE = 16
#: Seconds within which the threads that MindSpore has started bear their names, also on a busy machine.
_NAMED = 0.2


def _set_up() -> str:
    """Choose the device (``PIXART_NB_DEVICE``, or what MindSpore found) and return its name."""
    device = os.environ.get("PIXART_NB_DEVICE") or ms.get_context("device_target")
    ms.set_device(device)
    if device == "CPU":
        ms.runtime.launch_blocking()  # asynchronous launching is 2-15 times slower on the CPU
        if tuple(int(part) for part in ms.__version__.split(".")[:2]) >= (2, 9):
            warnings.warn(
                f"MindSpore {ms.__version__} computes convolutions about 70 times slower on the CPU than 2.8. "
                "Install mindspore 2.8.x for work on the CPU.",
                stacklevel=3,
            )
    return device


_DEVICE = _set_up()


@cache
def pin_threads() -> None:
    """On the CPU, give each thread of MindSpore's pool a core of its own. To be called before long work.

    The thread that calls an operator waits by spinning, and the system keeps moving the ones that compute out of its
    way: products of matrices then take 10-30% longer. Where there are more cores than threads, as on large machines,
    nothing is done; nor outside of Linux, nor with ``PIXART_NB_PIN_THREADS=0``.
    """
    if on_ascend() or os.environ.get("PIXART_NB_PIN_THREADS") == "0" or not hasattr(os, "sched_setaffinity"):
        return
    ops.silu(ms.Tensor([0.0], ms.float32)).asnumpy()  # MindSpore starts the pool with the first result
    cores = sorted(os.sched_getaffinity(0))
    threads = _pool_threads(len(cores))
    if len(threads) >= len(cores):
        for thread, core in zip(threads, cycle(cores), strict=False):
            with suppress(OSError):  # a system that does not allow it
                os.sched_setaffinity(thread, {core})


def _pool_threads(wanted: int = 0) -> list[int]:
    """The system's numbers of the threads that compute; waits a moment for ``wanted``, as each takes its name late."""
    end = time.monotonic() + _NAMED
    while True:
        found = []
        for task in Path("/proc/self/task").glob("*"):
            with suppress(OSError):  # it has ended
                if (task / "comm").read_text().startswith(("ActorThread", "KernelThread")):
                    found.append(int(task.name))
        if len(found) >= wanted or time.monotonic() > end:
            return sorted(found)
        time.sleep(0.002)


def device_name() -> str:
    """Name of the device in use: ``"CPU"`` or ``"Ascend"``."""
    return _DEVICE


def on_ascend() -> bool:
    """Whether the fused Ascend operators are used."""
    return _DEVICE == "Ascend"


def supported_dtype(dtype: ms.Type) -> ms.Type:
    """The dtype to compute in: on the CPU bfloat16 exists for storage only and becomes float32."""
    return ms.float32 if dtype == ms.bfloat16 and not on_ascend() else dtype


def dtype_from_name(name: str) -> ms.Type:
    """MindSpore dtype of a configuration's ``fp32`` | ``fp16`` | ``bf16`` (or the long names)."""
    names = {
        "fp32": ms.float32,
        "float32": ms.float32,
        "fp16": ms.float16,
        "float16": ms.float16,
        "bf16": ms.bfloat16,
        "bfloat16": ms.bfloat16,
    }
    if name not in names:
        raise PixArtNBError(f"dtype {name!r} is not known; expected one of {', '.join(names)}")
    return names[name]


class WorkerError(PixArtNBError):
    """Another worker ended, or could not be reached."""

    def __init__(self, error: Exception):
        reason = str(error).splitlines()[0].strip() if str(error) else type(error).__name__
        # msrun shows the lines of its coordinating process that have the word Error
        super().__init__(
            "Error: this worker cannot go on, probably because another worker ended or could not be reached "
            f"({reason}). The logs in msrun's log_dir tell why. What was saved is whole: give the same command again "
            "to go on."
        )


def join_workers() -> tuple[int, int]:
    """Join the other workers that ``msrun`` started; the rank of this one and their number.

    Raises ``ValueError`` outside of ``msrun``, and ``WorkerError``. In the process that only coordinates the workers
    it does not return.
    """
    if "MS_ROLE" not in os.environ:
        raise PixArtNBError(
            "use_parallel is on, but msrun did not start this process; start it with msrun, or alone"
        )
    from mindspore import communication

    try:
        communication.init()
    except RuntimeError as error:
        raise WorkerError(error) from error
    return communication.get_rank(), communication.get_group_size()


def flash_attention(
    q: ms.Tensor, k: ms.Tensor, v: ms.Tensor, mask: ms.Tensor | None, scale: float
) -> ms.Tensor:
    """Fused attention of Ascend. **Not run on Ascend**; its contract is tested with a stand-in.

    q (B, H, N, d), k and v (B, H, M, d), mask (B, M) bool, True = token. Heads are zero-padded to a multiple of 16
    (72 -> 80), which changes no number; the operator's own mask says 1 = discard.
    """
    head_size = q.shape[-1]
    pad = -head_size % FLASH_HEAD_MULTIPLE
    if pad:
        q, k, v = (ops.pad(part, (0, pad)) for part in (q, k, v))
    dtype = q.dtype
    if dtype == ms.float32:  # the operator knows half precision only
        q, k, v = (part.astype(ms.bfloat16) for part in (q, k, v))
    discard = None
    if mask is not None:
        batch, keys = mask.shape
        discard = ops.logical_not(mask).reshape(batch, 1, 1, keys)
        discard = ops.tile(discard, (1, 1, q.shape[2], 1)).astype(ms.uint8)
    out = flash_attention_score(
        q, k, v, q.shape[1], attn_mask=discard, scalar_value=scale, input_layout="BNSD"
    )
    return out[..., :head_size].astype(dtype)


def flash_attention_score(q, k, v, head_num, **options):
    """The operator itself, behind a name that a test can replace."""
    return ops.flash_attention_score(q, k, v, head_num, **options)
