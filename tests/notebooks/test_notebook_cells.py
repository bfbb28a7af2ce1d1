"""Cells of notebooks with unusual parameters: they say what they leave out, and claim only what the numbers show."""

import time
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest

SMALL_IMAGES = np.random.default_rng(0).random((6, 2, 8, 8, 3))


@pytest.fixture
def run_cell(project, capsys):
    """Run one cell: notebook, id of the cell, values of the names that it uses -> (names after it, printed text)."""

    def run(name, cell_id, **values):
        notebook = nbformat.read(project / "notebooks" / f"{name}.ipynb", as_version=4)
        source = next(cell.source for cell in notebook.cells if cell.id == cell_id)
        namespace = {"np": np, "time": time, "seconds": {}} | values
        exec(compile(source, f"{name}, cell {cell_id}", "exec"), namespace)
        return namespace, capsys.readouterr().out

    return run


def images_of(schedulers, counts):
    """Images of each scheduler and number of steps, which come closer with more steps."""
    return {(name, n): SMALL_IMAGES[k] / n for k, name in enumerate(schedulers) for n in counts}


@pytest.mark.parametrize("schedulers", [["euler"], ["iddpm", "euler", "euler-a"], ["iddpm"], []])
def test_schedulers_are_not_compared_without_two_of_the_same_equation(run_cell, schedulers):
    values = {"schedulers": schedulers, "step_counts": [1, 2], "by_scheduler": images_of(schedulers, [1, 2])}
    names, printed = run_cell("02_sampling", "code-18", **values)
    given = "euler" if "euler" in schedulers else "none"
    assert printed == f"Skipped: a comparison needs two schedulers of the same equation; given: {given}.\n"
    assert names["disagreement"] == {}


def test_heun_follows_the_same_equation_as_euler(run_cell):
    schedulers = ["euler", "heun", "iddpm"]
    values = {"schedulers": schedulers, "step_counts": [1, 2], "by_scheduler": images_of(schedulers, [1, 2])}
    names, printed = run_cell("02_sampling", "code-18", **values)
    assert names["followers"] == ["euler", "heun"] and printed == ""
    assert names["disagreement"][1] > names["disagreement"][2] > 0


@pytest.mark.parametrize(("seeds", "measured"), [(1, False), (2, True)])
def test_variety_needs_two_images(run_cell, seeds, measured):
    scales = [1.0, 2.0]
    values = {"seeds": seeds, "prompts": ["a cup"], "drawn_world": False, "guidance_scales": scales}
    values |= {"by_guidance": dict.fromkeys(scales, SMALL_IMAGES[0, :seeds])}
    names, printed = run_cell("02_sampling", "code-22", **values, agreement=lambda *_: {})
    assert printed == ("" if measured else "Variety needs two images or more: set seeds to at least 2.\n")
    assert [list(row) for row in names["by_scale"].values()] == [["variety"] if measured else []] * 2


@pytest.mark.parametrize("ratios", [[2, 4], [4, 2], [4, 2, 3]])
def test_ratios_are_compared_from_the_smallest(run_cell, ratios):
    """The choice named deep has the first ratio; a higher ratio loses more here."""
    rises = {"shallow": 50.0, "middle": 40.0, "uniform": 30.0, "mean": 20.0, "deep": 2.0 * ratios[0]}
    rises |= {f"ratio {r}": 2.0 * r for r in ratios[1:]}
    above = {name: np.array([value, value + 1e-3]) for name, value in rises.items()}
    means = {name: float(values.mean()) for name, values in above.items()}
    values = {"ratios": ratios, "above": above, "means": means, "factor": 1.0, "seeds": 2}
    _, printed = run_cell("04_token_compression", "claims", **values, compared_steps=1, compared_batch=1, Table=list_of)
    of_ratios = [line for line in printed.splitlines() if line.startswith("ratio")]
    assert [line.split(". ")[0] for line in of_ratios] == [
        f"ratio 2 loses less than ratio {r}: holds" for r in sorted(ratios)[1:]
    ]


def list_of(rows, caption, columns=None):
    return list(rows)


@pytest.mark.parametrize(
    ("sizes", "printed"),
    [
        ([], "Skipped: the times of the operators need at least one size in timed_sizes.\n"),
        ([512, 256], "Slower than without compression: conv 2\n"),
    ],
)
def test_the_operators_are_timed_at_the_largest_size_if_there_is_one(run_cell, sizes, printed):
    seconds = {"conv": 3.0, "mean": 1.0}
    values = {"timed_sizes": sizes, "timed": {(size, 1): 2.0 for size in sizes}, "ratios": [2], "operators": [*seconds]}
    values |= {"measure_self_attention": lambda height, width, ratio, operator: seconds[operator], "Table": list_of}
    from pixart_nb.core import PixArtConfig

    names, shown = run_cell("04_token_compression", "7baf63c2", **values, PixArtConfig=PixArtConfig)
    assert shown == printed and names["largest"] == max(sizes, default=0)


def test_learned_compression_is_skipped_by_name_without_updates(run_cell):
    names, printed = run_cell("06_sampling_4k", "compress-run", drawn_world=True, adaptation_steps=0)
    assert printed.startswith('Skipped: "Learned compression"') and printed.endswith("adaptation_steps above 0.\n")
    assert names["report"]["before"] == names["report"]["after"] == []


@pytest.mark.parametrize(("side", "printed"), [(256, "No warning.\n"), (2048, "The checkpoint was trained at 256x256")])
def test_the_planner_says_that_it_has_no_warning(run_cell, side, printed):
    from pixart_nb.core import PixArtConfig

    networks = SimpleNamespace(transformer=PixArtConfig(input_size=32, pe_interpolation=0.5))
    run = SimpleNamespace(height=side, width=side)
    assert run_cell("06_sampling_4k", "e096121b", notes=[], networks=networks, run=run)[1].startswith(printed)
