"""The PixArt diffusion transformer: alpha and sigma, single-size (``PixArt``) and multi-aspect (``PixArtMS``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields

import numpy as np
from mindspore import mint, nn

from pixart_nb.core.backend import as_array, ms
from pixart_nb.core.errors import PixArtNBError, bounded, check_fields
from pixart_nb.core.models.attention import CrossAttention, SelfAttention, check_mask
from pixart_nb.core.models.embeddings import CaptionEmbedder, FrequencyMLP, PatchEmbed, sincos_positions
from pixart_nb.core.models.kv_compression import check_compression
from pixart_nb.core.models.layers import MLP, LayerNorm, Linear, normal, parameter, xavier_uniform
from pixart_nb.core.models.operators import repeat_tokens, silu, transpose

#: Image sizes whose positional embeddings a network keeps.
CACHED_SIZES = 4


@dataclass(frozen=True)
class PixArtConfig:
    """Architecture of a PixArt transformer; the defaults are those of PixArt-Sigma XL/2 at 512.

    ``input_size`` is the latent side of the training resolution (image side / 8); ``pe_interpolation`` stretches the
    positions to it (0.5 at 256, 1 at 512, 2 at 1024, 4 at 2048). ``kv_compress_config`` has ``sampling`` (conv, ave,
    uniform, mean), ``scale_factor`` and ``kv_compress_layer`` (a list of layer numbers).
    ``copy_blocks_num`` is the number of blocks that a ControlNet copies; the transformer itself ignores it.
    """

    class_name: str = "PixArtMS"
    hidden_size: int = bounded(1152, 4, 2**16)
    num_heads: int = bounded(16, 1, 2**12)
    depth: int = bounded(28, 1, 1000)
    patch_size: int = bounded(2, 1, 64)
    in_channels: int = bounded(4, 1, 2**12)
    mlp_ratio: float = bounded(4.0, 1e-3, 64)
    caption_channels: int = bounded(4096, 1, 2**17)
    input_size: int = bounded(64, 1, 2**12)
    pe_interpolation: float = bounded(1.0, 1e-3, 1e3)
    model_max_length: int = bounded(300, 1, 2**17)
    pred_sigma: bool = True
    micro_condition: bool = False
    qk_norm: bool = False
    kv_compress_config: dict | None = field(default=None, hash=False)
    copy_blocks_num: int = bounded(0, 0, 1000)

    def __new__(cls, *args, **values):
        """Remember which fields are given: a checkpoint may fill in the others."""
        config = super().__new__(cls)
        names = [f.name for f in fields(cls)]
        object.__setattr__(config, "_set", frozenset(names[: len(args)]) | frozenset(values))
        return config

    def __post_init__(self):
        check_fields(self)
        if self.class_name not in ("PixArt", "PixArtMS"):
            raise PixArtNBError(f"class_name is {self.class_name!r}; expected 'PixArt' or 'PixArtMS'")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise PixArtNBError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 and of num_heads {self.num_heads}"
            )
        if self.micro_condition and self.hidden_size % 3:
            raise PixArtNBError(f"micro_condition needs a hidden_size divisible by 3, not {self.hidden_size}")
        check_compression(self.kv_compress_config or {}, self.depth)

    @property
    def sample_size(self) -> int:
        """Latent side of the training resolution, under diffusers' name."""
        return self.input_size

    def is_set(self, name: str) -> bool:
        """Return True if the field was given rather than left at its default."""
        return name in self._set

    @classmethod
    def from_dict(cls, values: dict) -> PixArtConfig:
        """Make a configuration from a mapping; an unknown key is an error that lists the valid ones."""
        names = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise PixArtNBError(f"PixArtConfig has no field {unknown}; its fields are {', '.join(names)}")
        return cls(**values)

    def to_dict(self) -> dict:
        """Return all fields as a mapping that JSON can hold, without ``copy_blocks_num`` if there is no ControlNet."""
        return {name: value for name, value in asdict(self).items() if value or name != "copy_blocks_num"}

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: noise, and with ``pred_sigma`` as many again for the variance."""
        return self.in_channels * (2 if self.pred_sigma else 1)

    @property
    def kv_operator(self) -> str | None:
        """Compression operator, None without compression."""
        return (self.kv_compress_config or {}).get("sampling")

    @property
    def kv_ratio(self) -> int:
        """Compression ratio R in each direction, 1 without compression."""
        return (self.kv_compress_config or {}).get("scale_factor", 1)

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Numbers of the layers whose keys and values are compressed."""
        return tuple((self.kv_compress_config or {}).get("kv_compress_layer") or ())

    def layer_ratio(self, layer: int) -> int:
        """Compression ratio of one layer."""
        return self.kv_ratio if layer in self.kv_layers else 1

    def layer_operator(self, layer: int) -> str | None:
        """Compression operator of one layer, None without compression."""
        return self.kv_operator if self.layer_ratio(layer) > 1 else None


