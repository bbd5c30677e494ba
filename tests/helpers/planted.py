"""Small Llamas with weights set by hand, in which it is known which heads retrieve.

The residual stream has named coordinates: two flags (a needle, the question), a one-hot code of
the needle's value, a one-hot code of the answer, and the rest, which is noise. A retrieving head
looks from the question to the needle and copies the value's code to the answer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from helpers import architectures, small_models
from helpers.scores_by_hand import head_scores
from tl_posheads import HeadScores
from tl_posheads.tasks.base import Prompt

N_VALUES = 10
BOS, NEEDLE, QUESTION, ANSWER, FILLER = 1, 3, 13, 14, 24  # the first token of each kind
CHANCE = float(-np.log(N_VALUES))  # of an answer, once it is known that one must follow

_D_HEAD = 16
_IS_NEEDLE, _IS_QUESTION, _VALUE, _OUT = 0, 1, 2, 2 + N_VALUES  # coordinates
_NOISE = _OUT + N_VALUES  # and all that follow
_SLOWEST = _D_HEAD // 2 - 1  # the first coordinate of the slowest rotary pair
_LOOK = 9.0  # a needle's pre-softmax score: e^9 beside some hundred fillers


def _blank(n_layers: int, n_heads: int, seed: int) -> tuple[Any, torch.Generator]:
    """A Llama with embedding and unembedding in place and all layers zero."""
    if n_heads * _D_HEAD < 2 * _NOISE:
        raise ValueError(f"n_heads={n_heads} leaves no room for the codes; at least 3 are needed")
    config = transformers.LlamaConfig(
        vocab_size=architectures.N_VOCAB,
        hidden_size=n_heads * _D_HEAD,
        intermediate_size=16,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        max_position_embeddings=2048,
        bos_token_id=BOS,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        # The slowest pair turns by 1e-7 a token: the planted look is the same at every distance.
        rope_parameters=dict(rope_type="default", rope_theta=1e8),
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        embed, unembed = model.model.embed_tokens.weight, model.lm_head.weight
        noise = torch.randn(embed[:, _NOISE:].shape, generator=generator)
        # What all tokens share doesn't average out over the text that a head looks at evenly.
        noise = noise / noise.norm(dim=1, keepdim=True) + noise[:1] / noise[:1].norm()
        embed[:, _NOISE:] = noise / 2**0.5
        # The last norm's output has length sqrt(d_model). With this an answer's probability is
        # about 0.9: a surer model would hide small harm.
        sure = 8.0 / (n_heads * _D_HEAD) ** 0.5
        for v in range(N_VALUES):
            embed[NEEDLE + v, _IS_NEEDLE] = embed[NEEDLE + v, _VALUE + v] = 1.0
            unembed[ANSWER + v, _OUT + v] = unembed[ANSWER + v, _IS_QUESTION] = sure
        embed[QUESTION, _IS_QUESTION] = 1.0
    model.config.architectures = ["LlamaForCausalLM"]
    model.set_attn_implementation("eager")
    return model.eval(), generator


def _retrieve(model: Any, layer: int, head: int, strength: float) -> None:
    """Make one head retrieve; ``strength`` is what it writes to the answer's coordinate."""
    attention = model.model.layers[layer].self_attn
    rows = slice(head * _D_HEAD, (head + 1) * _D_HEAD)
    # A token's embedding has length sqrt(2) or so, and the norm scales it to sqrt(d_model): a
    # flag reads about this much.
    flag = (model.config.hidden_size / 3) ** 0.5
    look = (_LOOK * _D_HEAD**0.5) ** 0.5 / flag
    q, k, v, o = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
    with torch.no_grad():
        for weight in (q, k, v):
            weight[rows] = 0.0
        o[:, rows] = 0.0
        q[rows][_SLOWEST, _IS_QUESTION] = look
        k[rows][_SLOWEST, _IS_NEEDLE] = look
        for value in range(N_VALUES):
            v[rows][value, _VALUE + value] = 1 / flag
            o[:, rows][_OUT + value, value] = strength


