"""Baselines and pictures."""
