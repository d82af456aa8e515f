"""The client against a real server on this machine that misbehaves in every way we know."""

import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from clinkd.errors import SetupError
from clinkd.train.correction.settings import CorrectorSettings
from clinkd.train.correctors.client import ChatClient
from clinkd.train.correctors.limits import BudgetUsedUp, Spending, Stopped
from clinkd.train.correctors.wire import MAX_BYTES, CallFailed, estimate_tokens

MESSAGES = [{"role": "user", "content": "x" * 30}]  # estimated as 18 tokens
KEY = "sk-secret-123"


def completion(text, sent=10, received=5, finish="stop"):
    return {
        "model": "m-1",
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": sent, "completion_tokens": received},
    }


class Server:
    """Answers requests by a script of functions of the handler, then always with `good`."""

    def __init__(self):
        self.script = []
        self.seen = []  # (path, headers, body)
        self.good = lambda handler: send(handler, 200, completion("fine"))
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append((self.path, dict(self.headers), body))
                    act = outer.script.pop(0) if outer.script else outer.good
                self.close_connection = True
                act(self)

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # the client went away, as it should

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def send(handler, status, value, headers=()):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    for name, text in headers:
        handler.send_header(name, text)
    handler.end_headers()
    handler.wfile.write(body)


def fails(status, code="", message="", headers=()):
    error = {"error": {"code": code, "message": message}}
    return lambda handler: send(handler, status, error, headers)


def says(body):
    return lambda handler: send(handler, 200, body)


def cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def cut_behind_the_json(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(json.dumps(completion("half")).encode())


def cut_in_a_chunk(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'ff\r\n{"choices"')


def reset(handler):
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.connection.close()


def silent(handler):
    time.sleep(0.5)


def drip(handler):
    """A byte now and then: no single wait is long, the whole is."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.close()


class Clock:
    """Time that passes when somebody waits, and only then."""

    def __init__(self):
        self.time = 1000.0
        self.pauses = []

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.time += seconds
        return False


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(server, clock):
    """A client of the server with given settings, without real pauses."""

    def make(key=None, spent=None, on_loss=lambda paid: None, **settings):
        settings = {"timeout": 5.0, "requests_per_minute": 1000, "max_tokens": 100} | settings
        return ChatClient(
            CorrectorSettings(kind="endpoint", url=server.url, model="m", **settings),
            key,
            spent=spent,
            on_loss=on_loss,
            now=clock.now,
            sleep=clock.sleep,
            uniform=lambda low, high: high,
        )

    return make


def test_request_and_reply(server, make):
    client = make(key=KEY, parameters={"seed": 7, "max_tokens": None, "max_completion_tokens": 9})
    reply = client.complete(MESSAGES)
    assert (reply.text, reply.finish, reply.model) == ("fine", "stop", "m-1")
    assert reply.paid == client.spent == Spending(1, 10, 5)
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "m",
        "messages": MESSAGES,
        "temperature": 0.0,
        "max_completion_tokens": 9,
        "response_format": {"type": "json_object"},
        "seed": 7,
    }


def test_a_proxy_does_not_come_between_this_machine_and_itself(server, make, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # would see the key in the clear
    monkeypatch.delenv("no_proxy", raising=False)
    assert make(key=KEY, max_tries=1).complete(MESSAGES).text == "fine"
    assert server.seen[0][0] == "/v1/chat/completions"


def test_no_key_no_header(server, make):
    make().complete(MESSAGES)
    assert "Authorization" not in server.seen[0][1]


@pytest.mark.parametrize(
    "trouble",
    [
        fails(500),
        fails(503, message="overloaded"),
        fails(429, "rate_limit_exceeded"),
        fails(408),
        fails(409),
        says(b"<html>sorry</html>"),
        says({"choices": []}),
        says(["no", "object"]),
        says(b"[" * 100_000),
        cut,
        cut_behind_the_json,
        cut_in_a_chunk,
        reset,
    ],
)
def test_passing_trouble_is_survived(server, make, clock, trouble):
    server.script = [trouble, trouble]
    assert make().complete(MESSAGES).text == "fine"
    assert len(server.seen) == 3
    assert clock.pauses == [1.0, 2.0]  # the limit of the jitter, doubled


def test_an_error_under_status_200_is_told(server, make):
    server.script = [says({"error": {"code": 502, "message": f"no host for {KEY}"}})]
    with pytest.raises(CallFailed, match=r"chat completion: no host for \*\*\*; gave up after 1"):
        make(key=KEY, max_tries=1).complete(MESSAGES)


@pytest.mark.parametrize("trouble", [silent, drip])
def test_slow_answers_are_given_up(server, make, trouble):
    server.script = [trouble]
    client = make(timeout=0.15)
    started = time.monotonic()
    assert client.complete(MESSAGES).text == "fine"
    assert time.monotonic() - started < 3
    # the server may have done the work: it counts as paid
    assert client.spent == Spending(2, 18 + 10, 100 + 5)


def test_no_server(make, server, clock):
    client = make(max_tries=3)
    server.close()
    with pytest.raises(CallFailed, match=r"no connection: .*; gave up after 3 tries"):
        client.complete(MESSAGES)
    assert client.spent == Spending(3, 0, 0)
    server.__init__()  # so that the fixture can close it


def test_pauses_are_jittered_and_bounded(server, clock):
    server.script = [fails(500)] * 7
    limits = []

    def uniform(low, high):
        limits.append((low, high))
        return high / 2

    settings = CorrectorSettings(
        kind="endpoint", url=server.url, model="m", max_tries=8, max_wait=10, timeout=5
    )
    client = ChatClient(settings, now=clock.now, sleep=clock.sleep, uniform=uniform)
    client.complete(MESSAGES)
    assert limits == [(0, 1), (0, 2), (0, 4), (0, 8), (0, 10), (0, 10), (0, 10)]
    assert clock.pauses == [0.5, 1, 2, 4, 5, 5, 5]


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ([("Retry-After", "7")], 7.0),
        ([("Retry-After", "0.5")], 1.0),  # our own is longer
        ([("retry-after-ms", "2500"), ("Retry-After", "3")], 2.5),
        ([("Retry-After", "soon")], 1.0),
        ([("Retry-After", "nan")], 1.0),
        ([("Retry-After", "-5")], 1.0),
        ([("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT")], 1.0),
    ],
)
def test_retry_after(server, make, clock, headers, pause):
    server.script = [fails(429, headers=headers)]
    make().complete(MESSAGES)
    assert sum(clock.pauses) == pause


def test_retry_after_as_a_date_to_come(server, make, clock):
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    server.script = [fails(503, headers=[("Retry-After", date)])]
    make().complete(MESSAGES)
    assert 55 < sum(clock.pauses) <= 60


def test_too_long_a_pause_is_not_waited_for(server, make, clock):
    server.script = [fails(429, headers=[("Retry-After", "3600")])]
    with pytest.raises(CallFailed, match="HTTP 429; gave up after 1 tries"):
        make(max_wait=100).complete(MESSAGES)
    assert clock.pauses == []


def test_a_pause_asked_for_holds_the_other_threads(server, make, clock):
    server.script = [fails(429, headers=[("Retry-After", "50")])]
    client = make(max_tries=1)
    with pytest.raises(CallFailed):
        client.complete(MESSAGES)
    client.complete(MESSAGES)
    assert clock.time == 1050


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_not_repeated(server, make, status):
    server.script = [fails(status, message="bad \x1b[31mthing")]
    client = make()
    with pytest.raises(CallFailed, match=rf"HTTP {status}: bad \[31mthing"):
        client.complete(MESSAGES)
    assert client.complete(MESSAGES).text == "fine"
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (fails(401, message=f"wrong key {KEY}"), r"HTTP 401: wrong key \*\*\*. Check the key in K"),
        (fails(403), "Check the key in K"),
        (fails(404, message="no such model"), "Check url and model"),
        (fails(402), "no money or quota"),
        (fails(429, "insufficient_quota"), "no money or quota"),
        (lambda h: send(h, 429, {"error": {"type": "insufficient_quota"}}), "no money or quota"),
        (lambda h: send(h, 302, b"", [("Location", "/v1/elsewhere")]), "not followed"),
        (lambda h: send(h, 307, b"", [("Location", "http://10.1.1.1/")]), "not followed"),
    ],
)
def test_what_ends_the_work(server, make, trouble, message):
    server.script = [trouble]
    with pytest.raises(SetupError, match=message) as caught:
        make(key=KEY, key_env="K").complete(MESSAGES)
    assert len(server.seen) == 1
    assert KEY not in str(caught.value)


def test_a_key_that_is_missing(server, make):
    server.script = [fails(401)]
    with pytest.raises(SetupError, match="Set key_env"):
        make().complete(MESSAGES)


def test_too_large_an_answer(server, make):
    server.script = [says(b" " * (MAX_BYTES + 1))]
    with pytest.raises(CallFailed, match="over 4194304 bytes"):
        make().complete(MESSAGES)


def test_breaker(server, make):
    server.script = [fails(500)] * 2 + [fails(400)] + [fails(500)] * 2
    client = make(max_tries=2, max_failures=3)
    for _ in range(2):
        with pytest.raises(CallFailed):
            client.complete(MESSAGES)
    with pytest.raises(SetupError, match=r"3 calls in a row failed, the last one: HTTP 500"):
        client.complete(MESSAGES)


def test_a_success_resets_the_breaker(server, make):
    server.script = [fails(400), says(completion("a")), fails(400), says(completion("a"))]
    client = make(max_failures=2)
    for _ in range(2):
        with pytest.raises(CallFailed):
            client.complete(MESSAGES)
        client.complete(MESSAGES)


@pytest.mark.parametrize(
    ("limits", "calls", "what"),
    [
        ({"max_calls": 2}, 2, "calls (2)"),
        # each call has 15 tokens, and may have 118
        ({"max_total_tokens": 150}, 3, "tokens (150)"),
        # 10 × 1 + 5 × 10 = 60 millionths each, at most 18 + 1000
        ({"max_cost": 0.00115, "input_price": 1, "output_price": 10}, 3, "money (0.00115)"),
    ],
)
def test_budgets(server, make, limits, calls, what):
    client = make(**limits)
    for _ in range(calls):
        client.complete(MESSAGES)
    with pytest.raises(BudgetUsedUp) as caught:
        client.complete(MESSAGES)
    assert str(caught.value) == f"the budget of {what} is used up"
    assert len(server.seen) == calls


def test_budget_knows_what_was_spent_before_and_counts_tries(server, make):
    server.script = [fails(500)]
    losses = []
    client = make(spent=Spending(calls=3), max_calls=5, on_loss=losses.append)
    client.complete(MESSAGES)
    assert losses == [Spending(1, 0, 0)]
    with pytest.raises(BudgetUsedUp):
        client.complete(MESSAGES)


def test_usage_that_is_missing_or_absurd_is_estimated(server, make):
    absurd = {"prompt_tokens": -1, "completion_tokens": True}
    for usage in (None, absurd, {"prompt_tokens": 10**400, "completion_tokens": 10**400}):
        server.script.append(says(completion("a") | {"usage": usage}))
    client = make()
    for _ in range(3):
        assert client.complete(MESSAGES).paid == Spending(1, 18, 100)


def test_content_in_parts_and_refusals(server, make):
    parts = completion([{"type": "text", "text": "a"}, {"text": "b"}, {"text": [1]}, None])
    refusal = completion(None)
    refusal["choices"][0]["message"]["refusal"] = "no"
    server.script = [says(parts), says(refusal), says(completion(None, finish="length"))]
    client = make()
    assert client.complete(MESSAGES).text == "ab"
    assert client.complete(MESSAGES).finish == "refusal"
    assert client.complete(MESSAGES).finish == "length"


def test_stop_wakes_those_who_wait(server):
    server.script = [fails(500, headers=[("Retry-After", "60")])]
    settings = CorrectorSettings(kind="endpoint", url=server.url, model="m")
    client = ChatClient(settings)
    caught = []

    def call():
        with pytest.raises(Stopped) as info:
            client.complete(MESSAGES)
        caught.append(info)

    thread = threading.Thread(target=call)
    thread.start()
    while not server.seen:
        time.sleep(0.01)
    client.stop()
    thread.join(5)
    assert len(caught) == 1
    with pytest.raises(Stopped):
        client.complete(MESSAGES)


def test_estimate_of_images_and_other_scripts():
    image = {"type": "image_url", "image_url": {"url": "data:..."}}
    assert estimate_tokens([{"content": [image, {"type": "text", "text": "abc"}]}]) == 1509
    assert estimate_tokens([{"content": "肝臓"}]) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": None}, "needs url and model"),
        ({"model": None}, "needs url and model"),
        ({"url": "localhost:8000/v1"}, "must be written http"),
        ({"url": "file:///etc/passwd"}, "must be written http"),
        ({"url": "https://me:secret@host/v1"}, "must not hold a name or password"),
        ({"url": "https://host/v1?key=secret"}, "without"),
        ({"url": "http://[::1"}, "not a URL"),
        ({"url": "http://host:99999/v1"}, "not a URL"),
        ({"url": "https://a..b/v1"}, "not a URL"),
        ({"url": "https://host/v 1"}, "not a URL"),
        ({"url": "https://host/vé"}, "not a URL"),
        ({"url": "http://example.org/v1", "key_env": "K"}, "unencrypted"),
        ({"key_env": "sk-secret-123"}, "name of an environment variable"),
        ({"max_cost": 1.0}, "needs input_price"),
        ({"offline": True, "dry_run": True}, "exclude"),
        ({"kind": "local", "model": None}, "a folder or a .gguf"),
        ({"kind": "rule", "dry_run": True}, "for kind 'endpoint'"),
        ({"nonsense": 1}, "Extra inputs"),
    ],
)
def test_settings(settings, message):
    good = {"kind": "endpoint", "url": "https://host/v1", "model": "m"}
    with pytest.raises(ValueError, match=message) as caught:
        CorrectorSettings(**(good | settings))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:80/v1", "https://hé/v1"],
)
def test_settings_that_are_fine(url):
    assert CorrectorSettings(kind="endpoint", url=url, model="m", key_env="MY_KEY").url == url
