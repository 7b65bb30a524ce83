"""What all tests start from."""

import signal

import pytest
import torch

from tests.runs import train_here, write_toys

torch.set_num_threads(1)  # on a busy machine tiny models are many times slower on two
# a shell that starts the tests in the background leaves Ctrl-C ignored, in their children too
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A directory with the datasets text and questions, and base, a model of the text."""
    folder = tmp_path_factory.mktemp("toys")
    write_toys(folder)
    train_here(dataset=folder / "text", out_dir=folder / "base")
    return folder
