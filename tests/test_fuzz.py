"""A few of fuzz.py's damaged files each time; `python -m tests.fuzz` reads as many as wanted."""

import pytest

pytest.importorskip("resource", reason="needs Linux or macOS")
from tests import fuzz


def test_no_damaged_file_of_records_loses_any_in_silence():
    fuzz.main(["--files=60", "--only=."])


@pytest.mark.slow
def test_a_command_says_in_one_line_which_file_is_damaged():
    fuzz.main(["--files=50", "--only=.py"])
