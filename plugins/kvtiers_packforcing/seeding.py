"""Seeds by name: what is drawn for a name is the same in every run, whatever was drawn before."""

import hashlib

import torch


def seed_of(*parts: object) -> int:
    """A seed of 63 bits for any parts that can be written."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_of(*parts: object) -> torch.Generator:
    """A generator of torch with that seed."""
    return torch.Generator().manual_seed(seed_of(*parts))
