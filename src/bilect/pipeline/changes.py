"""A finished run is not replaced unasked: what differs now from what it was made of, in words, and what that repeats.

Stages are keyed by what their inputs hold, not by how paths are spelt: ``sources_content`` and ``model_content`` are
what goes into their settings. Each record in ``run.json`` keeps the settings that its key was made of (``made_of``).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from bilect.config import SourceConfig
from bilect.data.cache import file_hash
from bilect.data.sources import set_name
from bilect.errors import BilectError
from bilect.models.presets import PRESETS
from bilect.pipeline.directory import plain, stage_key

__all__ = ["check_repeats", "model_content", "sources_content"]

_MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
_LISTED = 4  # changes, and stages, that a message names


class _Stage(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def settings(self) -> Any: ...
    @property
    def reads(self) -> Sequence[str]: ...


def sources_content(
    sources: Sequence[SourceConfig], hashes: Mapping[str, str], *, named: bool = False
) -> list[dict[str, Any]]:
    """What a role's sources hold and how it is read, for the settings of a stage; another path to the same is the same.

    The names of files count, below the folder that all of them share: labels and ids can follow from them.

    Args:
        sources: of the config.
        hashes: content of their inputs, by path, see ``texts.input_hashes``.
        named: whether a set's own name counts, as with target sets.
    """
    folders = [where.split("/")[:-1] for where in hashes]
    shared = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False)))
    content = [["/".join(where.split("/")[shared:]), value] for where, value in hashes.items()]
    settings = [source.model_dump(mode="json", exclude={"path"}) for source in sources]
    names = [{"set": set_name(source)} if named else {} for source in sources]
    return [{"content": content}, *({**s, **n} for s, n in zip(settings, names, strict=True))]


def model_content(spec: Any) -> Any:
    """Hashes of the files of a model or tokenizer that is given by a path; else the name, or the config, itself."""
    if not isinstance(spec, str) or spec in PRESETS:
        return spec
    path = Path(spec).expanduser()
    if path.is_file():
        return file_hash(path)
    if not path.is_dir():
        return spec  # a name on the Hub
    return {p.name: file_hash(p) for p in sorted(path.iterdir()) if p.is_file() and p.suffix in _MODEL_FILES}


def check_repeats(
    folder: Path,
    manifest: Mapping[str, Any],
    plan: Iterable[_Stage],
    present: Mapping[str, Any],
    *,
    repeat: bool = False,
) -> None:
    """Stop before results of a finished run are replaced, unless that is wanted. A run that has not finished goes on.

    Args:
        folder: the run directory, for the message.
        manifest: as it lies there, see ``directory.read_manifest``: with the inputs of the finished run.
        plan: the stages that are about to be carried out.
        present: inputs now, by role: hash by path.
        repeat: whether the user has agreed (``--yes``).

    Raises:
        BilectError: what has changed, and which stages would be repeated.
    """
    if repeat or "finished" not in manifest:
        return
    records, keys, changed = manifest["stages"], dict[str, str](), list[str]()
    words = _inputs_changed(manifest.get("inputs", {}), present)
    for stage in plan:
        keys[stage.name] = stage_key(stage.name, stage.settings, [keys.get(name) for name in stage.reads])
        record = records.get(stage.name)
        if record is None or record["key"] == keys[stage.name]:
            continue
        changed.append(stage.name)
        if "made_of" in record:
            words += _differences(record["made_of"], plain(stage.settings))
    if changed:
        what = list(dict.fromkeys(words)) or [f"it was made by another version ({manifest.get('bilect_version', '?')})"]
        raise BilectError(
            f"run: {folder} holds a finished run, and {_listed(what, '; ')}. This would repeat {len(changed)} of its "
            f"stages ({_listed(changed, ', ')}) and replace their results: say --yes, or choose another --out"
        )


def _inputs_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which files of each role have changed, come or gone; one that only lies elsewhere has not."""
    words = []
    for role in now:
        old, new = before.get(role, {}), now[role]
        held = {"changed": [p for p in new if p in old and new[p] != old[p]],
                "new": [p for p in new if p not in old and new[p] not in old.values()],
                "gone": [p for p in old if p not in new and old[p] not in new.values()]}  # fmt: skip
        for word, paths in held.items():
            if paths:
                verb = "has changed" if word == "changed" else f"is {word}"
                more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
                words.append(
                    f"data.{role}: {paths[0]}{more} {verb}" if role != "tasks" else f"tasks: {paths[0]} {verb}"
                )
    return words


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [line for key in {**before, **now} if key != "content"  # of inputs: told by their paths
                for line in _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)]  # fmt: skip
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [line for old, new in zip(before, now, strict=True) for line in _differences(old, new, name)]
    if before == now:
        return []
    return [f"{name or 'a setting'} {_short(before)} -> {_short(now)}"]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _listed(items: Sequence[str], sign: str) -> str:
    more = f"{sign}and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return sign.join(items[:_LISTED]) + more
