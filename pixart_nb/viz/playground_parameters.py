"""Parameters of the playground, and their forms: arguments of the pipeline, keys of a configuration, one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pixart_nb.config import GUIDANCE_SCALE, SAMPLING_METHOD, SAMPLING_STEPS, check_config
from pixart_nb.config.keys import CONTROL_KEYS, split_weight
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.images import read_parameters
from pixart_nb.core.sampling.samplers import image_generators, steps_taken

#: Entries that a history keeps.
HISTORY = 24
#: Parameters that can be swept, and the type of their values.
SWEPT = {"guidance": float, "steps": int, "seed": int, "scheduler": str}
#: Name of the LCM-LoRA that draws while one types, and the parameters that belong to it.
LCM_LORA = "lcm"
FEW_STEPS = {"scheduler": "lcm", "steps": 4, "guidance": 1.0, "negative_prompt": "", "count": 1}
#: Keys of the weights that a pipeline was made of.
_OF_PIPELINE = ("model", "checkpoint", "vae_root", "text_encoder_root")
#: Parameters of a ControlNet, which have the names of their keys in a configuration.
CONTROL = ("controlnet", *CONTROL_KEYS)


@dataclass(frozen=True)
class Parameters:
    """Parameters of a set of images of one prompt; sizes in pixels.

    ``image`` and ``mask`` are the bytes of files, empty for none: image-to-image takes the last ``strength`` of the
    steps from the image, and with a mask its white part alone changes. ``adapters``: (name, weight) of each LoRA.
    ``control_image`` is the condition of the ControlNet in the file or folder ``controlnet``, the bytes of a file.
    """

    prompt: str
    height: int
    width: int
    negative_prompt: str = ""
    steps: int = SAMPLING_STEPS
    guidance: float = GUIDANCE_SCALE
    scheduler: str = SAMPLING_METHOD
    seed: int = 0
    count: int = 1
    image: bytes = field(default=b"", repr=False)
    mask: bytes = field(default=b"", repr=False)
    strength: float = 0.8
    adapters: tuple[tuple[str, float], ...] = ()
    control_image: bytes = field(default=b"", repr=False)
    controlnet: str = ""
    controlnet_conditioning_scale: float = 1.0
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0
    guess_mode: bool = False

    def check(self) -> None:
        """Refuse parameters that the pipeline would not refuse."""
        if not self.prompt.strip():
            raise PixArtNBError("the prompt is empty; write what to draw, for example 'a red mushroom on grass'")
        if self.count < 1:
            raise PixArtNBError(f"the number of images is {self.count}; expected at least 1")
        if self.seed < 0:
            raise PixArtNBError(f"the seed is {self.seed}; expected 0 or more")
        if self.mask and not self.image:
            raise PixArtNBError("a mask was given without an image to paint in; give both")
        if self.controlnet.strip() and not self.control_image:
            raise PixArtNBError("a ControlNet was given without its condition image; choose one, or empty the field")
        if self.control_image and not self.controlnet.strip():
            raise PixArtNBError("a condition image was given without a ControlNet; write its path, or remove the image")
        if self.control_image and self.image:
            raise PixArtNBError("a ControlNet does not go with an image to start from; remove one of the two images")

    @property
    def taken(self) -> int:
        """Number of steps that a run takes."""
        return steps_taken(self.steps, self.strength) if self.image else self.steps

    @property
    def in_few_steps(self) -> Parameters:
        """One image of the same prompt by the LCM-LoRA, in four steps without guidance."""
        others = tuple(pair for pair in self.adapters if pair[0] != LCM_LORA)
        return replace(self, **FEW_STEPS, adapters=((LCM_LORA, 1.0), *others))

    def call(self) -> dict[str, Any]:
        """Return the arguments of ``pipe.sample``. Image k of a seed does not depend on the images beside it."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "num_images_per_prompt": self.count,
            "height": self.height,
            "width": self.width,
            "generator": image_generators(self.seed, range(self.count)),
        }

    @classmethod
    def read(cls, path: str | Path, adapters: Mapping[str, str] | None = None) -> Parameters:
        """Return the parameters of a PNG that the playground or ``pixart-nb sample`` wrote.

        Only what shapes the image is taken; ``adapters``: names of the loaded LoRAs by their files. A file without
        parameters, or with values that do not fit, is refused.
        """
        written = read_parameters(path)
        keys = cls("", 0, 0).configuration()
        config = check_config({"model": "any"} | {key: written[key] for key in keys if key in written})
        return cls(
            config.prompt[0] if config.prompt else "",
            config.image_height,
            config.image_width,
            config.negative_prompt if isinstance(config.negative_prompt, str) else " ".join(config.negative_prompt),
            config.sampling_steps,
            config.guidance_scale,
            config.sampling_method or SAMPLING_METHOD,
            config.seed,
            config.first_image + 1,
            adapters=tuple((adapters[file], weight) for file, weight in _loras(written) if file in (adapters or {})),
        )

    def not_taken(
        self, path: str | Path, adapters: Mapping[str, str], others: Mapping[str, Any], pipe: Any
    ) -> list[str]:
        """Return what else shaped the PNG at ``path``, which ``read`` does not take; ``others`` belong to ``pipe``."""
        written = read_parameters(path)
        elsewhere = ["image", "mask", "control_image", "pag_scale", *(key for key in _OF_PIPELINE if key in others)]
        differing = [key for key in elsewhere if written.get(key) and written[key] != others.get(key)]
        missing = [f"{key} {written[key]}" for key in differing]
        missing += [f"LoRA {file}:{weight:g}" for file, weight in _loras(written) if file not in adapters]
        size = (self.height, self.width)
        if written.get("use_resolution_binning") and pipe.binned_size(*size) != size:
            missing.append("use_resolution_binning")
        return missing

    def swept(self, name: str, values: str) -> list[Parameters]:
        """Return copies with each of the values, separated by commas, of one of ``SWEPT``."""
        if name not in SWEPT:
            raise PixArtNBError(f"{name!r} cannot be swept; expected one of {', '.join(SWEPT)}")
        texts = [text.strip() for text in values.split(",") if text.strip()]
        try:
            copies = [replace(self, **{name: SWEPT[name](text)}) for text in texts]
        except ValueError:
            raise PixArtNBError(f"the values of {name} are {values!r}; expected numbers, such as 2, 4, 6") from None
        if not 1 <= len(copies) <= HISTORY:
            raise PixArtNBError(f"{len(copies)} values of {name} were given; expected 1 to {HISTORY}, such as 2, 4, 6")
        return copies

    def configuration(self, number: int = 0) -> dict[str, Any]:
        """Return the configuration that repeats image ``number``, with the keys of configuration files."""
        return {
            "prompt": [self.prompt],
            "negative_prompt": self.negative_prompt,
            "image_height": self.height,
            "image_width": self.width,
            "use_resolution_binning": False,
            "sampling_method": self.scheduler,
            "sampling_steps": self.steps,
            "guidance_scale": self.guidance,
            "seed": self.seed,
            "first_image": number,
        }

    @property
    def summary(self) -> str:
        """Parameters in one line.

        >>> Parameters("a red cup", 64, 96, seed=3, count=2).summary
        'a red cup · 96 x 64 · dpm++, 20 steps · guidance 4.5 · seed 3, 2 images'
        """
        without = f" · without {self.negative_prompt}" if self.negative_prompt else ""
        image = f" · {'inside a mask' if self.mask else 'from an image'}, strength {self.strength:g}" * bool(self.image)
        adapters = "".join(f" · {name} {weight:g}" for name, weight in self.adapters)
        images = f", {self.count} images" if self.count > 1 else ""
        share = f", from {self.control_guidance_start:g} to {self.control_guidance_end:g} of the steps"
        share = share if (self.control_guidance_start, self.control_guidance_end) != (0, 1) else ""
        guess = ", guess mode" if self.guess_mode else ""
        control = f" · control {self.controlnet_conditioning_scale:g}{guess}{share}" if self.control_image else ""
        return (
            f"{self.prompt}{without} · {self.width} x {self.height} · {self.scheduler}, {self.steps} steps · "
            f"guidance {self.guidance:g} · seed {self.seed}{images}{image}{control}{adapters}"
        )


def _loras(written: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return files and weights of the LoRAs of a saved image."""
    return [split_weight(text) for text in written.get("lora") or ()]
