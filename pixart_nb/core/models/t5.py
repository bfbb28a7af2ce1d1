"""The T5 v1.1 encoder (gated GELU), with the parameter names of its published checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from mindspore import mint, nn

from pixart_nb.core import backend, onednn
from pixart_nb.core.backend import as_array, ms, to_numpy
from pixart_nb.core.errors import PixArtNBError, bounded, check_fields, named_source, refuse_others
from pixart_nb.core.models.attention import MASKED_SCORE, attention, check_mask, merge_heads, split_heads
from pixart_nb.core.models.layers import Embedding, Linear, RMSNorm, normal
from pixart_nb.core.models.low_precision import QuantizedLinear, on_arrays
from pixart_nb.core.models.operators import check_finite, gelu_tanh

#: Attention scores that each thread computes at a time, but at least those of one head.
_SCORES = 2**19
LinearClass = type[Linear] | type[QuantizedLinear]


#: Sizes that transformers' T5Config takes for keys that a config.json leaves out.
TRANSFORMERS_DEFAULTS = {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu"}
#: Keys that change the result, and the values of them that are implemented here.
IMPLEMENTED = {
    "model_type": ("t5",),
    "feed_forward_proj": ("gated-gelu",),
    "dense_act_fn": ("gelu_new",),
    "is_gated_act": (True,),
    "quantization_config": (None,),
}


@dataclass(frozen=True)
class T5Config:
    """Fields of a published ``text_encoder/config.json``; the defaults are T5 v1.1 XXL's."""

    vocab_size: int = bounded(32128, 1, 2**22)
    d_model: int = bounded(4096, 1, 2**17)
    d_kv: int = bounded(64, 1, 2**12)
    d_ff: int = bounded(10240, 1, 2**20)
    num_heads: int = bounded(64, 1, 2**12)
    num_layers: int = bounded(24, 0, 1000)
    relative_attention_num_buckets: int = bounded(32, 4, 2**16)
    relative_attention_max_distance: int = bounded(128, 2, 2**20)
    layer_norm_epsilon: float = bounded(1e-6, 0, 1)
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self):
        check_fields(self)
        refuse_others({"feed_forward_proj": self.feed_forward_proj}, IMPLEMENTED)
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise PixArtNBError(
                f"relative_attention_max_distance is {self.relative_attention_max_distance}; expected more than a "
                f"quarter of relative_attention_num_buckets, {self.relative_attention_num_buckets}"
            )

    @classmethod
    def from_dict(cls, values: Mapping, source: str | Path = "text_encoder/config.json") -> T5Config:
        """Make a configuration from a published mapping, with transformers' defaults for the keys that it leaves out.

        Keys that change the result are honoured or refused with a ``PixArtNBError`` that names ``source``.
        """
        values = TRANSFORMERS_DEFAULTS | dict(values)
        with named_source(source):
            if "_class_name" in values:  # of diffusers
                raise PixArtNBError(f"it is the configuration of {values['_class_name']!r:.60}; expected that of a T5")
            refuse_others(values, IMPLEMENTED)
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def relative_position_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of every query-key distance, (length, length) int32 (Raffel et al. 2020, bidirectional).

    Half of the buckets are for keys after the query. Small distances have one bucket each, larger ones share buckets
    logarithmically up to ``max_distance``.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, distance = buckets // 2, np.abs(offset)
    exact = half // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (half - exact)).astype(np.int64), half - 1)
    return ((offset > 0) * half + np.where(distance < exact, distance, far)).astype(np.int32)


def _rms_norm(norm: RMSNorm, x: np.ndarray) -> np.ndarray:
    """Return ``norm`` of rows x (M, D) float32."""
    scale = 1 / np.sqrt(np.einsum("md,md->m", x, x) / np.float32(x.shape[1]) + np.float32(norm.eps))
    out = x * scale[:, None]
    out *= to_numpy(norm.weight)
    return out


