"""Make a video with a compiled and with a plain model; print, for each policy, how far they are apart, and how many
graphs had been compiled after each block.

    python tests/compiled_wan.py
"""

import sys
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kvtiers_diffusers import tiered
from tiny_wan import blocks, build, prompt

POLICIES = (("archive", "anchored"), ("archive", "gaps"), ("sink-rolling-window", "gaps"))


@torch.no_grad()
def compare(policy: str, realigner: str) -> tuple[float, list[int]]:
    """The worst difference, and the graphs compiled after each block."""
    torch._dynamo.reset()
    counter, text, clips = CompileCounterWithBackend("eager"), prompt(), blocks(11)
    flows: list[list[Any]] = []
    counts = []
    for compiled in (False, True):
        model, found = build(), []
        with tiered(model, policy, realigner=realigner, sink=2, recent=2, top_k=2) as wan:
            if compiled:
                model.compile(fullgraph=True, backend=counter)
            for clip in clips:
                found += [wan.denoise(clip, timestep, text) for timestep in (900.0, 600.0, 300.0)]
                wan.commit(clip, text)
                if compiled:
                    counts.append(counter.frame_count)
        flows.append(found)
    return max(float((a - b).abs().max()) for a, b in zip(*flows, strict=True)), counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, place in POLICIES:
        error, graphs = compare(name, place)
        sys.stdout.write(f"{name}/{place} {error} {' '.join(map(str, graphs))}\n")
