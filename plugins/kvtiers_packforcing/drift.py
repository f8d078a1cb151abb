"""`kvtiers bench drift`: how far keys are from where they ought to be when they are rotated again for every block."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import kvtiers
from kvtiers import Geometry, Layer, Rotary

REALIGNERS: Mapping[str, Any] = {
    "incremental": "incremental",
    "incremental, once": ("incremental", {"rotations": "once"}),
    "contiguous": "contiguous",
}
_FRAMES, _GRID = 4, (8, 8)
_AXES = (44, 42, 42)
"""Channels of a head of 128 that turn with time, height and width (Wan 2.1)."""


@click.command()
@click.option("--blocks", default=1000, show_default=True, type=click.IntRange(min=2), help="Blocks of 4 frames.")
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float16", "float32"]))
@click.option("--out", default="kvtiers-drift.png", show_default=True, type=click.Path(path_type=Path, dir_okay=False))
def drift(blocks: int, dtype: str, out: Path) -> None:
    """Rotate anchors again for every block, as PackForcing does, beside once; the error of the keys.

    One layer of random keys with Wan's rotation (64 tokens a frame), a block of anchors and a recent one. The error is
    that of the channels that turn with time, of the tier that is worst, against float64.
    """
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("rotating", total=blocks * len(REALIGNERS))
        curves = {
            label: errors(realigner, blocks, getattr(torch, dtype), done=lambda: progress.advance(bar))
            for label, realigner in REALIGNERS.items()
        }
    table = Table(title=f"Relative error of the keys attended ({dtype})", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("realigner", overflow="fold")
    shown = sorted({n for n in (1, 16, 117, 500, 1000) if n < blocks} | {blocks})
    for count in shown:
        table.add_column(f"{count:,}\nblocks", justify="right")
    for label, curve in curves.items():
        table.add_row(label, *(f"{curve[count - 1]:.2%}" for count in shown))
    console.print(table)
    plot(curves, dtype, out)
    console.print(f"The curve is in {out}.")


@torch.no_grad()
def errors(
    realigner: Any, blocks: int, dtype: torch.dtype, *, done: Callable[[], object] = lambda: None
) -> list[float]:
    """The error after the anchors have moved for 1, 2, ... `blocks` blocks, relative, of the worse tier."""
    policy = kvtiers.policy("streaming", sink=_FRAMES, recent=_FRAMES, realigner=realigner, chunk_size=None)
    geometry = Geometry(
        kv_heads=1, head_dim=sum(_AXES), grid=_GRID, steps_per_commit=_FRAMES, causal=False, dtype=dtype
    )
    rotary = Rotary(
        [10_000.0 ** -(torch.arange(0, n, 2, dtype=torch.float64) / n) for n in _AXES],
        layout="interleaved",
        angle_dtype=torch.float64,
    )
    layer, random = Layer(policy, geometry, rotary=rotary), torch.Generator().manual_seed(0)
    shape = (1, 1, _FRAMES * geometry.tokens_per_step, geometry.head_dim)
    found: list[float] = []
    held: list[torch.Tensor] = []
    while len(found) < blocks:
        keys = torch.randn(shape, generator=random).to(dtype)
        held = [*held[:1], *held[1:][-1:], keys]  # the anchors, recent, and the current block
        layer.write(keys, keys, replace=True)
        layer.select(None)
        context = layer.context()
        if layer.dropped:
            exact = rotary.rotate(torch.cat(held, 2).double(), context.placed.double())[..., : _AXES[0]]
            by_tier = (3, -1)
            off = (context.keys[..., : _AXES[0]].double() - exact).unflatten(2, by_tier).norm(dim=(-2, -1))
            found.append(float((off / exact.unflatten(2, by_tier).norm(dim=(-2, -1))).max()))
            done()
        layer.commit()
    return found


def plot(curves: Mapping[str, list[float]], dtype: str, out: Path) -> None:
    """Draw the error over blocks to `out`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (label, curve), style in zip(curves.items(), ("-", "--", ":"), strict=False):
        axes.plot(range(1, len(curve) + 1), [100 * value for value in curve], style, linewidth=2, label=label)
    axes.set(
        xlabel="blocks that the anchors have moved by",
        ylabel="error of the keys attended, %",
        title=f"Rotating stored keys again for every block ({dtype})",
        ylim=(0, None),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    plt.close(figure)
