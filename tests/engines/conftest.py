"""Engines for the tests of their contract; Ray is started once."""

import signal
from collections.abc import Iterator

import pytest

from bilect.engines import Engine, Here, open_engine
from bilect.errors import BilectError


@pytest.fixture(scope="session")
def started_ray() -> Iterator[None]:
    """A small Ray of two CPUs, which engines join."""
    try:
        open_engine("ray").close()  # imports Ray, which reads its settings then
    except BilectError as error:
        pytest.skip(str(error))
    import ray

    former = signal.getsignal(signal.SIGTERM)
    for attempt in range(1, 4):  # Ray gives a node 30 seconds to start, which a busy machine may miss
        try:
            ray.init("local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False,
                     logging_level="ERROR")  # fmt: skip
            break
        except Exception:
            ray.shutdown()
            if attempt == 3:
                raise
    signal.signal(signal.SIGTERM, former)  # Ray has put its own in place, which later tests must not meet
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def local() -> Iterator[Engine]:
    """Two processes."""
    with open_engine("local", 2) as engine:
        yield engine


@pytest.fixture(scope="module")
def ray(started_ray: None) -> Iterator[Engine]:
    """Two actors."""
    with open_engine("ray", 2) as engine:
        yield engine


@pytest.fixture(params=["local", "ray"])
def two(request: pytest.FixtureRequest) -> Engine:
    """Two workers, of either engine."""
    engine: Engine = request.getfixturevalue(request.param)
    return engine


@pytest.fixture(params=["here", "local", "ray"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Every engine."""
    return Here() if request.param == "here" else request.getfixturevalue(request.param)
