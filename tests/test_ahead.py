"""Items made ahead of time: the same ones in the same order, bounded, and a thread that ends."""

import threading
import time

import pytest

from nfscale.ahead import ahead


def test_items_come_in_their_order():
    assert list(ahead(range(1000), lambda item: 1)) == list(range(1000))
    assert list(ahead([], lambda item: 1)) == []


def test_items_are_made_while_others_are_used():
    made = []

    def items():
        for item in range(8):
            made.append(item)
            yield item

    coming = ahead(items(), lambda item: 1, chunk_bytes=1)
    assert next(coming) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) >= 4, "without anyone asking"
    time.sleep(0.1)
    assert len(made) < 8, "and no more than may wait"
    assert list(coming) == list(range(1, 8))


def test_an_exception_comes_out_in_its_place():
    def items():
        yield from (1, 2)
        raise RuntimeError("the disk is gone")

    coming = ahead(items(), lambda item: 1)
    assert [next(coming), next(coming)] == [1, 2]
    with pytest.raises(RuntimeError, match="the disk is gone"):
        next(coming)


def test_the_thread_ends_with_the_iterator():
    before = threading.active_count()
    coming = ahead(iter(lambda: 1, 2), lambda item: 1)  # ones without end
    assert next(coming) == 1
    assert threading.active_count() == before + 1
    coming.close()
    assert threading.active_count() == before
