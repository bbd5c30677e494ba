"""Counts of many texts and layers, from anyone's forward passes, and the scores they give."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.capture import hook_names
from tl_posheads.counter import POOL
from tl_posheads.counting import count_document
from tl_posheads.errors import PosheadsError
from tl_posheads.geometry import RotaryGeometry
from tl_posheads.inputs import check_pairs, require_finite, token_run
from tl_posheads.statistics import (
    benjamini_hochberg,
    bootstrap_interval,
    distance_edges,
    sampled_standard_error,
    shift_p_value,
    spearman_by_distance,
    spearman_of_tables,
)
from tl_posheads.tables import (
    FEW_DOCUMENTS,
    N_BLOCKS,
    Grids,
    LayerTable,
    Settings,
    Weighting,
)

if TYPE_CHECKING:
    from tl_posheads.results import HeadScores

_COARSE = 2e-4  # share of the rank variance that D bins may lose before another grid is made


class ScoreAccumulator:
    """Collects what :func:`tl_posheads.score_heads` collects, from forward passes of your own.

    Use ``fwd_hooks`` with ``model.run_with_hooks``, or ``update_from_cache`` with a cache that
    ``model.run_with_cache(tokens, names_filter=accumulator.names_filter)`` filled; on models whose
    hooks never fire by themselves (GPT-NeoX, GPT-J, Phi-3, Falcon on the Bridge) inside
    ``rotary_hook_points(model)``. Every row of a batch is a document of its own.

    Accumulators made by :meth:`like` share their D bins and can be merged in any order: counting
    documents apart and merging gives the same tables as one pass.

    Args:
        geometry: of the model.
        layers: those to count (all that have RoPE).
        pairs: ``"all"``, ``"per_distance"`` or a number, as in ``score_heads``.
        skip_first: positions at each text's start that are left out, as queries and as keys.
        exact: keep every D, for exact ranks; 8 bytes per pair, head and layer.
        seed: of permutations, shifts and draws.
        n_blocks: stretches that each document is cut into for the intervals.

    Example:
        >>> acc = ScoreAccumulator(RotaryGeometry.from_model(model))      # doctest: +SKIP
        >>> model.run_with_hooks(tokens, fwd_hooks=acc.fwd_hooks)         # doctest: +SKIP
        >>> acc.scores().top(3)                                           # doctest: +SKIP
    """

    def __init__(
        self,
        geometry: RotaryGeometry,
        *,
        layers: Sequence[int] | None = None,
        pairs: Weighting = "all",
        skip_first: int = 0,
        exact: bool = False,
        seed: int = 0,
        n_blocks: int = N_BLOCKS,
    ) -> None:
        check_pairs(pairs)
        self.geometry = geometry
        wanted = range(geometry.n_layers) if layers is None else layers
        # A pair's number has an order only where there are two; layers without RoPE have none.
        self.layers = [layer for layer in sorted(set(wanted)) if geometry[layer].n_pairs > 1]
        self.settings = Settings(pairs=pairs, exact=exact, seed=seed, n_blocks=n_blocks)
        self.skip_first = skip_first
        self.grids: dict[int, Grids] = {}
        self.tables: dict[int, LayerTable] = {}
        self._settled: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def like(self) -> ScoreAccumulator:
        """An empty accumulator with the same settings and D bins."""
        other = ScoreAccumulator(
            self.geometry, layers=self.layers, pairs=self.settings.pairs,
            skip_first=self.skip_first, exact=self.settings.exact, seed=self.settings.seed,
            n_blocks=self.settings.n_blocks,
        )  # fmt: skip
        other.grids = dict(self.grids)
        return other

    @property
    def names_filter(self) -> list[str]:
        """What ``run_with_cache`` has to keep for :meth:`update_from_cache`."""
        return ["hook_embed", *hook_names(self.layers)]

    @property
    def fwd_hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """Hooks for ``model.run_with_hooks`` on texts without padding."""
        return self.hooks_for(None)

    def hooks_for(
        self, attention_mask: Int[Tensor, "batch pos"] | None
    ) -> list[tuple[str, Callable[..., None]]]:
        """Hooks for one pass over a padded batch; pass the same mask to the model."""
        keys: list[str] = []
        waiting: dict[int, dict[str, Tensor]] = {}

        def embed(value: Tensor, hook: Any) -> None:
            keys[:] = self._keys(value, attention_mask)

        def keeper(layer: int, which: str) -> Callable[..., None]:
            def keep(value: Tensor, hook: Any) -> None:
                both = waiting.setdefault(layer, {})
                both[which] = value.detach()
                if len(both) == 2:
                    del waiting[layer]
                    self.update(layer, both["q"], both["k"], keys, attention_mask)

            return keep

        hooks: list[tuple[str, Callable[..., None]]] = [("hook_embed", embed)]
        for layer in self.layers:
            names = hook_names([layer])
            hooks += [(name, keeper(layer, which)) for name, which in zip(names, "qk", strict=True)]
        return hooks

    def update_from_cache(
        self, cache: Mapping[str, Tensor], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> None:
        """Count a batch from an ``ActivationCache``.

        Raises:
            PosheadsError: the cache lacks a hook name; nothing was counted then.
        """
        missing = [name for name in self.names_filter if name not in cache]
        if missing:
            raise PosheadsError(
                f"the cache has no {missing[0]}; fill it with run_with_cache(tokens, "
                "names_filter=accumulator.names_filter), inside rotary_hook_points(model)"
            )
        keys = self._keys(cache["hook_embed"], attention_mask)
        for layer in self.layers:
            q, k = (cache[name] for name in hook_names([layer]))
            self.update(layer, q, k, keys, attention_mask)

    def _keys(self, embedded: Tensor, mask: Tensor | None) -> list[str]:
        """Names of the texts: their embeddings say the same as their tokens."""
        rows = embedded.detach()[..., :8].float().cpu()
        runs = self._runs(rows, mask)
        return [
            hashlib.sha256(row[run].contiguous().numpy().tobytes()).hexdigest()
            for row, run in zip(rows, runs, strict=True)
        ]

    def _runs(self, batch: Tensor, mask: Tensor | None) -> list[slice]:
        if mask is None:
            return [slice(0, batch.shape[1])] * batch.shape[0]
        if mask.shape != batch.shape[:2]:
            raise PosheadsError(
                f"an attention mask of shape {tuple(mask.shape)} was given for a batch of shape "
                f"{tuple(batch.shape[:2])}; expected the same"
            )
        return [token_run(row, i) for i, row in enumerate(mask)]

    def update(
        self,
        layer: int,
        rot_q: Float[Tensor, "batch pos head d_head"],
        rot_k: Float[Tensor, "batch pos kv_head d_head"],
        documents: Sequence[str],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> None:
        """Count one layer of a batch; ``documents`` names its texts (hexadecimal, 15 or more).

        Raises:
            PosheadsError: NaN or infinity, by layer and head; a text too short for its
                ``skip_first``.
        """
        geometry = self.geometry[layer].after(self.skip_first)
        for i, run in enumerate(self._runs(rot_q, attention_mask)):
            q, k = rot_q[i, run][self.skip_first :], rot_k[i, run][self.skip_first :]
            if q.device.type == "mps":  # it has no float64
                q, k = q.cpu(), k.cpu()
            require_finite(layer, q, k, geometry.kv_head)
            if q.shape[0] < 2:
                raise PosheadsError(
                    f"a text of {q.shape[0]} positions (after skip_first={self.skip_first}) was "
                    "given; a pair of tokens needs at least 2"
                )
            table, grids = count_document(
                q, k, geometry, documents[i], self.settings, self.grids.get(layer)
            )
            self.grids.setdefault(layer, grids)
            self.put(layer, table)

    def put(self, layer: int, table: LayerTable) -> None:
        if layer in self.tables:
            self.tables[layer].merge(table)
        else:
            self.tables[layer] = table

    def merge(self, other: ScoreAccumulator) -> None:
        """Add what ``other`` counted.

        Raises:
            PosheadsError: it counted other things, or in other bins; nothing was added then.
        """
        same = (self.settings, self.layers, self.skip_first) == (
            other.settings, other.layers, other.skip_first
        )  # fmt: skip
        grids_agree = all(
            self.grids[layer].dominant.same_as(grid.dominant)
            and self.grids[layer].geometry.same_as(grid.geometry)
            for layer, grid in other.grids.items()
            if layer in self.grids
        )
        if not (same and grids_agree):
            raise PosheadsError(
                "these accumulators can't be merged: they have other settings or other D bins; "
                "make one from the other with like() before counting"
            )
        for layer, table in other.tables.items():
            self.grids.setdefault(layer, other.grids[layer])
            self.put(layer, _copy(table))

    def coarse_layers(self) -> list[int]:
        """Layers where later documents crowd into few of the first one's bins."""
        out = []
        for layer, table in self.tables.items():
            if self.settings.exact or isinstance(self.settings.pairs, int):
                continue
            share = table.counts.sum(-1).double()
            share /= share.sum(-1, keepdim=True)
            sample = table.sample.sort(1).values
            # A value that is many times in the sample is a tie: no bin is too coarse for it.
            ties = (sample[:, 1:] == sample[:, :-1]).double().mean(1)
            lost = (share**3).sum(1)
            if bool(((lost > _COARSE) & (ties < 0.1)).any()):
                out.append(layer)
        return out

    def scores(self, provenance: Mapping[str, Any] | None = None) -> HeadScores:
        """The scores of all that was counted so far.

        Raises:
            PosheadsError: nothing was counted.
        """
        from tl_posheads.results import HeadScores

        if not self.tables:
            raise PosheadsError("nothing was counted yet; run a forward pass with fwd_hooks first")
        shape = (self.geometry.n_layers, self.geometry.n_heads)
        names = ("rho", "ci_low", "ci_high", "rho_geometry", "p_null", "se")
        out = {name: np.full(shape, np.nan) for name in names}
        n_pairs = np.zeros(shape, dtype=np.int64)
        n_documents = 0
        for layer, table in sorted(self.tables.items()):
            n_documents = max(n_documents, int(table.n_documents))
            by_distance = self.settings.pairs == "per_distance"
            out["rho"][layer], out["se"][layer] = self._settled.get(layer) or self._rho(table)
            blocks = bootstrap_blocks(table.blocks)
            small = blocks.tables
            if by_distance:
                small = small * distance_weights(small.sum(0), table.longest, pool=POOL)
            generator = np.random.default_rng([self.settings.seed, layer])
            for head in range(shape[1]):
                out["ci_low"][layer, head], out["ci_high"][layer, head] = bootstrap_interval(
                    small[:, head], float(out["rho"][layer, head]), generator=generator,
                    rows=blocks.rows, columns=blocks.columns,
                )  # fmt: skip
            geometry_counts = table.geometry_counts.double().numpy()
            if by_distance:  # a number draws every distance alike anyway
                geometry_counts *= distance_weights(geometry_counts, table.longest)
            out["rho_geometry"][layer] = spearman_of_tables(geometry_counts)
            p = shift_p_value(table.null_observed, table.null_draws)
            out["p_null"][layer] = np.where(np.isfinite(out["rho"][layer]), p, np.nan)
            n_pairs[layer] = int(table.n_pairs)
        out["p_null"] = benjamini_hochberg(out["p_null"])
        facts = {
            "layers": sorted(self.tables),
            "pairs": self.settings.pairs,
            "estimator": self._estimator(),
            "interval": "documents"
            if n_documents >= FEW_DOCUMENTS
            else "stretches of queries and keys",
            "skip_first": self.skip_first,
            "seed": self.settings.seed,
            "n_documents": n_documents,
        }
        return HeadScores(
            **{name: torch.as_tensor(value) for name, value in out.items()},
            n_pairs=torch.as_tensor(n_pairs),
            windows=tuple(layer.window for layer in self.geometry.layers),
            provenance={"model": self.geometry.model_name, **(provenance or {}), **facts},
        )

    def _estimator(self) -> str:
        if isinstance(self.settings.pairs, int):
            return "exact ranks of a sample"
        return "exact ranks of all pairs" if self.settings.exact else "binned ranks"

    def settle(self, layer: int) -> None:
        """Rank a layer's lists now and let them go: nothing can be added to it afterwards."""
        self._settled[layer] = self._rho(self.tables[layer])
        self.tables[layer].lists.clear()

    def _rho(self, table: LayerTable) -> tuple[np.ndarray, np.ndarray]:
        nothing = np.full(table.counts.shape[0], np.nan)
        if not table.lists:
            counts = table.counts.double().numpy()
            if self.settings.pairs == "per_distance":
                counts *= distance_weights(counts, table.longest)
            return spearman_of_tables(counts), nothing
        distance = torch.cat([d for d, _ in table.lists], dim=1)
        dominant = torch.cat([v for _, v in table.lists], dim=1)
        if self.settings.exact and not isinstance(self.settings.pairs, int):
            weights = None
            if self.settings.pairs == "per_distance":
                weights = 1 / torch.bincount(distance[0]).double()[distance[0]]
            return spearman_by_distance(distance[0], dominant, weights).numpy(), nothing
        rows = list(zip(distance, dominant, strict=True))
        rho = np.array([float(spearman_by_distance(d, v[None])[0]) for d, v in rows])
        return rho, np.array([sampled_standard_error(d.numpy(), v.numpy()) for d, v in rows])


