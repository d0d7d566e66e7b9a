"""Pool and target in, records out: one function and one command, on the stages of a run."""

import json

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import bilect
from bilect.cli.commands import app
from bilect.errors import BilectError
from bilect.models.loading import load_causal_lm
from bilect.pipeline.choose import choosing_config
from bilect.pipeline.stages import run
from tests.corpus import TINY, write_corpus
from tests.killing import KillingProgress, in_fork

SMALL = {
    "models.proxy": TINY,
    "models.target": TINY,
    "data.context": 48,
    "data.vocab_size": 320,
    "warmup.proxy.steps": 10,
    "warmup.proxy.batch_size": 4,
    "fit.steps": 12,
    "fit.lower_batch_size": 8,
    "fit.upper_batch_size": 4,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def chosen(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("choose") / "kept"
    return bilect.choose(corpus / "pool.jsonl", corpus / "upper.jsonl", out, keep=0.25, method="dsir", settings=SMALL)


def test_the_kept_records_are_lines_of_the_pool(chosen, corpus):
    (file,) = (p for p in chosen.records.rglob("*") if p.is_file())
    pool, kept = lines(corpus / "pool.jsonl"), lines(file)
    assert file.name == "pool.jsonl" and [line for line in pool if line in set(kept)] == kept
    assert len(kept) == chosen.documents
    table = pq.read_table(chosen.kept).to_pylist()
    assert {r["doc_id"] for r in table} == {json.loads(line)["id"] for line in kept}
    assert sum(r["n_tokens"] for r in table) == chosen.tokens
    assert chosen.tokens - table[-1]["n_tokens"] < 0.25 * chosen.pool_tokens <= chosen.tokens


def test_all_of_the_pool_is_a_candidate_and_nothing_else_is_trained(chosen):
    scored = [r for p in chosen.scores.glob("*.parquet") for r in pq.read_table(p).to_pylist()]
    assert len(scored) == chosen.pool_documents == 240
    assert chosen.sources["maths"]["kept_share"] > 0.9 and sum(s["kept_share"] for s in chosen.sources.values()) == (
        pytest.approx(1.0)
    )
    assert not (chosen.out / "warmup").exists() and not (chosen.out / "round-1" / "target").exists()  # dsir needs none
    summary = json.loads((chosen.out / "summary.json").read_text())
    assert summary["documents"] == chosen.documents and summary["method"] == "dsir"
    assert chosen.report.stat().st_size > 5_000


def test_what_was_kept_is_a_pool_and_the_same_call_changes_nothing(chosen, corpus, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in chosen.out.rglob("*.parquet")}
    again = bilect.choose(
        corpus / "pool.jsonl", corpus / "upper.jsonl", chosen.out, keep=0.25, method="dsir", settings=SMALL
    )
    assert again == chosen and {p: p.stat().st_mtime_ns for p in chosen.out.rglob("*.parquet")} == before
    settings = {**SMALL, "fit.lower_batch_size": 2}
    half = bilect.choose(chosen.records, corpus / "upper.jsonl", tmp_path, top_k=7, method="dsir", settings=settings)
    assert half.documents == 7 and half.pool_documents == chosen.documents


def test_the_text_instead_of_the_records(chosen, corpus, tmp_path):
    def call(**more):
        return bilect.choose(corpus / "pool.jsonl", corpus / "upper.jsonl", tmp_path / "kept", keep=0.25, method="dsir",
                             settings=SMALL | more, repeat=True)  # fmt: skip

    assert call().records.is_dir()
    kept = call(**{"selection.output": "text", "selection.format": "jsonl.zst"})
    assert kept.records is None and not (tmp_path / "kept" / "records").exists()  # those of before are not its own
    assert kept.kept.name == "kept.jsonl.zst" and kept.kept.is_file()
    assert (kept.documents, kept.threshold) == (chosen.documents, chosen.threshold)


def test_a_method_with_a_proxy_trains_one_and_a_killed_choice_goes_on(corpus, tmp_path):
    arguments = {"keep": 0.2, "method": "bliss", "settings": SMALL}
    whole = bilect.choose(corpus / "pool.jsonl", corpus / "upper.jsonl", tmp_path / "whole", **arguments)
    assert (whole.out / "warmup" / "proxy").is_dir() and not (whole.out / "warmup" / "target").exists()

    def killed():
        config = choosing_config(corpus / "pool.jsonl", corpus / "upper.jsonl", **arguments)
        progress = KillingProgress(tmp_path / "log", None)
        progress.stage, progress.now, progress.at = "", "", 16  # in the fit: ten steps of warm-up come first
        run(config, tmp_path / "killed", progress, command="select", number=1)

    assert in_fork(killed) == -9
    resumed = bilect.choose(corpus / "pool.jsonl", corpus / "upper.jsonl", tmp_path / "killed", **arguments)
    assert pq.read_table(resumed.kept).equals(pq.read_table(whole.kept))


def test_a_given_model_judges_as_it_is(corpus, chosen, tmp_path):
    model = load_causal_lm(TINY, vocab_size=320, seed=3)
    model.save_pretrained(tmp_path / "model")
    tokenizer = chosen.out / "tokenizer"
    for file in tokenizer.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    settings = {k: v for k, v in SMALL.items() if not k.startswith(("models", "data.vocab", "warmup"))}
    kept = bilect.choose(
        corpus / "pool.jsonl", corpus / "upper.jsonl", tmp_path / "out", method="perplexity",
        model=tmp_path / "model", settings=settings,
    )  # fmt: skip
    saved, given = (load_causal_lm(str(folder)) for folder in (kept.out / "warmup" / "proxy", tmp_path / "model"))
    assert all((a == b).all() for a, b in zip(saved.parameters(), given.parameters(), strict=True))


def test_the_command_says_what_it_kept(corpus, tmp_path):
    settings = [f"--set={k}={json.dumps(v)}" for k, v in SMALL.items()]
    files = [str(corpus / "pool.jsonl"), "--target", str(corpus / "upper.jsonl"), "--out", str(tmp_path / "out")]
    call = ["choose", *files, "--tokens", "1k", "--method", "dsir", *settings]
    plan = CliRunner().invoke(app, [*call, "--dry-run"])
    assert plan.exit_code == 0 and "select dsir" in plan.output and "train" not in plan.output
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert "maths" in result.output and "Records:" in result.output and "bilect select" in result.output
    assert 1000 <= json.loads((tmp_path / "out" / "summary.json").read_text())["tokens"] < 1048


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "dsri"}, "method: there is no method 'dsri'; did you mean 'dsir'"),
        ({"keep": 1.5}, "keep_ratio: Input should be less than or equal to 1"),
        ({"keep": 0.2, "top_k": 3}, "give one of keep_ratio and top_k|not keep_ratio and top_k"),
        ({"settings": {"fitt.steps": 3}}, "unknown key 'fitt'; did you mean 'fit'"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(corpus, tmp_path, more, message):
    with pytest.raises(BilectError) as error:
        bilect.choose(corpus / "pool.jsonl", corpus / "upper.jsonl", tmp_path / "out", **more)
    assert any(part in str(error.value) for part in message.split("|")) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
