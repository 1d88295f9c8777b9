import hashlib

import torch

from aceray.em.random import named_generator


def draw(purpose: str, *key: int) -> torch.Tensor:
    return torch.rand(4, generator=named_generator(purpose, *key))


def test_same_name_same_stream() -> None:
    assert torch.equal(draw("train/poses", 3, 1), draw("train/poses", 3, 1))


def test_simulation_and_training_never_share_a_stream() -> None:
    # one user seed for everything: the purpose alone has to keep the streams apart
    assert not torch.equal(draw("simulate/poses", 7), draw("train/poses", 7))


def test_every_key_counts() -> None:
    streams = {tuple(draw("train/poses", *key).tolist()) for key in ((0,), (1,), (0, 0), (0, 1), (1, 0), (10,), ())}
    assert len(streams) == 7


def test_seed_is_the_hash_of_the_name() -> None:
    digest = hashlib.sha256(b"simulate/poses/7/2").digest()
    assert named_generator("simulate/poses", 7, 2).initial_seed() == int.from_bytes(digest[:8], "little") // 2


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    draw("train/poses", 3)
    assert torch.equal(torch.get_rng_state(), before)
