"""The richer drawn world: any size, seeded, positions that vary, captions that name everything."""

import numpy as np
import pytest

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.world.captions import short_world_caption, world_caption
from pixart_nb.pixelart.world.objects import OBJECTS
from pixart_nb.pixelart.world.scenes import COLOURS, RELATIONS, Thing, WorldScene, draw_cells
from pixart_nb.pixelart.world.settings import SETTINGS

NAMES = sorted(OBJECTS)


def scenes(count, seed=0, things=1):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        chosen = tuple(Thing(NAMES[rng.integers(len(NAMES))], COLOURS[rng.integers(10)]) for _ in range(things))
        relation = RELATIONS[rng.integers(4)] if things == 2 else ""
        yield WorldScene(chosen, list(SETTINGS)[rng.integers(8)], relation)


def test_there_are_enough_objects_colours_and_settings():
    assert len(OBJECTS) >= 24 and len(COLOURS) == 10 and len(SETTINGS) == 8


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 36), (64, 48)])
def test_the_same_seed_gives_the_same_bytes_at_every_size(height, width):
    for scene in scenes(4, things=2):
        one, other = (draw_cells(scene, np.random.default_rng(5), height, width) for _ in range(2))
        assert one.pixels.tobytes() == other.pixels.tobytes() and one.pixels.shape == (height, width, 3)
        assert one.placements == other.placements
        assert all(mask.sum() > 4 for mask in one.masks) and not (one.masks[0] & one.masks[1]).any()


def test_more_cells_show_the_same_picture():
    for k, scene in enumerate(scenes(12)):
        small = draw_cells(scene, np.random.default_rng(k), 16, 16).pixels.astype(float)
        large = draw_cells(scene, np.random.default_rng(k), 64, 64).pixels.reshape(16, 4, 16, 4, 3).mean((1, 3))
        other = draw_cells(scene, np.random.default_rng(k + 99), 16, 16).pixels.astype(float)
        assert np.square(large - small).mean() < np.square(other - small).mean()


@pytest.mark.parametrize("things", [1, 2])
def test_a_mean_mask_does_not_tell_where_the_object_is(things):
    masks = [
        m for k, s in enumerate(scenes(150, 1, things)) for m in draw_cells(s, np.random.default_rng(k), 24, 24).masks
    ]
    mean = np.mean(masks, axis=0)
    overlaps = [
        np.mean([(m & (mean > t)).sum() / (m | (mean > t)).sum() for m in masks]) for t in np.linspace(0.05, 0.5, 10)
    ]
    assert max(overlaps) <= 0.36  # the aim is 0.35, over many scenes


def test_relations_are_those_of_the_placements():
    for k, scene in enumerate(scenes(60, 2, 2)):
        first, second = draw_cells(scene, np.random.default_rng(k), 16, 16).placements
        assert {"left of": first.x < second.x - 0.2, "right of": first.x > second.x + 0.2,
                "above": first.y < second.y - 0.3, "in front of": first.y > second.y}[scene.relation]  # fmt: skip


def test_captions_name_everything():
    scene = WorldScene((Thing("cat", "orange"), Thing("boat", "blue")), "beach", "left of")
    assert short_world_caption(scene) == "an orange cat left of a blue boat on a beach"
    texts = {world_caption(scene, np.random.default_rng(k)) for k in range(200)}
    assert len(texts) > 60
    assert all("orange" in t and "blue" in t and "beach" in t and ("left" in t or "right" in t) for t in texts)


def test_scenes_that_cannot_be_are_refused():
    cat = Thing("cat", "red")
    for things, relation in (((cat,) * 3, ""), ((cat, cat), ""), ((cat,), "above"), ((), "")):
        with pytest.raises(PixArtNBError, match="one object, or two and a relation"):
            WorldScene(things, "beach", relation)
    with pytest.raises(PixArtNBError, match="expected 16 to 512"):
        draw_cells(WorldScene((cat,), "beach"), np.random.default_rng(0), 8, 8)
