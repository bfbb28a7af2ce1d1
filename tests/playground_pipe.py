"""A stand-in for a pipeline, for tests of the playground."""

from types import SimpleNamespace

import numpy as np

from pixart_nb.viz.playground_run import Parameters

CUP = Parameters("a red cup", 32, 48, steps=5, seed=3)


class Pipe:
    """Has the interface of a pipeline. An image is the noise that its generator draws first, fading in."""

    def __init__(self, step_cost=lambda: None):
        self.scheduler, self.used, self.closed, self.decoded = "own", [], 0, []
        self.step_cost, self.decode_cost = step_cost, lambda: None

    def sample(self, prompt, *, height, width, generator, num_inference_steps, num_images_per_prompt, **rest):
        if height % 16 or width % 16:
            raise ValueError(f"height and width are {height}x{width}; both must be multiples of 16")
        noise = np.stack([rng.random((4, height // 8, width // 8)) for rng in generator])
        assert len(noise) == num_images_per_prompt
        self.used.append(self.scheduler)
        return self._steps(noise, num_inference_steps)

    def _steps(self, noise, count):
        try:
            yield "the conditioning"
            for index in range(count):
                self.step_cost()
                latents = noise * (index + 1) / count
                yield SimpleNamespace(index=index, timestep=0.0, latents=latents, denoised=latents)
        finally:
            self.closed += 1

    def decode_latents(self, latents):
        self.decode_cost()
        self.decoded.append(latents.shape)
        return latents[:, :3].repeat(8, 2).repeat(8, 3).transpose(0, 2, 3, 1)


def expected_image(parameters, number):
    noise = np.random.default_rng((parameters.seed, number)).random((4, parameters.height // 8, parameters.width // 8))
    return (noise[:3].repeat(8, 1).repeat(8, 2).transpose(1, 2, 0) * 255).round().astype(np.uint8)
