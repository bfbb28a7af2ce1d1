"""Benchmarks of speed and memory. ``pixart-nb bench`` runs them from a checkout of the repository."""
