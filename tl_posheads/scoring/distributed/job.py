"""The job description shared by all processes that measure a corpus."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from tl_posheads.hooks.capture import rotary_hook_points
from tl_posheads.hooks.inputs import by_content, documents_of, layers_of
from tl_posheads.hooks.model import require_clean, require_rotary
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.io.corpora import corpus_provenance, load_corpus
from tl_posheads.io.models import load_model
from tl_posheads.rotary.contributions import Scale
from tl_posheads.scoring.accumulator import ScoreAccumulator
from tl_posheads.scoring.all_pairs import Weighting
from tl_posheads.scoring.draws import Settings
from tl_posheads.scoring.head_scores import HeadScores
from tl_posheads.scoring.score import Units, empty_accumulator, facts_of, plan_of, sweep

Rows = dict[str, dict[int, Tensor]]  # document -> layer -> [measure, head]


@dataclass(frozen=True)
class Job:
    """A corpus to score, with the caller's settings.

    Attributes:
        model: name, hub id, folder or GGUF file.
        corpus: name or path, or the documents themselves.
        n_docs, length: number of documents, and tokens per document.
        layers, qk_pairs, weighting, scale, target_se, skip_first, seed: as in ``score_heads``.
        checkpoint: folder that all processes can access.
        model_options: for ``load_model``.
    """

    model: str
    corpus: str | Sequence[Tensor]
    n_docs: int
    length: int
    layers: Sequence[int] | None
    qk_pairs: Literal["auto", "all"] | int
    weighting: Weighting
    scale: Scale
    target_se: float
    skip_first: int
    seed: int
    checkpoint: str | os.PathLike[str] | None
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, n_documents: int) -> Settings:
        return Settings.of(
            self.qk_pairs,
            n_documents,
            target_se=self.target_se,
            weighting=self.weighting,
            scale=self.scale,
            skip_first=self.skip_first,
            seed=self.seed,
        )

    def begin(self, device: Any = None) -> Begun:
        """Load the model and the corpus, and check both.

        Raises:
            PosheadsError: whatever ``load_model``, ``load_corpus`` and ``score_heads`` refuse.
        """
        self.settings(1)
        options = dict(self.model_options)
        if device is not None and not {"device", "n_devices", "device_map"} & options.keys():
            options["device"] = device
        model = load_model(self.model, **options)
        require_rotary(model)
        require_clean(model)
        tokens: Any = self.corpus
        facts: dict[str, Any] = {"qk_pairs": self.qk_pairs}
        if isinstance(self.corpus, str):
            tokens = load_corpus(
                self.corpus, model, n_docs=self.n_docs, length=self.length, seed=self.seed
            )
            facts |= {**corpus_provenance(self.corpus), "n_docs": self.n_docs}
        units = by_content(documents_of(model, tokens, None, self.skip_first))
        layers, settings = layers_of(model, self.layers), self.settings(len(units))
        with rotary_hook_points(model):
            accumulator = empty_accumulator(model, units, layers, settings)
        plan = plan_of(model, accumulator, units)
        return Begun(model, units, accumulator, plan, {**facts_of(model, units), **facts}, self)


@dataclass
class Begun:
    """A process's model, and the state that all processes share."""

    model: Any  # None in a process that measures nothing
    units: Units
    accumulator: ScoreAccumulator
    plan: dict[str, Any]
    facts: dict[str, Any]
    job: Job

    def without_model(self) -> Begun:
        """The same for a process that measures nothing itself."""
        return replace(self, model=None)

    def measured(self, units: Units, *, progress: bool = False) -> Rows:
        """Rows of these documents."""
        alone = self.accumulator.like()
        kept = Checkpoint(self.job.checkpoint, self.plan)
        with rotary_hook_points(self.model):
            sweep(self.model, alone, units, kept, progress=progress)
        return alone.rows

    def scores(self, rows: Rows, engine: str) -> HeadScores:
        """The scores of all documents, from everyone's rows."""
        self.accumulator.rows.update(rows)
        return self.accumulator.scores({**self.facts, "engine": engine})
