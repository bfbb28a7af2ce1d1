"""The Ascend path gives the numbers of the CPU path, with stand-ins that keep to the contracts of its operators."""

from types import SimpleNamespace

import numpy as np
import pytest
from lora_models import EVERYTHING, trained, transformer
from reference_data import FORWARD, OFFICIAL, TRAJECTORY, diffusers, official, relative_error
from small_networks import PUBLISHED

from benchmarks.ascend_stand_ins import STAND_INS, ContractError, ascend
from pixart_nb import PixArtAlphaPipeline, PixArtSigmaPipeline
from pixart_nb.core import PixArtConfig, PixArtControlNet, ablate_heads, backend, load_transformer, trace
from pixart_nb.core.backend import ms
from pixart_nb.core.fast import denoiser
from pixart_nb.core.fast.ascend import block_function
from pixart_nb.core.models.controlnet import Controlled
from pixart_nb.core.models.low_precision import Int8Linear, NF4Linear
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig
from pixart_nb.core.run_plan import RunSettings, plan_run, process_memory
from pixart_nb.core.sampling.guidance import identity_attention
from pixart_nb.core.sampling.planning import memory_limit
from pixart_nb.core.sampling.upscaling import compress_keys

SMALL = dict(hidden_size=48, num_heads=2, depth=2, caption_channels=12, input_size=8, model_max_length=40)
CLOSE = 1e-5
VARIANTS = pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(num_heads=1),  # heads of 48 need no padding
        dict(qk_norm=True),
        dict(micro_condition=True),
        *(
            dict(kv_compress_config=dict(sampling=name, scale_factor=ratio, kv_compress_layer=[1]), qk_norm=normed)
            for name, ratio in (("conv", 2), ("conv", 4), ("mean", 3), ("ave", 2), ("uniform", 4))
            for normed in (False, True)
        ),
    ],
    ids=str,
)
FLASH = pytest.mark.parametrize("flash", [True, False], ids=["flash attention", "exact attention"])


def small_net(dtype=ms.float32, **changes) -> PixArt:
    """A small net with weights in which every part shows."""
    net = PixArt(PixArtConfig(**SMALL | changes))
    rng = np.random.default_rng(3)
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor((0.2 * rng.standard_normal(parameter.shape)).astype(np.float32)))
        parameter.set_dtype(dtype)
    return net


def inputs(lengths=(1, 7), height=12, width=20, channels=12):
    rng = np.random.default_rng(4)
    latents = ms.Tensor(rng.standard_normal((len(lengths), 4, height, width)).astype(np.float32))
    caption = ms.Tensor(rng.standard_normal((len(lengths), max(lengths), channels)).astype(np.float32))
    return latents, caption, np.arange(max(lengths))[None] < np.array(lengths)[:, None]


def step(net, latents, caption, mask, timestep=811.0):
    return denoiser(net, caption, mask)(latents, timestep).astype(ms.float32).asnumpy()


@VARIANTS
def test_every_variant_gives_the_numbers_of_the_cpu(changes):
    net, arguments = small_net(**changes), inputs()
    expected = step(net, *arguments)
    for flash in (True, False):
        with ascend(flash_in_float32=flash):
            assert relative_error(step(net, *arguments), expected) < CLOSE, f"flash attention: {flash}"


@VARIANTS
def test_blocks_whose_self_attention_is_the_identity_give_the_numbers_of_the_cpu(changes):
    net, (latents, caption, mask) = small_net(**changes), inputs()

    def perturbed():
        with identity_attention(net, [1]):
            return denoiser(net, caption, mask)(latents, 811.0).asnumpy()

    expected = perturbed()
    assert relative_error(step(net, latents, caption, mask), expected) > 1e-2
    for flash in (True, False):
        with ascend(flash_in_float32=flash):
            assert relative_error(perturbed(), expected) < CLOSE, f"flash attention: {flash}"


def controlled(**changes) -> Controlled:
    """Three blocks with copies of the first two that add something, until timestep 500."""
    net = PixArtControlNet.from_transformer(small_net(depth=3, **changes), 2)
    for parameter in net.controlnet.get_parameters():
        values = 0.2 * np.random.default_rng(5).standard_normal(parameter.shape)
        parameter.set_data(parameter + ms.Tensor(values.astype(np.float32)))
    control = np.random.default_rng(6).standard_normal((1, 4, 12, 20)).astype(np.float32)
    return Controlled(net, ms.Tensor(control), np.array([999, 500]), np.array([0.7, 0.0]))


