"""The page in a real browser: pictures load, filters work, nothing is refused, nothing overflows.

Drives Chromium over its debugging pipe (one JSON message per NUL-ended string on file descriptors
3 and 4), so that no driver program, port or package is needed.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clinkd.report import build_report

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
PATIENCE = 60  # seconds for one answer: a cold start on a busy machine


class Page:
    """One tab of a headless browser.

    Attributes:
        events: everything the browser told unasked, in order.
    """

    def __init__(self, browser: str, profile: Path) -> None:
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()
        # numbers that the child's 3 and 4 cannot overwrite before they are copied
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_child, from_child)]

        def place() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            [browser, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=place,
            close_fds=False,  # Python's own descriptors close themselves; 3 and 4 must stay
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_child, from_child, *ends):
            os.close(end)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") != self._number:
                self.events.append(answer)
                continue
            assert "error" not in answer, f"{method}: {answer['error']}"
            result: dict[str, Any] = answer["result"]
            return result

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"the browser said nothing for {PATIENCE} s"
            data = os.read(self._read, 1 << 20)
            assert data, f"the browser ended with code {self._process.poll()}"
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer

    def open(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """Load a file at a window size, in CSS pixels, and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.saw("Page.loadEventFired"):
            self.events.append(self._next())

    def saw(self, method: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("method") == method]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path, full: bool = True) -> None:
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(answer["data"]))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, refusals of the content policy."""
        found = [json.dumps(e["params"]) for e in self.saw("Runtime.exceptionThrown")]
        for event in self.saw("Log.entryAdded"):
            if event["params"]["entry"]["level"] in ("error", "warning"):
                found.append(event["params"]["entry"]["text"])
        for event in self.saw("Runtime.consoleAPICalled"):
            if event["params"]["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(event["params"]["args"]))
        return found

    def fetched(self) -> list[str]:
        """Addresses asked for, data URIs left out."""
        urls = [e["params"]["request"]["url"] for e in self.saw("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    def close(self) -> None:
        os.close(self._write)  # the browser ends when its pipe does
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)


def find_browser() -> str:
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    pytest.fail("no Chromium on the PATH; on Debian: apt-get install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    tab = Page(find_browser(), tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
VISIBLE = "[...document.querySelectorAll('.shot')].filter(c => c.offsetParent !== null)"


def show_all(page: Page) -> None:
    """Press “Show more” until it is gone."""
    press = "const b = document.querySelector('#more'); while (b.offsetParent) b.click();"
    page.evaluate(f"(() => {{ {press} }})()")


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1440, 900)])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_loads_whole_and_fits(page: Page, run: Path, width: int, height: int, dark: bool) -> None:
    path = build_report(run)
    page.open(path, width, height, dark)

    pictures = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.alt])")
    assert len(pictures) >= 48
    assert all(natural > 0 and alt for natural, alt in pictures)
    assert page.evaluate(OVERFLOW) <= 0
    assert page.fetched() == [path.resolve().as_uri()]
    assert page.complaints() == []


def test_scheme_changes_the_colours(page: Page, run: Path) -> None:
    path = build_report(run)
    background = "getComputedStyle(document.body).backgroundColor"
    page.open(path, 1440, 900)
    light = page.evaluate(background)
    page.open(path, 1440, 900, dark=True)
    assert page.evaluate(background) != light


def test_paper_is_light_where_the_screen_is_dark(page: Page, run: Path) -> None:
    page.open(build_report(run), 1440, 900, dark=True)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    page.call("Emulation.setEmulatedMedia", media="print", features=[dark])
    colours = "(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))"
    found = page.evaluate(colours)
    page.call("Emulation.setEmulatedMedia", media="", features=[])
    assert found == ["rgb(20, 37, 44)", "rgb(255, 255, 255)"]


def test_filters_choose_cards(page: Page, run: Path) -> None:
    page.open(build_report(run), 1440, 900)
    first = page.evaluate(f"{VISIBLE}.length")
    show_all(page)
    everything = page.evaluate(f"{VISIBLE}.length")
    assert 0 < first < everything == page.evaluate("document.querySelectorAll('.shot').length")

    click = "document.querySelector('[data-filter={}][data-value={}]').click()"
    page.evaluate(click.format("task", "VG"))
    assert page.evaluate(f"{VISIBLE}.every(c => c.dataset.task === 'VG')")
    assert 0 < page.evaluate(f"{VISIBLE}.length") < everything
    page.evaluate(click.format("verdict", "wrong"))
    page.evaluate(click.format("modality", "fundus"))
    shown = page.evaluate(f"{VISIBLE}.map(c => Object.values(c.dataset).join())")
    assert shown
    assert set(shown) == {"VG,fundus,wrong"}
    assert page.evaluate("document.querySelector('.count').textContent").startswith(str(len(shown)))
    page.evaluate("document.querySelectorAll('[data-value=\"\"]').forEach(b => b.click())")
    assert page.evaluate(f"{VISIBLE}.length") == first
    assert page.complaints() == []


def test_boxes_lie_on_the_image_at_every_shape(page: Page, run: Path) -> None:
    """The true box's left edge, as drawn, is 30 % into the picture, as drawn."""
    page.open(build_report(run), 390, 844)
    show_all(page)
    offsets = page.evaluate(
        """[...document.querySelectorAll('.shot rect.truth')].map(r => {
            const image = r.closest('figure').querySelector('img');
            const a = image.getBoundingClientRect();
            const scale = Math.min(a.width / image.naturalWidth, a.height / image.naturalHeight);
            const left = a.x + (a.width - scale * image.naturalWidth) / 2;
            return r.getBoundingClientRect().x - left - 0.3 * scale * image.naturalWidth;
        })"""
    )
    assert len(offsets) >= 36
    assert max(map(abs, offsets)) < 2.5  # the stroke is 2.6 wide


