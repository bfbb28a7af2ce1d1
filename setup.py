"""Puts ``data/`` and ``configs/`` into the installed package. Everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

#: Not all of data/, where users put data sets of their own.
BUNDLED = ("configs", "data/pixelart", "data/tiny-sigma*")


class BuildWithData(build_py):
    """Copy the folders that commands read by default. An editable install reads those of the repository."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "pixart_nb" / "_bundled"
        shutil.rmtree(target, ignore_errors=True)
        for pattern in BUNDLED:
            for folder in Path().glob(pattern):
                shutil.copytree(folder, target / folder)


setup(cmdclass={"build_py": BuildWithData})
