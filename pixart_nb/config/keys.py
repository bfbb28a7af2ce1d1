"""Every key of a configuration, declared once: type, default, bounds and help text.

The names are those of mindone's PixArt-Sigma example. The options of the command line are generated from these fields.
"""

# ruff: noqa: E501  the keys form a table: one line each
from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

#: Sampling defaults of the published pipeline. The pipeline, the widgets and the notebooks use them too.
GUIDANCE_SCALE = 4.5
#: Options of the edges of an image (``core.data.control.EdgeOptions``).
EDGE_SIGMA, EDGE_THRESHOLD, EDGE_WIDTH = 1.0, 0.1, 1
SAMPLING_STEPS = 20
SAMPLING_METHOD = "dpm++"
#: Values of ``sampling_method``; ``core.sampling.schedulers`` maps each to its scheduler.
SAMPLING_METHODS = (
    "dpm++", "dpm++karras", "euler", "unipc", "lcm", "dmd", "iddpm", "ddim", "dpm", "sa-solver", "ddim-diffusers",
    "heun", "euler-a", "dpm++2s", "dpm++3m", "dpm++sde", "deis", "lms", "pndm", "kdpm2", "kdpm2-a", "ddpm",
)  # fmt: skip
#: Prompts of mindone's training configurations.
VALIDATION_PROMPTS = (
    "portrait photo of a girl, photograph, highly detailed face, depth of field",
    "Self-portrait oil painting, a beautiful cyborg with golden hair, 8k",
    "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k",
    "A photo of beautiful mountain with realistic sunset and blue lake, highly detailed, masterpiece",
)
#: Components that can be given one by one, in place of those of ``model``.
ROOTS = ("vae_root", "text_encoder_root", "tokenizer_root")
#: mindone's keys that have no meaning here, and why. They are accepted and named in one line.
IGNORED_KEYS = {
    "enable_flash_attention": "attention is always fused",
    "jit_level": "the compiler's default is used",
    "drop_overflow_update": "an update that overflows is always dropped",
    "path_column": "label files name the path column themselves",
}
#: mindone's keys that have another name here.
RENAMED_KEYS = {"num_trials": "nrows"}

_REPOSITORY = Path(__file__).resolve().parents[2]
_INSTALLED = Path(__file__).resolve().parents[1] / "_bundled"
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
#: Longest side of an image in pixels.
MOST_SIDE = 16384
_MOST_LAYERS, _MOST_STEPS = 1024, 10**9


def bundled_path(path: str | os.PathLike[str]) -> Path:
    """Return ``path``; if it does not exist, the file of that name in the repository or the installed package.

    ``data/`` and ``configs/`` come with the package, so that a command works in any folder.
    """
    path = Path(path).expanduser()
    if path.parts[:1] in (("data",), ("configs",)) and not path.exists():
        for root in (_INSTALLED, _REPOSITORY):
            if (root / path).exists():
                return root / path
    return path


def _input_path(text: str) -> str:
    path = bundled_path(text)
    return str(path) if text and (text.startswith("~") or path != Path(text)) else text


