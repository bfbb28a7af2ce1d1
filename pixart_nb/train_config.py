"""The configuration of a training: the keys of ``configs/train/*.yaml``, named as in mindone's example."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.schedulers import SAMPLING_METHODS

Text = Annotated[str, Field(min_length=1)]
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _key(panel: str):
    """A field of a panel of ``pixart-nb train --help``."""

    def field(default: Any, description: str, **limits: Any) -> Any:
        return Field(default, description=description, json_schema_extra={"panel": panel}, **limits)

    return field


_model, _data, _rate, _update, _number = map(_key, ("Model", "Data", "Learning rate", "Updates", "Numbers"))
_stage, _lora, _look, _keep, _parallel = map(
    _key, ("From weak to strong", "LoRA", "What you see", "What is kept", "Several workers")
)


def _as_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


class TrainConfig(BaseModel):
    """What to train, on what, and how.

    The weights to start from come from ``model``, or part by part from ``checkpoint`` and the three roots; a part that
    is given replaces that of ``model``. An empty text, an empty list or a zero means: not given.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = _model("", "folder in the diffusers layout, or the id of a model on a hub")
    checkpoint: str = _model("", "the transformer to start from: .pth, .ckpt, .safetensors or a folder")
    vae_root: str = _model("", "folder of the autoencoder; another one than before swaps it")
    text_encoder_root: str = _model("", "folder of the T5 encoder")
    tokenizer_root: str = _model("", "folder of the tokenizer")
    from_scratch: bool = _model(False, "start with fresh weights in place of the transformer's")
    zero_cross_attention: bool = _model(True, "fresh weights read the caption late, as in the official code")
    sample_size: int = _model(0, "latent cells a side to train at: image pixels / 8", ge=0)
    t5_max_length: Literal[120, 300] = _model(300, "tokens of a caption: 120 in alpha, 300 in sigma")
    sd_scale_factor: float = _model(0.0, "scaling factor of the latents, if not the VAE's own", ge=0)

    json_path: Text = _data(..., "label file: a list of path, prompt, sharegpt4v, height, width, ratio")
    image_dir: Text = _data(..., "folder of the pictures that the label file names")
    real_prompt_ratio: float = _data(0.5, "chance of the prompt; else the sharegpt4v caption", ge=0, le=1)
    class_dropout_prob: float = _data(0.1, "chance that a caption is dropped, for guidance", ge=0, le=1)
    clean_caption: bool = _data(True, "prepare captions as prompts are prepared")
    multi_scale: bool = _data(False, "train at the published sizes nearest to each picture's own")
    valid_num: int = _data(0, "sizes that fewer pictures have are not used", ge=0)
    feature_cache: str = _data("", "folder for latents and caption embeddings, computed once")
    feature_dtype: Literal["fp16", "fp32"] = _data("fp16", "what the features are stored as")
    num_parallel_workers: int = _data(2, "batches that are read ahead", ge=0)

    pe_interpolation: float = _stage(
        0.0, "stretch of the positions; 0 keeps the span of the checkpoint's", ge=0
    )
    kv_compress: bool = _stage(False, "compress keys and values in some layers")
    kv_compress_sampling: Literal["conv", "ave", "uniform", "mean"] = _stage("conv", "operator")
    kv_compress_scale_factor: int = _stage(1, "shrinking in each direction", ge=1)
    kv_compress_layer: list[int] = _stage([], "layers that compress, counted from 0")
    kv_compress_init: Literal["average", "random"] = _stage("average", "how new convolutions start")
    start_report: bool = _stage(True, "measure the loss before the first step, with and without what is new")

    epochs: int = _rate(200, "times that each picture is shown", ge=1)
    steps: int = _rate(0, "updates, in place of epochs", ge=0)
    scheduler: Literal["constant", "cosine_decay", "linear_decay"] = _rate("constant", "after the warm-up")
    start_learning_rate: float = _rate(2e-5, "the learning rate after the warm-up", gt=0, allow_inf_nan=False)
    end_learning_rate: float = _rate(0.0, "what it decays to", ge=0, allow_inf_nan=False)
    warmup_steps: int = _rate(1000, "updates in which it rises", ge=0)
    auto_lr: Literal["", "sqrt", "linear"] = _rate("", "scale it with the pictures of an update / 256")

    optim: Literal["adamw", "came"] = _update("adamw", "the optimizer")
    adamw_betas: list[float] = _update([0.9, 0.999], "of AdamW", min_length=2, max_length=2)
    adamw_eps: float = _update(1e-10, "of AdamW", gt=0)
    came_betas: list[float] = _update([0.9, 0.999, 0.9999], "of CAME", min_length=3, max_length=3)
    came_eps: list[float] = _update([1e-30, 1e-16], "of CAME", min_length=2, max_length=2)
    weight_decay: float = _update(0.0, "share of the weights lost at a learning rate of 1", ge=0)
    batch_size: int = _update(64, "pictures of one worker's batch", ge=1)
    gradient_accumulation_steps: int = _update(1, "batches of an update", ge=1)
    clip_grad: bool = _update(False, "clip the gradient")
    max_grad_norm: float = _update(0.01, "largest norm of a clipped gradient", gt=0)
    use_ema: bool = _update(False, "keep a moving average of the weights, and let it be the result")
    ema_rate: float = _update(0.9999, "of the average", ge=0, lt=1)
    snr_gamma: float = _update(0.0, "min-SNR weighting of the loss, 5 in its paper; 0 is off", ge=0)
    noise_offset: float = _update(0.0, "noise that a whole channel shares, 0.1 is usual; 0 is off", ge=0)
    timestep_sampling: Literal["uniform", "middle"] = _update("uniform", "which timesteps are trained")
    seed: int = _update(42, "the same seed gives the same training", ge=0)

    dtype: Literal["fp32", "fp16", "bf16"] = _number("fp32", "what the transformer computes in")
    loss_scaler_type: Literal["static", "dynamic"] = _number("dynamic", "of the loss, in fp16 only")
    init_loss_scale: float = _number(65536.0, "scale of the first steps", ge=1)
    loss_scale_factor: float = _number(2.0, "what it is divided by at an overflow", gt=1)
    scale_window: int = _number(1000, "updates without an overflow, until it is multiplied", ge=1)
    recompute: bool = _number(False, "compute blocks again in the backward pass: less memory, more time")
    mode: Literal[0, 1] = _number(1, "0: a compiled graph for each size of batch; 1: none")

    lora_rank: int = _lora(0, "train a LoRA of this rank in place of all weights", ge=0)
    lora_alpha: float = _lora(0.0, "its alpha; 0 is the rank", ge=0)
    lora_dropout: float = _lora(0.0, "its dropout", ge=0, lt=1)
    lora_target_modules: list[Text] = _lora([], "the layers, by diffusers' names; else both attentions'")
    use_dora: bool = _lora(False, "weight-decomposed LoRA")

    visualize: bool = _look(False, "draw the validation prompts now and then")
    visualize_interval: int = _look(1, "epochs between looking", ge=1)
    visualize_steps: int = _look(0, "updates between, in place of epochs", ge=0)
    validation_prompts: list[Text] = _look([], "what is drawn")
    validation_negative_prompts: list[str] = _look([], "one for each of them, or none")
    validation_json_path: str = _look("", "label file of pictures that are measured, never trained on")
    sampling_method: Literal[tuple(SAMPLING_METHODS)] = _look("dpm", "the solver")
    sampling_steps: int = _look(20, "its steps", ge=1)
    guidance_scale: float = _look(4.5, "1 switches guidance off", ge=1, allow_inf_nan=False)
    log_loss_interval: int = _look(1, "updates between two rows of curve.csv", ge=1)
    tensorboard: bool = _look(True, "write the same numbers for TensorBoard")

    output_path: Text = _keep("outputs/train", "folder of everything that is written")
    ckpt_save_interval: int = _keep(1, "epochs between checkpoints", ge=1)
    ckpt_save_steps: int = _keep(0, "updates between checkpoints, in place of epochs", ge=0)
    ckpt_max_keep: int = _keep(3, "checkpoints that are kept", ge=1)

    use_parallel: bool = _parallel(False, "under msrun: each worker takes its share of every batch")
    hsdp_optimizer_level: Literal["level1"] = _parallel(
        "level1", "what the workers share: the optimizer's moments, as in ZeRO stage 1"
    )
    hsdp_shard_size: Literal[-1, 1] = _parallel(-1, "workers that share them; -1 is all, 1 shares nothing")
    hsdp_threshold: int = _parallel(64, "KB below which every worker keeps a parameter's moments", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _numbers_with_exponents(cls, values: Any) -> Any:
        """YAML reads ``2e-5``, without a point, as text."""
        if not isinstance(values, dict):
            return values
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        number = {
            float: _as_number,
            list[float]: lambda parts: list(map(_as_number, parts)) if isinstance(parts, list) else parts,
        }
        return {key: number.get(kinds.get(key), lambda same: same)(value) for key, value in values.items()}

    @model_validator(mode="after")
    def _enough_to_train(self) -> TrainConfig:
        roots = ("vae_root", "text_encoder_root", "tokenizer_root")
        missing = [name for name in roots if not getattr(self, name)]
        if not self.model and (missing or not self.checkpoint):
            wanted = [] if self.checkpoint else ["checkpoint"]
            raise PixArtNBError(
                f"expected model, or all of checkpoint, {', '.join(roots)}; not given: {', '.join([*wanted, *missing])}"
            )
        if self.kv_compress and not (self.kv_compress_layer and self.kv_compress_scale_factor > 1):
            raise PixArtNBError(
                "kv_compress is on, so expected at least one layer in kv_compress_layer, and a "
                "kv_compress_scale_factor above 1"
            )
        if self.visualize and not self.validation_prompts:
            raise PixArtNBError("visualize is on, so expected at least one text in validation_prompts")
        negatives = len(self.validation_negative_prompts)
        if negatives not in (0, len(self.validation_prompts)):
            raise PixArtNBError(
                f"{negatives} validation_negative_prompts for {len(self.validation_prompts)} validation_prompts; "
                "expected none, or one for each"
            )
        return self._possible()

    def _possible(self) -> TrainConfig:
        bad = [b for b in (*self.adamw_betas, *self.came_betas) if not 0 <= b < 1]
        if bad:
            raise PixArtNBError(f"betas {bad}: expected numbers from 0 to below 1")
        if self.lora_rank and self.from_scratch:
            raise PixArtNBError(
                "lora_rank and from_scratch exclude each other: a LoRA changes a trained model"
            )
        if self.sample_size % 2:
            raise PixArtNBError(f"sample_size is {self.sample_size}; expected an even number of latent cells")
        return self


#: Keys that may change when a training goes on: what is seen and kept, and how fast; no number depends on them.
_FREE = {
    "visualize", "visualize_interval", "visualize_steps", "validation_prompts", "validation_negative_prompts",
    "validation_json_path", "sampling_method", "sampling_steps", "guidance_scale", "log_loss_interval", "tensorboard",
    "output_path", "ckpt_save_interval", "ckpt_save_steps", "ckpt_max_keep", "num_parallel_workers", "recompute",
    "use_parallel", "start_report", "hsdp_optimizer_level", "hsdp_shard_size", "hsdp_threshold",
}  # fmt: skip
#: Keys that say where something lies; what lies there is what counts.
_PLACES = {
    "model", "checkpoint", "vae_root", "text_encoder_root", "tokenizer_root", "json_path", "image_dir", "feature_cache",
}  # fmt: skip


def identity(config: TrainConfig, workers: int = 1) -> dict[str, Any]:
    """What a training must share with one that it goes on with: the keys that its numbers depend on.

    The same batches come from many workers or one; a constant learning rate does not depend on how long one trains.
    """
    told = {key: value for key, value in config.model_dump().items() if key not in _FREE | _PLACES}
    told["batch_size"] = config.batch_size * workers
    told["features from a cache"] = bool(config.feature_cache)
    if config.scheduler == "constant":
        del told["steps"], told["epochs"]
    return told
