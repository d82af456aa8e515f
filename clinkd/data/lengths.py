"""How many tokens records take, known before any of their images is decoded."""

from functools import lru_cache

from clinkd.data.collate import AnswerDataset
from clinkd.data.prompt import messages

NFC_GROWTH = 3  # normalising makes UTF-8 text at most three times as long


def require_fit(dataset: AnswerDataset) -> None:
    """Make sure that every record can be encoded, before the first training step.

    A byte-level tokenizer makes at most a token of each byte; only records that this bound leaves
    in doubt are encoded.

    Raises:
        DataError: a record of over `max_length` tokens, or with image tokens in its text, which
            would not match its images; it is named.
    """

    @lru_cache(maxsize=1024)
    def frame(turns: int, images: int) -> int:
        """Bytes that the chat template puts around texts; an image token counts as one more."""
        chat = messages("", images)
        for index in range(1, turns):
            role = ("user", "assistant")[index % 2]
            chat.append({"role": role, "content": [{"type": "text", "text": ""}]})
        return len(dataset.render(chat, prompt=False).encode())

    for index, record in enumerate(dataset.records):
        dataset.require_plain(record)
        texts = [turn.value for turn in record.conversations]
        most = sum(len(t) if t.isascii() else NFC_GROWTH * len(t.encode()) for t in texts)
        most += frame(len(texts), len(record.images)) + sum(dataset.image_tokens(record))
        if most > dataset.max_length:
            dataset.length(index)
