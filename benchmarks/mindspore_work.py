"""Benchmarks of this kit on MindSpore. Each is a class that is built once and called for every repeat."""

from __future__ import annotations

import gc
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.shapes import Shapes
from pixart_nb.core.backend import device_name, dtype_from_name, kept_memory, ms
from pixart_nb.core.checkpoints.load import StreamedT5Encoder
from pixart_nb.core.fast import denoiser
from pixart_nb.core.fast.cpu_training import use_fast_blocks
from pixart_nb.core.fast.recompute import recompute_activations
from pixart_nb.core.io import save_tensors, write_json
from pixart_nb.core.models.low_precision import for_inference, use_blocks
from pixart_nb.core.models.t5 import T5Config, T5Encoder
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig
from pixart_nb.core.sampling.pipeline import PixArtSigmaPipeline


def versions() -> str:
    """Return versions and device in one line."""
    return f"pixart-nb {version('pixart-nb')}, mindspore {version('mindspore')}, {device_name()}"


def transformer_config(shapes: Shapes) -> PixArtConfig:
    """Return the transformer's configuration; with a ``ratio`` above 1 every block compresses keys and values."""
    compression = {"sampling": "conv", "scale_factor": shapes.ratio, "kv_compress_layer": [*range(shapes.depth)]}
    return PixArtConfig(
        hidden_size=shapes.hidden_size,
        num_heads=shapes.heads,
        depth=shapes.depth,
        caption_channels=shapes.caption_channels,
        input_size=shapes.size // 8,
        pe_interpolation=shapes.pe_interpolation,
        model_max_length=shapes.max_length,
        kv_compress_config=compression if shapes.ratio > 1 else None,
    )


def transformer(shapes: Shapes) -> PixArt:
    """Build the transformer with random weights."""
    net = for_inference(PixArt(transformer_config(shapes)), dtype_from_name(shapes.dtype))
    net.initialize(np.random.default_rng(0), zero_cross_attention=False)
    return net.set_train(False)


def text_config(shapes: Shapes) -> T5Config:
    """Return the configuration of T5."""
    return T5Config(
        vocab_size=shapes.vocabulary,
        d_model=shapes.caption_channels,
        d_kv=shapes.caption_channels // shapes.text_heads,
        d_ff=shapes.text_width,
        num_heads=shapes.text_heads,
        num_layers=shapes.text_layers,
    )


def text_encoder(shapes: Shapes) -> T5Encoder:
    """Build T5 with random weights."""
    net = for_inference(T5Encoder(text_config(shapes)), dtype_from_name(shapes.dtype))
    net.initialize(np.random.default_rng(0))
    use_blocks(net)
    return net.set_train(False)


def autoencoder_config(shapes: Shapes) -> VAEConfig:
    """Return the configuration of the autoencoder."""
    return VAEConfig(block_out_channels=shapes.vae_widths, norm_num_groups=min(32, shapes.vae_widths[0]))


def autoencoder(shapes: Shapes) -> AutoencoderKL:
    """Build the autoencoder with random weights."""
    net = AutoencoderKL(autoencoder_config(shapes))
    net.initialize(np.random.default_rng(0))
    return net.set_train(False)


def captions(shapes: Shapes, rng: np.random.Generator) -> dict:
    """Return random embeddings of a prompt of ``caption_tokens`` tokens and of an empty one."""
    embeds = [rng.standard_normal((1, n, shapes.caption_channels), np.float32) for n in (shapes.caption_tokens, 1)]
    return {
        "prompt_embeds": ms.Tensor(embeds[0]),
        "prompt_attention_mask": np.ones((1, shapes.caption_tokens), bool),
        "negative_prompt_embeds": ms.Tensor(embeds[1]),
        "negative_prompt_attention_mask": np.ones((1, 1), bool),
    }


class Denoise:
    """Denoising of one image with guidance: seconds of every step."""

    def __init__(self, shapes: Shapes):
        self.shapes, self.rng = shapes, np.random.default_rng(1)
        self.pipe = PixArtSigmaPipeline(None, None, None, transformer(shapes), "dpm++")
        self.captions = captions(shapes, self.rng)

    def __call__(self) -> dict:
        shapes, times = self.shapes, [time.perf_counter()]
        run = self.pipe.sample(
            **self.captions, height=shapes.size, width=shapes.size, num_inference_steps=shapes.steps, generator=self.rng
        )
        next(run)
        for self.last in run:
            times.append(time.perf_counter())
        return {"steps": np.diff(times).tolist()}


class Encode:
    """T5 for a prompt and the empty negative prompt."""

    def __init__(self, shapes: Shapes, net: T5Encoder | StreamedT5Encoder | None = None):
        self.net = net or text_encoder(shapes)
        self.ids = np.arange(2, 2 + shapes.caption_tokens)[None] % shapes.vocabulary

    def __call__(self) -> dict:
        self.embeds = [self.net(ids, np.ones(ids.shape, bool)).asnumpy() for ids in (self.ids, self.ids[:, :1])]
        return {}


class Decode:
    """Decoding of one image."""

    def __init__(self, shapes: Shapes, tiling: bool = False):
        self.net, side = autoencoder(shapes), shapes.size // 8
        if tiling:
            self.net.enable_tiling()
        self.latents = np.random.default_rng(1).standard_normal((1, 4, side, side), np.float32)

    def __call__(self) -> dict:
        self.image = self.net.decode(ms.Tensor(self.latents))[0].asnumpy()
        return {}


