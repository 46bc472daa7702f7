"""From any catalogue to clean shards: readers, download, clean, dedup, split, shard, stats, loader, submit.

Knows nothing of models: tokenizers and rankers come in as callables.
"""

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)
