"""The results as one picture: latency over the rate of requests."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import Row

_PANELS = {"first_token": "Time to first token", "between_tokens": "Time to the next token"}


def plot(content: Row, path: Path) -> None:
    """Write a picture with one panel for each latency; requests that came all at once are left out."""
    rows = [row for row in content["rows"] if row["rate"] != "inf"]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 2), _PANELS.items(), strict=True):
        _panel(axes, rows, key)
        axes.set(title=title, xlabel="requests per second", ylabel="ms", ylim=(0, None))
        axes.legend()
    figure.suptitle(f"{content['date']}, commit {content['commit'][:10]}", fontsize=9)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, rows: list[Row], key: str) -> None:
    for distribution in dict.fromkeys(row["distribution"] for row in rows):
        some = [row for row in rows if row["distribution"] == distribution and row[key]["n"]]
        for percent, style in ((50, "-"), (99, "--")):
            axes.plot(
                [row["rate"] for row in some],
                [row[key][f"p{percent}_ms"] for row in some],
                style,
                marker="o",
                label=f"{distribution}, {percent}th percentile",
            )