def modulate(x: ms.Tensor, shift: ms.Tensor, scale: ms.Tensor) -> ms.Tensor:
    """Return x (1 + scale) + shift for x (B, N, D), shift and scale (B, 1, D)."""
    tokens = x.shape[1]
    return x * repeat_tokens(1 + scale, tokens) + repeat_tokens(shift, tokens)


def modulation_rows(table: ms.Tensor, t: ms.Tensor, count: int) -> list[ms.Tensor]:
    """Add a block's table (count, D) and the timestep's (B, count or 1, D): ``count`` tensors (B, 1, D)."""
    rows = table.reshape(1, count, -1) + t
    return [rows[:, i : i + 1] for i in range(count)]


class Block(nn.Cell):
    """One block: adaLN-single self-attention, cross-attention to the caption, adaLN-single MLP."""

    def __init__(self, config: PixArtConfig, layer: int):
        super().__init__()
        size = config.hidden_size
        compression = config.layer_operator(layer), config.layer_ratio(layer)
        self.attn = SelfAttention(size, config.num_heads, config.qk_norm, *compression)
        self.cross_attn = CrossAttention(size, config.num_heads)
        self.mlp = MLP(size, int(size * config.mlp_ratio), size)
        self.pre_norm = LayerNorm(size, 1e-6, affine=False)
        self.scale_shift_table = parameter((6, size), name="scale_shift_table")
        self.fast = None  # a TrainingBlock of core.fast in a training on the CPU, never in a compiled graph

    def construct(self, x, k, v, mask, t0, height, width):
        """x (B, N, D), caption keys and values, t0 (B, 6, D), token grid height x width -> (B, N, D)."""
        if self.fast is not None and self.fast.supports(x):
            return self.fast(x, k, v, mask, t0, height, width)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation_rows(self.scale_shift_table, t0, 6)
        tokens = x.shape[1]
        x = x + repeat_tokens(gate, tokens) * self.attn(modulate(self.pre_norm(x), shift, scale), height, width)
        x = x + self.cross_attn(x, k, v, mask)
        return x + repeat_tokens(gate_mlp, tokens) * self.mlp(modulate(self.pre_norm(x), shift_mlp, scale_mlp))

    def keys_values(self, caption):
        """Return keys and values of the cross-attention to a caption (B, T, D), as ``construct`` takes them."""
        if self.fast is not None and self.fast.supports(caption):
            return self.fast.keys_values(caption)
        return self.cross_attn.keys_values(caption)


class FinalLayer(nn.Cell):
    """Modulated norm and projection to patches: (B, N, D) -> (B, N, p p out_channels)."""

    def __init__(self, size: int, out: int):
        super().__init__()
        self.pre_norm = LayerNorm(size, 1e-6, affine=False)
        self.linear = Linear(size, out)
        self.scale_shift_table = parameter((2, size), name="scale_shift_table")
        self.fast = None  # as in Block

    def construct(self, x: ms.Tensor, t: ms.Tensor) -> ms.Tensor:
        if self.fast is not None and self.fast.supports(x):
            return self.fast(x, t)
        shift, scale = modulation_rows(self.scale_shift_table, t.reshape(t.shape[0], 1, -1), 2)
        return self.linear(modulate(self.pre_norm(x), shift, scale))


