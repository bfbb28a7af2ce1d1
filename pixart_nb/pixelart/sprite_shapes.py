"""The hand-drawn shapes of all objects as arrays of palette indices.

Letters of a map: ``.`` nothing, ``#`` outline, ``d`` ``m`` ``l`` ``w`` the dark, middle, light and
highlight shade of the named colour; every other letter is a fixed secondary colour of ``SECONDARY``.
"""

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.shapes_nature import NATURE
from pixart_nb.pixelart.shapes_things import THINGS
from pixart_nb.pixelart.shapes_unseen import UNSEEN

SHAPE_SIZE = 12

RAMP_LETTERS = "#dmlw"

SECONDARY: dict[str, tuple[int, int, int]] = {
    "k": (28, 24, 36),  # eyes, wheels, feelers
    "W": (248, 248, 240),  # spots, pearls, pages
    "b": (134, 86, 48),  # wood
    "B": (94, 58, 34),  # wood in shadow
    "y": (236, 194, 72),  # gold, glow
    "Y": (176, 128, 44),  # gold in shadow
    "s": (164, 172, 186),  # steel
    "S": (110, 118, 136),  # steel in shadow
    "g": (92, 158, 66),  # leaf
    "G": (54, 106, 48),  # leaf in shadow
    "c": (178, 224, 238),  # glass
    "r": (226, 84, 40),  # flame, ruby
    "p": (240, 220, 182),  # cream, skin, belly
    "P": (204, 174, 132),  # cream in shadow
}

LETTERS = "." + RAMP_LETTERS + "".join(SECONDARY)

# Symmetric shapes gain nothing from a mirror, and made things are kept one way round to stay easy to learn.
MIRRORED = frozenset({"bird", "cat", "dragon", "fish", "snail"})


def _indices(drawing: str) -> np.ndarray:
    """(12, 12) uint8 of positions in ``LETTERS``."""
    rows = drawing.split()
    wrong = [row for row in rows if len(row) != SHAPE_SIZE or set(row) - set(LETTERS)]
    if wrong or len(rows) != SHAPE_SIZE:
        raise PixArtNBError(
            f"a shape is {SHAPE_SIZE} rows of {SHAPE_SIZE} known letters, got {wrong or rows}"
        )
    indices = np.array([[LETTERS.index(letter) for letter in row] for row in rows], dtype=np.uint8)
    indices.flags.writeable = False
    return indices


SHAPES: dict[str, np.ndarray] = {name: _indices(text) for name, text in sorted((NATURE | THINGS).items())}
UNSEEN_SHAPES: dict[str, np.ndarray] = {name: _indices(text) for name, text in sorted(UNSEEN.items())}
