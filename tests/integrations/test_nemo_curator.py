"""A fitted chooser as a stage of NeMo Curator. The package is large: it is no extra, and the test runs where it is."""

import numpy as np
import pytest

from bilect.errors import BilectError

pytest.importorskip("nemo_curator", reason="nemo-curator is not installed")
import pandas as pd
from nemo_curator.tasks import DocumentBatch

from bilect.integrations.nemo_curator import ChooserStage


class Lengths:
    cut = 3.0

    def score(self, texts):
        return np.array([float(len(text)) for text in texts])


def test_a_batch_keeps_what_scores_at_least_the_cut():
    table = pd.DataFrame({"content": ["ab", "abc", "", "abcd"], "n": [1, 2, 3, 4]})
    stage = ChooserStage(Lengths(), text_field="content")
    out = stage.process(DocumentBatch(dataset_name="d", data=table))
    assert out.to_pandas().to_dict("list") == {"content": ["abc", "abcd"], "n": [2, 4], "bilect_score": [3.0, 4.0]}
    assert out.dataset_name == "d" and stage.outputs() == (["data"], ["content", "bilect_score"])
    assert len(ChooserStage(Lengths(), cut=9, text_field="content").process(out).to_pandas()) == 0


def test_without_a_cut_is_one_line():
    chooser = Lengths()
    chooser.cut = None
    with pytest.raises(BilectError, match="cut: the run has kept nothing yet"):
        ChooserStage(chooser)
