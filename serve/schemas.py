"""Requests and errors of OpenAI's images API, and our own options as extra fields.

Validated strictly: an unknown field, a number out of range or of another type answers 400 with the field's name.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.outputs.label import LabelMode
from dalle.options import MOST_GUIDANCE, MOST_SCALE, SamplingOptions, Schedule

MAX_IMAGES, MAX_PROMPT_CHARS, MAX_PARTIAL_IMAGES = 16, 2000, 16
MAX_CANDIDATES = 64  # images that are sampled for one request
MAX_BASE64 = 1 << 30  # the limit on bodies is what counts
CANDIDATES = {
    "auto": 1,
    "low": 1,
    "standard": 1,
    "medium": 2,
    "high": 4,
    "hd": 4,
}  # sampled for each one returned
ENLARGED_SIDES = (256, 512, 1024)
Quality = Literal["auto", "low", "standard", "medium", "high", "hd"]
OutputFormat = Literal["png", "jpeg", "webp"]


class ApiError(Exception):
    """An answer with OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after
        self.is_recorded = False

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, rounded up so that it is true."""
        return (
            {} if self.retry_after is None else {"Retry-After": str(max(1, int(-(-self.retry_after // 1))))}
        )


class ImageRequest(BaseModel):
    """What all three endpoints take."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, str_max_length=1 << 20)

    model: str | None = Field(None, max_length=200)
    n: int = Field(1, ge=1, le=MAX_IMAGES)
    size: str = Field("auto", max_length=20)
    quality: Quality = "auto"
    response_format: Literal["url", "b64_json"] = "url"
    output_format: OutputFormat = "png"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    user: str | None = Field(None, max_length=500)
    safety_identifier: str | None = Field(None, max_length=500)
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=MAX_PARTIAL_IMAGES)
    # ours
    seed: int | None = Field(None, ge=0, lt=2**53)
    cfg_scale: float | None = Field(None, ge=0, le=MOST_GUIDANCE)
    cfg_schedule: Schedule | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    negative: str = Field("", max_length=MAX_PROMPT_CHARS)
    rank: bool = True
    label: LabelMode | None = None
    whiten: bool = False

    def sampling(self) -> SamplingOptions:
        """The options that were given, the defaults for the others. Raises ApiError."""
        names = ("cfg_scale", "cfg_schedule", "temperature", "top_k", "top_p", "min_p")
        given = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        try:
            return SamplingOptions(**given)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value", str(error).split()[0]) from error

    @property
    def num_candidates(self) -> int:
        """Images that are sampled for those that are returned; without ranking none is left out."""
        return self.n * (CANDIDATES[self.quality] if self.rank else 1)

    def side(self, model_side: int) -> int:
        """Pixels of the square answer. Raises ApiError for a size that is not offered."""
        if self.size == "auto":
            return model_side
        offered = sorted({model_side, *(s for s in ENLARGED_SIDES if s > model_side)})
        for side in offered:
            if self.size == f"{side}x{side}":
                return side
        sizes = ", ".join(f"{s}x{s}" for s in offered)
        raise ApiError(
            400, f"size must be auto or one of {sizes}, not {self.size[:20]!r}", "invalid_value", "size"
        )


class GenerationRequest(ImageRequest):
    """`POST /v1/images/generations`"""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS)
    style: Literal["vivid", "natural"] | None = None
    # ours
    line: str | None = Field(None, min_length=1, max_length=MAX_BASE64)
    line_scale: float | None = Field(None, ge=0, le=MOST_SCALE)


class EditRequest(ImageRequest):
    """`POST /v1/images/edits`, the fields beside the files."""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS)
    input_fidelity: Literal["high", "low"] | None = None
    # ours
    recolour: bool = False
    line_scale: float | None = Field(None, ge=0, le=MOST_SCALE)


class VariationRequest(ImageRequest):
    """`POST /v1/images/variations`, the fields beside the file; the prompt is ours, since the generator reads text."""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS)
    strength: float = Field(0.5, gt=0, le=1)


def as_api_error(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    shown = "body" if param is None else param[:80]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{shown}'.", "unknown_parameter", shown)
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{shown}'.", "missing_required_parameter", shown)
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", "invalid_json")
    return ApiError(400, f"Invalid value for '{shown}': {first['msg']}.", "invalid_value", param and shown)
