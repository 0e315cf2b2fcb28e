"""Processes and machines that run stages. Knows neither models nor requests."""
