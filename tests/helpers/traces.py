"""What hooks could leave behind in a model."""

from __future__ import annotations

import torch

TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def warm(model):
    """The lens fills tables of its own in its first passes; those are none of our traces."""
    with torch.no_grad():
        model.run_with_cache(TOKENS)
        model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", lambda value, hook: None)])
        model.hook_dict  # noqa: B018
    return model


def state(model):
    """Everything that hooks and wrappers could leave behind."""
    out = {}
    for name, module in model.named_modules():
        hooks = [getattr(module, a) for a in ("_forward_hooks", "_forward_pre_hooks")]
        out[name] = ([len(h) for h in hooks], sorted(k for k in module.__dict__ if k != "ctx"))
    points = {name: len(p.fwd_hooks) + len(p.bwd_hooks) for name, p in model.hook_dict.items()}
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    return out, points, weights


def assert_same(before, after):
    for name in before[0]:
        assert before[0][name] == after[0][name], name
    assert before[1] == after[1]
    assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])
