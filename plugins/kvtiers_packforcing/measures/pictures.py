"""Figures of pictures: their likeness, and blurring."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

BEST_PSNR = 40.0
"""dB. Pictures that agree better count as this: no invisible difference shall outweigh a visible one."""

_SIGMA = 1.5
_FLAT = 1e-3
"""Below this standard deviation (of -1 to 1) a picture is flat, and is like no other."""


def blur(frames: Float[Tensor, "*frames height width"], sigma: float) -> Float[Tensor, "*frames height width"]:
    """A Gaussian blur of `sigma` pixels; the border is continued."""
    reach = max(1, math.ceil(3 * sigma))
    x = torch.arange(-reach, reach + 1.0)
    kernel = torch.exp(-x * x / (2 * sigma * sigma))
    kernel = kernel / kernel.sum()
    flat = frames.flatten(0, -3)[:, None]
    flat = functional.conv2d(functional.pad(flat, (reach, reach, 0, 0), "replicate"), kernel[None, None, None])
    flat = functional.conv2d(functional.pad(flat, (0, 0, reach, reach), "replicate"), kernel[None, None, :, None])
    blurred: Tensor = flat[:, 0].unflatten(0, frames.shape[:-2])
    return blurred


def capped_psnr(one: Float[Tensor, "3 frames height width"], other: Float[Tensor, "3 frames height width"]) -> float:
    """Peak signal to noise of pictures in -1 to 1, in dB, over all frames at once; `BEST_PSNR` at most."""
    error = float((one - other).square().mean())
    return min(BEST_PSNR, 10 * math.log10(4 / max(error, 1e-12)))


def ssim(one: Float[Tensor, "3 frames height width"], other: Float[Tensor, "3 frames height width"]) -> float:
    """Structural similarity (Wang et al. 2004; Gaussian window of 1.5 pixels), the mean of frames and channels."""
    a, b = (one + 1) / 2, (other + 1) / 2
    mean_a, mean_b, aa, bb, ab = blur(torch.stack((a, b, a * a, b * b, a * b)), _SIGMA)
    variances, covariance = aa - mean_a**2 + bb - mean_b**2, ab - mean_a * mean_b
    first, second = 0.01**2, 0.03**2
    light = (2 * mean_a * mean_b + first) / (mean_a**2 + mean_b**2 + first)
    structure = (2 * covariance + second) / (variances + second)
    return float((light * structure).mean())


def correlation(
    one: Float[Tensor, "3 height width"], other: Float[Tensor, "3 height width"], where: Bool[Tensor, "height width"]
) -> float:
    """How alike the pixels `where` are: the cosine between them, less the mean of each picture. 0 if one is flat."""
    a, b = one[:, where].flatten(), other[:, where].flatten()
    a, b = a - a.mean(), b - b.mean()
    size = a.square().mean().sqrt(), b.square().mean().sqrt()
    if min(float(size[0]), float(size[1])) < _FLAT:
        return 0.0
    return float((a * b).mean() / (size[0] * size[1]))


def luminance(pixels: Float[Tensor, "3 frames height width"]) -> Float[Tensor, "frames height width"]:
    """Brightness (Rec. 601 weights)."""
    light: Tensor = 0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]
    return light