@VARIANTS
def test_a_controlnet_gives_the_numbers_of_the_cpu(changes):
    model, arguments = controlled(**changes), inputs()
    expected = [step(model, *arguments, timestep) for timestep in (999.0, 400.0)]
    assert relative_error(step(model.net.base_model, *arguments, 999.0), expected[0]) > 1e-2
    for flash in (True, False):
        with ascend(flash_in_float32=flash):
            for timestep, out in zip((999.0, 400.0), expected, strict=True):
                assert relative_error(step(model, *arguments, timestep), out) < CLOSE, f"flash attention: {flash}"


@FLASH
def test_hooks_read_and_change_what_they_do_on_the_cpu(flash):
    compression = dict(sampling="conv", scale_factor=2, kv_compress_layer=[1])
    net, arguments = small_net(kv_compress_config=compression), inputs()

    def changed():
        with ablate_heads(net, layers=1, heads=0), trace(net, announce=None) as traced:
            return step(net, *arguments), traced.rows("blocks.0.cross_attn", 0, None)

    expected = changed()
    assert relative_error(step(net, *arguments), expected[0]) > 1e-2
    with ascend(flash_in_float32=flash):
        for ours, theirs in zip(changed(), expected, strict=True):
            assert relative_error(ours, theirs) < CLOSE


@VARIANTS
def test_in_half_precision_the_contracts_hold_and_the_numbers_are_close(changes):
    expected = step(small_net(**changes), *inputs())
    with ascend():
        assert relative_error(step(small_net(ms.float16, **changes), *inputs()), expected) < 2e-2


@FLASH
@pytest.mark.parametrize("lengths", [(2,), (7, 7), (1, 30, 5)])
def test_captions_of_any_length_give_the_numbers_of_the_cpu(lengths, flash):
    net, arguments = small_net(), inputs(lengths)
    expected = step(net, *arguments)
    with ascend(flash_in_float32=flash):
        assert relative_error(step(net, *arguments), expected) < CLOSE


@FLASH
@pytest.mark.parametrize("case", OFFICIAL)
def test_official_models_give_the_official_numbers(case, flash):
    path, config, arrays = official(case)
    net = load_transformer(path, PixArtConfig(**config))
    with ascend(flash_in_float32=flash):
        out = net(*(ms.Tensor(arrays[name]) for name in ("latents", "timestep", "caption")), arrays["mask"])
        assert relative_error(out.asnumpy(), arrays["output"]) < FORWARD
        arguments = inputs((1, 5), *arrays["latents"].shape[2:], config["caption_channels"])
        fast = step(net, *arguments)
    assert relative_error(fast, step(net, *arguments)) < CLOSE


@FLASH
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_part_of_the_weights(dora, flash):
    net = transformer()
    trained(net, target_modules=list(EVERYTHING), use_dora=dora)
    arguments = inputs((1, 7), channels=net.config.caption_channels)
    expected = step(net, *arguments)
    with ascend(flash_in_float32=flash):
        assert relative_error(step(net, *arguments), expected) < CLOSE


@FLASH
def test_twenty_steps_stay_close(flash):
    net, (latents, caption, mask) = small_net(), inputs()

    def trajectory():
        denoise, x = denoiser(net, caption, mask), latents
        for timestep in np.linspace(999, 1, 20):
            x = x - 0.02 * denoise(x, float(timestep))[:, :4]
        return x.asnumpy()

    expected = trajectory()
    with ascend(flash_in_float32=flash):
        assert relative_error(trajectory(), expected) < 1e-4


def test_a_denoiser_serves_images_of_another_size():
    net, (_, caption, mask) = small_net(), inputs()
    with ascend(flash_in_float32=True):
        denoise = denoiser(net, caption, mask)
        for height, width in ((8, 8), (4, 12), (8, 8)):
            latents = inputs(height=height, width=width)[0]
            assert np.array_equal(denoise(latents, 7.0).asnumpy(), step(net, latents, caption, mask, 7.0))


