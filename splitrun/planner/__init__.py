"""Decide which device computes which units, and explain it. Pure: no torch, no measuring, no files but the placement."""
