"""Results in order; a decoder that dies costs one record."""

from crashing_work import crash_on_three

from data_tools.ingest.records import Record
from data_tools.ingest.shard_run import crashed
from data_tools.parallel import ordered_map


def test_a_crashing_decoder_costs_one_record():
    batches = [(name, numbers) for name, numbers in zip("abcd", [[1, 2], [3, 4], [], [5, 6]], strict=True)]
    results = list(ordered_map(crash_on_three, batches, 1, lambda number: f"lost {number}"))
    assert results == [("a", [10, 20]), ("b", ["lost 3", 40]), ("c", []), ("d", [50, 60])]


def test_crashed_record_has_a_reason():
    item = crashed(Record("k", b"x", "jpg", ("a",), {}, "f.tsv:3"))
    assert (item.key, item.where, item.reason) == ("k", "f.tsv:3", "decoder_crashed")
