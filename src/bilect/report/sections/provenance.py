"""Where the run is from, and the command that replays it."""

from __future__ import annotations

import re
import shlex

from bilect.report.blocks import Block, Column, Fold, Html, Section, Table, Text, gaps
from bilect.report.inputs import RunFiles, mapping

ORDER = 80


def build(run: RunFiles) -> Section:
    """Seed, versions, host, inputs, settings."""
    versions = {"bilect": run.run.get("bilect_version"), "git revision": run.run.get("git_revision")}
    versions.update(mapping(run.run.get("versions")))
    facts = {
        title: run.run.get(key) for title, key in (("Seed", "seed"), ("Started", "started"), ("Finished", "finished"))
    }
    facts |= versions
    facts |= {f"host: {key}": value for key, value in mapping(run.run.get("host")).items()}
    shown = [(title, str(value)) for title, value in facts.items() if value is not None]
    command = "select" if run.only_chose else "run"
    folder = re.sub(r"[^\w.-]+", "-", run.name)[:60].strip("-.") or "run"
    replay = f"bilect {command} config.yaml --out {shlex.quote(f'runs/{folder}-again')}"
    values = {"facts": shown, "command": replay, "config": run.config}
    blocks: list[Block] = [
        Text("A run is a function of its configuration, its data and its seed. Save the configuration below as "
             "config.yaml and run it with the same versions:"),
        *gaps(run.gaps(r"(config\.yaml|run\.json)$")),
        Html("report/provenance.html.j2", values),
    ]  # fmt: skip
    inputs = [
        [role, where, identity]
        for role, files in mapping(run.run.get("inputs")).items()
        for where, identity in mapping(files).items()
    ]
    if inputs:
        columns = [Column("Role"), Column("Input"), Column("Identity")]
        blocks.append(Fold("Inputs", [Table("inputs", columns, inputs)]))
    return Section("reproduce", "Provenance", blocks)
