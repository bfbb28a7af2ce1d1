"""Samplers: one function each, with one signature. Those that step by the predicted noise are in ``sigma_samplers``.

``sampler(predict, latents, schedule, generator=None, **options)`` yields a ``Step`` for each timestep of the
``StepSchedule``. latents are (N, C, H, W) of unit variance, ``predict(latents, timestep)`` is the guided model
(``Predict``), and ``generator`` draws the noise of stochastic samplers (``Generators``). The schedule holds the
noise-to-signal ratio at the start (``sigma``) and the end (``sigma_next``) of each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pixart_nb.core.errors import PixArtNBError, check_number
from pixart_nb.core.sampling.noise_schedule import RespacedSchedule

#: Standard deviation of the data that LCM's boundary condition assumes (Luo et al. 2023).
_SIGMA_DATA = 0.5


@dataclass(frozen=True)
class Step:
    """One denoising step: its index, its timestep, the latents after it and the predicted clean latents.

    latents and denoised are (N, C, H, W), in the dtype of the latents that the sampler was given.
    """

    index: int
    timestep: float
    latents: np.ndarray
    denoised: np.ndarray


class Prediction(NamedTuple):
    """Output of the guided model: the noise (N, C, H, W), and the raw variance (about -1..1) if the model has one."""

    noise: np.ndarray
    variance: np.ndarray | None = None


#: ``predict(latents, timestep) -> Prediction``; latents (N, C, H, W) of unit variance.
Predict = Callable[[np.ndarray, float], Prediction]
#: Anything with NumPy's ``standard_normal``: one generator, or one for each row.
Generators = np.random.Generator | Sequence[np.random.Generator] | None


@dataclass(frozen=True, eq=False)
class StepSchedule:
    """Steps of one run: falling timesteps (N,), and sigmas (N, 2) at the start and the end of each step."""

    timesteps: np.ndarray
    sigmas: np.ndarray

    @classmethod
    def chained(cls, timesteps: np.ndarray, sigmas: np.ndarray) -> StepSchedule:
        """Return the schedule of timesteps (N,) and sigmas (N + 1,), where each step ends at the next one's sigma."""
        return cls(np.asarray(timesteps), np.stack([sigmas[:-1], sigmas[1:]], 1))

    def __len__(self) -> int:
        return len(self.timesteps)

    def __iter__(self) -> Iterator[tuple[int, float, float, float]]:
        """Yield (index, timestep, sigma, sigma_next)."""
        for index, (timestep, (sigma, sigma_next)) in enumerate(zip(self.timesteps, self.sigmas, strict=True)):
            yield index, float(timestep), float(sigma), float(sigma_next)

    def last(self, strength: float) -> StepSchedule:
        """Return the last ``strength`` of the steps, at least one, for image-to-image."""
        first = len(self) - steps_taken(len(self), strength)
        return StepSchedule(self.timesteps[first:], self.sigmas[first:])


def steps_taken(count: int, strength: float) -> int:
    """Return how many of ``count`` steps image-to-image runs. Raises an error for a strength outside 0..1."""
    check_number("strength", strength)
    if not 0 < strength <= 1:
        raise PixArtNBError(f"strength is {strength!r}; expected above 0 (keeps the image) to 1 (all steps)")
    return max(1, int(count * strength))


def active_steps(count: int, start: float, end: float) -> np.ndarray:
    """Return for each of ``count`` steps whether it lies between the shares ``start`` and ``end`` of all, (count,)."""
    steps = np.arange(count)
    return (start <= steps / count) & ((steps + 1) / count <= end)


def scales(sigma: float) -> tuple[float, float]:
    """Return the scales of signal and noise that together have unit variance, at noise-to-signal ratio ``sigma``."""
    signal = 1.0 / np.sqrt(sigma * sigma + 1.0)
    return float(signal), float(sigma * signal)


def denoise(latents: np.ndarray, noise: np.ndarray, sigma: float, clip: float | None = None) -> np.ndarray:
    """Return the clean latents, within -clip..clip, that latents (N, C, H, W) contain if their noise is ``noise``."""
    signal_scale, noise_scale = scales(sigma)
    denoised = (latents - noise_scale * noise) / signal_scale
    return denoised if clip is None else denoised.clip(-clip, clip)


# ---- random numbers


