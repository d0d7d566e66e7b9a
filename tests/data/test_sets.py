"""The pool and the target sets of a run: what is excluded, what is refused, and what the run directory says of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilect.config import parse_config
from bilect.data.checks import DocumentIndex
from bilect.data.documents import Document
from bilect.data.store import Naming
from bilect.data.tokens import TokenStore, write_tokens
from bilect.errors import BilectError
from bilect.models.loading import train_tokenizer
from bilect.pipeline.context import RunContext
from bilect.pipeline.directory import RunDir
from bilect.pipeline.stages import stages
from bilect.pipeline.texts import input_hashes, tokenise_heldout, tokenise_pool, tokenise_upper
from bilect.runtime.progress import SilentProgress
from bilect.runtime.seeds import derive_seed
from tests.corpus import write_jsonl

POOL = [{"id": f"d{i}", "text": f"document {i} of the pool, number {i * i}"} for i in range(12)]


def corpus(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", POOL[:5])
    write_jsonl(folder / "b.jsonl", POOL[5:])
    write_jsonl(folder / "upper.jsonl", [{"id": f"u{i}", "text": f"upper {i}"} for i in range(3)])
    write_jsonl(folder / "more.jsonl", [{"id": f"m{i}", "text": f"more {i}"} for i in range(2)])
    write_jsonl(folder / "heldout.jsonl", [{"id": f"h{i}", "text": f"held out {i}"} for i in range(3)])


def context(folder: Path, size: int = 4, **data: Any) -> RunContext:
    parts = {
        "lower_data": [{"path": str(folder / "a.jsonl")}, {"path": str(folder / "b.jsonl"), "weight": 2.0}],
        "upper_data": [{"path": str(folder / "upper.jsonl"), "weight": 3.0}, {"path": str(folder / "more.jsonl")}],
        "heldout_data": [{"path": str(folder / "heldout.jsonl")}],
    }
    settings = {
        "data": {**parts, "context": 32, "vocab_size": 300, **data},
        "method": "bliss",
        "fit": {"lower_batch_size": size},
    }
    return RunContext(folder / "run", parse_config(settings), SilentProgress())


def tokenise(run: RunContext) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Figures of pool, held-out and upper sets."""
    run.root.mkdir(exist_ok=True)
    return tokenise_pool(run, run.root), tokenise_heldout(run, run.root), tokenise_upper(run, run.root)


def skipped(run: RunContext) -> list[tuple[str, str, str, str]]:
    names = ("pool", "held-out", "upper")
    lines = [x for n in names for x in (run.root / "tokens" / f"skipped-{n}.jsonl").read_text().splitlines()]
    return [(s["role"], Path(s["file"]).name, s["place"], s["reason"]) for s in map(json.loads, lines)]


def test_layout_order_and_weights(tmp_path):
    corpus(tmp_path)
    run = context(tmp_path)
    pool_figures, heldout_figures, upper_figures = tokenise(run)
    tokens = run.root / "tokens"
    assert sorted(str(p.relative_to(tokens)) for p in tokens.rglob("*.*")) == [
        "held-out.json", "heldout/heldout.arrow", "pool.json", "pool/00000-a.arrow", "pool/00001-b.arrow",
        "skipped-held-out.jsonl", "skipped-pool.jsonl", "skipped-upper.jsonl", "upper/more.arrow", "upper/upper.arrow",
    ]  # fmt: skip
    pool = run.pool()
    assert pool.doc_ids(range(12)) == [f"d{i}" for i in range(12)] and pool.weight_R is not None
    assert pool.weight_R.tolist() == [1] * 5 + [2] * 7 and pool.sources([4, 5]) == ["a", "b"]
    assert pool_figures == {
        "tokens": pool.length_R.sum(), "documents": 12, "skipped": {}, "not_read": 0, "inputs_with_renamed_ids": 0,
        "flops": 0.0,
    }  # fmt: skip
    sets = run.upper_sets()
    assert [(name, weight, len(store)) for name, weight, store in sets] == [("upper", 3.0, 3), ("more", 1.0, 2)]
    assert run.upper().doc_ids(range(5)) == ["u0", "u1", "u2", "m0", "m1"]  # in the order of the config
    assert upper_figures == {"tokens": run.upper().length_R.sum(), "skipped": {}, "not_read": 0, "flops": 0.0}
    heldout_tokens = run.heldout_sets()["heldout"].length_R.sum()
    assert heldout_figures == {"tokens": heldout_tokens, "skipped": {}, "not_read": 0, "flops": 0.0}
    assert skipped(run) == [] and len(run.excluded()) == 0


