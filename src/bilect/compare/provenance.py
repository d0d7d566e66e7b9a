"""Where the figures of a comparison come from: program, machine, texts and settings, but not whose they are.

A comparison is made to be shown to others: no path, address or host name is in it, and files keep their names alone.
"""

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilect import __version__
from bilect.compare.cells import Cell
from bilect.data.sources import set_name
from bilect.methods import methods_of
from bilect.pipeline.context import RunContext
from bilect.pipeline.directory import read_manifest
from bilect.runtime.files import content_hash
from bilect.runtime.progress import SilentProgress
from bilect.runtime.revision import git_revision
from bilect.runtime.workers import cores

__all__ = ["machine", "nameless", "program", "setting"]

_PLACE = re.compile(r"^(?:[/\\~]|[A-Za-z]:[/\\])|://|::")  # an absolute path, or an address


def program() -> dict[str, Any]:
    """What computed: the version, and the revision of its sources where they are kept by git."""
    return {"version": __version__, "revision": git_revision()}


def machine(gpus: bool, cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """What it ran on, in general words.

    Args:
        gpus: whether the runs may use them; else none is named.
        cpuinfo: where Linux names its processor.
    """
    import torch

    listed = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", listed, re.MULTILINE)
    used = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if gpus else []
    return {
        "processor": found[1].strip() if found else platform.processor() or platform.machine(),
        "cores": cores(),
        "gpus": used,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def setting(cell: Cell) -> dict[str, Any]:
    """Texts, settings, and the methods with theirs, of a variant, from one of its finished runs.

    Texts are told by role: the names of their sources, how many documents (pieces, where long ones are cut) and tokens
    were read, and a hash of their content, which is the same wherever the same files lie.
    """
    run, manifest = RunContext(cell.folder, cell.config, SilentProgress()), read_manifest(cell.folder)
    stores = {"upper": [store for _, _, store in run.upper_sets()], "heldout": list(run.heldout_sets().values())}
    counts = {role: {"documents": sum(map(len, own)), "tokens": sum(int(s.length_R.sum()) for s in own)}
              for role, own in stores.items()}  # fmt: skip
    pool = manifest["stages"]["tokenise pool"]
    counts = {"pool": {key: pool[key] for key in ("documents", "tokens")}, **counts}
    roles = {"pool": "lower_data", "upper": "upper_data", "heldout": "heldout_data"}
    texts = {}
    for role, group in roles.items():
        identities = sorted(manifest["inputs"].get(group, {}).values())
        names = [set_name(source) for source in getattr(cell.config.data, group)]
        texts[role] = {"names": names, **counts[role], "fingerprint": content_hash(identities)}
    methods = {arm: method.config.model_dump(mode="json") for arm, method in methods_of(cell.config).items()}
    not_compared = ("seed", "compare", "methods", "engine", "workers", "method", "controls")
    config = cell.config.model_dump(mode="json", exclude={**dict.fromkeys(not_compared, True), "models": {"shard"}})
    return {"texts": texts, "config": nameless(config), "methods": nameless(methods)}


def nameless(value: Any) -> Any:
    """A copy of plain settings in which whatever is a place is its last name alone."""
    if isinstance(value, Mapping):
        return {key: nameless(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [nameless(inner) for inner in value]
    if isinstance(value, str) and _PLACE.search(value):
        return re.split(r"[/\\]", value.split("?")[0].rstrip("/\\"))[-1]
    return value