def _idle(model: Any, layer: int, head: int, pairs: Sequence[int]) -> None:
    """Slow rotary pairs of the retrieving head that add the same to all keys' scores.

    Their queries are as long as the looking pair's. So are their keys on average over a text of 24
    tokens, where the looking pair's are long at the needle and nothing elsewhere.
    """
    attention = model.model.layers[layer].self_attn
    rows = slice(head * _D_HEAD, (head + 1) * _D_HEAD)
    q, k = (getattr(attention, f"{name}_proj").weight[rows] for name in "qk")
    common = model.model.embed_tokens.weight[:, _NOISE:].mean(0)  # what all tokens share
    with torch.no_grad():
        for pair in pairs:
            q[pair] = q[_SLOWEST]
            k[pair, _NOISE:] = 0.37 * common / (model.config.hidden_size / 2) ** 0.5


def planted_retriever(
    n_layers: int = 8,
    n_heads: int = 16,
    planted: tuple[int, int] = (3, 5),
    seed: int = 0,
    idle: Sequence[int] = (),
) -> Any:
    """A Bridge in which the planted head retrieves and every other one adds a little noise.

    The other heads read everything but the value's code, so that they cannot retrieve; what they
    write shifts the answers' logits at random, to harm or good. The planted head looks with its
    slowest rotary pair; ``idle`` ones are about as long and do nothing.
    """
    model, generator = _blank(n_layers, n_heads, seed)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in "qkvo":
                weight = getattr(layer.self_attn, f"{name}_proj").weight
                weight.normal_(0.0, 0.5 * weight.shape[1] ** -0.5, generator=generator)
            layer.self_attn.v_proj.weight[:, _VALUE:_OUT] = 0.0
            layer.self_attn.o_proj.weight.mul_(0.1)
            # No head may write what the planted one looks for.
            layer.self_attn.o_proj.weight[:_OUT] = 0.0
    _retrieve(model, *planted, strength=1.0)
    _idle(model, *planted, idle)
    return small_models.bridge(model, "planted-retriever")


def equal_heads(n_layers: int = 2, n_heads: int = 16) -> Any:
    """A Bridge whose heads are copies of each other within a layer and retrieve together.

    The first layer's heads write most and the last one's least: the effect of ablating a set of
    heads depends on how many are of which layer, and on nothing else.
    """
    model, _ = _blank(n_layers, n_heads, seed=0)
    share = np.arange(n_layers, 0, -1.0) / np.arange(1, n_layers + 1).sum()
    for layer in range(n_layers):
        for head in range(n_heads):
            _retrieve(model, layer, head, strength=float(share[layer]) / n_heads)
    return small_models.bridge(model, "equal-heads")


@dataclass(frozen=True)
class Retrieval:
    """Filler, one needle somewhere in it, the question, and the needle's value as the answer.

    Attributes:
        n: prompts; the values take turns.
        length: tokens of a prompt, the answer included.
        short_length: tokens of its short-context control.
        seed: of fillers and depths.
    """

    n: int = 20
    length: int = 64
    short_length: int = 8
    seed: int = 0
    name: str = "planted-retrieval"

    def _prompt(self, length: int, value: int, generator: np.random.Generator) -> dict[str, Any]:
        tokens = generator.integers(FILLER, architectures.N_VOCAB, length)
        at = int(generator.integers(1, length - 2))
        tokens[0], tokens[at], tokens[-2:] = BOS, NEEDLE + value, (QUESTION, ANSWER + value)
        facts = {"depth": (at - 1) / max(1, length - 4), "distance": length - 2 - at}
        return dict(tokens=torch.as_tensor(tokens), targets=torch.tensor([length - 1]), facts=facts)

    def prompts(self, model: Any) -> list[Prompt]:
        generator = np.random.default_rng(self.seed)
        out = []
        for i in range(self.n):
            long, short = (
                self._prompt(length, i % N_VALUES, generator)
                for length in (self.length, self.short_length)
            )
            out.append(Prompt(**long, short=Prompt(**short)))
        return out


def scores_with_top(model: Any, heads: Sequence[tuple[int, int]], seed: int = 0) -> HeadScores:
    """Scores by hand: the given heads are the best ones in this order, the others' are random."""
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    generator = torch.Generator().manual_seed(seed)
    rho = 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.3
    for i, head in enumerate(heads):
        rho[head] = 0.9 - 0.3 * i / len(heads)
    return head_scores(rho, provenance={"model": model.cfg.model_name})
