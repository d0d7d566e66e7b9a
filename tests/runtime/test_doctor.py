"""``bilect doctor``: machines that lack something, made up as far as this one allows."""

import json
import socket
import sys
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import Distribution, PackageNotFoundError

import pytest
import torch
from typer.testing import CliRunner

from bilect.cli.commands import app
from bilect.errors import BilectError
from bilect.runtime import doctor

METADATA = """\
Metadata-Version: 2.4
Name: bilect
Version: 9
Requires-Python: >=3.11
Requires-Dist: numpy>=2
Requires-Dist: rich>=999
Requires-Dist: no-such-package>=1; python_version >= "3"
Requires-Dist: not-for-us; python_version < "3"
Provides-Extra: half
Requires-Dist: pytest>=1; extra == "half"
Requires-Dist: no-such-extra; extra == "half"
Provides-Extra: whole
Requires-Dist: pytest>=1; extra == "whole"
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installation that wants what is not here."""
    folder = tmp_path / "bilect-9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    monkeypatch.setattr(doctor, "distribution", lambda name: Distribution.at(folder))


def found(folder, *parts):
    return {c.name: c for c in doctor.examine(folder) if c.part in parts}


def test_packages_and_extras_are_those_of_the_installation(installed, tmp_path):
    packages, extras = found(tmp_path, "package"), found(tmp_path, "extra")
    assert {name: c.state for name, c in packages.items()} == {
        "numpy": "ok", "rich": "failed", "no-such-package": "failed",
    }  # fmt: skip
    assert packages["rich"].found.endswith(", needed is >=999") and packages["rich"].remedy == "pip install 'rich>=999'"
    assert packages["no-such-package"].remedy == "pip install 'no-such-package>=1'"
    assert extras["whole"].state == "ok" and extras["whole"].found == f"pytest {pytest.__version__}"
    half = extras["half"]
    assert (half.state, half.found, half.remedy) == (
        "optional", "no-such-extra not installed", "pip install 'bilect[half]'",
    )  # fmt: skip


def test_the_real_installation_names_every_extra():
    assert {"demo", "hub", "gpu", "lora", "gguf", "eval", "megatron"} <= {*found(doctor.Path(), "extra")}


def test_sources_that_are_not_installed(monkeypatch, tmp_path):
    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "distribution", none)
    assert found(tmp_path, "package")["bilect"].state == "failed"


def test_torch(monkeypatch, tmp_path):
    here = found(tmp_path, "torch")
    assert torch.__version__ in here["torch"].found and f"{torch.get_num_threads()} threads" in here["CPU"].found
    gpus = found(tmp_path, "gpu")
    assert len(gpus) == max(torch.cuda.device_count(), 1)
    assert ("GPU" in gpus and gpus["GPU"].state == "optional") == (torch.cuda.device_count() == 0)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert found(tmp_path, "torch", "gpu")["torch"].state == "failed"


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    checks = found(tmp_path / "a" / "b", "folder")
    assert {name: c.state for name, c in checks.items()} == {"free disk": "ok", "writing": "ok", "locks": "ok"}
    assert checks["free disk"].found.endswith(f" GiB in {tmp_path}") and list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    assert found(tmp_path / "file", "folder")["writing"].state == "failed"


def test_little_disk_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "LOW_DISK", 1 << 60)
    assert found(tmp_path, "folder")["free disk"].state == "optional"


def test_locks_that_fail_or_keep_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "locked", nullcontext)
    assert found(tmp_path, "folder")["locks"].found == "a lock keeps nobody out here"

    def refused(path):
        raise BilectError("run: cannot write")

    monkeypatch.setattr(doctor, "locked", refused)
    assert found(tmp_path, "folder")["locks"].state == "failed"


class _Server(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(500)
        self.end_headers()

    def log_message(self, *words):
        pass


def test_the_hub_answers_refuses_is_silent_or_is_not_wanted(tmp_path, monkeypatch):
    def hub(port):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        (check,) = found(tmp_path, "hub").values()
        return check

    assert hub(1).found.startswith("offline, as HF_HUB_OFFLINE says")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "HUB_PATIENCE", 0.3)
    with HTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        check = hub(server.server_port)
        server.shutdown()
    assert (check.state, check.found) == ("ok", f"http://127.0.0.1:{server.server_port} answers")
    assert (refused := hub(server.server_port)).state == "optional" and "refused" in refused.found
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        assert hub(silent.getsockname()[1]).state == "optional"
        assert time.monotonic() - start < 5


def test_the_command(tmp_path, monkeypatch):
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "All that is required works." in result.output and "│" not in result.output
    assert "extra hub" in result.output and "numpy" not in result.output
    asked = CliRunner().invoke(app, ["doctor", str(tmp_path), "--json"])
    told = json.loads(asked.stdout)
    assert asked.exit_code == 0 and told["ok"] and told["folder"] == str(tmp_path)
    assert {"part": "package", "name": "numpy"}.items() <= next(
        c for c in told["checks"] if c["name"] == "numpy"
    ).items()


def test_what_is_required_fails(tmp_path, installed):
    asked = CliRunner().invoke(app, ["doctor", str(tmp_path), "--json"])
    assert asked.exit_code == 1 and not json.loads(asked.stdout)["ok"]
    shown = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert shown.exit_code == 1 and "What is required fails: rich, no-such-package" in shown.output
