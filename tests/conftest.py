"""Settings and fixtures of all tests."""

import os
import signal

import pytest
import setuptools  # noqa: F401  # which torch's compiler imports: two threads at once break it
import torch

from miniglm import metrics
from tests.runs import ready_python, train_here, write_toys

torch.set_num_threads(1)  # two are many times slower for tiny models on a busy machine
# a shell that starts the tests in the background makes them and their children ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)
metrics.EXCHANGES = 2_000  # enough for p < 0.001
LONGEST = {"test_compiling", "test_cuda", "test_generation", "test_gpu", "test_notebook"}
LONGEST |= {"test_page", "test_translate"}


def pytest_configure(config):
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The files with the longest tests first, so that both cores end together."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="module")
def toys(request, tmp_path_factory):
    """A directory with the datasets text, questions and pairs, and base, a model of the text, with
    the settings TOYS_BASE of the module that asks for it."""
    folder = tmp_path_factory.mktemp("toys")
    write_toys(folder)
    base = getattr(request.module, "TOYS_BASE", {})
    train_here(dataset=folder / "text", out_dir=folder / "base", **base)
    return folder


@pytest.fixture(scope="session")
def run_ready(tmp_path_factory):
    """A `run` whose processes have imported torch already."""
    with ready_python(tmp_path_factory.mktemp("outputs")) as run_ready:
        yield run_ready


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """With NO_SKIPS=1, as in CI, a skipped test is a failure."""
    if os.environ.get("NO_SKIPS") and terminalreporter.stats.get("skipped"):
        terminalreporter.write_line("tests were skipped, and NO_SKIPS is set", red=True)


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("NO_SKIPS") and reporter and reporter.stats.get("skipped") and not exitstatus:
        session.exitstatus = 1
