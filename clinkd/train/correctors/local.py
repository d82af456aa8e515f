"""Correction by a text model on this machine, loaded through transformers."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clinkd.data.files import sha256_file
from clinkd.errors import SetupError
from clinkd.train.correction.settings import CorrectorSettings
from clinkd.train.correctors import Case, Progress, Reply, prompt
from clinkd.train.correctors.cache import ReplyCache, StoredReply, reply_key

_GGUF = ".gguf"


class LocalCorrector:
    """Greedy replies of a causal language model; code that comes with a checkpoint is never run.

    The model is loaded when a reply is missing in the cache, and not before.

    Args:
        settings: `model` is a folder in the Hugging Face format, or a .gguf file (weights are then
            unpacked to full precision).
        cache: file of replies, so that an interrupted round goes on where it was.

    Raises:
        SetupError: there is no such model, or `gguf` is missing for a .gguf file.
    """

    def __init__(self, settings: CorrectorSettings, *, cache: Path) -> None:
        assert settings.model is not None
        self._settings, self._cache_path = settings, cache
        self._path = Path(settings.model)
        self._model: Any = None
        self._tokenizer: Any = None
        is_gguf = self._path.suffix == _GGUF
        if not (self._path.is_file() if is_gguf else (self._path / "config.json").is_file()):
            raise SetupError(
                f"{settings.model} holds no text model: give a folder with config.json, or a .gguf "
                "file"
            )
        if is_gguf and find_spec("gguf") is None:
            raise SetupError(f"{settings.model} needs the package gguf: pip install gguf")
        self.name = f"local:{self._path.name}, prompt {prompt.VERSION}"
        self._written = self._stored = 0

    def summary(self) -> str:
        return f"{self._written} replies written, {self._stored} from the cache"

    @cached_property
    def _identity(self) -> list[tuple[str, str]]:
        """By content: a model that is trained on keeps its name and its size."""
        files = [self._path] if self._path.suffix == _GGUF else sorted(self._path.iterdir())
        return [(file.name, sha256_file(file)) for file in files if file.is_file()]

    def correct(self, cases: Sequence[Case], progress: Progress | None = None) -> list[Reply]:
        """A reply for each case; different cases of like length go through the model together."""
        names = {case: self._name(case) for case in cases}
        with ReplyCache(self._cache_path) as cache:
            missing = {names[c]: c for c in cases if cache.get(names[c]) is None}
            self._stored += len(set(names.values())) - len(missing)
            # longest first, so that too little memory shows at once
            todo = sorted(missing, key=lambda name: (-_size(missing[name]), name))
            for start in range(0, len(todo), self._settings.batch_size):
                batch = todo[start : start + self._settings.batch_size]
                replies = self._generate([missing[name] for name in batch])
                for name, reply in zip(batch, replies, strict=True):
                    cache.put(name, reply)
                self._written += len(batch)
                if progress is not None:
                    progress(start + len(batch), len(todo), "correcting")
            stored = [cache.get(names[case]) for case in cases]
        return [self._read(s, c) for s, c in zip(stored, cases, strict=True) if s is not None]

    def _name(self, case: Case) -> str:
        return reply_key(
            prompt=prompt.VERSION,
            model=self._identity,
            case=[case.task, case.question, case.answer, case.truth],
            max_tokens=self._settings.max_tokens,
        )

    def _read(self, stored: StoredReply, case: Case) -> Reply:
        if stored.finish == "length":
            return Reply(None, f"the reply was cut off after {self._settings.max_tokens} tokens")
        return prompt.read_reply(stored.text, case, "text")

    def _generate(self, cases: Sequence[Case]) -> list[StoredReply]:
        import torch

        self._load()
        texts = [self._render(prompt.messages(replace(case, images=()), "text")) for case in cases]
        inputs = self._tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=False
        ).to(self._model.device)  # [B, S], padded on the left
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self._settings.max_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        new = output[:, inputs["input_ids"].shape[1] :].tolist()  # [B, replies]
        return [self._reply(row) for row in new]

    def _reply(self, tokens: list[int]) -> StoredReply:
        ends = self._model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends, self._tokenizer.eos_token_id}
        stopped = any(token in ends for token in tokens)
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return StoredReply(text, "stop" if stopped else "length", self._path.name)

    def _render(self, messages: list[Any]) -> str:
        """The prompt as text, by the model's own chat template where it has one."""
        from jinja2 import TemplateError

        joined = "\n\n".join(message["content"] for message in messages)
        if not self._tokenizer.chat_template:
            return f"{joined} "
        try:
            return str(self._template(messages))
        except TemplateError:  # some templates know no system role
            return str(self._template([{"role": "user", "content": joined}]))

    def _template(self, messages: list[Any]) -> Any:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def _load(self) -> None:
        if self._model is not None:
            return
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        is_gguf = self._path.suffix == _GGUF
        folder = self._path.parent if is_gguf else self._path
        more: dict[str, Any] = {"gguf_file": self._path.name} if is_gguf else {}
        on_gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if on_gpu else torch.float32
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **more)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise SetupError(f"text model {self._path} cannot be loaded: {error}") from None
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer, self._model = tokenizer, model.eval().to("cuda" if on_gpu else "cpu")


def _size(case: Case) -> int:
    return len(case.question) + len(case.answer) + len(case.truth)
