"""Stage 1: the image tokenizer (VQVAE / VQGAN)."""

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)