def image_generators(seed: int, numbers: Iterable[int]) -> list[np.random.Generator]:
    """Return one generator for each image number, so that an image does not depend on the others of its batch."""
    return [np.random.default_rng((seed, number)) for number in numbers]


def check_generators(generator: Generators, rows: int) -> None:
    """Raise an error unless ``generator`` is None, one generator, or a list with one for each of ``rows`` images."""
    if generator is None or hasattr(generator, "standard_normal"):
        return
    if not isinstance(generator, Sequence) or not all(hasattr(g, "standard_normal") for g in generator):
        raise PixArtNBError(
            f"generator is {generator!r}; expected a numpy.random.Generator, such as numpy.random.default_rng(seed), "
            "or a list with one for each image"
        )
    if len(generator) != rows:
        raise PixArtNBError(f"{len(generator)} generators for {rows} images; give one, or one for each")


def draw_noise(shape: Sequence[int], generator: Generators) -> np.ndarray:
    """Draw unit noise of shape (N, C, H, W) float32 from one generator, or row by row from one for each."""
    check_generators(generator, shape[0])
    if generator is None or hasattr(generator, "standard_normal"):
        return _normal(generator or np.random.default_rng(), shape)
    return np.stack([_normal(rng, shape[1:]) for rng in generator])


def _normal(generator: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    if isinstance(generator, np.random.Generator):
        return generator.standard_normal(tuple(shape), dtype=np.float32)
    return np.asarray(generator.standard_normal(tuple(shape)), np.float32)


# ---- solvers of the probability-flow ODE, and of its SDE, by predicted clean latents


def dpm_solver(
    predict,
    latents,
    schedule,
    generator=None,
    *,
    order: int = 2,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    heun: bool = False,
    stochastic: bool = False,
) -> Iterator[Step]:
    """DPM-Solver++ multistep, 1 to 3 (Lu et al. 2022, arXiv 2211.01095, algorithm 2), as in diffusers.

    ``heun`` is its other rule of second order, ``stochastic`` SDE-DPM-Solver++. The order rises over the first steps,
    and falls over the last with ``lower_order_final``. A last step with ``euler_at_final``, or one that ends without
    noise, is of first order.
    """
    history: list[tuple[np.ndarray, float]] = []  # clean latents and sigmas, the newest first
    for index, timestep, sigma, sigma_next in schedule:
        history = [(denoise(latents, predict(latents, timestep).noise, sigma), sigma), *history[: order - 1]]
        left = len(schedule) - index
        used = min(len(history), left) if lower_order_final else len(history)
        if left == 1 and (euler_at_final or sigma_next == 0):
            used = 1
        noise = draw_noise(latents.shape, generator) if stochastic else None
        latents = _dpm_step(latents, history[:used], sigma_next, heun, noise)
        yield Step(index, timestep, latents, history[0][0])


def dpm_solver_singlestep(
    predict, latents, schedule, generator=None, *, orders: Sequence[int], heun: bool = False, stochastic: bool = False
) -> Iterator[Step]:
    """DPM-Solver++ single-step (Lu et al. 2022, algorithm 1), as in diffusers; ``orders`` holds that of each step.

    A step of second or third order starts again from the latents of the last step of first order.
    """
    history: list[tuple[np.ndarray, float]] = []  # clean latents and sigmas, the newest last
    start = latents
    for (index, timestep, sigma, sigma_next), order in zip(schedule, orders, strict=True):
        denoised = denoise(latents, predict(latents, timestep).noise, sigma)
        order = order if sigma_next else 1
        history = [*history, (denoised, sigma)][-min(order, len(history) + 1) :]
        if len(history) == 1:
            start = latents
        noise = draw_noise(latents.shape, generator) if stochastic else None
        nodes = history if heun or order < 3 else [history[0], history[-1]]
        latents = _dpm_step(start, nodes, sigma_next, heun or order == 3, noise, 2.0)
        yield Step(index, timestep, latents, denoised)


def _dpm_step(start, nodes, sigma_next: float, heun: bool, noise=None, curvature: float = 1.0) -> np.ndarray:
    """Take a step of order ``len(nodes)``: (clean latents, sigma) at its start, then at other noise levels.

    The step with ``noise`` is that of the SDE. ``curvature`` is the factor of the second divided difference, which
    differs between diffusers' solvers; so do the signs for the SDE.
    """
    (first, sigma), step = nodes[0], _log_ratio(nodes[0][1], sigma_next)
    rate = step if noise is None else 2.0 * step
    estimate = first
    if len(nodes) > 1:
        span = -np.expm1(-rate)
        slopes = [(first - value) / _log_ratio(level, sigma) for value, level in nodes[1:]]
        slope = slopes[0]
        if len(nodes) == 3:
            near, far = (_log_ratio(sigma, level) for _, level in nodes[1:])
            slope = (far * slopes[0] - near * slopes[1]) / (far - near)
            remainder = (rate - span) / rate**2
            quadratic = ((0.5 if noise is None else -0.5) - remainder) / span * curvature
            estimate = estimate + quadratic * step**2 * ((slopes[1] - slopes[0]) / (far - near))
        linear = 1.0 / span - 1.0 / rate if heun or len(nodes) == 3 else 0.5
        estimate = estimate + float(linear) * step * slope
    if noise is None:
        return _exponential_step(start, estimate, sigma, sigma_next)
    (signal, scale), decay = scales(sigma_next), sigma_next / sigma
    spread = scale * float(np.sqrt(1.0 - decay**2))
    return scale / scales(sigma)[1] * decay * start + signal * (1.0 - decay**2) * estimate + spread * noise


def _log_ratio(sigma: float, sigma_next: float) -> float:
    """Return the increase of the half log signal-to-noise ratio over a step, h in Lu et al."""
    return float(np.log(sigma / sigma_next)) if sigma_next else np.inf


def _exponential_step(latents: np.ndarray, estimate: np.ndarray, sigma: float, sigma_next: float) -> np.ndarray:
    """Solve the ODE exactly for constant clean latents ``estimate`` (Lu et al. 2022, equation 8 with k = 1)."""
    signal, noise = scales(sigma_next)
    return noise / scales(sigma)[1] * latents + signal * (1.0 - sigma_next / sigma) * estimate


def unipc(
    predict, latents, schedule, generator=None, *, order: int = 2, lower_order_final: bool = True
) -> Iterator[Step]:
    """UniPC with B_2(h) = e^h - 1 and data prediction (Zhao et al. 2023, algorithms 5 and 7).

    Each prediction first corrects the latents that it was made at, then predicts the next ones; corrected latents are
    not evaluated again. The order rises and falls as in ``dpm_solver``.
    """
    history: list[tuple[np.ndarray, float]] = []  # clean latents and sigmas, the newest first
    start, used = latents, 0
    for index, timestep, sigma, sigma_next in schedule:
        denoised = denoise(latents, predict(latents, timestep).noise, sigma)
        if history:
            latents = _unipc_step(start, [*history[:used], (denoised, sigma)], sigma, corrects=True)
        history = [(denoised, sigma), *history[: order - 1]]
        lower = lower_order_final or sigma_next == 0
        used = min(len(history), len(schedule) - index if lower else order)
        start = latents
        latents = _unipc_step(start, history[:used], sigma_next)
        yield Step(index, timestep, latents, denoised)


def _unipc_step(start: np.ndarray, nodes: list, sigma_next: float, corrects: bool = False) -> np.ndarray:
    """Predict the latents at ``sigma_next`` (UniP, equation 3 of Zhao et al.), or correct them (UniC, equation 9).

    ``nodes``: (clean latents, sigma) at the step's start, then earlier ones; to correct, the last is at ``sigma_next``.
    """
    (first, sigma), others = nodes[0], nodes[1:]
    step, estimate = _log_ratio(sigma, sigma_next), first
    if corrects and len(others) == 1:
        return _exponential_step(start, 0.5 * (first + others[0][0]), sigma, sigma_next)
    if others:
        distances = np.array([_log_ratio(sigma, level) for _, level in others])
        weights = [0.5 * step / distances[0]] if len(others) == 1 else _unipc_weights(distances, step)
        for weight, (value, _) in zip(weights, others, strict=True):
            estimate = estimate + float(weight) * (value - first)
    return _exponential_step(start, estimate, sigma, sigma_next)


def _unipc_weights(distances: np.ndarray, step: float) -> np.ndarray:
    """Return the weights of the differences at ``distances`` (K,) from the step's start: R rho = b in Zhao et al."""
    growth, moment, factorial, moments = np.expm1(-step), np.expm1(-step) / -step - 1.0, 1.0, []
    for power in range(2, len(distances) + 2):
        moments.append(moment * factorial / growth)
        factorial *= power
        moment = moment / -step - 1.0 / factorial
    ratios = distances / step
    return np.linalg.solve(np.vander(ratios, increasing=True).T, np.array(moments)) / ratios


# ---- samplers of diffusion models and consistency models


def ddim(predict, latents, schedule, generator=None, *, eta: float = 0.0, clip: float | None = None) -> Iterator[Step]:
    """DDIM (Song et al. 2021, equations 12 and 16).

    ``eta`` 0 adds no noise, 1 as much as DDPM. ``clip`` limits the clean latents, as diffusers' ``clip_sample`` does.
    """
    for index, timestep, sigma, sigma_next in schedule:
        noise = predict(latents, timestep).noise
        denoised = denoise(latents, noise, sigma, clip)
        (signal_next, scale_next), (signal, scale) = scales(sigma_next), scales(sigma)
        spread = eta * scale_next / scale * np.sqrt(max(0.0, 1.0 - (signal / signal_next) ** 2))
        latents = signal_next * denoised + float(np.sqrt(scale_next**2 - spread**2)) * noise
        if spread > 0:
            latents = latents + float(spread) * draw_noise(latents.shape, generator)
        yield Step(index, timestep, latents, denoised)


class Moments(NamedTuple):
    """Mean and log variance of p(x_{t-1} | x_t), and the clean latents they follow from, all (N, C, H, W)."""

    mean: np.ndarray
    log_variance: np.ndarray
    denoised: np.ndarray


def iddpm_moments(latents: np.ndarray, prediction: Prediction, row: int, respaced: RespacedSchedule) -> Moments:
    """Return the moments of the reverse step from ``respaced.timesteps[row]`` (Nichol and Dhariwal 2021, equation 11).

    The model's variance, -1..1, interpolates between the logarithms of the posterior variance and of beta (equation
    15). Raises an error for a model without a variance.
    """
    if prediction.variance is None:
        raise PixArtNBError(
            "iddpm needs the variance that the model predicts, and this model has none (pred_sigma is off); "
            "use another scheduler, for example 'ddim'"
        )
    denoised = denoise(latents, prediction.noise, float(respaced.sigmas[row]))
    start, current = (float(table[row]) for table in respaced.posterior_mean_coefficients)
    low, high = float(respaced.posterior_log_variance[row]), float(np.log(respaced.betas[row]))
    share = (prediction.variance + 1.0) / 2.0
    return Moments(start * denoised + current * latents, share * high + (1.0 - share) * low, denoised)


def iddpm(predict, latents, schedule, generator=None, *, respaced: RespacedSchedule) -> Iterator[Step]:
    """Ancestral sampling with the learned variance (official ``p_sample_loop``); the last step adds no noise."""
    for index, timestep, _, _ in schedule:
        row = len(schedule) - 1 - index
        mean, log_variance, denoised = iddpm_moments(latents, predict(latents, timestep), row, respaced)
        latents = mean
        if row > 0:
            latents = mean + np.exp(0.5 * log_variance) * draw_noise(mean.shape, generator)
        yield Step(index, timestep, latents, denoised)


def ddpm(
    predict, latents, schedule, generator=None, *, large_variance: bool = False, clip: float | None = None
) -> Iterator[Step]:
    """Ancestral sampling with a fixed variance (Ho et al. 2020, equation 7): that of the posterior, or beta.

    No noise is drawn at timestep 0.
    """
    for index, timestep, sigma, sigma_next in schedule:
        denoised = denoise(latents, predict(latents, timestep).noise, sigma, clip)
        (signal, _), (signal_next, _) = scales(sigma), scales(sigma_next)
        kept = signal**2 / signal_next**2
        beta, rest, rest_next = 1.0 - kept, 1.0 - signal**2, 1.0 - signal_next**2
        latents = signal_next * beta / rest * denoised + np.sqrt(kept).item() * rest_next / rest * latents
        if timestep > 0:
            variance = beta if large_variance else max(rest_next / rest * beta, 1e-20)
            latents = latents + float(np.sqrt(variance)) * draw_noise(latents.shape, generator)
        yield Step(index, timestep, latents, denoised)


def boundary_scalings(timestep: float | np.ndarray, timestep_scaling: float = 10.0) -> tuple:
    """Return c_skip and c_out of a consistency model at timesteps, 1 and 0 at timestep 0 (Luo et al., equation 9)."""
    scaled = timestep * timestep_scaling
    whole = scaled**2 + _SIGMA_DATA**2
    return _SIGMA_DATA**2 / whole, scaled / whole**0.5


def lcm(
    predict, latents, schedule, generator=None, *, timestep_scaling: float = 10.0, clip: float | None = None
) -> Iterator[Step]:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3).

    Each step jumps to c_skip x + c_out denoised, which at timestep 0 is x itself, and adds noise again. ``denoised`` of
    the steps is the result of the jump.
    """
    for index, timestep, sigma, sigma_next in schedule:
        denoised = denoise(latents, predict(latents, timestep).noise, sigma, clip)
        skip, out = boundary_scalings(timestep, timestep_scaling)
        denoised = out * denoised + skip * latents
        latents = denoised
        if index < len(schedule) - 1:
            signal, noise = scales(sigma_next)
            latents = signal * denoised + noise * draw_noise(latents.shape, generator)
        yield Step(index, timestep, latents, denoised)


def sa_solver(
    predict,
    latents,
    schedule,
    generator=None,
    *,
    tau: Callable[[float], float],
    orders: tuple[int, int] = (2, 2),
    rescaled: bool = True,
) -> Iterator[Step]:
    """SA-Solver: stochastic Adams predictor and corrector (Xue et al. 2023, algorithm 1, PEC).

    ``tau(timestep)`` of a step's end scales its noise: 0 is the ODE, 1 the usual SDE. Predictor and corrector share the
    noise of a step; the last step has none, is of first order and is not corrected (official ``few_steps``).
    ``orders`` are those of predictor and corrector; ``rescaled`` is the paper's appendix D.
    """
    count, history = len(schedule), []  # history: (log signal-to-noise ratio, clean latents), oldest first
    step = latents, 0.0, 1.0, 0.0  # latents, sigma, tau and noise of the previous step
    for index, timestep, sigma, sigma_next in schedule:
        denoised = denoise(latents, predict(latents, timestep).noise, sigma)
        history.append((-np.log(sigma), denoised))
        if index > 0 and orders[1] > 0:
            order = min(orders[1], index + 1)
            start, level, scale, noise = step
            latents = _adams(start, history[-order:], level, sigma, scale, noise, rescaled)
        last = index == count - 1
        scale = 0.0 if last else float(tau(float(schedule.timesteps[index + 1])))
        noise = draw_noise(latents.shape, generator) if scale else 0.0
        step = latents, sigma, scale, noise
        order = min(orders[0], index + 1, count - index)
        latents = _adams(latents, history[-order:], sigma, sigma_next, scale, noise, rescaled)
        history = history[-max(orders) :]
        yield Step(index, timestep, latents, denoised)


def _adams(start, history, sigma: float, sigma_next: float, tau: float, noise, rescaled: bool) -> np.ndarray:
    """Take one step of the SDE, interpolating the clean latents of ``history`` (Xue et al., equations 14 and 17)."""
    h, rate = np.log(sigma / sigma_next), 1.0 + tau**2
    (signal_next, scale_next), scale = scales(sigma_next), scales(sigma)[1]
    nodes = np.array([log_snr for log_snr, _ in history]) + np.log(sigma)
    weights = rate * signal_next * adams_weights(nodes, h, rate, rescaled)
    latents = float(np.exp(-(tau**2) * h)) * scale_next / scale * start
    for weight, (_, denoised) in zip(weights, history, strict=True):
        latents = latents + float(weight) * denoised
    return latents + scale_next * float(np.sqrt(-np.expm1(-2.0 * tau**2 * h))) * noise if tau else latents


def adams_weights(nodes: np.ndarray, h: float, rate: float, rescaled: bool) -> np.ndarray:
    """Return the exact integrals (K,) over u in 0..h of exp(rate (u - h)) times the Lagrange polynomials of nodes (K,).

    ``rescaled`` uses h^2 / 2 for the integral of exp(rate (u - h)) u when there are two nodes.
    """
    moments = [-np.expm1(-rate * h) / rate]
    for power in range(1, len(nodes)):
        moments.append((h**power - power * moments[-1]) / rate)
    if rescaled and len(nodes) == 2:
        moments[1] = h * h / 2.0
    # the weights give every polynomial up to the degree its integral
    return interpolation_weights(nodes, np.array(moments))


def interpolation_weights(nodes: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Return weights (K,) that give the polynomials u^0 .. u^(K - 1), taken at ``nodes`` (K,), these integrals."""
    return np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
