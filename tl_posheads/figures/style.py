"""One style for all figures: legible at a notebook's width and in print, told apart by everyone."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from tl_posheads.errors import PosheadsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers; dashes and markers for print.
# Black is for what everything else is compared with.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
DASHES = ("-", "--", "-.", ":")  # as many have no divisor in common with the colours
MARKERS = "osD^vPX*"
_STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "image.cmap": "viridis",
}
_OWN_COLOURS = (
    "axes.facecolor",
    "axes.edgecolor",
    "axes.labelcolor",
    "figure.facecolor",
    "text.color",
    "xtick.color",
    "ytick.color",
    "font.size",
)

Draws = TypeVar("Draws", bound=Callable[..., Any])


def picture(**options: Any) -> Any:
    """An empty figure that a notebook shows, without pyplot and its list of open figures.

    Args:
        options: of ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            return png(self, dpi=80)

    return Shown(layout="constrained", **options)


def axes_for(ax: Axes | None, figsize: tuple[float, float]) -> tuple[Any, Any]:
    """The axes to draw into, and what the drawing returns.

    Given axes are returned themselves, as in pandas and seaborn: a notebook would show their
    figure a second time. Without any it is a new figure.

    Raises:
        PosheadsError: no axes, such as an array of them.
    """
    from matplotlib.axes import Axes

    if ax is None:
        figure = picture(figsize=figsize)
        return figure.subplots(), figure
    if not isinstance(ax, Axes):
        raise PosheadsError(
            f"ax is a {type(ax).__name__}; expected one matplotlib Axes, such as the ax of "
            "fig, ax = plt.subplots(), or one of an array of axes"
        )
    return ax, ax


def png(figure: Any, dpi: int = 120) -> bytes:
    """A matplotlib figure as the content of a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def log2_axis(ax: Any, n_ticks: int | None = None) -> None:
    """Tokens along x, by doublings."""
    from matplotlib.ticker import LogLocator

    ax.set_xscale("log", base=2)
    if n_ticks is not None:
        ax.xaxis.set_major_locator(LogLocator(base=2, numticks=n_ticks))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")


def say_trained(ax: Any, trained: int, *, y: float = 1) -> None:
    """The training length in words, left of its upright line, at the top or bottom (``y`` 0)."""
    ax.annotate(
        f"trained on {trained:,} ",
        (trained, y),
        color="0.3",
        fontsize=9,
        xycoords=("data", "axes fraction"),
        va="top" if y else "bottom",
        ha="right",
    )


def styled(draw: Draws) -> Draws:
    """A function that draws, in the style of this package and whatever the user's own is.

    Axes of the user's, given as ``ax``, keep the user's colours.
    """

    @wraps(draw)
    def in_style(*args: Any, **options: Any) -> Any:
        from matplotlib import rc_context, rcParamsDefault

        # What a notebook chose for its own figures, dark axes for one, would not fit.
        default: Any = rcParamsDefault
        own = _OWN_COLOURS if options.get("ax") is None else ()
        style: Any = {key: default[key] for key in own} | _STYLE
        with rc_context(style):
            return draw(*args, **options)

    return in_style  # type: ignore[return-value]
