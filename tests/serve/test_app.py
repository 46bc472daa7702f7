"""The service over HTTP, through the published client and by hand."""

import asyncio
import base64
import concurrent.futures
import io
import json
import os
import signal
import time

import httpx
import numpy as np
import openai
import pytest
from PIL import Image, ImageDraw

from common.outputs.label import read_labels, read_manifest
from common.square import resize_square
from dalle import inpaint
from dalle.engines import FastOptions
from dalle.lines import LineControl
from dalle.pipeline import TextToImage
from dalle.sampling import SamplingOptions
from data_tools.images.line_drawings import extract, open_drawing
from diffusion.white_background import Whitener
from serve.audit import verify
from serve.keys import Limits
from serve.service import _EventStream

TEXT = "一件红色的连衣裙"
OPTIONS = {"cfg_scale": 2.0, "temperature": 0.9}


@pytest.fixture(scope="module")
def client(service):
    with openai.OpenAI(api_key=service.key, base_url=f"{service.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(service):
    headers = {"Authorization": f"Bearer {service.key}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=300) as http:
        yield http


@pytest.fixture(scope="module")
def pipeline(small_generator):
    return TextToImage.from_pretrained(small_generator, "cpu", FastOptions("torch", "float32"))


def images_of(response) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(entry.b64_json))) for entry in response.data]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def post(http, path="/v1/images/generations", **body) -> httpx.Response:
    return http.post(path, json=body)


def test_the_published_client_gets_the_pipelines_images(client, pipeline):
    response = client.images.generate(
        prompt=TEXT, n=3, response_format="b64_json", extra_body={"seed": 5, **OPTIONS}
    )
    wanted = [p.image for p in pipeline.generate([TEXT], 3, 5, SamplingOptions(**OPTIONS))]
    assert [image.tobytes() for image in images_of(response)] == [image.tobytes() for image in wanted]
    assert response.size == "40x40" and response.usage.output_tokens == 300


def test_requests_at_once_get_the_same_images_as_alone(client):
    def ask(seed):
        response = client.images.generate(
            prompt=TEXT, n=1 + seed % 3, response_format="b64_json", extra_body={"seed": seed}
        )
        return [image.tobytes() for image in images_of(response)]

    alone = [ask(seed) for seed in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone


def test_images_are_labelled_and_kept_under_a_url_for_a_while(client, http, service):
    response = client.images.generate(prompt=TEXT, output_format="webp")
    url = response.data[0].url
    got = httpx.get(url)
    assert got.headers["content-type"] == "image/webp"
    image = Image.open(io.BytesIO(got.content))
    assert read_labels(image)[0].label.ContentProducer == "product-painter"
    path = service.folder / "served" / url.rpartition("/")[2]
    os.utime(path, (1, 1))
    assert httpx.get(url).status_code == 404
    for name in ("../keys.db", "%2e%2e%2fkeys.db", "x.png"):
        assert httpx.get(f"{service.url}/images/{name}").status_code == 404


def test_an_image_grows_row_by_row(client):
    events = list(
        client.images.generate(prompt=TEXT, n=2, stream=True, partial_images=4, extra_body={"seed": 1})
    )
    partial = [e for e in events if e.type == "image_generation.partial_image"]
    done = [e for e in events if e.type == "image_generation.completed"]
    assert len(partial) == 8 and len(done) == 2
    first = [Image.open(io.BytesIO(base64.b64decode(e.b64_json))) for e in partial if e.index == 0]
    assert [e.partial_image_index for e in partial if e.index == 0] == [0, 1, 2, 3]
    grey = [sum(p == (200, 200, 200) for p in image.getdata()) for image in first]
    assert grey == sorted(grey, reverse=True) and grey[0] >= 30 * 40
    whole = client.images.generate(prompt=TEXT, n=2, response_format="b64_json", extra_body={"seed": 1})
    assert [e.b64_json for e in done] == [entry.b64_json for entry in whole.data]


def test_edits_change_what_is_marked_and_variations_need_a_text(client, http):
    image = Image.new("RGB", (40, 40), "red")
    mask = Image.new("RGBA", (40, 40), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 20, 40, 40))
    response = client.images.edit(
        image=png(image), mask=png(mask), prompt=TEXT, n=2, response_format="b64_json", extra_body={"seed": 1}
    )
    assert len(images_of(response)) == 2
    varied = http.post(
        "/v1/images/variations",
        files={"image": png(image)},
        data={"prompt": TEXT, "n": "2", "strength": "0.3", "response_format": "b64_json"},
    )
    assert varied.status_code == 200 and len(varied.json()["data"]) == 2
    missing = http.post("/v1/images/variations", files={"image": png(image)})
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "prompt"


