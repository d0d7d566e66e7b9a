"""``bilect --version``: the revision where it runs from a checkout, and only there."""

import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bilect
from bilect.cli.commands import app
from bilect.runtime.revision import git_revision

NOBODY = ("-c", "user.name=x", "-c", "user.email=x@example.invalid", "-c", "commit.gpgsign=false")


def git(folder: Path, *words: str) -> str:
    result = subprocess.run(["git", *NOBODY, *words], cwd=folder, check=True, capture_output=True, text=True)
    return result.stdout.strip()


@pytest.fixture
def package(tmp_path):
    """A package that git keeps."""
    package = tmp_path / "src" / "bilect"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return package


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_checkout_has_a_revision_and_what_is_installed_within_it_has_none(package, tmp_path):
    assert git_revision(package) == git(tmp_path, "rev-parse", "HEAD")
    installed = tmp_path / ".venv" / "lib" / "site-packages" / "bilect"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    assert git_revision(installed) is None


def test_without_git_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() is None


@pytest.mark.parametrize(("revision", "line"), [("0123456789abcdef", " (0123456789ab)"), (None, "")])
def test_the_version_names_it(monkeypatch, revision, line):
    monkeypatch.setattr("bilect.runtime.revision.git_revision", lambda: revision)
    assert CliRunner().invoke(app, ["--version"]).output == f"bilect {bilect.__version__}{line}\n"
