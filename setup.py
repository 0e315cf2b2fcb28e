"""Compiles the processor kernels, each file with the flags of its own instruction set; pyproject.toml has the rest.

Optional throughout: an instruction set that the compiler does not know is left out, and without a compiler splitrun
installs all the same and multiplies with torch.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCE = "splitrun/kernels/cpu/source"
COMMON = ["-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-fPIC", "-Wno-psabi"]
FILES = (
    "block.c",
    "chain.c",
    "chunk.c",
    "chunkattention.c",
    "layout.c",
    "panels.c",
    "portable.c",
    "product.c",
    "quantize.c",
    "team.c",
)
DISPATCH = ("dispatch.c", "many.c")
"""What asks which levels there are."""
LEVELS = {
    "x86_64": {
        "avx512vnni.c": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"],
        "avx512dots.c": [
            "-mavx512f",
            "-mavx512bw",
            "-mavx512vl",
            "-mavx512dq",
            "-mavx512vnni",
            "-mavx512vbmi",
            "-mavx512bf16",
        ],
        "amxdots.c": [
            "-mavx512f",
            "-mavx512bw",
            "-mavx512vl",
            "-mavx512dq",
            "-mavx512vnni",
            "-mavx512vbmi",
            "-mavx512bf16",
            "-mamx-tile",
            "-mamx-bf16",
            "-mamx-int8",
        ],
        "avx512bf16.c": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"],
        "avx512int8.c": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"],
        "amx.c": [
            "-mavx512f",
            "-mavx512bw",
            "-mavx512vl",
            "-mavx512dq",
            "-mavx512bf16",
            "-mamx-tile",
            "-mamx-bf16",
            "-mamx-int8",
        ],
        "avx512int16.c": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"],
        "avx2vnniint16.c": ["-mavx2", "-mavxvnni"],
        "avx2int16.c": ["-mavx2"],
        "avx2fp32.c": ["-mavx2", "-mfma"],
        "avx2vnni.c": ["-mavx2", "-mavxvnni"],
        "avx2.c": ["-mavx2"],
    },
    "aarch64": {"neon.c": ["-march=armv8.2-a+dotprod"]},
}
"""Per processor family: file -> flags. Nothing is compiled for the machine that happens to compile."""


def family() -> str:
    """The processor family that is built for: a key of LEVELS, or another name."""
    machine = sysconfig.get_platform().rpartition("-")[2]
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


class BuildKernels(build_ext):
    """Compiles file by file, so that flags differ and one file may fail."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link the library. A level that does not compile is left out."""
        objects: list[str] = []
        have: list[tuple[str, str | None]] = []
        for name, flags in LEVELS.get(family(), {}).items():
            try:
                objects += self._compile(name, flags, [])
            except CompileError as error:
                self.warn(f"{name} is left out: {error}")
            else:
                have.append((f"HAVE_{Path(name).stem.upper()}", None))
        for name in (*FILES, *DISPATCH):
            objects += self._compile(name, [], have)
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, build_temp=self.build_temp)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: the library is loaded by ctypes and is no Python module."""
        return []

    def _compile(self, name: str, flags: list[str], macros: list[tuple[str, str | None]]) -> list[str]:
        compiled: list[str] = self.compiler.compile(
            [f"{SOURCE}/{name}"], self.build_temp, macros, extra_postargs=[*COMMON, *flags]
        )
        return compiled


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "splitrun.kernels.cpu._native",
            [f"{SOURCE}/{name}" for name in (*FILES, *DISPATCH)],
            depends=sorted(str(path) for path in Path(SOURCE).glob("*.[ch]")),
            optional=True,
        )
    ],
)
