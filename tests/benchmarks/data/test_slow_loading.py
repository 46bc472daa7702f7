"""The benchmark of waiting for a slow, failing server: every sample comes, and failures are met on the way."""

from collections import Counter

from benchmarks.data import slow_loading
from benchmarks.data.slow_loading import Options, measure, slow_server, write_shards


def test_every_sample_comes_once_from_a_server_that_fails(tmp_path, monkeypatch):
    options = Options(
        shards=6, samples=8, window_shards=2, batch_size=8, step_ms=1, latency_ms=5, error_share=0.5
    )
    remote = slow_loading.RemoteOptions
    monkeypatch.setattr(
        slow_loading, "RemoteOptions", lambda **given: remote(backoff_s=0.01, retries=9, **given)
    )
    write_shards(tmp_path / "site", options)
    with slow_server(tmp_path / "site", options) as (address, answers):
        found = measure(options, address, str(tmp_path / "cache"))
    assert found["samples"] == 48
    assert answers["whole"] >= 7 and sum((answers - Counter(whole=answers["whole"])).values()) > 0
    assert found["train_s"] > 0 and found["wait_s"] >= 0 and found["start_s"] > 0
