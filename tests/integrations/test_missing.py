"""What is not installed is named, with what to type."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "package", "told"),
    [
        ("trl", "trl", r"needs TRL: pip install 'bilect\[trl\]'"),
        ("datatrove", "datatrove.data", r"needs datatrove: pip install 'bilect\[datatrove\]'"),
        ("nemo_curator", "nemo_curator.tasks", "needs NeMo Curator: pip install nemo-curator"),
    ],
)
def test_a_missing_package_is_one_line_with_its_extra(name, package, told, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"bilect.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=told) as caught:
        importlib.import_module(f"bilect.integrations.{name}")
    assert "\n" not in str(caught.value)
