"""Device, dtypes and threads."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from pixart_nb.core import backend
from pixart_nb.core.backend import dtype_from_name, ms, supported_dtype

PLACES = """
import json, os, sys
import numpy as np
from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from mindspore import ops
os.sched_setaffinity(0, set(json.loads(sys.argv[1])))
backend.pin_threads()
rows = ms.Tensor(np.random.default_rng(0).standard_normal((256, 512), np.float32))
sum = float(np.abs(ops.MatMul(transpose_b=True)(rows, rows).asnumpy()).sum())
places = [sorted(os.sched_getaffinity(thread)) for thread in backend._pool_threads()]
print(json.dumps([places, sorted(os.sched_getaffinity(0)), sum]))
"""


@pytest.fixture
def cores(all_cores):
    if len(all_cores) < 2:
        pytest.skip("runs once the system has two cores and can bind threads to them")
    return all_cores


def places(cores, available, **environment):
    """Cores of each thread of the pool and of the main one, and a number that was computed."""
    done = subprocess.run(
        [sys.executable, "-c", PLACES, json.dumps(cores)],
        env=os.environ | {"PIXART_NB_PIN_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: os.sched_setaffinity(0, available),
    )
    assert done.returncode == 0, done.stderr[-1000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_thread_that_computes_has_a_core_of_its_own_and_computes_the_same(cores):
    two = cores[:2]
    settled, main, sum_settled = places(two, cores)
    assert settled == [[two[0]], [two[1]]]
    assert main == two
    left, _, sum_left = places(two, cores, PIXART_NB_PIN_THREADS="0")
    assert left == [two, two]
    assert sum_settled == sum_left


def test_threads_are_left_alone_where_there_are_fewer_cores(cores):
    assert places(cores[:1], cores)[0] == [cores[:1], cores[:1]]


def test_every_job_is_done_once_by_the_calling_thread_and_its_helpers():
    done, started = [], threading.Barrier(min(2, backend.thread_count()), timeout=60)

    def work(job):
        if job < 2:
            started.wait()  # two threads work at the same time
        done.append((job, threading.get_ident()))

    backend.in_threads(work, range(20))
    assert sorted(job for job, _ in done) == list(range(20))
    threads = {thread for _, thread in done}
    assert threading.get_ident() in threads
    assert 1 <= len(threads) <= backend.thread_count()


@pytest.mark.parametrize("failing", [0, 1, 7])
def test_an_error_of_any_thread_is_raised_and_later_jobs_are_done(failing):
    def work(job):
        if job == failing:
            raise ArithmeticError(f"job {job}")

    with pytest.raises(ArithmeticError, match=f"job {failing}"):
        backend.in_threads(work, range(8))
    done = []
    backend.in_threads(done.append, range(8))
    assert sorted(done) == list(range(8))


def test_jobs_may_have_jobs_of_their_own():
    done = []
    backend.in_threads(lambda job: backend.in_threads(lambda own: done.append((job, own)), range(5)), range(5))
    assert sorted(done) == [(job, own) for job in range(5) for own in range(5)]


@pytest.mark.parametrize(
    "dtype", ["fp16", "float16", "ms.float16", np.float16, np.dtype("float16"), ms.float16], ids=repr
)
def test_a_dtype_may_be_a_name_or_a_dtype_of_any_library(dtype):
    assert dtype_from_name(dtype) == ms.float16
    assert supported_dtype(dtype) == ms.float16


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", ms.bfloat16], ids=repr)
def test_bfloat16_is_computed_in_float32_on_the_cpu(dtype):
    assert supported_dtype(dtype) == ms.float32


@pytest.mark.parametrize("dtype", ["int8", np.int32, None, "half"], ids=repr)
def test_an_unknown_dtype_says_what_was_expected(dtype):
    with pytest.raises(ValueError, match="expected float32, float16 or bfloat16"):
        supported_dtype(dtype)


PROTOBUF_FIRST = """
from google.protobuf import struct_pb2
from google.protobuf.internal import api_implementation
before = api_implementation.Type()
from pixart_nb.core.backend import ms
from google.protobuf.internal import api_implementation as again
message = struct_pb2.Struct()
message["x"] = 1.5
assert again is api_implementation and api_implementation.Type() == before
assert struct_pb2.Struct.FromString(message.SerializeToString())["x"] == 1.5
ms.save_checkpoint([{"name": "w", "data": ms.Tensor([1.0, 2.0])}], "w.ckpt")
assert ms.load_checkpoint("w.ckpt")["w"].asnumpy().tolist() == [1.0, 2.0]
"""


def test_another_library_may_import_protobuf_first(tmp_path):
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", PROTOBUF_FIRST],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-1000:]


SETTINGS = """
import csv, locale, logging, os, random, signal, sys, warnings
import matplotlib, mindspore, numpy as np, PIL.Image, PIL.ImageFile, transformers
def settings():
    return [
        {name: value for name, value in os.environ.items() if name != "GLOG_v"},  # of MindSpore, which reads it once
        list(map(repr, warnings.filters)), np.geterr(), np.get_printoptions(), dict(matplotlib.rcParams),
        str(np.random.get_state()), random.getstate(), locale.setlocale(locale.LC_ALL), list(sys.path),
        PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, csv.field_size_limit(), os.getcwd(),
        logging.getLogger().level, logging.getLogger().handlers[:], transformers.logging.get_verbosity(),
        sys.getrecursionlimit(), sys.excepthook, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
    ]