@FLASH
@pytest.mark.parametrize("name", ["sigma", "alpha"])
def test_whole_pipelines_give_the_numbers_of_diffusers(name, flash):
    folder, call, golden = diffusers(name)
    pipe = (PixArtSigmaPipeline if name == "sigma" else PixArtAlphaPipeline).from_pretrained(folder)
    with ascend(flash_in_float32=flash):
        embeds = pipe.text_encoder(golden["input_ids"], golden["prompt_mask"]).asnumpy()
        assert relative_error(embeds, golden["prompt_embeds"]) < FORWARD
        steps = pipe.sample(
            call["prompts"], negative_prompt=call["negative_prompt"], height=call["height"], width=call["width"],
            num_inference_steps=call["steps"], guidance_scale=call["guidance_scale"], latents=golden["latents"],
            max_sequence_length=call["max_sequence_length"], clean_caption=call["clean_caption"],
        )  # fmt: skip
        next(steps)  # the conditioning
        latents = np.stack([step.latents for step in steps])
        assert relative_error(latents, golden["dpm++2m/trajectory"]) < TRAJECTORY
        decoded = pipe.vae.decode(pipe.vae.config.from_model(golden["dpm++2m/trajectory"][-1]))[0].asnumpy()
        assert relative_error(decoded, golden["decoded"]) < FORWARD
        encoded = pipe.vae.encode(ms.Tensor(golden["vae_in"]))[0]
        assert relative_error(encoded.mean.asnumpy(), golden["vae_mean"]) < FORWARD
        assert relative_error(encoded.logvar.asnumpy(), golden["vae_logvar"]) < FORWARD


@pytest.mark.parametrize("linear", [Int8Linear, NF4Linear])
def test_a_quantized_layer_gives_the_numbers_of_the_cpu(linear):
    rng = np.random.default_rng(0)
    layer, x = linear(40, 25), ms.Tensor(rng.standard_normal((3, 40)).astype(np.float32))
    layer.take(rng.standard_normal((25, 40)).astype(np.float32))
    expected = layer(x).asnumpy()
    with ascend():
        assert relative_error(layer(x).asnumpy(), expected) < 1e-6


@pytest.mark.parametrize("tile", [0, 64])
def test_the_autoencoder_gives_the_numbers_of_the_cpu_whole_and_in_tiles(tile):
    vae, rng = (
        AutoencoderKL(VAEConfig(block_out_channels=(16, 16, 32, 32), norm_num_groups=8)),
        np.random.default_rng(0),
    )
    for name, weight in vae.parameters_and_names():
        scale = float("norm" in name and name.endswith("weight"))
        weight.set_data(ms.Tensor((scale + 0.1 * rng.standard_normal(weight.shape)).astype(np.float32)))
    latents, images = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 4, 24, 12), (1, 3, 96, 192)))
    if tile:
        vae.enable_tiling(tile)

    def there_and_back():
        return vae.decode(latents)[0].asnumpy(), vae.encode(ms.Tensor(images))[0].mean.asnumpy()

    expected = there_and_back()
    with ascend():
        for ours, theirs in zip(there_and_back(), expected, strict=True):
            assert relative_error(ours, theirs) < CLOSE


