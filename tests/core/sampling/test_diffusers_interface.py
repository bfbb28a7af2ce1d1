"""Calls that were written for diffusers or mindone work, or say in one line what has no meaning here."""

import json

import numpy as np
import pytest
from reference_data import diffusers, relative_error
from transformers import T5Tokenizer

from pixart_nb import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaImg2ImgPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SASolverScheduler,
    T5EncoderModel,
    Transformer2DModel,
)
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models import low_precision
from pixart_nb.core.models.low_precision import inference_dtype
from pixart_nb.core.sampling.text import TextTokenizer

FOLDER = diffusers("sigma")[0]
CALL = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
pytestmark = pytest.mark.filterwarnings("ignore:the tokenizer")


@pytest.fixture(scope="module")
def pipe():
    pipe = PixArtSigmaPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, prompt="a red cup", **changes):
    return pipe(prompt, generator=np.random.default_rng(0), **CALL | changes)[0]


# ---- the call


def test_a_negative_prompt_goes_beside_given_prompt_embeddings_also_as_numpy(pipe):
    expected = drawn(pipe, negative_prompt="night")
    embeds, mask, negative, negative_mask = pipe.encode_prompt("a red cup", negative_prompt="night")
    given = {"prompt_embeds": embeds.asnumpy(), "prompt_attention_mask": mask.asnumpy()}
    assert relative_error(drawn(pipe, None, negative_prompt="night", **given), expected) < 1e-4
    given = {"negative_prompt_embeds": negative.asnumpy(), "negative_prompt_attention_mask": negative_mask}
    assert relative_error(drawn(pipe, **given), expected) < 1e-4
    with pytest.warns(UserWarning, match="negative_prompt is ignored beside negative_prompt_embeds"):
        drawn(pipe, negative_prompt="snow", **given)


