"""What the environment may say about the processor kernels. Checked before anything is loaded; imports nothing heavy.

``SPLITRUN_CPU_KERNELS`` is the name of a level (``avx2``) or ``none``; it holds for prompts too, which then have the
kernels of that level and of those below. ``SPLITRUN_CPU_PROMPTS`` is a kind of arithmetic for prompts, the name of a
kernel, or ``torch``. Whether this machine has what is named, the kernels find out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from splitrun.errors import InvalidRequest

LEVEL_VARIABLE = "SPLITRUN_CPU_KERNELS"
NONE = "none"
LEVELS = ("amxdots", "avx512dots", "avx512vnni", "avx2vnni", "avx2", "neon", "portable")
PROMPT_VARIABLE = "SPLITRUN_CPU_PROMPTS"
KINDS = ("bf16", "int8")
TORCH = "torch"
PROMPT_KERNELS = {
    "amx-bf16": "amxdots",
    "amx-int8": "amxdots",
    "avx512bf16": "avx512dots",
    "avx512int8": "avx512vnni",
    "avx512int8-wide": "avx512vnni",
    "avx512int16": "avx512vnni",
    "avx2vnniint16": "avx2vnni",
    "avx2int16": "avx2",
    "avx2fp32": "avx2",
}
"""Kernels for prompts -> the lowest level that has them."""


def check_settings(environment: Mapping[str, str] = os.environ) -> None:
    """Raise InvalidRequest for a name that no build has. An empty value is none."""
    allowed = {LEVEL_VARIABLE: (NONE, *LEVELS), PROMPT_VARIABLE: (*KINDS, TORCH, *PROMPT_KERNELS)}
    for variable, names in allowed.items():
        wanted = environment.get(variable)
        if wanted and wanted not in names:
            raise InvalidRequest(f"{variable} is {wanted!r}: it must be one of {', '.join(names)}, or not be set")
