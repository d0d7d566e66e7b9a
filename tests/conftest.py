"""What every test shares: one thread unless OMP_NUM_THREADS says otherwise (two ranks and the suite share two
cores), and reproducible draws.
"""

import atexit
import os
import shutil
import signal
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["BILECT_CACHE"] = tempfile.mkdtemp(prefix="bilect-cache-")  # never the user's, nor a subprocess's own

if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):  # then each process would compile torch, transformers ... anew: 15 s
    sys.dont_write_bytecode, sys.pycache_prefix = False, tempfile.mkdtemp(prefix="bilect-bytecode-")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a shell, and every child with it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("bilect", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("bilect")


@pytest.fixture(scope="session", autouse=True)
def _cache() -> Iterator[None]:
    folder = os.environ["BILECT_CACHE"]
    yield
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, standard output and standard error of a command."""

    from bilect.cli.commands import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bilect", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capfd.readouterr())

    return run