def test_one_of_height_and_width_is_enough(pipe):
    side = 8 * pipe.transformer.config.input_size
    assert drawn(pipe, height=None, width=64).shape[2:] == (side // 8, 8)
    assert drawn(pipe, height=96, width=None).shape[2:] == (12, side // 8)
    with pytest.raises(ValueError, match="expected whole numbers of pixels"):
        drawn(pipe, height="64")


def test_tensors_of_torch_are_refused_with_the_reason(pipe):
    with pytest.raises(ValueError, match=r"output_type is 'pt', a tensor; use 'np'"):
        drawn(pipe, output_type="pt")


def test_options_without_a_meaning_are_named_and_misspelt_ones_are_refused(pipe):
    with pytest.warns(UserWarning, match="no meaning here, ignored: cross_attention_kwargs, mask_feature$"):
        drawn(pipe, cross_attention_kwargs={}, mask_feature=True, ip_adapter_image=None)
    with pytest.raises(ValueError, match="no parameter 'num_inference_step'; did you mean 'num_inference_steps'"):
        drawn(pipe, num_inference_step=3)


def test_the_callback_of_each_step_may_change_latents_and_end_the_run(pipe):
    seen = []

    def halve(pipe_, step, timestep, tensors):
        seen.append((step, timestep))
        pipe_._interrupt = step == 1
        return {"latents": tensors["latents"] * 0.5}

    halved = drawn(pipe, num_inference_steps=4, callback_on_step_end=halve)
    assert [step for step, _ in seen] == [0, 1]
    assert pipe.interrupt
    plain = []
    drawn(pipe, num_inference_steps=4, callback=lambda *step: plain.append(step[2].copy()))
    assert relative_error(halved, plain[1] * 0.5) > 0.01  # the second step began with what the first was made
    assert not pipe.interrupt


def test_guidance_rescale_keeps_the_deviation_of_the_conditional_prediction(pipe):
    plain, none, full = (
        drawn(pipe, **options) for options in ({}, {"guidance_rescale": 0.0}, {"guidance_rescale": 1.0})
    )
    assert np.array_equal(plain, none)
    assert not np.allclose(plain, full)
    predicted = []

    def keep(predict):
        return lambda latents, timestep: predicted.append(predict(latents, timestep)) or predicted[-1]

    for scale, rescale in ((1.0001, 0.0), (4.5, 1.0)):
        call = {"height": 64, "width": 64, "num_inference_steps": 1, "latents": np.ones((1, 4, 8, 8), np.float32)}
        list(pipe.sample("a cup", guidance_scale=scale, guidance_rescale=rescale, wrap_predict=keep, **call))
    conditional, rescaled = (prediction.noise.std() for prediction in predicted)
    assert rescaled == pytest.approx(conditional, rel=1e-3)


def test_the_progress_bar_shows_the_steps_and_can_be_switched_off(capsys):
    pipe = PixArtSigmaPipeline.from_pretrained(FOLDER)
    drawn(pipe)
    assert "2/2" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    drawn(pipe)
    assert capsys.readouterr().err == ""


# ---- loading, saving, sharing


@pytest.mark.parametrize("dtype", ["float16", "fp16", np.float16, np.dtype("float16"), ms.float16])
def test_a_dtype_is_given_in_any_way(dtype):
    pipe = PixArtSigmaPipeline.from_pretrained(FOLDER, dtype, text_encoder=None, tokenizer=None, vae=None)
    assert pipe.dtype == inference_dtype(ms.float16)
    pipe = PixArtSigmaPipeline.from_pretrained(FOLDER, torch_dtype=dtype, text_encoder=None, tokenizer=None, vae=None)
    assert pipe.dtype == inference_dtype(ms.float16)
    assert pipe.to("cpu", dtype) is pipe  # as it was asked for
    transformer = PixArtTransformer2DModel.from_pretrained(FOLDER, subfolder="transformer", dtype=dtype)
    assert PixArtSigmaPipeline(transformer=transformer).dtype == inference_dtype(ms.float16)


def test_components_load_by_the_names_of_diffusers_and_make_the_same_pipeline(pipe):
    ignored = r"from_pretrained: no meaning here, ignored: low_cpu_mem_usage"
    options = {"subfolder": "transformer", "torch_dtype": "float32", "use_safetensors": True}
    with pytest.warns(UserWarning, match=ignored):
        transformer = Transformer2DModel.from_pretrained(FOLDER, **options, low_cpu_mem_usage=True)
    with pytest.warns(UserWarning, match=ignored):
        text_encoder = T5EncoderModel.from_pretrained(FOLDER, subfolder="text_encoder", low_cpu_mem_usage=True)
    parts = {"transformer": transformer, "text_encoder": text_encoder}
    parts["vae"] = AutoencoderKL.from_pretrained(FOLDER / "vae", mindspore_dtype=ms.float32)
    parts["tokenizer"] = T5Tokenizer.from_pretrained(FOLDER / "tokenizer")
    own = PixArtSigmaPipeline.from_pretrained(FOLDER, **parts)
    own.set_progress_bar_config(disable=True)
    assert np.array_equal(drawn(own, output_type="np"), drawn(pipe, output_type="np"))
    assert PixArtTransformer2DModel is Transformer2DModel


def test_a_component_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(CheckpointError, match="lacks the folders"):
        AutoencoderKL.from_pretrained(FOLDER, subfolder="vea")
    with pytest.raises(PixArtNBError, match=r"from_pretrained has no parameter 'sub_folder'; did you mean 'subfolder'"):
        AutoencoderKL.from_pretrained(FOLDER, sub_folder="vae")
    with pytest.raises(CheckpointError, match=r"does not exist.*Give a folder with config\.json and weights"):
        AutoencoderKL.from_pretrained(FOLDER / "autoencoder")
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, source, revision: [])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: calls.append((a, k)) or FOLDER / "vae")
    AutoencoderKL.from_pretrained("owner/vae", revision="v1")
    ((source,), options), *_ = calls
    assert source == "owner/vae" and options["revision"] == "v1" and "config.json" in options["allow_patterns"]


def test_a_tokenizer_of_transformers_is_called_and_saved(pipe, tmp_path):
    tokenizer = T5Tokenizer.from_pretrained(FOLDER / "tokenizer")
    assert pipe.tokenizer("a red cup").input_ids == tokenizer("a red cup").input_ids
    assert pipe.tokenizer.pad_token_id == 0
    PixArtSigmaPipeline(tokenizer).save_pretrained(tmp_path)
    saved = TextTokenizer(tmp_path / "tokenizer")
    assert np.array_equal(saved.tokenize(["a red cup"], 12), pipe.tokenizer.tokenize(["a red cup"], 12))


