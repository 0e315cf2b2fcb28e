"""The HTTP application: the OpenAI endpoints, health, metrics and the placement. Knows nothing of processes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from splitrun.serve.chat import chat_router
from splitrun.serve.completions import completions_router
from splitrun.serve.context import ServeContext
from splitrun.serve.errors import install_error_handlers


def create_app(context: ServeContext) -> FastAPI:
    """All endpoints over one engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await context.client.close()

    app = FastAPI(title="splitrun", lifespan=lifespan, docs_url=None, redoc_url=None)
    install_error_handlers(app)
    app.include_router(chat_router(context))
    app.include_router(completions_router(context))
    _add_models(app, context)
    _add_status(app, context)
    return app


def _add_models(app: FastAPI, context: ServeContext) -> None:
    def card() -> dict[str, Any]:
        return {
            "id": context.served_name, "object": "model", "created": context.started, "owned_by": "splitrun",
            "max_model_len": context.client.status.context,
        }  # fmt: skip

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        context.check_model(name)
        return card()


def _add_status(app: FastAPI, context: ServeContext) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        status = await context.client.fresh_status()
        if status.healthy:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unhealthy", "reason": status.reason}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        await context.client.fresh_status()
        return Response(context.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/placement")
    async def placement() -> dict[str, Any]:
        status = await context.client.fresh_status()
        return {"model": context.served_name, "uptime_s": int(time.time()) - context.started, **status.to_json()}
