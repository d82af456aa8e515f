"""The published protocols, faults included, and a strict one beside them."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clinkd.data.boxes import iou, parse_boxes
from clinkd.errors import ConfigError
from clinkd.evaluate.extras import true_boxes
from clinkd.evaluate.text import statistics
from clinkd.evaluate.text.ngram import Array, Statistics

Row = Mapping[str, Any]  # a line of predictions.jsonl
EIGHT = ("ct", "mr", "x", "pet", "endoscopy", "dermoscopy", "fundus", "ultrasound")


@dataclass(frozen=True)
class Protocol:
    """How answers become numbers.

    Attributes:
        average: over which modalities a task's score is the mean: `eight` (missing ones count 0, as
            the published scripts divide), `present`, or `records` (no modalities: micro).
        one_to_one: a predicted box may serve one target only (Hungarian matching).
        least_iou: a hit at IoU above this, or at it with `inclusive`.
        whole_words: ROC counts words, not substrings.
        clean: cut answers as the published post-processing does.
    """

    name: str
    average: str
    one_to_one: bool
    inclusive: bool
    whole_words: bool
    clean: bool
    least_iou: float = 0.5

    @property
    def published(self) -> bool:
        """Whether boxes are read as the published script reads them."""
        return not self.one_to_one


PROTOCOLS = {
    "bird": Protocol("bird", "eight", False, False, False, True),
    "clinkd": Protocol("clinkd", "present", False, False, False, True),
    "strict": Protocol("strict", "records", True, True, True, False),
}
DIFFERENCES = (
    "bird and clinkd: a box is a hit at IoU above 0.5, and one predicted box may serve several "
    "targets; strict: at 0.5 and above, one to one (Hungarian matching).",
    "bird and clinkd: ROC is a hit where every word of the truth is a substring of the answer, so "
    "that 'cleft' holds 'left'; strict: whole words, still anywhere in the answer.",
    "bird: means over eight modalities, missing ones count 0; clinkd: over those present; strict: "
    "over records.",
    "bird and clinkd: of an answer of several lines only the text between the first two newlines "
    "counts.",
    "bird and clinkd: of an answer the text in <box>…</box> counts, else bare (x1,y1),(x2,y2) of "
    "whole numbers without spaces; a box whose corners are reversed hits nothing. The script knows "
    "<box> alone in the true answer and skips the record otherwise; here Qwen2-VL's "
    "<|box_start|>…<|box_end|> is first rewritten to it, in both texts. strict: boxes in every "
    "form that the text has, all read as thousandths of the image (Qwen2.5-VL's are pixels: "
    "--boxes qwen2.5), corners put in order, and the record's own boxes where the true answer has "
    "none.",
    "bird and clinkd: mBMR is the mean of six numbers, BLEU-1…4, METEOR and ROUGE-L. BiRD's own "
    "formula is not published; this is the one of ClinKD's script. The script rounds each to six "
    "digits first, which the two digits shown here do not see.",
)


def protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        ConfigError: unknown.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"unknown protocol {name!r}; expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def clean_response(text: str) -> str:
    """The published post-processing, its cut between newlines included."""
    text = text.split(".<|im_end|>")[0] + "." if ".<|im_end|>" in text else text
    text = text.replace("<|im_end|>\n", "")
    parts = text.split("\n")
    if len(parts) > 2:
        text = parts[1]
    return text.replace("<|endoftext|>", "").strip()


@dataclass(frozen=True)
class Measure:
    """A task's metric on some rows: statistics a row, and a name."""

    name: str
    statistics: Statistics


def grounding(rows: Sequence[Row], rules: Protocol) -> Measure:
    """VG: share of the true boxes that a predicted box hits."""
    counts = np.zeros((len(rows), 2))
    for i, row in enumerate(rows):
        targets = targets_of(row, rules)
        found: Sequence[Any] = (
            published_boxes(row["response"], bare=True)
            if rules.published
            else parse_boxes(row["response"])
        )
        counts[i] = _hits(found, targets, rules), len(targets)
    return Measure("Recall@0.5", Statistics(counts, _share))


def targets_of(row: Row, rules: Protocol) -> Sequence[Any]:
    """The boxes that an answer has to hit."""
    if rules.published:
        return published_boxes(row["annotation"], bare=False)
    return true_boxes(row)


def countable(task: str, rows: Sequence[Row], rules: Protocol) -> list[Row]:
    """The rows that a task's score is made of: for VG those whose truth holds a box."""
    return [row for row in rows if task != "VG" or targets_of(row, rules)]


