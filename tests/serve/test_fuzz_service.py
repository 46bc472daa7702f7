"""Requests that no honest client sends, and kills; the full counts are those of benchmarks/service/fuzz.py."""

import random

import httpx
import pytest

from benchmarks.service.fuzz import Fuzzer, Target, fuzz, main, problems_of
from serve.audit import AuditLog, verify

TEXT = "一件红色的连衣裙"


def test_fuzzed_requests_are_answered_or_refused_and_the_service_goes_on(service):
    host, port = service.url.removeprefix("http://").split(":")
    restarts = service.dispatcher.restarts  # the service of all tests here, some of which kill its worker
    found = fuzz(Target(host, int(port), service.key), requests=250, clients=4, seed=1)
    assert found.bad == []
    assert found.statuses["200"] and found.statuses["400"] and found.statuses["401"], found.statuses
    headers = {"Authorization": f"Bearer {service.key}"}
    body = {"prompt": TEXT}
    answer = httpx.post(f"{service.url}/v1/images/generations", json=body, headers=headers, timeout=300)
    assert answer.status_code == 200 and service.dispatcher.restarts == restarts
    assert verify(service.folder / "audit") > 0
    secret = service.key.split("-", 2)[2].encode()
    assert not any(secret in path.read_bytes() for path in (service.folder / "audit").iterdir())


def test_the_same_seed_sends_the_same_requests():
    target = Target("127.0.0.1", 1, "pp-a-b")
    first, again = ([Fuzzer(random.Random(i), target).request() for i in range(40)] for _ in range(2))
    assert first == again and len(set(first)) > 30


def test_what_is_wrong_is_found(tmp_path):
    log = AuditLog(tmp_path / "audit")
    log.append({"image_sha256": ["00"]})
    log.close()
    assert problems_of(tmp_path, "pp-id-secret", []) == []
    (tmp_path / "log.txt").write_text("Traceback (most recent call last): secret")
    (tmp_path / "stray").write_text("")
    path = next((tmp_path / "audit").glob("audit_*"))
    path.write_text(path.read_text().replace("00", "01", 1))
    found = "; ".join(problems_of(tmp_path, "pp-id-secret", [("a.png", "f" * 64)]))
    for said in (
        "stray",
        "traceback",
        "the key stands in the log",
        "chain is broken",
        "lost",
        "not in the audit",
    ):
        assert said in found, found


@pytest.mark.slow
def test_nothing_is_lost_by_kills(small_generator):
    checkpoint = ("--checkpoint", str(small_generator), "--start-seconds", "600")
    assert main(["--requests", "200", "--kills", "40", "--clients", "4", *checkpoint]) == []
