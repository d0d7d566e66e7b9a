"""A stage of NeMo Curator that keeps the documents a fitted method scores highest.

pipeline.add_stage(ChooserStage(bilect.Chooser("kept/")).with_(resources=Resources(gpus=1)))
"""

from typing import Any

from bilect.integrations._cut import Chooser, least_score

try:
    from nemo_curator.stages.base import ProcessingStage
    from nemo_curator.tasks import DocumentBatch
except ImportError as error:
    raise ImportError(f"ChooserStage needs NeMo Curator: pip install nemo-curator ({error})") from error

__all__ = ["ChooserStage"]


class ChooserStage(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Keeps documents with a score of at least ``cut``; it is an actor, which loads the chooser once.

    Args:
        chooser: ``bilect.Chooser``.
        cut: least score; by default the least that the run kept.
        text_field: column of the text.
        score_field: column that the score is written to.

    Raises:
        BilectError: neither ``cut`` is given, nor has the run kept anything.
    """

    name = "bilect"

    def __init__(
        self, chooser: Chooser, cut: float | None = None, text_field: str = "text", score_field: str = "bilect_score"
    ) -> None:
        self.chooser, self.cut = chooser, least_score(chooser, cut)
        self.text_field, self.score_field = text_field, score_field

    def inputs(self) -> tuple[list[str], list[str]]:
        """What it reads."""
        return ["data"], [self.text_field]

    def outputs(self) -> tuple[list[str], list[str]]:
        """What it adds."""
        return ["data"], [self.text_field, self.score_field]

    def ray_stage_spec(self) -> dict[str, Any]:
        """An actor: what it has loaded stays."""
        return {"is_actor_stage": True}

    def process(self, batch: DocumentBatch) -> DocumentBatch:
        """The documents of a batch that are kept, with their scores."""
        table = batch.to_pandas()
        score_R = self.chooser.score(table[self.text_field].tolist())
        kept = table.assign(**{self.score_field: score_R})[score_R >= self.cut]
        return DocumentBatch(
            dataset_name=batch.dataset_name, data=kept, _metadata=batch._metadata, _stage_perf=batch._stage_perf
        )
