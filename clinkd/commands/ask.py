"""`clinkd ask`: one question about one or several images."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clinkd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_COLOURS = ("#e4572e", "#2e86ab", "#3fa34d", "#f2a900")


def ask(
    image: Annotated[
        Path, typer.Argument(help="PNG, JPEG, DICOM, NIfTI (scan.nii.gz#axis=2,index=30)")
    ],
    question: Annotated[str, typer.Argument(help="what to ask about it")],
    model: Annotated[
        str,
        typer.Option("--model", help="folder or hub name; a run's are run/student/distilled, …"),
    ],
    more: Annotated[
        list[Path] | None, typer.Option("--image", help="a further image; may be given again")
    ] = None,
    beams: Annotated[int, typer.Option("--beams", min=1, max=16)] = 3,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 80,
    scorer: Annotated[
        str | None, typer.Option("--scorer", help="CLIP model that chooses among the beams")
    ] = None,
    show: Annotated[
        Path | None, typer.Option("--show", metavar="OUT.png", help="draw the boxes on the image")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="print every candidate")] = False,
) -> None:
    """Ask a model about an image; prints the answer and its boxes (x1, y1, x2, y2; 0…1000)."""
    from clinkd.data.boxes import parse_boxes
    from clinkd.data.checks import check_aspect
    from clinkd.data.files import atomic_write
    from clinkd.data.images import load_image

    if show is not None and (show.suffix.lower() != ".png" or not show.absolute().parent.is_dir()):
        raise ConfigError(
            f"--show must name a .png file in a folder that exists, got {str(show)!r}"
        )
    if show is not None and show.is_dir():
        raise ConfigError(f"--show must name a .png file; {str(show)!r} is a folder")
    images = []
    for path in (image, *(more or [])):
        images.append(load_image(path.absolute().parent, path.name))
        if why := check_aspect(path.name, images[-1].size):
            raise DataError(f"{why}; cut it first")
    candidates, chosen = _answer(model, images, question, beams, max_new_tokens, scorer)
    for index, (candidate, cosine) in enumerate(candidates):
        if not every and index != chosen:
            continue
        boxes = parse_boxes(candidate.text)
        mark = ("* " if index == chosen else "  ") if every else ""
        typer.echo(mark + candidate.text)
        for box in boxes:
            typer.echo(f"{' ' * len(mark)}box: {', '.join(f'{side:.0f}' for side in box)}")
        if every:
            clip = "" if cosine is None else f", CLIP {cosine:.3f}"
            typer.echo(f"  score {candidate.score:.3f}{clip}")
    if show is not None:
        drawn = draw_boxes(images[0], parse_boxes(candidates[chosen][0].text))
        with atomic_write(show, "wb") as file:
            drawn.save(file, "PNG")
        typer.echo(f"drawn: {show}")


def _answer(
    name: str,
    images: "Sequence[Image]",
    question: str,
    beams: int,
    max_new_tokens: int,
    scorer: str | None,
) -> tuple[list[tuple[Any, float | None]], int]:
    """Candidates with their cosines, best beam first, and the index of the chosen one."""
    from transformers import AutoProcessor

    from clinkd import models
    from clinkd.data.convention import to_model
    from clinkd.generate import BeamSearcher, ClipScorer, select
    from clinkd.generate.scorer import mean_over_images
    from clinkd.generate.stream import as_in_records
    from clinkd.pipeline.runner import quiet_libraries
    from clinkd.pipeline.steps import why_unread

    quiet_libraries()
    try:
        network = models.load(name).eval()
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r} cannot be loaded: {why_unread(name, error)}") from error
    judge = ClipScorer.load(scorer) if scorer is not None else None
    searcher = BeamSearcher(network, processor, beams, beams, max_new_tokens)
    try:
        asked = to_model(question, processor, [image.size for image in images])
    except ValueError as error:
        raise ConfigError(f"the question: {error}") from None
    (result,) = searcher.generate([{"id": "0", "images": images, "question": asked}])
    if result.error is not None:
        raise ConfigError(result.error)
    candidates = as_in_records(result, images, processor).candidates
    texts = [candidate.text for candidate in candidates]
    cosines: list[float | None] = [None] * len(texts)
    if judge is not None:
        cosines = list(mean_over_images(judge, images, texts))
    chosen = select(candidates, "beam" if judge is None else "clip", clip=cosines)
    return list(zip(candidates, cosines, strict=True)), chosen


def draw_boxes(image: "Image", boxes: Sequence[Sequence[float]]) -> "Image":
    """A copy of the image, enlarged if it is small, with boxes (0…1000) drawn on it."""
    from PIL import Image, ImageDraw

    factor = max(1, round(512 / max(image.size)))
    size = (image.width * factor, image.height * factor)
    copy = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(copy)
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        left, right = (min(max(x, 0), 1000) / 1000 * (copy.width - 1) for x in (x1, x2))
        top, bottom = (min(max(y, 0), 1000) / 1000 * (copy.height - 1) for y in (y1, y2))
        colour = _COLOURS[index % len(_COLOURS)]
        pen.rectangle((left, top, right, bottom), outline=colour, width=max(2, copy.width // 200))
    return copy
