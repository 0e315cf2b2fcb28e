"""``splitrun check``: does a placement still suit the model and this machine?"""

from __future__ import annotations

from typing import Annotated

import typer

from splitrun.cli.colours import show
from splitrun.cli.options import LoadOption, VerifyOption, is_placement
from splitrun.errors import InvalidPlacement


def check(
    placement: Annotated[str, typer.Argument(metavar="PLACEMENT", help="A placement file (.yaml).")],
    load: LoadOption = "weights",
    verify: VerifyOption = False,
) -> None:
    """Compare PLACEMENT with the model and this machine as they are now. Status 2, and what mends it, when stale."""
    if not is_placement(placement):
        raise InvalidPlacement(f"{placement} is no placement file (.yaml); make one with: splitrun plan MODEL -o FILE")
    from splitrun import Placement, api

    found = Placement.load(placement)
    api.check(found, placement, load=load, verify=verify)
    show(found.explain())
    typer.echo(f"\n{placement} suits the model and this machine")
