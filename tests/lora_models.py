"""What tests of LoRA share: the reference transformer, its inputs, and adapters that do something."""

import numpy as np
from reference_data import REFERENCE

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.load import load_transformer
from pixart_nb.core.lora import Adapters, LoraConfig

TRANSFORMER = REFERENCE / "diffusers" / "sigma" / "transformer"
#: Made with peft 0.21.2, torch 2.13.0 and diffusers 0.42.1 on that transformer in float64: adapters as PEFT saves them,
#: and what the adapted transformer computes. ``lora-official`` has the targets of the official PixArt script.
CASES = ("lora-official", "lora-patterns", "dora")
#: Made with lycoris-lora 4.1.3 (LoKr with both factors decomposed, LoHa) and peft 0.21.2 on torch 2.14.1 in float32.
LYCORIS_CASES = ("lycoris-lokr", "lycoris-loha", "peft-lokr")
EVERYTHING = ("to_q", "to_k", "to_v", "to_out.0", "proj", "ff.net.2", "linear", "linear_1", "linear_2", "proj_out")


def transformer():
    return load_transformer(TRANSFORMER)


def inputs():
    with np.load(REFERENCE / "lora" / "dora" / "io.npz") as io:
        return {name: io[name] for name in ("latents", "timestep", "caption", "mask")}


def run(net):
    """What the transformer makes of ``inputs``, a NumPy array."""
    io = inputs()
    out = net(ms.Tensor(io["latents"]), ms.Tensor(io["timestep"]), ms.Tensor(io["caption"]), io["mask"])
    return out.asnumpy()


def weights(net):
    """Copies of all parameters of a network."""
    return {name: np.array(p.asnumpy()) for name, p in net.parameters_and_names()}


def same_weights(net, before):
    now = weights(net)
    return now.keys() == before.keys() and all(np.array_equal(now[name], before[name]) for name in before)


def trained(net, name="style", seed=0, **config):
    """An adapter whose parameters are as if it had been trained: nothing in it is zero."""
    adapter = Adapters.of(net).add(name, LoraConfig(**config), seed)
    rng = np.random.default_rng(seed + 100)
    for title, parameter in adapter.parameters().items():
        noise = rng.standard_normal(parameter.shape)
        if title.endswith("magnitude_vector"):
            values = parameter.asnumpy() * (1 + 0.3 * np.abs(noise))
        else:
            values = parameter.asnumpy() + 0.2 * noise
        parameter.set_data(ms.Tensor(values.astype(np.float32)))
    return adapter
