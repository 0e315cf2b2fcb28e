"""Decide which device computes which units, and explain it. Pure: no torch, no measuring; files: the placement."""
