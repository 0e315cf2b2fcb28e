"""``splitrun status``: what a server's stages do now, again and again."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from splitrun.errors import InvalidRequest, StageLost

MOST_BYTES = 16 << 20


def status(
    url: Annotated[str, typer.Option("--url", help="The server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="SPLITRUN_API_KEY", help="Its key.")] = None,
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
) -> None:
    """Show a running server's stages: node, device, layers, ms per step, queue, bytes over the hop, restarts."""
    before: Mapping[str, Any] | None = None
    while True:
        now = _fetch(url, api_key)
        if not once:
            typer.echo("\x1b[2J\x1b[H", nl=False)
        typer.echo("\n".join(lines(now, before, every)))
        if once:
            return
        before = now
        time.sleep(every)


def lines(now: Mapping[str, Any], before: Mapping[str, Any] | None, seconds: float) -> list[str]:
    """The table; rates are per second since ``before``."""
    state = "healthy" if now["healthy"] else f"not healthy: {now['reason']}"
    made = now["completion_tokens"] - before["completion_tokens"] if before else 0
    rate = f", {made / seconds:.1f} tok/s" if before else ""
    shown = [
        f"{now['model']}: {state}; {now['running']} running, {now['waiting']} waiting{rate}; epoch {now['epoch']}",
        f"{'stage':>5}  {'node':12} {'device':12} {'units':26} {'ms/step':>8} {'mean':>8} {'queue':>5} {'hop MB':>9} "
        f"{'kept MB':>8} {'restarts':>8}",
    ]
    for index, stage in enumerate(now["stages"]):
        device = stage["device"].rpartition("/")[2] if stage["node"] else stage["device"]
        shown.append(
            f"{index:>5}  {stage['node'] or 'here':12} {device:12} {stage['units']:26} {stage['last_step_ms']:>8.2f} "
            f"{stage['mean_step_ms']:>8.2f} {stage['queued']:>5} {stage['sent_bytes'] / 1e6:>9.2f} "
            f"{stage['kept_bytes'] / 1e6:>8.1f} {stage['restarts']:>8}"
        )
    return shown


def _fetch(url: str, api_key: str | None) -> Mapping[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(f"--url {url} is no http address, such as http://127.0.0.1:8000")
    try:
        request = urllib.request.Request(url.rstrip("/") + "/placement")
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: Mapping[str, Any] = json.loads(answer.read(MOST_BYTES))
    except urllib.error.HTTPError as error:
        mend = "give its --api-key" if error.code == 401 else "is it the address of a splitrun server?"
        raise InvalidRequest(f"{url} answers {error.code}: {mend}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise StageLost(f"no splitrun server answers at {url}: {reason}; start it with 'splitrun serve'") from error
    if not isinstance(found, dict) or "stages" not in found:
        raise InvalidRequest(
            f"{url} answers, but is no splitrun server: give the address that 'splitrun serve' printed"
        )
    return found
