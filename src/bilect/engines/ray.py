"""Actors of a Ray cluster (``bilect[ray]``): of the one that runs here, or of a Ray started for this process.

Actors of Ray's core, not Ray Data: the work is calls that leave files, by workers that keep what they have loaded; Ray
Data would move rows between operators of its own, and cut, order and write them in its own way.

A cluster is joined where ``RAY_ADDRESS`` or a ``ray start`` on this machine says so. An actor takes as many CPUs as its
libraries use threads, and a GPU where the cluster has some; more actors than GPUs share them evenly. No item waits for
an actor that has no place yet: it starts when there is one, as where the cluster adds nodes for it.
"""

import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from bilect.engines._calls import Calls, environment
from bilect.engines._pool import Died, Pool, Worker
from bilect.engines.contract import ATTEMPTS, Engine
from bilect.errors import BilectError, reason
from bilect.runtime.workers import cores

__all__ = ["Ray", "share", "start"]

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # what the cluster reports would go to standard output, among results
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray warns of unless it is set
    "RAY_prestart_worker_first_driver": "0",  # processes without the environment of ours
}


def start(workers: int | None, folder: Path | None) -> Engine:
    """``workers`` actors; by default one for each GPU of the cluster, or else for each CPU.

    Raises:
        BilectError: Ray is not installed.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)  # read when Ray is imported
    try:
        import ray
    except ImportError as error:
        raise BilectError("engine: ray is not installed: pip install 'bilect[ray]'") from error
    return Ray(ray, workers, folder)


class Ray(Pool):
    """Actors, and the connection to their cluster, which is made with the first work.

    Args:
        ray: the library.
        workers: their number; None follows the cluster, and asks for as many again as it has room for, which a cluster
            that scales makes room for.
        folder: which all nodes must share.
    """

    def __init__(self, ray: ModuleType, workers: int | None, folder: Path | None) -> None:
        super().__init__()
        self._ray, self._count, self._folder = ray, workers, folder
        self._open = ExitStack()
        self._joined = False
        self._alone = False  # with a Ray that was started for this process
        self._mark: str | None = None  # a file that all nodes must see

    def close(self) -> None:
        """See ``Engine``; the cluster goes on, unless it was started for this process."""
        super().close()
        self._open.close()

    def _limit(self) -> int:
        if not self._joined:
            self._join()
            self._joined = True
        if self._count is not None:
            return self._count
        room = self._ray.cluster_resources()
        number = max(int(room.get("GPU", 0) or room.get("CPU", 0)), 1)
        return number if self._alone else 2 * number

    def _shared(self, function: bytes) -> Any:
        return self._ray.put(function)

    def _worker(self, number: int) -> Worker:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cpus, gpus = share(self._count, [(int(n.get("CPU", 0)), int(n.get("GPU", 0))) for n in nodes])
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        settings = {**environment(cpus), "PYTHONPATH": paths}
        kind = self._ray.remote(_Served).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": settings}
        )
        return _Actor(self._ray, kind, self._mark)

    def _join(self) -> None:
        if not self._ray.is_initialized():
            former = signal.getsignal(signal.SIGTERM)
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    self._connect()
                    break
                except BilectError:
                    raise
                except Exception as error:  # such as a node that a busy machine has not started within 30 seconds
                    self._ray.shutdown()
                    if attempt == ATTEMPTS:
                        raise BilectError(f"engine: no Ray can be started or joined: {_first_line(error)}") from error
                finally:
                    if threading.current_thread() is threading.main_thread():
                        signal.signal(signal.SIGTERM, former)  # Ray puts its own in place
            self._open.callback(self._ray.shutdown)
        if self._folder is not None and not self._alone:
            there = next(path for path in (self._folder, *self._folder.absolute().parents) if path.is_dir())
            handle, self._mark = tempfile.mkstemp(dir=there, prefix=".bilect-ray-")
            os.close(handle)
            self._open.callback(Path(self._mark).unlink, missing_ok=True)

    def _connect(self) -> None:
        address, quiet = _address(), {"log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            size = max(cores(), self._count or 1)
            self._ray.init("local", num_cpus=size, include_dashboard=False, **quiet)
            self._alone = True
        else:
            _check(address)
            self._ray.init(**quiet)  # finds the same one, with the token that a cluster on this machine may want


def _address() -> str:
    """Of the cluster to join, or "local"; as Ray finds it, but for clusters that others have started for themselves."""
    given = os.environ.get("RAY_ADDRESS") or "auto"
    if given != "auto":
        return given
    try:
        return Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text("utf-8").strip()
    except OSError:
        return "local"


def _check(address: str) -> None:
    """Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise BilectError(f"engine: no Ray cluster answers at {address}: {reason(error)}; RAY_ADDRESS names another, "
                          "and `ray stop` forgets one that is gone") from error  # fmt: skip


def share(workers: int | None, nodes: Sequence[tuple[int, int]]) -> tuple[int, float]:
    """CPUs and GPUs of an actor, so that ``workers`` of them find a place: as many CPUs as can be, at most one GPU.

    Args:
        workers: number of actors; None: one for each GPU, or one for each CPU where there are none.
        nodes: CPUs and GPUs of every node.
    """
    gpus = sum(n for _, n in nodes)
    number = workers or gpus or sum(n for n, _ in nodes) or 1
    cpus = [c for c in range(1, max((n for n, _ in nodes), default=1) + 1) if sum(n // c for n, _ in nodes) >= number]
    return max(cpus, default=1), 1 / -(-number // gpus) if gpus else 0


class _Served:
    """The inside of an actor."""

    def __init__(self, folder: str) -> None:
        with suppress(OSError):  # of another machine
            os.chdir(folder)  # relative paths are the parent's
        self._calls = Calls()

    def sees(self, mark: str | None) -> bool:
        return mark is None or os.path.exists(mark)

    def call(self, key: str, function: list[Any], item: bytes) -> bytes:
        import ray

        answer = self._calls(key, lambda: ray.get(function[0]), pickle.loads(item))
        return pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)


class _Actor(Worker):
    """An actor, or after its death another one."""

    def __init__(self, ray: ModuleType, kind: Any, mark: str | None) -> None:
        self._ray, self._kind, self._mark = ray, kind, mark
        self._handle: Any = None
        self._lock, self._closed, self._ready = threading.Lock(), False, False

    def start(self) -> None:
        """See ``Worker``; waits until the cluster has a place for it."""
        if self._ready:
            return
        with self._lock:
            if self._closed:
                raise Died("closed")
            self._handle = self._kind.remote(os.getcwd())
        if not self._get(self._handle.sees.remote(self._mark)):
            folder = os.path.dirname(self._mark or "")
            raise BilectError(f"engine: a node of the Ray cluster does not see {folder}; the folder of results must "
                              "lie on a file system that all of them share")  # fmt: skip
        self._ready = True

    def call(self, key: str, function: Any, item: Any) -> tuple[bool, Any]:
        """See ``Worker``."""
        sent = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        answer: tuple[bool, Any] = pickle.loads(self._get(self._handle.call.remote(key, [function], sent)))
        return answer

    def close(self) -> None:
        """See ``Worker``."""
        with self._lock:
            self._closed = True
            if self._handle is not None:
                self._ray.kill(self._handle)

    def _get(self, answer: Any) -> Any:
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayActorError as error:
            self._ready = False
            self._ray.kill(self._handle)  # where it is only out of reach
            raise Died(_how(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _how(error: Exception) -> str:
    """The detail that Ray gives, without what it guesses at."""
    detail = " ".join(str(error).split()).rpartition("exit detail: ")[2]
    return detail.partition(". Some common causes")[0]