def test_an_edit_has_the_pipelines_pixels(client, pipeline):
    rng = np.random.default_rng(1)
    photo = Image.fromarray(rng.integers(0, 255, (90, 70, 3), np.uint8))
    mask = Image.new("RGB", (70, 90))
    mask.paste((255, 255, 255), (20, 30, 50, 80))
    response = client.images.edit(
        image=png(photo), mask=png(mask), prompt=TEXT, response_format="b64_json", extra_body={"seed": 2}
    )
    source = inpaint.inpaint(pipeline.image_tokenizer, photo, mask)
    wanted = pipeline(TEXT, 1, seed=2, source=source)
    assert images_of(response)[0].tobytes() == wanted[0].tobytes()


def drawing() -> Image.Image:
    image = Image.new("L", (90, 60), 255)
    ImageDraw.Draw(image).ellipse((20, 8, 66, 52), outline=0, width=3)
    return image


def photo() -> Image.Image:
    image = Image.new("RGB", (80, 80), (222, 222, 224))
    ImageDraw.Draw(image).ellipse((24, 20, 58, 62), fill=(180, 30, 40))
    return image


@pytest.fixture(scope="module")
def lines_http(lines_service):
    headers = {"Authorization": f"Bearer {lines_service.key}"}
    with httpx.Client(base_url=lines_service.url, headers=headers, timeout=300) as http:
        yield http


@pytest.fixture(scope="module")
def lines_pipeline(lines_generator):
    return TextToImage.from_pretrained(lines_generator, "cpu", FastOptions("plain", "float32"))


def pixels_of(response: httpx.Response) -> list[bytes]:
    assert response.status_code == 200, response.text
    files = (base64.b64decode(entry["b64_json"]) for entry in response.json()["data"])
    return [Image.open(io.BytesIO(data)).tobytes() for data in files]


def test_a_drawing_gives_the_pixels_of_generate_py(lines_http, lines_pipeline):
    lines, _ = open_drawing(png(drawing()), 40)
    wanted = lines_pipeline(TEXT, 2, seed=5, line=LineControl(lines, 0.5))
    encoded = base64.b64encode(png(drawing())).decode()
    common = {"prompt": TEXT, "n": 2, "seed": 5, "response_format": "b64_json"}
    for line in (encoded, f"data:image/png;base64,{encoded}"):
        found = pixels_of(post(lines_http, **common, line=line, line_scale=0.5))
        assert found == [image.tobytes() for image in wanted]
    assert pixels_of(post(lines_http, **common)) != found
    said = lines_http.get("/v1/models").json()["data"][0]
    assert said["line_drawings"] is True


def test_recolour_gives_the_pixels_of_generate_py(lines_http, lines_pipeline, lines_service):
    square = resize_square(photo(), 40)
    source = inpaint.keep_background(lines_pipeline.image_tokenizer, photo())
    wanted = lines_pipeline(TEXT, 1, seed=3, source=source, line=LineControl(extract(square, "canny")))
    fields = {"prompt": TEXT, "seed": "3", "recolour": "true", "response_format": "b64_json"}
    response = lines_http.post("/v1/images/edits", files={"image": png(photo())}, data=fields)
    assert pixels_of(response) == [wanted[0].tobytes()]
    image = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
    assert read_manifest(image)["source"]["mode"] == "recolour" and read_manifest(image)["line"]["scale"] == 1
    record = json.loads(
        (lines_service.folder / "audit/audit_000000000000.jsonl").read_text().splitlines()[-1]
    )
    assert record["record"]["source"] == "recolour" and len(record["record"]["line_sha256"]) == 64


def test_whitened_images_are_white_or_said_not_to_be(http, pipeline):
    whitener = Whitener()
    wanted = [whitener(p.image) for p in pipeline.generate([TEXT], 4, 1)]
    response = post(http, prompt=TEXT, n=4, seed=1, whiten=True, response_format="b64_json")
    assert pixels_of(response) == [w.image.tobytes() for w in wanted]
    assert [entry["white"] for entry in response.json()["data"]] == [w.is_white for w in wanted]
    assert "whiten" in response.json()["seconds"]


B64_DRAWING = base64.b64encode(png(drawing())).decode()


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"line": "%%%"}, "line", "invalid_base64"),
        ({"line": "AAAA"}, "line", "invalid_image"),
        ({"line": base64.b64encode(png(Image.new("L", (64, 64), 255))).decode()}, "line", "invalid_drawing"),
        ({"line": base64.b64encode(png(Image.new("L", (1, 1)))).decode()}, "line", "invalid_drawing"),
        ({"line": B64_DRAWING, "line_scale": 11}, "line_scale", "invalid_value"),
        ({"line_scale": 1.0}, "line_scale", "invalid_value"),
        ({"whiten": "yes"}, "whiten", "invalid_value"),
    ],
)
def test_bad_drawings_and_options_are_named(lines_http, body, param, code):
    response = post(lines_http, prompt=TEXT, **body)
    assert response.status_code == 400, response.text
    assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, code)


