"""API keys: verified, limited, revoked; nothing of the secret is stored."""

import sqlite3
import threading

import pytest

from serve.keys import KeyStore, Limits, main, open_database


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/keys.db"


@pytest.fixture
def store(url):
    return KeyStore(open_database(url))


def test_only_the_right_secret_is_accepted(store):
    key, record = store.create("editors")
    other, _ = store.create("others")
    assert store.verify(key) == record
    secret = key.split("-", 2)[2]
    wrong = ["", "pp-", "pp-x-y", key[:-1], key + "x", key.upper(), f"xx-{record.id}-{secret}"]
    wrong += [f"pp-{other.split('-')[1]}-{secret}", f"pp-{record.id}-"]
    assert [store.verify(k) for k in wrong] == [None] * len(wrong)


def test_the_database_holds_no_secret(store, url, tmp_path):
    key, record = store.create("editors")
    secret = key.split("-", 2)[2]
    with sqlite3.connect(tmp_path / "keys.db") as connection:
        dump = "\n".join(connection.iterdump())
    assert record.id in dump and secret not in dump


def test_revoked_and_expired_keys_are_refused(store):
    key, record = store.create("a", days=1, now=1000.0)
    assert store.verify(key, now=1000.0 + 86399) and not store.verify(key, now=1000.0 + 86400)
    store.revoke(record.id)
    assert store.verify(key, now=1001.0) is None
    with pytest.raises(ValueError, match="no key"):
        store.revoke(record.id)


def test_limits_count_requests_and_images_by_windows(store):
    limits = Limits(requests_per_minute=3, requests_per_day=5, images_per_minute=10, images_per_day=0)
    _, key = store.create("a", limits=limits)
    start = 86400.0 * 1000
    assert store.spend(key, 8, start) == 0
    assert store.spend(key, 3, start + 10) == 50.0  # 11 images in this minute
    assert store.spend(key, 2, start + 10) == 0  # what was refused was not counted
    assert store.spend(key, 0, start + 20) == 0
    assert store.spend(key, 0, start + 30) == 30.0  # the fourth request of the minute
    assert store.spend(key, 1, start + 60) == 0
    assert store.spend(key, 1, start + 61) == 0
    assert store.spend(key, 1, start + 62) == 86400 - 62  # the sixth request of the day


def test_a_clock_that_goes_backwards_gives_no_new_window(store):
    _, key = store.create("a", limits=Limits(requests_per_minute=1, images_per_minute=0))
    assert store.spend(key, 1, 6000.0) == 0
    assert store.spend(key, 1, 5000.0) > 0


def test_counts_of_many_threads_are_exact(store):
    _, key = store.create("a", limits=Limits(requests_per_minute=30, images_per_minute=0))
    results = []
    threads = [
        threading.Thread(target=lambda: results.extend(store.spend(key, 1, 60.0) for _ in range(10)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(wait == 0 for wait in results) == 30


def test_usage_survives_a_restart(url):
    store = KeyStore(open_database(url))
    _, key = store.create("a", limits=Limits(requests_per_minute=1))
    assert store.spend(key, 1, 60.0) == 0
    assert KeyStore(open_database(url)).spend(key, 1, 61.0) > 0


def test_the_command_makes_lists_and_revokes(url, capsys):
    main(["create", "--name", "editors", "--database", url])
    key = capsys.readouterr().out.splitlines()[0]
    assert KeyStore(open_database(url)).verify(key)
    main(["revoke", key.split("-")[1], "--database", url])
    main(["list", "--database", url])
    listed = capsys.readouterr().out
    assert "editors" in listed and "revoked" in listed and key not in listed


@pytest.mark.parametrize(
    "argv",
    [
        ["revoke"],
        ["create", "--limits.images-per-day", "-1"],
        ["create", "--database", "no url"],
        ["create", "--database", "sqlite:////nonexistent/folder/keys.db"],
        ["create", "--scopes", "everything"],
    ],
)
def test_bad_input_ends_in_one_sentence(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