def test_options_of_from_pretrained_without_a_meaning_are_named():
    parts = {"transformer": None, "vae": None, "text_encoder": None, "tokenizer": None}
    with pytest.warns(UserWarning, match="ignored: device_map, low_cpu_mem_usage"):
        PixArtSigmaPipeline.from_pretrained(FOLDER, device_map="auto", low_cpu_mem_usage=True, **parts)
    with pytest.raises(ValueError, match="no parameter 'text_encoders'; did you mean 'text_encoder'"):
        PixArtSigmaPipeline.from_pretrained(FOLDER, text_encoders=None, **parts)


@pytest.mark.parametrize(("name", "cls"), [("sigma", PixArtSigmaPipeline), ("alpha", PixArtAlphaPipeline)])
def test_a_saved_pipeline_draws_the_same_and_keeps_its_class(tmp_path, name, cls):
    pipe = cls.from_pretrained(diffusers(name)[0])
    pipe.scheduler = "euler"
    pipe.save_pretrained(tmp_path / "saved")
    again = cls.from_pretrained(tmp_path / "saved")
    assert again.scheduler == pipe.scheduler
    assert np.array_equal(drawn(pipe), drawn(again))
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == cls.__name__


def test_a_pipeline_is_not_saved_beside_shards_that_would_be_read_in_its_place(pipe, tmp_path):
    shards = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    shards.parent.mkdir()
    shards.write_text('{"weight_map": {}}')
    with pytest.raises(PixArtNBError, match=r"transformer holds other weights .*index\.json.*choose an empty folder"):
        pipe.save_pretrained(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [shards]


def test_pipelines_share_components(pipe):
    other = PixArtAlphaPipeline.from_pipe(pipe, scheduler="euler")
    assert other.transformer is pipe.transformer
    assert type(other.scheduler).__name__ == "EulerDiscreteScheduler"
    assert set(pipe.components) == {"tokenizer", "text_encoder", "transformer", "scheduler", "vae"}
    assert np.array_equal(drawn(PixArtSigmaPipeline(**pipe.components)), drawn(pipe))


def test_devices_have_no_meaning_and_another_dtype_is_an_error(pipe, recwarn, monkeypatch):
    assert pipe.to(pipe.device) is pipe
    assert pipe.to(ms.float32) is pipe
    assert not recwarn
    with pytest.warns(UserWarning, match=r"to\('cuda'\) has no effect"):
        assert pipe.to("cuda") is pipe
    monkeypatch.setattr(low_precision, "unsupported", lambda: "")
    for half in (ms.float16, ms.bfloat16):
        with pytest.raises(ValueError, match="the weights are Float32"):
            pipe.to(half)
    with pytest.warns(UserWarning, match="resumable stages"):
        pipe.enable_model_cpu_offload()
    pipe.enable_vae_tiling()
    pipe.disable_vae_tiling()


def test_a_device_given_with_other_options_is_named_once(pipe):
    with pytest.warns(UserWarning, match="no effect") as named:
        assert pipe.to(device="cuda", dtype=None, non_blocking=True, silence_dtype_warnings=True) is pipe
    assert [str(warning.message) for warning in named] == ["to('cuda') has no effect: this is CPU"]


def test_a_model_is_named_as_in_diffusers_and_options_of_the_hub_go_there(monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: calls.append(k) or str(FOLDER))
    parts = dict.fromkeys(("transformer", "text_encoder", "vae", "tokenizer"))
    options = {"revision": "v1", "cache_dir": "cache", "local_files_only": True}
    for cls in (PixArtSigmaPipeline, PixArtSigmaPAGPipeline):
        pipe = cls.from_pretrained(pretrained_model_name_or_path="owner/name", **parts, **options)
        assert type(pipe.scheduler) is type(PixArtSigmaPipeline.from_pretrained(FOLDER, **parts).scheduler)
        patterns = {"allow_patterns": ["model_index.json", "scheduler/*"], "ignore_patterns": []}
        assert calls.pop() == options | patterns
    assert T5EncoderModel.from_pretrained(pretrained_model_name_or_path=FOLDER, subfolder="text_encoder")
    with pytest.raises(PixArtNBError, match="the model is None; give its folder"):
        PixArtSigmaPipeline.from_pretrained()


def test_a_pipeline_without_some_components_is_saved_and_loaded_without_them(pipe, tmp_path):
    part = PixArtSigmaPipeline(transformer=pipe.transformer, scheduler=pipe.scheduler)
    part.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer"] == index["vae"] == [None, None]
    again = PixArtSigmaPipeline.from_pretrained(tmp_path)
    assert again.text_encoder is again.tokenizer is again.vae is None
    assert again.scheduler == pipe.scheduler and again.transformer is not None


@pytest.mark.parametrize("option", ["load_in_8bit", "load_in_4bit", "stream"])
def test_a_text_encoder_that_is_not_whole_is_not_saved(tmp_path, option):
    encoder = T5EncoderModel.from_pretrained(FOLDER, subfolder="text_encoder", **{option: True})
    with pytest.raises(PixArtNBError, match="text encoder is streamed or in 8 or 4 bits"):
        PixArtSigmaPipeline(text_encoder=encoder).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_other_names_and_dtypes_of_from_pipe_are_named(pipe, monkeypatch):
    monkeypatch.setattr(low_precision, "unsupported", lambda: "")
    with pytest.warns(UserWarning, match="from_pipe: no meaning here, ignored: safety_checker"):
        other = PixArtSigmaPAGPipeline.from_pipe(pipe, safety_checker=1, torch_dtype="float32", pag_applied_layers="1.")
    assert other.pag_applied_layers == ["1."]
    with pytest.raises(PixArtNBError, match="the weights are Float32"):
        PixArtSigmaPipeline.from_pipe(pipe, torch_dtype="float16")
    with pytest.raises(PixArtNBError, match="no parameter 'transformers'; did you mean 'transformer'"):
        PixArtSigmaPipeline.from_pipe(pipe, transformers=None)


def test_a_scheduler_is_saved_and_loaded(pipe, tmp_path):
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    assert type(pipe.scheduler).from_pretrained(tmp_path, subfolder="scheduler") == pipe.scheduler
    assert type(pipe.scheduler).from_pretrained(tmp_path / "scheduler", subfolder=None) == pipe.scheduler


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("guidance_scale", "4.5", "guidance_scale is '4.5'; expected a finite number"),
        ("guidance_scale", float("nan"), "guidance_scale is nan; expected a finite number"),
        ("guidance_scale", None, "guidance_scale is None; expected a finite number"),
        ("guidance_rescale", "x", "guidance_rescale is 'x'; expected a finite number"),
        ("guidance_rescale", float("inf"), "guidance_rescale is inf; expected a finite number"),
        ("num_images_per_prompt", 2.0, "num_images_per_prompt is 2.0; expected a whole number of at least 1"),
        ("num_images_per_prompt", None, "num_images_per_prompt is None; expected a whole number of at least 1"),
        ("num_images_per_prompt", 0, "num_images_per_prompt is 0; expected a whole number of at least 1"),
        ("max_sequence_length", 0, "max_sequence_length is 0; expected a whole number of at least 1"),
        ("max_sequence_length", "3", "max_sequence_length is '3'; expected a whole number of at least 1"),
        ("max_sequence_length", 10**9, "max_sequence_length is 1000000000; expected at most 16384"),
        ("height", 10**9, "height and width are 1000000000 and 64; expected at most 16384 pixels"),
        ("eta", "x", "eta is 'x'; expected a finite number"),
        ("prompt", 5, "prompt is 5; expected a text or a list of at least one text"),
        ("prompt", {"a cat": 1}, "prompt is {'a cat': 1}; expected a text or a list"),
        ("negative_prompt", 5, "negative_prompt is 5; expected a text, or a list with one for each prompt"),
        ("negative_prompt", [None], r"negative_prompt is \[None\]; expected a text, or a list"),
        ("latents", "x", "latents are of str; expected an array of numbers"),
        ("latents", [[1], [1, 2]], "latents are of list; expected an array of numbers"),
        ("latents", np.full((1, 4, 8, 8), np.nan), "latents hold values that are not finite"),
        ("callback", 5, "callback is 5; expected a function"),
        ("callback_steps", "x", "callback_steps is 'x'; expected a whole number of at least 1"),
        ("callback_on_step_end_tensor_inputs", ["prompt_embeds"], r"expected \['latents'\]"),
    ],
)
def test_a_wrong_argument_says_what_was_expected(pipe, argument, value, message):
    with pytest.raises(PixArtNBError, match=message):
        pipe(**{"prompt": "a cup"} | CALL | {argument: value})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros(3), "returned a ndarray; expected"),
        ({"prompt_embeds": 1}, r"returned \['prompt_embeds'\]; expected"),
        ({"latents": np.zeros((3, 3))}, r"latents of shape \(3, 3\); expected \(1, 4, 8, 8\)"),
    ],
)
def test_what_a_callback_may_return_is_said(pipe, returned, message):
    with pytest.raises(PixArtNBError, match=message):
        drawn(pipe, callback_on_step_end=lambda *step: returned, callback_on_step_end_tensor_inputs=None)


