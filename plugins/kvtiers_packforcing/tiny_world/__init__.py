"""A tiny world to train video models in on a laptop: walks through houses, made so that memory has a job.

A house has rooms with a ground each and two things in every room. A video walks through it: rooms are left and entered
again, curtains are drawn and opened, so that what was seen is out of sight for 5 to 60 seconds and must come back the
same. Prompts name the room, not what is in it. The truth is known at every frame.

It lies in the package, not among the examples, because training, evaluation, the demonstration and tests use it.
"""

from kvtiers_packforcing.tiny_world.clips import CLIP_BLOCKS, WALK_BLOCKS, Clips
from kvtiers_packforcing.tiny_world.codec import LATENT_CHANNELS, LinearCodec, psnr
from kvtiers_packforcing.tiny_world.houses import Houses
from kvtiers_packforcing.tiny_world.prompts import (
    PROMPT_WORDS,
    TEXT_WIDTH,
    PromptError,
    embed,
    embed_walks,
    prompt_of,
    prompts_of,
    text_table,
)
from kvtiers_packforcing.tiny_world.rendering import render, thing_mask
from kvtiers_packforcing.tiny_world.sheet import contact_sheet
from kvtiers_packforcing.tiny_world.truth import Scene, Thing, Truth, scene_of, truth_of
from kvtiers_packforcing.tiny_world.vocabulary import (
    COLOURS,
    FIRST_FRAME,
    FORMS,
    FRAMES_PER_BLOCK,
    HEIGHT,
    PATTERNS,
    RGB,
    ROOMS,
    TEXTURES,
    WIDTH,
)
from kvtiers_packforcing.tiny_world.walks import HIDDEN_SECONDS, Segment, WalkError, Walks

__all__ = [
    "CLIP_BLOCKS",
    "COLOURS",
    "Clips",
    "FIRST_FRAME",
    "FORMS",
    "FRAMES_PER_BLOCK",
    "HEIGHT",
    "HIDDEN_SECONDS",
    "Houses",
    "LATENT_CHANNELS",
    "LinearCodec",
    "PATTERNS",
    "PROMPT_WORDS",
    "PromptError",
    "RGB",
    "ROOMS",
    "Scene",
    "Segment",
    "TEXTURES",
    "TEXT_WIDTH",
    "Thing",
    "Truth",
    "WALK_BLOCKS",
    "WIDTH",
    "WalkError",
    "Walks",
    "contact_sheet",
    "embed",
    "embed_walks",
    "prompt_of",
    "prompts_of",
    "psnr",
    "render",
    "scene_of",
    "text_table",
    "thing_mask",
    "truth_of",
]
