"""The page: what each section shows, from the files of a run. `template.html.j2` says how it looks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bilect.report import figures, wording
from bilect.report.curves import learning_figure
from bilect.report.inputs import Json, RunFiles, flat_numbers, mapping, number, numbers, objects, read_run
from bilect.report.tokens import choice_figure, delta_figure, distance_figure, settings, source_rows, token_views

FILE_NAME = "report.html"
TEXT_LIMIT = 4000  # characters of a document shown
ARM_ORDER = ("bliss", "blade", "rho1", "random-token", "random", "full", "warm")


def write_page(run_dir: Path) -> Path:
    """Render and put the page in place in one step, so that no reader ever sees half of it."""
    html = render(read_run(run_dir))
    target = run_dir / FILE_NAME
    draft = run_dir / f".{FILE_NAME}.{os.getpid()}.tmp"
    try:
        draft.write_bytes(html.encode("utf-8", errors="replace"))  # lone surrogates in a text become "?"
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def render_template(template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """A page from a template of this package. All is escaped, except figures (``svg``), whose XML is already."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("bilect", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(svg=Markup, **filters)
    return environment.get_template(template).render(**values).rstrip() + "\n"


def render(run: RunFiles) -> str:
    """The page as HTML."""
    filters: dict[str, Callable[..., Any]] = dict(
        decimal=wording.decimal,
        signed=wording.signed,
        whole=wording.whole,
        compact=wording.compact,
        percent=wording.percent,
        power=wording.power,
        duration=wording.duration,
        measured=wording.measured,
    )
    return render_template(
        "report/template.html.j2",
        filters,
        name=run.name,
        missing=run.missing,
        arms=figures.LONG_ARMS,
        result=_result(run),
        downstream=_downstream(run),
        kept=_kept(run),
        scores=_scores(run),
        learning=learning_figure(run.rounds) if any(r.metrics for r in run.rounds) else None,
        learning_missing=_gaps(run, r"round-\d+/(metrics\.jsonl)?$"),
        fidelity=objects(run.summary.get("fidelity")),
        fidelity_sentence=wording.fidelity(objects(run.summary.get("fidelity"))),
        tokens=_tokens(run),
        cost=_cost(run),
        documents=_documents(run),
        origin=_origin(run),
    )


def _result(run: RunFiles) -> Json:
    losses = numbers(run.summary.get("heldout_loss"))
    tokens = mapping(run.summary.get("tokens"))
    heldout = {arm: _sets(sets) for arm, sets in mapping(run.summary.get("heldout")).items()}
    kind, sentence = wording.verdict(losses, tokens)
    rows = []
    for arm in _ordered({**losses, **heldout}):
        sets = list(heldout.get(arm, {}).values())
        loss = losses.get(arm)
        against = losses.get("random")
        rows.append(
            {
                "arm": arm,
                "loss": loss,
                "difference": None if loss is None or against is None or arm == "random" else loss - against,
                "perplexity": number(sets[0].get("perplexity")) if len(sets) == 1 else None,
                "accuracy": number(sets[0].get("accuracy")) if len(sets) == 1 else None,
                "tokens": wording.tokens_of(arm, tokens),
            }
        )
    ours, random = heldout.get("bliss", {}), heldout.get("random", {})
    by_set = {}
    for name in ours:
        a, b = number(ours[name].get("loss")), number(random.get(name, {}).get("loss"))
        if a is not None and b is not None:
            by_set[name] = a - b
    set_rows = [
        {"set": name, "arm": arm, **{key: heldout[arm][name].get(key) for key in _SET_KEYS}}
        for name in dict.fromkeys(name for arm in _ordered(heldout) for name in heldout[arm])
        for arm in _ordered(heldout)
        if name in heldout[arm]
    ]
    stated = run.summary.get("verdict")
    return {
        "kind": kind,
        "verdict": sentence,
        "stated": stated if isinstance(stated, str) and stated.strip() else None,
        "rows": rows,
        "one_set": all(len(sets) <= 1 for sets in heldout.values()) and any(heldout.values()),
        "sets": set_rows,
        "figure": figures.arms_figure(losses, by_set if len(by_set) > 1 else {}) if losses else None,
        "missing": [] if losses else [run.missing.get("summary.json") or "it has no heldout_loss"],
    }


def _downstream(run: RunFiles) -> Json:
    """Downstream tasks: a row per metric, a column per arm."""
    results = {arm: _sets(found) for arm, found in mapping(run.summary.get("tasks")).items()}
    arms = _ordered(results)
    keys = dict.fromkeys((task, metric) for arm in arms for task, f in results[arm].items() for metric in _sets(f))
    rows = [
        {
            "task": task,
            "metric": metric,
            "n": next(results[arm][task].get("n") for arm in arms if task in results[arm]),
            "values": [_sets(results[arm].get(task)).get(metric, {}) for arm in arms],
        }
        for task, metric in keys
    ]
    return {"arms": arms, "rows": rows}


_SET_KEYS = ("loss", "perplexity", "accuracy", "documents", "tokens")


def _sets(value: object) -> dict[str, Json]:
    return {name: mapping(item) for name, item in mapping(value).items() if isinstance(item, dict)}