def _attention_on_arrays(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return ``softmax(q k^T + bias) v``: q, k and v (N T, H d), mask (N, T) bool, bias (H, T, T) -> (N T, H d)."""
    out, (prompts, length), heads = np.empty_like(q), mask.shape, len(bias)
    q, k, v, target = (x.reshape(prompts, length, heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v, out))
    masked = np.where(mask, np.float32(0), np.float32(MASKED_SCORE))
    size = max(1, min(-(-heads // backend.thread_count()), _SCORES // length**2))

    def work(job: tuple[int, int]) -> None:
        prompt, part = job[0], slice(job[1], job[1] + size)
        scores = bias[part] + masked[prompt]
        onednn.multiply(q[prompt, part], k[prompt, part].swapaxes(1, 2), scores, add=True)
        rows = scores.reshape(-1, length)
        onednn.softmax(rows, rows)
        onednn.multiply(scores, v[prompt, part], target[prompt, part])

    backend.in_threads(work, [*itertools.product(range(prompts), range(0, heads, size))])
    return out


class T5Attention(nn.Cell):
    """Self-attention without scaling; the first layer holds the relative positions that all layers use."""

    def __init__(self, config: T5Config, with_positions: bool, linear: LinearClass):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q, self.k, self.v = (linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = linear(inner, config.d_model, bias=False)
        positions = config.relative_attention_num_buckets, config.num_heads
        self.relative_attention_bias = Embedding(*positions) if with_positions else None

    def construct(self, x: ms.Tensor, mask: ms.Tensor, bias: ms.Tensor) -> ms.Tensor:
        q, k, v = (split_heads(part(x), self.heads) for part in (self.q, self.k, self.v))
        return self.o(merge_heads(attention(q, k, v, mask, scale=1.0, bias=bias)))


class T5SelfAttention(nn.Cell):
    """Norm, attention, residual."""

    def __init__(self, config: T5Config, with_positions: bool, linear: LinearClass):
        super().__init__()
        self.SelfAttention = T5Attention(config, with_positions, linear)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def construct(self, x: ms.Tensor, mask: ms.Tensor, bias: ms.Tensor) -> ms.Tensor:
        normed = self.layer_norm(x).astype(self.SelfAttention.q.dtype)
        return x + self.SelfAttention(normed, mask, bias).astype(x.dtype)

    def add_on_arrays(self, x: np.ndarray, mask: np.ndarray, bias: np.ndarray) -> None:
        """Compute ``construct`` in place: x (N T, d_model) float32, mask (N, T) bool, bias (H, T, T)."""
        normed, layers = _rms_norm(self.layer_norm, x), self.SelfAttention
        q, k, v = (on_arrays(part)(normed) for part in (layers.q, layers.k, layers.v))
        x += on_arrays(layers.o)(_attention_on_arrays(q, k, v, mask, bias))


class GatedFeedForward(nn.Cell):
    """``wo(gelu(wi_0 x) * wi_1 x)``; ``wo`` is computed in float32, since its input overflows half precision."""

    def __init__(self, config: T5Config, linear: LinearClass):
        super().__init__()
        self.wi_0, self.wi_1 = (linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = linear(config.d_ff, config.d_model, bias=False)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        hidden = gelu_tanh(self.wi_0(x).astype(ms.float32)) * self.wi_1(x).astype(ms.float32)
        return self.wo.in_float32(hidden)


class T5FeedForward(nn.Cell):
    """Norm, gated feed-forward, residual."""

    def __init__(self, config: T5Config, linear: LinearClass):
        super().__init__()
        self.DenseReluDense = GatedFeedForward(config, linear)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        normed = self.layer_norm(x).astype(self.DenseReluDense.wi_0.dtype)
        return x + self.DenseReluDense(normed).astype(x.dtype)

    def add_on_arrays(self, x: np.ndarray) -> None:
        """Compute ``construct`` in place: x (N T, d_model) float32."""
        normed, layers = _rms_norm(self.layer_norm, x), self.DenseReluDense
        hidden, linear = (on_arrays(part)(normed) for part in (layers.wi_0, layers.wi_1))

        def work(rows: slice) -> None:
            onednn.gelu(hidden[rows], hidden[rows])
            hidden[rows] *= linear[rows]

        backend.in_threads(work, backend.thread_slices(len(x)))
        x += on_arrays(layers.wo)(hidden)


class T5Block(nn.Cell):
    """One layer of the encoder."""

    def __init__(self, config: T5Config, with_positions: bool, linear: LinearClass = Linear):
        super().__init__()
        self.layer = nn.CellList([T5SelfAttention(config, with_positions, linear), T5FeedForward(config, linear)])

    def construct(self, x: ms.Tensor, mask: ms.Tensor, bias: ms.Tensor) -> ms.Tensor:
        return self.layer[1](self.layer[0](x, mask, bias))

    def add_on_arrays(self, x: np.ndarray, mask: np.ndarray, bias: np.ndarray) -> None:
        """Compute ``construct`` in place: x (N T, d_model) float32, mask (N, T) bool, bias (H, T, T)."""
        self.layer[0].add_on_arrays(x, mask, bias)
        self.layer[1].add_on_arrays(x)


class T5Stack(nn.Cell):
    """The layers and the last norm."""

    def __init__(self, config: T5Config, linear: LinearClass):
        super().__init__()
        self.block = nn.CellList([T5Block(config, i == 0, linear) for i in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class T5Encoder(nn.Cell):
    """Token ids (N, T) and mask (N, T) -> embeddings (N, T, d_model).

    ``linear`` is the class of the projections in its layers: ``Linear``, or one with quantized weights.
    """

    def __init__(self, config: T5Config, linear: LinearClass = Linear):
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, linear)

    @property
    def dtype(self) -> ms.Type:
        """Dtype of the embeddings: that of the weights, but float32 for bfloat16 weights on the CPU."""
        return self.shared.dtype

    def construct(self, input_ids, mask) -> ms.Tensor:
        """Encode input_ids (N, T), integers, with mask (N, T) bool, True = token; every row needs a token."""
        ids, mask = self.validated(input_ids, mask)
        out = self.encode(self.shared(ms.Tensor(ids)), mask, self.encoder.block)
        check_finite(out, "the text encoder")
        return out

    def encode(self, x: ms.Tensor, mask: np.ndarray, blocks: Iterable[T5Block]) -> ms.Tensor:
        """Run ``blocks``, the first of which has the table of positions, on embedded tokens x (N, T, d_model).

        mask (N, T) bool. Equals ``forward``; a CPU computes it on arrays, with fewer operations.
        """
        on_cpu, bias, shape = not backend.on_ascend() and self.dtype == ms.float32, None, x.shape
        x, seen = x.astype(ms.float32), ms.Tensor(mask)
        rows = to_numpy(x).reshape(-1, shape[-1]).copy() if on_cpu else None
        for block in blocks:
            if bias is None:
                bias = self.position_bias(block, self.buckets(shape[1]))
                bias = to_numpy(bias)[0] if on_cpu else bias
            if on_cpu:
                block.add_on_arrays(rows, mask, bias)
            else:
                x = block(x, seen, bias)
        x = ms.Tensor.from_numpy(rows).reshape(shape) if on_cpu else x
        return self.encoder.final_layer_norm(x).astype(self.dtype)

    def validated(self, input_ids, mask) -> tuple[np.ndarray, np.ndarray]:
        """Return ids int32 and mask bool, or refuse them. Outside of ``construct``, which a compiler parses."""
        backend.pin_threads()
        ids = as_array(input_ids)
        mask = as_array(mask).astype(bool)
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise PixArtNBError(f"input_ids have shape {ids.shape} and mask {mask.shape}; expected the same (N, T)")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise PixArtNBError(
                f"token ids are {ids.min()}..{ids.max()}; the text encoder has ids 0..{self.config.vocab_size - 1}. "
                "Use the tokenizer of this model."
            )
        check_mask(mask)
        return ids.astype(np.int32), mask

    def forward(self, input_ids: ms.Tensor, mask: ms.Tensor, buckets: ms.Tensor) -> ms.Tensor:
        """Compute ``construct`` on tensors alone, so that it can be compiled.

        The residual stream is float32 for weights of any dtype: in XXL it leaves the range of half precision.
        """
        x = self.shared(input_ids).astype(ms.float32)
        bias = self.position_bias(self.encoder.block[0], buckets)
        for block in self.encoder.block:
            x = block(x, mask, bias)
        return self.encoder.final_layer_norm(x).astype(self.dtype)

    def buckets(self, length: int) -> ms.Tensor:
        """Return the buckets of relative positions for ``length`` tokens: (length, length) int32."""
        buckets, distance = (self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance)
        return ms.Tensor(relative_position_buckets(length, buckets, distance))

    @staticmethod
    def position_bias(first: T5Block, buckets: ms.Tensor) -> ms.Tensor:
        """Return the bias of relative positions on the attention scores, (1, H, T, T) float32, by the first layer."""
        table = first.layer[0].SelfAttention.relative_attention_bias(buckets)
        return mint.permute(table, (2, 0, 1)).expand_dims(0).astype(ms.float32)

    def initialize(self, rng: np.random.Generator) -> None:
        """Draw new weights by T5's own scheme."""
        config = self.config
        q, o = (config.d_model * config.d_kv) ** -0.5, (config.num_heads * config.d_kv) ** -0.5
        deviations = {"q": q, "o": o, "wo": config.d_ff**-0.5, "shared": 1.0}
        for name, weight in self.parameters_and_names():
            if "layer_norm" in name:
                value = np.ones(weight.shape, np.float32)
            else:
                std = deviations.get(name.split(".")[-2], config.d_model**-0.5)
                value = normal(rng, tuple(weight.shape), std)
            weight.set_data(ms.Tensor(value).astype(weight.dtype))
