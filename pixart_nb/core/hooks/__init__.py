"""Hooks: attention traces and interventions."""
