"""One small decoder for every positional encoding: nothing but the encoding differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

ENCODINGS = ("rope", "partial_rope", "alibi", "sinusoidal", "learned", "t5", "nope")
THETA = 10000.0
T5_BUCKETS, T5_FARTHEST = 32, 128  # T5's own (Raffel et al. 2020, arXiv 1910.10683)

QK = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Shape:
    """Sizes of the decoder; ``n_ctx`` is the longest text that it's trained on."""

    n_vocab: int = 1024
    d_model: int = 128
    n_heads: int = 4
    d_head: int = 32
    n_layers: int = 3
    d_mlp: int = 512
    n_ctx: int = 256


def inv_freq(rotary_dim: int) -> Float[Tensor, " pair"]:
    """Radians per token of each rotary pair (Su et al. 2021, arXiv 2104.09864)."""
    return THETA ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def rotate(
    x: Float[Tensor, "batch pos head d_head"], position: Int[Tensor, " pos"], rotary_dim: int
) -> Float[Tensor, "batch pos head d_head"]:
    """RoPE on the first ``rotary_dim`` coordinates, in Llama's half-split layout."""
    angle = position.double()[:, None] * inv_freq(rotary_dim)
    cos, sin = (f[:, None].to(x.dtype) for f in (angle.cos(), angle.sin()))
    half = rotary_dim // 2
    a, b, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def sinusoids(position: Int[Tensor, " pos"], d_model: int) -> Float[Tensor, "pos d_model"]:
    """Vaswani et al. 2017 (arXiv 1706.03762), section 3.5: sines and cosines in turn."""
    angle = position.double()[:, None] * inv_freq(d_model)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


def alibi_slopes(n_heads: int) -> Float[Tensor, " head"]:
    """Press et al. 2022 (arXiv 2108.12409): ``2^(-8/n), 2^(-16/n), ...``."""
    return 2.0 ** (-8.0 * torch.arange(1, n_heads + 1) / n_heads)


def t5_bucket(distance: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """T5's bucket of a distance to a token before: half of them single, then logarithmic."""
    exact = T5_BUCKETS // 2
    share = torch.log(distance.clamp_min(1) / exact) / math.log(T5_FARTHEST / exact)
    far = exact + (share * (T5_BUCKETS - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=T5_BUCKETS - 1))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.n_heads * shape.d_head
        self.norm_attn, self.norm_mlp = nn.RMSNorm(shape.d_model), nn.RMSNorm(shape.d_model)
        self.qkv = nn.Linear(shape.d_model, 3 * width, bias=False)
        self.out = nn.Linear(width, shape.d_model, bias=False)
        self.up = nn.Linear(shape.d_model, shape.d_mlp, bias=False)
        self.down = nn.Linear(shape.d_mlp, shape.d_model, bias=False)


class SmallDecoder(nn.Module):
    """A pre-norm decoder with tied embeddings and one of :data:`ENCODINGS`.

    Scores are scaled by ``d_head**-0.5`` under every encoding, T5's too.

    Args:
        encoding: one of :data:`ENCODINGS`; ``"partial_rope"`` turns the first half of a head.
        shape: sizes.
        std: of the initial weights.
    """

    def __init__(self, encoding: str, shape: Shape | None = None, std: float = 0.06) -> None:
        super().__init__()
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding={encoding!r} was given; expected one of {ENCODINGS}")
        self.encoding, self.shape = encoding, shape or Shape()
        sizes = self.shape
        self.embed = nn.Embedding(sizes.n_vocab, sizes.d_model)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.n_layers))
        self.norm = nn.RMSNorm(sizes.d_model)
        with torch.no_grad():
            for weight in self.parameters():
                if weight.ndim == 2:
                    weight.normal_(0.0, std)
            # A direction that all tokens share: heads find "the token before" sooner with it.
            self.embed.weight.add_(std * torch.randn(sizes.d_model))
        # The encodings' own weights come last: what comes before is the same under every encoding.
        if encoding == "learned":
            # Half as large as the embedding, as GPT-2 begins.
            scale = std * sizes.d_model**0.5 / 2
            self.positions = nn.Parameter(scale * torch.randn(sizes.n_ctx, sizes.d_model))
        if encoding == "t5":
            self.relative = nn.Parameter(torch.zeros(T5_BUCKETS, sizes.n_heads))

    @property
    def rotary_dim(self) -> int:
        whole = self.shape.d_head
        return {"rope": whole, "partial_rope": whole // 2}.get(self.encoding, 0)

    def bias(self, n: int) -> Float[Tensor, "head distance"] | None:
        """What the encoding adds to a scaled score at distances 0 to ``n - 1``; None if nothing."""
        distance = torch.arange(n)
        if self.encoding == "alibi":
            return -alibi_slopes(self.shape.n_heads)[:, None] * distance
        if self.encoding == "t5":
            return self.relative[t5_bucket(distance)].T
        return None

    def _mask(self, n: int) -> Float[Tensor, "head pos pos"] | None:
        bias = self.bias(n)
        if bias is None:
            return None
        distance = torch.arange(n)[:, None] - torch.arange(n)
        return bias[:, distance.clamp_min(0)].masked_fill(distance < 0, float("-inf"))

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        offset: int = 0,
        on_qk: QK | None = None,
        without: Mapping[int, Sequence[int]] | None = None,
    ) -> Float[Tensor, "batch pos n_vocab"]:
        """Logits.

        Args:
            tokens: texts of equal length.
            offset: position of the first token.
            on_qk: gets ``(layer, q, k)``, each ``[batch, pos, head, d_head]``, as they are
                multiplied.
            without: layer to heads whose outputs are set to zero.
        """
        sizes, n = self.shape, tokens.shape[1]
        position = torch.arange(offset, offset + n)
        x = self.embed(tokens) * sizes.d_model**0.5
        if self.encoding == "learned":
            x = x + self.positions[position]
        if self.encoding == "sinusoidal":
            x = x + sinusoids(position, sizes.d_model)
        mask = self._mask(n)
        for layer, block in enumerate(self.blocks):
            qkv = block.qkv(block.norm_attn(x)).view(*x.shape[:2], 3, sizes.n_heads, sizes.d_head)
            q, k, v = qkv.unbind(2)
            if self.rotary_dim:
                q, k = (rotate(y, position, self.rotary_dim) for y in (q, k))
            if on_qk is not None:
                on_qk(layer, q, k)
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            z = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            if without and layer in without:
                kept = torch.ones(sizes.n_heads)
                kept[list(without[layer])] = 0.0
                z = z * kept[:, None, None]
            x = x + block.out(z.transpose(1, 2).flatten(2))
            x = x + block.down(gelu(block.up(block.norm_mlp(x))))
        return self.norm(x) @ self.embed.weight.T
