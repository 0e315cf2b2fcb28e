"""What `splitrun doctor` reports: versions, compiler, and findings, each with what mends it.

Decides from facts that are passed in, so that every finding has a test. Knows nothing of how a report is printed.
"""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata

from splitrun.measure.accelerators import Accelerator
from splitrun.measure.host import HostMemory, Processor
from splitrun.quantities import format_bytes

PACKAGES = (
    "torch", "transformers", "accelerate", "bitsandbytes", "ray", "safetensors", "huggingface_hub", "tokenizers",
    "numpy", "jinja2", "psutil", "pyyaml", "pydantic", "fastapi", "uvicorn", "typer", "rich", "prometheus-client",
    "nvidia-ml-py", "pyzmq",
)  # fmt: skip
"""What splitrun needs, for a checkout that is not installed; an installed one knows its own list with versions."""

COMPILERS = ("cc", "gcc", "clang")
FAST_SETS = ("avx2", "asimd")
LEAST_MEMORY_BYTES = 2 << 30
LAST_TORCH_FOR_OLD_CARDS = (2, 14)


@dataclass(frozen=True)
class Finding:
    """``needed``: splitrun does not work without it."""

    text: str
    needed: bool = False


@dataclass(frozen=True)
class Package:
    """A required package: its version (None: absent) and the range that splitrun asks for."""

    name: str
    version: str | None
    wanted: str = ""


def required_packages(version_of: Callable[[str], str | None] | None = None) -> list[Package]:
    """Every package that splitrun needs, with the version installed here."""
    find = version_of or installed_version
    try:
        lines = [line for line in metadata.requires("splitrun") or () if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        lines = []
    packages = []
    for line in lines or PACKAGES:
        match = re.match(r"([A-Za-z0-9._-]+)\s*([^;]*)", line)
        assert match is not None
        packages.append(Package(match[1], find(match[1]), match[2].strip()))
    return packages


def installed_version(name: str) -> str | None:
    """The installed version of a distribution, None when it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def find_compiler(which: Callable[[str], str | None] = shutil.which) -> str | None:
    """Path of a C compiler, None when there is none."""
    return next((path for name in COMPILERS if (path := which(name)) is not None), None)


def findings(
    packages: Iterable[Package],
    processor: Processor,
    memory: HostMemory,
    accelerators: Sequence[Accelerator],
    driver_cards: Sequence[tuple[str, int]],
    torch_version: str,
    compiler: str | None,
    kernels: str | None,
) -> list[Finding]:
    """What is missing or slow here, and what mends it; empty when all is well.

    ``kernels``: the instruction set that the compiled products run on, None where there are none.
    """
    found = [*_package_findings(packages)]
    found += [Finding(item.fault) for item in accelerators if item.fault is not None]
    if driver_cards and not any(item.kind == "cuda" for item in accelerators):
        names = ", ".join(sorted({name for name, _ in driver_cards}))
        found.append(
            Finding(
                f"the driver sees {names}, but torch {torch_version} does not: install a CUDA build of torch "
                "(pytorch.org, 'Get Started'); for a card older than Turing the cu126 build, torch 2.14 at most"
            )
        )
    found += [_old_card(item, torch_version) for item in accelerators if _is_old(item)]
    if not set(FAST_SETS) & set(processor.instruction_sets):
        found.append(Finding(f"{processor.name} has no AVX2 or NEON: CPU stages run slowly"))
    if memory.free_bytes < LEAST_MEMORY_BYTES:
        found.append(
            Finding(
                f"only {format_bytes(memory.free_bytes)} of main memory is free: close programs, or use --weights nf4"
            )
        )
    if compiler is None:
        found.append(Finding(f"there is no C compiler ({', '.join(COMPILERS)}): {_compiler_advice()}"))
    if kernels is None:
        found.append(
            Finding(
                "the compiled CPU kernels are absent: nf4 and int8 stages on the CPU generate about ten times slower; "
                "with a C compiler, pip install --force-reinstall --no-deps splitrun builds them"
            )
        )
    return found


def _package_findings(packages: Iterable[Package]) -> Iterable[Finding]:
    from packaging.specifiers import SpecifierSet

    for package in packages:
        if package.version is None:
            wanted = f"'{package.name}{package.wanted}'" if package.wanted else package.name
            yield Finding(f"{package.name} is not installed: pip install {wanted}", needed=True)
        elif package.wanted and not SpecifierSet(package.wanted).contains(package.version, prereleases=True):
            yield Finding(
                f"{package.name} {package.version} is outside {package.wanted}: "
                f"pip install '{package.name}{package.wanted}'",
                needed=True,
            )


def _is_old(item: Accelerator) -> bool:
    return item.fault is None and item.compute_capability is not None and item.compute_capability < (7, 5)


def _old_card(item: Accelerator, torch_version: str) -> Finding:
    last = ".".join(map(str, LAST_TORCH_FOR_OLD_CARDS))
    return Finding(
        f"{item.name} is older than Turing: keep a cu126 build of torch, {last} at most (here: {torch_version}); "
        "later builds have no code for it"
    )


def _compiler_advice() -> str:
    if platform.system() == "Darwin":
        return "xcode-select --install"
    return "install gcc (Debian, Ubuntu: apt install gcc; Fedora: dnf install gcc)"
