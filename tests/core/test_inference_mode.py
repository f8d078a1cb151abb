"""Inference mode marks tensors that may not be written outside it; a cache must not be made of such."""

import torch

import kvtiers


def _filled(policy: kvtiers.Policy, *, forked: bool) -> kvtiers.TieredCache:
    rotary = kvtiers.Rotary([torch.tensor([1.0, 0.1])])
    cache = kvtiers.TieredCache(policy, [kvtiers.Geometry(kv_heads=1, head_dim=4)], rotaries=[rotary])
    with torch.inference_mode():
        for _ in range(3):
            part = torch.randn(2, 1, 24, 4)
            for chunk in cache.layers[0].chunks(part, part, part):
                assert chunk.context.keys.shape[2] > 0
        cache.select_rows(torch.tensor([1, 0]))
        return cache.fork() if forked else cache


def test_a_cache_filled_in_inference_mode_goes_on_outside_it_and_with_gradients() -> None:
    for name in ("full", "sliding-window", "streaming", "archive", "packforcing-lm"):
        sizes = {} if name == "full" else {"recent": 8, "block_size": 4, "chunk_size": 8}
        for forked in (False, True):
            cache = _filled(kvtiers.policy(name, **sizes), forked=forked)
            with torch.no_grad():
                part = torch.randn(2, 1, 20, 4)
                assert [chunk.query.shape[2] for chunk in cache.layers[0].chunks(part, part, part)]
            part = torch.randn(2, 1, 4, 4, requires_grad=True)
            for chunk in cache.layers[0].chunks(part, part, part):
                (chunk.query @ chunk.context.keys.transpose(2, 3)).sum().backward()
            assert part.grad is not None
