"""A run in stages of a tiny pipeline, for tests that kill it: ``python staged_run.py FOLDER SCHEDULER``.

Prints a line after every part, so that a test can choose when to kill.
"""

import sys
from pathlib import Path

from reference_data import diffusers

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core.sampling.stages import StagedImage, run_stages

SOURCE = diffusers("sigma")[0]
COMPONENTS = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae")


def load(names, scheduler="dpm++"):
    """Only these components of the reference's pipeline."""
    pipe = PixArtSigmaPipeline.from_pretrained(SOURCE, **{name: None for name in COMPONENTS if name not in names})
    if "scheduler" in names:
        pipe.scheduler = scheduler
    return pipe


def picture(folder, **changes):
    """A picture of three rows of tiles and six steps."""
    known = dict(prompt="a red mushroom on grass", drawn=(160, 96), size=(160, 96), steps=6, tile=64)
    return StagedImage(Path(folder), **known | changes)


if __name__ == "__main__":
    drawing, solver = picture(sys.argv[1], models={"scheduler": sys.argv[2]}), sys.argv[2]
    for part in run_stages([drawing], lambda names: load(names, solver)):
        print(part.stage, part.done, flush=True)
