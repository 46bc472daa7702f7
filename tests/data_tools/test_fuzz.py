"""2,000 damaged sources through every reader and into shards: no crash, no hang, nothing outside, every row accounted.

Each case takes a sound source of four rows, damages one of its files (bit flips, cuts, foreign bytes, wrong base64,
huge fields, other encodings, names that leave the folder, bombs, deep JSON) and converts it. The seed of a case is in
its name: `pytest "tests/data_tools/test_fuzz.py::test_damaged_sources[jsonl]"` repeats it.
"""

import base64
import io
import json
import random
import shutil
import signal
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
from make_sources import SOURCES

from data_tools.ingest.prepare import ImageOptions
from data_tools.ingest.records import HINTS, Problem, Record, validate_key
from data_tools.readers.base import ReaderOptions
from data_tools.readers.detect import open_source
from data_tools.shard import ShardConfig, shard
from data_tools.shards.image_shards import meta_bytes

CASES = 225  # of each of nine formats
MET = {"jsonl": [3227]}  # cases of longer campaigns that once ended in an exception
SECONDS = 20  # that one case may take
ODD = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b"\t",
    b"\n",
    b"\r",
    b",",
    b"{",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"../" * 9,
]


def png_bomb() -> bytes:
    """60,000 x 60,000 pixels in 200 bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 9999)) + chunk(b"IEND", b"")


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 3, 20, 200])):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 5)):
        place = rng.randrange(len(data))
        data = data[:place] + rng.choice(ODD) * rng.choice([1, 1, 50]) + data[place:]
    return data


def repeat(data: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(data))
    part = data[first : first + rng.randrange(1, 3000)]
    return data[:first] + part * rng.randint(2, 4) + data[first:]


def huge(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + rng.choice([b"A", b"\xe8\xa3\x99", b" ", b"[", b'"']) * 400_000 + data[place:]


def recode(data: bytes, rng: random.Random) -> bytes:
    lines = data.decode(errors="replace").split("\n")
    chosen = rng.randrange(len(lines))
    encoding = rng.choice(["gb18030", "utf-16", "big5", "utf-7", "shift_jis"])
    return b"\n".join(
        line.encode(encoding if i == chosen else "utf-8", errors="replace") for i, line in enumerate(lines)
    )


def wrong_base64(data: bytes, rng: random.Random) -> bytes:
    bomb = base64.b64encode(png_bomb())
    image = data.find(b"/9j/4AAQ") if b"/9j/4AAQ" in data else data.find(b"_9j_4AAQ")
    if image < 0:
        return insert(data, rng)
    other = rng.choice(
        [b"====", b"", b"!!" * 40, bomb, base64.b64encode(b"GIF89a" + bytes(90)), b"\xc3\xbf" * 30]
    )
    end = next((i for i in range(image, len(data)) if data[i] in b'\n\t",'), len(data))
    return data[:image] + other + data[end:]


def escape(data: bytes, rng: random.Random) -> bytes:
    """Paths that leave the folder, devices, and names that are too long or not Unicode."""
    names = [
        b"../../../../etc/passwd",
        b"/dev/zero",
        b"/etc/passwd",
        b"x" * 5000 + b".jpg",
        b"\\u0000.jpg",
        b"images",
    ]
    for old in (b"images/0.jpg", b"images/1.jpg", b"http://shop.example/1.jpg"):
        data = data.replace(old, rng.choice(names))
    return data if rng.random() < 0.7 else insert(data, rng)


def nest(data: bytes, rng: random.Random) -> bytes:
    deep = rng.choice([50, 900, 100_000])
    line = b'{"file_name": "images/0.jpg", "text": "x", "meta": ' + b"[" * deep + b"]" * deep + b"}\n"
    number = b'{"file_name": "images/0.jpg", "text": "x", "n": ' + b"9" * 6000 + b"}\n"
    return rng.choice([line, number]) + data


def evil_tar(data: bytes, rng: random.Random) -> bytes:
    """Members that leave the archive, links, devices, sizes that lie."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(6):
            name = rng.choice(
                ["../evil", "/tmp/evil", "a/../../evil", f"ok{i}", "\udcff", "", ".hidden", "x" * 400]
            )
            info = tarfile.TarInfo(f"{name}.{rng.choice(['jpg', 'png', 'txt', 'json', 'x.y'])}")
            info.type = rng.choice(
                [tarfile.REGTYPE] * 5 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, b"S"]
            )
            info.linkname = "../../etc/passwd"
            content = rng.choice([png_bomb(), b"", b"{}", b"[" * 100_000, "裙".encode(), rng.randbytes(700)])
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))
    return rng.choice([buffer.getvalue() + data, data[: len(data) // 512 * 512 - 1024] + buffer.getvalue()])


GENERAL = [flip_bits, flip_bits, cut, insert, repeat, huge]
TEXT = [*GENERAL, recode, wrong_base64, escape]
DAMAGE = {
    "jsonl": [*TEXT, nest],
    "chinese_clip": [*TEXT, nest],
    "webdataset": [*GENERAL, evil_tar, evil_tar],
    "parquet": GENERAL,
    "folder": GENERAL,
    "line_drawing": GENERAL,
}


@pytest.fixture
def alarm():
    """End a case that hangs."""

    def stop(*_):
        raise TimeoutError("the reader hangs")

    previous = signal.signal(signal.SIGALRM, stop)
    yield lambda: signal.alarm(SECONDS)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*")}


def check_items(items: list, lines: int | None) -> None:
    """Records that can be written, problems with a known reason; one item a line where lines are rows."""
    keys = []
    for item in items:
        if isinstance(item, Record):
            keys.append(validate_key(item.key))
            "\n".join([item.key, item.where, *item.captions]).encode()
            assert all(caption.strip() and "\n" not in caption for caption in item.captions)
            meta_bytes(item.meta)
        else:
            assert isinstance(item, Problem) and item.reason in HINTS
            json.dumps(item.to_json(), ensure_ascii=False).encode()
    assert len(set(keys)) == len(keys)
    assert lines is None or len(items) == lines


def count_lines(name: str, path: Path) -> int | None:
    """Rows of the formats in which each line that is not blank is one."""
    if name not in ("jsonl", "easynlp") or not path.is_file():
        return None
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    lines = [line.rstrip(b"\r") for line in data.split(b"\n")]
    header = name == "easynlp" and lines[0].split(b"\t")[0] in (b"idx", b"id")
    return None if header else len([line for line in lines if line])


def damage_one_file(source: Path, name: str, rng: random.Random) -> None:
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    path = rng.choice(files)
    data = path.read_bytes()
    path.write_bytes(rng.choice(DAMAGE.get(name, TEXT))(data, rng))


def run_case(name: str, template: Path, work: Path, seed: int) -> str:
    """What became of one case: "refused" in one sentence, or "read"."""
    rng = random.Random(f"{name} {seed}")
    shutil.copytree(template, work / "src")
    source = SOURCES_AT[name](work / "src")
    damage_one_file(source, name, rng)
    before = snapshot(work)
    options = ReaderOptions(captions=rng.choice(["required", "optional"]))
    try:
        items = list(open_source(source, options))
    except (ValueError, FileNotFoundError) as error:
        assert str(error) and "\n" not in str(error)
        return "refused"
    check_items(items, count_lines(name, source))
    image = ImageOptions(size=16, resize=rng.choice(["square", "longest", "pad"]))
    config = ShardConfig(source, str(work / "dst"), workers=0, image=image, reader=options)
    try:
        report = shard(config)
        assert report["read"] == report["kept"] + report["dropped"] == len(items)
        assert report["kept"] == sum(isinstance(item, Record) for item in open_source(work / "dst", options))
    except ValueError as error:
        assert "none of" in str(error) or "no rows" in str(error) or "there is nothing" in str(error)
    assert {p: s for p, s in snapshot(work).items() if not p.startswith(str(work / "dst"))} == before
    return "read"


# Where in its folder each source begins.
SOURCES_AT = dict.fromkeys(SOURCES, lambda folder: folder) | {
    "easynlp": lambda folder: folder / "train.tsv",
    "csv": lambda folder: folder / "wukong_100m_0.csv",
    "jsonl": lambda folder: folder / "DALLE.train.jsonl",
}


def run_cases(name, tmp_path, alarm, seeds):
    SOURCES[name](tmp_path / "template", 4)
    outcomes = []
    for seed in seeds:
        work = tmp_path / str(seed)
        work.mkdir()
        alarm()
        outcomes.append(run_case(name, tmp_path / "template", work, seed))
        shutil.rmtree(work)
    assert outcomes.count("read") > 0.5 * len(outcomes), outcomes.count(
        "read"
    )  # most damage is met by the readers
    assert snapshot(tmp_path).keys() == snapshot(tmp_path / "template").keys() | {str(tmp_path / "template")}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File", "ignore:Metadata Warning")
def test_damaged_sources_sample(name, tmp_path, alarm):
    run_cases(name, tmp_path, alarm, [*range(CASES, CASES + 20), *MET.get(name, [])])


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.filterwarnings("ignore")
def test_damaged_sources(name, tmp_path, alarm):
    run_cases(name, tmp_path, alarm, range(CASES))
