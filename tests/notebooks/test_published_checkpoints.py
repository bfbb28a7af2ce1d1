"""Notebooks run on a checkpoint of the published layout, and skip by name what needs the drawn world."""

import pytest
from notebook_contract import run_notebook
from published_layout import SMALL, published_parameters

SIDE = {"image_height": 128, "image_width": 128, "sample_size": 16, "sampling_steps": 2}
TRAINING = {"steps": 2, "batch_size": 2}
NOTEBOOKS = {
    "00_quickstart": {},
    "02_sampling": {"schedulers": ["dpm++", "ddim"], "seeds": 2, "sizes": [[128, 192]]},
    "05_finetune_pixelart": TRAINING
    | {"scene_count": 8, "drawings": 1, "test_count": 3, "judged": 2, "visualize_steps": 2, "ckpt_save_steps": 2},
    "06_sampling_4k": {"image_height": 256, "image_width": 256, "tile_size": 64},
    "07_weak_to_strong": TRAINING
    | {"images": 2, "compression_steps": 1, "largest_images": 1, "largest_steps": 1, "judged": 2},
    "08_lora": TRAINING | {"images": 3, "judged": 3},
    "10_control_and_editing": {
        "batch_size": 4,
        "copy_blocks_num": 1,
        "train_images": 3,
        "train_steps": 1,
        "train_batch_size": 2,
        "controlled": 2,
        "copies": 2,
        "strengths": [0.25, 0.5, 0.75, 1.0],
        "inpainted": 2,
    },
    "11_few_steps": {
        "batch_size": 4,
        "few_steps": [1, 2],
        "judged": 3,
        "lcm_steps": 1,
        "lcm_batch_size": 2,
        "lora_rank": 2,
        "dmd_steps": 1,
        "dmd_batch_size": 2,
    },
}


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_on_a_checkpoint_of_the_published_layout(project, tmp_path, name):
    values = published_parameters(project, tmp_path, SMALL, **SIDE | NOTEBOOKS[name])
    values["output_path"] = str(tmp_path / "out")
    notebook = project / "notebooks" / f"{name}.ipynb"
    executed = run_notebook(notebook, values, tmp_path / "executed.ipynb", project, compiled=False)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Skipped" in printed
    check_nothing_is_empty(outputs)
    if name == "10_control_and_editing":
        assert "Left out: strengths below 0.5, which leave none of 2 steps." in printed
        assert "Left out: strength 0.75, which takes 1 step, as strength 0.5 does." in printed
    if name in ("10_control_and_editing", "11_few_steps"):
        assert f"'model': '{values['checkpoint']}'" in "".join(shown_texts(outputs))


def shown_texts(outputs):
    return [output["data"].get("text/plain", "") for output in outputs if "data" in output]


def check_nothing_is_empty(outputs):
    """No result is a table without columns, or a mapping that is empty or has an empty one."""
    tables = [output["data"].get("text/html", "") for output in outputs if "data" in output]
    assert not [table for table in tables if "<thead><tr></tr></thead>" in table]
    assert not [text for text in shown_texts(outputs) if "{}" in text or text in ("[]", "()")]