@FLASH
@pytest.mark.parametrize("operator", [None, "conv", "mean", "ave"])
def test_gradients_are_those_of_the_cpu(operator, flash):
    compression = dict(sampling=operator, scale_factor=2, kv_compress_layer=[0])
    net = small_net(kv_compress_config=compression if operator else None)
    latents, caption, mask = inputs(height=8, width=8)
    parameters = [p for name, p in net.parameters_and_names() if "y_embedding" not in name]
    positions, timestep, mask = net.positions(8, 8), ms.Tensor(np.array([5.0, 700.0], np.float32)), ms.Tensor(mask)

    def loss(latents, caption):
        out = net.forward(latents, timestep, caption, mask, positions)
        return (out * out).mean()

    gradient = ms.grad(loss, None, parameters)
    expected = [g.asnumpy() for g in gradient(latents, caption)]
    with ascend(flash_in_float32=flash):
        ours = [g.asnumpy() for g in gradient(latents, caption)]
    for parameter, a, b in zip(parameters, ours, expected, strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-6, parameter.name


def test_the_plan_compares_with_the_memory_of_the_device(monkeypatch):
    run = RunSettings(1024, 1024, dtype="fp16")
    on_cpu = plan_run(PUBLISHED, run, process=process_memory())
    monkeypatch.setattr(ms.hal, "get_device_properties", lambda number: SimpleNamespace(free_memory=30 * 10**9))
    with ascend():
        plan = plan_run(PUBLISHED, run, process=process_memory())
        assert plan.process == 0 < on_cpu.process
        assert memory_limit(SimpleNamespace(memory_limit=0.0)) == 30e9
    stages, others = ({stage.name: stage for stage in p.stages} for p in (plan, on_cpu))
    padded = 28 * 6 * 1152 * 16 * 80  # copies of attention weights with padded heads
    assert stages["denoise"].weights - others["denoise"].weights == 2 * padded
    assert stages["denoise"].activations < others["denoise"].activations  # no scores in memory


@pytest.fixture
def compilations(monkeypatch):
    """The graphs that MindSpore would compile: function and shapes of the arguments. The functions run uncompiled."""
    graphs = set()

    def jit(function, **options):
        def called(*arguments):
            shapes = tuple(x if x is None else (x.shape, str(x.dtype)) for x in arguments)
            graphs.add((function, shapes))
            return function(*arguments)

        return called

    monkeypatch.setattr(ms, "jit", jit)
    block_function.cache_clear()
    backend.set_graph_mode(True)
    yield graphs
    backend.set_graph_mode(False)
    block_function.cache_clear()


@FLASH
def test_one_graph_serves_all_blocks_of_a_size_and_captions_of_all_lengths(compilations, flash):
    net = small_net(depth=3)
    all_lengths = [(1, 7), (1, 30), (3, 5), (40, 40)]
    expected = [step(net, *inputs(lengths)) for lengths in all_lengths]
    with ascend(flash_in_float32=flash):
        for lengths, out in zip(all_lengths, expected, strict=True):
            assert relative_error(step(net, *inputs(lengths)), out) < CLOSE
        assert len(compilations) == 1
        for height, width in ((8, 8), (16, 8)):
            step(net, *inputs(height=height, width=width))
    assert len(compilations) == 3


def test_copies_of_a_controlnet_run_as_the_graph_of_their_blocks(compilations):
    with ascend():
        step(controlled(), *inputs(), 999.0)
    assert len(compilations) == 1


def test_compressed_blocks_are_a_second_graph(compilations):
    net = small_net(depth=4, kv_compress_config=dict(sampling="conv", scale_factor=2, kv_compress_layer=[2, 3]))
    with ascend():
        step(net, *inputs())
    assert len(compilations) == 2


@pytest.mark.parametrize("layers", [[], [1]], ids=["none learned", "one learned"])
def test_compression_added_to_a_large_size_gives_the_numbers_of_the_cpu(layers):
    learned = dict(sampling="conv", scale_factor=2, kv_compress_layer=layers)
    net, arguments = small_net(kv_compress_config=learned if layers else None), inputs(height=24, width=32)
    whole = step(net, *arguments)
    compress_keys(net, 2)
    expected = step(net, *arguments)
    assert relative_error(expected, whole) > 1e-3
    with ascend(flash_in_float32=True):
        assert relative_error(step(net, *arguments), expected) < CLOSE


HALF, FLOAT = np.float16, np.float32


@pytest.mark.parametrize(
    ("name", "shapes", "dtype", "options", "reason"),
    [
        ("flash_attention_score", [(1, 4, 64)] * 3, FLOAT, (2, None, 0.1, "BSH"), "dtype"),
        ("flash_attention_score", [(1, 4, 144)] * 3, HALF, (2, None, 0.1, "BSH"), "multiple of 16"),
        ("flash_attention_score", [(1, 4, 512)] * 3, HALF, (1, None, 0.1, "BSH"), "up to 256"),
        ("flash_attention_score", [(1, 2, 4, 16)] * 3, HALF, (1, None, 0.1, "BNSD"), "heads"),
        ("flash_attention_score", [(1, 4, 64)] * 3, HALF, (2, None, 0.1, "SBH"), "layout"),
        ("flash_attention_score", [(1, 4, 64)] * 3, HALF, (2, None, 1, "BSH"), "scale"),
        ("flash_attention_score", [(1, 4, 64)] * 3, HALF, (2, np.zeros((1, 4), np.uint8), 0.1, "BSH"), "mask"),
        ("flash_attention_score", [(1, 4, 64)] * 3, HALF, (2, np.ones((1, 1, 4, 4), np.uint8), 0.1, "BSH"), "discards"),
        ("layer_norm", [(2, 8), (4,), (4,)], HALF, (1e-6,), "weight"),
        ("addcmul", [(2, 8), (8,), (8,)], FLOAT, (), "2"),
        ("conv2d", [(1, 6, 4, 4), (6, 2, 2, 2), (6,)], FLOAT, (2, 0, 6), "by"),
    ],
)  # fmt: skip
def test_a_stand_in_refuses_what_the_documentation_refuses(name, shapes, dtype, options, reason):
    tensors = [ms.Tensor(np.zeros(shape, dtype)) for shape in shapes]
    options = [ms.Tensor(x) if isinstance(x, np.ndarray) else x for x in options]
    with pytest.raises(ContractError, match=reason):
        STAND_INS[name](*tensors, *options)
