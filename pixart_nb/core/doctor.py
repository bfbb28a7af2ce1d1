"""Checks of an installation: versions, device, products in each dtype, small networks and updates by stored numbers."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pixart_nb import __version__

#: Packages whose versions are shown; CANN imports the second group.
PACKAGES = ("mindspore", "numpy", "transformers", "safetensors")
CANN_PACKAGES = ("decorator", "sympy", "absl-py", "attrs", "protobuf")
#: Environment variables that are shown where they are set.
VARIABLES = (
    "PIXART_NB_DEVICE", "ASCEND_HOME_PATH", "ASCEND_RT_VISIBLE_DEVICES", "MS_ASCEND_CHECK_OVERFLOW_MODE",
)  # fmt: skip
#: Check that compiles graphs on Ascend.
COMPILED = "transformer, compiled"
#: Largest relative error of a network in each dtype.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 8e-2}
#: Numbers that each network gives, on a CPU in float32 (MindSpore 2.8): the root mean square and six values.
EXPECTED = {
    "transformer": (1.814302, 0.8470544, 0.1175996, -1.979676, -0.9688976, 0.5296594, 0.09519696),
    "transformer, KV compression": (1.889927, 1.520058, -1.482792, 0.4549207, 1.194067, -1.654789, 1.395192),
    COMPILED: (1.814302, 0.8470544, 0.1175996, -1.979676, -0.9688976, 0.5296594, 0.09519696),
    "gradient": (0.05754565, -0.02975346, -0.04512173, -0.004251127, -0.02319176, 0.02472707, -0.07115859),
    "update, AdamW": (0.7957603, 0.1581612, -0.01913718, 0.07505809, -0.1152355, -0.5032901, -1.632903),
    "update, CAME": (2.049821, 2.735972, 0.2050686, 0.9756386, -0.2170727, 0.936566, 1.486493),
    "text encoder": (1.006679, 1.898983, -0.6845232, -0.2664637, -1.730308, -0.03030691, -0.6571827),
    "VAE decoder": (0.6882519, -0.2607359, 0.01947491, -0.4050479, -0.3512804, -0.3032004, -0.1113237),
    "VAE decoder, tiles": (0.655857, -0.2729266, 0.01535103, -0.4102567, -0.3772277, -0.3198275, -0.1214823),
}


class Check(NamedTuple):
    """Result of one check; ``passed`` is None where there is nothing to pass."""

    name: str
    result: str
    passed: bool | None = None


def environment() -> list[Check]:
    """Return the versions of the system and the packages. MindSpore is not imported, as that may fail."""
    devices = sorted(path.name for path in Path("/dev").glob("davinci[0-9]*"))
    on_host = bool(os.environ.get("ASCEND_HOME_PATH") or devices)
    names = (*PACKAGES, *(CANN_PACKAGES if on_host else ()))
    system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver()) or 'libc unknown'}"
    checks = [
        Check("pixart-nb", __version__),
        Check("system", system),
        Check("Python", f"{platform.python_version()} at {sys.executable}"),
    ]
    checks += [Check(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    if devices:
        checks.append(Check("Ascend devices", ", ".join(devices)))
    if devices and "ASCEND_HOME_PATH" not in os.environ:
        checks.append(Check("CANN's environment", "not set; source CANN's set_env.sh, then run this again", False))
    for name in names:
        try:
            checks.append(Check(name, version(name)))
        except PackageNotFoundError:
            checks.append(Check(name, "not installed", None if name in PACKAGES else False))
    return checks


def device_checks() -> Iterator[Check]:
    """Open the device and check it. An operator that fails is one line, not the end.

    Raises ``PixArtNBError`` if the device cannot be opened.
    """
    from pixart_nb.core import backend
    from pixart_nb.core.memory import available
    from pixart_nb.core.models.low_precision import unsupported

    cann, accepted = backend.cann_versions()
    if cann:
        yield Check("CANN", f"{cann}; MindSpore accepts {', '.join(accepted)}", cann in accepted)
    name = backend.ms.hal.get_device_name(0)
    yield _attempt("device", lambda: backend.check_device() or (_device(name), True))
    if not backend.on_ascend():
        yield Check("bfloat16 products", unsupported() or "on this processor")
    yield Check("free memory", f"{available() / 1e9:.1f} GB")
    dtypes = list(TOLERANCES) if backend.on_ascend() else ["fp32", "fp16"]
    for dtype in dtypes:
        yield _attempt(f"matrix product, {dtype}", lambda dtype=dtype: _product(dtype))
    for network in NETWORKS:
        if network == COMPILED and not backend.on_ascend():
            continue  # a CPU compiles nothing
        for dtype in dtypes:
            yield _attempt(f"{network}, {dtype}", lambda network=network, dtype=dtype: _compare(network, dtype))


def _device(name: str) -> str:
    from pixart_nb.core import backend

    return backend.device_name() + (f" ({name})" if name != backend.device_name() else "")


def _attempt(name: str, check: Callable[[], tuple[str, bool]]) -> Check:
    started = time.perf_counter()
    try:
        result, passed = check()
    except Exception as error:  # noqa: BLE001 - whatever MindSpore raises is what the report is for
        lines = [line for line in str(error).splitlines() if line.strip("- \n")]
        return Check(name, f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300], False)
    return Check(name, f"{result} ({time.perf_counter() - started:.1f} s)", passed)


def _product(dtype: str) -> tuple[str, bool]:
    from mindspore import ops

    from pixart_nb.core.backend import dtype_from_name, ms

    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 256), (128, 256)))
    out = ops.MatMul(transpose_b=True)(*(ms.Tensor(a).astype(dtype_from_name(dtype)) for a in (x, weight)))
    return _error(out.astype(ms.float32).asnumpy(), x.astype(np.float64) @ weight.T, dtype)


def _error(values: np.ndarray, expected: np.ndarray, dtype: str) -> tuple[str, bool]:
    error = float(np.linalg.norm(values - expected) / np.linalg.norm(expected))
    return f"relative error {error:.1e}, at most {TOLERANCES[dtype]:.0e}", error <= TOLERANCES[dtype]


def _compare(network: str, dtype: str) -> tuple[str, bool]:
    return _error(np.array(numbers(network, dtype)), np.array(EXPECTED[network]), dtype)


def numbers(network: str, dtype: str = "fp32") -> list[float]:
    """Return the root mean square of the output of a small network, and six values of it."""
    from pixart_nb.core.backend import dtype_from_name, ms

    out = NETWORKS[network](dtype_from_name(dtype)).astype(ms.float32).asnumpy().astype(np.float64).reshape(-1)
    return [float(np.sqrt((out**2).mean())), *map(float, out[:: max(1, out.size // 6)][:6])]


def _random(*shape: int, seed: int = 1):
    from pixart_nb.core.backend import ms

    return ms.Tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def _filled(net, dtype):
    """Give a network weights in which every part shows."""
    rng = np.random.default_rng(0)
    for name, weight in net.parameters_and_names():
        scale = float("norm" in name and name.endswith("weight"))
        value = scale + 0.1 * rng.standard_normal(weight.shape)
        weight.set_data(_tensor(value).astype(dtype))
        weight.set_dtype(dtype)
    net.set_train(False)
    return net


def _tensor(values: np.ndarray):
    from pixart_nb.core.backend import ms

    return ms.Tensor(values.astype(np.float32))


def _transformer(dtype, operator: str | None = None):
    from pixart_nb.core.models.transformer import PixArt, PixArtConfig

    compression = dict(sampling=operator, scale_factor=2, kv_compress_layer=[1])
    config = PixArtConfig(
        hidden_size=144, num_heads=2, depth=2, caption_channels=32, input_size=16,
        kv_compress_config=compression if operator else None,
    )  # fmt: skip
    return _filled(PixArt(config), dtype)


def _denoise(dtype, operator: str | None = None, compiled: bool = False):
    """One step of two images with captions of different lengths, by the path of the device."""
    from pixart_nb.core import backend
    from pixart_nb.core.fast import denoiser

    mask, before = np.arange(20)[None] < np.array([[20], [3]]), backend.graph_mode()
    try:
        backend.set_graph_mode(compiled)
        return denoiser(_transformer(dtype, operator), _random(2, 20, 32), mask)(_random(2, 4, 16, 16, seed=2), 500.0)
    finally:
        backend.set_graph_mode(before)


def _gradient(dtype):
    """Gradient of a loss with respect to the weights of a linear layer in the middle of the transformer."""
    from pixart_nb.core.backend import ms

    net = _transformer(dtype)
    net.set_train(True)
    positions, timesteps = net.positions(16, 16), _tensor(np.array([5.0, 700.0]))
    mask = ms.Tensor(np.arange(20)[None] < np.array([[20], [3]]))

    def loss(latents, caption):
        out = net.forward(latents, timesteps, caption, mask, positions).astype(ms.float32)
        return (out * out).mean()

    return ms.grad(loss, None, [net.blocks[0].attn.proj.weight])(_random(2, 4, 16, 16), _random(2, 20, 32))[0]


def _text_encoder(dtype):
    from pixart_nb.core.models.t5 import T5Config, T5Encoder

    net = _filled(T5Encoder(T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_heads=4, num_layers=2)), dtype)
    return net(np.arange(40).reshape(2, 20), np.arange(20)[None] < np.array([[20], [3]]))


def _update(dtype, name: str):
    """Weights and their averages after three updates: two matrices and two vectors, which CAME updates together."""
    from mindspore import ops

    from pixart_nb.core.backend import ms
    from pixart_nb.core.training.optimizers import CAME, EMA, AdamW

    shapes = {"matrix": (6, 8), "matrix 2": (6, 8), "vector": (8,), "vector 2": (8,)}
    weights = {key: ms.Parameter(_random(*shape, seed=i), name=key) for i, (key, shape) in enumerate(shapes.items())}
    optimizer, average = {"AdamW": AdamW, "CAME": CAME}[name](weights, weight_decay=0.1), EMA(weights, 0.5)
    for number in range(3):
        gradients = [_random(*shape, seed=10 * number + i) for i, shape in enumerate(shapes.values())]
        gradients = [gradient.astype(dtype).astype(ms.float32) for gradient in gradients]
        optimizer.update(dict(zip(shapes, gradients, strict=True)), 0.1)
        average.update()
    return ops.concat([tensor.reshape(-1) for tensor in (*weights.values(), *average.averages.values())])


def _decoder(dtype, tile: int = 0):
    from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig

    net = _filled(AutoencoderKL(VAEConfig(block_out_channels=(16, 16, 32, 32), norm_num_groups=8)), dtype)
    if tile:
        net.enable_tiling(tile)
    return net.decode(_random(1, 4, 16, 16))[0]


#: Networks by the name of their check.
NETWORKS: dict[str, Callable] = {
    "transformer": _denoise,
    "transformer, KV compression": lambda dtype: _denoise(dtype, "conv"),
    COMPILED: lambda dtype: _denoise(dtype, compiled=True),
    "gradient": _gradient,
    "update, AdamW": lambda dtype: _update(dtype, "AdamW"),
    "update, CAME": lambda dtype: _update(dtype, "CAME"),
    "text encoder": _text_encoder,
    "VAE decoder": _decoder,
    "VAE decoder, tiles": lambda dtype: _decoder(dtype, 64),
}
