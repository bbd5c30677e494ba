"""What every process that counts a corpus has to know, and the counts as bytes to send."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from tqdm.auto import tqdm

from tl_posheads.accumulator import ScoreAccumulator
from tl_posheads.capture import rotary_hook_points
from tl_posheads.checkpoint import TableCheckpoint
from tl_posheads.corpora import corpus_provenance, load_corpus
from tl_posheads.inputs import by_content, documents_of, layers_of, pairs_to_draw
from tl_posheads.lens import require_clean, require_rotary
from tl_posheads.models import load_model
from tl_posheads.scoring import empty_accumulator, facts_of, plan_of, sweep
from tl_posheads.tables import LayerTable, Weighting

Units = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Job:
    """A corpus to score, as the caller asked.

    Attributes:
        model: name, hub id, folder or GGUF file.
        corpus: name or path, or the documents themselves.
        n_docs, length: documents to take of it and their tokens.
        layers, pairs, error, skip_first, seed: as in ``score_heads``.
        checkpoint: folder that all processes reach.
        model_options: of ``load_model``.
    """

    model: str
    corpus: str | Sequence[Tensor]
    n_docs: int
    length: int
    layers: Sequence[int] | None
    pairs: Weighting | Literal["auto"]
    error: float | None
    skip_first: int
    seed: int
    checkpoint: str | os.PathLike[str] | None
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def begin(self, device: Any = None) -> Begun:
        """Load the model and the corpus, and check both.

        Raises:
            PosheadsError: what ``load_model``, ``load_corpus`` and ``score_heads`` refuse.
        """
        pairs_to_draw(self.pairs, self.error, 1)
        options = dict(self.model_options)
        if device is not None and not {"device", "n_devices", "device_map"} & options.keys():
            options["device"] = device
        model = load_model(self.model, **options)
        require_rotary(model)
        require_clean(model)
        tokens: Any = self.corpus
        facts: dict[str, Any] = {}
        if isinstance(self.corpus, str):
            tokens = load_corpus(
                self.corpus, model, n_docs=self.n_docs, length=self.length, seed=self.seed
            )
            facts = {**corpus_provenance(self.corpus), "n_docs": self.n_docs}
        units = by_content(documents_of(model, tokens, None, self.skip_first))
        pairs = pairs_to_draw(self.pairs, self.error, len(units))
        with rotary_hook_points(model):
            accumulator = empty_accumulator(
                model, units, layers=layers_of(model, self.layers), pairs=pairs,
                skip_first=self.skip_first, exact=False, seed=self.seed,
            )  # fmt: skip
        plan = plan_of(model, accumulator, units)
        return Begun(model, units, accumulator, plan, {**facts_of(model, units), **facts}, self)


@dataclass
class Begun:
    """A process's model, and the documents and empty counts that all processes share."""

    model: Any
    units: Units
    accumulator: ScoreAccumulator
    plan: dict[str, Any]
    facts: dict[str, Any]
    job: Job

    def without_model(self) -> Begun:
        """The same for a process that counts nothing itself."""
        return replace(self, model=None)

    def count(
        self, units: Units, layers: Sequence[int], name: str = "", *, progress: bool = False
    ) -> dict[int, LayerTable]:
        """Tables of these documents, in the D bins of :attr:`accumulator`."""
        alone = self.accumulator.like()
        kept = TableCheckpoint(self.job.checkpoint, self.plan)
        total = len(units) * len(layers)
        with (
            rotary_hook_points(self.model),
            tqdm(total=total, desc="scoring", unit="layer", disable=not progress) as bar,
        ):
            sweep(self.model, alone, units, layers, kept, bar, name=name)
        for layer, grids in alone.grids.items():
            self.accumulator.grids.setdefault(layer, grids)
        return alone.tables


def to_bytes(table: LayerTable) -> bytes:
    return bytes(save_tensors(table.to_tensors()))


def from_bytes(content: bytes) -> LayerTable:
    return LayerTable.from_tensors(load_tensors(content))


def merged(tables: Iterable[bytes]) -> bytes:
    """One layer's tables, added up."""
    first, *others = map(from_bytes, tables)
    for other in others:
        first.merge(other)
    return to_bytes(first)
