"""Configurations of small networks, and of the published ones."""

from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae_blocks import VAEConfig
from pixart_nb.core.run_plan import Networks

TINY_T5 = T5Config(vocab_size=30, d_model=24, d_kv=8, d_ff=40, num_heads=2, num_layers=3)
PUBLISHED = Networks(PixArtConfig(input_size=128, pe_interpolation=2.0), T5Config(), VAEConfig())
SMALL = Networks(
    PixArtConfig(hidden_size=48, num_heads=4, depth=3, caption_channels=24, input_size=16),
    TINY_T5,
    VAEConfig(block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=1),
)
