"""What ranks do of work that is shared out; run as a script by a test."""

import os
from typing import Any

import torch

from bilect.engines import Led, Together
from bilect.errors import BilectError
from bilect.runtime import distributed
from tests.distributed.ranks import main


class Squares:
    """Squares of numbers with the process that made them; what it keeps is sent once."""

    def __init__(self) -> None:
        self.sent = 0

    def __getstate__(self) -> dict[str, Any]:
        self.sent += 1
        return {"sent": 0}

    def __call__(self, n: int) -> tuple[int, int]:
        if n == 13:
            raise BilectError("13 is no good")
        return n * n, os.getpid()


def together() -> dict[str, Any]:
    taken: list[int] = []

    def items() -> Any:
        for n in range(100):
            taken.append(n)
            yield n

    results = Together().map(lambda n: (n * n, os.getpid()), items())
    first = next(results)
    drawn = len(taken)
    found = [first, *results]
    return {
        "values": [v for v, _ in found],
        "pids": [p for _, p in found],
        "drawn": drawn,
        "none": [*Together().map(abs, [])],
    }


def led() -> dict[str, Any]:
    engine, square = Led(), Squares()
    if not distributed.is_main():
        engine.serve()
        engine.serve()
        return {}
    found = list(engine.map(square, range(2, 12)))
    again = list(engine.map(square, [5]))
    engine.release()
    error, before = None, []
    try:
        for value, _ in engine.map(square, range(11, 40)):
            before.append(value)
    except BilectError as caught:
        error = str(caught)
    finally:
        engine.release()
    return {
        "values": [v for v, _ in found], "pids": [p for _, p in found], "again": again[0][0], "error": error,
        "before": before, "sent": square.sent,
    }  # fmt: skip


def work() -> dict[str, Any]:
    told = distributed.from_main({"tensor": torch.arange(3)} if distributed.is_main() else None)
    return {"together": together(), "led": led(), "told": told["tensor"].tolist(), "pid": os.getpid()}


if __name__ == "__main__":
    main(work)