def _number(value: Any) -> Any:
    """YAML reads ``2e-5``, without a point, as text."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _layers(value: Any) -> Any:
    """Expand ranges: ``14-27`` or ``[0, "14-27"]`` to layer numbers."""
    layers: list[Any] = []
    for part in value if isinstance(value, list) else [value]:
        for item in part.split(",") if isinstance(part, str) else [part]:
            first, dash, last = item.partition("-") if isinstance(item, str) else (item, "", "")
            ends = dash and first.strip().isdecimal() and last.strip().isdecimal()
            if ends and int(first) <= int(last):
                layers += range(int(first), min(int(last), _MOST_LAYERS) + 1)
            else:
                layers.append(int(item) if isinstance(item, str) and item.strip().isdecimal() else item)
    return layers


def _one_text(value: str | list[str]) -> str | list[str]:
    """A list of one negative prompt stands for all prompts, as the text itself does."""
    return value if isinstance(value, str) or len(value) > 1 else "".join(value)


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def split_weight(text: str) -> tuple[str, float]:
    """Split PATH:WEIGHT of a LoRA.

    >>> split_weight("style.safetensors:0.5"), split_weight("style")
    (('style.safetensors', 0.5), ('style', 1.0))
    """
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon and path else (text, 1.0)
    except ValueError:
        return text, 1.0


def lora_name(number: int) -> str:
    """Return the name of the adapter that a LoRA of a configuration becomes, counted from 0."""
    return f"lora_{number}"


def _weighted(text: str) -> str:
    path, weight = split_weight(text)
    if not math.isfinite(weight):
        raise ValueError(f"the weight of {text!r} is not finite; give PATH:WEIGHT, such as style.safetensors:0.5")
    return _input_path(path) + text[len(path) :]


InputPath = Annotated[str, AfterValidator(_input_path)]
OutputPath = Annotated[str, AfterValidator(lambda text: os.path.expanduser(text))]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Layers = Annotated[list[Annotated[int, Field(ge=0, lt=_MOST_LAYERS)]], BeforeValidator(_layers)]
LoraFiles = Annotated[
    list[Annotated[str, Field(min_length=1), AfterValidator(_weighted)]], BeforeValidator(_list), Field(max_length=64)
]
NegativePrompt = Annotated[str | list[str], AfterValidator(_one_text)]
Paths = Annotated[list[Annotated[str, Field(min_length=1), AfterValidator(_input_path)]], BeforeValidator(_list)]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_list)]


def _panel(title: str):
    """Return a function that declares a key in one panel of the command line's help."""

    def key(default: Any, description: str, **limits: Any) -> Any:
        return Field(default, description=description, json_schema_extra={"panel": title}, **limits)

    return key


_model, _compression, _sampling, _output = map(_panel, ("Model", "Token compression", "Sampling", "Output"))
_machine, _data, _stage, _rate = map(_panel, ("Memory and devices", "Data", "Weak-to-strong training", "Learning rate"))
_update, _precision, _lora, _look = map(_panel, ("Optimization", "Precision", "LoRA", "Validation"))
_control, _distil = map(_panel, ("ControlNet", "Distillation"))

# fmt: off
# Keys that sampling and training share, each with a default of its own.
Seed = Annotated[int, _sampling(0, "Seed of the random numbers.", ge=0, lt=2**63)]
BatchSize = Annotated[int, _machine(1, "Number of images per batch.", ge=1, le=4096)]
OutputFolder = Annotated[OutputPath, _output("", "Folder that the results are written to.", min_length=1)]
Method = Annotated[Literal[SAMPLING_METHODS], _sampling("", "Scheduler of the denoising process.")]


