"""The report of a run: one HTML page that needs nothing beside itself."""

from typing import Any

__all__ = ["build_report"]


def __getattr__(name: str) -> Any:
    if name == "build_report":
        from clinkd.report.build import build_report  # here: it imports jinja2 and pillow

        return build_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
