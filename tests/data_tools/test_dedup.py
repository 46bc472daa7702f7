"""Perceptual hashes against the reference, the index against brute force, and what dedup keeps, drops and groups."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from make_sources import encoded
from PIL import Image, ImageDraw, ImageEnhance

from data_tools.dedup import DedupConfig, close_pairs, dedup, first_twins
from data_tools.dedup import main as dedup_main
from data_tools.images.phash import components, dct_hash, distances, image_signature, near_pairs
from data_tools.ingest.records import Record
from data_tools.readers.detect import open_source
from data_tools.shards.image_shards import ShardWriter
from data_tools.split import read_pairs


def photo(seed: int, size: tuple[int, int] = (160, 120), hue: float = 0.0) -> Image.Image:
    """Smooth colours and a few bodies; `hue` moves the colours and leaves the brightness."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(40, 200, (6, 6, 1)) + generator.integers(-30, 30, (6, 6, 3))
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, r = (int(v) for v in generator.integers((0, 0, 8), (*size, 40)))
        grey = int(generator.integers(0, 255))
        draw.ellipse((x - r, y - r, x + r, y + r), (grey, grey, grey))
    if not hue:
        return image
    shift = np.array([hue, -hue * 0.299 / 0.587, 0])  # keeps 0.299 R + 0.587 G + 0.114 B
    return Image.fromarray((np.asarray(image, float) * 0.6 + 50 + shift).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    return encoded(image, "jpg", quality=quality)


def write_shards(folder: Path, splits: dict[str, dict[str, bytes]]) -> Path:
    for split, images in splits.items():
        with ShardWriter(folder, split) as writer:
            for key, image in images.items():
                writer.write(Record(key, image, "jpg", (f"商品{key}",), {}))
    return folder


def kept(folder: Path) -> dict[str, list[str]]:
    source = open_source(folder)
    return {part.split: [record.key for record in source.read(part)] for part in source.parts}


def reasons(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / "dropped.jsonl").read_text("utf-8").splitlines()]
    return {row["key"]: row["reason"] for row in rows}


class TestHash:
    def test_is_the_published_dct_hash(self):
        """imagehash.phash: scipy's DCT-II on both axes of the 32 x 32 grey image, lowest 8 x 8, over the median."""
        from scipy.fft import dct

        for seed in range(20):
            image = photo(seed)
            grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
            low = dct(dct(grey, axis=0), axis=1)[:8, :8]
            bits = "".join("1" if bit else "0" for bit in (low > np.median(low)).reshape(-1))
            assert dct_hash(image) == int(bits, 2)

    def test_copies_are_near_and_others_far(self):
        def distance(a, b):
            return int(distances(*(np.array([image_signature(i).phash], np.uint64) for i in (a, b)))[0])

        near, far = [], []
        for seed in range(40):
            image = photo(seed)
            copy = Image.open(io.BytesIO(jpeg(image.resize((120, 90), Image.Resampling.LANCZOS), 60)))
            near += [distance(image, copy), distance(image, ImageEnhance.Brightness(image).enhance(1.1))]
            far.append(distance(image, photo(seed + 1000)))
        assert max(near) <= 4
        assert min(far) > 12

    def test_recoloured_images_have_other_colours(self):
        red, blue = image_signature(photo(1, hue=60)), image_signature(photo(1, hue=-60))
        assert bin(red.phash ^ blue.phash).count("1") <= 4, "the hash sees brightness alone"
        a, b = (np.frombuffer(s.colours, np.uint8).astype(int) for s in (red, blue))
        assert np.abs(a - b).max() > 64