def uncounted(
    rows: Sequence[Row], counted: Mapping[str, Sequence[Row]], rules: Protocol
) -> list[str]:
    """Plain sentences on rows that enter no score by this protocol; none where all do.

    Args:
        counted: task → what `countable` left of its rows.
    """
    out = []
    without = sum(row["task"] == "VG" for row in rows) - len(counted.get("VG", ()))
    if without:
        out.append(
            f"{without} VG record{'s'[: without > 1]} without a true box that protocol "
            f"{rules.name} reads: not counted."
        )
    if rules.average == "eight":
        names = Counter(
            str(row["modality"])
            for mine in counted.values()
            for row in mine
            if row["modality"] not in EIGHT
        )
        if names:
            shown = ", ".join(f"{name} ({n})" for name, n in sorted(names.items()))
            out.append(
                f"Protocol {rules.name} counts the modalities {', '.join(EIGHT)} only; the records "
                f"of these enter no score: {shown}."
            )
    return out


_QWEN2 = re.compile(r"<\|?box_start\|?>(.*?)<\|?box_end\|?>")
_MARKED = re.compile(r"<box>(.*?)</box>")
_BARE = re.compile(r"\(\d+,\d+\),\(\d+,\d+\)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def in_one_form(text: str) -> str:
    """The text with what Qwen2-VL marks as a box marked as the published script knows it."""
    return _QWEN2.sub(r"<box>\1</box>", text)


def published_boxes(text: str, *, bare: bool) -> list[tuple[float, ...]]:
    """Boxes as the published script finds them; one it cannot read is kept, and hits nothing.

    Args:
        bare: where no box is marked, take `(x1,y1),(x2,y2)`, as the script does for answers.
    """
    found = _MARKED.findall(in_one_form(text))
    if not found and bare:
        found = _BARE.findall(text)
    numbers = [tuple(float(n) for n in _NUMBER.findall(box)) for box in found]
    return [box if len(box) == 4 else (0.0, 0.0, 0.0, 0.0) for box in numbers]


def _hits(found: Sequence[Any], targets: Sequence[Any], rules: Protocol) -> int:
    if not found or not targets:
        return 0
    overlaps = np.array([[_overlap(target, box) for box in found] for target in targets])
    hit = overlaps >= rules.least_iou if rules.inclusive else overlaps > rules.least_iou
    if not rules.one_to_one:
        return int(hit.any(axis=1).sum())
    from scipy.optimize import linear_sum_assignment

    a, b = linear_sum_assignment(hit.astype(float), maximize=True)
    return int(hit[a, b].sum())


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU; 0 where either is empty or reversed."""
    whole = all(box[0] < box[2] and box[1] < box[3] for box in (a, b))
    return iou(a, b) if whole else 0.0


def _share(sums: Array) -> Array:
    out: Array = sums[..., 0] / np.maximum(sums[..., 1], 1e-12)
    return out


def naming(rows: Sequence[Row], rules: Protocol) -> Measure:
    """ROC: share of the answers that hold every word of the truth."""
    hits = np.ones((len(rows), 2))
    for i, row in enumerate(rows):
        answer = row["response"].lower()
        if rules.whole_words:
            words = set(re.findall(r"\w+", answer))
            hits[i, 0] = all(
                word in words for word in re.findall(r"\w+", row["annotation"].lower())
            )
        else:
            hits[i, 0] = all(word in answer for word in row["annotation"].lower().split(" "))
    return Measure("Recall", Statistics(hits, _share))


def describing(rows: Sequence[Row], spice: bool) -> Measure:
    """RC: SPICE where its jar runs, else scene-graph F1 under its own name."""
    name = "spice" if spice else "scene_graph_f1"
    found = statistics([r["response"] for r in rows], [[r["annotation"]] for r in rows], [name])
    return Measure("SPICE" if spice else "scene-graph F1", found[name])


def summarising(rows: Sequence[Row], meteor: str) -> Measure:
    """MIA: mBMR, the mean of BLEU-1…4, METEOR and ROUGE-L."""
    found = statistics(
        [r["response"] for r in rows],
        [[r["annotation"]] for r in rows],
        ["bleu", meteor, "rouge_l"],
    )
    parts = list(found.values())
    edges = np.cumsum([0] + [part.rows.shape[1] for part in parts])

    def finish(sums: Array) -> Array:
        values = [
            part.finish(sums[..., a:b])
            for part, a, b in zip(parts, edges[:-1], edges[1:], strict=True)
        ]
        out: Array = np.mean(values, axis=0)
        return out

    label = "mBMR" if meteor == "meteor" else "mBMR (meteor-py)"
    return Measure(label, Statistics(np.concatenate([p.rows for p in parts], axis=1), finish))


def measure(task: str, rows: Sequence[Row], rules: Protocol, meteor: str, spice: bool) -> Measure:
    """The metric of a task."""
    if rules.clean:
        rows = [{**row, "response": clean_response(row["response"])} for row in rows]
    by_task: dict[str, Callable[[], Measure]] = {
        "VG": lambda: grounding(rows, rules),
        "ROC": lambda: naming(rows, rules),
        "RC": lambda: describing(rows, spice),
        "MIA": lambda: summarising(rows, meteor),
    }
    return by_task[task]()
