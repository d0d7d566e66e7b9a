"""One finished run that several files look at."""

import pytest

from bilect.config import parse_config
from bilect.pipeline.stages import run
from tests.corpus import tiny_settings, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory):
    """Directory and summary of two rounds with both controls; not to be written to."""
    out = tmp_path_factory.mktemp("run") / "two-rounds"
    summary = run(parse_config(tiny_settings(corpus, rounds=2, controls=["random", "full"])), out)
    return out, summary
