"""A matplotlib figure for results: it shows itself in a notebook."""

from __future__ import annotations

import io
from typing import Any


def picture(**options: Any) -> Any:
    """An empty figure that a notebook shows, without pyplot and its list of open figures.

    Args:
        options: of ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            out = io.BytesIO()
            self.savefig(out, format="png", dpi=80)
            return out.getvalue()

    return Shown(layout="constrained", **options)
