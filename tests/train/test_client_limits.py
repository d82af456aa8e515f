"""Rate limits over time, and the cache of replies over crashes."""

import json
import resource
import threading

import pytest

from clinkd.errors import DataError, SetupError
from clinkd.train.correctors.cache import ReplyCache, StoredReply, reply_key
from clinkd.train.correctors.limits import WINDOW, RateLimit, Spending, Stopped


class Clock:
    def __init__(self):
        self.time = 0.0

    def now(self):
        return self.time

    def sleep(self, seconds):
        assert seconds > 0
        self.time += seconds
        return False


def starts(limit, clock, tokens):
    out = []
    for count in tokens:
        limit.take(count)
        out.append(clock.time)
    return out


def test_requests_per_minute():
    clock = Clock()
    limit = RateLimit(3, None, clock.sleep, clock.now)
    assert starts(limit, clock, [1] * 7) == [0, 0, 0, 60, 60, 60, 120]


def test_tokens_per_minute():
    clock = Clock()
    limit = RateLimit(100, 1000, clock.sleep, clock.now)
    assert starts(limit, clock, [400, 400, 400, 200, 900, 5000, 1]) == [0, 0, 60, 60, 120, 180, 240]


def test_no_window_holds_more_than_allowed():
    clock = Clock()
    limit = RateLimit(7, 1000, clock.sleep, clock.now)
    taken = []
    for i in range(200):
        tokens = (i * 37) % 300
        limit.take(tokens)
        taken.append((clock.time, tokens))
        clock.time += (i * 13) % 11
    for start, _ in taken:
        inside = [tokens for moment, tokens in taken if start <= moment < start + WINDOW]
        assert len(inside) <= 7
        assert sum(inside) <= 1000


def test_hold():
    clock = Clock()
    limit = RateLimit(100, None, clock.sleep, clock.now)
    limit.hold(5)
    limit.hold(3)
    assert starts(limit, clock, [1, 1]) == [5, 5]


def test_stopped_while_waiting():
    limit = RateLimit(1, None, lambda seconds: True, lambda: 0.0)
    limit.take(1)
    with pytest.raises(Stopped):
        limit.take(1)


def test_many_threads_keep_the_limit():
    clock = Clock()
    lock = threading.Lock()
    times = []

    def sleep(seconds):
        with lock:
            clock.time += 1
        return False

    limit = RateLimit(5, None, sleep, clock.now)

    def work():
        for _ in range(5):
            limit.take(1)
            with lock:
                times.append(clock.time)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(times) == 30
    assert clock.time >= 5 * WINDOW  # six minutes' worth of calls, the first one at once


# the cache --------------------------------------------------------------------------------------


def test_replies_outlive_the_process(tmp_path):
    path = tmp_path / "new" / "replies.jsonl"
    reply = StoredReply("Ünïcode \u2028 line\nend", "stop", "m", Spending(1, 10, 5))
    with ReplyCache(path) as cache:
        assert cache.get("a") is None
        cache.put("a", reply)
        cache.lose(Spending(2, 3, 0))
        cache.lose(Spending())
    with ReplyCache(path, read_only=True) as cache:
        assert cache.get("a") == reply
        assert cache.spent == Spending(3, 13, 5)
        assert len(cache) == 1
        with pytest.raises(ValueError, match="reading only"):
            cache.put("b", reply)
    assert path.read_text().count("\n") == 2


def test_a_crash_loses_the_last_line_at_most(tmp_path):
    path = tmp_path / "replies.jsonl"
    with ReplyCache(path) as cache:
        cache.put("a", StoredReply("A"))
        cache.put("b", StoredReply("B"))
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with ReplyCache(path) as cache:
            assert len(cache) == whole[:cut].count(b"\n")
            cache.put("c", StoredReply("C"))
        with ReplyCache(path) as cache:
            assert cache.get("c") == StoredReply("C")


@pytest.mark.parametrize("line", ["{", "[]", '{"key": "a"}', '{"calls":1,"sent":0,"received":0}'])
def test_damage_elsewhere_names_the_line(tmp_path, line):
    path = tmp_path / "replies.jsonl"
    with ReplyCache(path) as cache:
        cache.put("a", StoredReply("A"))
    path.write_text(path.read_text() + line + "\n" + path.read_text())
    with pytest.raises(DataError, match=r"replies\.jsonl:2: not a line of a cache"):
        ReplyCache(path)


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "replies.jsonl"
    with ReplyCache(path), pytest.raises(SetupError, match="another process"):
        ReplyCache(path)
    ReplyCache(path).close()


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(SetupError, match="no cache of replies"):
        ReplyCache(tmp_path / "none.jsonl", read_only=True)
    with pytest.raises(SetupError, match="cannot be used: Is a directory"):
        ReplyCache(tmp_path)


def test_a_full_disk_is_told_and_loses_one_line_at_most(tmp_path):
    path = tmp_path / "replies.jsonl"
    with ReplyCache(path) as cache:
        cache.put("a", StoredReply("A"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
    try:
        with pytest.raises(SetupError, match="cannot be written"), ReplyCache(path) as cache:
            cache.put("b", StoredReply("B"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with ReplyCache(path) as cache:
        assert (cache.get("a"), len(cache)) == (StoredReply("A"), 1)


def test_keys_depend_on_everything():
    assert reply_key(a=1, b="x") == reply_key(b="x", a=1)
    assert len({reply_key(a=1), reply_key(a=2), reply_key(b=1), reply_key(a="1")}) == 4
    assert json.loads(json.dumps(reply_key(a="\ud800")))  # half a surrogate pair does no harm
