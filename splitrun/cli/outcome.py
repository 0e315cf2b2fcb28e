"""What the planning commands do with a placement: save it, draw it, print it. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import typer

from splitrun.cli.colours import show
from splitrun.cli.options import is_placement, refuse_destinations
from splitrun.errors import InvalidPlacement

if TYPE_CHECKING:
    from splitrun.planner.placement import Placement


@dataclass(frozen=True)
class Destination:
    """Where a plan goes, as a command was told."""

    output: Path | None
    svg: Path | None
    json_output: bool = False

    def check(self) -> None:
        """Before minutes of planning: raise InvalidPlacement for a file that could not be written, or not be found as
        what it is."""
        refuse_destinations({"-o": self.output, "--svg": self.svg})
        if self.output is not None and not is_placement(self.output.name):
            raise InvalidPlacement(
                f"{self.output}: serve, run and check know a placement file by its ending: name it "
                f"{self.output.with_suffix('.yaml')}"
            )
        if self.output is not None and self.output == self.svg:
            raise InvalidPlacement(f"-o and --svg both name {self.output}; give each a file of its own")

    def send(self, placement: Placement, derive: bool = False) -> None:
        """Save, draw and print; with ``derive`` also how the figures come about."""
        if self.output is not None:
            placement.save(self.output)
        if self.svg is not None:
            from splitrun.planner.picture import save_picture

            save_picture(placement, self.svg)
        if self.json_output:
            typer.echo(placement.to_json())
            return
        show(placement.explain())
        if derive:
            from splitrun.planner.derivation import derivation

            typer.echo("\n" + "\n".join(derivation(placement)))
        if self.output is not None:
            typer.echo(f"\nsaved to {self.output}; serve it with: splitrun serve {quote(str(self.output))}")
