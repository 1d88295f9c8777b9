"""The two things workers of one run tell each other besides gradients; nothing happens outside torch.distributed."""

import torch
from torch import Tensor, distributed


def _alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def sum_over_workers(values: Tensor) -> Tensor:
    """Sum of a tensor over all workers."""
    if not _alone():
        distributed.all_reduce(values)
    return values


@torch.no_grad()
def broadcast_from_first(tensors: list[Tensor]) -> None:
    """Give all workers the first one's values, in place."""
    if not _alone():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)
