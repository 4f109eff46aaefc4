"""The README's compatibility table says what the tests beside this one prove, and no more."""

import pytest

from . import table


def test_the_readme_has_the_table_of_these_tests():
    for package in ("lightning", "accelerate", "transformers", "bitsandbytes", "prodigyopt", "pytorch_optimizer",
                    "schedulefree"):
        pytest.importorskip(package)
    readme = table.README.read_text(encoding="utf-8")
    assert readme == table.with_table(readme), "run python -m tests.frameworks.table"
    assert {outcome for _, _, outcome, _ in table.rows()} == {"works", "works with a note", "refused with an error"}


def test_a_readme_without_markers_is_an_error():
    with pytest.raises(ValueError, match="compatibility:begin"):
        table.with_table("no table here")
