"""The generator: an autoregressive transformer over [text | image] and all that turns a sentence into images."""

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)
