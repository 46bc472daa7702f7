"""Measuring every system the same way: metrics, judges, prompts, reports. Imports all, is imported by none."""

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)
