"""The same benchmarks in diffusers on PyTorch, which the optional extra ``reference`` installs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from importlib.metadata import version

import diffusers
import numpy as np
import torch
import transformers

from benchmarks.shapes import Shapes


def versions() -> str:
    """Return versions and threads in one line."""
    return f"diffusers {version('diffusers')}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def dtype_of(shapes: Shapes) -> torch.dtype:
    """Return the dtype of transformer and T5."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[shapes.dtype]


def transformer(shapes: Shapes) -> diffusers.PixArtTransformer2DModel:
    """Build the transformer with random weights."""
    net = diffusers.PixArtTransformer2DModel(
        num_attention_heads=shapes.heads,
        attention_head_dim=shapes.hidden_size // shapes.heads,
        cross_attention_dim=shapes.hidden_size,
        num_layers=shapes.depth,
        sample_size=shapes.size // 8,
        caption_channels=shapes.caption_channels,
        interpolation_scale=shapes.pe_interpolation,
        use_additional_conditions=False,
    )
    return compiled(net.to(dtype_of(shapes)).eval(), net.transformer_blocks, shapes)


def compiled(net: torch.nn.Module, parts: Iterable[torch.nn.Module], shapes: Shapes) -> torch.nn.Module:
    """Compile the ``parts`` of a network if ``shapes.compiled``: repeated parts one by one, as diffusers advises."""
    for part in parts if shapes.compiled else ():
        part.compile()
    return net


def text_encoder(shapes: Shapes) -> transformers.T5EncoderModel:
    """Build T5 with random weights."""
    config = transformers.T5Config(
        vocab_size=shapes.vocabulary,
        d_model=shapes.caption_channels,
        d_kv=shapes.caption_channels // shapes.text_heads,
        d_ff=shapes.text_width,
        num_layers=shapes.text_layers,
        num_heads=shapes.text_heads,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    net = transformers.T5EncoderModel(config).to(dtype_of(shapes)).eval()
    return compiled(net, net.encoder.block, shapes)


def autoencoder(shapes: Shapes) -> diffusers.AutoencoderKL:
    """Build the autoencoder with random weights."""
    widths = tuple(shapes.vae_widths)
    net = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        norm_num_groups=min(32, widths[0]),
        scaling_factor=0.13025,
    )
    return compiled(net.eval(), [net.decoder], shapes)


def padded_mask(shapes: Shapes, tokens: int) -> torch.Tensor:
    """Return the mask of a prompt that is padded to the model's length, (1, max_length)."""
    return (torch.arange(shapes.max_length)[None] < tokens).long()


def captions(shapes: Shapes) -> dict:
    """Return random embeddings, padded as the pipeline pads them."""
    wide = (1, shapes.max_length, shapes.caption_channels)
    return {
        "prompt_embeds": torch.randn(wide, dtype=dtype_of(shapes)),
        "prompt_attention_mask": padded_mask(shapes, shapes.caption_tokens),
        "negative_prompt_embeds": torch.randn(wide, dtype=dtype_of(shapes)),
        "negative_prompt_attention_mask": padded_mask(shapes, 1),
    }


class Denoise:
    """Denoising of one image with guidance: seconds of every step."""

    def __init__(self, shapes: Shapes):
        self.shapes, self.captions = shapes, captions(shapes)
        scheduler = diffusers.DPMSolverMultistepScheduler(beta_end=0.02, beta_schedule="linear")
        self.pipe = diffusers.PixArtSigmaPipeline(None, None, None, transformer(shapes), scheduler)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self) -> dict:
        shapes, times = self.shapes, [time.perf_counter()]
        self.last = self.pipe(
            prompt=None,
            negative_prompt=None,
            **self.captions,
            height=shapes.size,
            width=shapes.size,
            num_inference_steps=shapes.steps,
            use_resolution_binning=False,
            output_type="latent",
            callback=lambda *_: times.append(time.perf_counter()),
            callback_steps=1,
        ).images
        return {"steps": np.diff(times).tolist()}


class Encode:
    """T5 for a prompt and the empty negative prompt, padded unless ``shapes.trimmed``."""

    def __init__(self, shapes: Shapes):
        self.net = text_encoder(shapes)
        ids = torch.arange(2, 2 + shapes.max_length)[None] % shapes.vocabulary
        masks = {tokens: padded_mask(shapes, tokens) for tokens in (shapes.caption_tokens, 1)}
        lengths = {tokens: tokens if shapes.trimmed else shapes.max_length for tokens in masks}
        self.texts = [(ids[:, : lengths[tokens]], mask[:, : lengths[tokens]]) for tokens, mask in masks.items()]

    @torch.no_grad()
    def __call__(self) -> dict:
        self.embeds = [self.net(ids, attention_mask=mask)[0] for ids, mask in self.texts]
        return {}


class Decode:
    """Decoding of one image."""

    def __init__(self, shapes: Shapes):
        self.net = autoencoder(shapes)
        self.latents = torch.randn(1, 4, shapes.size // 8, shapes.size // 8)

    @torch.no_grad()
    def __call__(self) -> dict:
        self.image = self.net.decode(self.latents).sample
        return {}


class TextToImage:
    """Whole text-to-image run: encode, denoise, decode."""

    def __init__(self, shapes: Shapes):
        self.encode, self.denoise, self.decode = Encode(shapes), Denoise(shapes), Decode(shapes)

    def __call__(self) -> dict:
        self.encode()
        embeds, negative = self.encode.embeds
        self.denoise.captions |= {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
        self.denoise()
        self.decode.latents = self.denoise.last
        return self.decode()


class Train:
    """Training step, with captions of no padding: loss, gradients, clipping, AdamW."""

    def __init__(self, shapes: Shapes):
        self.net, side = transformer(shapes).train(), shapes.size // 8
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-5)
        tokens = shapes.batch_size, shapes.caption_tokens
        self.caption = {
            "encoder_hidden_states": torch.randn(*tokens, shapes.caption_channels),
            "encoder_attention_mask": torch.ones(tokens),
        }
        self.x_t, self.noise = (torch.randn(shapes.batch_size, 4, side, side) for _ in range(2))

    def __call__(self) -> dict:
        sizes = {"resolution": None, "aspect_ratio": None}
        out = self.net(
            self.x_t,
            timestep=torch.full((len(self.x_t),), 500),
            added_cond_kwargs=sizes,
            **self.caption,
            return_dict=False,
        )[0]
        noise, variance = out.chunk(2, 1)
        loss = ((noise - self.noise) ** 2).mean() + (variance**2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": float(loss.detach())}


WORK: dict[str, Callable] = {
    "denoise": Denoise,
    "encode": Encode,
    "decode": Decode,
    "image": TextToImage,
    "train": Train,
}