class DecodeTiled(Decode):
    """Decoding of one image by tiles."""

    def __init__(self, shapes: Shapes):
        super().__init__(shapes, tiling=True)


class TextToImage:
    """Whole text-to-image run: encode, denoise, decode."""

    def __init__(self, shapes: Shapes):
        self.encode, self.denoise, self.decode = Encode(shapes), Denoise(shapes), Decode(shapes)

    def __call__(self) -> dict:
        self.encode()
        embeds, negative = self.encode.embeds
        self.denoise.captions |= {"prompt_embeds": ms.Tensor(embeds), "negative_prompt_embeds": ms.Tensor(negative)}
        self.denoise()
        self.decode.latents = self.denoise.last.latents
        return self.decode()


class Train:
    """Training step: loss, gradients, clipping, AdamW."""

    def __init__(self, shapes: Shapes):
        from pixart_nb.core.training.loss import coefficients, diffusion_loss
        from pixart_nb.core.training.optimizers import AdamW

        net, side, rng = transformer(shapes).set_train(True), shapes.size // 8, np.random.default_rng(1)
        use_fast_blocks(net, True)
        recompute_activations(net.blocks if shapes.recompute else ())
        count, timesteps = shapes.batch_size, np.full(shapes.batch_size, 500)
        arrays = [rng.standard_normal((count, 4, side, side), np.float32) for _ in range(2)]
        arrays += [coefficients(timesteps), timesteps.astype(np.float32)]
        arrays += [rng.standard_normal((count, shapes.caption_tokens, shapes.caption_channels), np.float32)]
        arrays += [np.ones((count, shapes.caption_tokens), bool), np.ones(count, np.float32)]
        self.batch = [*map(ms.Tensor, arrays), net.positions(side, side)]
        # y_embedding takes part only where captions are dropped
        self.parameters = {n: p for n, p in net.parameters_and_names() if n != "y_embedder.y_embedding"}
        self.optimizer = AdamW(self.parameters)
        weights = list(self.parameters.values())
        self.gradient = ms.value_and_grad(diffusion_loss(net), None, weights, has_aux=True)
        self.memory = ExitStack()
        self.memory.enter_context(kept_memory())  # as in the trainer

    def __call__(self) -> dict:
        from pixart_nb.core.training.optimizers import clip_by_norm, global_norm

        (loss, *_), gradients = self.gradient(*self.batch)
        gradients = clip_by_norm(gradients, global_norm(gradients), 1.0)
        self.optimizer.update(dict(zip(self.parameters, gradients, strict=True)), 1e-5)
        return {"loss": float(loss.asnumpy())}


class Block:
    """One block over all tokens of one image, without guidance."""

    def __init__(self, shapes: Shapes):
        self.net = transformer(replace(shapes, depth=1))
        rng = np.random.default_rng(1)
        caption = ms.Tensor(rng.standard_normal((1, shapes.caption_tokens, shapes.caption_channels), np.float32))
        self.denoiser = denoiser(self.net, caption, None)
        side = shapes.size // 8
        self.latents = ms.Tensor(rng.standard_normal((1, 4, side, side), np.float32))

    def __call__(self) -> dict:
        self.denoiser(self.latents, 500.0).asnumpy()
        return {}


class Pipeline:
    """Text-to-image run in little memory: T5 streamed and freed, transformer freed, decoding by tiles."""

    def __init__(self, shapes: Shapes):
        self.shapes, self.folder = shapes, tempfile.TemporaryDirectory()
        write_text_encoder(shapes, Path(self.folder.name))

    def __call__(self) -> dict:
        shapes, peaks = self.shapes, {}
        encode = Encode(shapes, StreamedT5Encoder(Path(self.folder.name), ms.float32))
        encode()
        (embeds, negative), peaks["encode"] = encode.embeds, peak()
        del encode
        gc.collect()
        denoise = Denoise(shapes)
        denoise.captions |= {"prompt_embeds": ms.Tensor(embeds), "negative_prompt_embeds": ms.Tensor(negative)}
        denoise()
        latents, peaks["denoise"] = denoise.last.latents, peak()
        del denoise
        gc.collect()
        decode = DecodeTiled(shapes)
        decode.latents = latents
        decode()
        return {"peaks": peaks | {"decode": peak()}}


def peak() -> float:
    """Return the largest resident size of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write_text_encoder(shapes: Shapes, folder: Path) -> None:
    """Write T5 as published: float16, one shard per layer. All layers have the same random weights."""
    net = text_encoder(replace(shapes, text_layers=1))
    tensors = {name: p.asnumpy().astype(np.float16) for name, p in net.parameters_and_names()}
    del net
    layer = {name: value for name, value in tensors.items() if ".block.0." in name}
    shards = {"first.safetensors": {name: value for name, value in tensors.items() if name not in layer}}
    for number in range(shapes.text_layers):
        renamed = {name.replace(".block.0.", f".block.{number}."): value for name, value in layer.items()}
        if number:
            renamed = {name: value for name, value in renamed.items() if "relative_attention_bias" not in name}
        shards[f"layer-{number}.safetensors"] = renamed
    for name, values in shards.items():
        save_tensors(folder / name, values)
    weight_map = {key: name for name, values in shards.items() for key in values}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(folder / "config.json", vars(text_config(shapes)))


WORK: dict[str, Callable] = {
    "denoise": Denoise,
    "encode": Encode,
    "decode": Decode,
    "decode-tiled": DecodeTiled,
    "image": TextToImage,
    "train": Train,
    "block": Block,
    "pipeline": Pipeline,
}