def test_results_of_the_autoencoder_and_sizes_have_diffusers_names(pipe):
    z = np.zeros((1, 4, 2, 2), np.float32)
    images = pipe.vae.decode(z).sample
    assert np.array_equal(images.asnumpy(), pipe.vae.decode(z, return_dict=False)[0].asnumpy())
    assert pipe.vae.encode(images).latent_dist.mode().shape == (1, 4, 2, 2)
    assert pipe.transformer.config.sample_size * pipe.vae_scale_factor == 8 * pipe.transformer.config.input_size


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[0.0, -1e4]], "prompt_attention_mask holds other values than 1 for a token and 0 for padding"),
        ([[1, float("nan")]], "prompt_attention_mask holds other values"),
        ("x", "must be arrays of numbers"),
    ],
)
def test_masks_of_another_form_are_refused(pipe, mask, message):
    embeds = np.zeros((1, 2, pipe.transformer.config.caption_channels))
    with pytest.raises(PixArtNBError, match=message):
        drawn(pipe, None, prompt_embeds=embeds, prompt_attention_mask=mask)


@pytest.mark.parametrize("layers", [5, None, [5]])
def test_names_of_perturbed_layers_are_texts(pipe, layers):
    with pytest.raises(PixArtNBError, match="expected names such as"):
        PixArtSigmaPAGPipeline.from_pipe(pipe).set_pag_applied_layers(layers)


