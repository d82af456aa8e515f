"""Text metrics: against pycocoevalcap, by hand, and their properties."""

import hashlib
import json
import subprocess
import zipfile
from importlib.resources import files
from pathlib import Path
from shutil import which

import numpy as np
import pytest

from clinkd.errors import ConfigError, DataError, SetupError
from clinkd.evaluate.text import fetch, score, statistics
from clinkd.evaluate.text.tokenize import tokenize

needs_java = pytest.mark.skipif(which("java") is None, reason="needs Java")
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
HYPOTHESES = [
    "A high density lesion is present in the left lung.",
    "The image shows an enlarged liver.",
    "It's family friendly, Alimentum (cheap).",
]
REFERENCES = [
    ["There is a lesion located in the left lung, which appears as a high-density area."],
    ["The image shows an enlarged liver."],
    ["Alimentum is not family-friendly."],
]


@pytest.fixture(scope="session")
def captions():
    """COCO's validation captions, by image, out of SPICE's jar."""
    package = pytest.importorskip("pycocoevalcap")
    jar = Path(next(iter(package.__path__))) / "spice" / "spice-1.0.jar"
    with zipfile.ZipFile(jar) as archive:
        rows = json.loads(archive.read("coco/annotations/captions_val2014.json"))["annotations"]
    by_image = {}
    for row in rows:
        by_image.setdefault(row["image_id"], []).append(" ".join(row["caption"].split()))
    return [by_image[image] for image in sorted(by_image)]


def sample_texts():
    path = Path(str(files("clinkd"))) / "data" / "sample" / "train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [" ".join(t["value"].split()) for x in lines for t in json.loads(x)["conversations"]]


def stanford(texts, folder):
    package = Path(next(iter(pytest.importorskip("pycocoevalcap").__path__)))
    source = folder / "texts.txt"
    source.write_text("\n".join(texts), encoding="utf-8")
    command = ["java", "-Dfile.encoding=UTF-8", "-cp"]
    command += [str(package / "tokenizer" / "stanford-corenlp-3.4.1.jar")]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    done = subprocess.run(
        [*command, str(source)], capture_output=True, encoding="utf-8", check=True
    )
    lines = done.stdout.split("\n")[: len(texts)]
    return [[w for w in line.split(" ") if w and w not in PUNCTUATION] for line in lines]


@pytest.mark.slow
@needs_java
def test_tokens_are_stanfords(captions, tmp_path):
    coco = [text for texts in captions[:4000] for text in texts]
    wanted = stanford(coco, tmp_path)
    wrong = sum(tokenize(text) != want for text, want in zip(coco, wanted, strict=True))
    assert wrong <= 2e-4 * len(coco)
    sample = sample_texts()
    assert [tokenize(text) for text in sample] == stanford(sample, tmp_path)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The patient's x-ray isn't clear.", "the patient 's x-ray is n't clear"),
        ("T2-weighted, 3.5cm (5 mm) at 50%!", "t2-weighted 3.5 cm -lrb- 5 mm -rrb- at 50 %"),
        ("Dr. Smith cannot see <image> vs. CT", "dr. smith can not see <image> vs. ct"),
        ("", ""),
    ],
)
def test_tokens_by_hand(text, tokens):
    assert tokenize(text) == tokens.split()


