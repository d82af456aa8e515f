"""Charts as inline SVG; colours come from the page's style sheet, so that they follow dark mode.

Bars are stretched to the width they get and carry no text (numbers stand beside them as HTML);
curves are drawn at the size they are read at.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

Point = tuple[float, float]

_WIDTH, _HEIGHT = 380, 220  # of a loss chart, in CSS pixels at full width
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 10, 26  # margins of its plot
_MOST_POINTS = 240  # of one curve: more cannot be told apart


@dataclass(frozen=True)
class Curve:
    """One line of a loss chart; `kind` names its colour: loss, ce, kd."""

    kind: str
    label: str
    points: tuple[Point, ...]

    @property
    def last(self) -> float:
        return self.points[-1][1]


def tag(name: str, *children: Markup | str, **attributes: Any) -> Markup:
    """An element with escaped attributes; `class_` is class, other `_` become `-`."""
    written = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-") if key not in _AS_WRITTEN else key,
            _number(value) if isinstance(value, float) else value,
        )
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, inside)


_AS_WRITTEN = {"viewBox", "preserveAspectRatio"}


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def bar(value: float | None, kind: str, marks: Mapping[str, float | None] | None = None) -> Markup:
    """A bar from 0 to `value` of 100, with a tick for each mark; None draws the track only."""
    parts = [tag("rect", class_="track", x=0, y=0, width=100, height=10)]
    if value is not None:
        parts.append(tag("rect", class_=f"f-{kind}", x=0, y=0, width=_percent(value), height=10))
    for name, at in (marks or {}).items():
        if at is not None:
            x = min(max(_percent(at) - 0.5, 0.0), 99.0)
            parts.append(tag("rect", class_=f"tick f-{name}", x=x, y=0, width=1.0, height=10))
    return _strip(parts)


def range_strip(
    value: float | None, interval: Sequence[float] | None, marks: Mapping[str, float | None]
) -> Markup:
    """Where a score lies from 0 to 100: its 95 % interval, itself, and others as ticks."""
    parts = [tag("rect", class_="track", x=0, y=3.5, width=100, height=3)]
    if interval is not None:
        low, high = _percent(interval[0]), _percent(interval[1])
        parts.append(tag("rect", class_="band", x=low, y=2.0, width=high - low, height=6))
    for name, at in marks.items():
        if at is not None:
            x = min(max(_percent(at) - 0.6, 0.0), 98.8)
            parts.append(tag("rect", class_=f"f-{name}", x=x, y=1.0, width=1.2, height=8))
    if value is not None:
        x = min(max(_percent(value) - 0.9, 0.0), 98.2)
        parts.append(tag("rect", class_="f-final", x=x, y=0, width=1.8, height=10))
    return _strip(parts)


def stacked(parts: Sequence[tuple[str, int]]) -> Markup:
    """One bar cut into shares; (colour name, count) each."""
    total = sum(count for _, count in parts) or 1
    at, pieces = 0.0, []
    for kind, count in parts:
        width = 100 * count / total
        pieces.append(tag("rect", class_=f"f-{kind}", x=at, y=0, width=width, height=10))
        at += width
    return _strip([tag("rect", class_="track", x=0, y=0, width=100, height=10), *pieces])


def _strip(parts: Sequence[Markup]) -> Markup:
    return tag(
        "svg",
        *parts,
        class_="strip",
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        aria_hidden="true",  # the numbers stand beside it
    )


def _percent(value: float) -> float:
    return min(max(float(value), 0.0), 100.0)


def loss_chart(stage: str, curves: Sequence[Curve]) -> Markup:
    """Curves over the optimiser's steps, with axes; at least one curve with a point."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    y_ticks = ticks(min(0.0, *ys), max(ys), 4)
    x_ticks = [t for t in ticks(min(xs), max(xs), 4) if t == int(t) and t <= max(xs)]
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(point: Point) -> Point:
        across = (point[0] - x_low) / (x_high - x_low)
        up = (point[1] - y_low) / (y_high - y_low)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts: list[Markup] = []
    for value in y_ticks:
        y = place((x_low, value))[1]
        parts.append(tag("line", class_="grid", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y))
        text = f"{value:g}"
        parts.append(tag("text", text, class_="axis", x=_LEFT - 6, y=y + 4, text_anchor="end"))
    for value in x_ticks:
        if value < x_low:
            continue
        x = place((value, y_low))[0]
        where = "middle" if x < _WIDTH - 30 else "end"
        y = float(_HEIGHT - 8)
        parts.append(tag("text", f"{value:g}", class_="axis", x=x, y=y, text_anchor=where))
    for curve in curves:
        placed = [place(point) for point in thin(curve.points, _MOST_POINTS)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        parts.append(tag("path", class_=f"curve s-{curve.kind}", d=path))
        x, y = placed[-1]
        parts.append(tag("circle", class_=f"f-{curve.kind}", cx=x, cy=y, r=3.5))
    spoken = "; ".join(
        f"{c.label} from {c.points[0][1]:.3g} to {c.last:.3g}" for c in curves if c.points
    )
    return tag(
        "svg",
        *parts,
        class_="chart",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"Loss of stage {stage} over {len(set(xs))} logged steps: {spoken}",
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that cover low…high, about so many (1, 2 or 5 times a power of ten apart)."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` of the points, the last among them."""
    every = max(1, math.ceil(len(points) / most))
    kept = list(points[::every])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