before = settings()
from pixart_nb import PixArtSigmaPipeline
from pixart_nb.viz.figures import image_grid
pipe = PixArtSigmaPipeline.from_pretrained("data/tiny-sigma")
image_grid([np.asarray(pipe("a red cup", num_inference_steps=1, height=64, width=64)[0][0])], ["a"])
for one, other in zip(before, settings(), strict=True):
    assert one == other, f"{one} became {other}"
"""


@pytest.mark.slow
def test_drawing_an_image_leaves_the_settings_of_the_process_alone(project):
    environment = os.environ | {"PYTHONPATH": str(project)}
    words = [sys.executable, "-W", "ignore", "-c", SETTINGS]
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]


def started(code="from pixart_nb.core import backend; print(backend.device_name())", **environment):
    """What a process prints that opens the device."""
    variables = {name: value for name, value in os.environ.items() if name != "PIXART_NB_DEVICE"}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables | environment, capture_output=True, text=True, timeout=120
    )


def test_an_ascend_host_without_its_environment_is_told_what_to_do(tmp_path):
    with_cann = started(ASCEND_HOME_PATH=str(tmp_path))
    assert with_cann.stdout == "CPU\n"
    assert "looks like an Ascend host, but MindSpore computes on the CPU" in with_cann.stderr
    assert "pixart-nb doctor" in with_cann.stderr
    devices = """
from pathlib import Path
glob = Path.glob
Path.glob = lambda self, pattern: [Path("/dev/davinci0")] if "davinci" in pattern else glob(self, pattern)
from pixart_nb.core import backend
"""
    assert "Run `source /" in (stderr := started(devices).stderr)
    assert "set_env.sh` in this shell first" in stderr
    chosen = started(devices, PIXART_NB_DEVICE="CPU")
    assert "Ascend" not in chosen.stderr


def test_convolutions_in_float32_are_not_rounded_on_ascend():
    code = """
import mindspore as ms
ms.set_device = ms.device_context.ascend.op_precision.conv_allow_hf32 = print
from pixart_nb.core import backend
"""
    assert started(code, PIXART_NB_DEVICE="Ascend").stdout == "Ascend\nFalse\n"


def test_a_later_mindspore_on_a_cpu_is_named_as_slow():
    later = "import mindspore; mindspore.__version__ = '2.10.0'; from pixart_nb.core import backend"
    assert "MindSpore 2.10.0 computes convolutions about 70 times slower on the CPU than 2.8" in started(later).stderr


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("Ascend", "device Ascend cannot be opened: Unsupported device target Ascend. Run `source "),
        ("GPU", "PIXART_NB_DEVICE is 'GPU'; expected CPU or Ascend, or leave it out"),
    ],
)
def test_a_device_that_cannot_be_opened_is_one_sentence(device, message):
    result = started(PIXART_NB_DEVICE=device)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]
