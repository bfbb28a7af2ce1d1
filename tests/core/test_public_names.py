"""Public names: imported on first use, listed for tab completion and ``help``."""

import pydoc
import subprocess
import sys

import pytest

import pixart_nb
from pixart_nb import core


@pytest.mark.parametrize("package", [pixart_nb, core], ids=lambda package: package.__name__)
def test_every_public_name_is_listed_and_can_be_imported(package):
    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_help_shows_tracing_training_conversion_figures_and_widgets():
    text = pydoc.plain(pydoc.render_doc(pixart_nb))
    for name in ("PixArtSigmaPipeline", "trace(", "class Training", "convert(", "image_grid(", "AttentionExplorer"):
        assert name in text


def test_the_package_is_imported_without_its_dependencies():
    code = "import sys, pixart_nb; dir(pixart_nb); print({'mindspore', 'matplotlib'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "set()", run.stderr
