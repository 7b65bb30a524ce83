"""What all tests start from."""

import signal

import torch

torch.set_num_threads(1)  # on a busy machine tiny models are many times slower on two
# a shell that starts the tests in the background leaves Ctrl-C ignored, in their children too
signal.signal(signal.SIGINT, signal.default_int_handler)
