"""Learns by running: devices, memory, bandwidth, the units of a model."""
