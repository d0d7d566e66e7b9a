"""What the line of a stage says of its speed."""

import pytest

from bilect.runtime import progress


@pytest.mark.parametrize(
    ("done", "seconds", "speed"), [(2, 8, "0.25 steps/s"), (30, 2, "15 steps/s"), (9000, 2, "4,500 steps/s")]
)
def test_slow_and_fast_speeds_can_be_read(monkeypatch, capsys, done, seconds, speed):
    clock = iter([0.0, 0.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock, float(seconds)))
    with progress.RichProgress() as shown, shown.task("fit", 10, unit="steps") as task:
        task.advance(done, loss=1.5)
    assert f" {speed}  loss 1.500" in capsys.readouterr().out
