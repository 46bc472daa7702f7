"""Readers: one module a source format, each a generator of Record | Problem; `detect.open_source` recognises it.

    from data_tools.readers.detect import open_source

    for item in open_source(Path("catalogue/")):
        ...

Formats: Tianchi ECommerce-T2I, EasyNLP, Chinese-CLIP, CSV (Wukong, open_clip), JSONL, parquet, folders with captions,
line-drawing pairs, WebDataset tars. All stream: memory does not grow with the images.
"""
