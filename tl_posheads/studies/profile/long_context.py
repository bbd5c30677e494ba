"""Whether a query needs more than its neighbours: adaptive long-context head identification."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_posheads.errors import PosheadsError


def long_context_share(
    scores: Float[Tensor, "q_pos k_pos"],
    *,
    window: int,
    n_sink: int = 16,
    threshold: float = 0.6,
    sliding_window: int | None = None,
) -> tuple[float, float]:
    """Share of one head's queries that need long context: predicted, and actual.

    Donhauser et al. 2025, "Unveiling simplicities of attention: adaptive long-context head
    identification", arXiv 2502.09647. The keys that query ``i`` sees fall into the local ones, the
    first ``n_sink`` and the last ``window``, and the bulk, all others. With ``A`` the sum of
    ``exp(score)``, the head is local for this query where ::

        A_local / (A_local + A_bulk) >= threshold

    and needs long context where it is less. The oracle criterion takes ``A_bulk`` as it is. The
    query-adaptive one (QAdA) assumes that the bulk's keys are Gaussian; then the scores ``q . k``
    are Gaussian and ``A_bulk = n_bulk * exp(mean + variance / 2)``, mean and variance (over n) of
    the scores in the bulk. These are ``q . mu`` and ``q' Sigma q`` of the keys' own mean and
    covariance, so that nothing is lost by taking them from the scores.

    The paper uses 16 sinks and windows of a thousand tokens in texts of tens of thousands; its
    moments come from the keys of the prompt or from those of another text. Here they are those of
    the query's own bulk. Only queries with at least ``window`` keys in their bulk are judged.

    Args:
        scores: as they enter the softmax, unmasked, of one head and text.
        window: keys just before the query that are local, itself among them.
        n_sink: keys at the text's beginning that are local.
        threshold: the paper's tau.
        sliding_window: of the layer: query ``i`` sees ``i - sliding_window < j <= i``.

    Returns:
        The shares by the Gaussian approximation and by the oracle; NaN twice where no query's bulk
        is large enough.

    Memory: some tensors of ``[pos, pos]`` in float64.

    Raises:
        PosheadsError: a window below 1, a negative ``n_sink``, a threshold outside of 0 to 1.

    Example:
        >>> import torch
        >>> long_context_share(torch.zeros(40, 40), window=4, n_sink=1, threshold=0.5)
        (0.9375, 0.9375)
    """
    if window < 1 or n_sink < 0 or not 0 < threshold < 1:
        raise PosheadsError(
            f"window={window!r}, n_sink={n_sink!r} and threshold={threshold!r} were given; "
            "expected a window of at least 1, 0 or more sinks and a threshold between 0 and 1"
        )
    n_pos = scores.shape[-1]
    at = torch.arange(n_pos, device=scores.device)
    distance = at[:, None] - at
    seen = distance >= 0
    if sliding_window is not None:
        seen &= distance < sliding_window
    local = seen & ((at < n_sink) | (distance < window))
    bulk = seen & ~local
    n_bulk = bulk.sum(1)
    judged = n_bulk >= window
    if not bool(judged.any()):
        return float("nan"), float("nan")
    s, local, bulk = scores[judged].double(), local[judged], bulk[judged]
    n = n_bulk[judged].double()
    mean = torch.where(bulk, s, 0.0).sum(1) / n
    variance = torch.where(bulk, s - mean[:, None], 0.0).square().sum(1) / n
    log_local = s.masked_fill(~local, float("-inf")).logsumexp(1)
    log_bulk = s.masked_fill(~bulk, float("-inf")).logsumexp(1)
    gaussian = n.log() + mean + variance / 2

    def share(bulk_mass: Tensor) -> float:
        return float((torch.sigmoid(log_local - bulk_mass) < threshold).double().mean())

    return share(gaussian), share(log_bulk)
