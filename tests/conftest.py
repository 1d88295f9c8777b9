"""Shared by all tests: one thread, so that seeded losses repeat and a test does not starve its neighbour; Ctrl-C that
reaches the programs that tests start, also where the shell ran the tests in the background and turned it off."""

import signal

import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