def test_numbers_and_lists_of_numpy_serve_as_arguments(pipe):
    numpy = {"guidance_scale": np.float32(4.5), "height": np.int64(64), "num_images_per_prompt": np.int32(1)}
    assert np.array_equal(drawn(pipe, np.array(["a red cup"]), **numpy), drawn(pipe, guidance_scale=4.5))


# ---- what would be an image of nothing


def test_a_prompt_that_is_cleaned_away_is_said(pipe):
    with pytest.warns(UserWarning, match="'一只猫' is empty after caption cleaning.*drawn without a prompt"):
        drawn(pipe, "一只猫")
    with pytest.warns(UserWarning, match="'a red 猫': caption cleaning removes '猫'"):
        drawn(pipe, "a red 猫")


def test_words_that_the_bundled_tokenizer_does_not_know_are_named(project):
    parts = {"transformer": None, "vae": None, "scheduler": None}
    encoder = PixArtSigmaPipeline.from_pretrained(project / "data/tiny-sigma", **parts)
    with pytest.warns(UserWarning, match="'glass' and 'castle' are not in the training captions of this model"):
        encoder.encode_prompt("a glass castle, pixel art")
    with pytest.warns(UserWarning, match="'glass' is not in the training captions"):
        encoder.encode_prompt("a red GLASS")
    with pytest.warns(UserWarning, match=r"does not know \['größer'\]"):
        encoder.encode_prompt("a größer cat")


# ---- components that do not fit


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vae", "x"),
        ("vae", ""),
        ("vae", AutoencoderKL),
        ("tokenizer", "x"),
        ("text_encoder", "transformer"),
        ("transformer", "vae"),
    ],
)
def test_a_component_of_another_kind_is_refused_before_it_is_used(pipe, name, part):
    part = getattr(pipe, part) if part in ("transformer", "vae") else part
    with pytest.raises(PixArtNBError, match=f"^{name} is .* expected what .*from_pretrained"):
        PixArtSigmaPipeline.from_pretrained(FOLDER, **{name: part})


