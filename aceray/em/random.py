"""Random generators with a name, so that two parts of a program never draw from one stream by accident."""

import hashlib

import torch


def named_generator(purpose: str, *key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Generator whose seed is a hash of its purpose and integer keys.

    Simulation and training may be given the same user seed: hashing the purpose along with it keeps the poses that
    were simulated from ever being drawn again while training.
    """
    text = "/".join([purpose, *(str(int(part)) for part in key)])
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator(device=device).manual_seed(seed)