class ModelKeys(BaseModel):
    """Keys that sampling and training share.

    The weights come from ``model``, or component by component from ``checkpoint`` and the three roots; a component
    that is given replaces that of ``model``. An empty text or list, or a zero, means: not given.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: InputPath = _model("", "Folder of a pipeline in the diffusers layout, or a model id of the Hugging Face Hub.")
    checkpoint: InputPath = _model("", "Transformer in place of the model's: .pth, .ckpt, .safetensors or a folder.")
    vae_root: InputPath = _model("", "Folder of the VAE.")
    text_encoder_root: InputPath = _model("", "Folder of the T5 text encoder.")
    tokenizer_root: InputPath = _model("", "Folder of the T5 tokenizer.")
    sample_size: int = _model(0, "Latent side of the transformer's resolution: 32, 64, 128, 256 for 256 to 2048 px.", ge=0, le=1024)
    t5_max_length: Literal[0, 120, 300] = _model(0, "Maximum number of prompt tokens: 120 for PixArt-alpha, 300 for Sigma. 0 takes the model's.")
    sd_scale_factor: Number = _model(0.0, "Scaling factor of the latents, in place of the VAE's own.", ge=0)

    kv_compress: bool = _compression(False, "Compress the keys and values of self-attention in some layers.")
    kv_compress_sampling: Literal["conv", "ave", "uniform", "mean"] = _compression("conv", "How a cell of tokens becomes one.")
    kv_compress_scale_factor: int = _compression(1, "Compression ratio in each direction.", ge=1, le=64)
    kv_compress_layer: Layers = _compression([], "Layers that compress, counted from 0, for example 14-27.")

    sampling_method: Method = SAMPLING_METHOD
    sampling_steps: int = _sampling(SAMPLING_STEPS, "Number of denoising steps. More steps take longer.", ge=1, le=10000)
    guidance_scale: Number = _sampling(GUIDANCE_SCALE, "Scale of classifier-free guidance. Up to 1 there is none.", ge=0)

    dtype: Literal["fp32", "fp16", "bf16"] = _machine("fp32", "Floating-point type of the networks. On a CPU fp16 is computed as bf16, which takes half the memory, or as fp32 without AVX512-BF16.")
    device_target: Literal["", "CPU", "Ascend"] = _machine("", "Device: CPU or Ascend, as in PIXART_NB_DEVICE. Empty takes MindSpore's default.")
    mode: Literal[0, 1] = _machine(1, "MindSpore execution mode: 0 compiles graphs (sampling: on Ascend only), 1 is PyNative.")
    use_parallel: bool = _machine(False, "Divide the work among the processes that msrun started.")

    @property
    def kv_compress_config(self) -> dict[str, Any] | None:
        """Compression of keys and values as ``PixArtConfig`` takes it, or None."""
        if not self.kv_compress:
            return None
        sampling, ratio, layers = self.kv_compress_sampling, self.kv_compress_scale_factor, self.kv_compress_layer
        return {"sampling": sampling, "scale_factor": ratio, "kv_compress_layer": layers}


class InferenceConfig(ModelKeys):
    """Configuration of ``pixart-nb sample``: the keys of ``configs/inference/*.yaml``."""

    prompt: Texts = _sampling([], "Prompts that guide the image generation.")
    prompt_path: InputPath = _sampling("", "Text file with one prompt per line, in place of prompt.")
    negative_prompt: NegativePrompt = _sampling("", "Negative prompt: one for all prompts, or one for each of them.")
    image_height: int = _sampling(..., "Height of the generated image in pixels.", gt=0, le=MOST_SIDE)
    image_width: int = _sampling(..., "Width of the generated image in pixels.", gt=0, le=MOST_SIDE)
    use_resolution_binning: bool = _sampling(True, "Generate at the nearest published resolution, then resize and crop.")
    pag_scale: Number = _sampling(0.0, "Scale of perturbed-attention guidance; 3 is usual. 0 disables it.", ge=0, le=1000)
    pag_adaptive_scale: Number = _sampling(0.0, "Amount by which pag_scale falls, per timestep.", ge=0, le=1000)
    pag_applied_layers: Texts = _sampling(["blocks.1"], "Layers that are perturbed, for example blocks.14.", min_length=1)
    seed: Seed = 0
    first_image: int = _sampling(0, "Number of the first image. Seed and number determine an image.", ge=0, lt=2**63)

    output_path: OutputFolder = "outputs/sample"
    overwrite: bool = _output(False, "Replace images of the same name. Otherwise names count up.")
    imagegrid: bool = _output(False, "Write one file per prompt, with all its images in a grid.")
    nrows: int = _output(1, "Rows of the grid. A prompt has nrows x ncols images.", ge=1, le=256)
    ncols: int = _output(1, "Columns of the grid.", ge=1, le=256)

    batch_size: BatchSize = 8
    t5_load: Literal["whole", "stream", "int8", "4bit"] = _machine("whole", "Load T5 whole, one layer at a time, or in 8 or 4 bits.")
    tile_size: int = _machine(0, "Side of the tiles to decode in, in pixels. 0 disables tiling.", ge=0, le=MOST_SIDE, multiple_of=8)
    memory_limit: Number = _machine(0.0, "Memory that a run may take, in GB. 0 stands for all free memory.", ge=0)
    stages_path: OutputPath = _machine("", "Folder for a run in resumable stages, with one network in memory at a time.")
    upscale_from: InputPath = _machine("", "Folder of a finished run in stages, whose images are upscaled.")
    strength: Number = _sampling(0.5, "Share of the denoising steps that image, or an upscaled image, goes through.", gt=0, le=1)

    image: InputPath = _sampling("", "Image file to begin with, of the ratio of image_height to image_width.")
    mask: InputPath = _sampling("", "Image file that is white where image is painted anew. The rest is kept.")

    controlnet: InputPath = _model("", "ControlNet file or folder. Official files hold the base model too.")
    control_image: InputPath = _sampling("", "Condition image of the ControlNet, such as edges.")
    control_edges: bool = _sampling(False, "Take the edges of control_image, as this ControlNet was trained on, as the condition.")
    controlnet_conditioning_scale: Number = _sampling(1.0, "Scale of what the ControlNet adds.", ge=0, le=100)
    control_guidance_start: Number = _sampling(0.0, "Share of the steps from which the ControlNet acts.", ge=0, lt=1)
    control_guidance_end: Number = _sampling(1.0, "Share of the steps up to which the ControlNet acts.", gt=0, le=1)
    guess_mode: bool = _sampling(False, "Apply the ControlNet only to the prediction with the prompt, so that guidance strengthens the condition too.")

    lora: LoraFiles = _model([], "LoRA files, folders or hub ids to apply; PATH:0.5 scales one.")

    @model_validator(mode="after")
    def _consistent(self) -> InferenceConfig:
        if bool(self.prompt) == bool(self.prompt_path):
            raise ValueError("expected either prompt, a list of at least one text, or prompt_path")
        if isinstance(self.negative_prompt, list) and self.prompt:
            negatives, prompts = len(self.negative_prompt), len(self.prompt)
            if negatives not in (0, 1, prompts):
                raise ValueError(f"{negatives} negative prompts for {prompts} prompts; expected one, or one for each")
        _require_weights(self)
        if self.kv_compress and not self.kv_compress_layer:
            raise ValueError("kv_compress is on, so expected at least one layer in kv_compress_layer")
        if self.mask and not self.image:
            raise ValueError("mask is given, so expected image, the image to paint in")
        if bool(self.controlnet) != bool(self.control_image):
            raise ValueError("expected controlnet and control_image together: the ControlNet and its condition image")
        if self.control_edges and not self.control_image:
            raise ValueError("control_edges is on, so expected controlnet and control_image, whose edges are taken")
        if self.controlnet and (self.image or self.stages_path or self.pag_scale):
            raise ValueError("controlnet goes neither with image nor with stages_path nor with pag_scale")
        if self.control_guidance_start >= self.control_guidance_end:
            raise ValueError("control_guidance_start must be below control_guidance_end")
        _require_used(self, NEEDS)
        if self.image and self.stages_path:
            raise ValueError("image and stages_path exclude each other; draw from an image without stages")
        if self.upscale_from and not self.stages_path:
            raise ValueError("upscale_from is given, so expected stages_path, the folder of the larger images' state")
        unit = 1 if self.use_resolution_binning else 16
        if self.image_height % unit or self.image_width % unit:
            raise ValueError(
                f"image_height and image_width are {self.image_height} and {self.image_width}; expected multiples of "
                "16, or use_resolution_binning with a model that has published resolutions"
            )
        return self


class TrainConfig(ModelKeys):
    """Configuration of ``pixart-nb train``: the keys of ``configs/train/*.yaml``.

    The defaults are the published PixArt-Sigma recipe. Precision and devices default to what a CPU can do.
    """

    from_scratch: bool = _model(False, "Initialize the transformer at random in place of loading its weights.")
    zero_cross_attention: bool = _model(True, "Initialize the cross-attention output with zeros, from scratch only.")

    json_path: InputPath = _data(..., "Label file: a list of path, prompt, sharegpt4v, height, width, ratio.", min_length=1)
    image_dir: InputPath = _data(..., "Folder of the images that the label file names.", min_length=1)
    real_prompt_ratio: Number = _data(0.5, "Probability of using prompt as the caption, else sharegpt4v.", ge=0, le=1)
    class_dropout_prob: Number = _data(0.1, "Probability of the empty caption, for classifier-free guidance.", ge=0, le=1)
    clean_caption: bool = _data(True, "Clean captions in the way prompts are cleaned.")
    multi_scale: bool = _data(False, "Train at the published resolution nearest to the aspect ratio of each image.")
    valid_num: int = _data(0, "Leave out resolutions with fewer images than this.", ge=0)
    feature_cache: OutputPath = _data("", "Folder for latents and caption embeddings, which are computed once.")
    feature_dtype: Literal["fp16", "fp32"] = _data("fp16", "Floating-point type of the stored features.")
    num_parallel_workers: int = _data(2, "Number of batches that are read ahead.", ge=0, le=256)

    pe_interpolation: Number = _stage(0.0, "Interpolation of the positions. 0 keeps the checkpoint's extent.", ge=0, le=1024)
    kv_compress_init: Literal["average", "random"] = _stage("average", "Initialization of new compression convolutions.")
    start_report: bool = _stage(True, "Measure the loss before the first step and write start.json.")

    epochs: int = _rate(100, "Number of passes over the data.", ge=1, le=10**6)
    steps: int | None = _rate(None, "Number of updates, in place of epochs.", ge=1, le=_MOST_STEPS)
    scheduler: Literal["constant", "cosine_decay", "linear_decay"] = _rate("constant", "Schedule after the warm-up.")
    start_learning_rate: Number = _rate(2e-5, "Learning rate after the warm-up.", gt=0)
    end_learning_rate: Number = _rate(0.0, "Learning rate at the end of a decaying schedule.", ge=0)
    warmup_steps: int = _rate(1000, "Number of updates in which the learning rate rises.", ge=0, le=_MOST_STEPS)
    auto_lr: Literal["", "sqrt", "linear"] = _rate("sqrt", "Scale the learning rate with images per update / 256.")

    optim: Literal["adamw", "came"] = _update("came", "Optimizer.")
    adamw_betas: list[Number] = _update([0.9, 0.999], "AdamW betas.", min_length=2, max_length=2)
    adamw_eps: Number = _update(1e-10, "AdamW epsilon.", gt=0)
    came_betas: list[Number] = _update([0.9, 0.999, 0.9999], "CAME betas.", min_length=3, max_length=3)
    came_eps: list[Number] = _update([1e-30, 1e-16], "CAME epsilons.", min_length=2, max_length=2)
    weight_decay: Number = _update(0.0, "Decoupled weight decay.", ge=0)
    batch_size: BatchSize = 64
    gradient_accumulation_steps: int = _update(1, "Number of batches per update.", ge=1, le=65536)
    clip_grad: bool = _update(True, "Clip the norm of the gradient.")
    max_grad_norm: Number = _update(0.01, "Maximum norm of the gradient when it is clipped.", gt=0)
    use_ema: bool = _update(True, "Keep an exponential moving average of the weights, which becomes the result.")
    ema_rate: Number = _update(0.9999, "Decay rate of the exponential moving average.", ge=0, lt=1)
    snr_gamma: Number = _update(0.0, "Gamma of min-SNR loss weighting; 5 in its paper. 0 disables it.", ge=0)
    noise_offset: Number = _update(0.0, "Scale of the noise offset per channel; 0.1 is usual. 0 disables it.", ge=0)
    timestep_sampling: Literal["uniform", "logit_normal"] = _update("uniform", "Distribution of the training timesteps.")
    seed: Seed = 42

    loss_scaler_type: Literal["static", "dynamic"] = _precision("dynamic", "Kind of loss scaling, in fp16 only.")
    init_loss_scale: Number = _precision(65536.0, "Loss scale at the start.", ge=1)
    loss_scale_factor: Number = _precision(2.0, "Factor by which the loss scale changes.", gt=1)
    scale_window: int = _precision(1000, "Updates without overflow before the loss scale rises.", ge=1, le=_MOST_STEPS)
    recompute: bool = _precision(False, "Recompute activations in the backward pass: less memory, more time.")

    lora_rank: int = _lora(0, "Rank of a LoRA that is trained in place of all weights. 0 trains the weights.", ge=0, le=4096)
    lora_alpha: Number = _lora(0.0, "Alpha of the LoRA. 0 stands for the rank.", ge=0)
    lora_dropout: Number = _lora(0.0, "Dropout probability of the LoRA layers.", ge=0, lt=1)
    lora_target_modules: Texts = _lora([], "diffusers' names of the layers with a LoRA. By default, those of both attentions.")
    use_dora: bool = _lora(False, "Train a weight-decomposed LoRA (DoRA).")

    copy_blocks_num: int = _control(0, "Number of blocks that a ControlNet copies and trains in place of all weights, 13 in PixArt-delta. 0 trains the weights.", ge=0, lt=_MOST_LAYERS)
    controlnet: InputPath = _control("", "ControlNet file or folder to continue training from. Blocks that it does not copy start as copies of the model's, as all do without one.")
    control_dir: InputPath = _control("", "Folder of condition images of the names of those in image_dir. Empty takes the edges of the images.")
    control_edge_sigma: Number = _control(EDGE_SIGMA, "Standard deviation in pixels of the Gaussian filter before edges are found. Smaller details have no edge.", gt=0, le=100)
    control_edge_threshold: Number = _control(EDGE_THRESHOLD, "Difference in brightness, 0 to 1, from which an edge begins.", gt=0, le=1)
    control_edge_width: int = _control(EDGE_WIDTH, "Width of the lines in pixels, an odd number. Some VAEs encode a line of one pixel as almost black.", ge=1, le=31)
    validation_control_images: Paths = _control([], "Condition images of the validation prompts, one for each; without control_dir their edges are taken.")

    objective: Literal["diffusion", "lcm", "dmd"] = _distil("diffusion", "Diffusion loss, latent consistency distillation (LCM), or distribution matching to one step (DMD).")
    num_ddim_timesteps: int = _distil(50, "LCM: steps of the teacher's solver, a divisor of 1000. The student is sampled at some of them.", ge=1, le=500)
    w_min: Number = _distil(GUIDANCE_SCALE, "LCM, DMD: lowest guidance of the teacher, 1 less than guidance_scale means. Values up to w_max are drawn.", ge=0, le=1000)
    w_max: Number = _distil(GUIDANCE_SCALE, "LCM, DMD: highest guidance of the teacher. Equal to w_min it is fixed, as in the official code.", ge=0, le=1000)
    loss_type: Literal["huber", "l2"] = _distil("huber", "LCM: distance between student and target.")
    huber_c: Number = _distil(0.001, "LCM: constant of the pseudo-Huber distance.", gt=0, le=1000)

    visualize: bool = _look(False, "Generate the validation prompts during training.")
    visualize_interval: int = _look(5, "Epochs between validation images.", ge=1, le=10**6)
    visualize_steps: int | None = _look(None, "Updates between validation images, in place of epochs.", ge=1, le=_MOST_STEPS)
    validation_prompts: Texts = _look(list(VALIDATION_PROMPTS), "Prompts of the validation images.")
    validation_negative_prompts: list[str] = _look([], "Negative prompts of the validation images: none, or one for each.")
    validation_json_path: InputPath = _look("", "Label file of images for the validation loss. They are never trained on.")
    validation_image_dir: InputPath = _look("", "Folder of the images of validation_json_path. Empty is image_dir.")
    sampling_method: Method = "dpm"
    log_loss_interval: int = _look(1, "Updates between two rows of curve.csv.", ge=1, le=_MOST_STEPS)
    tensorboard: bool = _look(True, "Write the curves for TensorBoard too.")

    output_path: OutputFolder = "outputs/train"
    ckpt_save_interval: int = _output(5, "Epochs between checkpoints.", ge=1, le=10**6)
    ckpt_save_steps: int | None = _output(None, "Updates between checkpoints, in place of epochs.", ge=1, le=_MOST_STEPS)
    ckpt_max_keep: int = _output(3, "Number of checkpoints that are kept.", ge=1, le=10**6)

    hsdp_optimizer_level: Literal["level1"] = _machine("level1", "Processes share the optimizer states, as in ZeRO stage 1.")
    hsdp_shard_size: Literal[-1, 1] = _machine(-1, "Processes that share the optimizer states. -1 is all, 1 shares nothing.")
    hsdp_threshold: int = _machine(64, "Size in KB below which an optimizer state is not shared.", ge=0, le=2**40)

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        _require_weights(self)
        if self.kv_compress and not (self.kv_compress_layer and self.kv_compress_scale_factor > 1):
            raise ValueError(
                "kv_compress is on, so expected at least one layer in kv_compress_layer, and a "
                "kv_compress_scale_factor above 1"
            )
        negatives, prompts = len(self.validation_negative_prompts), len(self.validation_prompts)
        if self.visualize and not prompts:
            raise ValueError("visualize is on, so expected at least one text in validation_prompts")
        if negatives not in (0, prompts):
            raise ValueError(
                f"{negatives} validation_negative_prompts for {prompts} validation_prompts; expected none, or one for each"
            )
        betas = [beta for beta in (*self.adamw_betas, *self.came_betas) if not 0 <= beta < 1]
        if betas:
            raise ValueError(f"betas {betas}: expected numbers from 0 to below 1")
        _require_used(self, _LORA_NEEDS)
        if self.lora_rank and self.from_scratch:
            raise ValueError("lora_rank and from_scratch exclude each other: a LoRA changes a trained model")
        self._check_controlnet()
        self._check_distillation()
        if self.sample_size % 2:
            raise ValueError(f"sample_size is {self.sample_size}; expected an even number of latent cells")
        return self

    def _check_controlnet(self) -> None:
        if self.copy_blocks_num and (self.lora_rank or self.from_scratch):
            raise ValueError("copy_blocks_num goes neither with lora_rank nor with from_scratch: a ControlNet copies blocks of a trained model")
        if not self.copy_blocks_num and (self.controlnet or self.control_dir or self.validation_control_images):
            raise ValueError("controlnet, control_dir and validation_control_images are of a ControlNet; expected copy_blocks_num, the number of its blocks")
        if self.control_edge_width % 2 == 0:
            raise ValueError(f"control_edge_width is {self.control_edge_width}; expected an odd number of pixels")
        images, prompts = len(self.validation_control_images), len(self.validation_prompts)
        if self.copy_blocks_num and self.visualize and images != prompts:
            raise ValueError(f"{images} validation_control_images for {prompts} validation_prompts; expected one for each")

    def _check_distillation(self) -> None:
        if 1000 % self.num_ddim_timesteps:
            raise ValueError(f"num_ddim_timesteps is {self.num_ddim_timesteps}; expected a divisor of 1000, such as 50")
        if self.w_min > self.w_max:
            raise ValueError(f"w_min is {self.w_min} and w_max {self.w_max}; expected w_min up to w_max")
        if self.objective != "diffusion" and (self.copy_blocks_num or self.from_scratch or self.snr_gamma):
            raise ValueError(f"objective {self.objective} distils a trained model; it goes neither with copy_blocks_num nor from_scratch nor snr_gamma")
        if self.objective == "dmd" and (self.lora_rank or self.noise_offset):
            raise ValueError("objective dmd trains two networks from plain noise; it goes neither with lora_rank nor with noise_offset")
# fmt: on


def _require_weights(config: ModelKeys) -> None:
    names = ("checkpoint", *ROOTS)
    missing = [name for name in names if not getattr(config, name)]
    if not config.model and missing:
        raise ValueError(f"expected model, or all of {', '.join(names)}; not given: {', '.join(missing)}")


#: Keys of what a ControlNet adds: arguments of its pipeline.
CONTROL_KEYS = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "guess_mode")
#: Keys of sampling and of training that change nothing unless one of others is given.
NEEDS = {
    "strength": ("image", "upscale_from"), "pag_adaptive_scale": ("pag_scale",), "pag_applied_layers": ("pag_scale",),
} | dict.fromkeys(CONTROL_KEYS, ("controlnet",))  # fmt: skip
_LORA_NEEDS = dict.fromkeys(("lora_alpha", "lora_dropout", "lora_target_modules", "use_dora"), ("lora_rank",))


#: Keys that change nothing without another one. Published files have them without it, so only options are named.
_OPTION_NEEDS = (
    dict.fromkeys(("kv_compress_sampling", "kv_compress_scale_factor", "kv_compress_layer"), "kv_compress")
    | dict.fromkeys(("control_edge_sigma", "control_edge_threshold", "control_edge_width"), "copy_blocks_num")
    | dict.fromkeys(("num_ddim_timesteps", "w_min", "w_max", "loss_type", "huber_c"), "objective lcm")
    | {
        "validation_image_dir": "validation_json_path",
        "valid_num": "multi_scale",
        "max_grad_norm": "clip_grad",
        "zero_cross_attention": "from_scratch",
    }
)


def unused_options(config: ModelKeys, options: Iterable[str]) -> list[str]:
    """Return a sentence for each option without effect in a configuration."""
    needs = {key: _OPTION_NEEDS[key] for key in options if key in _OPTION_NEEDS}
    return [f"{key} changes nothing without {name}" for key, name in needs.items() if not _is_on(config, name)]


def _is_on(config: ModelKeys, name: str) -> bool:
    return config.objective != "diffusion" if name == "objective lcm" else bool(getattr(config, name))


def _require_used(config: ModelKeys, needs: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse a value other than the default for a key without effect, as none of those that it needs is given."""
    for key, others in needs.items():
        value = getattr(config, key)
        if value != type(config).model_fields[key].default and not any(getattr(config, name) for name in others):
            raise ValueError(f"{key} is {value!r}, which changes nothing without {' or '.join(others)}; give both")


#: Keys that may change when a training resumes: no number of the training depends on them.
_FREE_KEYS = {
    "visualize", "visualize_interval", "visualize_steps", "validation_prompts", "validation_negative_prompts",
    "validation_json_path", "sampling_method", "sampling_steps", "guidance_scale", "log_loss_interval", "tensorboard",
    "output_path", "ckpt_save_interval", "ckpt_save_steps", "ckpt_max_keep", "num_parallel_workers", "recompute",
    "use_parallel", "device_target", "start_report", "hsdp_optimizer_level", "hsdp_shard_size", "hsdp_threshold",
    "validation_control_images", "validation_image_dir",
}  # fmt: skip
#: Keys that hold a path. A training depends on the content, which is fingerprinted.
_PATH_KEYS = {"model", "checkpoint", *ROOTS, "json_path", "image_dir", "feature_cache", "control_dir", "controlnet"}
#: Keys that are not named at their defaults, so that trainings from before there were such keys resume.
_LATER_KEYS = {
    "copy_blocks_num", "control_edge_sigma", "control_edge_threshold", "control_edge_width",
    "objective", "num_ddim_timesteps", "w_min", "w_max", "loss_type", "huber_c",
}  # fmt: skip


def training_identity(config: TrainConfig, workers: int = 1) -> dict[str, Any]:
    """Return the settings that a training must share with the one that it resumes.

    The same batches come from many workers or one, and a constant learning rate does not depend on the length of the
    training, so neither is part of it.
    """
    settings = {key: value for key, value in config.model_dump().items() if key not in _FREE_KEYS | _PATH_KEYS}
    for key in _LATER_KEYS:
        if settings[key] == TrainConfig.model_fields[key].default:
            del settings[key]
    settings["batch_size"] = config.batch_size * workers
    settings["features from a cache"] = bool(config.feature_cache)
    if config.scheduler == "constant":
        del settings["steps"], settings["epochs"]
    return settings