def test_shards_without_exclusions_are_a_plain_split(tmp_path):
    corpus(tmp_path)
    run = context(tmp_path)
    tokenise(run)
    order = np.random.default_rng(derive_seed(0, "shards")).permutation(12)
    assert run.shard(0, 12).tolist() == sorted(order[:3]) and run.shard(1, 12).tolist() == sorted(order[3:])


def test_a_text_that_occurs_twice_is_left_out_whatever_its_id(tmp_path):
    corpus(tmp_path)
    write_jsonl(tmp_path / "b.jsonl", [*POOL[5:], {"id": "other", "text": POOL[3]["text"]}, POOL[7]])
    run = context(tmp_path)
    figures, _, _ = tokenise(run)
    assert figures["documents"] == 12 and figures["skipped"] == {"duplicate text": 2}
    assert figures["tokens"] == run.pool().length_R[:12].sum() and figures["inputs_with_renamed_ids"] == 0
    assert len(run.pool()) == 14 and run.excluded().tolist() == [12, 13]
    assert skipped(run) == [("pool", "b.jsonl", f"line {n}", "duplicate text") for n in (8, 9)]
    shards = [run.shard(n, 14).tolist() for n in (0, 1)]
    assert sorted(shards[0] + shards[1]) == list(range(12)) and len(shards[0]) == 3


def test_repeated_texts_can_be_kept_under_ids_of_their_own(tmp_path):
    corpus(tmp_path)
    write_jsonl(tmp_path / "b.jsonl", [*POOL[5:], {"text": POOL[3]["text"]}, POOL[7]])
    run = context(tmp_path, duplicates="keep")
    figures, _, _ = tokenise(run)
    ids = run.pool().doc_ids(range(14))
    assert figures["documents"] == 14 and figures["skipped"] == {} and len(set(ids)) == 14
    assert ids[:5] == ["d0", "d1", "d2", "d3", "d4"] and (ids[7], ids[13]) == ("b/3/d7", "b/9/d7")


def test_repeated_texts_can_stop_the_run_before_anything_is_tokenised(tmp_path, monkeypatch):
    corpus(tmp_path)
    write_jsonl(tmp_path / "b.jsonl", [*POOL[5:], {"id": "x", "text": POOL[3]["text"]}])
    monkeypatch.setattr("bilect.data.blocks.write_tokens", None)
    with pytest.raises(BilectError) as caught:
        tokenise(context(tmp_path, duplicates="fail"))
    assert str(caught.value) == (
        f"data: {tmp_path}/b.jsonl, line 8: the same text occurs twice, first in {tmp_path}/a.jsonl, line 4 "
        "(data.duplicates=drop leaves such documents out, keep keeps them)"
    )


def test_ids_that_start_again_in_every_shard_are_told_apart(tmp_path):
    corpus(tmp_path)
    for shard, part in enumerate((POOL[:5], POOL[5:])):
        write_jsonl(tmp_path / f"{'ab'[shard]}.jsonl", [{"id": n, "text": d["text"]} for n, d in enumerate(part)])
    notes: list[str] = []
    run = context(tmp_path)
    run = RunContext(
        run.root, run.config, type("Notes", (SilentProgress,), {"note": lambda _, text: notes.append(text)})()
    )
    figures, _, _ = tokenise(run)
    assert figures["documents"] == 12 and figures["skipped"] == {} and figures["inputs_with_renamed_ids"] == 2
    assert run.pool().doc_ids(range(12)) == [*(f"a/{n}" for n in range(5)), *(f"b/{n}" for n in range(7))]
    assert run.pool().doc_id(6) == "b/1" and run.pool().given_ids([6]) == ["1"]
    batch = next(iter(run.pool().reader(["row", "doc_id"])))
    assert batch.to_pylist()[4] == {"row": 4, "doc_id": "a/4"}
    assert notes == [f"ids of {tmp_path}/a.jsonl and of 1 more occur more than once: they are called a/ID"]