def planted(count: int, seed: int, max_flips: int) -> np.ndarray:
    """Different random hashes, a third of them within `max_flips` of another; some bits nearly constant."""
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 2**64, count, dtype=np.uint64)
    hashes[: count // 2] |= np.uint64(0xFFFFF00000000000)
    copies = hashes[generator.integers(0, count, count // 3)]
    for _ in range(max_flips):
        copies ^= np.uint64(1) << generator.integers(0, 64, len(copies)).astype(np.uint64)
    return np.unique(np.concatenate([hashes, copies]))


class TestIndex:
    @pytest.mark.parametrize("distance", [0, 1, 2, 3, 4, 5, 7, 8, 10, 13, 16])
    def test_finds_every_pair_once(self, distance):
        hashes = planted(1500, distance, max(distance, 1) + 1)
        matrix = distances(hashes[:, None], hashes[None, :])
        i, j = np.nonzero(np.triu(matrix <= distance, 1))
        blocks = list(near_pairs(hashes, distance))
        found = [(int(a), int(b)) for left, right in blocks for a, b in zip(left, right, strict=True)]
        assert len(found) == len(set(found))
        assert set(found) == set(zip(i.tolist(), j.tolist(), strict=True))
        assert distance < 2 or len(found) > 20

    def test_small_and_empty(self):
        for count in (0, 1):
            assert list(near_pairs(np.zeros(count, np.uint64), 3)) == []
        with pytest.raises(ValueError, match="0 and 16, not 17"):
            list(near_pairs(np.zeros(2, np.uint64), 17))

    def test_components(self):
        pairs = [(np.array([1, 5]), np.array([2, 6])), (np.array([2]), np.array([5]))]
        assert components(8, iter(pairs)).tolist() == [0, 1, 1, 3, 4, 1, 1, 7]

    def test_twins_and_pairs_against_a_plain_loop(self):
        generator = np.random.default_rng(5)
        hashes = planted(300, 5, 4)
        hashes = generator.permutation(np.concatenate([hashes, hashes[:60], hashes[:20]]))
        colours = generator.integers(0, 3, (len(hashes), 48)).astype(np.uint8) * 20
        colours[:, 1:] = 0
        near = distances(hashes[:, None], hashes[None, :]) <= 4
        near &= np.abs(colours[:, None, 0].astype(int) - colours[None, :, 0]) <= 20
        order, expected, kept_ = generator.permutation(len(hashes)), np.zeros(len(hashes), bool), []
        for item in order:
            expected[item] = any(near[item, k] for k in kept_)
            kept_ += [] if expected[item] else [item]
        twins = first_twins(hashes, colours, order, 4, 20)
        assert ((twins >= 0) == expected).all() and expected.any()
        assert all(near[i, twins[i]] and not expected[twins[i]] for i in np.flatnonzero(expected))
        pairs = close_pairs(hashes, colours, 4, 20)
        i, j = np.nonzero(np.triu(near, 1))
        assert {tuple(sorted(p)) for p in pairs.tolist()} == set(zip(i.tolist(), j.tolist(), strict=True))


class TestDedup:
    def test_keeps_the_largest_of_near_images(self, tmp_path):
        image = photo(1, (320, 240))
        images = {
            "a_small": jpeg(image.resize((160, 120))),
            "b_large": jpeg(image),
            "c_same": jpeg(image),
            "d_other": jpeg(photo(2)),
            "e_broken": jpeg(photo(3))[:200],
        }
        src = write_shards(tmp_path / "in", {"train": images})
        report = dedup(DedupConfig(src, tmp_path / "out", workers=0))
        assert kept(tmp_path / "out") == {"train": ["b_large", "d_other"]}
        found = reasons(tmp_path / "out")
        assert found.pop("e_broken") in ("truncated_image", "undecodable")
        assert found == {"a_small": "near_duplicate", "c_same": "duplicate_image"}
        assert report["read"] == 5 == report["kept"] + report["dropped"]
        dedup(DedupConfig(src, tmp_path / "first", keep="first", workers=0))
        assert kept(tmp_path / "first") == {"train": ["a_small", "d_other"]}

    def test_colour_variants_are_different_products(self, tmp_path):
        images = {"red": jpeg(photo(1, hue=60)), "blue": jpeg(photo(1, hue=-60))}
        src = write_shards(tmp_path / "in", {"train": images})
        dedup(DedupConfig(src, tmp_path / "out", workers=0))
        assert kept(tmp_path / "out") == {"train": ["red", "blue"]}
        dedup(DedupConfig(src, tmp_path / "shapes", max_colour=255, workers=0))
        assert len(kept(tmp_path / "shapes")["train"]) == 1

    def test_train_gives_way_to_val_test_and_others(self, tmp_path):
        images = [photo(seed) for seed in range(5)]
        train = {f"t{i}": jpeg(image) for i, image in enumerate(images)}
        smaller = [jpeg(image.resize((120, 90)), 80) for image in images]
        splits = {"train": train, "val": {"v0": smaller[0], "v1": smaller[1]}, "test": {"x1": smaller[1]}}
        src = write_shards(tmp_path / "in", splits)
        other = write_shards(tmp_path / "other", {"train": {"o2": smaller[2]}})
        dedup_main([str(src), str(tmp_path / "out"), "--against", str(other), "--workers", "0"])
        assert kept(tmp_path / "out") == {"train": ["t3", "t4"], "val": ["v0"], "test": ["x1"]}
        assert reasons(tmp_path / "out") == dict.fromkeys(("t0", "t1", "t2", "v1"), "leak")
        detail = (tmp_path / "out/dropped.jsonl").read_text("utf-8")
        assert f"({other}: o2)" in detail and "(x1)" in detail

    def test_groups_hold_what_is_near_but_not_a_duplicate(self, tmp_path):
        image, cropped = photo(7, (200, 200)), photo(7, (200, 200)).crop((6, 4, 196, 197))
        bits = bin(image_signature(image).phash ^ image_signature(cropped).phash).count("1")
        assert 0 < bits <= 8, "the image of this test"
        src = write_shards(
            tmp_path / "in", {"train": {"a": jpeg(image), "b": jpeg(photo(8)), "c": jpeg(cropped)}}
        )
        dedup(DedupConfig(src, tmp_path / "out", distance=0, max_colour=64, workers=0))
        assert kept(tmp_path / "out") == {"train": ["a", "b", "c"]}
        assert read_pairs(tmp_path / "out/groups.tsv") == {"a": "a", "c": "a"}
        assert {r.key: r.meta.get("group") for r in open_source(tmp_path / "out")} == {
            "a": "a",
            "b": None,
            "c": "a",
        }

    def test_interrupted_anywhere_it_ends_in_the_same_bytes(self, tmp_path, monkeypatch):
        images = {f"{i:02d}": jpeg(photo(i % 17), 60 + i) for i in range(40)}
        src = write_shards(tmp_path / "in", {"train": images})

        def config(name):
            return DedupConfig(src, tmp_path / name, samples_per_shard=5, workers=0)

        assert 17 <= dedup(config("whole"))["kept"] < 20
        expected = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
        from data_tools.ingest import signatures
        from data_tools.ingest.signatures import Sign

        for method, owner, stops in (
            (Sign.__call__, Sign, (1, 2)),
            (ShardWriter.write, ShardWriter, (1, 6, 14)),
        ):
            for stop in stops:
                calls = 0

                def failing(self, *args, method=method, stop=stop):
                    nonlocal calls
                    calls += 1
                    if calls > stop:
                        raise InterruptedError
                    return method(self, *args)

                name = f"{owner.__name__}{stop}"
                with monkeypatch.context() as patch:
                    patch.setattr(owner, method.__name__, failing)
                    with pytest.raises(InterruptedError):
                        dedup(config(name))
                dedup(config(name))
                assert {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} == expected
        assert signatures.SIGNATURE.itemsize == 86

    def test_running_again_does_nothing(self, tmp_path, capsys):
        src = write_shards(tmp_path / "in", {"train": {"a": jpeg(photo(1))}})
        first = dedup(DedupConfig(src, tmp_path / "out", workers=0))
        assert dedup(DedupConfig(src, tmp_path / "out", workers=0)) == first
        assert "complete already" in capsys.readouterr().err
        with pytest.raises(ValueError, match="choose an empty folder"):
            dedup(DedupConfig(src, tmp_path / "out", distance=2, workers=0))

    def test_bad_options_exit_2(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as exit_:
            dedup_main([str(tmp_path), str(tmp_path / "out"), "--distance", "40"])
        assert exit_.value.code == 2 and "0 to 16, not 40" in capsys.readouterr().err
