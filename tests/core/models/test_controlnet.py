"""The ControlNet computes what the official one computes, starts as its base model, and reads both file layouts."""

import json

import numpy as np
import pytest
from devices import DEVICES
from mindspore import ops
from reference_data import FORWARD, REFERENCE, relative_error
from safetensors.numpy import save_file
from test_transformer import inputs, small_net

from pixart_nb.core import PixArtConfig, PixArtControlNet, load_controlnet
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.fast import denoiser
from pixart_nb.core.models.controlnet import Controlled

CASES = sorted(path.name for path in (REFERENCE / "control").iterdir())
COMPRESSED = {"kv_compress_config": {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [0, 1]}}


def reference(case):
    folder = REFERENCE / "control" / case
    config = PixArtConfig(**json.loads((folder / "config.json").read_text()))
    return folder / "controlnet.pth", config, dict(np.load(folder / "io.npz"))


def small_control(**changes) -> PixArtControlNet:
    """A ControlNet of three blocks and two copies in which every part shows."""
    net = PixArtControlNet.from_transformer(small_net(depth=3, **changes), 2)
    rng = np.random.default_rng(5)
    for parameter in net.controlnet.get_parameters():
        parameter.set_data(parameter + ms.Tensor((0.3 * rng.standard_normal(parameter.shape)).astype(np.float32)))
    return net


@DEVICES
@pytest.mark.parametrize("case", CASES)
def test_a_forward_pass_equals_the_official_one_with_and_without_control(case, device):
    path, config, arrays = reference(case)
    net = load_controlnet(path, config)
    given = [ms.Tensor(arrays[name]) for name in ("latents", "timestep", "caption", "mask")]
    with device():
        assert relative_error(net(*given, control=ms.Tensor(arrays["control"])).asnumpy(), arrays["output"]) < FORWARD
        assert relative_error(net(*given).asnumpy(), arrays["output_without_control"]) < FORWARD
    assert relative_error(arrays["output"], arrays["output_without_control"]) > 10 * FORWARD


@DEVICES
@pytest.mark.parametrize("case", CASES)
def test_a_denoising_step_equals_the_official_forward_pass(case, device):
    """Each row by itself, as a step has one timestep."""
    path, config, arrays = reference(case)
    net = load_controlnet(path, config)
    outputs = {"output": 1.0, "output_without_control": 0.0}
    for row, timestep in enumerate(arrays["timestep"].astype(float)):
        latents, caption, mask, control = (arrays[n][row : row + 1] for n in ("latents", "caption", "mask", "control"))
        for name, scale in outputs.items():
            model = Controlled(net, ms.Tensor(control), np.array([timestep]), np.array([scale]))
            with device():
                out = denoiser(model, ms.Tensor(caption), mask)(ms.Tensor(latents), timestep)
            assert relative_error(out.asnumpy(), arrays[name][row : row + 1]) < FORWARD


@pytest.mark.parametrize("changes", [{}, COMPRESSED, {"micro_condition": True}])
def test_a_new_controlnet_changes_nothing_until_it_is_trained(changes):
    base = small_net(depth=3, **changes)
    latents, timestep, caption = inputs()
    expected = base(latents, timestep, caption).asnumpy()
    net = PixArtControlNet.from_transformer(base, 2)
    assert np.array_equal(net(latents, timestep, caption, control=latents).asnumpy(), expected)


def test_the_scale_of_the_control_goes_from_nothing_to_all():
    net = small_control()
    latents, timestep, caption = inputs()
    control = ms.Tensor(np.random.default_rng(6).standard_normal(latents.shape).astype(np.float32))
    outputs = [net(latents, timestep, caption, control=control, scale=s).asnumpy() for s in (0.0, 1.0)]
    without = net(latents, timestep, caption).asnumpy()
    assert np.array_equal(outputs[0], without)
    assert relative_error(outputs[1], without) > 1e-2


@pytest.mark.parametrize("changes", [{}, COMPRESSED])
def test_gradients_of_a_copied_block_equal_finite_differences(changes):
    net = small_control(**changes)
    latents, timestep, caption = inputs(height=4, width=4, rows=1)
    weight = net.controlnet[0].copied_block.mlp.fc1.weight
    direction = np.random.default_rng(7).standard_normal(weight.shape).astype(np.float32)

    def loss():
        return ops.square(net(latents, timestep[:1], caption, control=latents)).mean()

    gradient = ms.value_and_grad(loss, None, [weight])()[1][0].asnumpy()
    start, step, values = weight.asnumpy().copy(), 2e-3, []
    for sign in (1, -1):
        weight.set_data(ms.Tensor(start + sign * step * direction))
        values.append(float(loss().asnumpy()))
    numeric = (values[0] - values[1]) / (2 * step)
    assert numeric == pytest.approx(float((gradient * direction).sum()), rel=1e-2)


def test_an_adapter_folder_of_diffusers_loads_beside_its_base_model(tmp_path):
    net = small_control()
    tensors = {}
    for name, parameter in net.controlnet.parameters_and_names():
        number, leaf = name.split(".", 1)
        value = parameter.asnumpy()
        if not leaf.startswith("copied_block."):
            tensors[f"controlnet_blocks.{number}.{leaf}"] = value
            continue
        names = key_maps.diffusers_names(f"blocks.{number}.{leaf.removeprefix('copied_block.')}")
        for target, part in zip(names, np.split(value, len(names)), strict=True):
            prefix = f"transformer_blocks.{number}."
            tensors[f"controlnet_blocks.{number}.transformer_block.{target.removeprefix(prefix)}"] = part
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_controlnet(tmp_path, base_model=net.base_model)
    latents, timestep, caption = inputs()
    expected = net(latents, timestep, caption, control=latents).asnumpy()
    assert np.array_equal(loaded(latents, timestep, caption, control=latents).asnumpy(), expected)
    with pytest.raises(PixArtNBError, match="give base_model"):
        load_controlnet(tmp_path)


def test_wrong_controls_are_refused():
    net = small_control()
    latents, timestep, caption = inputs()
    with pytest.raises(PixArtNBError, match=r"control has shape \(2, 4, 4, 4\); expected \(2, 4, 8, 12\)"):
        net(latents, timestep, caption, control=latents[:, :, :4, :4])
    with pytest.raises(PixArtNBError, match="copy_blocks_num is 3; expected 1 to 2"):
        PixArtControlNet.from_transformer(small_net(depth=3), 3)
    path, config, _ = reference("control-alpha")
    with pytest.raises(PixArtNBError, match="holds 2 copied blocks; copy_blocks_num is 3"):
        load_controlnet(path, PixArtConfig(**config.to_dict() | {"copy_blocks_num": 3}))
    with pytest.raises(PixArtNBError, match="holds no ControlNet"):
        load_controlnet(REFERENCE / "official" / "sigma-256" / "official.pth")