class PixArt(nn.Cell):
    """The transformer: ``net(latents, timestep, caption, mask)`` predicts the noise (and its variance)."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, size)
        self.t_embedder = FrequencyMLP(size)
        self.t_block = nn.CellList([nn.SiLU(), Linear(size, 6 * size)])  # adaLN-single's shared projection
        self.y_embedder = CaptionEmbedder(config.caption_channels, size, config.model_max_length)
        if config.micro_condition:
            self.csize_embedder, self.ar_embedder = FrequencyMLP(size // 3), FrequencyMLP(size // 3)
        self.blocks = nn.CellList([Block(config, layer) for layer in range(config.depth)])
        self.final_layer = FinalLayer(size, config.patch_size**2 * config.out_channels)
        self._positions: dict[tuple, ms.Tensor] = {}
        self.hook_manager = None  # a HookManager while traced or changed: then compile nothing

    @property
    def dtype(self) -> ms.Type:
        """Dtype of the activations: that of the weights, but float32 for bfloat16 weights on the CPU."""
        return self.final_layer.linear.dtype

    def construct(self, latents, timestep, caption, mask=None):
        """Predict the noise.

        latents (N, C, H, W), timestep (N,), caption (N, T, caption_channels), mask (N, T) bool with True = token
        -> (N, out_channels, H, W).
        """
        self.check_inputs(latents, caption, mask)
        if mask is not None:
            caption, mask = trim_caption(caption, mask)
        micro = self.micro_conditions(latents)
        positions = self.positions(latents.shape[2], latents.shape[3])
        return self.forward(latents, timestep, caption, mask, positions, micro)

    def forward(self, latents, timestep, caption, mask, positions, micro=None):
        """Compute ``construct`` on tensors alone, so that it can be compiled: without checks and caches."""
        return self.denoise(latents, timestep, self.caption_keys_values(caption), mask, positions, micro)

    def caption_keys_values(self, caption):
        """Return keys and values of every block's cross-attention, [(k, v)]; all steps of a prompt use them."""
        projected = self.y_embedder(caption.astype(self.dtype))
        return [block.keys_values(projected) for block in self.blocks]

    def denoise(self, latents, timestep, keys_values, mask, positions, micro=None):
        """Compute one step from the keys and values of the caption: -> (N, out_channels, H, W)."""
        x, t, t0, height, width = self.embed(latents, timestep, positions, micro)
        for block, (k, v) in zip(self.blocks, keys_values):  # noqa: B905 - a compiled graph knows no strict
            x = block(x, k, v, mask, t0, height, width)
        return self.unpatchify(self.final_layer(x, t), height, width)

    def embed(self, latents, timestep, positions, micro=None):
        """Return tokens (N, T, D), timestep embedding t (N, D), its modulation t0 (N, 6, D), and the token grid."""
        patch = self.config.patch_size
        height, width = latents.shape[2] // patch, latents.shape[3] // patch
        if self.hook_manager is not None:
            self.hook_manager.on_step(timestep, height, width)
        x = self.x_embedder(latents.astype(self.dtype)) + repeat_batch(positions, latents.shape[0])
        t = self.t_embedder(timestep)
        if micro is not None:
            t = t + mint.cat((self.csize_embedder(micro[:, :2]), self.ar_embedder(micro[:, 2:])), 1)
        return x, t, self.t_block[1](silu(t)).reshape(t.shape[0], 6, -1), height, width

    def unpatchify(self, x: ms.Tensor, height: int, width: int) -> ms.Tensor:
        """Tokens (N, height * width, p p C) -> (N, C, height p, width p)."""
        p, c = self.config.patch_size, self.config.out_channels
        n = x.shape[0]
        rows = transpose(x.reshape(n * height, width, p, p * c), 0, 2, 1, 3)
        return transpose(rows.reshape(n, height * p, width * p, c), 0, 3, 1, 2)

    def positions(self, height: int, width: int) -> ms.Tensor:
        """Return the positional embedding of latents height x width: (1, N, D), cached for the last sizes."""
        key = (height, width, self.dtype)
        if key not in self._positions:
            if len(self._positions) >= CACHED_SIZES:
                del self._positions[next(iter(self._positions))]
            config, patch = self.config, self.config.patch_size
            grid = sincos_positions(
                config.hidden_size, height // patch, width // patch, config.input_size // patch, config.pe_interpolation
            )
            self._positions[key] = ms.Tensor(grid[None]).astype(self.dtype)
        return self._positions[key]

    def micro_conditions(self, latents: ms.Tensor) -> ms.Tensor | None:
        """Return (N, 3): height and width in pixels and their ratio; None for a model without micro conditions."""
        if not self.config.micro_condition:
            return None
        height, width = 8 * latents.shape[2], 8 * latents.shape[3]
        return ms.Tensor(np.tile(np.array([[height, width, height / width]], np.float32), (latents.shape[0], 1)))

    def check_inputs(self, latents, caption, mask) -> None:
        """Refuse inputs of a wrong shape."""
        channels, size, p = self.config.in_channels, self.config.caption_channels, self.config.patch_size
        shape = latents.shape
        if latents.ndim != 4 or shape[1] != channels or shape[2] % p or shape[3] % p:
            raise PixArtNBError(f"latents have shape {shape}; expected (N, {channels}, H, W), H and W multiples of {p}")
        if caption.ndim != 3 or caption.shape[-1] != size or caption.shape[0] != shape[0]:
            raise PixArtNBError(f"caption has shape {caption.shape}; expected ({shape[0]}, T, {size})")
        if mask is not None and tuple(mask.shape) != tuple(caption.shape[:2]):
            raise PixArtNBError(f"mask has shape {tuple(mask.shape)}; expected {tuple(caption.shape[:2])}")

    def initialize(self, rng: np.random.Generator, zero_cross_attention: bool = True) -> None:
        """Draw new weights as the official code does.

        Xavier uniform for linear layers, normal 0.02 for the embedders, zero for the final layer and for the output of
        the cross-attention. Small models learn to read the caption much sooner with ``zero_cross_attention=False``.
        """
        size = self.config.hidden_size
        for name, weight in self.parameters_and_names():
            value = _initial_value(rng, name, weight.shape, size, zero_cross_attention)
            weight.set_data(ms.Tensor(value).astype(weight.dtype))