def _copy(table: LayerTable) -> LayerTable:
    return LayerTable.from_tensors(table.to_tensors())


@dataclass(frozen=True)
class _Blocks:
    """What the bootstrap draws: documents, or stretches of queries and of keys in few of them."""

    tables: Float[np.ndarray, "block head d x"]
    rows: Int[np.ndarray, "block"] | None
    columns: Int[np.ndarray, "block"] | None


def bootstrap_blocks(blocks: Mapping[str, Tensor]) -> _Blocks:
    width = max(block.shape[-1] for block in blocks.values())
    padded = {
        key: np.pad(t := blocks[key].double().numpy(), [(0, 0)] * 3 + [(0, width - t.shape[-1])])
        for key in sorted(blocks)
    }
    if len(blocks) >= FEW_DOCUMENTS:
        return _Blocks(np.stack([t.sum(0) for t in padded.values()]), None, None)
    most = -(-N_BLOCKS // len(blocks))
    tables: dict[tuple[int, int], np.ndarray] = {}
    first = 0
    for whole in padded.values():
        n = (math.isqrt(8 * len(whole) + 1) - 1) // 2  # blocks (a, b) with b <= a
        groups = min(n, most)
        for a in range(n):
            for b in range(a + 1):
                at = first + a * groups // n, first + b * groups // n
                tables[at] = tables.get(at, 0.0) + whole[a * (a + 1) // 2 + b]
        first += groups
    rows, columns = np.array(list(tables)).T
    return _Blocks(np.stack(list(tables.values())), rows, columns)


def distance_weights(
    counts: Float[np.ndarray, "head d x"], longest: Tensor, *, pool: int = 1
) -> Float[np.ndarray, "x"]:
    """Weight of a pair in each distance bin, so that every distance weighs the same."""
    edges = distance_edges(int(longest)).numpy()
    widths = np.diff(np.append(edges, int(longest) + 1))
    widths = np.add.reduceat(widths, np.arange(0, len(widths), pool)).astype(float)
    widths = np.pad(widths, (0, counts.shape[-1] - len(widths)))
    per_bin = counts[0].sum(0)
    return np.where(per_bin > 0, widths / np.where(per_bin > 0, per_bin, 1), 0.0)
