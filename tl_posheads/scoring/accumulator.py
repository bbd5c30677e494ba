"""Collect measures over texts and layers from any forward passes, and turn them into scores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.capture import hook_names
from tl_posheads.hooks.inputs import require_finite, token_run
from tl_posheads.hooks.rotary_geometry import RotaryGeometry
from tl_posheads.rotary.contributions import Scale
from tl_posheads.rotary.geometry import LayerGeometry
from tl_posheads.scoring.all_pairs import Weighting
from tl_posheads.scoring.draws import DocumentDraws, Settings, measure

if TYPE_CHECKING:
    from tl_posheads.scoring.head_scores import HeadScores

Consumer = Callable[[int, Tensor, Tensor], None]


class ScoreAccumulator:
    """Score heads from your own forward passes, as :func:`tl_posheads.score_heads` does.

    Use ``fwd_hooks`` with ``model.run_with_hooks``, or ``update_from_cache`` with a cache from
    ``model.run_with_cache(tokens, names_filter=accumulator.names_filter)``. Models whose hooks
    don't fire by themselves (GPT-NeoX, GPT-J, Phi-3, Falcon on the Bridge) need
    ``rotary_hook_points(model)`` around it. Every row of a batch is a separate document. A
    document that occurs twice counts once.

    Where the frequencies depend on a text's length, give texts of the length that the geometry was
    measured at, and run the passes inside a context of :mod:`tl_posheads.extrapolation`
    (``Unchanged()`` leaves the model as it is): outside, transformers keeps using those of the
    longest text so far.

    Args:
        geometry: the model's geometry.
        layers: layers to measure (default: all that have RoPE).
        qk_pairs: number to draw in every document, or ``"all"``. 5,000 keep the sampling error
            under 0.005 in the mean over 16 documents.
        weighting, scale, skip_first, seed: as in ``score_heads``.

    Attributes:
        rows: measures ``[measure, head]`` by document and layer.

    Raises:
        PosheadsError: arguments that ``score_heads`` refuses.

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
        qk_pairs: int | Literal["all"] = 5000,
        weighting: Weighting = "pair",
        scale: Scale = "none",
        skip_first: int = 0,
        seed: int = 0,
    ) -> None:
        settings = Settings.of(
            qk_pairs, 16, weighting=weighting, scale=scale, skip_first=skip_first, seed=seed
        )
        self._begin(geometry, range(geometry.n_layers) if layers is None else layers, settings)

    def _begin(self, geometry: RotaryGeometry, layers: Sequence[int], settings: Settings) -> None:
        self.geometry, self.settings = geometry, settings
        # Pair indices need at least two pairs to have an order; layers without RoPE have none.
        self.layers = [layer for layer in sorted(set(layers)) if geometry[layer].n_pairs > 1]
        self.rows: dict[str, dict[int, Float[Tensor, "measure head"]]] = {}

    @classmethod
    def of(
        cls, geometry: RotaryGeometry, layers: Sequence[int], settings: Settings
    ) -> ScoreAccumulator:
        """An accumulator with settings that are already checked."""
        new = cls.__new__(cls)
        new._begin(geometry, layers, settings)
        return new

    def like(self) -> ScoreAccumulator:
        """An empty accumulator with the same settings."""
        return ScoreAccumulator.of(self.geometry, self.layers, self.settings)

    @property
    def names_filter(self) -> list[str]:
        """``names_filter`` for ``run_with_cache``, for use with :meth:`update_from_cache`."""
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
        """Measure a batch from an ``ActivationCache``.

        Raises:
            PosheadsError: the cache lacks a hook name; nothing is measured then.
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
        """Names of the texts, from their embeddings, which identify their tokens."""
        rows = embedded.detach()[..., :8].float().cpu()
        runs = self._runs(rows, mask)
        return [
            hashlib.sha256(row[run].contiguous().numpy().tobytes()).hexdigest()[:24]
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

    def consumer(self, document: str, geometry: RotaryGeometry | None = None) -> Consumer:
        """A ``consumer`` for ``capture_rotary`` that measures the layers of one text.

        Args:
            document: the text's name, as in :meth:`update`.
            geometry: the model's at the text's length, where its frequencies depend on it.
        """
        geometry, settings = geometry or self.geometry, self.settings
        draws: list[DocumentDraws] = []

        def measure_layer(layer: int, rot_q: Tensor, rot_k: Tensor) -> None:
            q, k = rot_q[0, settings.skip_first :], rot_k[0, settings.skip_first :]
            if not draws:
                draws.append(DocumentDraws(document, q.shape[0], settings))
            self._measure(layer, q, k, geometry[layer].after(settings.skip_first), draws[0])

        return measure_layer

    def update(
        self,
        layer: int,
        rot_q: Float[Tensor, "batch pos head d_head"],
        rot_k: Float[Tensor, "batch pos kv_head d_head"],
        documents: Sequence[str],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> None:
        """Measure one layer of a batch.

        Args:
            documents: names of its texts; together with the seed they determine the draws.

        Raises:
            PosheadsError: NaN or infinity, by layer and head; a text too short for ``skip_first``,
                or of a length other than the geometry's, where that matters.
        """
        first, length = self.settings.skip_first, self.geometry.length
        lengths = {run.stop - run.start for run in self._runs(rot_q, attention_mask)}
        if length is not None and lengths != {length}:
            raise PosheadsError(
                f"texts of {sorted(lengths)} tokens were given, but the geometry is that of "
                f"{length}, and the frequencies of {self.geometry.model_name} depend on the "
                "length; measure it with RotaryGeometry.from_model(model, length=...) and give "
                "texts of that length, or use score_heads"
            )
        geometry = self.geometry[layer].after(first)
        for i, run in enumerate(self._runs(rot_q, attention_mask)):
            q, k = rot_q[i, run][first:], rot_k[i, run][first:]
            if q.shape[0] < 2:
                raise PosheadsError(
                    f"a text of {q.shape[0]} positions (after skip_first={first}) was given; a "
                    "pair of tokens needs at least 2"
                )
            draws = DocumentDraws(documents[i], q.shape[0], self.settings)
            self._measure(layer, q, k, geometry, draws)

    def _measure(
        self, layer: int, q: Tensor, k: Tensor, geometry: LayerGeometry, draws: DocumentDraws
    ) -> None:
        if q.device.type == "mps":  # it has no float64
            q, k = q.cpu(), k.cpu()
        require_finite(layer, q, k, geometry.kv_head)
        self.rows.setdefault(draws.name, {})[layer] = measure(q, k, geometry, draws).cpu()

    def merge(self, other: ScoreAccumulator) -> None:
        """Add the rows of ``other`` to these.

        Raises:
            PosheadsError: it has other settings or layers; nothing is added then.
        """
        if (self.settings, self.layers) != (other.settings, other.layers):
            raise PosheadsError(
                "these accumulators can't be merged: they have other settings or layers; make one "
                "from the other with like() before measuring"
            )
        for document, layers in other.rows.items():
            self.rows.setdefault(document, {}).update(layers)

    def scores(self, provenance: Mapping[str, Any] | None = None) -> HeadScores:
        """The scores from everything measured so far.

        Raises:
            PosheadsError: nothing was measured yet.
        """
        from tl_posheads.scoring.head_scores import HeadScores

        if not self.rows:
            raise PosheadsError("nothing was measured yet; run a forward pass with fwd_hooks first")
        return HeadScores.from_rows(self.rows, self.geometry, self.settings, provenance or {})
