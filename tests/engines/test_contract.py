"""Every engine: results in order, a killed worker costs its item alone, nothing outlives the parent."""

import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from bilect.engines import Here, names, open_engine
from bilect.errors import BilectError
from bilect.runtime.workers import cores
from tests.engines.work import DiesOnce, Square, faulty, meeting, sleeping, threads
from tests.runtime.test_workers import alive


def test_engines_are_found_by_name():
    assert names() == ["local", "ray"]
    assert isinstance(open_engine(), Here) and isinstance(open_engine("local", 1), Here)
    with pytest.raises(BilectError, match=r"no engine 'rya'; did you mean 'ray'"):
        open_engine("rya")


def test_results_are_in_the_order_of_the_items(engine, tmp_path):
    assert list(engine.map(Square(tmp_path), range(20))) == [n * n for n in range(20)]
    assert sorted(int(p.name.split("-")[0]) for p in tmp_path.iterdir()) == list(range(20))


def test_both_workers_work(two, tmp_path):
    processes = set(two.map(meeting, [tmp_path, tmp_path]))  # each waits for the other
    assert len(processes) == 2 and os.getpid() not in processes


def test_items_are_taken_as_they_are_needed(engine, tmp_path):
    taken = []

    def items():
        for n in range(50):
            taken.append(n)
            yield n

    results = engine.map(Square(tmp_path), items())
    assert next(results) == 0 and len(taken) <= 5
    del results
    assert len(list(tmp_path.iterdir())) <= 5


def test_one_item_or_none_is_done_here(engine, tmp_path):
    assert list(engine.map(Square(tmp_path), [])) == [] and list(engine.map(Square(tmp_path), [7])) == [49]
    assert [p.name for p in tmp_path.iterdir()] == [f"7-{os.getpid()}"]


def test_what_a_function_raises_is_that_of_the_first_item_in_order(engine):
    with pytest.raises(BilectError, match=r"^item 3 is wrong$"):
        list(engine.map(faulty, [1, 2, 3, 0]))
    with pytest.raises(ZeroDivisionError):
        list(engine.map(faulty, [1, 0, 3]))


def test_what_a_worker_raises_arrives_whole(two):
    with pytest.raises(ZeroDivisionError) as caught:
        list(two.map(faulty, [1, 0]))
    assert "in faulty" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match=r"Strange: 1 and 2"):
        list(two.map(faulty, [4, 5]))
    assert list(two.map(faulty, [1, 2])) == [1, 2]  # the workers go on
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        list(two.map(lambda n: n, [1, 2]))


def test_a_killed_worker_costs_its_item_alone(two, tmp_path):
    assert list(two.map(DiesOnce(tmp_path, (0, 3)), range(8))) == [n * n for n in range(8)]


def test_an_item_that_always_kills_is_one_line(two, tmp_path):
    line = r"engine: a worker process died \((SIGKILL|Worker .*)\) at each of 3 attempts .*fewer --workers"
    with pytest.raises(BilectError, match=f"^{line}$"):
        list(two.map(DiesOnce(tmp_path, (1,), always=True), range(3)))
    assert list(two.map(Square(tmp_path), [1, 2])) == [1, 4]


def test_a_worker_has_its_share_of_the_cores(two):
    each = max(cores() // 2, 1)
    expected = [str(each), str(each), "true" if each > 1 else "false"]
    assert list(two.map(threads, range(2))) == [expected] * 2


SCRIPT = """
from bilect.engines import open_engine
from tests.engines.work import sleeping
engine = open_engine("local", 2)
print(next(engine.map(sleeping, [0, 1, 2])), flush=True)  # no guard around it: workers do not run this again
END
"""


@pytest.mark.parametrize("end", ["input()", "engine.close()"])
def test_workers_do_not_outlive_their_parent(tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("END", end))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    worker = int(process.stdout.readline())
    if end == "input()":
        assert alive(worker)
        process.send_signal(signal.SIGKILL)
    process.wait(20)
    limit = time.monotonic() + 20
    while alive(worker):
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert sleeping(0) == os.getpid()
