"""Measuring speed and memory, alone and against the peer (diffusers on PyTorch)."""