@pytest.mark.slow
def test_bleu_rouge_and_cider_are_pycocoevalcaps(captions):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses = [texts[0] for texts in captions[:1500]]
    hypotheses[7] = ""
    references = [texts[1 : 2 + i % 4] for i, texts in enumerate(captions[:1500])]
    answers = {i: [" ".join(tokenize(text))] for i, text in enumerate(hypotheses)}
    truth = {i: [" ".join(tokenize(t)) for t in texts] for i, texts in enumerate(references)}
    ours = score(hypotheses, references, ["bleu", "rouge_l", "cider"])
    bleu = Bleu(4).compute_score(truth, answers, verbose=0)[0]
    assert [ours[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(bleu, abs=1e-6)
    assert ours["rouge_l"] == pytest.approx(Rouge().compute_score(truth, answers)[0], abs=1e-6)
    assert ours["cider"] == pytest.approx(Cider().compute_score(truth, answers)[0], abs=1e-6)


def test_three_records_score_as_pycocoevalcap_scored_them():
    ours = score(HYPOTHESES, REFERENCES, ["bleu", "rouge_l"])
    bleu = [ours[f"bleu_{n}"] for n in (1, 2, 3, 4)]
    assert bleu == pytest.approx([0.559527, 0.452166, 0.402834, 0.359595], abs=1e-6)
    assert ours["rouge_l"] == pytest.approx(0.546872, abs=1e-6)


@pytest.mark.slow
@needs_java
def test_meteor_is_the_jars_per_record_and_over_the_corpus(captions):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.meteor.meteor import Meteor

    hypotheses = [*HYPOTHESES, *(texts[0] for texts in captions[:150]), ""]
    references = [*REFERENCES, *(texts[1:] for texts in captions[:150]), ["a liver"]]
    answers = {i: [" ".join(tokenize(text))] for i, text in enumerate(hypotheses)}
    truth = {i: [" ".join(tokenize(t)) for t in texts] for i, texts in enumerate(references)}
    running = Meteor()
    corpus, each = running.compute_score(truth, answers)
    for stream in (running.meteor_p.stdout, running.meteor_p.stderr):
        stream.close()
    found = statistics(hypotheses, references, ["meteor"])["meteor"]
    assert found.score() == pytest.approx(corpus, abs=1e-9)
    assert found.finish(found.rows) == pytest.approx(np.array(each), abs=1e-9)
    assert each[:3] == pytest.approx([0.305140, 1.0, 0.337867], abs=1e-6)


@pytest.mark.parametrize("metric", ["bleu", "rouge_l", "meteor_py", "scene_graph_f1"])
def test_identical_is_one_and_empty_is_zero(metric):
    truth = [["The left kidney is large and bright."], ["A round lesion lies in the right lung."]]
    same = score([texts[0] for texts in truth], truth, [metric])
    assert all(value == pytest.approx(1.0, abs=1e-6) for value in same.values())
    empty = score(["", ""], truth, [metric])
    assert all(value == pytest.approx(0.0, abs=1e-6) for value in empty.values())


def test_scene_graphs_tell_matched_from_mismatched():
    matched = score(["The large left kidney"], [["A left kidney, large"]], ["scene_graph_f1"])
    other = score(["The large left kidney"], [["A bright lesion in the lung"]], ["scene_graph_f1"])
    assert matched["scene_graph_f1"] > 0.5 > other["scene_graph_f1"]


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="unknown metric 'blue'"):
        score(["a"], [["a"]], ["blue"])
    with pytest.raises(ValueError, match="2 hypotheses for 1"):
        score(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="at least one reference"):
        score(["a"], [[]])


@needs_java
def test_spice_says_what_is_missing(tmp_path, monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("CLINKD_CACHE", str(tmp_path))
    with pytest.raises(SetupError, match=r"stanford-corenlp-3.6.0-models.jar.*metrics fetch spice"):
        score(["a"], [["a"]], ["spice"])


def test_fetch_checks_the_sum_and_takes_both_jars(tmp_path, monkeypatch):
    monkeypatch.setenv("CLINKD_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "corenlp.zip"
    with zipfile.ZipFile(source, "w") as archive:
        for name in fetch.SPICE_JARS:
            archive.writestr(f"stanford-corenlp-full/{name}", name)
    good = hashlib.sha256(source.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match="64 hexadecimal"):
        fetch.fetch_spice(source, "abc")
    with pytest.raises(DataError, match="nothing was taken"):
        fetch.fetch_spice(source, "0" * 64)
    assert not fetch.spice_folder().exists()
    taken = fetch.fetch_spice(source, good)
    assert [path.read_text(encoding="utf-8") for path in taken] == list(fetch.SPICE_JARS)
