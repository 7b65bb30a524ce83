"""tests/families.py, its models shrunk: what a laptop with their full size would find."""

import pytest

from configurator import UserError
from tests.families import FAMILIES, main, measure


@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_model_is_itself_here_and_after_a_round_trip(tmp_path, name):
    row = measure(FAMILIES[name], tmp_path, full=False)
    assert row[-1], row


def test_a_name_that_no_model_has_is_named():
    with pytest.raises(UserError, match=r"names=gpt is none of qwen3, qwen2, llama3"):
        main(["--names=gpt"])
