"""What all plots share: colours, sizes, and a figure that is written whole or not at all."""

import os
from pathlib import Path
from typing import Any

from benchmarks import require

COLOURS = ("#d55e00", "#0072b2")  # told apart in grey and with any colour vision
CELL_COLOURS = {"GRU": "#0072b2", "LSTM": "#d55e00", "RNN": "#999999"}
STYLE = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def open_pyplot() -> Any:
    """matplotlib's drawing functions, without a window."""
    require("matplotlib").use("Agg")
    return require("matplotlib.pyplot")


def write_figure(figure: Any, path: Path) -> None:
    """Written whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    kind = path.suffix[1:]
    figure.savefig(unfinished, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    open_pyplot().close(figure)
    os.replace(unfinished, path)