def test_pieces_of_a_repeated_document_are_all_excluded(tmp_path):
    corpus(tmp_path)
    long = {"id": "d2", "text": "a long document " * 60}
    write_jsonl(tmp_path / "b.jsonl", [long, *POOL[5:], {**long, "id": "again"}])
    run = context(tmp_path, long_documents="chunk")
    figures, _, _ = tokenise(run)
    excluded = run.excluded()
    assert len(excluded) > 3 and figures["skipped"] == {"duplicate text": 1}
    assert {d.split("#")[0] for d in run.pool().doc_ids(excluded)} == {"b/again"}
    assert run.pool().doc_ids([5, 6]) == ["b/d2#0", "b/d2#1"] and run.pool().doc_id(2) == "a/d2"  # two texts


def test_the_first_records_of_two_files_are_two_documents(tmp_path):
    for name in ("a", "b"):
        document = Document("same", name, "x", record=1)
        write_tokens([document], train_tokenizer(["x y"] * 5, 300), tmp_path / f"{name}.arrow", context=8)
    index = DocumentIndex(TokenStore(tmp_path))
    assert index.repeated().tolist() == [[1, 0]]
    assert index.naming(["a", "b"]) == [Naming("a/"), Naming("b/")]
    index.leave_out(np.array([1]))
    assert index.naming(["a", "b"]) == [Naming(), Naming()] and index.repeated().tolist() == []


def test_held_out_texts_are_taken_out_of_the_pool(tmp_path):
    corpus(tmp_path)
    run = context(tmp_path)
    tokenise(run)
    held_out = [{"id": "x", "text": POOL[6]["text"]}, {"text": "held out"}]
    write_jsonl(tmp_path / "heldout.jsonl", held_out)
    for _ in range(2):  # a second time nothing is counted twice
        figures = tokenise_heldout(run, run.root)
        assert figures["skipped"] == {"in heldout_data": 1} and run.excluded().tolist() == [6]
        assert skipped(run) == [("pool", "b.jsonl", "line 2", "in heldout_data")]
    assert 6 not in [*run.shard(0, 12), *run.shard(1, 12)] and len(run.shard(0, 12)) + len(run.shard(1, 12)) == 11
    with pytest.raises(BilectError, match="the pool has 11 documents, fewer than 2 batches of 6"):
        tokenise_heldout(context(tmp_path, size=6), run.root)


def test_held_out_texts_stay_out_when_settings_change_there_and_back(tmp_path):
    """A run, then one of other settings that stops between pool and held-out sets, then the first settings again."""
    corpus(tmp_path)
    write_jsonl(tmp_path / "heldout.jsonl", [{"id": "x", "text": POOL[6]["text"]}, {"text": 3}])
    skipping, stopping = context(tmp_path, on_bad_record="skip"), context(tmp_path)

    def tokenise_stages(run: RunContext) -> None:
        plan = stages(run, input_hashes(run))[:3]
        assert [s.name for s in plan] == ["tokenise pool", "tokenise held-out", "tokenise upper"]
        directory = RunDir(run.root)
        for s in plan:
            directory.stage(s.name, s.action, settings=s.settings, after=s.reads)

    tokenise_stages(skipping)
    lines = skipped(skipping)
    assert skipping.excluded().tolist() == [6] and len(lines) == 2
    with pytest.raises(BilectError, match=r"heldout\.jsonl, line 2"):
        tokenise_stages(stopping)
    tokenise_stages(skipping)
    assert skipping.excluded().tolist() == [6] and skipped(skipping) == lines


def test_upper_and_held_out_must_not_share_a_text(tmp_path):
    corpus(tmp_path)
    write_jsonl(tmp_path / "heldout.jsonl", [{"id": "h", "text": "held out"}, {"id": "other", "text": "more 1"}])
    with pytest.raises(BilectError, match=r"heldout\.jsonl, line 2 is in upper_data too \(1 in all\)"):
        tokenise(context(tmp_path))


