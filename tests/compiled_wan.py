"""Make a video with a compiled and with a plain model; print, for each policy, how far they are apart, and how many
graphs had been compiled after each block. The model is compiled in place, by `torch.compile`, or block by block.

    python tests/compiled_wan.py
"""

import sys
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from kvtiers_diffusers import tiered
from kvtiers_packforcing.network import HighResolution
from tiny_wan import blocks, build, prompt

ROLLING = {"sink": 2, "recent": 2, "top_k": 2}
PACKED = {"sink": 4, "recent": 4, "top_k": 2}
SIZE = {"high": 8, "wide": 16}  # 4 x 8 tokens a frame, two cells for every two frames
LENGTHS = (2, 4, 3, 4) * 3


def save_weights(folder: str) -> None:
    """A narrow HR branch whose last layer is not zero."""
    torch.manual_seed(0)
    network = HighResolution(channels=16, width=48, widths=(8, 8, 8, 8))
    torch.nn.init.normal_(network.layers[-1].weight)
    network.save_pretrained(folder)


def videos(weights: str) -> list[tuple[str, dict[str, Any], list[Tensor]]]:
    """Each policy by its name and realigner (and what else is special), what is changed of it, and a video."""
    compressor = ("dual-branch", {"branches": "hr", "weights": weights})
    even = blocks(11, frames=4, **SIZE)
    uneven = [blocks(1, frames=frames, seed=seed, **SIZE)[0] for seed, frames in enumerate(LENGTHS)]
    return [
        ("archive/contiguous", ROLLING, blocks(11)),
        ("archive/contiguous/function", ROLLING, blocks(11)),
        ("archive/contiguous/blocks", ROLLING, blocks(11)),
        ("sink-rolling-window/original", ROLLING, blocks(11)),
        ("packforcing/contiguous", {**PACKED, "compressor": compressor}, even),
        (
            "packforcing/contiguous/uneven",
            {**PACKED, "sink": 2, "compressor": compressor, "block_frames": 4, "even": False},
            uneven,
        ),
    ]


@torch.no_grad()
def compare(name: str, changes: dict[str, Any], clips: list[Tensor]) -> tuple[float, list[int]]:
    """The worst difference, and the graphs compiled after each block."""
    torch._dynamo.reset()
    counter, text = CompileCounterWithBackend("eager"), prompt()
    policy, realigner = name.split("/")[:2]
    flows: list[list[Any]] = []
    counts = []
    for compiled in (False, True):
        model, found = build(), []
        made = torch.compile(model, fullgraph=True, backend=counter) if compiled and "function" in name else model
        if compiled and "blocks" in name:
            for number, block in enumerate(model.blocks):
                model.blocks[number] = torch.compile(block, fullgraph=True, backend=counter)
        with tiered(made, policy, realigner=realigner, **changes) as wan:
            if compiled and made is model and "blocks" not in name:
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
    with tempfile.TemporaryDirectory() as folder:
        save_weights(folder)
        for name, changes, clips in videos(folder):
            error, graphs = compare(name, changes, clips)
            sys.stdout.write(f"{name} {error} {' '.join(map(str, graphs))}\n")
