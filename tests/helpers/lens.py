"""The classes that the installed transformer-lens has."""

from tl_posheads.io import models

CLASSES = ["hooked", "bridge"] if models.hooked_available() else ["bridge"]
