"""Correction by a language model behind an OpenAI-compatible endpoint."""

import base64
import hashlib
import io
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from clinkd.errors import ClinkdError, ConfigError, SetupError
from clinkd.train.correction.settings import CorrectorSettings
from clinkd.train.correctors import Case, Progress, Reply, prompt
from clinkd.train.correctors.cache import ReplyCache, StoredReply, reply_key
from clinkd.train.correctors.client import ChatClient
from clinkd.train.correctors.limits import BudgetUsedUp, Spending
from clinkd.train.correctors.wire import CallFailed, estimate_tokens


class DryRun(ClinkdError):
    """What the calls would cost; nothing was sent."""

    exit_code = 0


class EndpointCorrector:
    """One call for each different case, at most once in the life of its cache.

    What is sent: task, question, the student's answer and the truth, boxes replaced by marks; the
    images only with `send_images`, as fresh PNG files without any of their notes. Never ids, file
    names or anything else of a record.

    Args:
        cache: file of replies.
        data_root: folder of the images; needed for `send_images`.
        client: exchanged by tests.

    Raises:
        ConfigError: images are to be sent, and nobody says where they are.
        SetupError: the variable that should hold the key is not set.
    """

    def __init__(
        self,
        settings: CorrectorSettings,
        *,
        cache: Path,
        data_root: str | Path | None = None,
        client: type[ChatClient] | partial[ChatClient] = ChatClient,
    ) -> None:
        if settings.send_images and data_root is None:
            raise ConfigError("send_images needs the folder of the images")
        self._settings, self._cache_path, self._data_root = settings, cache, data_root
        self._make_client = client
        self._key = None if settings.offline or settings.dry_run else read_key(settings.key_env)
        self._spent = Spending()
        self._asked = self._stored = 0
        host = urlsplit(settings.url or "").netloc
        self.name = f"{settings.model}@{host}, prompt {prompt.VERSION}"

    def summary(self) -> str:
        """What the work has cost, in a few words."""
        cost = self._spent.cost(self._settings)
        money = f", cost {cost:.2f}" if cost else ""
        return (
            f"{self._asked} replies asked for, {self._stored} from the cache; "
            f"{self._spent.calls} calls and {self._spent.tokens:,} tokens in all{money}"
        )

    def correct(self, cases: Sequence[Case], progress: Progress | None = None) -> list[Reply]:
        """A reply for each case.

        Raises:
            DryRun: instead of any call, where that is what the settings ask for.
            SetupError: key, quota or address refused, or nothing but failures; replies so far are
                in the cache.
        """
        settings = self._settings
        # as the model sees them: calls under way at once must not be for one and the same
        seen = [
            replace(case, id="", images=case.images if settings.send_images else ())
            for case in cases
        ]
        different = [*dict.fromkeys(seen)]
        if settings.dry_run and not self._cache_path.exists():
            raise DryRun(self._estimate(different, None))
        with ReplyCache(self._cache_path, read_only=settings.offline or settings.dry_run) as cache:
            if settings.dry_run:
                raise DryRun(self._estimate(different, cache))
            work = _Work(settings, cache, self._data_root, self._key, self._make_client)
            try:
                replies = work.run(different, progress)
            finally:
                self._spent = cache.spent
                self._asked += work.asked
                self._stored += work.stored
        return [replies[case] for case in seen]

    def _estimate(self, cases: Sequence[Case], cache: ReplyCache | None) -> str:
        """One sentence on what is still to pay, at most."""
        settings = self._settings
        most = Spending()
        for case in cases:
            images = _images(case, settings, self._data_root)
            if cache is None or cache.get(_name(case, images, settings)) is None:
                sent = estimate_tokens(prompt.messages(case, images=images))
                most += Spending(1, sent, settings.max_tokens)
        prices = settings.input_price or settings.output_price
        money = f"at most {most.cost(settings):.2f}" if prices else "prices are not set"
        return (
            f"dry run: {most.calls:,} of {len(cases):,} replies are to be paid for: about "
            f"{most.sent:,} tokens sent, at most {most.received:,} received; cost {money}. Nothing "
            "was sent; go on with dry_run=false"
        )


class _Work:
    """The calls for one list of cases."""

    def __init__(
        self,
        settings: CorrectorSettings,
        cache: ReplyCache,
        data_root: str | Path | None,
        key: str | None,
        make_client: type[ChatClient] | partial[ChatClient],
    ) -> None:
        self._settings, self._cache, self._data_root = settings, cache, data_root
        self._client = make_client(settings, key, spent=cache.spent, on_loss=cache.lose)
        self._lock = threading.Lock()
        self.asked = self.stored = 0

    def run(self, cases: Sequence[Case], progress: Progress | None) -> dict[Case, Reply]:
        """Replies by case; an error that ends the work is raised when no call is under way."""
        replies: dict[Case, Reply] = {}
        with ThreadPoolExecutor(self._settings.concurrency, "correct") as pool:
            futures = {pool.submit(self._reply, case): case for case in cases}
            try:
                for done in as_completed(futures):
                    replies[futures[done]] = done.result()
                    if progress is not None:
                        progress(len(replies), len(cases), "correcting")
            except BaseException:  # an interrupt as well: let no thread start another call
                self._client.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return replies

    def _reply(self, case: Case) -> Reply:
        images = _images(case, self._settings, self._data_root)
        name = _name(case, images, self._settings)
        stored = self._cache.get(name)
        with self._lock:
            self.asked += 1
            self.stored += stored is not None
        if stored is None:
            if self._settings.offline:
                return Reply(None, "no reply in the cache, and offline")
            try:
                got = self._client.complete(prompt.messages(case, images=images))
            except (CallFailed, BudgetUsedUp) as error:
                return Reply(None, str(error))
            stored = StoredReply(got.text, got.finish, got.model, got.paid)
            self._cache.put(name, stored)
        if stored.finish == "length":
            return Reply(None, f"the reply was cut off after {self._settings.max_tokens} tokens")
        if stored.finish in ("content_filter", "refusal"):
            return Reply(None, f"the model refused ({stored.finish})")
        return prompt.read_reply(stored.text, case)


def read_key(variable: str | None) -> str | None:
    """What an environment variable holds; None where no variable is named.

    Raises:
        SetupError: it is not set, or holds no key.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise SetupError(f"the environment variable {variable} (key_env) is not set or empty")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise SetupError(f"what {variable} (key_env) holds is no key: it has spaces or odd signs")
    return key


def _name(case: Case, images: Sequence[str], settings: CorrectorSettings) -> str:
    """The key of a case's reply: what the model sees, and how it is asked."""
    return reply_key(
        prompt=prompt.VERSION,
        model=settings.model,
        task=case.task,
        question=case.question,
        answer=case.answer,
        truth=case.truth,
        images=[hashlib.sha256(url.encode()).hexdigest() for url in images],
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        json_mode=settings.json_mode,
        parameters=settings.parameters,
    )


def _images(
    case: Case, settings: CorrectorSettings, data_root: str | Path | None
) -> tuple[str, ...]:
    """A case's images as data URLs, if they may be sent: pixels only, shrunk."""
    if not settings.send_images or data_root is None:
        return ()
    from clinkd.data.images import load_image

    urls = []
    for name in case.images:
        image = load_image(data_root, name)
        image.thumbnail((settings.image_side, settings.image_side))
        image.info.clear()
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        urls.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return tuple(urls)