def _initial_value(rng, name: str, shape: tuple[int, ...], size: int, zero_cross_attention: bool) -> np.ndarray:
    zero = name.startswith("final_layer.linear") or (zero_cross_attention and "cross_attn.proj" in name)
    if name.endswith("scale_shift_table"):
        return normal(rng, shape, size**-0.5)
    if name.endswith("y_embedding"):
        return normal(rng, shape, shape[1] ** -0.5)
    if ".sr.weight" in name:
        return np.full(shape, 1.0 / np.prod(shape[2:]), np.float32)
    if "norm" in name:
        return np.full(shape, name.endswith("weight"), np.float32)
    if zero or name.endswith("bias"):
        return np.zeros(shape, np.float32)
    embedder = ("t_embedder", "t_block", "y_proj", "csize_embedder", "ar_embedder")
    return normal(rng, shape) if any(part in name for part in embedder) else xavier_uniform(rng, shape)


@contextmanager
def compression_kept(net: PixArt) -> Iterator[None]:
    """Restore the compression of every self-attention after the block. Not inside compiled graphs."""
    before = [(block.attn, block.attn.ratio, block.attn.operator, block.attn.sr) for block in net.blocks]
    try:
        yield
    finally:
        for layer, ratio, operator, reduction in before:
            layer.ratio, layer.operator = ratio, operator
            if layer.sr is not reduction:
                layer.replace_reduction(reduction)


def repeat_batch(x: ms.Tensor, count: int) -> ms.Tensor:
    """Repeat (1, N, D) to (count, N, D) in memory; what has ``count`` rows is left."""
    return x if x.shape[0] == count else mint.tile(x, (count, 1, 1))


def trim_caption(caption: ms.Tensor, mask) -> tuple[ms.Tensor, ms.Tensor | None]:
    """Drop the tokens that every row masks, and the mask if no masked token remains. The result is exact.

    caption (N, T, C), mask (N, T) bool -> (N, L, C) and (N, L) or None; L is the position after the longest row's last
    token.
    """
    keep = as_array(mask).astype(bool)
    check_mask(keep)
    length = int(np.flatnonzero(keep.any(axis=0))[-1]) + 1
    keep = keep[:, :length]
    return caption[:, :length], None if keep.all() else ms.Tensor(keep)
