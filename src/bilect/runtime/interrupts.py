"""Ctrl-C is heard within two seconds, whatever is being computed."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Interrupted", "ends_promptly"]

_PATIENCE = 1.5  # seconds that Python has to end in its own way


class Interrupted(BaseException):
    """SIGINT or SIGTERM. No ``KeyboardInterrupt``, of which command line libraries make an exit without a word.

    Attributes:
        code: the exit code of a process that ends by this signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextmanager
def ends_promptly(line: str) -> Iterator[None]:
    """Within it SIGINT and SIGTERM end the process: by ``Interrupted``, if Python gets to raise it in time.

    Python serves signals between two of its own instructions only: not while it waits for the training of a tokenizer,
    a query or a long matrix product. Then a thread ends the process as a kill would, which loses nothing: results are
    put in place whole, and a stage goes on from its last checkpoint. Of use in the main thread, around a whole command.

    Args:
        line: said on standard error in that case.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no other may set handlers
        return
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    watched = [
        number for number, handler in usual.items() if signal.getsignal(number) == handler
    ]  # nohup's are not ours
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    former = {number: signal.signal(number, _raise) for number in watched}
    threading.Thread(target=_watch, args=(ours, watched, line), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in former.items():
            signal.signal(number, handler)
        theirs.close()  # the thread reads the end of it


def _raise(number: int, frame: object) -> None:
    raise Interrupted(number)


def _watch(ours: socket.socket, watched: list[signal.Signals], line: str) -> None:
    with ours:
        while received := ours.recv(1):
            if received[0] in watched:
                time.sleep(_PATIENCE)
                show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""
                os.write(2, f"{show_cursor}{line}\n".encode())
                os._exit(128 + received[0])
