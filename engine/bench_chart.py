"""The history of a benchmark as one SVG picture: a bar per ratio, and a dot for each run before the newest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

_LEFT, _WIDTH, _RIGHT = 300, 560, 90
_ROW, _HEAD = 20, 34
_BETTER, _WORSE, _GRID = "#2f6f9f", "#b5651d", "#cccccc"


def ratio_chart(title: str, machines: Sequence[dict[str, Any]]) -> str:
    """SVG of the ratios of `engine.bench.compare`, on a logarithmic scale; a case without ratios is not drawn.

    Bars begin at 1: to the right where we are faster than what we are compared with, to the left where slower.
    """
    groups = [(machine["slug"], [case for case in map(_shown, machine["cases"]) if case]) for machine in machines]
    values = [value for _, rows in groups for _, _, values in rows for value in values]
    low = math.floor(min([0.0, *(math.log10(value) for value in values)]))
    high = math.ceil(max([0.1, *(math.log10(value) for value in values)]))

    def x(value: float) -> float:
        return _LEFT + _WIDTH * (math.log10(value) - low) / (high - low)

    body: list[str] = []
    y = _HEAD
    for slug, rows in groups:
        body.append(_text(10, y + 14, slug, weight="bold"))
        top, y = y + _ROW, y + _ROW
        for name, against, series in rows:
            body += _row(y, name, against, series, x)
            y += _ROW
        for power in range(low, high + 1):
            at = x(10.0**power)
            colour = "#555555" if power == 0 else _GRID
            body.append(f'<line x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{y}" stroke="{colour}"/>')
            body.append(_text(at, y + 14, f"{10.0**power:g}x", anchor="middle"))
        y += 2 * _ROW
    width = _LEFT + _WIDTH + _RIGHT
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" '
            'font-family="sans-serif" font-size="12">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{y}" fill="white"/>',
            _text(10, 20, f"{title}: our rate over theirs", weight="bold"),
            *body,
            "</svg>\n",
        ]
    )


def _shown(case: dict[str, Any]) -> tuple[str, str, list[float]] | None:
    """(name, against, values from oldest to newest) of a case with ratios, measured at least once."""
    values = [value for value in case["values"] if value is not None]
    return (case["name"], case["against"], values) if values and case["is_ratio"] else None


def _row(y: int, name: str, against: str, series: list[float], x: Any) -> list[str]:
    *before, newest = series
    start, end = sorted((x(1.0), x(newest)))
    parts = [
        _text(_LEFT - 8, y + 14, f"{name} / {against}", anchor="end"),
        f'<rect x="{start:.1f}" y="{y + 4}" width="{max(1.0, end - start):.1f}" height="{_ROW - 8}" '
        f'fill="{_BETTER if newest >= 1 else _WORSE}"><title>{escape(name)} / {escape(against)}: '
        f"{newest:.4g}</title></rect>",
        _text(x(max(1.0, *series)) + 8, y + 14, f"{newest:.3g}"),
    ]
    parts += [
        f'<circle cx="{x(value):.1f}" cy="{y + _ROW // 2}" r="3" fill="none" stroke="black"/>' for value in before
    ]
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'dominant-baseline="auto">{escape(text)}</text>'
    )
