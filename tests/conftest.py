"""What all tests start from."""

import os
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


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """NO_SKIPS=1, as CI sets it, takes a skipped test for a failed one."""
    if os.environ.get("NO_SKIPS") and terminalreporter.stats.get("skipped"):
        terminalreporter.write_line("tests were skipped, and NO_SKIPS is set", red=True)


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("NO_SKIPS") and reporter and reporter.stats.get("skipped") and not exitstatus:
        session.exitstatus = 1
