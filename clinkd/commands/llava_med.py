"""`clinkd llava-med`: answers to LLaVA-Med's small test set, by n-grams or by a judge."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from clinkd.errors import ConfigError

REPLIES = "judge-replies.jsonl"


def llava_med(
    questions: Annotated[Path, typer.Argument(help="llava_med_eval_qa50_qa.jsonl")],
    answers: Annotated[
        Path, typer.Argument(help="JSON lines of question_id and text (or response, answer)")
    ],
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", min=1, help="limit the answers were made with; stated"),
    ],
    meteor: Annotated[str, typer.Option("--meteor", help="jar, python or auto")] = "auto",
    judge: Annotated[
        Path | None,
        typer.Option("--judge", help="YAML of an endpoint, keys as in correct.corrector"),
    ] = None,
    both_orders: Annotated[
        bool, typer.Option("--both-orders", help="judge: ask again with the answers exchanged")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            help="judge: replies that are paid for once; default: cache of the YAML, else "
            f"{REPLIES}",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Score answers to LLaVA-Med-qa0.2k: BLEU, METEOR, ROUGE-L, or a judge's grades relative to the
    reference's."""
    from clinkd.evaluate.llava_med import ngram_scores, read_answers, read_questions
    from clinkd.evaluate.run import meteor_metric

    asked = read_questions(questions)
    said = read_answers(answers, asked)
    if judge is None:
        if both_orders:
            raise ConfigError("--both-orders is for --judge")
        result = ngram_scores(
            asked, said, max_new_tokens=max_new_tokens, meteor=meteor_metric(meteor)
        )
    else:
        from clinkd.pipeline.judge import Judge, judge_scores

        settings = _settings(judge)
        cache = cache or Path(settings.cache or REPLIES)
        result = judge_scores(
            asked,
            said,
            Judge(settings, cache=cache, both_orders=both_orders),
            max_new_tokens=max_new_tokens,
        )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        _show(result)


def _settings(path: Path) -> Any:
    import yaml
    from pydantic import ValidationError

    from clinkd.train.correction.settings import CorrectorSettings

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return CorrectorSettings.model_validate({"kind": "endpoint", **(tree or {})})
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"{path}: not keys and values in YAML: {error}") from None
    except ValidationError as error:
        why = "\n  ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ")
            for e in error.errors(include_input=False)
        )
        raise ConfigError(f"{path}: {why}") from None


def _show(result: dict[str, Any]) -> None:
    from clinkd.evaluate.tables import Table, render

    length = result["length"]
    names = [name for name in result["scores"]["all"] if name != "n"]
    title = f"LLaVA-Med-qa0.2k, at most {length['max_new_tokens']} new tokens"
    if "judge" in result:
        title += f", judge {result['judge']}"
    rows = [
        (part, str(values["n"]), *(float(values[name]) for name in names))
        for part, values in result["scores"].items()
    ]
    typer.echo(render(Table(title, ("Part", "n", *names), tuple(rows)), "markdown"))
    typer.echo(f"\nwords in an answer: {length['mean_words']:.1f}, at most {length['most_words']}")
    if not result.get("complete", True):
        typer.echo("not the whole set: the published file has 193 questions")
    for row in result.get("failed", []):
        typer.echo(f"not graded: {row['question_id']}: {row['why']}")
