"""``splitrun doctor``: what this machine offers, what is missing, and how to get it."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING, Annotated

import typer

from splitrun.errors import SplitrunError

if TYPE_CHECKING:
    from splitrun.measure.health import Finding, Package
    from splitrun.measure.probe import Survey
    from splitrun.planner.facts import Cluster

PROBE_NEEDS = ("torch", "psutil")


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure speeds again.")] = False,
) -> None:
    """Show devices, free memory, speeds and versions, and what is missing. Status 1 when something needed is."""
    from splitrun.measure.health import find_compiler, findings, required_packages

    packages = required_packages()
    missing = [package.name for package in packages if package.version is None and package.name in PROBE_NEEDS]
    if missing:
        raise SplitrunError(f"{', '.join(missing)} is not installed: pip install . in splitrun's folder")
    from splitrun.kernels.cpu.library import kernel
    from splitrun.measure.context import driver_cards
    from splitrun.measure.probe import cluster_of, survey, this_machine

    try:
        machine = this_machine(refresh)
    except (ImportError, OSError) as error:
        raise SplitrunError(f"torch is installed but cannot be loaded ({error}): install it again") from error
    found = survey(machine)
    cluster = cluster_of(found, machine)
    torch_version = str(machine.torch.__version__)
    compiler, fast = find_compiler(), kernel()
    level = None if fast is None else fast.name
    faults = findings(
        packages, found.processor, found.memory, found.accelerators, driver_cards(), torch_version, compiler, level
    )
    if json_output:
        typer.echo(json.dumps(_as_json(found, cluster, packages, faults, compiler, level)))
    else:
        _print(found, cluster, packages, faults, compiler, level)
    if any(finding.needed for finding in faults):
        raise typer.Exit(1)


def _print(
    found: Survey,
    cluster: Cluster,
    packages: list[Package],
    faults: list[Finding],
    compiler: str | None,
    level: str | None,
) -> None:
    from splitrun import __version__
    from splitrun.quantities import format_bytes, format_seconds

    typer.echo(f"splitrun {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    typer.echo(f"compiler: {compiler or 'none'}")
    typer.echo(f"compiled CPU kernels: {level or 'none'}")
    typer.echo(f"instruction sets: {' '.join(found.processor.instruction_sets) or 'none that matter'}")
    typer.echo("\ndevices")
    for device in cluster.devices:
        typer.echo(
            f"  {device.name:8} {device.description}: {format_bytes(device.total_bytes)}, "
            f"{format_bytes(device.free_bytes)} free, default budget {format_bytes(device.budget_bytes)}"
        )
        details = [
            f"reads {device.bandwidth_bytes_per_s / 1e9:,.0f} GB/s",
            f"{device.flops_per_s / 1e12:,.2f} TFLOP/s in {device.compute_dtype}",
        ]
        if device.context_bytes:
            details.append(f"context {format_bytes(device.context_bytes)}")
        if device.kind != "cpu" and device.memory_pool == "host":
            details.append("shares main memory with cpu")
        if ("cpu", device.name) in cluster.links:
            link = cluster.link("cpu", device.name)
            details.append(
                f"copies from cpu {link.bandwidth_bytes_per_s / 1e9:,.1f} GB/s after {format_seconds(link.latency_s)}"
            )
        typer.echo(f"  {'':8} {', '.join(details)}")
    typer.echo("\nversions")
    typer.echo("  " + ", ".join(f"{package.name} {package.version or 'missing'}" for package in packages))
    typer.echo("\nfindings")
    for finding in faults:
        typer.echo(f"  {'NEEDED' if finding.needed else 'note'}: {finding.text}")
    if not faults:
        typer.echo("  none: everything needed is here")


def _as_json(
    found: Survey,
    cluster: Cluster,
    packages: list[Package],
    faults: list[Finding],
    compiler: str | None,
    level: str | None,
) -> dict[str, object]:
    from dataclasses import asdict

    from splitrun import __version__

    return {
        "splitrun": __version__,
        "python": platform.python_version(),
        "processor": asdict(found.processor),
        "memory": asdict(found.memory),
        "devices": [asdict(device) for device in cluster.devices],
        "packages": {package.name: package.version for package in packages},
        "compiler": compiler,
        "cpu_kernels": level,
        "findings": [asdict(finding) for finding in faults],
    }
