"""Loss of the bundled models: that of PixArt-Sigma, weighted towards what decides an object, and a head that names it.

The published models see millions of images; this one sees few. The plain loss of the noise is nearly silent where an
object is decided: at high noise, in a sixth of the cells. So (1) timesteps weigh as in velocity prediction (Salimans
and Ho 2022, section 4: the squared error of the noise divided by alpha_bar), and most of them are drawn where objects
appear; (2) cells of objects weigh more; (3) while it trains, a linear head on the tokens in the middle of the network
names the object at each token, which ties words to positions early.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.models.layers import Linear, normal
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.noise_schedule import LINEAR
from pixart_nb.core.training.loss import add_noise, loss_terms
from pixart_nb.pixelart.batches import generator
from pixart_nb.pixelart.objects import OBJECTS
from pixart_nb.pixelart.text_encoder import mean_cross_entropy

#: Weight of the cells of objects, those of settings have 1; largest weight of a timestep; weight of the head's loss.
OBJECT_WEIGHT, MOST_WEIGHT, HEAD_WEIGHT = 5.0, 200.0, 0.1
#: Timesteps between which objects are decided.
DECIDING = (450, 850)
#: How far a window may be from the middle of its thing, in tokens.
SHIFT = 3.0
#: Names of the values that the loss returns beside itself.
NAMES = ("mse", "vb", "names")


def draw_timesteps(rng: np.random.Generator, count: int, share: float = 0.7) -> np.ndarray:
    """Draw timesteps (count,) int64: this share of them evenly where objects are decided, the others from all."""
    deciding = rng.random(count) < share
    return np.where(deciding, rng.integers(*DECIDING, count), rng.integers(0, 1000, count))


def timestep_weights(timesteps: np.ndarray, most: float = MOST_WEIGHT) -> np.ndarray:
    """Return the weights of the squared error of the noise at timesteps (N,): 1 / alpha_bar, limited to ``most``."""
    return np.minimum(1 / LINEAR.alphas_cumprod[timesteps], most).astype(np.float32)


def cell_weights(objects: np.ndarray, weight: float = OBJECT_WEIGHT) -> np.ndarray:
    """Return weights (N, 1, h, w) of mean 1 for the cells of ``objects`` (N, h, w), -1 where there is none.

    Cells of objects have ``weight`` times the weight of the others.
    """
    weights = np.where(objects >= 0, np.float32(weight), np.float32(1))[:, None]
    return weights / weights.mean((1, 2, 3), keepdims=True)


def token_names(objects: np.ndarray, patch: int = 2) -> np.ndarray:
    """Return what each patch of cells shows most of, (N, tokens) int32; the setting has the number after all objects.

    ``objects`` (N, h, w) holds numbers of objects, -1 for none. A patch of which half shows an object shows it.
    """
    n, height, width = objects.shape
    cells = objects.reshape(n, height // patch, patch, width // patch, patch).transpose(0, 1, 3, 2, 4)
    cells = np.sort(cells.reshape(n, -1, patch * patch).astype(np.int32), -1)
    name = cells[..., patch * patch // 2]  # the upper median: half of the cells are enough
    return np.where(name >= 0, name, len(OBJECTS))


def name_head(size: int, seed: int) -> Linear:
    """Return the head: tokens of ``size`` -> logits of all objects and of the setting."""
    head = Linear(size, len(OBJECTS) + 1)
    head.weight.set_data(ms.Tensor(normal(generator(seed, 15), tuple(head.weight.shape))))
    return head


def object_windows(objects: np.ndarray, side: int, rng: np.random.Generator, patch: int = 2) -> np.ndarray:
    """Return the corners (N, 2) in tokens of square windows of ``side`` tokens, each near one thing of its image.

    ``objects`` (N, h, w) is -1 where there is none.
    """
    height, width = (n // patch - side for n in objects.shape[1:])
    corners = np.empty((len(objects), 2), np.int64)
    for corner, shown in zip(corners, objects, strict=True):
        rows, columns = np.nonzero(shown == rng.choice(np.unique(shown[shown >= 0])))
        middle = [(n.min() + n.max() + 1) / (2 * patch) for n in (rows, columns)]
        corner[:] = np.round(np.array(middle) - side / 2 + rng.uniform(-SHIFT, SHIFT, 2))
    return corners.clip(0, (height, width))


def cut(grids: np.ndarray, corners: np.ndarray, side: int) -> np.ndarray:
    """Cut the window (side, side) at each of ``corners`` (N, 2) out of ``grids`` (N, ..., h, w)."""
    return np.stack([grid[..., y : y + side, x : x + side] for grid, (y, x) in zip(grids, corners, strict=True)])


def object_loss(net: PixArt, head: Linear, positions: ms.Tensor | None = None) -> Callable:
    """Return the loss function for ``Trainer``.

    ``loss(latents, noise, table, timesteps, embeddings, mask, weights, cells, names, positions) -> (loss, mse, vb,
    names)``: the first six are those of ``diffusion_loss``, then ``timestep_weights``, ``cell_weights`` and
    ``token_names``. A batch may carry the positions of its windows, (N, tokens, D).
    """
    own = positions
    middle, channels = net.config.depth // 2, net.config.in_channels

    def loss(latents, noise, table, timesteps, embeddings, mask, weights, cells, names, positions=None):
        x_t = add_noise(latents, noise, table)
        keys_values = net.caption_keys_values(embeddings)
        x, t, t0, height, width = net.embed(x_t, timesteps, own if positions is None else positions)
        for number, (block, (k, v)) in enumerate(zip(net.blocks, keys_values)):  # noqa: B905 - as in denoise
            if number == middle:
                tokens = x
            x = block(x, k, v, mask, t0, height, width)
        output = net.unpatchify(net.final_layer(x, t), height, width)
        mse, vb = loss_terms(output, latents, x_t, noise, table)
        error = noise - output[:, :channels]
        weighted = ((error * error * cells).mean((1, 2, 3)) * weights).mean()
        named, vb = mean_cross_entropy(head(tokens), names), vb.mean()
        return weighted + vb + HEAD_WEIGHT * named, mse.mean(), vb, named

    return loss