def test_another_candidates_box_can_be_shown(page: Page, run: Path) -> None:
    page.open(build_report(run), 1440, 900)
    seen = "getComputedStyle(document.querySelector('.shot[data-task=VG] .candidate')).visibility"
    assert page.evaluate(seen) == "hidden"
    page.evaluate("document.querySelector('.shot[data-task=VG] button.show').click()")
    assert page.evaluate(seen) == "visible"


def test_a_hostile_run_does_nothing(page: Page, run: Path) -> None:
    """Scripts and handlers in ids, answers and names stay text."""
    attack = "\"'><img src=x onerror=window.hit=1><script>window.hit=1</script>"
    lines = (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row |= {"id": attack, "modality": attack, "response": attack, "question": attack}
        row["candidates"][0]["text"] = attack
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "predictions.jsonl").write_text(text, encoding="utf-8")

    page.open(build_report(run), 390, 844)
    page.evaluate("document.querySelectorAll('button').forEach(b => b.click())")
    assert page.evaluate("window.hit") is None
    assert page.complaints() == []
    assert page.evaluate(OVERFLOW) <= 0


def test_absurd_coordinates_wrap(page: Page, run: Path) -> None:
    corner = "(-123456789.5,-123456789.5)"
    answer = f"<|box_start|>{corner},{corner}<|box_end|>"
    lines = (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    text = "".join(json.dumps(json.loads(line) | {"response": answer}) + "\n" for line in lines)
    (run / "predictions.jsonl").write_text(text, encoding="utf-8")

    page.open(build_report(run), 390, 844)
    chips = "[...document.querySelectorAll('.shot .box-text')].filter(c => c.offsetParent)"
    inside = (
        "c => c.getBoundingClientRect().right <= c.closest('.shot').getBoundingClientRect().right"
    )
    assert page.evaluate(f"{chips}.length") > 0
    assert page.evaluate(f"{chips}.every({inside})")
