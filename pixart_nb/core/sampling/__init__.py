"""Sampling: noise schedule, samplers, schedulers, text, guidance, pipelines, resumable stages."""
