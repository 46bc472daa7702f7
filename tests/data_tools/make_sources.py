"""Small sources in every format for the tests: drawn images, Chinese captions, nothing downloaded."""

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.ingest.records import Record
from data_tools.shards.image_shards import ShardWriter

CAPTIONS = ["一件红色连衣裙", "超市里的青苹果", "黑色皮鞋", "儿童连帽卫衣 商品图片", "一条长裤的照片"]


def some_image(seed: int, size: tuple[int, int] = (48, 40), suffix: str = "jpg", mode: str = "RGB") -> bytes:
    """A smooth drawn image, (W, H), that no two seeds share."""
    width, height = size
    generator = np.random.default_rng(seed)
    colour, slope = generator.integers(40, 215, 3), generator.uniform(-1, 1, (2, 3))
    y, x = np.mgrid[0:height, 0:width].astype(float)
    pixels = colour + 40 * (slope[0] * (x[..., None] / width) + slope[1] * (y[..., None] / height))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
    return encoded(image, suffix)


def encoded(image: Image.Image, suffix: str, **options) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "tiff": "TIFF"}.get(suffix, suffix.upper()), **options)
    return buffer.getvalue()


def url_safe(data: bytes) -> str:
    """Base64 in the url-safe alphabet."""
    return base64.urlsafe_b64encode(data).decode()


def rows(count: int = 5) -> list[tuple[str, str, bytes]]:
    """(id, caption, image)."""
    return [(f"{i:032x}", CAPTIONS[i % len(CAPTIONS)], some_image(i)) for i in range(count)]


def write_t2i(
    folder: Path, count: int = 5, split: str = "train", alphabet=url_safe, name: str = "text"
) -> Path:
    """ECommerce-T2I, the texts in reverse order."""
    folder.mkdir(parents=True, exist_ok=True)
    data = rows(count)
    text = "".join(f"{key}\t{caption}\n" for key, caption, _ in reversed(data))
    (folder / f"T2I_{split}.{name}.tsv").write_text(text, "utf-8")
    (folder / f"T2I_{split}.img.tsv").write_text(
        "".join(f"{k}\t{alphabet(image)}\n" for k, _, image in data), "utf-8"
    )
    return folder


def write_easynlp(folder: Path, count: int = 5) -> Path:
    """Three columns."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{k}\t{caption}\t{base64.b64encode(image).decode()}\n" for k, caption, image in rows(count)]
    (folder / "train.tsv").write_text("".join(lines), "utf-8")
    return folder / "train.tsv"


def write_wukong(folder: Path, count: int = 5) -> Path:
    """url,caption."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "wukong_100m_0.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "caption"])
        for i in range(count):
            writer.writerow([f"http://shop.example/{i}.jpg", f'{CAPTIONS[i % 5]}, "{i}"'])
    return folder / "wukong_100m_0.csv"


def write_jsonl(folder: Path, count: int = 5) -> Path:
    """image_path, sentences."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (_, caption, image) in enumerate(rows(count)):
        (folder / "images" / f"{i}.jpg").write_bytes(image)
        lines.append(json.dumps({"image_path": f"images/{i}.jpg", "sentences": [caption, f"{caption}二"]}))
    (folder / "DALLE.train.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "DALLE.train.jsonl"


def write_chinese_clip(folder: Path, count: int = 5) -> Path:
    """Every image has a text of its own; text 1000 belongs to the first two."""
    folder.mkdir(parents=True, exist_ok=True)
    data = rows(count)
    images = "".join(
        f"{1000 + i}\t{base64.b64encode(image).decode()}\n" for i, (_, _, image) in enumerate(data)
    )
    (folder / "train_imgs.tsv").write_text(images, "utf-8")
    texts = [
        {"text_id": i, "text": caption, "image_ids": [1000 + i]} for i, (_, caption, _) in enumerate(data)
    ]
    texts.append({"text_id": 1000, "text": "共同的描述", "image_ids": [1000, 1001]})
    lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    (folder / "train_texts.jsonl").write_text(lines, "utf-8")
    return folder


def write_parquet(folder: Path, count: int = 5) -> Path:
    """Hugging Face images and text, in row groups of 4."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    data = rows(count)
    table = pa.table(
        {
            "image": [{"bytes": image, "path": None} for _, _, image in data],
            "text": [caption for _, caption, _ in data],
            "price": [float(i) for i in range(count)],
        }
    )
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=4)
    return folder


def write_folder(folder: Path, count: int = 5) -> Path:
    """Images with captions of the same stem, one of them in a folder below."""
    (folder / "more").mkdir(parents=True, exist_ok=True)
    for i, (_, caption, image) in enumerate(rows(count)):
        base = folder / ("more" if i == 0 else ".")
        (base / f"{i:03d}.jpg").write_bytes(image)
        (base / f"{i:03d}.txt").write_text(f"{caption}\n第二句\n", "utf-8")
    return folder


def write_line_drawing(folder: Path, count: int = 5) -> Path:
    """Two folders and titles; ids with a gap."""
    for name in ("Line Drawing", "Realistic Drawing"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    titles = []
    for i, (_, caption, image) in enumerate(rows(count)):
        name = 24805 + i + (i > 1)  # 24807 does not exist
        (folder / "Realistic Drawing" / f"{name}.jpg").write_bytes(image)
        (folder / "Line Drawing" / f"{name}.png").write_bytes(some_image(i, suffix="png", mode="L"))
        titles.append(f"{name}\t{caption}\n")
    (folder / "titles.tsv").write_text("".join(titles), "utf-8")
    return folder


def write_webdataset(folder: Path, count: int = 5) -> Path:
    """Our own shards."""
    with ShardWriter(folder, "train", samples_per_shard=3) as writer:
        for key, caption, image in rows(count):
            writer.write(Record(key, image, "jpg", (caption,), {"source": "test", "label": "裙"}))
    return folder


def write_mixed(folder, count=30):
    """A T2I source of which every seventh image is cut and every eleventh is no base64."""
    folder.mkdir()
    images, texts = [], []
    for i in range(count):
        data = some_image(i)
        data = data[: len(data) // 2] if i % 7 == 3 else data
        images.append(f"{i:032x}\t{'***' if i % 11 == 5 else url_safe(data)}\n")
        texts.append(f"{i:032x}\t第{i}件\n")
    (folder / "T2I_train.img.tsv").write_text("".join(images))
    (folder / "T2I_train.text.tsv").write_text("".join(texts[::-1]), "utf-8")
    return folder


SOURCES = {
    "ecommerce_t2i": write_t2i,
    "easynlp": write_easynlp,
    "csv": write_wukong,
    "jsonl": write_jsonl,
    "chinese_clip": write_chinese_clip,
    "parquet": write_parquet,
    "folder": write_folder,
    "line_drawing": write_line_drawing,
    "webdataset": write_webdataset,
}
