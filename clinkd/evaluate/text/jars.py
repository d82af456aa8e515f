"""METEOR 1.5 and SPICE through their jars, which pycocoevalcap brings; Java is needed."""

import atexit
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from threading import Lock
from typing import IO

import numpy as np

from clinkd.errors import SetupError
from clinkd.evaluate.text.fetch import SPICE_JARS, spice_folder
from clinkd.evaluate.text.ngram import Array, Statistics, Tokens, mean_statistics

# METEOR 1.5's values for English; `_finish` repeats its scorer on the statistics of its matcher
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MATCHERS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
FIELDS = 23
_OPENED = ("java.base/java.lang", "java.base/java.util", "java.base/java.math", "java.base/java.io")


def package_folder() -> Path:
    """Where pycocoevalcap lies.

    Raises:
        SetupError: it, or Java, is not installed.
    """
    found = find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise SetupError("METEOR and SPICE need pycocoevalcap: pip install 'clinkd[eval]'")
    if which("java") is None:
        raise SetupError(
            "METEOR and SPICE need Java: install one, as default-jre-headless of Debian; or take "
            "meteor_py and scene_graph_f1, which do without"
        )
    return Path(next(iter(found.submodule_search_locations)))


class Meteor:
    """One running METEOR; its start takes seconds, so that `shared_meteor` keeps one a process."""

    def __init__(self, memory_mib: int = 2048) -> None:
        jar = package_folder() / "meteor" / "meteor-1.5.jar"
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  open while Java runs
        command = ["java", f"-Xmx{memory_mib}M", "-Dfile.encoding=UTF-8", "-Duser.language=en"]
        command += ["-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        self._lock = Lock()

    def statistics(self, hypothesis: str, references: Sequence[str]) -> list[float]:
        """What the matcher counts for a hypothesis and the best of its references, 23 numbers.

        Raises:
            SetupError: Java ended or answered something else.
        """
        texts = [" ".join(text.replace("|||", "").split()) for text in (*references, hypothesis)]
        with self._lock:
            try:
                source, answers = self._pipes()
                source.write(" ||| ".join(["SCORE", *texts]) + "\n")
                source.flush()
                line = answers.readline()
            except OSError:
                line = ""
        fields = line.split()
        if len(fields) != FIELDS:
            self._errors.seek(0)
            said = self._errors.read()[-500:] or line
            raise SetupError(f"METEOR's jar gave no statistics; it said: {said!r}")
        return [float(field) for field in fields]

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        if self._process.stdin is None or self._process.stdout is None:
            raise OSError("closed")
        return self._process.stdin, self._process.stdout

    def close(self) -> None:
        """End Java."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:  # what was left to write no longer matters
                    continue


@lru_cache(maxsize=1)
def shared_meteor() -> Meteor:
    """The METEOR of this process, started at the first call."""
    running = Meteor()
    atexit.register(running.close)
    return running


def meteor(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Statistics:
    """METEOR 1.5 over a corpus: its statistics are summed, then scored."""
    running = shared_meteor()
    rows = np.zeros((len(hypotheses), FIELDS))
    for i, (hypothesis, refs) in enumerate(zip(hypotheses, references, strict=True)):
        rows[i] = running.statistics(" ".join(hypothesis), [" ".join(ref) for ref in refs])
    whole = (rows[:, 21] == rows[:, 0]) & (rows[:, 22] == rows[:, 1]) & (rows[:, 20] == 1)
    rows[whole, 20] = 0  # an answer matched whole and in order is not fragmented at all
    return Statistics(rows, _finish)


def _finish(sums: Array) -> Array:
    """METEOR of summed statistics (Denkowski & Lavie 2014, equations 1 to 4)."""
    words, function_words = sums[..., 0:2], sums[..., 2:4]  # of the hypothesis, of the reference
    content = np.stack([sums[..., 4 + side : 20 : 4] for side in (0, 1)], axis=-2)
    function = np.stack([sums[..., 6 + side : 20 : 4] for side in (0, 1)], axis=-2)
    matched = ((DELTA * content + (1 - DELTA) * function) * MATCHERS).sum(axis=-1)
    total = DELTA * (words - function_words) + (1 - DELTA) * function_words
    precision, recall = np.moveaxis(matched / np.maximum(total, 1e-12), -1, 0)
    mean = precision * recall / np.maximum(ALPHA * precision + (1 - ALPHA) * recall, 1e-12)
    chunks, in_hypothesis, in_reference = sums[..., 20], sums[..., 21], sums[..., 22]
    per_match = chunks / np.maximum((in_hypothesis + in_reference) / 2, 1e-12)
    out: Array = mean * (1 - GAMMA * per_match**BETA)
    return out


def require_spice() -> tuple[Path, Path]:
    """The folders of SPICE's jar and of the Stanford parser.

    Raises:
        SetupError: Java, pycocoevalcap or the parser is not there.
    """
    package = package_folder() / "spice"
    parser = spice_folder()
    missing = [name for name in SPICE_JARS if not (parser / name).is_file()]
    if missing:
        raise SetupError(
            f"SPICE needs {' and '.join(missing)} in {parser}: get Stanford CoreNLP 3.6.0 "
            "(stanford-corenlp-full-2015-12-09.zip) and run "
            "`clinkd metrics fetch spice --from FILE --sha256 …`; scene_graph_f1 does without"
        )
    return package, parser


def spice(
    hypotheses: Sequence[Tokens],
    references: Sequence[Sequence[Tokens]],
    memory_mib: int = 4096,
) -> Statistics:
    """SPICE (Anderson et al. 2016) through its jar, mean over records.

    Raises:
        SetupError: Java, pycocoevalcap or the Stanford parser is not there, or Java failed.
    """
    package, parser = require_spice()
    jars = [package / "spice-1.0.jar", *sorted((package / "lib").glob("*.jar"))]
    jars += [parser / name for name in SPICE_JARS]
    opened = [f"--add-opens={name}=ALL-UNNAMED" for name in _OPENED] if java_version() > 8 else []
    with tempfile.TemporaryDirectory(prefix="clinkd-spice-") as scratch:
        source, target = Path(scratch, "in.json"), Path(scratch, "out.json")
        pairs = zip(hypotheses, references, strict=True)
        rows = [
            {"image_id": i, "test": " ".join(text), "refs": [" ".join(ref) for ref in refs]}
            for i, (text, refs) in enumerate(pairs)
        ]
        source.write_text(json.dumps(rows), encoding="utf-8")
        command = ["java", f"-Xmx{memory_mib}M", *opened, "-cp", os.pathsep.join(map(str, jars))]
        command += ["edu.anu.spice.SpiceScorer", str(source), "-out", str(target), "-silent"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode or not target.is_file():
            raise SetupError(f"SPICE's jar failed: {(done.stderr or done.stdout)[-800:]}")
        found = json.loads(target.read_text(encoding="utf-8"))
    values = {int(item["image_id"]): item["scores"]["All"]["f"] for item in found}
    return mean_statistics([float(values[i] or 0.0) for i in range(len(rows))])


@lru_cache(maxsize=1)
def java_version() -> int:
    """Java's major version: 8, 11, 17 …"""
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    words = said.split('"')
    parts = words[1].replace("-", ".").replace("_", ".").split(".") if len(words) > 1 else ["0"]
    return int(parts[1] if parts[0] == "1" and len(parts) > 1 else parts[0])
