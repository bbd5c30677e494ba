"""The positional score under any positional encoding: planes of the q-k space, not rotary pairs.

=====================  ==========================  ==========================================
encoding               what orders the planes      where
=====================  ==========================  ==========================================
RoPE                   the rotation, exactly       ``rotation_operators``, ``ordered_planes``
sinusoidal, learned    moved positions, regressed  ``transport_operator``, ``ordered_planes``
ALiBi, T5, none        mean products by distance   ``distance_products``, ``planes_by_products``
Mamba, RWKV            nothing: no q-k pair        refused
=====================  ==========================  ==========================================
"""

from tl_posheads.studies.encodings.basis import (
    QKBasis,
    bias_speed,
    half_lives,
    ordered_planes,
    planes_by_products,
)
from tl_posheads.studies.encodings.diagonalise import joint_diagonalisation
from tl_posheads.studies.encodings.planes import (
    PlaneVectors,
    dominant_by_distance,
    plane_contributions,
)
from tl_posheads.studies.encodings.products import DistanceProducts, distance_products
from tl_posheads.studies.encodings.results import EncodingScores
from tl_posheads.studies.encodings.scoring import score_encoding
from tl_posheads.studies.encodings.transport import (
    Transport,
    TransportSums,
    log_shifts,
    rotation_operators,
    transport_operator,
)

__all__ = [
    "EncodingScores",
    "DistanceProducts",
    "PlaneVectors",
    "QKBasis",
    "Transport",
    "TransportSums",
    "bias_speed",
    "distance_products",
    "dominant_by_distance",
    "half_lives",
    "joint_diagonalisation",
    "log_shifts",
    "ordered_planes",
    "plane_contributions",
    "planes_by_products",
    "rotation_operators",
    "score_encoding",
    "transport_operator",
]
