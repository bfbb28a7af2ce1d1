"""ControlNet-Transformer (PixArt-delta, Chen et al. 2024, section 4): copies of the first blocks read a condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import mint, nn

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.models.transformer import Block, PixArt, repeat_batch, trim_caption


class ControlBlock(nn.Cell):
    """Copy of one block between two projections that start at zero; the first block's copy also adds the image."""

    def __init__(self, block: Block, size: int, first: bool):
        super().__init__()
        self.copied_block = block
        self.before_proj = Linear(size, size) if first else None
        self.after_proj = Linear(size, size)

    def construct(self, c, x, k, v, mask, t0, height, width):
        """c and x (B, N, D): state of the control and of the image -> the next state, and the sum for the image."""
        if self.before_proj is not None:
            c = x + self.before_proj(c)
        c = self.copied_block(c, k, v, mask, t0, height, width)
        return c, self.after_proj(c)


class PixArtControlNet(nn.Cell):
    """A transformer with a ControlNet: ``net(latents, timestep, caption, mask, control=control)``.

    Copy i, of block i, reads the state of copy i - 1, and its output is added to the input of block i + 1. Blocks with
    compressed keys have copies with compressed keys. Without ``control`` the output is that of ``base_model``.
    """

    def __init__(self, base_model: PixArt, copy_blocks_num: int):
        super().__init__()
        config = base_model.config
        if not 1 <= copy_blocks_num < config.depth:
            raise PixArtNBError(
                f"copy_blocks_num is {copy_blocks_num}; expected 1 to {config.depth - 1} for {config.depth} blocks"
            )
        self.base_model, self.edges = base_model, None  # options of the edges that it was trained on, if any
        blocks = (Block(config, layer) for layer in range(copy_blocks_num))
        self.controlnet = nn.CellList([ControlBlock(b, config.hidden_size, i == 0) for i, b in enumerate(blocks)])

    @classmethod
    def from_transformer(cls, net: PixArt, copy_blocks_num: int) -> PixArtControlNet:
        """Return a ControlNet to be trained: its blocks have the weights of ``net``, its projections are zero."""
        out = cls(net, copy_blocks_num)
        for copy, block in zip(out.controlnet, net.blocks, strict=False):
            for target, source in zip(copy.copied_block.get_parameters(), block.get_parameters(), strict=True):
                target.set_data(source.value().copy())
        return out

    @property
    def config(self):
        """Configuration of the transformer."""
        return self.base_model.config

    @property
    def dtype(self) -> ms.Type:
        """Dtype of the weights."""
        return self.base_model.dtype

    @property
    def hook_manager(self):
        """Hooks of the transformer. The copied blocks have none."""
        return self.base_model.hook_manager

    def construct(self, latents, timestep, caption, mask=None, control=None, scale: float = 1.0):
        """Predict the noise as ``PixArt`` does; control (N, C, H, W) are scaled latents of the condition, or None.

        ``scale`` multiplies what the ControlNet adds.
        """
        net = self.base_model
        net.check_inputs(latents, caption, mask)
        self.check_control(latents, control)
        if mask is not None:
            caption, mask = trim_caption(caption, mask)
        micro, positions = net.micro_conditions(latents), net.positions(latents.shape[2], latents.shape[3])
        return self.forward(latents, timestep, caption, mask, positions, micro, control, scale)

    def check_control(self, latents, control) -> None:
        """Refuse a control of another shape. ``construct``, which is parsed for graphs, cannot raise by itself."""
        if control is not None and tuple(control.shape) != tuple(latents.shape):
            raise PixArtNBError(f"control has shape {tuple(control.shape)}; expected {tuple(latents.shape)}")

    def forward(self, latents, timestep, caption, mask, positions, micro=None, control=None, scale=1.0):
        """Compute ``construct`` on tensors alone, so that it can be compiled."""
        keys_values = self.caption_keys_values(caption)
        return self.denoise(latents, timestep, keys_values, mask, positions, micro, control, scale)

    def caption_keys_values(self, caption) -> tuple[Sequence, Sequence]:
        """Return the keys and values of all blocks, and those of the copied blocks."""
        projected = self.base_model.y_embedder(caption.astype(self.dtype))
        blocks = [block.keys_values(projected) for block in self.base_model.blocks]
        return blocks, [copy.copied_block.keys_values(projected) for copy in self.controlnet]

    def denoise(self, latents, timestep, keys_values, mask, positions, micro=None, control=None, scale=1.0):
        """Compute one step from the keys and values of the caption: -> (N, out_channels, H, W)."""
        net, (blocks, copies) = self.base_model, keys_values
        if control is None:
            return net.denoise(latents, timestep, blocks, mask, positions, micro)
        x, t, t0, height, width = net.embed(latents, timestep, positions, micro)
        c = net.x_embedder(control.astype(self.dtype)) + repeat_batch(positions, control.shape[0])
        for number, (block, (k, v)) in enumerate(zip(net.blocks, blocks)):  # noqa: B905 - a graph knows no strict
            if 0 < number <= len(self.controlnet):
                copy_k, copy_v = copies[number - 1]
                c, added = self.controlnet[number - 1](c, x, copy_k, copy_v, mask, t0, height, width)
                x = x + added * scale
            x = block(x, k, v, mask, t0, height, width)
        return net.unpatchify(net.final_layer(x, t), height, width)


@dataclass(frozen=True)
class Controlled:
    """A ControlNet with the condition of one run: latents ``control`` (N, C, H, W), and its scale in each step.

    ``timesteps`` (S,) fall, and ``scales`` (S,) hold from each of them to the next. With ``guess_mode``, predictions
    without the prompt are those of the base model.
    """

    net: PixArtControlNet
    control: ms.Tensor
    timesteps: np.ndarray
    scales: np.ndarray
    guess_mode: bool = False

    def scale_at(self, timestep: float) -> float:
        """Return the scale of the step that ``timestep`` belongs to."""
        return float(self.scales[max(0, np.count_nonzero(self.timesteps >= timestep - 1e-3) - 1)])

    @property
    def config(self):
        """Configuration of the transformer."""
        return self.net.config

    @property
    def hook_manager(self):
        """Hooks of the transformer."""
        return self.net.hook_manager

    def repeated(self, batch: int) -> ms.Tensor:
        """Return the condition of each row of a batch (B, C, H, W), which may have rows without a prompt too."""
        return mint.tile(self.control, (batch // self.control.shape[0], 1, 1, 1))
