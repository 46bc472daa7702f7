"""Readers: one module a source format, each a generator of Record | Problem; `open_source` recognises the format.

    for item in open_source(Path("catalogue/")):
        ...

Formats: Tianchi ECommerce-T2I, EasyNLP, Chinese-CLIP, CSV (Wukong, open_clip), JSONL, parquet, folders with captions,
line-drawing pairs, WebDataset tars. All stream: memory does not grow with the pictures.
"""

from data_tools.readers.base import Item, Meter, Part, ReaderOptions
from data_tools.readers.detect import READERS, Source, open_source

__all__ = ["READERS", "Item", "Meter", "Part", "ReaderOptions", "Source", "open_source"]
