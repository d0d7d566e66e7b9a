"""Which stages a variant computes itself: those that its settings reach, and no others."""

from pathlib import Path
from typing import Any

import pytest

from bilect.compare.cells import cells
from bilect.config import Config, load_config, parse_config
from bilect.config.base import put
from bilect.pipeline.context import RunContext
from bilect.pipeline.stages import stage_keys, stages
from bilect.runtime.progress import SilentProgress
from tests.corpus import tiny_settings

EXAMPLES = Path(__file__).parents[2] / "examples"


def of(names: tuple[str, ...], *kinds: str) -> set[str]:
    return {f"round 1: {kind} {name}" for name in names for kind in kinds}


def arm(*names: str) -> set[str]:
    """What follows from the choice: all that token methods and full have."""
    return of(names, "train", "evaluate")


def kept(*names: str) -> set[str]:
    """The choice from given scores, and what follows."""
    return of(names, "select") | arm(*names)


def choice(*names: str) -> set[str]:
    """All of an arm that chooses documents."""
    return of(names, "fit", "score") | kept(*names)


FEED = arm("bliss") | {"round 1: fidelity", "publish"}
BLISS = choice("bliss") | FEED


def keys(config: Config) -> dict[str, str]:
    """Keys of a run whose files are their paths."""
    roles = {role: getattr(config.data, role) for role in ("lower_data", "upper_data", "heldout_data")}
    inputs = {role: {source.path: "" for source in sources} for role, sources in roles.items()}
    return stage_keys(stages(RunContext(Path("nowhere"), config, SilentProgress()), {**inputs, "tasks": "v1"}))


def own(example: str, variant: str) -> set[str]:
    """Stages of a variant that its base does not have."""
    config = load_config(EXAMPLES / example)
    found = {cell.variant: keys(cell.config) for cell in cells(config, Path("out")) if cell.config.seed == config.seed}
    return {name for name, key in found[variant].items() if found["base"].get(name) != key}


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("kl-off", BLISS),
        ("solver-cg", BLISS),
        ("penalty", BLISS),
        ("proxy-300k", BLISS | {"warm up proxy"}),
        # how much is kept: of the whole shard, full and the token methods keep nothing out
        ("keep-0.1", FEED | kept("bliss", "random")),
        ("blade-T-25", arm("blade")),
        ("blade-matched-twin", arm("blade")),
    ],
)
def test_an_ablation_computes_what_its_settings_reach(variant: str, expected: set[str]) -> None:
    assert own("ablations.yaml", variant) == expected


def test_more_rounds_share_tokens_and_warm_models() -> None:
    config = load_config(EXAMPLES / "ablations.yaml")
    of_variant = {c.variant: keys(c.config) for c in cells(config, Path("out")) if c.config.seed == config.seed}
    shared = {"tokenise pool", "tokenise held-out", "tokenise upper", "warm up proxy", "warm up target"}
    for variant in ("rounds-2", "rounds-2-proxy-goes-on", "rounds-2-fresh-scores"):
        assert own("ablations.yaml", variant) == set(of_variant[variant]) - shared - {"evaluate warm"}
    first, fresh = ({k: v for k, v in of_variant[name].items() if k.startswith("round 1")}
                    for name in ("rounds-2", "rounds-2-fresh-scores"))  # fmt: skip
    assert first == fresh  # what is carried over says nothing of the first round


def test_another_target_keeps_what_knows_no_target() -> None:
    """Random, full, perplexity and random tokens, with their learning curves."""
    informed = choice("dsir", "mates", "less", "excess", "influence", "bliss-penalty") | arm("rho1", "blade")
    assert own("compare.yaml", "lambada") == BLISS | informed | {"tokenise upper"}
    assert own("compare.yaml", "dsir-mean") == choice("dsir")


DRAWN = BLISS | choice("dsir", "random") | arm("full") | {"warm up proxy", "warm up target", "evaluate warm"}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("models.score_head", "linear", BLISS),
        ("data.heldout_data", [{"path": "other.jsonl"}], DRAWN | {"tokenise held-out", "tokenise upper"}),
        ("seed", 5, DRAWN),
        ("warmup.proxy.steps", 7, BLISS | {"warm up proxy"}),
        ("selection.temperature", 0.5, FEED | kept("bliss", "dsir")),
        ("selection.top_k", 5, FEED | kept("bliss", "dsir", "random")),
        ("online.method", "blade", FEED),
        ("training.steps", 7, FEED | arm("random", "full", "dsir")),
        ("curve", {"every": 3}, FEED | arm("random", "full", "dsir")),
        ("fit.reset_proxy", False, set()),  # there is one round
        ("rounds", 2, None),  # another shard, and so all of it
    ],
)
def test_a_setting_reaches_the_stages_that_read_it(
    tmp_path: Path, key: str, value: Any, expected: set[str] | None
) -> None:
    values = tiny_settings(tmp_path, controls=["random", "full", "dsir"])
    before = keys(parse_config(values))
    put(values, key, value, key)
    after = keys(parse_config(values))
    changed = {name for name in after if before.get(name) != after[name]}
    if expected is None:
        expected = {name for name in after if name.startswith("round")} | {"publish"}
    assert changed == expected
