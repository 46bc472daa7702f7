"""The threads of compiled code: they sleep while they wait, also for ever, and a forked process starts its own."""

import os
import threading
import time

import pytest
import torch

from kernels import compiler, train_heads

pytestmark = pytest.mark.skipif(
    bool(compiler.unavailable_reason(train_heads.SOURCE)), reason="no compiled code on this machine"
)


@pytest.fixture(autouse=True)
def four_threads():
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


def losses() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(37, 200, generator=generator).bfloat16()
    return train_heads.run_entropy(logits, torch.arange(37))


def test_any_number_of_threads_gives_the_same():
    found = []
    for threads in (1, 4, 2, 5, 3, 1):
        torch.set_num_threads(threads)
        found += [losses() for _ in range(50)]
    assert all(torch.equal(found[0], other) for other in found)


def test_threads_sleep_between_calls():
    losses()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1  # three spinning threads would take 0.3 to 0.9


def test_calls_of_several_python_threads():
    expected, wrong = losses(), []

    def work():
        torch.set_num_threads(4)
        wrong.extend(1 for _ in range(30) if not torch.equal(losses(), expected))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_a_forked_process_has_threads_of_its_own():
    logits, targets = torch.randn(37, 200).bfloat16(), torch.arange(37)
    expected = train_heads.run_entropy(logits, targets)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(train_heads.run_entropy(logits, targets), expected) else 1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the forked process waits for threads that it does not have")
    assert status == 0
