"""One prompt under many ablations: the passes of a study, and nothing of its statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.heads import Head, by_layer
from tl_posheads.hooks.inputs import documents_of
from tl_posheads.hooks.logprobs import (
    Hooks,
    cached_prefix,
    require_finite_logprobs,
    rows_at_once,
    run_rows_from_layer,
)
from tl_posheads.hooks.model import (
    LensModel,
    attention_of,
    own_hooks,
    require_own_biases,
)
from tl_posheads.interventions.ablation import (
    Mode,
    ablation_hooks,
    check_mode,
    check_native,
    check_on,
    chosen_text,
    reference_too_short,
    reference_z,
    replacing,
)
from tl_posheads.tasks.base import Prompt
from tl_posheads.tasks.prompts import with_short

HeadSet = Sequence[Head]
Summary = Float[Tensor, "value=3 condition"]


@dataclass(eq=False)
class Trial:
    """A model, what an ablation puts in place of z, and passes over prompts with it.

    Attributes:
        digest: SHA-256 of the reference's tokens, None without one.
        fused: whether attention ran through fused kernels; known after the first pass.
    """

    model: LensModel
    mode: Mode
    documents: list[Int[Tensor, " pos"]]
    per_position: bool
    on: Literal["z", "pattern"]
    seed: int
    digest: str | None
    fused: bool | None = None
    values: dict[int, Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: LensModel,
        mode: Mode,
        reference: Any,
        per_position: bool,
        on: Literal["z", "pattern"],
        seed: int,
    ) -> Trial:
        """Check mode and reference; runs nothing."""
        check_mode(mode, reference, per_position)
        check_on(on, mode)
        check_native(model, range(int(model.cfg.n_layers)), on, placed=False)
        if mode == "zero":
            require_own_biases(model, range(model.cfg.n_layers), "zero-ablation")
        documents, digest = [], None
        if reference is not None:
            documents = documents_of(model, reference, None, 0)
            content = b"".join(document.numpy().tobytes() for document in documents)
            digest = hashlib.sha256(content).hexdigest()
        return cls(model, mode, documents, per_position, on, seed, digest)

    def require_reference(self, prompts: Mapping[str, Sequence[Prompt]], metrics: bool) -> None:
        """Refuse prompts that a reference used position by position doesn't cover.

        Args:
            metrics: some tasks have metrics of their own, for which they may generate text.
        """
        if not (self.documents and (self.per_position or self.mode == "resample")):
            return
        longest = max(len(x.tokens) for these in prompts.values() for x in with_short(these))
        shortest = min(map(len, self.documents))
        if shortest < longest:
            raise reference_too_short(longest, shortest)
        if metrics:
            raise PosheadsError(
                "a task with a metric of its own was given with an ablation by position; give mode "
                "'zero' or 'mean' without per_position: text that is generated has no positions in "
                "the reference"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """How heads are ablated, for a result."""
        return {
            "mode": self.mode,
            "on": self.on,
            "per_position": self.per_position,
            "seed": self.seed,
            "reference_sha256": self.digest,
        }

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

    def replacement(self, prompt: int) -> dict[int, Tensor | None]:
        """Replacement of z by layer; a resampled text is each prompt's own."""
        if self.mode != "resample":
            return self.values
        return {
            layer: None if v is None else v[chosen_text(len(v), 1, self.seed + prompt)[0]]
            for layer, v in self.values.items()
        }

    def hooks(self, rows: Sequence[HeadSet], prompt: int) -> Hooks:
        """Those that ablate a set of heads in every row of a batch."""
        places: dict[int, list[tuple[int, int]]] = {}
        for row, heads in enumerate(rows):
            for layer, head in heads:
                places.setdefault(layer, []).append((row, head))
        if self.on == "pattern":
            return [
                (f"blocks.{layer}.attn.hook_pattern", _no_pattern(places[layer]))
                for layer in sorted(places)
            ]
        values = self.replacement(prompt)
        return [
            (f"blocks.{layer}.attn.hook_z", _replaced(places[layer], values[layer]))
            for layer in sorted(places)
        ]

    def run(
        self,
        prompt: Prompt,
        number: int,
        sets: Sequence[HeadSet],
        tick: Callable[[int], Any],
        *,
        short: bool = True,
        evaluate: Callable[[LensModel, Prompt], float] | None = None,
    ) -> dict[str, Summary]:
        """``long`` and, where there is one, ``short``: log-probability, accuracy and exact match.

        Columns are the unablated pass and then the sets of heads. ``tick`` hears of the long ones.
        With ``evaluate`` its value stands for all three, on the long prompt alone.
        """
        if evaluate is not None:
            return {"long": self._evaluated(prompt, sets, tick, evaluate)}
        out = {}
        both = {"long": prompt, "short": prompt.short if short else None}
        with own_hooks(self._watchers()), fused_attention(self.model) as self.fused:
            for name, one in both.items():
                if one is not None:
                    told = tick if name == "long" else lambda n: None
                    out[name] = self._answered(one, number, sets, told)
        require_finite_logprobs(self.model, out.values())
        return out

    def _watchers(self) -> list[tuple[Any, Callable[..., None]]]:
        """Hooks that keep the pattern from being fused away, if the pattern is ablated."""
        points = self.model.hook_dict
        names = [name for name in points if name.endswith("attn.hook_pattern")]
        listen = lambda pattern, hook: None
        return [(points[name], listen) for name in names if self.on == "pattern"]

    def _answered(
        self, prompt: Prompt, number: int, sets: Sequence[HeadSet], tick: Callable[[int], Any]
    ) -> Summary:
        tokens, targets = prompt.tokens, prompt.targets
        prefix = cached_prefix(self.model, tokens, targets, sorted({_first(s) for s in sets}))
        tick(1)
        columns = torch.empty(3, 1 + len(sets), dtype=torch.float64)
        columns[:, 0] = _summary(prefix.logprob, prefix.hit)
        at_once = rows_at_once(self.model, len(tokens), len(targets))
        for layer, chunk in _batches(sets, at_once):
            hooks = self.hooks([sets[i] for i in chunk], number)
            found = run_rows_from_layer(
                self.model, tokens, targets, prefix, layer, hooks, len(chunk)
            )
            for i, logprob, hit in zip(chunk, *found, strict=True):
                columns[:, 1 + i] = _summary(logprob, hit)
            tick(len(chunk))
        return columns

    def _evaluated(
        self,
        prompt: Prompt,
        sets: Sequence[HeadSet],
        tick: Callable[[int], Any],
        evaluate: Callable[[LensModel, Prompt], float],
    ) -> Summary:
        values, points = [], self.model.hook_dict
        for heads in [(), *sets]:
            with own_hooks([(points[name], hook) for name, hook in self._everywhere(heads)]):
                values.append(evaluate(self.model, prompt))
            tick(1)
        return torch.tensor(values, dtype=torch.float64).expand(3, -1).clone()

    def _everywhere(self, heads: HeadSet) -> Hooks:
        """Hooks that ablate all rows and positions, for a task that calls the model itself."""
        if self.mode == "zero":
            return ablation_hooks(self.model, heads, on=self.on)
        hooks = []
        for layer, members in by_layer(heads).items():
            mean = self.values[layer]
            assert mean is not None
            hooks.append((f"blocks.{layer}.attn.hook_z", replacing(members, mean[members])))
        return hooks


