"""What people stumble over when they convert a PixArt checkpoint, one sentence each, for the checkpoint at hand."""

from __future__ import annotations

from collections.abc import Iterable

from pixart_nb.core.checkpoints.layouts import Transformer
from pixart_nb.core.models.transformer import PixArtConfig

_EMBEDDING = "y_embedder.y_embedding"


def sentences_on(
    view: Transformer, config: PixArtConfig, family: str, layout: str, ending: str, started: Iterable[str]
) -> list[str]:
    """The sentences of a conversion to ``layout`` (``official``, ``diffusers``) in a file of this ending."""
    return [
        *view.notes,
        _tokens(view, config, family),
        _embedding(view, layout),
        _positions(view),
        _micro_conditions(config),
        *_compression(config, layout, ending, list(started)),
    ]


def _tokens(view: Transformer, config: PixArtConfig, family: str) -> str:
    if _EMBEDDING not in view.tensors:
        known = f"taken to be PixArt-{family}" if family else "alpha (120) or sigma (300) is not known"
        return f"Caption tokens: no y_embedding shows their number; {known}."
    count = view.tensors[_EMBEDDING].shape[0]
    if not family:
        return (
            f"Caption tokens: {count}, neither alpha's 120 nor sigma's 300; set model_max_length to {count} "
            "wherever this is loaded."
        )
    other = "alpha configuration, which says 120," if count == 300 else "sigma configuration, which says 300,"
    return f"Caption tokens: {count}, so this is PixArt-{family}. An {other} does not fit it.".replace(
        "An s", "A s"
    )


def _embedding(view: Transformer, layout: str) -> str:
    if _EMBEDDING in view.tensors and layout == "official":
        return "y_embedding (the learned empty caption) is kept."
    why = "the caption that training drops to, and the empty prompt of alpha's own scripts"
    if _EMBEDDING in view.tensors:
        return (
            f"y_embedding ({why}) has no place in the diffusers layout and is left out: on the way back it will be "
            "missing. Sampling here and in diffusers encodes an empty prompt instead. Keep the source for training."
        )
    if layout == "official":
        return (
            f"y_embedding ({why}) does not exist in the source, so it is missing in the target: the official code "
            "starts it at random. Sampling here does not use it; for training, take it from the official checkpoint."
        )
    return "y_embedding (the learned empty caption) is neither in the source nor in the diffusers layout."


def _positions(view: Transformer) -> str:
    if view.recomputed:
        return "pos_embed is recomputed from the picture's size whenever a model is built; left out, nothing is lost."
    return "pos_embed is not in the source, as in many checkpoints; it is recomputed, nothing is lost."


def _micro_conditions(config: PixArtConfig) -> str:
    if config.micro_condition:
        return "Micro conditions (csize_embedder, ar_embedder) are there: of the published models, alpha-1024 alone."
    return (
        "Micro conditions (csize_embedder, ar_embedder) are not there: of the published models, alpha-1024 alone has "
        "them. A configuration with micro_condition or use_additional_conditions on does not fit."
    )


def _compression(config: PixArtConfig, layout: str, ending: str, started: list[str]) -> Iterable[str]:
    layers, ratio = list(config.kv_layers), config.kv_ratio
    if not layers or ratio == 1:
        yield (
            "KV compression: no layer has weights for it (attn.sr), as in every published checkpoint. With "
            "kv_compress_config in --config they are made, starting as averages."
        )
        return
    if config.kv_operator != "conv":
        yield f"KV compression: layers {layers} shrink by {ratio} with {config.kv_operator!r}, which has no weights."
        return
    if any(name.endswith("sr.weight") for name in started):
        yield (
            f"KV compression: weights of layers {layers} were absent; they start as averages (1/{ratio * ratio} each, "
            "bias 0, a norm of 1 and 0). Finetune before you judge pictures."
        )
    elif started:
        lacking = ", ".join(sorted({name.split("attn.")[1] for name in started}))
        yield (
            f"KV compression: layers {layers} came without {lacking}, as mindone saves them; these are 0 (biases) "
            "and 1 (norm), which changes nothing."
        )
    else:
        yield f"KV compression: layers {layers} shrink by {ratio}, with their trained weights."
    if layout == "diffusers":
        yield "diffusers itself knows no KV compression: the target loads in this kit, not there."
    elif ending == ".ckpt":
        yield "mindone's model has no place for sr.bias and for the weights of attn.norm: there they would be ignored."
