"""CLIP models that judge how well a text fits an image."""

import hashlib
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from clinkd.data.boxes import strip_boxes
from clinkd.data.images import to_rgb
from clinkd.errors import ConfigError
from clinkd.models.weights import require_weights

KEPT_IMAGES = 64  # vectors of the last images: questions of one image follow each other
# what unreadable weights raise, such as the pointers that Git LFS leaves in their place
_UNREADABLE = (
    RuntimeError,
    ValueError,
    OSError,
    KeyError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class ClipScorer:
    """Cosine between an image and texts, by an open_clip or a transformers CLIP or SigLIP model.

    Boxes and markup are taken out of the texts first. A text longer than the model's window is
    scored sentence by sentence, a longer sentence half by half, and the mean taken: see `parts`.
    """

    def __init__(self, backend: "_OpenClip | _Transformers") -> None:
        self.backend = backend
        self._images: OrderedDict[bytes, Tensor] = OrderedDict()

    @classmethod
    def load(cls, name: str, device: str | torch.device = "cpu") -> "ClipScorer":
        """Load a scorer.

        Args:
            name: `local-dir:FOLDER` or a folder in open_clip's layout (`open_clip_config.json`
                beside the weights, as BiomedCLIP has it), a folder of a transformers CLIP or SigLIP
                model, `hf-hub:OWNER/MODEL`, or an open_clip `ARCHITECTURE/PRETRAINED`.

        Raises:
            ConfigError: nothing of that name, or weights that are missing or unreadable.
        """
        folder = Path(name.removeprefix("local-dir:"))
        if (folder / "open_clip_config.json").is_file():
            return cls(_OpenClip(f"local-dir:{folder}", None, device))
        if (folder / "config.json").is_file():
            return cls(_Transformers(folder, device))
        if name.startswith("local-dir:") or folder.is_dir():
            raise ConfigError(
                f"scorer {name!r}: the folder holds neither open_clip_config.json nor config.json"
            )
        if name.startswith("hf-hub:"):
            return cls(_OpenClip(name, None, device))
        architecture, _, pretrained = name.partition("/")
        if not pretrained:
            raise ConfigError(
                f"scorer {name!r}: write local-dir:FOLDER, hf-hub:OWNER/MODEL or "
                "ARCHITECTURE/PRETRAINED, as in ViT-B-32/openai"
            )
        import open_clip  # a second that only this scorer costs

        if architecture not in open_clip.list_models():
            raise ConfigError(
                f"scorer {name!r}: there is no such folder, and open_clip has no architecture "
                f"{architecture!r}"
            )
        return cls(_OpenClip(architecture, pretrained, device))

    @torch.no_grad()
    def score(self, image: Image.Image, texts: Sequence[str]) -> list[float]:
        """Raw cosine of each text with the image; NaN where the model yields it.

        The image is encoded once, for all its texts and for the next questions about it; all
        distinct sentences go through the text tower in one batch.
        """
        parts = [self.parts(text) for text in texts]
        # beams that differ by a box are one text, which must get one score: rows of a batch may
        # differ in their last bit
        distinct = list(dict.fromkeys(part for each in parts for part in each))
        if not distinct:
            return []
        image_vector = self._image_vector(image)
        text_vectors = torch.nn.functional.normalize(self.backend.texts(distinct).float(), dim=-1)
        cosine = dict(zip(distinct, (text_vectors @ image_vector).tolist(), strict=True))
        means = [sum(cosine[part] for part in each) / len(each) for each in parts]
        return [mean if math.isfinite(mean) else math.nan for mean in means]

    def _image_vector(self, image: Image.Image) -> Tensor:
        """Of unit length; from memory where the same pixels came lately."""
        image = to_rgb(image)  # before the digest: a palette is not among an image's bytes
        digest = hashlib.sha256(f"{image.size}".encode())
        digest.update(image.tobytes())
        key = digest.digest()
        if key not in self._images:
            vector = self.backend.image(image).float()
            self._images[key] = torch.nn.functional.normalize(vector, dim=-1)
            if len(self._images) > KEPT_IMAGES:
                self._images.popitem(last=False)
        self._images.move_to_end(key)
        return self._images[key]

    def parts(self, text: str) -> list[str]:
        """What is scored of a text: all but boxes, sentence by sentence if it is too long."""
        text = strip_boxes(text)
        if self.backend.fits(text):
            return [text]
        sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence] or [text]
        return [part for sentence in sentences for part in self._halves(sentence)]

    def _halves(self, sentence: str) -> list[str]:
        """A sentence in pieces that fit, which the tokenizer would cut off; a word is one piece."""
        words = sentence.split()
        if len(words) < 2 or self.backend.fits(sentence):
            return [sentence]
        middle = len(words) // 2
        return self._halves(" ".join(words[:middle])) + self._halves(" ".join(words[middle:]))


