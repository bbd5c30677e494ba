"""Interactive views: each displays in a notebook and saves as one file that works offline.

>>> from tl_posheads import views                                       # doctest: +SKIP
>>> maps = ph.head_maps(model, tokens[0], scores.top(4))                # doctest: +SKIP
>>> views.score_map(scores, maps).save("map.html")                      # doctest: +SKIP
"""

from tl_posheads.views.attention import attention
from tl_posheads.views.attention_distance import attention_distance, attention_from
from tl_posheads.views.farthest_tokens import farthest_tokens
from tl_posheads.views.page import View
from tl_posheads.views.score_map import score_map

__all__ = [
    "View",
    "attention",
    "attention_distance",
    "attention_from",
    "farthest_tokens",
    "score_map",
]