def test_a_text_encoder_of_another_model_is_refused_with_both_widths(pipe, project):
    other = T5EncoderModel.from_pretrained(project / "data/tiny-sigma", subfolder="text_encoder")
    with pytest.raises(PixArtNBError, match=r"the text encoder is 128 wide; this transformer takes 24"):
        drawn(PixArtSigmaPipeline.from_pipe(pipe, text_encoder=other))


def test_pipelines_of_an_alpha_model_read_120_tokens(pipe):
    alpha = PixArtAlphaPipeline.from_pretrained(diffusers("alpha")[0])
    assert PixArtSigmaImg2ImgPipeline.from_pipe(alpha).max_sequence_length == 120
    assert PixArtSigmaPipeline.from_pretrained(diffusers("alpha")[0]).max_sequence_length == 120
    assert PixArtSigmaImg2ImgPipeline.from_pipe(pipe).max_sequence_length == 300


def test_what_cannot_be_saved_is_refused_before_anything_is_written(pipe, tmp_path):
    own = PixArtSigmaPipeline.from_pipe(pipe, scheduler=SASolverScheduler(tau_func=lambda t: 1.0))
    with pytest.raises(PixArtNBError, match="tau_func of the scheduler is a function"):
        own.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    pipe.save_pretrained(tmp_path / "old")
    with pytest.raises(PixArtNBError, match="holds vae, which this pipeline lacks"):
        PixArtSigmaPipeline.from_pipe(pipe, vae=None).save_pretrained(tmp_path / "old")
    assert PixArtSigmaPipeline.from_pretrained(tmp_path / "old").vae is not None
    PixArtSigmaPipeline.from_pipe(pipe, vae=None).save_pretrained(tmp_path / "without")
    with pytest.raises(CheckpointError, match=r"has no vae, as its model_index\.json says"):
        AutoencoderKL.from_pretrained(tmp_path / "without", subfolder="vae")


def test_tiles_and_slices_are_switched_as_in_diffusers(pipe):
    vae = AutoencoderKL.from_pretrained(FOLDER, subfolder="vae")
    vae.enable_tiling()
    vae.enable_tiling(False)
    assert not vae.use_tiling
    vae.enable_tiling(use_tiling=True)
    assert vae.use_tiling
    for size in (128.0, "128"):
        with pytest.raises(PixArtNBError, match=r"tile_sample_min_size is .* expected a whole number"):
            vae.enable_tiling(size)
    with pytest.raises(PixArtNBError, match="this pipeline has no VAE"):
        PixArtSigmaPipeline.from_pipe(pipe, vae=None).enable_vae_slicing()


def test_latents_of_an_image_are_drawn_with_or_without_a_generator(pipe):
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32)
    given = pipe.vae.encode(pixels)[0].sample(generator=np.random.default_rng(1)).asnumpy()
    assert np.array_equal(given, pipe.vae.encode(ms.Tensor(pixels))[0].sample(np.random.default_rng(1)).asnumpy())
    assert pipe.vae.encode(pixels)[0].sample().shape == given.shape


def test_bundled_schedulers_are_found_from_any_folder_and_hub_ids_are_said(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert EulerDiscreteScheduler.from_pretrained("data/tiny-sigma", subfolder="scheduler").num_train_timesteps == 1000
    with pytest.raises(PixArtNBError, match=r"take the options of its pipeline: EulerDiscreteScheduler\.from_config"):
        EulerDiscreteScheduler.from_pretrained("owner/model", subfolder="scheduler")


def test_a_network_and_a_pipeline_leave_graph_mode_with_a_warning(pipe):
    try:
        ms.set_context(mode=ms.GRAPH_MODE)
        with pytest.warns(UserWarning, match="it is in PyNative mode now"):
            vae = AutoencoderKL.from_pretrained(FOLDER, subfolder="vae")
        assert np.isfinite(vae.decode(np.zeros((1, 4, 4, 4), np.float32))[0].asnumpy()).all()
        ms.set_context(mode=ms.GRAPH_MODE)
        with pytest.warns(UserWarning, match="it is in PyNative mode now"):
            other = type(pipe).from_pretrained(FOLDER)
        assert ms.get_context("mode") == ms.PYNATIVE_MODE
        assert np.isfinite(other("a cup", num_inference_steps=1, height=64, width=64, output_type="latent")[0]).all()
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
