"""What all pictures share: size, looks, dots with 95% intervals, and how they are saved.

Only paper() imports matplotlib: what draws nothing works without it.
"""

import math
import textwrap
from pathlib import Path

from model import InputError
from model.files import draft_of, put

WIDE = 8.3  # inches: at 830 pixels, 100 to the inch, text of 9 points is as large as the text around the picture
GREY, BLUE = "#8a8a8a", "#1a4f9c"  # in print the blue is much the darker
COLORS = (GREY, BLUE, "#d95f02", "#1b8a5a", "#7a3e9d", "#b8860b")  # of things side by side, again from the start
LOOK = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": "#555555",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "figure.titlesize": 11.5,
    "figure.titleweight": "bold",
    "errorbar.capsize": 0,
}


def paper(height: float, rows: int = 1, columns: int = 1, **options):
    """(figure, array of its panels), `height` inches high."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install -r requirements-figures.txt") from None
    matplotlib.rcParams |= LOOK
    fig = Figure(figsize=(WIDE, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def dot(ax, x: float, y: float, interval, axis: str = "y", **look) -> None:
    """One dot with its 95% interval (low, high) along an axis."""
    center = y if axis == "y" else x
    reach = [[max(0.0, center - interval[0])], [max(0.0, interval[1] - center)]]
    look = {"markersize": 6, "elinewidth": 1.4, "zorder": 3, "clip_on": False, **look}
    ax.errorbar([x], [y], **{f"{axis}err": reach}, **look)


def note(ax, text: str, x: float, y: float, dx: float, dy: float, **how) -> None:
    """A small text, dx and dy points from a place."""
    how = {"fontsize": 8, "annotation_clip": False, **how}
    ax.annotate(text, (x, y), (dx, dy), textcoords="offset points", **how)


def legend(fig, looks: dict[str, dict], columns: int = 1) -> None:
    """Names and looks of lines or dots, below all panels."""
    handles = [fig.axes[0].plot([], [], **look)[0] for look in looks.values()]
    fig.legend(handles, looks, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)


def save(fig, path: Path, title: str) -> None:
    """Write the .png, whole or not at all, and print where it is."""
    if path.suffix != ".png":
        raise InputError(f"{path}: pictures are .png files; name one that ends so")
    lines = math.ceil(len(title) / 80)
    fig.suptitle(textwrap.fill(title, len(title) // lines + 8), x=0.012, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    try:
        fig.savefig(draft, dpi=200, format="png", metadata={"Software": None})
        put(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    print(path)
