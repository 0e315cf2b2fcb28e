"""Randomness as a function of (seed, position): no generator state, so nothing to save, move or lose.

The hash is SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, with the
finalizer constants of Vigna's published reference): output n of a generator is a mix of ``seed + n * gamma``, so it can
be computed for any n alone.
"""

from __future__ import annotations

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


def splitmix64(seed: int, index: int) -> int:
    """Output ``index`` (from 0) of the SplitMix64 generator with that seed: 64 bits."""
    mixed = (seed + (index + 1) * _GAMMA) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that chooses the token at ``position``: a multiple of 2**-53.

    The seed is mixed first: neighbouring seeds would otherwise start on shifted copies of one sequence.
    """
    return (splitmix64(splitmix64(seed, 0), position) >> 11) * 2.0**-53
