"""What works on this machine, and what to install or do where something does not.

Nothing here needs torch to be there, or the network to answer: that is what is found out.
"""

import os
import platform
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bilect.errors import BilectError, reason
from bilect.runtime.locks import locked
from bilect.runtime.workers import cores

__all__ = ["Check", "State", "examine"]

State = Literal["ok", "optional", "failed"]
HUB_PATIENCE = 2.0  # seconds
LOW_DISK = 5 * 2**30  # bytes


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        part: what it belongs to: python, package, torch, gpu, extra, folder or hub.
        name: of the thing.
        state: "optional" is not there, or not as it should be, and nothing stops for it.
        found: what there is.
        remedy: what to install or do; empty where that is nothing.
    """

    part: str
    name: str
    state: State
    found: str
    remedy: str = ""


def examine(folder: Path) -> list[Check]:
    """Everything, in the order of a table.

    Args:
        folder: where results are to be written; need not exist.
    """
    try:
        own = distribution("bilect")
    except PackageNotFoundError:
        installed = [Check("package", "bilect", "failed", "runs from its sources, without being installed",
                           "pip install -e . in the folder of the project")]  # fmt: skip
    else:
        installed = [*_python(own), *_packages(own), *_extras(own)]
    extras = [check for check in installed if check.part == "extra"]
    return [*(c for c in installed if c.part != "extra"), *_torch(), *_folder(folder), _hub(), *extras]


def _python(own: Distribution) -> Iterator[Check]:
    wanted = own.metadata["Requires-Python"] or ""
    fine = SpecifierSet(wanted).contains(platform.python_version(), prereleases=True)
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Check("python", "Python", "ok" if fine else "failed", found, "" if fine else f"Python {wanted}")


def _packages(own: Distribution) -> Iterator[Check]:
    for requirement in _requirements(own, ""):
        found, fine = _installed(requirement)
        remedy = "" if fine else f"pip install {str(requirement).split(';')[0].strip()!r}"
        yield Check("package", requirement.name, "ok" if fine else "failed", found, remedy)


def _extras(own: Distribution) -> Iterator[Check]:
    everywhere = {str(r) for r in _requirements(own, "")}
    for extra in sorted(own.metadata.get_all("Provides-Extra") or []):
        needed = [r for r in _requirements(own, extra) if str(r) not in everywhere and r.name != "bilect"]
        found = {r.name: _installed(r) for r in needed}
        lacking = [f"{name} {text}" for name, (text, fine) in found.items() if not fine]
        if lacking:
            yield Check("extra", extra, "optional", ", ".join(lacking), f"pip install 'bilect[{extra}]'")
        else:
            there = [f"{name} {text}" for name, (text, _) in found.items()]
            yield Check("extra", extra, "ok", ", ".join(there) if len(there) < 4 else f"{len(there)} packages")


def _requirements(own: Distribution, extra: str) -> list[Requirement]:
    """What is needed on this machine with an extra, or with none."""
    found = [Requirement(text) for text in own.requires or []]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": extra})]


def _installed(requirement: Requirement) -> tuple[str, bool]:
    """What there is of a package, and whether it is what is needed."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return "not installed", False
    fine = requirement.specifier.contains(found, prereleases=True)
    return (found, True) if fine else (f"{found}, needed is {requirement.specifier}", False)


def _torch() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # a library of the system that is missing raises what it likes
        yield Check("torch", "torch", "failed", reason(error), "install PyTorch anew: https://pytorch.org/get-started")
        return
    capability = torch.backends.cpu.get_cpu_capability()
    built = torch.version.cuda or torch.version.hip
    yield Check("torch", "torch", "ok", f"{torch.__version__}, built for {f'GPUs ({built})' if built else 'CPUs'}")
    yield Check("torch", "CPU", "ok", f"{capability}, {torch.get_num_threads()} threads on {cores()} cores")
    if not torch.cuda.is_available():
        remedy = "a driver that this build can use" if built else "a build for GPUs: https://pytorch.org/get-started"
        yield Check("gpu", "GPU", "optional", "none that PyTorch sees; the CPU is used", f"if there is one: {remedy}")
        return
    for number in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(number)
        with torch.cuda.device(number):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        found = f"{of.name}, {of.total_memory / 2**30:.0f} GiB, {'bf16' if bf16 else 'no bf16'}"
        yield Check("gpu", f"GPU {number}", "ok", found, "" if bf16 else "leave the bf16 settings false")


def _folder(folder: Path) -> Iterator[Check]:
    """Of a folder that is not there yet, the one that it would be made in."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    try:
        free = shutil.disk_usage(there).free
        enough = free >= LOW_DISK
        remedy = "" if enough else "free some: token files and models are some gigabytes"
        yield Check(
            "folder", "free disk", "ok" if enough else "optional", f"{free / 2**30:,.1f} GiB in {there}", remedy
        )
        with tempfile.TemporaryDirectory(dir=there, prefix=".bilect-doctor-") as scratch:
            yield Check("folder", "writing", "ok", f"works in {there}")
            yield _locks(Path(scratch) / "run")
    except OSError as error:
        yield Check("folder", "writing", "failed", f"{there}: {reason(error)}", "another folder: bilect doctor FOLDER")


def _locks(run: Path) -> Check:
    """The lock of a run directory keeps a second one out."""
    try:
        with locked(run):
            by_file = (run / ".lock.soft").exists()
            kept_out = _is_locked(run)
    except BilectError as error:
        return Check("folder", "locks", "failed", str(error), "another folder: bilect doctor FOLDER")
    if not kept_out:
        return Check(
            "folder", "locks", "optional", "a lock keeps nobody out here", "start one process in a run directory"
        )
    if by_file:
        return Check("folder", "locks", "ok", "by files: the file system has no locks of its own",
                     "after a kill on another machine, delete .lock.soft")  # fmt: skip
    return Check("folder", "locks", "ok", "of the system")


def _is_locked(run: Path) -> bool:
    try:
        with locked(run):
            return False
    except BilectError:
        return True


def _hub() -> Check:
    try:
        from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    except ImportError:
        return Check("hub", "Hugging Face Hub", "optional", "no library for it", "pip install huggingface_hub")
    if HF_HUB_OFFLINE:
        return Check("hub", "Hugging Face Hub", "ok", "offline, as HF_HUB_OFFLINE says: only local files are read")
    answer = list[str]()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=HUB_PATIENCE):
                answer.append("")
        except urllib.error.HTTPError:
            answer.append("")  # it answers
        except Exception as error:
            inner = getattr(error, "reason", None)
            answer.append(reason(inner if isinstance(inner, Exception) else error))

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    asking.start()
    asking.join(HUB_PATIENCE)
    problem = answer[0] if answer else f"no answer within {HUB_PATIENCE:g} s"
    if not problem:
        return Check("hub", "Hugging Face Hub", "ok", f"{ENDPOINT} answers")
    return Check("hub", "Hugging Face Hub", "optional", f"{ENDPOINT}: {problem}",
                 "models and data from local folders; HF_HUB_OFFLINE=1 spares the waiting")  # fmt: skip
