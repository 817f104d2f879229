"""The results as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_LABELS = {"device": "resident", "host": "from host", "disk": "from disk"}
_BESIDE = {"alone": "alone", "beside_requests": "beside requests", "beside_loads": "beside loads"}


def plot(content: dict[str, Any], path: Path) -> None:
    """Write a picture with one panel for each measurement."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    cold, live, pause = figure.subplots(1, 3)
    _plot_cold(cold, content["cold_start"])
    _plot_live(live, content["live_adapters"])
    _plot_pause(pause, content["load_pause"])
    hardware = content["hardware"]
    figure.suptitle(
        f"{hardware['processor']}, {hardware['cores']} cores, {content['date']}, "
        f"commit {content['commit'][:10]}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)


def _plot_cold(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for tier, label in _LABELS.items():
        found = [row for row in rows if row[tier]["n"]]
        axes.plot(
            [row["registered"] for row in found],
            [row[tier]["p50_ms"] for row in found],
            marker="o",
            label=label,
        )
    axes.set(
        title="Time to first token",
        xlabel="registered adapters",
        ylabel="median, ms",
        xscale="log",
        ylim=(0, None),
    )
    axes.legend()


def _plot_live(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for slots in sorted({row["slots"] for row in rows}):
        some = [row for row in rows if row["slots"] == slots]
        axes.plot(
            [row["live"] / slots for row in some],
            [row["tokens_per_second"] for row in some],
            marker="o",
            label=f"{slots} slots",
        )
    axes.set(
        title="One client for each live adapter",
        xlabel="live adapters / slots",
        ylabel="tokens per second",
        xscale="log",
        ylim=(0, None),
    )
    axes.set_xticks([0.5, 1, 2, 4], labels=["0.5", "1", "2", "4"])
    axes.minorticks_off()
    axes.legend()


def _plot_pause(axes: Axes, rows: list[dict[str, Any]]) -> None:
    places = range(len(rows))
    for number, (key, label) in enumerate(_BESIDE.items()):
        axes.bar(
            [place + 0.27 * (number - 1) for place in places],
            [row["longest_gap_to_step"][key] for row in rows],
            width=0.27,
            label=label,
        )
    axes.set_xticks(list(places), labels=[str(row["slots"]) for row in rows])
    axes.set(
        title="Longest pause of a running stream",
        xlabel="slots",
        ylabel="longest gap / median step alone",
        ylim=(0, None),
    )
    axes.legend()
