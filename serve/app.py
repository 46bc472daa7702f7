"""The HTTP application: routes of OpenAI's images API, status and the web page."""

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from serve.dispatch import Dispatcher
from serve.http_guard import Guard
from serve.messages import SourceImage
from serve.options import ServeOptions
from serve.schemas import (
    ApiError,
    EditRequest,
    GenerationRequest,
    ImageRequest,
    VariationRequest,
    as_api_error,
)
from serve.service import Service
from serve.uploads import edit_region, readable

PAGE = Path(__file__).with_name("page")
MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def create_app(options: ServeOptions, dispatcher: Dispatcher) -> FastAPI:
    """The application; its worker starts and ends with it. Raises ValueError as `Service` does."""
    service = Service(options, dispatcher)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await dispatcher.start()
        yield
        await dispatcher.drain(options.drain_seconds)
        service.audit.close()

    app = FastAPI(title="Product Painter", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(
        Guard, max_body_bytes=int(options.max_body_mb * 2**20), body_seconds=options.body_seconds
    )
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        service.refuse(request, None, None, time.perf_counter(), error)
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(ValidationError)
    async def validation_error(request: Request, error: ValidationError) -> JSONResponse:
        return await api_error(request, as_api_error(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        answer = ApiError(error.status_code, f"{error.detail}.", codes.get(error.status_code, "http_error"))
        return JSONResponse(answer.body(), answer.status, headers=dict(error.headers or {}))

    _add_images(app, service)
    _add_status(app, service)
    app.mount("/static", StaticFiles(directory=PAGE), name="static")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response((PAGE / "index.html").read_bytes(), media_type="text/html; charset=utf-8")

    return app


def _add_images(app: FastAPI, service: Service) -> None:
    def body_of(schema: type[ImageRequest]) -> dict[str, Any]:
        return {"requestBody": {"content": {"application/json": {"schema": schema.model_json_schema()}}}}

    @app.post("/v1/images/generations", openapi_extra=body_of(GenerationRequest))
    async def generations(request: Request) -> Response:
        key = service.authenticate(request, "generate")
        body = GenerationRequest.model_validate_json(await request.body(), strict=True)
        return await service.answer(request, body, key, body.prompt)

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        key = service.authenticate(request, "edit")
        fields, files = await _form(request)
        body = EditRequest.model_validate(fields)
        image = _required(files, "image")
        mask = edit_region(image, files.get("mask"))
        return await service.answer(request, body, key, body.prompt, SourceImage("inpaint", image, mask))

    @app.post("/v1/images/variations")
    async def variations(request: Request) -> Response:
        key = service.authenticate(request, "edit")
        fields, files = await _form(request)
        body = VariationRequest.model_validate(fields)
        source = SourceImage("vary", _required(files, "image"), strength=body.strength)
        return await service.answer(request, body, key, body.prompt, source)

    @app.get("/images/{name}", include_in_schema=False)
    async def image(name: str) -> Response:
        data = service.store.get(name)
        if data is None:
            raise ApiError(404, "There is no such image, or its time is over.", "not_found")
        return Response(
            data,
            media_type=MEDIA[name.rpartition(".")[2]],
            headers={"cache-control": "private, max-age=3600"},
        )


def _add_status(app: FastAPI, service: Service) -> None:
    dispatcher = service.dispatcher

    def described() -> dict[str, Any]:
        info = dispatcher.info
        if info is None:
            raise ApiError(503, "The model is still loading.", "model_unavailable", retry_after=5.0)
        extra = {
            "image_size": info.image_size,
            "sha256": info.sha256,
            "engine": info.engine,
            "weights": info.weights,
            "ranker": info.ranker,
            "max_images": info.max_images,
        }
        return {
            "id": info.name,
            "object": "model",
            "created": service.created,
            "owned_by": "product-painter",
        } | extra

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.authenticate(request, "generate")
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        service.authenticate(request, "generate")
        service.check_model(name)
        return described()

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> JSONResponse:
        return JSONResponse({"status": dispatcher.state}, 200 if dispatcher.state == "ready" else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        service.metrics.queued.set(dispatcher.queued_images)
        service.metrics.ready.set(dispatcher.state == "ready")
        service.metrics.restarts.set(dispatcher.restarts)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _form(request: Request) -> tuple[dict[str, str], dict[str, bytes]]:
    """Fields and files of a multipart body. Raises ApiError."""
    try:
        async with request.form(max_files=4, max_fields=40) as form:
            fields, files = {}, {}
            for name, value in form.multi_items():
                name = name.removesuffix("[]")  # as some clients write lists
                if isinstance(value, UploadFile):
                    files.setdefault(name, await value.read())
                else:
                    fields[name] = value
            return fields, files
    except (MultiPartException, HTTPException) as error:
        raise ApiError(400, "The multipart body cannot be read.", "invalid_multipart") from error


def _required(files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise ApiError(400, f"Missing required parameter: '{name}'.", "missing_required_parameter", name)
    return readable(files[name], name)
