"""One style for all figures: legible in notebooks, in print and for colour-blind readers."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from tl_posheads.errors import PosheadsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can distinguish; dashes and markers for print.
# Black is reserved for the baseline.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
DASHES = ("-", "--", "-.", ":")  # their number and that of the colours are coprime
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
    """An empty figure that notebooks display, made without pyplot's list of open figures.

    Args:
        options: of ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            return png(self, dpi=80)

    return Shown(layout="constrained", **options)


def axes_for(ax: Axes | None, figsize: tuple[float, float]) -> tuple[Any, Any]:
    """The axes to draw into, and what the plotting function returns.

    Axes that were given are returned, as in pandas and seaborn: returning their figure would show
    it twice in a notebook. Without any, a new figure is returned.

    Raises:
        PosheadsError: ``ax`` isn't one Axes, but an array of them, say.
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
    """A matplotlib figure as PNG bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def log2_axis(ax: Any, n_ticks: int | None = None) -> None:
    """Tokens along x, on a log2 scale."""
    from matplotlib.ticker import LogLocator

    ax.set_xscale("log", base=2)
    if n_ticks is not None:
        ax.xaxis.set_major_locator(LogLocator(base=2, numticks=n_ticks))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")


def say_trained(ax: Any, trained: int, *, y: float = 1) -> None:
    """Label the training length, left of its vertical line, at the top or bottom (``y`` 0)."""
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
    """Wrap a plotting function so that it uses this package's style, not the user's.

    Axes that the user gives as ``ax`` keep the user's colours.
    """

    @wraps(draw)
    def in_style(*args: Any, **options: Any) -> Any:
        from matplotlib import rc_context, rcParamsDefault

        # A notebook's own settings, such as dark axes, would not fit.
        default: Any = rcParamsDefault
        own = _OWN_COLOURS if options.get("ax") is None else ()
        style: Any = {key: default[key] for key in own} | _STYLE
        with rc_context(style):
            return draw(*args, **options)

    return in_style  # type: ignore[return-value]
