"""Operators of a step on Ascend: few, none on the old path inside the blocks, one read to the host."""

import pytest

from benchmarks.ascend_audit import COMPRESSIONS, LIMITS, count_steps, operator_table, path_of, sections_of


@pytest.mark.slow
@pytest.mark.parametrize(("size", "compressions"), [(256, tuple(COMPRESSIONS)), (2048, ("no compression", "conv 4"))])
def test_a_denoising_step_keeps_to_its_number_of_operators(size, compressions):
    for step in count_steps((size,), compressions):
        assert step.count <= min(LIMITS.values()), step.compression
        assert not step.block.old_path() + step.rest.old_path()
        assert len(step.reads) == 1
        assert step.reads[0].startswith("guidance.py")
        assert step.block.operators["Dense"] in (7, 8)
        assert step.block.operators["FlashAttentionScore"] == 2
        assert not {"Gather", "Tile", "BiasAdd"} & set(step.block.operators)


@pytest.mark.slow
def test_every_operator_on_the_old_path_has_a_reason_to_stay():
    sections = sections_of(["text", "vae", "train"])
    assert len(sections) > 5
    for name, section in sections.items():
        assert operator_table(name, section)[1] == []
        assert name == "end" or section.count > 10


def test_kernels_are_those_of_the_library():
    paths = {"Dense": "aclnn", "LayerNormExt": "aclnn", "LayerNorm": "old path", "Gather": "old path"}
    assert {name: path_of(name) for name in (*paths, "Reshape")} == paths | {"Reshape": "view"}
