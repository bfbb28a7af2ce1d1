"""Short training on drawn scenes in which a model adapts to compressed keys and values (PixArt-Sigma, section 4.1)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.cost import with_compression
from pixart_nb.core.data.images import to_signed
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks.trace_files import model_fingerprint
from pixart_nb.core.io import read_json, write_json
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.training.loss import NAMES, add_noise, diffusion_loss, loss_terms
from pixart_nb.core.training.trainer import Trainer, TrainerOptions
from pixart_nb.pixelart.batches import caption_pool, diffusion_batches, draw_scenes, generator, trained_parameters
from pixart_nb.pixelart.scenes import Scene
from pixart_nb.pixelart.split import held_out_scenes, training_scene
from pixart_nb.pixelart.text_encoder import CAPTION_TOKENS

#: Images that are encoded at once.
ENCODED = 8
#: Key of the random numbers of held-out batches.
HELD_OUT = 1


class CompressionAdaptation:
    """A copy of a pipeline whose transformer compresses keys and values, and its resumable training.

    The copy starts with the pipeline's weights; a ``conv`` starts as the average of each cell, its norm as ones.

    Args:
        pipe: pipeline of the bundled model, or one that draws scenes; it is not changed.
        layers, ratio, operator: what is compressed, and how.
        folder: where the state of the training is stored.
        steps: steps of the whole training; ``train`` goes to one of them.
        images: number of drawn training images, of scenes as the bundled model was trained with.
        batch, learning_rate: of a step; the rate rises over the first tenth of the steps, then stays.
        like: another adaptation, whose images are used instead of drawing and encoding them again.
    """

    def __init__(
        self,
        pipe: Any,
        layers: Sequence[int],
        ratio: int,
        operator: str,
        folder: str | Path,
        steps: int,
        images: int = 512,
        batch: int = 16,
        learning_rate: float = 5e-5,
        seed: int = 0,
        like: CompressionAdaptation | None = None,
    ):
        self.pipe, self.net = copy.copy(pipe), compressed_copy(pipe.transformer, layers, ratio, operator)
        self.pipe.transformer = self.net
        if like is None:
            rng = np.random.default_rng(seed)
            self.batch = self._batches([training_scene(rng) for _ in range(images)], batch, seed)
            held_out = [*held_out_scenes(batch, 1), *held_out_scenes(batch, 2)]
            self.held_out = self._batches(held_out, batch * 2, (seed, HELD_OUT))
        else:
            self.batch, self.held_out = like.batch, like.held_out
        options = TrainerOptions(
            steps=steps,
            start_learning_rate=learning_rate,
            warmup_steps=max(1, steps // 10),
            ema_rate=None,
            save_every=max(1, steps),
            log_every=1,
        )
        side = self.net.config.input_size
        identity = {"layers": [int(layer) for layer in layers], "ratio": ratio, "operator": operator}
        identity |= {"steps": steps, "images": images, "batch": batch, "learning_rate": learning_rate}
        identity |= {"seed": seed, "weights": model_fingerprint(pipe.transformer)["weights"]}
        self.trainer = Trainer(
            diffusion_loss(self.net, self.net.positions(side, side)),
            trained_parameters(self.net),
            self.batch,
            options,
            folder,
            NAMES,
            network=self.net,
            identity=identity,
        )

    def train(self, until: int) -> list[dict[str, float]]:
        """Train up to a step; return the rows of the log that this added."""
        return list(self.trainer.steps(until))

    def measured(
        self, points: Sequence[int], measures: Mapping[str, Callable[[], float]]
    ) -> dict[str, dict[int, float]]:
        """Train to each of the steps ``points`` and call the ``measures`` there; return their values by name and step.

        Values are stored in the folder, so that a training that was interrupted has its whole curve. Raises
        ``PixArtNBError`` for a step that was passed without being measured.
        """
        path = self.trainer.folder / "measured.json"
        stored = read_json(path) if path.is_file() else {}
        for point in sorted(points):
            values = stored.setdefault(str(point), {})
            if missing := set(measures) - set(values):
                self.train(point)
                if self.trainer.step != point:
                    raise PixArtNBError(
                        f"the training in {path.parent} is at step {self.trainer.step}, and {sorted(missing)} was not "
                        f"measured at step {point}; choose another folder"
                    )
                values |= {name: float(measures[name]()) for name in missing}
                write_json(path, stored)
        self.train(max(points))
        return {name: {int(point): stored[str(point)][name] for point in points} for name in measures}

    def held_out_error(self, net: PixArt, batches: int = 2) -> float:
        """Return the mean squared error of the predicted noise on held-out scenes, the same for every ``net``."""
        errors = []
        for number in range(batches):
            tensors = [ms.Tensor(array) for array in self.held_out(number)]
            start, noise, table, timesteps, embeddings, mask = tensors
            noised = add_noise(start, noise, table)
            mse, _ = loss_terms(net(noised, timesteps, embeddings, mask), start, noised, noise, table)
            errors.append(float(mse.mean().asnumpy()))
        return float(np.mean(errors))

    def _batches(self, scenes: Sequence[Scene], size: int, seed: Any):
        """Return batches of images of ``scenes``, with captions padded to one length."""
        rng, pipe = np.random.default_rng(seed), self.pipe
        side = 8 * self.net.config.input_size
        latents = []
        for first in range(0, len(scenes), ENCODED):
            drawn = to_signed(draw_scenes(scenes[first : first + ENCODED], rng, side, side))
            latents.append(pipe.vae.encode(ms.Tensor(drawn))[0].mean.asnumpy())
        scaled = pipe.vae.config.to_model(np.concatenate(latents))
        first = int(generator(*np.atleast_1d(seed)).integers(2**31))
        pool = caption_pool(scenes, pipe.tokenizer.tokenize, (CAPTION_TOKENS,), 1, generator(first, 6))
        empty = pipe.tokenizer.tokenize([""], CAPTION_TOKENS)

        def embed(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            return pipe.text_encoder(ids, mask).asnumpy()

        return diffusion_batches(scaled, pool, embed, empty, size, 0.1, first)


def compressed_copy(net: PixArt, layers: Sequence[int], ratio: int, operator: str) -> PixArt:
    """Return a float32 copy of ``net`` whose ``layers`` compress; new parameters start as the average of each cell."""
    compressed = PixArt(with_compression(net.config, layers, ratio, operator))
    weights = dict(net.parameters_and_names())
    for name, parameter in compressed.parameters_and_names():
        if name in weights:
            parameter.set_data(ms.Tensor(weights[name].astype(ms.float32).asnumpy().copy()))
        elif name.endswith("norm.weight"):
            parameter.set_data(ms.Tensor(np.ones(parameter.shape, np.float32)))
    return compressed
