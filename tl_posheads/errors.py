"""The one exception of this library for input it has to refuse."""

from __future__ import annotations


class PosheadsError(ValueError):
    """What was given can't be worked on; the text says what was expected and what to do.

    It is a ``ValueError``, so ``except ValueError`` catches it; the command line prints its
    text alone and exits with status 2.
    """