def _kept(run: RunFiles) -> Json:
    pool, kept, fraction = (
        numbers(run.summary.get(key))
        for key in ("pool_share_by_source", "kept_share_by_source", "kept_fraction_by_source")
    )
    sources = sorted({*pool, *kept, *fraction}, key=lambda s: (-kept.get(s, 0.0), -pool.get(s, 0.0), s))
    rounds = objects(run.summary.get("rounds"))
    arms = _ordered({arm: None for row in rounds for arm in numbers(row.get("heldout_loss"))})
    return {
        "figure": figures.shares_figure(pool, kept) if pool or kept else None,
        "rows": [
            {
                "source": source,
                "pool": pool.get(source),
                "kept": kept.get(source),
                "lift": kept[source] / pool[source] if source in kept and pool.get(source) else None,
                "fraction": fraction.get(source),
            }
            for source in sources
        ],
        "rounds": [{**row, "losses": numbers(row.get("heldout_loss"))} for row in rounds],
        "round_arms": arms,
        "missing": [
            f"{key} is not in summary.json"
            for key, found in (("pool_share_by_source", pool), ("kept_share_by_source", kept))
            if not found
        ],
    }


def _scores(run: RunFiles) -> Json:
    thresholds = {number(row.get("round")): number(row.get("threshold")) for row in objects(run.summary.get("rounds"))}
    shown = [
        {
            "round": files.number,
            "documents": files.scores.documents,
            "left_out": files.scores.left_out,
            "folded": files.scores.folded,
            "threshold": thresholds.get(float(files.number)),
            "figure": figures.scores_figure(files.scores, thresholds.get(float(files.number)), f"scores{files.number}"),
        }
        for files in run.rounds
        if files.scores is not None
    ]
    return {"rounds": shown[::-1], "missing": _gaps(run, r"round-\d+/(scores/)?$")}


def _tokens(run: RunFiles) -> Json | None:
    """Online token selection; None where no arm used it."""
    gaps = _gaps(run, r".*/target/online\.json$")
    if not run.online and not gaps:
        return None
    runs = {arm: run.online[arm].content for arm in _ordered(run.online)}
    return {
        "settings": [{**row, "round": run.online[row["arm"]].round} for row in settings(runs)],
        "delta": delta_figure(runs),
        "distance": distance_figure(runs),
        "choice": choice_figure(runs),
        "sources": source_rows(runs),
        "views": token_views(runs),
        "missing": gaps,
    }


def _cost(run: RunFiles) -> Json:
    stages = {name: mapping(item) for name, item in mapping(run.run.get("stages")).items()}
    values: dict[str, dict[str, float]] = {}
    for key in ("seconds", "flops"):
        stated = flat_numbers(run.summary.get(key))
        recorded = {name: plain for name, item in stages.items() if (plain := number(item.get(key))) is not None}
        values[key] = stated or recorded
    totals = {key: values[key].pop("total", sum(values[key].values())) for key in values if values[key]}
    tokens = {name: number(item.get("tokens")) for name, item in stages.items()}
    # The fullest record knows the order best; what only another one has comes after.
    records: list[Json] = sorted((values["seconds"], values["flops"], stages), key=len, reverse=True)
    order = [s for s in dict.fromkeys(s for r in records for s in r) if s in values["seconds"] or s in values["flops"]]
    seconds, flops = ({s: values[key][s] for s in order if s in values[key]} for key in ("seconds", "flops"))
    return {
        "figure": figures.cost_figure(seconds, flops) if order else None,
        "rows": [
            {"stage": s, "seconds": seconds.get(s), "flops": flops.get(s), "tokens": tokens.get(s)} for s in order
        ],
        "totals": totals,
        "has_tokens": any(tokens.get(s) is not None for s in order),
        "tokens": flat_numbers(run.summary.get("tokens")),
        "missing": [] if order else ["neither summary.json nor run.json records time or FLOPs"],
    }


def _documents(run: RunFiles) -> Json:
    rounds = [
        {
            "round": files.number,
            "groups": [
                {"title": title, "documents": [_document(row) for row in rows]}
                for title, rows in (("Best", files.best), ("Worst", files.worst))
                if rows
            ],
        }
        for files in run.rounds
        if files.best or files.worst
    ]
    return {"rounds": rounds[::-1], "missing": _gaps(run, r"round-\d+/(extremes\.json)?$")}


def _document(row: Json) -> Json:
    raw = row.get("text")
    text = raw if isinstance(raw, str) else ""
    lead = " ".join(wording.visible(text[:600]).split())
    return {
        "doc_id": row.get("doc_id", wording.DASH),
        "source": row.get("source") or "(no source)",
        "n_tokens": row.get("n_tokens"),
        "score": row.get("score"),
        "lead": lead[:110] + ("…" if len(lead) > 110 else ""),
        "text": re.sub(r"[^\S\n\t]+\n", "\n", wording.visible(text[:TEXT_LIMIT])),
        "cut": max(len(text) - TEXT_LIMIT, 0),
    }


def _origin(run: RunFiles) -> Json:
    versions: dict[str, Any] = {"bilect": run.run.get("bilect_version"), "git revision": run.run.get("git_revision")}
    versions.update(mapping(run.run.get("versions")))
    return {
        "facts": [
            (title, run.run[key])
            for title, key in (("Seed", "seed"), ("Started", "started"), ("Finished", "finished"))
            if run.run.get(key) is not None
        ],
        "versions": {name: value for name, value in versions.items() if value is not None},
        "host": {key: value for key, value in mapping(run.run.get("host")).items() if value is not None},
        "config": run.config,
        "missing": _gaps(run, r"(config\.yaml|run\.json)$"),
    }


def _ordered(arms: Json | dict[str, Any]) -> list[str]:
    return [arm for arm in ARM_ORDER if arm in arms] + sorted(set(arms) - set(ARM_ORDER))


def _gaps(run: RunFiles, pattern: str) -> Sequence[str]:
    """What is wrong with the files whose path matches."""
    return [f"{path} {problem}" for path, problem in run.missing.items() if re.match(pattern, path)]
