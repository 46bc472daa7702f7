"""Splits: shares, stability, labels, groups."""

from collections import Counter

import pytest
from make_sources import write_folder, write_webdataset

from data_tools.split import fraction, hash_split, main, parse_shares, read_pairs, stratified_split

SHARES = {"train": 0.9, "val": 0.1}


def test_fraction_is_pinned_and_uniform():
    assert fraction("000176") == pytest.approx(0.0926084322773062, abs=1e-15)
    values = [fraction(str(i)) for i in range(4000)]
    assert all(0 <= v < 1 for v in values)
    assert max(Counter(int(v * 10) for v in values).values()) < 480  # 400 expected, 4 standard deviations
    assert fraction("a", 0) != fraction("a", 1)


def test_hash_split_depends_on_the_key_alone_and_nests():
    keys = [str(i) for i in range(5000)]
    small = {k for k in keys if hash_split(k, SHARES) == "val"}
    large = {k for k in keys if hash_split(k, {"train": 0.8, "val": 0.2}) == "val"}
    assert small < large and 400 < len(small) < 600
    three = Counter(hash_split(k, {"train": 0.5, "val": 0.2, "test": 0.3}) for k in keys)
    assert abs(three["test"] - 1500) < 140 and abs(three["val"] - 1000) < 120


@pytest.mark.parametrize(
    "share", ["train", "train=", "train=x", "=1", "train=-1", "train=0", "train=inf", "train=nan"]
)
def test_bad_shares_are_named(share):
    with pytest.raises(ValueError, match="share"):
        parse_shares((share,))


def test_shares():
    assert parse_shares(("train=9", "val=1")) == SHARES
    with pytest.raises(ValueError, match="at least one"):
        parse_shares(())
    with pytest.raises(ValueError, match="val=2"):
        parse_shares(("val=1", "val=2"))


def labelled(sizes):
    keys = [f"{label}{i}" for label, size in sizes.items() for i in range(size)]
    return keys, [key.rstrip("0123456789") for key in keys]


def test_every_label_has_its_share():
    keys, labels = labelled(
        {"dress": 100, "shoe": 50, "hat": 20, **{f"rare{chr(97 + i)}": 2 for i in range(30)}}
    )
    splits = stratified_split(keys, labels, SHARES)
    val = Counter(label for key, label in zip(keys, labels, strict=True) if splits[key] == "val")
    assert abs(val["dress"] - 10) <= 1 and abs(val["shoe"] - 5) <= 1 and abs(val["hat"] - 2) <= 1
    assert abs(sum(val.values()) - 23) <= 1  # thirty labels of two samples give their six, too
    assert list(splits) == keys


def test_groups_stay_together():
    keys, labels = labelled({"a": 200, "b": 100})
    groups = [f"{key[0]}{int(key[1:]) // 5}" for key in keys]
    splits = stratified_split(keys, labels, SHARES, groups)
    assert all(
        len({splits[k] for k, g in zip(keys, groups, strict=True) if g == group}) == 1 for group in groups
    )
    assert abs(Counter(splits.values())["val"] - 30) <= 5


def test_previous_keys_keep_their_split():
    keys, labels = labelled({"a": 80, "b": 40})
    first = stratified_split(keys, labels, SHARES)
    more, more_labels = labelled({"a": 160, "b": 90, "c": 50})
    second = stratified_split(more, more_labels, SHARES, previous=first)
    assert all(second[key] == first[key] for key in keys)
    assert abs(Counter(second.values())["val"] - 30) <= 1
    grouped = stratified_split(["a0", "new"], ["a", "a"], SHARES, ["g", "g"], {"a0": "val"})
    assert grouped == {"a0": "val", "new": "val"}


def test_order_of_the_data_does_not_matter():
    keys, labels = labelled({"a": 50, "b": 31})
    backwards = stratified_split(keys[::-1], labels[::-1], SHARES)
    assert backwards == stratified_split(keys, labels, SHARES)


def test_command_writes_a_list(tmp_path):
    out = tmp_path / "splits.tsv"
    main(
        [
            str(write_webdataset(tmp_path / "src", 9)),
            str(out),
            "--shares",
            "train=2",
            "val=1",
            "--stratify-by",
            "label",
        ]
    )
    assert Counter(read_pairs(out).values()) == {"train": 6, "val": 3}
    first = out.read_text()
    main([str(tmp_path / "src"), str(out), "--shares", "train=2", "val=1", "--previous", str(out)])
    assert out.read_text() == first


def test_command_with_groups_from_a_file(tmp_path):
    source = write_folder(tmp_path / "src", 5)
    (tmp_path / "groups.tsv").write_text("001\tsame\n002\tsame\n003\tsame\n004\tsame\n")
    main(
        [
            str(source),
            str(tmp_path / "s.tsv"),
            "--shares",
            "a=1",
            "b=1",
            "--group-file",
            str(tmp_path / "groups.tsv"),
        ]
    )
    splits = read_pairs(tmp_path / "s.tsv")
    assert len(splits) == 5 and len({splits[f"00{i}"] for i in range(1, 5)}) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stratify-by", "colour"], "'colour' to stratify by"),
        (["--shares", "train=0"], "'train=0'"),
        (["--previous", "nowhere.tsv"], "nowhere.tsv"),
        (["--seed", "-1"], "--seed must be 0 or more"),
    ],
)
def test_mistakes_end_in_one_sentence(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main([str(write_folder(tmp_path / "src")), str(tmp_path / "s.tsv"), *flags])
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "s.tsv").exists()


def test_a_list_that_is_none_names_the_line(tmp_path):
    (tmp_path / "s.tsv").write_text("a\ttrain\nb\n")
    with pytest.raises(ValueError, match=r"s\.tsv:2"):
        read_pairs(tmp_path / "s.tsv")
