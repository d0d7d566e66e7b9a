"""The inside of a worker, whatever started it: functions come once, items one after another."""

import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from bilect.errors import BilectError

__all__ = ["Calls", "environment", "portable", "serve"]


def environment(threads: int) -> dict[str, str]:
    """What tells the libraries of a worker how many threads to use, and to draw no bars of their own."""
    sizes = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads)
    )
    return {**sizes, "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false", "TQDM_DISABLE": "1"}


class Calls:
    """The newest function that a worker was sent, and calls of it."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._function: Callable[[Any], Any] | None = None

    def __call__(self, key: str, function: Callable[[], bytes], item: Any) -> tuple[bool, Any]:
        """Whether the function has returned, and what; or what it has raised.

        Args:
            key: of the function.
            function: gives it pickled; asked where another function was here last.
            item: of the call.
        """
        try:
            if key != self._key:
                self._function, self._key = None, None  # the former one may hold a model
                self._function, self._key = pickle.loads(function()), key
            assert self._function is not None
            return True, self._function(item)
        except Exception as error:
            return False, portable(error)


def serve() -> None:
    """Answer the calls that come through standard input, until it ends: with the parent, however that ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    waiting: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive, args=(waiting,), daemon=True).start()
    calls = Calls()
    while True:
        pickle.dump(_answer(calls, *waiting.get()), answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


def _answer(calls: Calls, key: str, function: bytes, item: Any) -> tuple[bool, Any]:
    return calls(key, lambda: function, item)


def _receive(waiting: "SimpleQueue[Any]") -> None:
    try:
        while True:
            waiting.put(pickle.load(sys.stdin.buffer))
    finally:
        os._exit(1)  # at once: a parent that was killed must not leave its workers at work


def portable(error: Exception) -> Exception:
    """An exception that arrives whole, with its traceback in words."""
    if not isinstance(error, BilectError):
        error.add_note(f"in a worker:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(traceback.format_exc())
