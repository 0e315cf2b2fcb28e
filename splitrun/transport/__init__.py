"""Moves activations between stages. Knows neither models nor requests."""
