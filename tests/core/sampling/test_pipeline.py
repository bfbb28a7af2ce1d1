"""The pipeline gives the reference pipeline's numbers, and says what is wrong with what it is given."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from reference_data import FORWARD, TRAJECTORY, diffusers, relative_error
from torch_files import as_saved, write_torch

from pixart_nb import PixArtAlphaPipeline, PixArtSigmaPipeline, T5EncoderModel
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.convert import convert, plan_conversion
from pixart_nb.core.io import CheckpointError, load_tensors, save_tensors, write_json
from pixart_nb.core.sampling.pipeline import Conditioning

FOLDER, CALL, GOLDEN = diffusers("sigma")


@pytest.fixture(scope="module")
def pipe():
    return PixArtSigmaPipeline.from_pretrained(FOLDER, mindspore_dtype=ms.float32)


@pytest.fixture
def call():
    return dict(
        prompt=CALL["prompts"],
        negative_prompt=CALL["negative_prompt"],
        height=CALL["height"],
        width=CALL["width"],
        num_inference_steps=CALL["steps"],
        guidance_scale=CALL["guidance_scale"],
        max_sequence_length=CALL["max_sequence_length"],
        clean_caption=CALL["clean_caption"],
        latents=GOLDEN["latents"],
    )


def encoded(pipe) -> dict:
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    values = pipe.encode_prompt(CALL["prompts"], True, CALL["negative_prompt"], max_sequence_length=32)
    return dict(zip(names, values, strict=True))


pytestmark = pytest.mark.filterwarnings("ignore:prompt has 33 tokens")


def test_embeddings_and_masks_equal_the_reference_also_where_padded(pipe):
    ours = encoded(pipe)
    for name, golden in zip(ours, ("prompt_embeds", "prompt_mask", "negative_embeds", "negative_mask"), strict=True):
        assert relative_error(ours[name].asnumpy(), GOLDEN[golden]) < FORWARD


def test_the_trajectory_equals_the_reference(pipe, call):
    steps = pipe.sample(**call)
    assert isinstance(next(steps), Conditioning)
    records = list(steps)
    assert [r.timestep for r in records] == GOLDEN["dpm++2m/timesteps"].tolist()
    assert relative_error(np.stack([r.latents for r in records]), GOLDEN["dpm++2m/trajectory"]) < TRAJECTORY


def test_given_embeddings_give_the_same_trajectory(pipe, call):
    steps = pipe.sample(**call | {"prompt": None} | encoded(pipe))
    records = list(steps)[1:]
    assert relative_error(np.stack([r.latents for r in records]), GOLDEN["dpm++2m/trajectory"]) < TRAJECTORY


def test_without_guidance_the_reference_is_met_too(pipe, call):
    out = pipe(**call | {"guidance_scale": 1.0}, output_type="latent", use_resolution_binning=False)[0]
    assert relative_error(out, GOLDEN["no_guidance/final"]) < TRAJECTORY


def test_decoded_pictures_equal_the_reference(pipe):
    latents = ms.Tensor(GOLDEN["dpm++2m/trajectory"][-1]) / pipe.vae.config.scaling_factor
    assert relative_error(pipe.vae.decode(latents)[0].asnumpy(), GOLDEN["decoded"]) < FORWARD


def test_output_types_agree(pipe, call):
    call |= {"num_inference_steps": 2}
    array = pipe(**call, output_type="np")[0]
    images = pipe(**call, return_dict=True).images
    assert array.shape == (2, 128, 192, 3)
    assert isinstance(images[0], Image.Image)
    assert np.array_equal(np.asarray(images[1]), (array[1] * 255).round().astype(np.uint8))


def test_the_callback_sees_every_nth_step(pipe, call):
    seen = []
    pipe(**call, output_type="latent", callback=lambda *args: seen.append(args), callback_steps=2)
    assert [step for step, _, _ in seen] == [0, 2, 4]
    assert [t for _, t, _ in seen] == [999.0, 599.0, 200.0]
    assert relative_error(seen[1][2], GOLDEN["dpm++2m/trajectory"][2]) < TRAJECTORY


def test_a_seed_gives_one_picture_alone_or_in_a_batch(pipe, call):
    call = {key: value for key, value in call.items() if key != "latents"} | {"num_inference_steps": 2}
    both = pipe(**call, generator=[np.random.default_rng(1), np.random.default_rng(2)], output_type="latent")[0]
    alone = pipe(**call | {"prompt": CALL["prompts"][1]}, generator=np.random.default_rng(2), output_type="latent")[0]
    assert relative_error(both[1:], alone) < 1e-5


def test_several_images_per_prompt_follow_each_other(pipe, call):
    call |= {"latents": None, "num_images_per_prompt": 2, "num_inference_steps": 1}
    rngs = [np.random.default_rng(seed) for seed in (5, 6, 5, 6)]
    out = pipe(**call, generator=rngs, output_type="latent")[0]
    assert out.shape[0] == 4
    assert not np.allclose(out[0], out[1])
    assert not np.allclose(out[0], out[2])


def test_a_component_that_is_none_is_not_loaded(call):
    encoder = PixArtSigmaPipeline.from_pretrained(FOLDER, transformer=None, vae=None)
    painter = PixArtSigmaPipeline.from_pretrained(FOLDER, text_encoder=None, tokenizer=None, vae=None)
    assert encoder.transformer is None
    latents = painter(**call | {"prompt": None} | encoded(encoder), output_type="latent")[0]
    assert relative_error(latents, GOLDEN["dpm++2m/trajectory"][-1]) < TRAJECTORY
    with pytest.raises(ValueError, match="output_type='latent'"):
        painter(**call | {"prompt": None} | encoded(encoder))
    with pytest.raises(ValueError, match="no text encoder"):
        painter(**call, output_type="latent")
    with pytest.raises(ValueError, match="no transformer"):
        encoder(**call)


@pytest.fixture
def of_256(pipe, monkeypatch):
    """The pipeline, as if its model had been trained at 256 pixels."""
    monkeypatch.setattr(pipe.transformer, "config", replace(pipe.transformer.config, input_size=32))
    return pipe


def test_a_published_size_is_drawn_and_cut_to_the_one_that_was_asked_for(of_256, call):
    call |= {"latents": None, "num_inference_steps": 1, "height": 200, "width": 300, "output_type": "np"}
    shapes = []
    images = of_256(**call, callback=lambda step, timestep, latents: shapes.append(latents.shape))[0]
    assert images.shape == (2, 200, 300, 3)
    assert shapes == [(2, 4, 208 // 8, 304 // 8)]
    with pytest.raises(ValueError, match="multiples of 16"):
        of_256(**call, use_resolution_binning=False)


def test_latents_are_given_back_at_the_size_that_was_drawn(of_256, call):
    call |= {"latents": None, "num_inference_steps": 1, "height": 200, "width": 300}
    assert of_256(**call, output_type="latent")[0].shape == (2, 4, 26, 38)


def test_the_answer_is_a_tuple_and_has_names(pipe, call):
    call |= {"num_inference_steps": 1, "output_type": "latent"}
    for return_dict in (False, True):
        out = pipe(**call, return_dict=return_dict)
        assert isinstance(out, tuple)
        (images,) = out
        assert images is out.images


def test_given_embeddings_are_repeated_for_several_images(pipe, call):
    rows = {"prompt": None, "latents": None, "num_images_per_prompt": 2, "num_inference_steps": 1}
    rngs = [np.random.default_rng(seed) for seed in range(4)]
    ours = pipe(**call | rows | encoded(pipe), generator=rngs, output_type="latent")[0]
    rngs = [np.random.default_rng(seed) for seed in range(4)]
    theirs = pipe(**call | rows | {"prompt": CALL["prompts"]}, generator=rngs, output_type="latent")[0]
    assert relative_error(ours, theirs) < 1e-5
    embeds, mask, _, _ = pipe.encode_prompt(None, num_images_per_prompt=3, **encoded(pipe))
    assert embeds.shape[0] == mask.shape[0] == 6


def test_the_low_memory_walk_through_of_alpha_gives_the_same_picture(tmp_path):
    folder, alpha = (
        diffusers("alpha")[0],
        dict(num_inference_steps=2, height=64, width=64, use_resolution_binning=False),
    )
    text_encoder = T5EncoderModel.from_pretrained(
        folder, subfolder="text_encoder", load_in_8bit=True, device_map="auto"
    )
    pipe = PixArtAlphaPipeline.from_pretrained(folder, text_encoder=text_encoder, transformer=None)
    prompt_embeds, prompt_attention_mask, negative_embeds, negative_mask = pipe.encode_prompt("cute cat")
    assert prompt_embeds.shape[1] == 120
    del text_encoder, pipe
    pipe = PixArtAlphaPipeline.from_pretrained(folder, text_encoder=None, mindspore_dtype=ms.float16)
    latents = pipe(
        negative_prompt=None,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_embeds,
        prompt_attention_mask=prompt_attention_mask,
        negative_prompt_attention_mask=negative_mask,
        num_images_per_prompt=1,
        output_type="latent",
        generator=np.random.default_rng(0),
        **alpha,
    ).images
    del pipe.transformer
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    image = pipe.image_processor.postprocess(image, output_type="pil")[0]
    image.save(tmp_path / "cat.png")
    whole = PixArtAlphaPipeline.from_pretrained(folder)("cute cat", generator=np.random.default_rng(0), **alpha)
    difference = np.asarray(whole[0][0], float) - np.asarray(Image.open(tmp_path / "cat.png"), float)
    assert np.abs(difference).mean() < 3  # eight bits and half precision


def test_the_call_of_mindones_documentation_runs(tmp_path):
    pipe = PixArtSigmaPipeline.from_pretrained(FOLDER, mindspore_dtype=ms.float16)
    image = pipe("cute cat")[0][0]
    image.save(tmp_path / "cat.png")
    assert Image.open(tmp_path / "cat.png").size == (128, 128)


def test_a_published_folder_with_shards_and_torch_files_gives_the_same_picture(pipe, call, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(FOLDER, folder)
    whole = folder / "text_encoder" / "model.safetensors"
    tensors = load_tensors(whole)
    places = {name: f"model-0000{k % 2 + 1}-of-00002.safetensors" for k, name in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        save_tensors(whole.with_name(shard), {n: t for n, t in tensors.items() if places[n] == shard})
    write_json(whole.with_name("model.safetensors.index.json"), {"metadata": {}, "weight_map": places})
    for path in [*folder.glob("vae/*.safetensors"), *folder.glob("transformer/*.safetensors")]:
        write_torch(path.with_suffix(".bin"), *as_saved(load_tensors(path)))
        path.unlink()
    whole.unlink()
    ours = PixArtSigmaPipeline.from_pretrained(folder)
    assert np.array_equal(ours(**call, output_type="np")[0], pipe(**call, output_type="np")[0])
    whole.with_name(places["shared.weight"]).unlink()
    with pytest.raises(CheckpointError, match=r"text_encoder lacks .*Download the missing shards"):
        PixArtSigmaPipeline.from_pretrained(folder)


def test_the_layout_of_mindones_example_gives_the_same_picture(pipe, call, tmp_path):
    for name in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / name).symlink_to(FOLDER / name)
    checkpoint = tmp_path / "models" / "PixArt-Sigma.ckpt"
    convert(plan_conversion(FOLDER, checkpoint))
    expected = pipe(**call, output_type="np")[0]
    ours = PixArtSigmaPipeline.from_pretrained(tmp_path)
    assert np.array_equal(ours(**call, output_type="np")[0], expected)
    for name in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / name).rename(tmp_path / "models" / name)
    (tmp_path / "models" / "other.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(PixArt-Sigma.ckpt, other.ckpt\); give the path"):
        PixArtSigmaPipeline.from_pretrained(tmp_path / "models")
    ours = PixArtSigmaPipeline.from_pretrained(checkpoint)
    assert np.array_equal(ours(**call, output_type="np")[0], expected)
    encoder = PixArtSigmaPipeline.from_pretrained(tmp_path / "models", transformer=None, vae=None)
    assert encoder.encode_prompt("cute cat")[0].shape[1] == 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        (
            {"negative_prompt_embeds": ms.Tensor(np.zeros((2, 3, 24), np.float32))},
            "needs negative_prompt_attention_mask",
        ),
        ({"prompt_attention_mask": np.ones((2, 3))}, "without prompt_embeds"),
        ({"prompt": []}, "at least one text"),
        ({"prompt": None}, "at least one text"),
        ({"height": 120}, r"multiples of 16, for example 128x192"),
        ({"width": 0}, "multiples of 16"),
        ({"num_inference_steps": 0}, "expected 1 to 999"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 2 prompts"),
        ({"latents": np.zeros((2, 4, 16, 16))}, r"expected \(2, 4, 16, 24\)"),
        ({"latents": None, "generator": [np.random.default_rng(0)]}, "1 generators for 2 images"),
        ({"prompt_embeds": ms.Tensor(np.zeros((2, 3, 24), np.float32))}, "give one of them"),
        ({"output_type": "jpeg"}, "'pil', 'np' or 'latent'"),
        ({"callback_steps": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_say_what_was_expected(pipe, call, change, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_attention_mask": None}, "needs prompt_attention_mask"),
        ({"negative_prompt_embeds": None}, "without negative_prompt_embeds"),
        ({"prompt_embeds": ms.Tensor(np.zeros((2, 32, 7), np.float32))}, r"expected \(2, 32, 24\)"),
        ({"prompt_attention_mask": np.ones((2, 31))}, r"expected \(2, 32\)"),
        ({"prompt_attention_mask": np.zeros((2, 32))}, "at least one token"),
    ],
)
def test_embeddings_that_do_not_fit_say_what_was_expected(pipe, call, change, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call | {"prompt": None} | encoded(pipe) | change)


def test_a_prompt_that_is_too_long_warns_with_what_was_cut(pipe):
    with pytest.warns(UserWarning, match="cut off: 'm on grass'"):
        pipe.encode_prompt("a red mushroom on grass", max_sequence_length=8)


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"1")
    with pytest.raises(CheckpointError, match=r"model_index.json.*weights.bin"):
        PixArtSigmaPipeline.from_pretrained(tmp_path)


def test_a_published_folder_that_lost_its_index_is_told_what_is_missing(tmp_path):
    for name in ("vae", "text_encoder", "tokenizer", "transformer", "scheduler"):
        (tmp_path / name).symlink_to(FOLDER / name)
    with pytest.raises(
        CheckpointError, match=r"no model_index.json.*lacks \['transformer'\] for the layout of mindone"
    ):
        PixArtSigmaPipeline.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"none.ckpt does not exist"):
        PixArtSigmaPipeline.from_pretrained(tmp_path / "none.ckpt")


def test_a_folder_without_a_component_names_it(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="lacks the folders"):
        PixArtSigmaPipeline.from_pretrained(tmp_path)


def test_a_hub_that_cannot_be_reached_says_which_folder_to_bring(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"'PixArt-alpha/none'.*Download its folder"):
        PixArtSigmaPipeline.from_pretrained("PixArt-alpha/none")


def test_what_is_neither_folder_nor_hub_id_is_said_so():
    with pytest.raises(CheckpointError, match="/no/such/folder does not exist"):
        PixArtSigmaPipeline.from_pretrained("/no/such/folder")