def test_recolour_takes_no_mask_and_lines_need_a_model_that_follows_them(http, lines_http):
    files, data = {"image": png(photo()), "mask": png(photo())}, {"prompt": TEXT, "recolour": "true"}
    answer = lines_http.post("/v1/images/edits", files=files, data=data)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "mask"
    for answer in (
        post(http, prompt=TEXT, line=B64_DRAWING),
        http.post("/v1/images/edits", files={"image": png(photo())}, data=data),
    ):
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_by_model"


def test_the_api_is_described_without_scripts_from_elsewhere(http):
    page = httpx.get(f"{http.base_url}/docs")
    assert page.status_code == 200 and "://" not in page.text.replace("<!doctype", "")
    paths = http.get("/openapi.json").json()["paths"]
    fields = paths["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert fields["required"] == ["image", "prompt"] and fields["properties"]["recolour"]["default"] is False
    assert "line" in json.dumps(paths["/v1/images/generations"])


def test_sizes_above_the_models_are_enlarged(client):
    response = client.images.generate(prompt=TEXT, size="256x256", response_format="b64_json")
    assert images_of(response)[0].size == (256, 256)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 2001}, "prompt"),
        ({"prompt": "♞♞"}, "prompt"),  # characters that the text tokenizer does not know
        ({"prompt": TEXT, "n": 0}, "n"),
        ({"prompt": TEXT, "n": 17}, "n"),
        ({"prompt": TEXT, "n": "3"}, "n"),
        ({"prompt": TEXT, "n": 16, "quality": "hd"}, "n"),
        ({"prompt": TEXT, "size": "300x200"}, "size"),
        ({"prompt": TEXT, "quality": "ultra"}, "quality"),
        ({"prompt": TEXT, "seed": -1}, "seed"),
        ({"prompt": TEXT, "cfg_scale": 1e9}, "cfg_scale"),
        ({"prompt": TEXT, "top_p": 0}, "top_p"),
        ({"prompt": TEXT, "output_format": "bmp"}, "output_format"),
        ({"prompt": TEXT, "surprise": 1}, "surprise"),
    ],
)
def test_fields_out_of_range_are_named(http, body, param):
    response = post(http, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["message"]


def test_bodies_that_are_no_requests(http, service):
    for content in (b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"prompt": NaN}'):
        response = http.post("/v1/images/generations", content=content)
        assert response.status_code == 400, content
    assert http.post("/v1/images/edits", content=b"junk").status_code == 400
    junk = {"image": b"no image"}
    answer = http.post("/v1/images/edits", files=junk, data={"prompt": TEXT})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "image"
    large = http.post("/v1/images/generations", content=b"x" * (21 << 20))
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
    assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert http.get("/v1/images/generations").status_code == 405


def test_no_key_no_image(service):
    for headers in ({}, {"Authorization": "Bearer pp-wrong-key"}, {"Authorization": f"Basic {service.key}"}):
        response = httpx.post(f"{service.url}/v1/images/generations", json={"prompt": TEXT}, headers=headers)
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"


def wait_for_a_day_that_lasts() -> None:
    """A key's day ends at midnight UTC, which must not fall between the requests of a test."""
    left = 86_400 - time.time() % 86_400
    if left < 90:
        time.sleep(left + 1)


def test_scopes_and_limits_of_a_key(service):
    wait_for_a_day_that_lasts()

    def ask(key, path="/v1/images/generations", **kwargs):
        return httpx.post(
            f"{service.url}{path}", headers={"Authorization": f"Bearer {key}"}, timeout=300, **kwargs
        )

    reader, _ = service.store.create("edits only", scopes=("edit",))
    assert ask(reader, json={"prompt": TEXT}).status_code == 403
    few, _ = service.store.create("few", limits=Limits(images_per_minute=0, images_per_day=2))
    assert ask(few, json={"prompt": TEXT, "n": 2}).status_code == 200
    refused = ask(few, json={"prompt": TEXT})
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 60


def test_models(client, http):
    models = client.models.list().data
    assert [model.id for model in models] == ["small"]
    assert client.models.retrieve("small").id == "small"
    assert post(http, prompt=TEXT, model="dall-e-9").status_code == 404


def test_a_full_queue_says_when_to_come_back(http):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: post(http, prompt=TEXT, n=8, seed=i), range(8)))
    codes = [a.status_code for a in answers]
    assert set(codes) == {200, 429} and codes.count(200) >= 3
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)


