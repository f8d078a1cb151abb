"""Draw what the tiny world shows: four houses, one walk, and what the linear codec makes of it.

python examples/tiny_world/look.py --out world.png
"""

import argparse
from pathlib import Path

import torch

from kvtiers_packforcing.tiny_world import (
    Houses,
    LinearCodec,
    Walks,
    contact_sheet,
    prompts_of,
    psnr,
    render,
    scene_of,
)

WALK = Walks.written(("hall", 4), ("attic", 6), ("hall", 4), ("hall", 20, "closed"), ("hall", 3), ("cellar", 3))
COLUMNS = (20, 67, 100, 163, 212, 228, 400, 547, 560)
"""Frames: the hall, a door, the attic, a door, the hall again, its curtain drawn, closed, opening and open again."""


def main() -> None:
    """Write the picture, and say what the first house shows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("kvtiers-world.png"))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    seeds = [f"{asked.seed}/{nth}" for nth in range(4)]
    houses, walks = Houses.of_seeds(seeds), Walks(rooms=WALK.rooms.expand(4, -1), curtains=WALK.curtains.expand(4, -1))
    contact_sheet(render(houses, walks, torch.tensor(COLUMNS).expand(4, -1)), asked.out)
    for second in (1, 5, 11, 25):
        scene = scene_of(houses, walks, second * 16 + 8)
        things = ", ".join(f"{t.colour} {t.texture} {t.form}{'' if t.whole else ' (hidden)'}" for t in scene.things)
        print(f"{second:3d} s  prompt: {prompts_of(walks)[second]:24s} to be seen: {scene.pattern}, {things}")
    video = render(houses, walks, torch.arange(3, 80).expand(4, -1))
    codec = LinearCodec.load()
    kept = psnr(codec.decode(codec.encode(video)), video)
    print(f"the linear codec, over 77 frames: {kept:.1f} dB; {asked.out} is written")


if __name__ == "__main__":
    main()
