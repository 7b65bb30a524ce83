"""Tiny models for the tests of the server, the endpoint and the page."""

import pytest

from tests.served import write_models


@pytest.fixture(scope="module")
def out_dirs(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))
