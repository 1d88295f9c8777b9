"""Shared by all tests: one thread, so that seeded losses repeat and a test does not starve its neighbour."""

import torch

torch.set_num_threads(1)
