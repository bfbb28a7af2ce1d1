"""Operators of a step on Ascend: few, none on the old path inside the blocks, one read to the host."""

import pytest

from benchmarks.ascend_audit import (
    COMPRESSIONS,
    LIMITS,
    OTHER_CASES,
    count_other_steps,
    count_steps,
    operator_table,
    path_of,
    sections_of,
)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "compressions"), [(256, tuple(COMPRESSIONS)), (2048, ("no compression", "conv 4"))])
def test_a_denoising_step_keeps_to_its_number_of_operators(size, compressions):
    for step in count_steps((size,), compressions):
        assert step.count <= min(LIMITS.values()), step.name
        assert not step.old_path
        assert len(step.reads) == 1
        assert step.reads[0].startswith("guidance.py")
        assert step.block.operators["Dense"] in (7, 8)
        assert step.block.operators["FlashAttentionScore"] == 2
        assert not {"Gather", "Tile", "BiasAdd"} & set(step.block.operators)


@pytest.mark.slow
def test_perturbed_attention_and_a_controlnet_take_the_path_of_the_plain_step():
    perturbed, controlled = count_other_steps()
    assert perturbed.count <= 2 * 500
    assert len(perturbed.reads) == 2
    assert controlled.count <= min(LIMITS.values())
    assert len(controlled.reads) == 1
    assert controlled.copy.count - controlled.block.count == 2  # the projection, and its sum with the image
    assert not perturbed.old_path + controlled.old_path


@pytest.mark.slow
def test_every_operator_on_the_old_path_has_a_reason_to_stay():
    sections = sections_of(OTHER_CASES)
    assert set(sections) == {*OTHER_CASES, "end"}
    for name in OTHER_CASES:
        assert operator_table(name, sections[name])[1] == []
        assert sections[name].count > 50
    decoder, tiles = sections["VAE part=decoder"], sections["VAE part=decoder tile=64"]
    assert "FlashAttentionScore" not in sections["VAE part=decoder dtype=float16"].operators  # a head of 512
    assert tiles.count <= (9 + 1) * 1.5 * decoder.count  # nine tiles, and the windows of the statistics
    assert not {name for name in sections["denoise dtype=float32"].operators if name.startswith("FlashAttention")}
    assert all(len(sections[case].reads) == 1 for case in OTHER_CASES if case.startswith("T5"))
    for case in (case for case in OTHER_CASES if case.startswith("training")):
        values = 2 if "lcm" in case else 3  # of the loss; a fourth read is the norm of the gradients
        assert len(sections[case].reads) == values + 1
    adamw, came = (sections[f"update optimizer={name}"] for name in ("adamw", "came"))
    assert len(adamw.reads) == len(came.reads) == 1
    assert adamw.operators["AdamW"] == 435
    assert came.count - adamw.count < 10 * 435  # far fewer than the 54 for each tensor that CAME takes alone


def test_kernels_are_those_of_the_library():
    paths = {"Dense": "aclnn", "LayerNormExt": "aclnn", "LayerNorm": "old path", "Gather": "old path"}
    assert {name: path_of(name) for name in (*paths, "Reshape")} == paths | {"Reshape": "view"}
