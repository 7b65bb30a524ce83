"""A few of fuzz.py's damaged files each time; `python -m tests.fuzz` reads as many as wanted."""

import io
import sys

import pytest

pytest.importorskip("resource", reason="needs Linux or macOS")
from tests import fuzz

COMMANDS = pytest.param("--only=.py", marks=pytest.mark.slow)


@pytest.mark.parametrize("rows", ["--only=.", COMMANDS])
def test_a_damaged_file_is_read_around_the_damage_or_named_in_one_line(rows, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))  # pytest's cannot be set up
    fuzz.main(["--files=60", rows])
