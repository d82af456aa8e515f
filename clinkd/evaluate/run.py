"""metrics.json of a run: every model side by side, trivial baselines beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import which
from typing import Any

from clinkd.data.files import read_jsonl, write_json
from clinkd.data.records import Record
from clinkd.errors import ConfigError
from clinkd.evaluate.baselines import mean_box_rows, most_frequent_rows
from clinkd.evaluate.protocols import DIFFERENCES, protocol
from clinkd.evaluate.score import score_model
from clinkd.evaluate.selected import best_rows, labels, with_candidate
from clinkd.evaluate.text.scene_graph import variant

BASELINES = {"mean_box": "Mean box (no image)", "most_frequent": "Most frequent answer (no image)"}


def evaluate_run(
    run_dir: str | Path,
    *,
    protocol_name: str = "clinkd",
    test_records: Sequence[Record],
    train_records: Sequence[Record],
    meteor: str = "auto",
    spice: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
    rounds: int = 1,
    selection: str = "clip",
) -> dict[str, Any]:
    """Score the predictions of a run folder and write its metrics.json.

    Args:
        rounds, selection: `correct.rounds` and `generate.selection` of the run, for the labels.
        meteor: `jar`, `python`, or `auto`: the jar where Java and pycocoevalcap are there.
        spice: RC by SPICE's jar in place of scene-graph F1.

    Raises:
        SetupError: a metric needs something that is not installed.
    """
    run_dir = Path(run_dir)
    rules = protocol(protocol_name)
    metric = meteor_metric(meteor)

    def scored(rows: Sequence[Mapping[str, Any]], label: str) -> dict[str, Any]:
        return score_model(
            rows,
            rules,
            label=label,
            meteor=metric,
            spice=spice,
            bootstrap=bootstrap,
            seed=seed,
        )

    final = list(read_jsonl(run_dir / "predictions.jsonl"))
    named = labels(rounds, selection)
    models = {
        name: scored(list(read_jsonl(run_dir / "predictions" / f"{name}.jsonl")), named[name])
        for name in ("base", "teacher", "distilled")
    }
    models["corrected"] = scored([with_candidate(row, 0) for row in final], named["corrected"])
    models["sasg"] = scored(final, named["sasg"])
    best = best_rows(final, rules, meteor=metric, spice=spice)
    oracle = scored(best, "Best candidate (oracle)")
    baselines = {
        "mean_box": scored(mean_box_rows(train_records, test_records), BASELINES["mean_box"]),
        "most_frequent": scored(
            most_frequent_rows(train_records, test_records), BASELINES["most_frequent"]
        ),
    }
    metrics = {
        "protocol": rules.name,
        "settings": {
            "meteor": metric,
            "scene_graph": variant(),
            "bootstrap": bootstrap,
            "correction_rounds": rounds,
            "selection": selection,
            "differences": list(DIFFERENCES),
        },
        "models": models,
        "baselines": baselines,
        "selection": _selection(models, oracle),
        "verdicts": verdicts(models, baselines, oracle, selection),
    }
    write_json(run_dir / "metrics.json", metrics)
    return metrics


def meteor_metric(choice: str) -> str:
    """`meteor` (the jar) or `meteor_py`."""
    if choice not in ("auto", "jar", "python"):
        raise ConfigError(f"meteor must be auto, jar or python, got {choice!r}")
    if choice == "auto":
        from importlib.util import find_spec

        choice = "jar" if which("java") and find_spec("pycocoevalcap") else "python"
    return "meteor" if choice == "jar" else "meteor_py"


def _selection(models: Mapping[str, Any], oracle: Mapping[str, Any]) -> dict[str, Any]:
    """Per task: first beam, chosen, oracle."""
    return {
        task: {
            "first_beam": models["corrected"]["tasks"][task]["score"],
            "chosen": models["sasg"]["tasks"][task]["score"],
            "oracle": _bound(models, oracle, task),
        }
        for task in models["sasg"]["tasks"]
    }


def _bound(models: Mapping[str, Any], oracle: Mapping[str, Any], task: str) -> float:
    """Of the best candidates; one by one they need not be best together where BLEU counts."""
    scores = (
        model["tasks"][task]["score"] for model in (oracle, models["corrected"], models["sasg"])
    )
    return float(max(scores))


def verdicts(
    models: Mapping[str, Any],
    baselines: Mapping[str, Any],
    oracle: Mapping[str, Any],
    selection: str = "clip",
) -> list[str]:
    """Plain sentences: where the final model is better than what, and where it is not."""
    final, base = models["sasg"]["tasks"], models["base"]["tasks"]
    out = list(models["sasg"].get("notes", ()))
    if selection == "oracle":
        out.append(
            "The final answers were chosen by the truth (generate.selection: oracle): their score "
            "is a bound for analysis, not a result."
        )
    behind = [t for t in final if final[t]["score"] <= base[t]["score"]]
    out.append(
        "The final model beats its own base on every task."
        if not behind
        else f"The final model does not beat its own base on {', '.join(behind)}."
    )
    for baseline in baselines.values():
        for task, result in baseline["tasks"].items():
            if task in final and final[task]["score"] <= result["score"]:
                out.append(
                    f"On {task} it does not beat the baseline “{baseline['label']}”: "
                    f"{final[task]['score']:.1f} against {result['score']:.1f}."
                )
    gains = ", ".join(
        f"{task} {final[task]['score'] - models['corrected']['tasks'][task]['score']:+.1f}"
        for task in final
    )
    gaps = ", ".join(
        f"{task} {_bound(models, oracle, task) - final[task]['score']:.1f}" for task in final
    )
    out.append(f"Selection over the first beam: {gains}; left to the best candidate: {gaps}.")
    return out
