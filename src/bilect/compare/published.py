"""Comparisons that people publish: files of ``comparison.json``, checked, and the tables of a page of results."""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bilect.compare.page import interval
from bilect.compare.provenance import nameless
from bilect.compare.statistics import estimate
from bilect.compare.verdict import cost_ratio
from bilect.config.base import explain_wrong
from bilect.errors import BilectError, reason
from bilect.report.wording import decimal, duration

__all__ = ["Published", "read_published", "tables"]

Count = Annotated[int, Field(ge=0)]


class _Known(BaseModel):
    """Where it is said that these are all the keys there are."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Part(BaseModel):
    """What is needed of something that holds more."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Program(_Known):
    version: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None


class _Machine(_Known):
    processor: str
    cores: Count
    gpus: list[str]
    system: str
    python: str
    torch: str


class _Text(_Known):
    names: list[str]
    documents: Count
    tokens: Count
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class _Texts(_Known):
    pool: _Text
    upper: _Text
    heldout: _Text


class _Estimate(_Part):
    mean: float | None
    se: float | None
    low: float | None
    high: float | None
    n: Count
    values: list[float | None]


class _Spent(_Part):
    seconds: _Estimate
    flops: _Estimate


class _Cost(_Part):
    choosing: _Spent
    training: _Spent


class _Arm(_Part):
    loss: _Estimate
    minus_random: _Estimate
    minus_full: _Estimate
    tokens: Count
    cost: _Cost


class _Variant(_Part):
    settings: dict[str, Any]
    texts: _Texts
    config: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    loss_on: str | None
    arms: dict[str, _Arm]
    verdict: list[str]

    @model_validator(mode="after")
    def _controls(self) -> "_Variant":
        if missing := sorted({"warm", "random", "full", *self.methods} - {*self.arms}):
            raise ValueError(f"arms: {', '.join(missing)} missing")
        return self


class Published(_Known):
    """The content of a ``comparison.json`` that may stand on a page of results."""

    schema_: Literal[2] = Field(alias="schema")
    bilect: _Program
    machine: _Machine
    seeds: Annotated[list[int], Field(min_length=2)]
    variants: Annotated[dict[str, _Variant], Field(min_length=1)]

    @model_validator(mode="after")
    def _figures_agree(self) -> "Published":
        for name, variant in self.variants.items():
            for arm, figures in variant.arms.items():
                if problem := _disagreement(figures, variant.arms, arm, len(self.seeds)):
                    raise ValueError(f"{name}, {arm}: {problem}")
        return self


def _disagreement(figures: _Arm, arms: Mapping[str, _Arm], arm: str, seeds: int) -> str | None:
    """Where differences and intervals are not those of the losses."""
    for control, given in (("random", figures.minus_random), ("full", figures.minus_full)):
        pairs = list(zip(figures.loss.values, arms[control].loss.values, strict=False))
        losses = [(mine, its) for mine, its in pairs if mine is not None and its is not None]
        if len(losses) != seeds:
            return f"there must be a loss for each of {seeds} seeds"
        expected = estimate([None if arm == control else mine - its for mine, its in losses])
        if not _equal(given, expected):
            return f"minus_{control} is not what the losses say"
    return (
        None if _equal(figures.loss, estimate(figures.loss.values)) else "loss: mean and interval are not of its values"
    )


def _equal(given: _Estimate, expected: Mapping[str, Any]) -> bool:
    numbers = [(getattr(given, key), expected[key]) for key in ("mean", "se", "low", "high", "n")]
    if len(given.values) != len(expected["values"]):
        return False
    numbers += zip(given.values, expected["values"], strict=True)
    return all((a is None) == (b is None) and (a is None or abs(a - b) < 1e-6) for a, b in numbers)


def read_published(folder: Path) -> dict[str, Published]:
    """The files of a folder by their names without ``.json``.

    Raises:
        BilectError: one line on the first that is no comparison, was changed by hand, or tells a place or an address.
    """
    return {file.stem: _read(file) for file in sorted(folder.iterdir())}


def _read(file: Path) -> Published:
    def wrong(problem: str) -> BilectError:
        return BilectError(
            f"{file.name} is not the comparison.json that `bilect compare` of this version writes: {problem}"
        )

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if nameless(values) != values:
            raise wrong("it holds a path or an address")
        return Published.model_validate(values)
    except ValidationError as error:
        raise wrong(explain_wrong(error, Published)) from error
    except (OSError, ValueError) as error:
        raise wrong(reason(error)) from error


def tables(published: Mapping[str, Published], folder: str) -> str:
    """Markdown: a section for every comparison, with what it was made of, and a row for every arm.

    Args:
        published: as ``read_published`` gives it.
        folder: of the files, as the page links to it.
    """
    return "\n\n".join(chain.from_iterable(_sections(name, one, folder) for name, one in published.items())) + "\n"


def _sections(name: str, one: Published, folder: str) -> Iterator[str]:
    for title, variant in one.variants.items():
        pool, target = (_plain(", ".join(text.names)) for text in (variant.texts.pool, variant.texts.upper))
        yield f"## {pool}, for {target}" + ("" if title == "base" else f": {_plain(title)}")
        if variant.settings:
            yield "Differs from the one above in " + _plain("; ".join(f"{k}: {v}" for k, v in variant.settings.items()))
        yield _made_of(one, variant) + f" [All figures]({folder}/{name}.json)."
        yield _plain(" ".join(variant.verdict))
        yield "\n".join(_rows(variant))


def _made_of(one: Published, variant: _Variant) -> str:
    texts, models, machine = variant.texts, variant.config["models"], one.machine
    amounts = [f"{role} {_plain(', '.join(text.names))}: {text.documents:,} documents, {text.tokens:,} tokens, "
               f"`{text.fingerprint}`" for role, text in
               (("Pool", texts.pool), ("target", texts.upper), ("held-out", texts.heldout))]  # fmt: skip
    proxy, target = (models[key] if isinstance(models[key], str) else "one of its own" for key in ("proxy", "target"))
    revision = f" ({one.bilect.revision[:12]})" if one.bilect.revision else ""
    ran_on = [machine.processor, f"{machine.cores} cores", *machine.gpus, f"torch {machine.torch}"]
    return (
        f"{'; '.join(amounts)}. Proxy {_plain(proxy)}, trained model {_plain(target)}, "
        f"{variant.arms['random'].tokens:,} tokens per arm, {len(one.seeds)} seeds. "
        f"bilect {_plain(one.bilect.version)}{revision} on {_plain(', '.join(ran_on))}."
    )


def _rows(variant: _Variant) -> Iterator[str]:
    yield "| arm | loss | minus random | minus full | FLOPs, times random's | time of choosing |"
    yield "|---|---|---|---|---|---|"
    arms = {arm: figures.model_dump() for arm, figures in variant.arms.items()}
    for arm in sorted(arms, key=lambda arm: arms[arm]["loss"]["mean"]):
        own = arms[arm]
        losses = [decimal(own["loss"]["mean"], 3), interval(own["minus_random"]), interval(own["minus_full"])]
        spent = [decimal(cost_ratio(arms, arm), 2), duration(own["cost"]["choosing"]["seconds"]["mean"])]
        yield f"| {' | '.join([_plain(arm), *losses, *(['–'] * 2 if arm == 'warm' else spent)])} |"


def _plain(text: str) -> str:
    """Text from elsewhere as Markdown that shows it and does nothing."""
    return re.sub(r"[^\w\s.,:;()+/-]", lambda sign: f"&#{ord(sign[0])};", " ".join(text.split())).replace("_", "&#95;")
