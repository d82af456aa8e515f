"""How many tokens records take, known before any of their images is decoded."""

from functools import lru_cache

from clinkd.data.collate import AnswerDataset
from clinkd.data.prompt import chat_messages
from clinkd.data.records import Record
from clinkd.errors import DataError

NFC_GROWTH = 3  # normalising makes UTF-8 text at most three times as long


class FitCheck:
    """Whether records can be encoded.

    A byte-level tokenizer makes at most a token of each byte; only records that this bound leaves
    in doubt are encoded.
    """

    def __init__(self, dataset: AnswerDataset) -> None:
        self._dataset = dataset
        self._frame = lru_cache(maxsize=1024)(self._frame_of)

    def require(self, record: Record) -> None:
        """Make sure that it can.

        Raises:
            DataError: it has over `max_length` tokens, image tokens in its text, which would not
                match its images, boxes that the model cannot write, or turns that its chat
                template would change; it is named.
        """
        self._dataset.require_plain(record)
        texts = self._dataset.texts(record) + ([record.system] if record.system else [])
        most = sum(len(t) if t.isascii() else NFC_GROWTH * len(t.encode()) for t in texts)
        shape = (len(record.conversations), len(record.images), record.system is not None)
        try:
            most += self._frame(*shape) + sum(self._dataset.image_tokens(record))
        except DataError:
            most = self._dataset.max_length + 1  # encoding names the record
        if most > self._dataset.max_length:
            self._dataset.length(record)

    def why_not(self, record: Record) -> str | None:
        """Why it cannot be encoded; None where it can."""
        try:
            self.require(record)
        except DataError as error:
            return str(error)
        return None

    def _frame_of(self, turns: int, images: int, system: bool) -> int:
        """Bytes that the chat template puts around texts; an image token counts as one more."""
        chat = chat_messages(["x"] * turns, images, "x" if system else None)
        return sum(len(part.encode()) for pair in self._dataset.pieces("", chat) for part in pair)


def require_fit(dataset: AnswerDataset) -> None:
    """Make sure that every record can be encoded, before the first training step.

    Raises:
        DataError: see `FitCheck.require`.
    """
    check = FitCheck(dataset)
    for record in dataset.records:
        check.require(record)
