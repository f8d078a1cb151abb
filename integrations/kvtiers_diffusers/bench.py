"""`kvtiers bench video`: time per block over a long video, memory, and what the tiers add to the model's own work."""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import attrs
import click
import torch
from diffusers import WanTransformer3DModel
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from kvtiers import bytes_in
from kvtiers.presets import parse
from kvtiers_diffusers.causal_wan import CausalWan, tiered
from kvtiers_diffusers.processors import Pass, TieredSelfAttention
from kvtiers_diffusers.schedule import TIMESTEPS, clean, noised, warped
from kvtiers_diffusers.shapes import sides

POLICIES = (
    "full",
    "sink-rolling-window:sink=4,recent=16",
    "packforcing:branches=hr",
)
_FRAMES_PER_LATENT, _PIXELS_PER_LATENT = 4, 8
_SMALL = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512}
_TRUE = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}
"""Wan 2.1 T2V 1.3B."""


@attrs.frozen(kw_only=True)
class Made:
    """What one policy cost. seconds: of each block; overhead: share of the denoise steps, or none if not measured."""

    policy: str
    seconds: list[float]
    attended: int
    device_bytes: int
    host_bytes: int
    peak_bytes: int | None
    overhead: float | None
    ended: str = ""

    def quarter(self, number: int) -> float:
        """The median time of a block in this quarter of the video."""
        count = len(self.seconds)
        return median(self.seconds[number * count // 4 : max((number + 1) * count // 4, 1)])


@click.command()
@click.option(
    "--model", default="small", show_default=True, type=click.Choice(["small", "1.3b"]), help="Random weights."
)
@click.option("--size", default=None, help="Width x height in pixels. [default: 256x160; 1.3b: 832x480]")
@click.option("--blocks", default=40, show_default=True, type=click.IntRange(min=4))
@click.option(
    "--block-frames", default=4, show_default=True, type=click.IntRange(min=1), help="Latent frames of a block."
)
@click.option("--device", default=None, help="[default: cuda if there is one]")
@click.option("--dtype", default=None, type=click.Choice(["bfloat16", "float32"]), help="[default: bfloat16 on cuda]")
@click.option("--out", default="kvtiers-video.png", show_default=True, type=click.Path(path_type=Path, dir_okay=False))
@click.argument("policies", nargs=-1)
def video(
    model: str,
    size: str | None,
    blocks: int,
    block_frames: int,
    device: str | None,
    dtype: str | None,
    out: Path,
    policies: tuple[str, ...],
) -> None:
    """Time per block of a long video, memory, and the share of a step that is not the model's own.

    Weights are random: this measures speed and memory, not pictures. No autoencoder takes part, so PackForcing
    compresses with its high-resolution branch alone. POLICIES are written `name` or `name:setting=value,...`.
    """
    console = Console()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    made_of = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    width, height = sides(size or ("256x160" if model == "small" else "832x480"))
    latent = (height // _PIXELS_PER_LATENT, width // _PIXELS_PER_LATENT)
    transformer = _random_model(_SMALL if model == "small" else _TRUE, where, made_of)
    specs = list(policies or POLICIES)
    results = []
    with Progress(console=console) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dual-branch")  # untrained, as the model is
        for spec in specs:
            advance = partial(progress.advance, progress.add_task(_short(spec), total=blocks))
            results.append(
                make(transformer, spec, blocks=blocks, block_frames=block_frames, latent=latent, done=advance)
            )
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    console.print(table(results, block_frames))
    console.print(
        f"{model}, random weights, {width}x{height}, blocks of {block_frames} latent frames, {made_of}, {name}:"
    )
    for spec in specs:
        console.print(f"  {spec}")
    plot(results, out)
    console.print(f"Seconds per block over the video are drawn in {out}.")


def _random_model(settings: dict[str, int], device: torch.device, dtype: torch.dtype) -> Any:
    """A Wan of this size, the same one every time, in float32 where `from_pretrained` would leave it so."""
    torch.manual_seed(0)
    with device:
        made: Any = WanTransformer3DModel(**settings)
    for name, parameter in made.named_parameters():
        if not any(part in name for part in made._keep_in_fp32_modules or ()):
            parameter.data = parameter.data.to(dtype)
    return made.eval().requires_grad_(requires_grad=False)


def make(
    transformer: Any,
    spec: str,
    *,
    blocks: int,
    block_frames: int,
    latent: tuple[int, int],
    done: Callable[[], object] = lambda: None,
) -> Made:
    """A video of `blocks` blocks under the policy `spec`, four denoising steps and a clean pass each."""
    device, dtype = transformer.device, transformer.dtype
    random = torch.Generator(device).manual_seed(0)
    shape = (1, transformer.config.in_channels, block_frames, *latent)
    text = torch.randn(1, 512, transformer.config.text_dim, generator=random, device=device).to(dtype)
    schedule, seconds, ended, overhead = warped(TIMESTEPS, 5.0), [], "", None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode(), tiered(transformer, parse(spec), block_frames=block_frames) as wan:
        try:
            for _ in range(blocks):
                noises = [torch.randn(shape, generator=random, device=device) for _ in schedule]
                seconds.append(_timed(device, partial(_block, wan, noises, schedule, text)))
                done()
            overhead = _overhead(wan, noises[0].to(dtype), text, len(schedule), rounds=min(blocks, 15))
        except torch.OutOfMemoryError:
            ended = f"out of memory at block {len(seconds) + 1}"
        held = wan.memory_usage()
        return Made(
            policy=spec,
            seconds=seconds,
            attended=max(wan.attended(), default=0),
            device_bytes=bytes_in(held, "device"),
            host_bytes=bytes_in(held, "host") + bytes_in(held, "disk"),
            peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            overhead=overhead,
            ended=ended,
        )


def _block(wan: CausalWan, noises: Sequence[Tensor], schedule: Sequence[float], text: Tensor) -> None:
    """Denoise and commit one block."""
    block = noises[0].to(text.dtype)
    for step, timestep in enumerate(schedule):
        block = clean(block, wan.denoise(block, timestep, text), timestep)
        if step + 1 < len(schedule):
            block = noised(block, noises[step + 1], schedule[step + 1])
    wan.commit(block, text)


class _Alone(TieredSelfAttention):
    """The model's own layers alone: attention to keys and values that lie there, none of which are written."""

    def _full(self, now: Pass, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if now.steady is None:
            return super()._full(now, query, key, value)
        steady = now.steady[self.layer]
        now.rotary.apply(key, steady.table)
        return self._attend(now.rotary.apply(query, steady.table), steady.keys, steady.values, steady.logit_bias)


def _model_alone(wan: CausalWan, block: Tensor, text: Tensor) -> Callable[[], object]:
    """A forward of the transformer with everything that a step reads laid ready."""
    ready = None if wan.cache is None else wan.runner.further_step(wan.cache, block)
    times = torch.full((block.shape[0],), 500.0, device=block.device)
    wan.runner.switch.serving = ready
    return lambda: wan.transformer(block, times, text, return_dict=False)


def _overhead(wan: CausalWan, block: Tensor, text: Tensor, steps: int, *, rounds: int) -> float:
    """The share of a block's denoise steps that is not the model's own: of blocks that are denoised and committed in
    turn, the first step, which makes room and recalls what is attended, and the others, beside the model alone with as
    many keys and values."""
    device = block.device
    ours: dict[int, Any] = {layer: part.attn1.processor for layer, part in enumerate(wan.transformer.blocks)}
    first, further, alone = [], [], []
    for _ in range(rounds):
        first.append(_timed(device, lambda: wan.denoise(block, 900.0, text)))
        further.append(_timed(device, lambda: wan.denoise(block, 700.0, text)))
        try:
            run = _model_alone(wan, block, text)
            for layer, processor in ours.items():
                wan.transformer.blocks[layer].attn1.processor = _Alone(layer, processor.own, processor.switch)
            alone.append(_timed(device, run))
        finally:
            wan.runner.switch.serving = None
            for layer, processor in ours.items():
                wan.transformer.blocks[layer].attn1.processor = processor
        wan.commit(block.clone(), text)
    whole = median(first) + (steps - 1) * median(further)
    return 1 - steps * median(alone) / whole


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that `work` takes, until the device is done."""
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(results: Sequence[Made], block_frames: int) -> Table:
    """One policy a row."""
    made = Table(title="A long video, block by block", box=box.SIMPLE_HEAD, padding=0)
    made.add_column("policy", overflow="fold")
    for name in (
        "tokens\nattended", "KV device\nMB", "KV host\nMB", "peak\nGB", "seconds a block,\nby quarter", "frames\nper s",
        "not the\nmodel's",
    ):  # fmt: skip
        made.add_column(name, justify="right")
    for result in results:
        if len(result.seconds) < 4:
            made.add_row(f"{_short(result.policy)} {result.ended}")
            continue
        made.add_row(
            f"{_short(result.policy)} {result.ended}".strip(),
            f"{result.attended:,}",
            f"{result.device_bytes / 1e6:,.1f}",
            f"{result.host_bytes / 1e6:,.1f}",
            "" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.1f}",
            " ".join(f"{result.quarter(number):.2f}" for number in range(4)),
            f"{block_frames * _FRAMES_PER_LATENT / result.quarter(3):.1f}",
            "" if result.overhead is None else f"{result.overhead:.1%}",
        )
    return made


def _short(spec: str) -> str:
    """The preset's name."""
    return spec.partition(":")[0]


def plot(results: Sequence[Made], out: Path) -> None:
    """Draw the seconds of each block to `out`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for result in results:
        axes.plot(range(1, len(result.seconds) + 1), result.seconds, linewidth=2, label=_short(result.policy))
    axes.set(xlabel="block", ylabel="seconds per block", title="Time per block of a long video", ylim=(0, None))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    plt.close(figure)
