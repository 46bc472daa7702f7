"""Downloads over real HTTP: what comes, what does not and why, safety, and the same bytes after kill -9."""

import asyncio
import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from aiohttp.abc import AbstractResolver
from make_sources import some_image
from multidict import CIMultiDict
from web import Server

from data_tools.clean import main as clean_main
from data_tools.download.fetch import (
    Fetcher,
    FetchOptions,
    PrivateAddress,
    PublicResolver,
    check_url,
    is_public,
    opted_out,
)
from data_tools.download.run import DownloadConfig, download
from data_tools.download.run import main as download_main
from data_tools.download.spool import Spool
from data_tools.ingest.records import Record
from data_tools.readers.detect import open_source

WUKONG = Path(__file__).parents[4] / "shared/data/raw/wukong"


def fetch_all(urls, resolver=None, **options):
    """Outcomes of urls, in order."""

    async def run():
        async with Fetcher(FetchOptions(backoff_s=0.01, **options), resolver) as fetcher:
            return [await fetcher.fetch(url) for url in urls]

    return asyncio.run(run())


def write_list(path: Path, urls, caption="一件红色连衣裙"):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("url", "caption"), *((url, caption) for url in urls)])
    return path


def config(src, dst, **options):
    fetch = FetchOptions(allow_private=True, backoff_s=0.01, concurrency=8)
    return DownloadConfig(src, dst, fetch=options.pop("fetch", fetch), **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def dropped_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def server():
    with Server() as server:
        yield server


class TestFetch:
    def test_every_kind_of_answer(self, server):
        expected = {
            "/good/1": "",
            "/missing": "image_unavailable: HTTP 404",
            "/twice-busy": "",
            "/always-busy": "image_unavailable: HTTP 503",
            "/page": "not_an_image: no image in the answer",
            "/noai": "opted_out: noai",
            "/tdm": "opted_out: tdm-reservation",
            "/other-robot": "",
            "/large": "image_too_large: over 500000 bytes",
            "/endless": "image_too_large: over 500000 bytes",
            "/short": "image_unavailable: ended early",
            "/loop": "image_unavailable: too many redirects",
            "/to//good/3": "",
        }
        outcomes = fetch_all([server.url + path for path in expected], allow_private=True, max_bytes=500_000)
        found = {p: f"{o.reason}: {o.detail}".strip(": ") for p, o in zip(expected, outcomes, strict=True)}
        assert found == expected
        assert outcomes[0].data == some_image(1) and outcomes[-1].data == some_image(3)
        assert server.requests["/missing"] == 1, "HTTP 404 is not tried again"
        assert server.requests["/always-busy"] == 3 and server.requests["/twice-busy"] == 3

    def test_a_slow_answer_is_given_up(self, server):
        start = time.monotonic()
        outcome = fetch_all([server.url + "/slow"], allow_private=True, timeout_s=0.3, retries=1)[0]
        assert (outcome.reason, outcome.detail) == ("image_unavailable", "timeout")
        assert time.monotonic() - start < 2

    def test_no_server_no_host_no_url(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            closed = f"http://127.0.0.1:{free.getsockname()[1]}/"
        urls = [
            closed,
            "http://no-such-host.invalid/",
            "ftp://a/b",
            "http://",
            "http://[::1",
            "no url at all",
        ]
        details = [o.detail for o in fetch_all(urls, allow_private=True, retries=0)]
        assert details == ["no connection", "no such host", *["not an http or https url"] * 2, "not a url",
                           "not an http or https url"]  # fmt: skip

    def test_connections_are_kept(self, server):
        """100 images one after the other use one connection."""
        ports = set()
        real = server.process_request
        server.process_request = lambda request, address: (ports.add(address[1]), real(request, address))
        fetch_all([f"{server.url}/good/{i}" for i in range(100)], allow_private=True)
        assert server.total == 100 and len(ports) == 1

    def test_opt_out_headers(self):
        directives = ("noai", "noimageai")
        assert (
            opted_out(CIMultiDict([("X-Robots-Tag", "all"), ("x-robots-tag", "NOAI")]), directives, "me")
            == "noai"
        )
        assert opted_out(CIMultiDict({"X-Robots-Tag": "me: noimageai"}), directives, "me") == "noimageai"
        assert (
            opted_out(CIMultiDict({"X-Robots-Tag": "unavailable_after: 25 Jun 2030"}), directives, "me") == ""
        )
        assert opted_out(CIMultiDict({"X-Robots-Tag": "noai"}), (), "me") == ""


class FakeNames(AbstractResolver):
    """Every name leads to one address."""

    def __init__(self, address):
        self.address = address

    async def resolve(self, host, port=0, family=socket.AF_INET):
        return [
            {
                "hostname": host,
                "host": self.address,
                "port": port,
                "family": socket.AF_INET,
                "proto": 0,
                "flags": 0,
            }
        ]

    async def close(self):
        pass


class TestPrivateAddresses:
    @pytest.mark.parametrize(
        "address",
        ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.100.100.200", "0.0.0.0",
         "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1",
         "2002:7f00:1::", "2002:c0a8:1::"],
    )  # fmt: skip
    def test_private(self, address):
        assert not is_public(address)

    @pytest.mark.parametrize("address", ["93.184.216.34", "2606:4700:4700::1111", "64:ff9b::5db8:d822"])
    def test_public(self, address):
        assert is_public(address)

    def test_literal_addresses_are_refused(self, server):
        urls = [
            server.url,
            "http://[::1]/",
            "http://169.254.169.254/latest/meta-data",
            "http://[::ffff:10.0.0.1]/",
        ]
        assert {outcome.reason for outcome in fetch_all(urls)} == {"private_address"}
        assert server.total == 0

    @pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.0.0.1", "0177.0.0.1"])
    def test_other_spellings_are_refused(self, server, host):
        """A name is refused after it was resolved; numbers that are no plain address are no url for the client."""
        outcome = fetch_all([f"http://{host}:{server.server_address[1]}/good/1"], retries=0)[0]
        assert outcome.reason == ("private_address" if host == "localhost" else outcome.reason) != ""
        assert server.total == 0

    def test_names_that_lead_inside_are_refused(self):
        resolver = PublicResolver(FakeNames("192.168.1.1"))
        with pytest.raises(PrivateAddress):
            asyncio.run(resolver.resolve("inside.example"))
        assert fetch_all(["http://inside.example/"], resolver)[0].reason == "private_address"

    def test_redirects_are_checked(self, server):
        """The first host passes as public (its resolver says nothing), the redirect names a private address."""
        url = f"http://outside.example:{server.server_address[1]}/to/{server.url}/good/1"
        outcome = fetch_all([url], FakeNames("127.0.0.1"))[0]
        assert outcome.reason == "private_address"
        assert server.total == 1

    def test_allowed_for_one_s_own_server(self):
        assert check_url("http://127.0.0.1/", True).host == "127.0.0.1"


class TestDownload:
    def test_rows_are_kept_or_dropped_with_a_reason(self, server, tmp_path):
        paths = ["good/1", "missing", "good/2", "page", "noai", "good/3"]
        src = write_list(tmp_path / "list.csv", [f"{server.url}/{path}" for path in paths])
        report = download(config(src, tmp_path / "out"))
        assert (report["read"], report["kept"], report["dropped"]) == (6, 3, 3)
        assert report["reasons"] == {"image_unavailable": 1, "not_an_image": 1, "opted_out": 1}
        assert report["hosts"] == {"127.0.0.1": {"came": 3, "failed": 3}}
        records = list(open_source(tmp_path / "out"))
        assert [r.image for r in records] == [some_image(1), some_image(2), some_image(3)]
        assert all(
            isinstance(r, Record) and r.captions == ("一件红色连衣裙",) and r.meta["url"] for r in records
        )
        rows = dropped_rows(tmp_path / "out")
        assert [(r["where"], r["reason"], r["detail"]) for r in rows] == [
            ("list.csv:3", "image_unavailable", "HTTP 404"),
            ("list.csv:5", "not_an_image", "no image in the answer"),
            ("list.csv:6", "opted_out", "noai"),
        ]

    def test_a_url_that_comes_twice_is_fetched_once(self, server, tmp_path):
        src = tmp_path / "list.csv"
        src.write_text(f"url,caption\n{server.url}/good/1,一件衬衫\n{server.url}/good/1,白色衬衫\n", "utf-8")
        assert download(config(src, tmp_path / "out"))["kept"] == 2
        assert server.total == 1

    def test_only_failures_are_tried_again(self, server, tmp_path):
        urls = [f"{server.url}/good/{i}" for i in range(5)] + [f"{server.url}/later", f"{server.url}/missing"]
        src = write_list(tmp_path / "list.csv", urls)
        assert download(config(src, tmp_path / "out", samples_per_shard=4))["kept"] == 5
        server.requests.clear()
        server.broken = False
        report = download(config(src, tmp_path / "out", samples_per_shard=4))
        assert report["kept"] == 6 and report["reasons"] == {"image_unavailable": 1}
        assert set(server.requests) == {"/later", "/missing"}
        fresh = download(config(src, tmp_path / "fresh", samples_per_shard=4))
        assert fresh["kept"] == 6
        for name in ("train-00000.tar", "train-00001.tar", "dropped.jsonl", "dataset.json"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()

    def test_a_host_is_asked_no_more_than_per_host_at_a_time(self, tmp_path, server):
        """Across the parts of the list too, while another host is served beside it."""
        busy, most = Counter(), Counter()
        real = server.RequestHandlerClass.answer

        class Counting(server.RequestHandlerClass):
            def answer(self, *args, **headers):
                host = self.headers["Host"]
                with self.server.lock:
                    busy[host] += 1
                    most[host] = max(most[host], busy[host])
                time.sleep(0.03)
                with self.server.lock:
                    busy[host] -= 1
                real(self, *args, **headers)

        server.RequestHandlerClass = Counting
        other = server.url.replace("127.0.0.1", "localhost")
        urls = [f"{base}/good/{i}" for i in range(24) for base in (server.url, other)]
        src = write_list(tmp_path / "list.csv", urls)
        flags = ["--allow-private", "--per-host", "3", "--samples-per-shard", "10"]
        assert download_main([str(src), str(tmp_path / "out"), *flags])["kept"] == 48
        assert len(most) == 2 and set(most.values()) == {3}

    def test_stops_when_nothing_comes(self, server, tmp_path, capsys):
        src = write_list(tmp_path / "list.csv", [f"{server.url}/missing?{i}" for i in range(200)])
        argv = [
            str(src),
            str(tmp_path / "out"),
            "--allow-private",
            "True",
            "--min-rows",
            "20",
            "--concurrency",
            "4",
        ]
        with pytest.raises(SystemExit) as exit_:
            download_main(argv)
        assert exit_.value.code == 2
        assert "only 0 of 20 images came" in capsys.readouterr().err
        assert 20 <= server.total <= 40

    def test_caption_rules_cost_no_request(self, server, tmp_path):
        src = write_list(tmp_path / "list.csv", [f"{server.url}/good/1"], caption="<b>苹果</b>")
        report = download(config(src, tmp_path / "out", rules="wukong"))
        assert report["reasons"] == {"caption_special_characters": 1} and server.total == 0

    def test_another_list_in_the_same_folder_is_refused(self, server, tmp_path):
        download(config(write_list(tmp_path / "a.csv", [f"{server.url}/good/1"]), tmp_path / "out"))
        with pytest.raises(ValueError, match="another list"):
            download(config(write_list(tmp_path / "b.csv", [f"{server.url}/good/2"]), tmp_path / "out"))

    def test_images_instead_of_urls_are_refused(self, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "1.jpg").write_bytes(some_image(1))
        (tmp_path / "in" / "1.txt").write_text("一件衬衫", "utf-8")
        with pytest.raises(ValueError, match="holds images, not urls"):
            download(config(tmp_path / "in", tmp_path / "out"))


class TestSpool:
    def test_a_torn_tail_is_cut_off_wherever_it_is_torn(self, tmp_path):
        path = tmp_path / "a.spool"
        spool = Spool(path)
        spool.add([0, 3], some_image(1), "", "", "a.example")
        spool.add([1], b"", "image_unavailable", "HTTP 404", "b.example")
        end = path.stat().st_size
        spool.add([2], some_image(2), "", "", "a.example")
        spool.close()
        whole = path.read_bytes()
        for size in range(end, len(whole), 37):
            path.write_bytes(whole[:size])
            torn = Spool(path)
            assert set(torn.entries) == {0, 1, 3} and path.stat().st_size == end
            assert torn.read(3) == some_image(1) and torn.entries[1].detail == "HTTP 404"
            torn.close()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert set(Spool(path).entries) == {0, 1, 3}, "the checksum finds a flipped bit"


def run_killed(argv: list[str], server: Server, requests: int) -> bool:
    """Start the command, kill -9 it after so many requests; True if it was killed before its end."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-m", "data_tools.download", *argv]
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    until = server.total + requests
    while server.total < until and process.poll() is None:
        time.sleep(0.002)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


@pytest.mark.parametrize("moments", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_give_the_bytes_of_the_uninterrupted_run(tmp_path, moments):
    generator = random.Random(0)
    with Server(delay=0.004) as server:
        paths = [f"good/{i}" if i % 9 else f"missing?{i}" for i in range(240)]
        src = write_list(tmp_path / "list.csv", [f"{server.url}/{path}" for path in paths])
        options = [
            "--allow-private",
            "True",
            "--concurrency",
            "4",
            "--per-host",
            "4",
            "--samples-per-shard",
            "50",
        ]
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        download_main([str(src), str(whole), *options])
        uninterrupted = server.total
        kills = sum(
            run_killed([str(src), str(killed), *options], server, generator.randint(1, 35))
            for _ in range(moments)
        )
        assert kills >= 0.8 * moments
        download_main([str(src), str(killed), *options])
        assert tree(whole) == tree(killed)
        assert len(list(open_source(killed))) == 240 - 27
        # nothing that came is requested again: only the requests under way at a kill
        assert server.total - uninterrupted <= uninterrupted + moments * 4


@pytest.mark.skipif(not WUKONG.is_dir(), reason="needs ../shared/data/raw/wukong")
class TestWukongSample:
    @pytest.mark.parametrize("filter_first", [False, True])
    def test_gives_exactly_the_expected_rows(self, tmp_path, filter_first):
        """Each keep and each drop with its reason; with the caption rules before or after the requests."""
        expected = json.loads((WUKONG / "expected.json").read_text("utf-8"))
        with Server(WUKONG / "images") as server:
            text = (
                (WUKONG / "wukong_sample.csv").read_text("utf-8").replace("http://127.0.0.1:8000", server.url)
            )
            (tmp_path / "wukong.csv").write_text(text, "utf-8")
            argv = [str(tmp_path / "wukong.csv"), str(tmp_path / "raw"), "--allow-private", "True"]
            download_main([*argv, *(["--rules", "wukong"] if filter_first else [])])
            requests = server.total
        clean_main([str(tmp_path / "raw"), str(tmp_path / "clean"), "--rules", "wukong", "--workers", "0"])
        kept = {r.meta["url"].rpartition("/")[2] for r in open_source(tmp_path / "clean")}
        by_key = {r.key: r.meta["url"] for r in open_source(tmp_path / "wukong.csv")}
        rows = dropped_rows(tmp_path / "raw") + dropped_rows(tmp_path / "clean")
        reasons = {by_key[row["key"]].rpartition("/")[2]: row["reason"] for row in rows}
        assert len(kept) == expected["keep"] and len(rows) == expected["drop"]
        found = [("keep", None) if name in kept else ("drop", reasons[name]) for name in names_of(expected)]
        assert found == [(row["expect"], row["reason"]) for row in expected["rows"]]
        assert requests == (180 if filter_first else 200)


def names_of(expected: dict) -> list[str]:
    return [row["url"].rpartition("/")[2] for row in expected["rows"]]
