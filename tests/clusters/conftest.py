"""The small data set of the distributed tests."""

from tests.distributed.conftest import particle_set

__all__ = ["particle_set"]
