"""Which revision of its sources the program runs from."""

import subprocess
from pathlib import Path

__all__ = ["git_revision"]


def git_revision(package: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of the checkout that a package runs from.

    None where it was installed, also where that was into a folder within somebody's repository: only sources that git
    keeps have a revision.

    Args:
        package: folder of the package.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(package, "rev-parse", "HEAD")


def _git(folder: Path, *words: str) -> str | None:
    try:
        result = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
