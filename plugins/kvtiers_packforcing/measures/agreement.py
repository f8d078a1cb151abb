"""Picture agreement after absence: how like its earlier visit a returning room looks, at the same room clock."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.identity import SPANS
from kvtiers_packforcing.measures.pictures import capped_psnr, ssim
from kvtiers_packforcing.measures.visits import block_count, clocks, frames_at, visits_of
from kvtiers_packforcing.tiny_world import Walks


def agreement(pixels: Float[Tensor, "batch 3 frames height width"], walks: Walks) -> Mapping[str, Figure]:
    """Of every return after 5 to 60 s, against the last visit before, in every fourth frame that both show.

    * `return_psnr`: in dB, 40 at most; higher is better, truth 40. `return_psnr_5_15` and `return_psnr_15_60`: the same
      by seconds of absence.
    * `return_ssim`: structural similarity, -1 to 1; higher is better, truth 1.

    A video whose rooms all look the same, or of nothing but grey, agrees with itself too. So read these beside
    `recognised`, `elsewhere` and `room`, which it fails.
    """
    blocks = block_count(pixels, walks)
    psnrs: list[list[tuple[int, float]]] = []
    ssims: list[list[float]] = []
    for row, video in enumerate(pixels):
        visits = visits_of(walks, row, blocks)
        psnrs.append([])
        ssims.append([])
        for visit in visits:
            if not visit.returns:
                continue
            earlier = visits[visit.earlier or 0]
            clock = clocks(visit, earlier)
            now, then = video[:, frames_at(visit, clock)], video[:, frames_at(earlier, clock)]
            psnrs[-1].append((visit.hidden or 0, capped_psnr(now, then)))
            ssims[-1].append(ssim(now, then))

    found = {"return_psnr": Figure.of_events([db for _, db in returns] for returns in psnrs)}
    for name, (least, end) in SPANS.items():
        found[f"return_psnr_{name}"] = Figure.of_events(
            [db for hidden, db in returns if least <= hidden < end] for returns in psnrs
        )
    return found | {"return_ssim": Figure.of_events(ssims)}
