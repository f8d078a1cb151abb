"""The words of the tiny world: names of rooms, what things and grounds are made of, sizes and times."""

from collections.abc import Sequence

HEIGHT, WIDTH = 64, 128
"""Of the picture, in pixels."""

FRAMES_PER_BLOCK = 16
"""Pixel frames of a block: one second. A video model makes a block at once, as 4 latent frames of 4 pixel frames."""

BLOCK_FRAMES = 4
"""Latent frames of a block."""

FIRST_FRAME = 3
"""Where a video begins. A causal autoencoder encodes the first frame alone, in the place of four, so that a video of n
blocks has 16 n - 3 frames; the world counts the three that are missing, and block b is always 16 b to 16 b + 15."""

ROOMS = ("hall", "attic", "cellar", "kitchen", "study", "porch")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
FORMS = ("disc", "square", "triangle", "ring")
TEXTURES = ("plain", "striped", "cored")
PATTERNS = ("stripes", "checks", "waves", "blobs")

RGB: Sequence[tuple[float, float, float]] = (
    (0.93, 0.13, 0.13),
    (1.00, 0.55, 0.05),
    (1.00, 0.93, 0.20),
    (0.15, 0.78, 0.22),
    (0.10, 0.85, 0.90),
    (0.20, 0.35, 0.98),
    (0.70, 0.22, 0.90),
    (0.98, 0.98, 0.98),
)
"""The colours, in 0 to 1, in the order of their names."""

THINGS_PER_ROOM = 2
