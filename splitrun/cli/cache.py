"""``splitrun cache``: what is kept on disk so that models start faster, and how to get rid of it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from splitrun.errors import InvalidRequest

if TYPE_CHECKING:
    from splitrun.model.packed_folder import PackEntry

app = typer.Typer(help="List or delete the packed weights that are kept on disk.", no_args_is_help=True)
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def list_(json_output: JsonOption = False) -> None:
    """List the packed weights: model, format, device, size, and when they were last used."""
    from splitrun.model.packed_folder import entries, limit_bytes, packed_root
    from splitrun.quantities import format_bytes

    found = entries()
    if json_output:
        typer.echo(_as_json(found))
        return
    for entry in found:
        typer.echo(_line(entry))
    total = format_bytes(sum(entry.nbytes for entry in found))
    typer.echo(f"{total} of at most {format_bytes(limit_bytes())} (SPLITRUN_CACHE_LIMIT) in {packed_root()}")


@app.command("clear")
def clear(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Only this model's. Default: all.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Delete packed weights; the next start of their models makes them again."""
    from splitrun.model.packed_folder import clear as delete
    from splitrun.model.packed_folder import packed_root
    from splitrun.quantities import format_bytes

    try:
        gone = delete(model=model)
    except OSError as error:
        raise InvalidRequest(f"{packed_root()} cannot be cleared: {error.strerror}; delete it yourself") from error
    if json_output:
        typer.echo(_as_json(gone))
        return
    typer.echo(f"deleted {format_bytes(sum(entry.nbytes for entry in gone))} of {len(gone)} packed models")


def _as_json(found: list[PackEntry]) -> str:
    return json.dumps({"nbytes": sum(entry.nbytes for entry in found), "packed": [each.to_json() for each in found]})


def _line(entry: PackEntry) -> str:
    from splitrun.quantities import format_bytes

    days, rest = divmod(max(0, int(time.time() - entry.used_s)), 86400)
    age = f"{days} d" if days else f"{rest // 3600} h {rest % 3600 // 60} min"
    size = format_bytes(entry.nbytes)
    return f"{size:>9}  {entry.format:10} {entry.device:6} used {age:>10} ago  {entry.model}"