def _first(heads: HeadSet) -> int:
    return min(layer for layer, _ in heads)


def _batches(sets: Sequence[HeadSet], at_once: int) -> Iterator[tuple[int, list[int]]]:
    """Numbers of the sets that begin at the same layer, so many at a time."""
    order = sorted(range(len(sets)), key=lambda i: _first(sets[i]))
    for layer, members in groupby(order, key=lambda i: _first(sets[i])):
        these = list(members)
        for start in range(0, len(these), at_once):
            yield layer, these[start : start + at_once]


def _replaced(places: Sequence[tuple[int, int]], values: Tensor | None) -> Callable[..., Tensor]:
    """Put ``values``, ``[head, d_head]`` or ``[pos, head, d_head]``, or zero, in rows' heads."""
    rows, heads = (torch.tensor(x) for x in zip(*places, strict=True))

    def hook(z: Float[Tensor, "row pos head d_head"], hook: Any) -> Tensor:
        new = torch.zeros((), dtype=z.dtype, device=z.device)
        if values is not None:
            new = values.to(z)[..., heads.to(z.device), :]
            new = new[: z.shape[1]].transpose(0, 1) if new.ndim == 3 else new[:, None]
        out = z.clone()
        out[rows.to(z.device), :, heads.to(z.device)] = new
        return out

    return hook


def _no_pattern(places: Sequence[tuple[int, int]]) -> Callable[..., Tensor]:
    rows, heads = (torch.tensor(x) for x in zip(*places, strict=True))

    def hook(pattern: Float[Tensor, "row head q_pos k_pos"], hook: Any) -> Tensor:
        out = pattern.clone()
        out[rows.to(pattern.device), heads.to(pattern.device)] = 0
        return out

    return hook


def _summary(logprob: Float[Tensor, " target"], hit: Tensor) -> Float[Tensor, "3"]:
    share = hit.double().mean()
    return torch.stack([logprob.double().mean(), share, (share == 1).double()])
