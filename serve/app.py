"""The HTTP application: routes of OpenAI's images API, status and the web page."""

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
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
from starlette.requests import ClientDisconnect

from serve.dispatch import Dispatcher
from serve.http_guard import Guard
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
from serve.uploads import from_base64, to_edit, to_line_drawing, to_recolour, to_vary

PAGE = Path(__file__).with_name("page")
ANSWERS = {
    200: {"description": "Images, best first; with `stream` server-sent events"},
    400: {
        "description": "A field out of range, an unknown field, an unreadable image: `error.param` names it"
    },
    401: {"description": "No key, or a wrong one"},
    403: {"description": "The key may not do this"},
    404: {"description": "Unknown model"},
    413: {"description": "The body is too large"},
    429: {"description": "The queue is full or the key's limit is reached: Retry-After"},
    503: {"description": "The model is loading or being restarted: Retry-After"},
    504: {"description": "Not ready within the deadline"},
}
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
        service.refuse(request, getattr(request.state, "key", None), None, time.perf_counter(), error)
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(ValidationError)
    async def validation_error(request: Request, error: ValidationError) -> JSONResponse:
        return await api_error(request, as_api_error(error))

    @app.exception_handler(ClientDisconnect)
    async def client_gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # in the middle of its body: nobody reads this

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        answer = ApiError(error.status_code, f"{error.detail}.", codes.get(error.status_code, "http_error"))
        return JSONResponse(answer.body(), answer.status, headers=dict(error.headers or {}))

    _add_images(app, service)
    _add_status(app, service)
    app.mount("/static", StaticFiles(directory=PAGE), name="static")

    for path, name in (("/", "index.html"), ("/docs", "docs.html")):
        app.add_api_route(path, _page(name), include_in_schema=False)
    return app


def _page(name: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response((PAGE / name).read_bytes(), media_type="text/html; charset=utf-8")

    return page


def _add_images(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images/generations", openapi_extra=_json_body(GenerationRequest), responses=ANSWERS)
    async def generations(request: Request) -> Response:
        """Images of a text. `line`: a line drawing (base64) that they follow."""
        key = service.authenticate(request, "generate")
        body, line = GenerationRequest.model_validate_json(await request.body(), strict=True), None
        if body.line is None and body.line_scale is not None:
            raise ApiError(400, "'line_scale' has no effect without 'line'.", "invalid_value", "line_scale")
        if body.line is not None:
            service.require_lines("line")
            drawing = from_base64(body.line, "line")
            line = await service.prepare(to_line_drawing, drawing, _scale(body.line_scale))
        return await service.answer(request, body, key, body.prompt, line=line)

    @app.post("/v1/images/edits", openapi_extra=_form_body(EditRequest, "image", "mask"), responses=ANSWERS)
    async def edits(request: Request) -> Response:
        """The marked part sampled anew; with `recolour` the same shape and background in the colour of the text."""
        key = service.authenticate(request, "edit")
        fields, files = await _form(request)
        body = EditRequest.model_validate(fields)
        image, mask = _required(files, "image"), files.get("mask")
        if not body.recolour:
            if body.line_scale is not None:
                raise ApiError(
                    400, "'line_scale' has no effect without 'recolour'.", "invalid_value", "line_scale"
                )
            source = await service.prepare(to_edit, image, mask)
            return await service.answer(request, body, key, body.prompt, source)
        if mask is not None:
            raise ApiError(400, "'recolour' takes no mask.", "invalid_value", "mask")
        service.require_lines("recolour")
        source, line = await service.prepare(to_recolour, image, _scale(body.line_scale))
        return await service.answer(request, body, key, body.prompt, source, line)

    @app.post("/v1/images/variations", openapi_extra=_form_body(VariationRequest, "image"), responses=ANSWERS)
    async def variations(request: Request) -> Response:
        """Images like the one given."""
        key = service.authenticate(request, "edit")
        fields, files = await _form(request)
        body = VariationRequest.model_validate(fields)
        source = await service.prepare(to_vary, _required(files, "image"), body.strength)
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
        info = service.require_model()
        extra = {
            "image_size": info.image_size,
            "sha256": info.sha256,
            "engine": info.engine,
            "weights": info.weights,
            "ranker": info.ranker,
            "max_images": info.max_images,
            "line_drawings": bool(info.line_size),
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
    return files[name]


def _scale(given: float | None) -> float:
    return 1.0 if given is None else given


def _json_body(schema: type[ImageRequest]) -> dict[str, Any]:
    return {"requestBody": {"content": {"application/json": {"schema": schema.model_json_schema()}}}}


def _form_body(schema: type[ImageRequest], *files: str) -> dict[str, Any]:
    """The first of `files` is required."""
    described = schema.model_json_schema()
    described["properties"] = {name: {"type": "string", "format": "binary"} for name in files} | described[
        "properties"
    ]
    described["required"] = [files[0], *described.get("required", [])]
    return {"requestBody": {"content": {"multipart/form-data": {"schema": described}}}}
