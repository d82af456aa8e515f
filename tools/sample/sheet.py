"""The contact sheet: one look at the set, boxes drawn."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

COLUMNS, CELL, CAPTION = 8, 180, 22
COLOURS = ("#ffb000", "#22d3ee", "#f472b6", "#a3e635")
BACKGROUND, INK = "#0f172a", "#e2e8f0"


def contact_sheet(folder: Path, output: Path, count: int = 32) -> None:
    """Draw `count` images spread over the volumes, with the boxes of their VG records."""
    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    images: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        images.setdefault(row["image"], []).append(row)
    chosen = _spread(images, count)
    lines = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL, lines * (CELL + CAPTION)), BACKGROUND)
    font = ImageFont.load_default(12)
    for index, name in enumerate(chosen):
        left, top = (index % COLUMNS) * CELL, (index // COLUMNS) * (CELL + CAPTION)
        picture = _draw(folder / name, [r for r in images[name] if r["task"] == "VG"], font)
        sheet.paste(
            picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2)
        )
        caption = Path(name).stem.replace("_", " ")
        ImageDraw.Draw(sheet).text((left + 6, top + CELL + 3), caption[:28], fill=INK, font=font)
    sheet.save(output, optimize=True)


def _spread(images: dict[str, list[dict[str, Any]]], count: int) -> list[str]:
    """Images in turns over the volumes, from the middle of each, those with boxes first."""
    volumes: dict[str, list[str]] = {}
    for name, rows in images.items():
        volumes.setdefault(rows[0]["volume"], []).append(name)
    for names in volumes.values():
        middle = len(names) / 2
        names.sort(
            key=lambda n, m=middle, o=tuple(names): (
                not any(r["task"] == "VG" for r in images[n]),
                abs(o.index(n) - m),
            )
        )
        names[:] = names[:: max(1, len(names) // 6)]
    chosen: list[str] = []
    while len(chosen) < count and any(volumes.values()):
        for names in volumes.values():
            if names and len(chosen) < count:
                chosen.append(names.pop(0))
    return sorted(chosen)


def _draw(path: Path, rows: list[dict[str, Any]], font: Any) -> Image.Image:
    image = Image.open(path).convert("RGB")
    scale = (CELL - 8) / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    draw = ImageDraw.Draw(image)
    for index, row in enumerate(rows[:2]):
        colour = COLOURS[index % len(COLOURS)]
        for x1, y1, x2, y2 in row["boxes"]:
            corners = (
                x1 * image.width / 1000,
                y1 * image.height / 1000,
                x2 * image.width / 1000 - 1,
                y2 * image.height / 1000 - 1,
            )
            draw.rectangle(corners, outline=colour, width=2)
    for index, row in enumerate(rows[:2]):  # names above all boxes, whole inside the image
        x, y = row["boxes"][0][:2]
        width = draw.textlength(row["structure"], font=font) + 6
        left = max(0, min(x * image.width / 1000, image.width - width))
        top = max(0, y * image.height / 1000 - 16)
        draw.rectangle((left, top, left + width, top + 15), fill=COLOURS[index % len(COLOURS)])
        draw.text((left + 3, top), row["structure"], fill=BACKGROUND, font=font)
    return image
