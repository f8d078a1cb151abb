"""Make what run 6 began with: `python start.py WEIGHTS FOLDER`, of weights whose compressor is not normalised.

The last convolution of the compressor is scaled so that normalised tokens have length 40 on average, and point almost
where they did. Prints how long tokens were, beside those of the patch embedding.
"""

import shutil
import sys
from pathlib import Path

import torch

from kvtiers_packforcing.network import HighResolution
from kvtiers_packforcing.tiny_world import Clips, LinearCodec
from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES
from kvtiers_packforcing.tiny_world.weights import load_models

LENGTH = 40.0

given, made = map(Path, sys.argv[1:])
models = load_models(given)
own = models.compressor.float()
network = HighResolution(own.config.channels, own.config.width, own.config.widths, normalise=True)
network.load_state_dict(own.state_dict())
latents = LinearCodec.load().encode(Clips.of_seeds([f"x{nth}" for nth in range(16)]).pixels())
blocks = latents.unflatten(2, (-1, BLOCK_FRAMES)).transpose(1, 2).flatten(0, 1)
with torch.no_grad():
    before, last = own(blocks), network.layers[-1]
    last.bias /= network.layers[:-1](blocks).square().mean(1).sqrt().mean()
    scale = LENGTH / network(blocks).norm(dim=1).mean()
    last.weight *= scale
    last.bias *= scale
    after = network(blocks)
    whole = models.transformer.patch_embedding(blocks)
print(f"length of a token: {before.norm(dim=1).mean():,.1f}, now {after.norm(dim=1).mean():,.1f}")
print(f"patch embedding: {whole.norm(dim=1).mean():,.1f}")
print(f"least cosine of both: {torch.cosine_similarity(before, after, dim=1).min():.4f}")
for part in ("transformer", "autoencoder"):
    shutil.copytree(given / part, made / part)
network.save_pretrained(made / "compressor")
