"""The stages of a run, each declared: what it does, which stages it reads, what it writes, on which settings it hangs.

A stage is repeated when a setting that it depends on, an input file, or a stage that it reads has changed; so a
declaration names all that the result depends on, and nothing else. ``stages.py`` puts the stages in order.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from bilect.methods import methods_of
from bilect.methods.contract import DocumentMethod, Method
from bilect.pipeline import choosing, downstream, texts, training
from bilect.pipeline.changes import model_content, sources_content
from bilect.pipeline.context import RunContext
from bilect.runtime.memory import peak_gb, reset_peak

__all__ = ["Command", "Graph", "Stage"]

Command = Literal["warmup", "fit", "score", "select", "train", "eval", "run"]


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: unique; in ``run.json`` and on the screen.
        action: writes results below the folder it is given and returns figures.
        settings: everything its result depends on that is no earlier stage.
        reads: the stages whose results it reads.
        writes: what it leaves in the run directory.
        command: of the command line that it belongs to.
        kind: its name without arm and round.
        round: 0 before the first round.
        arm: whose it is; empty where it is all arms'.
    """

    name: str
    action: Callable[[Path], Mapping[str, Any]]
    settings: Any
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    command: Command
    kind: str
    round: int = 0
    arm: str = ""


class Graph:
    """Declares the stages of one run.

    Args:
        context: of the run.
        inputs: identity of the input files by role, see ``texts.input_hashes``.
    """

    def __init__(self, context: RunContext, inputs: Mapping[str, Any]) -> None:
        self.run, self.config, self.inputs = context, context.config, inputs
        self.methods: dict[str, Method[Any]] = methods_of(context.config)
        self.settings = context.config.model_dump(mode="json")
        warmup = self.settings["warmup"]
        self.drawing = {"seed": self.config.seed,
                        **{f"warmup.{name}": warmup[name] for name in ("share", "candidates")}}  # fmt: skip
        self.shards = {**self.drawing, "rounds": self.config.rounds}

    # ------------------------------------------------------------------------------------------------------- texts

    def tokenise_pool(self) -> Stage:
        """Tokenizer and pool; the target sets have stages of their own, so that another target reads no pool again."""
        data = {k: v for k, v in self.settings["data"].items() if k not in ("lower_data", "upper_data", "heldout_data")}
        return self._stage(
            "tokenise pool", "warmup", texts.tokenise_pool,
            settings={"data": {**data, "tokenizer": model_content(texts.given_tokenizer(self.config))},
                      "data.lower_data": self._sources("lower_data")},
            reads=[], writes=["tokenizer", "tokens/pool", "tokens/pool.json", "tokens/skipped-pool.jsonl"],
        )  # fmt: skip

    def tokenise_heldout(self) -> Stage:
        """Held-out sets. Their documents are taken out of the pool: all that draws from the pool comes after it."""
        return self._stage(
            "tokenise held-out", "warmup", texts.tokenise_heldout,
            settings={"data.heldout_data": self._sources("heldout_data")},
            reads=["tokenise pool"],
            writes=["tokens/heldout", "tokens/held-out.json", "tokens/skipped-held-out.jsonl"],
        )  # fmt: skip

    def tokenise_upper(self) -> Stage:
        """Target sets."""
        return self._stage(
            "tokenise upper", "warmup", texts.tokenise_upper,
            settings={"data.upper_data": self._sources("upper_data")},
            reads=["tokenise held-out"], writes=["tokens/upper", "tokens/skipped-upper.jsonl"],
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------------- warm-up

    def warm_up(self, role: Literal["proxy", "target"]) -> Stage:
        """Round 0: a model trains on random documents."""
        return self._stage(
            f"warm up {role}", "warmup", training.warm_up, role=role,
            settings={**self.drawing, f"models.{role}": model_content(self.settings["models"][role]),
                      f"warmup.{role}": self.settings["warmup"][role]},
            reads=["tokenise held-out"], writes=[f"warmup/{role}"],
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ an arm in a round

    def fit(self, arm: str, number: int) -> Stage:
        """A method learns what to keep of the round's shard; it reads its own fit of the round before."""
        method = self._chooser(arm)
        used = {"warm up proxy": method.uses_proxy, "tokenise upper": method.uses_upper,
                self._target_of(arm, number): method.uses_target,
                f"round {number - 1}: fit {arm}": number > 1}  # fmt: skip
        return self._stage(
            "fit", "fit", choosing.fit, arm=arm, number=number,
            settings={**self.shards, arm: method.settings(number), "fit.bf16": self.settings["fit"]["bf16"]},
            reads=["tokenise held-out", *(name for name, is_used in used.items() if is_used)], writes=["method"],
        )  # fmt: skip

    def score(self, arm: str, number: int) -> Stage:
        """All documents of the shard."""
        return self._stage(
            "score", "score", choosing.score, arm=arm, number=number,
            settings={}, reads=[f"round {number}: fit {arm}"], writes=["scores"],
        )  # fmt: skip

    def select(self, arm: str, number: int) -> Stage:
        """What is kept."""
        return self._stage(
            "select", "select", choosing.select, arm=arm, number=number,
            settings={"selection": choosing.rule_of(self._chooser(arm), self.config.selection).model_dump(mode="json")},
            reads=[f"round {number}: score {arm}"], writes=["selected", "extremes.json"],
        )  # fmt: skip

    def train(self, arm: str, number: int) -> Stage:
        """The arm's target trains on what was kept, or on the whole shard."""
        settings = {**self.shards, "training": self.settings["training"]}
        reads = [self._target_of(arm, number)]
        reads.append(f"round {number}: select {arm}" if self.methods[arm].scores_documents else "tokenise held-out")
        if (online := self.config.online_of(arm)) is not None:
            settings["online"] = online.model_dump(mode="json")
            reads += ["tokenise upper"] if online.needs_upper_data else []
        if self.config.curve.every is not None:
            settings["curve"] = self.settings["curve"]
        return self._stage(
            "train", "train", training.train_arm, arm=arm, number=number,
            settings=settings, reads=reads, writes=["target", "target-decayed"],
        )  # fmt: skip

    def fidelity(self, number: int) -> Stage:
        """Does the proxy of the method stand in for its target?"""
        arm = self.config.method
        return self._stage(
            "fidelity", "eval", training.fidelity, number=number,
            settings=self._precision, reads=[f"round {number}: fit {arm}", f"round {number}: train {arm}"],
            writes=[f"{self.run.arm_folder(arm, number)}/fidelity.json"],
        )  # fmt: skip

    # -------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, arm: str, number: int) -> Stage:
        """Held-out losses of an arm's target after a round; arm "warm" is the warmed-up target."""
        return self._stage(
            "evaluate", "eval", training.evaluate, arm=arm, number=number, folder=self.run.target_folder(arm, number),
            settings=self._precision, reads=["tokenise held-out", self._trained(arm, number)], writes=["eval.json"],
        )  # fmt: skip

    def tasks(self, arm: str, number: int) -> Stage:
        """Downstream tasks of the same."""
        return self._stage(
            "tasks", "eval", downstream.evaluate_on_tasks, arm=arm, number=number,
            folder=self.run.target_folder(arm, number),
            settings={"tasks": self.settings["tasks"], "content": self.inputs["tasks"],
                      "data.context": self.settings["data"]["context"]},
            reads=[self._trained(arm, number)], writes=["tasks.json"],
        )  # fmt: skip

    def publish(self) -> Stage:
        """The final models where users look for them."""
        arm, last = self.config.method, self.config.rounds
        return self._stage(
            "publish", "run", training.publish,
            settings={}, reads=[f"round {last}: fit {arm}", f"round {last}: train {arm}"],
            writes=["proxy", "score_model", "target"],
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------------- helpers

    def _stage(
        self,
        kind: str,
        command: Command,
        body: Callable[..., Mapping[str, Any]],
        *,
        settings: Any,
        reads: Iterable[str],
        writes: Iterable[str],
        arm: str = "",
        number: int = 0,
        **more: Any,
    ) -> Stage:
        """A stage of an arm or a round writes below the arm's folder, and is named after both."""
        name = f"{kind} {arm}".rstrip()
        given = {**more}
        if number:
            name = f"round {number}: {name}"
        if arm and "folder" not in more:
            given["arm"] = arm
        if number and "folder" not in more:
            given["number"] = number
        below = f"{self.run.arm_folder(arm, number)}/" if arm else ""
        return Stage(
            name, partial(_measured, self.run, partial(body, self.run, **given)), settings, tuple(reads),
            tuple(below + path for path in writes), command, kind, number, arm,
        )  # fmt: skip

    @property
    def _precision(self) -> dict[str, Any]:
        """What held-out losses depend on beside the model; nothing in float32, as in runs that knew nothing else."""
        return {"training.bf16": True} if self.config.training.bf16 else {}

    def _sources(self, role: Literal["lower_data", "upper_data", "heldout_data"]) -> list[dict[str, Any]]:
        sources = getattr(self.config.data, role)
        return sources_content(sources, self.inputs[role], named=role != "lower_data")

    def _chooser(self, arm: str) -> DocumentMethod[Any]:
        method = self.methods[arm]
        assert isinstance(method, DocumentMethod)
        return method

    def _target_of(self, arm: str, number: int) -> str:
        """The stage that leaves the target that an arm has before a round."""
        return self._trained(arm, number - 1)

    @staticmethod
    def _trained(arm: str, number: int) -> str:
        return "warm up target" if number == 0 else f"round {number}: train {arm}"


def _measured(context: RunContext, action: Callable[[Path], Mapping[str, Any]], scratch: Path) -> dict[str, Any]:
    """A stage and its peak memory."""
    device = context.device if torch.cuda.is_available() else None
    reset_peak(device)
    return {**action(scratch), "peak_gb": round(peak_gb(device), 3)}
