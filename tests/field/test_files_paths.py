"""Where a config's paths lead from, and what a run directory needs of the files that it was made from."""

import os
import signal
import time

import pytest
import yaml

from bilect.config import load_config, parse_config
from bilect.errors import BilectError
from bilect.models.loading import train_tokenizer
from bilect.pipeline.context import RunContext
from bilect.pipeline.texts import input_hashes, pool_hashes
from bilect.runtime.files import write_json
from bilect.runtime.progress import SilentProgress
from tests.corpus import write_jsonl


def test_paths_in_a_file_are_relative_to_it_and_those_typed_to_here(tmp_path, monkeypatch):
    project = tmp_path / "project"
    for name in ("model", "tok", "web"):
        (project / name).mkdir(parents=True)
        (project / name / "config.json").touch()
    (project / "pythia-31m").mkdir()  # a run directory that happens to have the name of a preset
    (project / "task.yaml").touch()
    settings = {
        "data": {
            "lower_data": [
                {"path": "pool/"},
                {"path": "s3://b/*.jsonl"},
                {"dataset": "web"},
                {"dataset": "o/name"},
            ],
            "upper_data": [{"path": "../up.jsonl"}],
            "heldout_data": [{"path": "/abs/h.jsonl"}],
            "tokenizer": "tok",
        },
        "models": {"proxy": "pythia-31m", "target": "model"},
        "tasks": {"names": ["task.yaml", "piqa"]},
        "compare": {"variants": {"v": {"data.upper_data": [{"path": "v.jsonl"}], "models.proxy": "model"}}},
    }
    (project / "c.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    config = load_config(project / "c.yaml", ["data.heldout_data=[{path: typed.jsonl}]"])
    assert [s.path or s.dataset for s in config.data.lower_data] == [
        f"{project}/pool/", "s3://b/*.jsonl", f"{project}/web", "o/name"
    ]  # fmt: skip
    assert config.data.upper_data[0].path == f"{project}/../up.jsonl"
    assert config.data.heldout_data[0].path == f"{tmp_path}/typed.jsonl"
    assert config.data.tokenizer == f"{project}/tok" and config.tasks.names == (f"{project}/task.yaml", "piqa")
    assert (config.models.proxy, config.models.target) == ("pythia-31m", f"{project}/model")
    assert config.compare.variants["v"] == {
        "data.upper_data": [{"path": f"{project}/v.jsonl"}], "models.proxy": f"{project}/model"
    }  # fmt: skip
    assert parse_config(config.model_dump(mode="json")) == config  # and wherever a run reads it again
    (project / "bad.yaml").write_text("data: {lower_data: 3}")
    with pytest.raises(BilectError, match=r"data\.lower_data"):
        load_config(project / "bad.yaml")


class Notes(SilentProgress):
    """What the reader is told."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_a_run_goes_on_without_the_files_of_stages_that_are_done(tmp_path):
    roles = ("lower", "upper", "heldout")
    for name in roles:
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    config = parse_config({"data": {f"{n}_data": [{"path": str(tmp_path / f"{n}.jsonl")}] for n in roles}})
    run = RunContext(tmp_path / "run", config, Notes())
    before = input_hashes(run)
    (tmp_path / "upper.jsonl").unlink()
    with pytest.raises(BilectError, match=r"no file or directory .*upper\.jsonl"):
        input_hashes(run)
    assert pool_hashes(run) == before["lower_data"]  # all that scoring other files reads
    run.root.mkdir()
    write_json(run.root / "run.json", {"stages": {}, "inputs": before})
    (run.root / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert input_hashes(run) == before
    assert len(run.progress.notes) == 1 and "upper.jsonl; going on with what" in run.progress.notes[0]
    (tmp_path / "run").rename(tmp_path / "moved")
    assert input_hashes(RunContext(tmp_path / "moved", config, SilentProgress())) == before
    other = parse_config({"data": {**config.model_dump(mode="json")["data"], "upper_data": [{"path": "other.jsonl"}]}})
    with pytest.raises(BilectError, match=r"other\.jsonl"):
        input_hashes(RunContext(tmp_path / "moved", other, SilentProgress()))


@pytest.mark.parametrize("run", ["-" * 320_000, "".join(chr(97 + i * i % 26) for i in range(320_000)), " " * 320_000])
def test_a_run_of_one_character_does_not_stall_the_tokenizer(run):
    start = time.process_time()
    tokenizer = train_tokenizer(["the sun and the rain " * 20, run, "wind over water"], 400)
    ids = tokenizer(run, add_special_tokens=False)["input_ids"]
    assert time.process_time() - start < 20 and tokenizer.decode(ids) == run
    assert len(ids) <= 320_000


def test_text_without_long_runs_has_the_tokens_it_always_had():
    from tokenizers import pre_tokenizers

    tokenizer = train_tokenizer(["the sun and the rain"] * 5, 300)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in ("the sun,  and\n\n\tthe rain's 12 ümlaut" + "x" * 240, "a b" * 500):
        assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) == plain.pre_tokenize_str(text)


def test_an_interrupt_ends_the_training_of_a_tokenizer():
    read = []

    def texts():
        while True:  # for ever, but for the interrupt
            read.append(f"word{len(read) % 997}")
            if len(read) == 5000:
                os.kill(os.getpid(), signal.SIGINT)
            yield read[-1]

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(texts(), 300)
    count = len(read)
    time.sleep(0.1)
    assert len(read) == count  # nothing goes on in the background