def mean_over_images(
    scorer: ClipScorer, images: Sequence[Image.Image], texts: Sequence[str]
) -> list[float]:
    """Cosine of each text, the mean over a question's images: it is as good as it fits them all."""
    scores = [scorer.score(image, texts) for image in images]
    return [sum(column) / len(column) for column in zip(*scores, strict=True)]


class _OpenClip:
    def __init__(self, name: str, pretrained: str | None, device: str | torch.device) -> None:
        import open_clip  # a second that only this scorer costs

        try:
            # not `create_model_and_transforms`, which makes up weights that it does not find
            model, preprocess = open_clip.create_model_from_pretrained(
                name, pretrained=pretrained, device=device
            )
            self.tokenizer = open_clip.get_tokenizer(name)
        except _UNREADABLE as error:
            given = f"{name}/{pretrained}" if pretrained else name
            raise ConfigError(f"scorer {given!r} cannot be loaded: {error}") from error
        self.model: Any = model.eval()
        self.preprocess: Any = preprocess
        self.device = device

    def fits(self, text: str) -> bool:
        """Whether a longer window would hold nothing but padding beyond this one."""
        context = int(self.tokenizer.context_length)
        beyond = self.tokenizer([text], context_length=4 * context)[0, context:]
        return bool((beyond == beyond[-1]).all())

    def image(self, image: Image.Image) -> Tensor:
        pixels = self.preprocess(image).unsqueeze(0).to(self.device)
        vector: Tensor = self.model.encode_image(pixels)[0]
        return vector

    def texts(self, texts: Sequence[str]) -> Tensor:
        vectors: Tensor = self.model.encode_text(self.tokenizer(list(texts)).to(self.device))
        return vectors


class _Transformers:
    def __init__(self, folder: Path, device: str | torch.device) -> None:
        from transformers import AutoModel, AutoProcessor

        try:
            model, info = AutoModel.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
            self.processor: Any = AutoProcessor.from_pretrained(folder)
        except _UNREADABLE as error:
            raise ConfigError(f"scorer {str(folder)!r} cannot be loaded: {error}") from error
        # Qwen2-VL has the first alone
        if not all(hasattr(model, name) for name in ("get_image_features", "get_text_features")):
            raise ConfigError(
                f"scorer {str(folder)!r}: {type(model).__name__} is no CLIP or SigLIP"
            )
        require_weights(f"scorer {str(folder)!r}", info)
        self.model: Any = model.eval().to(device)
        self.device = device
        self.context = int(self.model.config.text_config.max_position_embeddings)

    def fits(self, text: str) -> bool:
        return len(self.processor.tokenizer(text, verbose=False).input_ids) <= self.context

    def image(self, image: Image.Image) -> Tensor:
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        return _vector(self.model.get_image_features(**inputs))[0]

    def texts(self, texts: Sequence[str]) -> Tensor:
        # SigLIP was trained with texts padded to the window; CLIP masks padding, so it may be too
        inputs = self.processor(
            text=list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
        ).to(self.device)
        return _vector(self.model.get_text_features(**inputs))


def _vector(features: Any) -> Tensor:
    """transformers returns a tensor, or an output that holds it as its pooled state."""
    tensor: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return tensor
