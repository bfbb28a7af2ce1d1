"""The examples of mindone's and diffusers' documentation run: only the import and the model are changed."""

import contextlib
import types

import numpy as np
import pytest
from PIL import Image

MINDONE = """
import mindspore as ms
from mindone.diffusers.pipelines import PixArtSigmaPipeline

pipe = PixArtSigmaPipeline.from_pretrained("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", mindspore_dtype=ms.float16)
prompt = "cute cat"
image = pipe(prompt)[0][0]
image.save("cat.png")
"""
#: Inference with under 8GB GPU VRAM.
DIFFUSERS = """
from transformers import T5EncoderModel
from diffusers import PixArtAlphaPipeline
import torch

text_encoder = T5EncoderModel.from_pretrained(
    "PixArt-alpha/PixArt-XL-2-1024-MS",
    subfolder="text_encoder",
    load_in_8bit=True,
    device_map="auto",
)
pipe = PixArtAlphaPipeline.from_pretrained(
    "PixArt-alpha/PixArt-XL-2-1024-MS",
    text_encoder=text_encoder,
    transformer=None,
    device_map="auto"
)

with torch.no_grad():
    prompt = "cute cat"
    prompt_embeds, prompt_attention_mask, negative_embeds, negative_prompt_attention_mask = pipe.encode_prompt(prompt)

import gc

def flush():
    gc.collect()
    torch.cuda.empty_cache()

del text_encoder
del pipe
flush()

pipe = PixArtAlphaPipeline.from_pretrained(
    "PixArt-alpha/PixArt-XL-2-1024-MS",
    text_encoder=None,
    torch_dtype=torch.float16,
).to("cuda")

latents = pipe(
    negative_prompt=None,
    prompt_embeds=prompt_embeds,
    negative_prompt_embeds=negative_embeds,
    prompt_attention_mask=prompt_attention_mask,
    negative_prompt_attention_mask=negative_prompt_attention_mask,
    num_images_per_prompt=1,
    output_type="latent",
).images

del pipe.transformer
flush()

with torch.no_grad():
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
image = pipe.image_processor.postprocess(image, output_type="pil")[0]
image.save("cat.png")
"""
IMPORTS = {
    "from mindone.diffusers.pipelines import": "from pixart_nb import",
    "from diffusers import": "from pixart_nb import",
    "from transformers import": "from pixart_nb import",
    "import torch\n": "",
    '"PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"': '"MODEL"',
    '"PixArt-alpha/PixArt-XL-2-1024-MS"': '"MODEL"',
}


#: The names of PyTorch that the example uses.
TORCH = types.SimpleNamespace(
    no_grad=contextlib.nullcontext,
    float16=type("dtype", (), {"__str__": lambda self: "torch.float16"})(),
    cuda=types.SimpleNamespace(empty_cache=lambda: None),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the tokenizer", "ignore:from_pretrained", "ignore:to\\(")
@pytest.mark.parametrize(
    "example", [pytest.param(MINDONE, id="mindone"), pytest.param(DIFFUSERS, id="diffusers, under 8 GB")]
)
def test_an_example_runs_with_another_import(example, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for theirs, ours in IMPORTS.items():
        example = example.replace(theirs, ours.replace("MODEL", str(project / "data/tiny-sigma")))
    exec(compile(example, "example", "exec"), {"torch": TORCH})
    image = np.asarray(Image.open("cat.png"))
    assert image.shape == (256, 256, 3)
    assert image.std() > 10
