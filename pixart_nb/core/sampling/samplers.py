"""Samplers: one function each, with one signature.

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

from pixart_nb.core.errors import PixArtNBError
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
    if not 0 < strength <= 1:
        raise PixArtNBError(f"strength is {strength!r}; expected above 0 (keeps the image) to 1 (all steps)")
    return max(1, int(count * strength))


def scales(sigma: float) -> tuple[float, float]:
    """Return the scales of signal and noise that together have unit variance, at noise-to-signal ratio ``sigma``."""
    signal = 1.0 / np.sqrt(sigma * sigma + 1.0)
    return float(signal), float(sigma * signal)


def denoise(latents: np.ndarray, noise: np.ndarray, sigma: float) -> np.ndarray:
    """Return the clean latents that latents (N, C, H, W) contain if their noise is ``noise``."""
    signal_scale, noise_scale = scales(sigma)
    return (latents - noise_scale * noise) / signal_scale


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


# ---- samplers of the probability-flow ODE


def dpm_solver_2m(
    predict, latents, schedule, generator=None, *, order: int = 2, lower_order_final: bool = True
) -> Iterator[Step]:
    """DPM-Solver++ 2M with the midpoint rule (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    The first step is of first order, and so is the last with ``lower_order_final`` or if it ends without noise.
    """
    previous = None  # clean latents and sigma of the previous step
    for index, timestep, sigma, sigma_next in schedule:
        denoised = denoise(latents, predict(latents, timestep).noise, sigma)
        at_end = index == len(schedule) - 1 and (lower_order_final or sigma_next == 0)
        estimate = denoised
        if previous is not None and order == 2 and not at_end:
            slope = (denoised - previous[0]) / _log_ratio(previous[1], sigma)
            estimate = denoised + 0.5 * _log_ratio(sigma, sigma_next) * slope
        latents = _exponential_step(latents, estimate, sigma, sigma_next)
        previous = denoised, sigma
        yield Step(index, timestep, latents, denoised)


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
    """UniPC of order 1 or 2 with B_2(h) = e^h - 1 and data prediction (Zhao et al. 2023, algorithms 5 and 7).

    Each prediction first corrects the latents that it was made at, then predicts the next ones; corrected latents are
    not evaluated again. The first step is of first order, and the last as in ``dpm_solver_2m``.
    """
    history: list[tuple[np.ndarray, float]] = []  # clean latents and sigmas of the last two steps
    start, used = latents, 0
    for index, timestep, sigma, sigma_next in schedule:
        denoised = denoise(latents, predict(latents, timestep).noise, sigma)
        if history:
            latents = _unipc_correct(start, denoised, history, sigma, used)
        history = [*history[-1:], (denoised, sigma)]
        lower = lower_order_final or sigma_next == 0
        used = min(order, index + 1, len(schedule) - index if lower else order)
        start = latents
        latents = _unipc_predict(latents, history, sigma_next, used)
        yield Step(index, timestep, latents, denoised)


def _unipc_predict(latents: np.ndarray, history: list, sigma_next: float, order: int) -> np.ndarray:
    """Return the latents at ``sigma_next`` (UniP, equation 3 of Zhao et al.)."""
    (denoised, sigma), estimate = history[-1], history[-1][0]
    if order == 2:
        before, sigma_before = history[-2]
        ratio = 0.5 * _log_ratio(sigma, sigma_next) / _log_ratio(sigma_before, sigma)
        estimate = denoised + ratio * (denoised - before)
    return _exponential_step(latents, estimate, sigma, sigma_next)


def _unipc_correct(start: np.ndarray, denoised: np.ndarray, history: list, sigma: float, order: int) -> np.ndarray:
    """Return corrected latents at ``sigma`` from those at the step's start (UniC, equation 9 of Zhao et al.)."""
    middle, level = history[-1]
    if order == 1:
        return _exponential_step(start, 0.5 * (middle + denoised), level, sigma)
    before, earlier = history[-2]
    weight, weight_before = _unipc_weights(_log_ratio(level, sigma), _log_ratio(earlier, level))
    estimate = middle + weight_before * (before - middle) + weight * (denoised - middle)
    return _exponential_step(start, estimate, level, sigma)


def _unipc_weights(h: float, h_before: float) -> tuple[float, float]:
    """Return the weights of the new and the older difference: the solution of R rho = b for order 2."""
    ratio = -h_before / h
    growth = np.expm1(-h)
    second = growth / -h - 1.0
    third = second / -h - 0.5
    b_1, b_2 = second / growth, 2.0 * third / growth
    older = (b_1 - b_2) / (1.0 - ratio)
    return float(b_1 - older), float(older / ratio)


def euler(predict, latents, schedule, generator=None) -> Iterator[Step]:
    """Euler steps in sigma (Karras et al. 2022, algorithm 2 without churn).

    Here latents are clean latents plus sigma times noise, also those of the steps, as in diffusers.
    """
    for index, timestep, sigma, sigma_next in schedule:
        noise = predict(latents * scales(sigma)[0], timestep).noise
        denoised = latents - sigma * noise
        latents = latents + (sigma_next - sigma) * noise
        yield Step(index, timestep, latents, denoised)


def ddim(predict, latents, schedule, generator=None, *, eta: float = 0.0, clip: float | None = None) -> Iterator[Step]:
    """DDIM (Song et al. 2021, equations 12 and 16).

    ``eta`` 0 adds no noise, 1 as much as DDPM. ``clip`` limits the clean latents, as diffusers' ``clip_sample`` does.
    """
    for index, timestep, sigma, sigma_next in schedule:
        noise = predict(latents, timestep).noise
        denoised = denoise(latents, noise, sigma)
        if clip is not None:
            denoised = denoised.clip(-clip, clip)
        (signal_next, scale_next), (signal, scale) = scales(sigma_next), scales(sigma)
        spread = eta * scale_next / scale * np.sqrt(max(0.0, 1.0 - (signal / signal_next) ** 2))
        latents = signal_next * denoised + float(np.sqrt(scale_next**2 - spread**2)) * noise
        if spread > 0:
            latents = latents + float(spread) * draw_noise(latents.shape, generator)
        yield Step(index, timestep, latents, denoised)


# ---- samplers that draw noise at every step


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


def lcm(
    predict, latents, schedule, generator=None, *, timestep_scaling: float = 10.0, clip: float | None = None
) -> Iterator[Step]:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3).

    Each step jumps to c_skip x + c_out denoised, which at timestep 0 is x itself, and adds noise again. ``denoised`` of
    the steps is the result of the jump.
    """
    for index, timestep, sigma, sigma_next in schedule:
        denoised = denoise(latents, predict(latents, timestep).noise, sigma)
        if clip is not None:
            denoised = denoised.clip(-clip, clip)
        scaled = timestep * timestep_scaling
        whole = scaled**2 + _SIGMA_DATA**2
        denoised = scaled / whole**0.5 * denoised + _SIGMA_DATA**2 / whole * latents
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
    return np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(moments))
