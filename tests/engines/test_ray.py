"""What is Ray's own: how a cluster is shared, what its nodes must see, and how it ends."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from bilect.engines import open_engine
from bilect.errors import BilectError
from tests.engines.work import faulty
from tests.runtime.test_workers import alive


def test_actors_find_a_place_and_share_what_there_is():
    share = pytest.importorskip("bilect.engines.ray").share
    assert share(None, [(16, 0), (16, 0)]) == (1, 0)
    assert share(4, [(16, 0), (16, 0)]) == (8, 0)
    assert share(4, [(3, 0), (3, 0), (3, 0)]) == (1, 0)  # not 9 // 4: two nodes could hold one each, but no third
    assert share(2, [(0, 0), (2, 0)]) == (1, 0) and share(1, [(0, 0), (2, 0)]) == (2, 0)
    assert share(100, [(16, 0)]) == (1, 0) and share(None, []) == (1, 0)
    assert share(None, [(16, 4)]) == (4, 1) and share(2, [(16, 4)]) == (8, 1)
    assert share(5, [(16, 4)]) == (3, 0.5) and share(16, [(16, 4)]) == (1, 0.25)


def test_a_cluster_that_is_gone_is_one_line(monkeypatch):
    ray = pytest.importorskip("ray", reason="bilect[ray] is not installed")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever other tests have started
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    line = f"engine: no Ray cluster answers at {address}: Connection refused; RAY_ADDRESS .* gone"
    with open_engine("ray", 2) as engine, pytest.raises(BilectError, match=f"^{line}$"):
        list(engine.map(faulty, [1, 2]))


def test_a_folder_that_a_node_does_not_see_is_one_line(started_ray, tmp_path):
    def items():
        yield from [1, 2]
        (mark,) = tmp_path.iterdir()
        mark.unlink()  # as on another disk, while the actors start
        yield 3

    line = f"engine: a node of the Ray cluster does not see {tmp_path}; the folder of results must lie on .* share"
    with open_engine("ray", 2, tmp_path / "later") as engine, pytest.raises(BilectError, match=f"^{line}$"):
        list(engine.map(faulty, items()))


SCRIPT = """
from bilect.engines import open_engine
from bilect.runtime.interrupts import Interrupted, ends_promptly
from tests.engines.work import sleeping
try:
    with ends_promptly("too late"), open_engine("ray", 2) as engine:
        results = engine.map(sleeping, [0, 1, 2])
        print(next(results), flush=True)
        next(results)
except Interrupted as error:
    print(error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_ray_of_its_own_ends_with_the_process(tmp_path, number):
    pytest.importorskip("ray", reason="bilect[ray] is not installed")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_ADDRESS": "local"}
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=environment, start_new_session=True)  # fmt: skip
    worker = int(process.stdout.readline())
    assert alive(worker)
    begin = time.monotonic()
    os.killpg(process.pid, number)  # as a terminal does
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - begin < 2.5
    assert number == signal.SIGKILL or (out, err) in [(f"{number.name}\n", ""), ("", "too late\n")]
    limit = time.monotonic() + 20
    while alive(worker):
        assert time.monotonic() < limit
        time.sleep(0.05)
