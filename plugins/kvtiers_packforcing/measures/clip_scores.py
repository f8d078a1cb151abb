"""Figures of the paper's own kind, where weights are at hand: CLIP score and its drop, and subject consistency (DINO).

The tiny world's prompts mean nothing to CLIP; these are for models that make pictures of ours, and for comparison.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvtiers.errors import MissingExtraError
from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.prompt import SEGMENT
from kvtiers_packforcing.measures.scale import Scale, plain
from kvtiers_packforcing.measures.visits import MeasureError, block_count, clocks, frames_at, visits_of
from kvtiers_packforcing.tiny_world import FIRST_FRAME, FRAMES_PER_BLOCK, Walks, prompts_of

_LAST = FRAMES_PER_BLOCK - 1
_BATCH = 32

CLIP_SCALES: Mapping[str, Scale] = {
    "clip_score": plain(
        "CLIP score", "x 100", better="higher", truth=None, digits=2, main=True, paper="overall consistency ↑"
    ),
    "clip_drop": plain(
        "... last 10 s less first", "x 100", better="higher", truth=0.0, digits=2, main=True, paper="CLIP drop ↑"
    ),
    "subject_consistency": plain(
        "subject consistency", "x 100", better="higher", truth=100.0, digits=2, main=True, paper="subject consistency ↑"
    ),
}


class ClipScores:
    """A CLIP model, a DINO-like one, or both, from local folders in the form of transformers. Nothing is downloaded."""

    def __init__(self, *, clip: Path | None = None, dino: Path | None = None) -> None:
        for option, folder in (("--clip", clip), ("--dino", dino)):
            if folder is not None and not (folder / "config.json").is_file():
                raise MeasureError(
                    f"{option}: {folder} holds no model of transformers (no config.json); give the folder of one, or "
                    f"leave {option} out"
                )
        try:
            from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
        except ImportError as error:
            raise MissingExtraError(f"CLIP scores need {error.name}; pip install 'kvtiers[transformers]'") from error
        local = {"local_files_only": True}
        self.clip: Any = None if clip is None else AutoModel.from_pretrained(clip, **local).eval()
        self.dino: Any = None if dino is None else AutoModel.from_pretrained(dino, **local).eval()
        self.words: Any = None if clip is None else AutoTokenizer.from_pretrained(clip, **local)
        self.eyes: dict[str, Any] = {
            name: AutoImageProcessor.from_pretrained(folder, **local)
            for name, folder in (("clip", clip), ("dino", dino))
            if folder is not None
        }

    @torch.no_grad()
    def figures(self, pixels: Float[Tensor, "batch 3 frames height width"], walks: Walks) -> Mapping[str, Figure]:
        """What the models that are there say of videos.

        * `clip_score`: 100 x the cosine between the last frame of each block and its prompt; the mean of blocks.
        * `clip_drop`: the mean of the last whole 10 s less that of the first 10 s, as the paper reports it.
        * `subject_consistency`: as VBench does, with a room for the subject: of a room's frames, one a second while
          neither door nor curtain moves, 100 x the mean of the cosines to its first one and to the one before.
        """
        blocks, found = block_count(pixels, walks), {}
        if self.clip is not None:
            scores = [self._prompted(video, prompts_of(walks, row)[:blocks]) for row, video in enumerate(pixels)]
            last = blocks // SEGMENT * SEGMENT
            drops = [float(s[last - SEGMENT : last].mean() - s[:SEGMENT].mean()) for s in scores]
            found["clip_score"] = Figure.of_events([s.tolist() for s in scores])
            found["clip_drop"] = Figure.of_events([[drop] if last >= 2 * SEGMENT else [] for drop in drops])
        if self.dino is not None:
            kept = [self._consistent(video, walks, row, blocks) for row, video in enumerate(pixels)]
            found["subject_consistency"] = Figure.of_events(kept)
        return found

    def _prompted(self, video: Tensor, prompts: Sequence[str]) -> Tensor:
        frames = torch.arange(len(prompts)) * FRAMES_PER_BLOCK + _LAST - FIRST_FRAME
        names = sorted(set(prompts))
        said = self.clip.get_text_features(**self.words(names, padding=True, return_tensors="pt"))
        texts = normalize(_features(said), dim=-1)[[names.index(prompt) for prompt in prompts]]
        seen = [self.clip.get_image_features(**part) for part in self._parts("clip", video[:, frames])]
        return 100 * (normalize(torch.cat([_features(part) for part in seen]), dim=-1) * texts).sum(-1)

    def _consistent(self, video: Tensor, walks: Walks, row: int, blocks: int) -> list[float]:
        rooms: dict[str, list[int]] = {}
        for visit in visits_of(walks, row, blocks):
            rooms.setdefault(visit.room, []).extend(frames_at(visit, clocks(visit, step=FRAMES_PER_BLOCK)).tolist())
        found: list[float] = []
        for frames in rooms.values():
            seen = [self.dino(**part).last_hidden_state[:, 0] for part in self._parts("dino", video[:, frames])]
            features = torch.cat(seen)
            first = cosine_similarity(features[1:], features[:1], dim=-1)
            before = cosine_similarity(features[1:], features[:-1], dim=-1)
            found += (50 * (first + before)).tolist()
        return found

    def _parts(self, name: str, shown: Tensor) -> list[Any]:
        levels = ((shown.clamp(-1, 1) + 1) * 127.5).round().byte().transpose(0, 1)
        return [self.eyes[name](images=list(some), return_tensors="pt") for some in levels.split(_BATCH)]


def _features(output: Any) -> Tensor:
    """Newer versions of transformers wrap the features."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
