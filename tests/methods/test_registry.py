"""Methods by name: the package's own modules, other packages' entry points, and what is said of wrong names."""

import subprocess
import sys
from pathlib import Path

import pytest

from bilect import methods
from bilect.errors import BilectError
from bilect.methods.contract import DocumentMethod, TokenMethod

DOCUMENTS = {
    "amortised", "bliss", "bliss-penalty", "dsir", "excess", "full", "influence", "less", "mates", "perplexity",
    "random", "tandem",
}  # fmt: skip
TOKENS = {"blade", "full", "random-token", "rho1"}


def test_every_module_is_a_method() -> None:
    own = set(methods.names())
    assert own >= DOCUMENTS | TOKENS
    classes = {name: methods.get(name) for name in own}
    assert {n for n, c in classes.items() if issubclass(c, DocumentMethod)} >= DOCUMENTS
    assert {n for n, c in classes.items() if issubclass(c, TokenMethod)} >= TOKENS
    for name, c in classes.items():
        assert c.name == name and c.summary and "\n" not in c.summary
        assert c.Config.model_config["frozen"] and c.Config.model_config["extra"] == "forbid"


def test_names_import_no_method() -> None:
    code = "import sys; from bilect import methods; methods.names(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("dsri", "did you mean 'dsir'?"), ("rho-1", "did you mean 'rho1'?"), ("zzz", "known are: amortised, bl")],
)
def test_an_unknown_name_is_one_line_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(BilectError) as error:
        methods.get(name)
    assert str(error.value).startswith(f"methods: there is no method '{name}'; {hint}") and "\n" not in str(error.value)


def test_a_wrong_setting_is_one_line_with_the_nearest() -> None:
    with pytest.raises(BilectError, match=r"^dsir: unknown key 'bucket'; did you mean 'buckets'\?$"):
        methods.make("dsir", {"bucket": 3})
    with pytest.raises(BilectError, match=r"^perplexity: keep: Input should be 'low', 'middle' or 'high'"):
        methods.make("perplexity", {"keep": "best"})


SHORTEST = """
import numpy as np
from bilect.methods.contract import DocumentMethod

class Shortest(DocumentMethod):
    name, summary, uses_upper = "shortest", "short documents", False

    def score(self, store, rows):
        return -store.length_R[rows].astype(np.float64)

nothing = dict
"""


def test_another_package_registers_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text(SHORTEST, encoding="utf-8")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[bilect.methods]\nshortest = theirs:Shortest\nwrong = theirs:nothing\ngone = theirs:missing\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"shortest", "wrong", "gone"} <= set(methods.names())
    assert methods.make("shortest").summary == "short documents"
    with pytest.raises(BilectError, match=r"^methods: theirs:nothing is no subclass"):
        methods.get("wrong")
    with pytest.raises(BilectError, match=r"^methods: cannot import 'gone' from theirs:missing \(.*missing"):
        methods.get("gone")


def test_a_folder_without_a_method_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BilectError, match=r"holds no saved method \(No such file or directory\); fit it first"):
        methods.load(tmp_path, None)  # type: ignore[arg-type]