def test_sets_of_several_files_and_with_bad_records(tmp_path):
    corpus(tmp_path)
    (tmp_path / "exam").mkdir()
    write_jsonl(tmp_path / "exam" / "1.jsonl", [{"id": "q", "text": "one"}, {"text": "one"}, {"id": 3}])
    write_jsonl(tmp_path / "exam" / "2.jsonl", [{"id": "r", "text": "two"}])
    run = context(tmp_path, on_bad_record="skip", heldout_data=[{"path": str(tmp_path / "exam")}])
    _, figures, _ = tokenise(run)
    store = TokenStore(run.root / "tokens" / "heldout" / "exam.arrow")
    assert store.doc_ids(range(len(store))) == ["q", "r"] and store.texts([0, 1]) == ["one", "two"]
    assert figures["skipped"] == {"no text field": 1, "duplicate text": 1}
    assert skipped(run) == [
        ("heldout", "1.jsonl", "line 3", "no text field"), ("heldout", "1.jsonl", "line 2", "duplicate text")
    ]  # fmt: skip


def test_everything_left_out_is_an_error(tmp_path):
    corpus(tmp_path)
    write_jsonl(tmp_path / "more.jsonl", [{"id": "a"}, {"text": ""}])
    with pytest.raises(BilectError, match=r"no documents for upper in .*more\.jsonl: all 2 records were left out"):
        tokenise(context(tmp_path, on_bad_record="skip"))


def test_sets_of_one_name_are_refused(tmp_path):
    corpus(tmp_path)
    twice = [{"path": str(tmp_path / "upper.jsonl")}, {"path": str(tmp_path / "more.jsonl"), "source": "upper"}]
    with pytest.raises(BilectError, match=r"data\.upper_data: 2 sets are called 'upper'; give each its own source"):
        input_hashes(context(tmp_path, upper_data=twice))


def test_too_small_a_pool_is_known_before_anything_is_tokenised(tmp_path, monkeypatch):
    corpus(tmp_path)
    monkeypatch.setattr("bilect.pipeline.texts.train_tokenizer", None)
    with pytest.raises(BilectError, match="the pool has 12 documents, fewer than 2 batches of 7"):
        tokenise(context(tmp_path, size=7))


def test_an_interrupted_pool_goes_on_and_outlives_the_cache(tmp_path, monkeypatch):
    corpus(tmp_path)
    monkeypatch.setenv("BILECT_CACHE", str(tmp_path / "cache"))
    from bilect.data import blocks

    write_tokens, made = blocks.write_tokens, []

    def stop_at_b(documents: Any, *rest: Any, **more: Any) -> int:
        made.append(0)
        if len(made) == 2:
            raise KeyboardInterrupt
        return write_tokens(documents, *rest, **more)

    monkeypatch.setattr(blocks, "write_tokens", stop_at_b)
    with pytest.raises(KeyboardInterrupt):
        tokenise(context(tmp_path))
    run = context(tmp_path)
    shutil.rmtree(run.root)
    tokenise(run)
    assert len(made) == 2 + 1 + 3  # a once, b twice, three target sets
    shutil.rmtree(tmp_path / "cache")
    assert run.pool().texts([0, 11]) == [POOL[0]["text"], POOL[11]["text"]] and len(run.upper()) == 5


def test_identities_of_inputs(tmp_path):
    corpus(tmp_path)
    run = context(tmp_path)
    before = input_hashes(run)
    assert {role: [Path(f).name for f in found] for role, found in before.items()} == {
        "lower_data": ["a.jsonl", "b.jsonl"], "upper_data": ["upper.jsonl", "more.jsonl"],
        "heldout_data": ["heldout.jsonl"],
    }  # fmt: skip
    write_jsonl(tmp_path / "b.jsonl", POOL[6:])
    after = input_hashes(run)
    assert [k for role in before for k in before[role] if before[role][k] != after[role][k]] == [f"{tmp_path}/b.jsonl"]
