"""HTML pages by Jinja2 templates, which lie beside the code that fills them: `PACKAGE/templates/NAME.html`.

Templates alone hold HTML, and escape what they are filled with: no text from outside becomes markup. They are found
from any working directory.
"""

import base64
import functools
import io
from pathlib import Path
from typing import Any

from PIL import Image

from common.text.language import Words

ROOT = Path(__file__).parents[2]


@functools.cache
def environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(ROOT),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, words: Words, **values: Any) -> str:
    """The page; `template`: its path below the repository, `words`: its texts in the reader's language."""
    return environment().get_template(template).render(words=words, **values)


def macros(template: str) -> Any:
    """The macros of a template as functions; what they return is markup, and stays as it is in another template."""
    return environment().get_template(template).module


def data_url(data: bytes, kind: str = "webp") -> str:
    """An encoded image as the address of an <img>, so that the page needs nothing beside it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_url(image: Image.Image, quality: int) -> str:
    """`data_url` of the image as WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return data_url(buffer.getvalue())
