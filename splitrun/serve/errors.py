"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}`` and the right status.

Knows which status belongs to which error, and nothing of how requests are answered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from splitrun.errors import ContextTooLong, SplitrunError

_TYPES: Mapping[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", None),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", None),
    503: ("server_error", "unavailable"),
}


_KINDS: Mapping[str, str] = {
    "prompt": "a prompt is a text, a list of texts, a list of token ids, or a list of such lists, and none is empty",
    "stop": "it is a text or a list of texts",
    "content": "it is a text or a list of parts, each with a type and a text",
}
"""Fields that may be of several kinds, of which the first one's complaint says nothing."""


class ModelNotFound(SplitrunError):
    """The request names a model that is not served here."""

    http_status = 404


def error_body(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind, default_code = _TYPES.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    return {"error": {"message": message, "type": kind, "param": param, "code": code or default_code}}


def error_body_of(error: SplitrunError) -> dict[str, Any]:
    """The JSON of one of splitrun's own errors."""
    code = None
    if isinstance(error, ContextTooLong):
        code = "context_length_exceeded"
    elif isinstance(error, ModelNotFound):
        code = "model_not_found"
    return error_body(str(error), error.http_status, code)


def error_response(message: str, status: int, *, close: bool = False) -> Response:
    """An answer with this error. ``close`` ends the connection, for requests that were not read to their end."""
    return _respond(error_body(message, status), status, close=close)


def _respond(body: Mapping[str, Any], status: int, *, close: bool = False) -> Response:
    """The JSON of an error as an answer. ASCII alone: what is wrong with a request may be half a surrogate pair."""
    headers = {"connection": "close"} if close else {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status in (429, 503):
        headers["retry-after"] = "1"
    return Response(json.dumps(body), status, headers, media_type="application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of the application in OpenAI's format."""

    @app.exception_handler(SplitrunError)
    async def refuse(_: Request, error: SplitrunError) -> Response:
        return _respond(error_body_of(error), error.http_status)

    @app.exception_handler(RequestValidationError)
    async def refuse_malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        kind = request.headers.get("content-type", "")
        if first["type"] == "json_invalid":
            why = first.get("ctx", {}).get("error", first["msg"])
            return error_response(f"the body is not valid JSON: {why}", 400)
        if request.method == "POST" and "json" not in kind:
            told = f"the body is of type {kind[:80]!r}" if kind else "the body's type is missing"
            return error_response(f"{told}: send Content-Type: application/json", 400)
        parts = [str(part) for part in first["loc"] if part != "body"]
        told = str(first["msg"]).removeprefix("Value error, ")
        several = next((place for place, part in enumerate(parts[:-1]) if part in _KINDS), None)
        if several is not None:
            parts, told = parts[: several + 1], _KINDS[parts[several]]
        where = ".".join(parts) or "the body"
        return _respond(error_body(f"{where[:200]}: {told}", 400, param=parts[0] if parts else None), 400)

    @app.exception_handler(StarletteHTTPException)
    async def refuse_http(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{request.method} {request.url.path}: {message}; /openapi.json lists what there is"
        return error_response(message, error.status_code, close=error.status_code in (408, 413))

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:
        return error_response("the server failed on this request; its log holds the traceback", 500)
