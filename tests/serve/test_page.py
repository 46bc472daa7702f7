"""The web page in a real browser: type, see images, repaint one. Skipped where Chromium or Playwright is missing."""

import base64
import json
import shutil
import subprocess
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # 64 MiB in many containers, and a page that needs more hangs
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TEXT = "一件红色的连衣裙"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.timeout(120),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright on this machine")
    command = [
        CHROMIUM,
        "--headless",
        *FLAGS,
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
        "--dump-dom",
    ]
    try:
        subprocess.run([*command, "about:blank"], check=True, capture_output=True, timeout=60)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"Chromium does not show an empty page here: {error}")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, service):
    yield from opened(browser, service)


@pytest.fixture
def lines_page(browser, lines_service):
    """Of a generator that follows drawings."""
    yield from opened(browser, lines_service)


def opened(browser, service):
    context = browser.new_context(locale="zh-CN", accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(service.url)
    page.evaluate(f"sessionStorage.setItem('key', '{service.key}')")
    page.reload()
    yield page
    # the first load has no key yet, so its list of models is refused
    assert [p for p in problems if "401" not in p] == []
    context.close()


def finished(page, images: int, runs: int = 1) -> None:
    """Wait for the end of the page's `runs`-th request and see as many images."""
    page.wait_for_selector(f"#history button:nth-child({runs})")
    page.wait_for_selector("#stop", state="hidden")
    assert page.locator("#images img").count() == images


def test_type_and_see_eight_images_then_repaint_one(page):
    page.fill("#prompt", TEXT)
    page.keyboard.press("Enter")
    page.wait_for_selector("#images img[src^='blob:']")  # an image that grows
    finished(page, 8)
    assert "8 张" in page.inner_text("#message")
    page.click("#images figure:nth-child(2) img")
    page.locator("#canvas").wait_for(state="visible")
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 90, steps=5)
    page.mouse.up()
    page.click("#repaint")
    finished(page, 8, runs=2)


def test_an_untouched_image_is_not_repainted(page):
    page.fill("#count", "2")
    page.fill("#prompt", TEXT)
    page.click("#go")
    finished(page, 2)
    page.locator("#images img").first.press("Enter")  # by keyboard
    page.click("#repaint")
    assert "涂抹" in page.inner_text("#about")
    page.click("#vary")
    finished(page, 2, runs=2)


def test_all_images_come_as_one_zip(page):
    page.fill("#count", "3")
    page.fill("#seed", "5")
    page.fill("#prompt", TEXT)
    page.click("#go")
    finished(page, 3)
    with page.expect_download() as download:
        page.click("#download")
    archive = zipfile.ZipFile(BytesIO(download.value.path().read_bytes()))
    assert archive.testzip() is None and archive.namelist() == ["00.png", "01.png", "02.png"]
    assert archive.read("00.png")[:4] == b"\x89PNG"


def test_english_by_switch_and_errors_in_words(page):
    page.click("#language")
    assert page.inner_text("#go") == "Generate" and page.title() == "Product images"
    page.evaluate("sessionStorage.setItem('key', 'pp-wrong')")
    page.fill("#prompt", TEXT)
    page.click("#go")
    page.wait_for_selector("#message.error")
    assert "key" in page.inner_text("#message")


@pytest.fixture
def drawing(tmp_path) -> Path:
    image = Image.new("L", (1500, 1200), 255)
    ImageDraw.Draw(image).ellipse((300, 200, 1100, 1000), outline=0, width=20)
    image.save(tmp_path / "drawing.png")
    return tmp_path / "drawing.png"


def sent(page, path: str):
    """The next request to `path`."""
    return page.expect_request(lambda request: request.url.endswith(path))


def test_a_drawing_is_uploaded_and_followed(lines_page, drawing):
    page = lines_page
    page.locator("#reference").wait_for(state="visible")
    page.set_input_files("#upload", drawing)
    page.locator("#preview").wait_for(state="visible")
    page.fill("#count", "2")
    page.fill("#prompt", TEXT)
    with sent(page, "/v1/images/generations") as request:
        page.click("#go")
    body = json.loads(request.value.post_data)
    image = Image.open(BytesIO(base64.b64decode(body["line"].partition(",")[2])))
    assert max(image.size) == 1024 and body["line_scale"] == 1
    finished(page, 2)
    page.click("#forget")
    assert page.locator("#chosen").is_hidden()


RECORD_FIELDS = """
const append = FormData.prototype.append;
window.fields = [];
FormData.prototype.append = function (...given) {
  window.fields.push(given.slice(0, 2).map(String));
  return append.apply(this, given);
};
null;
"""


def test_a_photo_and_an_image_of_ours_are_recoloured(lines_page, drawing):
    page = lines_page
    page.locator("#reference").wait_for(state="visible")
    page.set_input_files("#upload", drawing)
    page.select_option("#use", "recolour")
    page.fill("#count", "2")
    page.fill("#prompt", TEXT)
    page.evaluate(RECORD_FIELDS)  # the browser's protocol gives no body of a form that holds a file
    with sent(page, "/v1/images/edits"):
        page.click("#go")
    assert ["recolour", "true"] in page.evaluate("window.fields")
    finished(page, 2)
    page.locator("#images img").first.press("Enter")
    page.click("#recolour")
    assert "颜色" in page.inner_text("#about")  # the text is still the old one
    page.click("#close")
    page.fill("#prompt", "蓝色的杯子")
    page.locator("#images img").first.press("Enter")
    with sent(page, "/v1/images/edits"):
        page.click("#recolour")
    finished(page, 2, runs=2)


def test_a_file_that_is_no_image_is_said_so(lines_page, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    lines_page.locator("#reference").wait_for(state="visible")
    lines_page.set_input_files("#upload", tmp_path / "text.png")
    lines_page.wait_for_selector("#message.error")
    assert lines_page.locator("#chosen").is_hidden()


def test_white_backgrounds_by_keyboard_and_no_drawings_where_none_are_followed(page):
    page.fill("#count", "2")
    page.focus("#whiten")
    page.keyboard.press("Space")
    page.fill("#prompt", TEXT)
    with sent(page, "/v1/images/generations") as request:
        page.keyboard.press("Enter")
    assert json.loads(request.value.post_data)["whiten"] is True
    finished(page, 2)
    assert page.locator("#reference").is_hidden() and page.locator("#recolour").is_hidden()


def test_the_api_page_lists_endpoints_and_fields(page):
    page.click("footer a")
    page.wait_for_selector("article")
    text = page.inner_text("#endpoints")
    assert "POST /v1/images/generations" in text and "line_scale" in text and "recolour" in text


def test_it_fits_a_phone(browser, service):
    page = browser.new_page(viewport={"width": 360, "height": 640})
    page.goto(service.url)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()
