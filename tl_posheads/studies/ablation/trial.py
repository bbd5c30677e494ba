"""One prompt under many ablations: the passes of a study, and nothing of its statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.heads import by_layer
from tl_posheads.hooks.inputs import documents_of
from tl_posheads.hooks.logprobs import Hooks, cached_prefix, run_from_layer
from tl_posheads.hooks.model import LensModel, attention_of, model_name, require_own_biases
from tl_posheads.interventions.ablation import (
    Mode,
    check_mode,
    chosen_text,
    reference_too_short,
    reference_z,
    replacing,
)
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.studies.ablation.conditions import Condition
from tl_posheads.studies.ablation.controls import Head
from tl_posheads.studies.ablation.screen import head_effects
from tl_posheads.tasks.base import Prompt


@dataclass(eq=False)
class Trial:
    """A model, what an ablation puts in the place of z, and passes over prompts with it.

    Attributes:
        digest: SHA-256 of the reference's tokens, None without one.
        fused: whether attention ran through fused kernels; known after the first pass.
    """

    model: LensModel
    mode: Mode
    documents: list[Int[Tensor, "pos"]]
    per_position: bool
    seed: int
    digest: str | None
    fused: bool | None = None
    values: dict[int, Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: LensModel, mode: Mode, reference: Any, per_position: bool, seed: int
    ) -> Trial:
        """Check mode and reference; runs nothing."""
        check_mode(mode, reference, per_position)
        if mode == "zero":
            require_own_biases(model, range(model.cfg.n_layers), "zero-ablation")
        documents, digest = [], None
        if reference is not None:
            documents = documents_of(model, reference, None, 0)
            content = b"".join(document.numpy().tobytes() for document in documents)
            digest = hashlib.sha256(content).hexdigest()
        return cls(model, mode, documents, per_position, seed, digest)

    def require_reference(self, length: int) -> None:
        """Refuse prompts that a reference used position by position doesn't cover."""
        if self.documents and (self.per_position or self.mode == "resample"):
            shortest = min(map(len, self.documents))
            if shortest < length:
                raise reference_too_short(length, shortest)

    def prepare(self) -> None:
        """Run the reference texts."""
        n_heads = int(self.model.cfg.n_heads)
        layers = {
            layer: list(range(n_heads))
            for layer in range(self.model.cfg.n_layers)
            if attention_of(self.model, layer) is not None
        }
        with fused_attention(self.model):
            self.values = reference_z(
                self.model, layers, self.documents, self.mode, self.per_position
            )

    def hooks(self, heads: Sequence[Head], prompt: int) -> Hooks:
        """Those that ablate ``heads``; a resampled text is each prompt's own."""
        out = []
        for layer, members in by_layer(heads).items():
            value = self.values[layer]
            mine = None if value is None else value[..., members, :]
            hook = replacing(members, mine, seed=self.seed + prompt)
            out.append((f"blocks.{layer}.attn.hook_z", hook))
        return out

    def run(
        self, prompt: Prompt, number: int, conditions: Sequence[Condition], bar: Any
    ) -> dict[str, Float[Tensor, "3 condition"]]:
        """``long`` and, where there is one, ``short``: log-probability, accuracy and exact match.

        Columns are the unablated pass and then the conditions. The bar counts the long ones.
        """
        out = {}
        variants = {"long": prompt, "short": prompt.short}
        given = {name: one for name, one in variants.items() if one is not None}
        firsts = sorted({condition.first_layer for condition in conditions})
        with fused_attention(self.model) as self.fused:
            for name, one in given.items():
                prefix = cached_prefix(self.model, one.tokens, one.targets, firsts)
                columns = [_summary(prefix.logprob, prefix.hit)]
                for condition in conditions:
                    columns.append(
                        _summary(
                            *run_from_layer(
                                self.model,
                                one.tokens,
                                one.targets,
                                prefix,
                                condition.first_layer,
                                self.hooks(condition.heads, number),
                            )
                        )
                    )
                    bar.update(name == "long")
                out[name] = torch.stack(columns, 1)
        bar.update(1)
        self._require_finite(out)
        return out

    def screened(
        self, prompt: Prompt, number: int, unit: str, kept: Checkpoint
    ) -> dict[str, Tensor]:
        """Estimated effects ``[layer, head]`` of each variant, and ``norms``; kept as ``unit``."""
        found = kept.read(unit)
        if found is not None:
            return found
        out = {}
        with fused_attention(self.model):
            for name, one in (("long", prompt), ("short", prompt.short)):
                if one is None:
                    continue
                values = self.values
                if self.mode == "resample":
                    values = {
                        layer: None
                        if v is None
                        else v[chosen_text(len(v), 1, self.seed + number)[0]]
                        for layer, v in values.items()
                    }
                effects = head_effects(self.model, one.tokens, one.targets, values)
                out[name] = effects.effects
                out.setdefault("norms", effects.norms)
        kept.write(unit, out)
        return out

    def _require_finite(self, results: dict[str, Tensor]) -> None:
        if not all(bool(torch.isfinite(table).all()) for table in results.values()):
            raise PosheadsError(
                f"{model_name(self.model)} gives NaN or infinite log-probabilities; load it with "
                "dtype float32 or bfloat16"
            )


def _summary(logprob: Float[Tensor, "target"], hit: Tensor) -> Float[Tensor, "3"]:
    share = hit.double().mean()
    return torch.stack([logprob.double().mean(), share, (share == 1).double()])