def test_what_a_full_queue_refuses_is_not_counted(service):
    wait_for_a_day_that_lasts()
    key, _ = service.store.create("counted", limits=Limits(images_per_minute=0, images_per_day=16))

    def ask(count):
        headers = {"Authorization": f"Bearer {key}"}
        body = {"prompt": TEXT, "n": count}
        return httpx.post(f"{service.url}/v1/images/generations", json=body, headers=headers, timeout=300)

    limit, service.dispatcher.max_queued_images = service.dispatcher.max_queued_images, 16
    service.dispatcher.queued_images += 1
    try:
        assert ask(16).json()["error"]["code"] == "queue_full"
    finally:
        service.dispatcher.max_queued_images = limit
        service.dispatcher.queued_images -= 1
    assert ask(16).status_code == 200 and ask(1).status_code == 429


def test_a_client_that_hangs_up_frees_its_place(http, service):
    def queued() -> int:
        return service.dispatcher.queued_images

    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/images/generations", json={"prompt": TEXT, "n": 16}, timeout=0.3)
    until = time.monotonic() + 120
    while queued() and time.monotonic() < until:
        time.sleep(0.05)
    assert queued() == 0
    assert post(http, prompt=TEXT).status_code == 200


def test_a_stream_whose_client_hangs_up_frees_its_place(http, service):
    body = {"prompt": TEXT, "n": 16, "stream": True, "partial_images": 16}
    for read in (False, True):
        with http.stream("POST", "/v1/images/generations", json=body) as response:
            if read:
                next(response.iter_bytes())
        until = time.monotonic() + 120
        while service.dispatcher.queued_images and time.monotonic() < until:
            time.sleep(0.05)
        assert service.dispatcher.queued_images == 0


def test_a_stream_that_never_began_frees_its_place(service):
    """A client that is gone before the first event: the generator of events is never entered."""
    freed = []

    async def gone() -> None:
        async def events():
            yield b""

        async def send(message):
            raise OSError("gone")

        with pytest.raises(BaseException):  # noqa: B017 (what it is depends on the server)
            await _EventStream(events(), lambda: freed.append(1))({"type": "http"}, None, send)

    asyncio.run(gone())
    assert freed == [1]


def test_paths_that_a_client_makes_up_are_no_metrics(http, service):
    for i in range(20):
        assert http.get(f"/images/{i}.png").status_code == 404
        assert http.get(f"/v1/models/{i}").status_code == 404
    text = http.get("/metrics").text
    assert 'endpoint="/images/{name}"' in text and "7.png" not in text and "models/7" not in text


def test_hosts_that_are_none(service):
    for host in ("[", "a b", "x" * 3000, "\x7f"):
        answer = httpx.get(f"{service.url}/images/x.png", headers={"Host": host})
        assert answer.status_code in (400, 404), host


def test_a_worker_that_is_killed_comes_back_and_nothing_hangs(http, service):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, http, prompt=TEXT, n=16)
        while not service.dispatcher.queued_images:
            time.sleep(0.01)
        os.kill(service.dispatcher._process.pid, signal.SIGKILL)
        assert answer.result(300).status_code == 503
    assert http.get("/healthz").status_code == 200
    service.wait_ready()
    assert post(http, prompt=TEXT).status_code == 200 and service.dispatcher.restarts == 1


def test_headers_and_metrics(http, service):
    page = httpx.get(service.url)
    assert "script-src 'self'" in page.headers["content-security-policy"] and "<script>" not in page.text
    assert "access-control-allow-origin" not in httpx.get(service.url, headers={"Origin": "http://x"}).headers
    text = httpx.get(f"{service.url}/metrics").text
    assert "images_total" in text and 'stage_seconds_bucket{le="0.05",stage="sample"}' in text


def test_the_audit_tells_who_and_what_but_no_personal_data(http, service):
    post(http, prompt=f"{TEXT}13812345678", seed=77)
    assert verify(service.folder / "audit") > 0
    lines = [
        json.loads(line)["record"]
        for path in sorted((service.folder / "audit").glob("audit_*.jsonl"))
        for line in path.read_text("utf-8").split("\n")
        if line
    ]
    last = lines[-1]
    assert last["key"] == service.record.id and last["seed"] == 77 and last["decision"] == "answered"
    assert last["prompt"] == f"{TEXT}[telephone]" and len(last["image_sha256"]) == 1
    whole = json.dumps(lines, ensure_ascii=False)
    assert "13812345678" not in whole and service.key.split("-", 2)[2] not in whole
    assert any(line.get("code") == "invalid_api_key" for line in lines)
