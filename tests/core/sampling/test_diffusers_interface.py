"""Calls that were written for diffusers or mindone work, or say in one line what has no meaning here."""

import json

import numpy as np
import pytest
from reference_data import diffusers, relative_error

from pixart_nb import PixArtAlphaPipeline, PixArtSigmaPipeline
from pixart_nb.core.backend import ms

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
    assert pipe.dtype == ms.float16
    pipe = PixArtSigmaPipeline.from_pretrained(FOLDER, torch_dtype=dtype, text_encoder=None, tokenizer=None, vae=None)
    assert pipe.dtype == ms.float16


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


def test_pipelines_share_components(pipe):
    other = PixArtAlphaPipeline.from_pipe(pipe, scheduler="euler")
    assert other.transformer is pipe.transformer
    assert type(other.scheduler).__name__ == "EulerDiscreteScheduler"
    assert set(pipe.components) == {"tokenizer", "text_encoder", "transformer", "scheduler", "vae"}
    assert np.array_equal(drawn(PixArtSigmaPipeline(**pipe.components)), drawn(pipe))


def test_devices_have_no_meaning_and_another_dtype_is_an_error(pipe, recwarn):
    assert pipe.to(pipe.device) is pipe
    assert pipe.to(ms.float32) is pipe
    assert not recwarn
    with pytest.warns(UserWarning, match=r"to\('cuda'\) has no effect"):
        assert pipe.to("cuda") is pipe
    with pytest.raises(ValueError, match="the weights are Float32"):
        pipe.to(ms.float16)
    with pytest.warns(UserWarning, match="resumable stages"):
        pipe.enable_model_cpu_offload()
    pipe.enable_vae_tiling()
    pipe.disable_vae_tiling()


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
