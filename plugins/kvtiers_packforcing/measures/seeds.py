"""Random numbers by name: what is drawn for a name is the same in every run."""

import random

import torch


def generator_of(*name: object) -> torch.Generator:
    """A generator of torch, seeded by anything that can be written."""
    return torch.Generator().manual_seed(int(random.Random("/".join(map(str, name))).random() * 2**53))
