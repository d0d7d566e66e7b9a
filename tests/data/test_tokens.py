"""Token files, batches and packed windows."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilect.data.batch import IGNORE, make_batch
from bilect.data.documents import Document, Problem
from bilect.data.loading import BatchStream, PackedWindows, length_bucketed, one_pass
from bilect.data.tokens import TokenStore, write_rows, write_tokens
from bilect.errors import BilectError
from bilect.models.loading import train_tokenizer

TEXTS = ["the sun and the rain", "wind over water, wind over stone", "ümlaut — naïve 語", "a b c d e f g h i j"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 5, 300)


def store(tmp_path: Path, documents: list[Document], tokenizer, context: int = 64, chunk: bool = False) -> TokenStore:
    write_tokens(documents, tokenizer, tmp_path / "t.arrow", context=context, chunk=chunk)
    return TokenStore(tmp_path / "t.arrow")


def test_rows_start_with_the_start_token_and_decode_to_the_text(tmp_path, tokenizer):
    tokens = store(tmp_path, [Document(f"d{i}", "s", t) for i, t in enumerate(TEXTS)], tokenizer)
    for i, text in enumerate(TEXTS):
        ids, n_given = tokens.row(i)
        assert ids[0] == tokenizer.bos_token_id and n_given == 1
        assert tokenizer.decode(ids[1:]) == text == tokens.texts([i])[0]
        assert tokens.length_R[i] == len(ids)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=3), st.integers(2, 70))
def test_chunks_join_to_the_document(tmp_path_factory, tokenizer, texts, context):
    folder = tmp_path_factory.mktemp("t")
    tokens = store(folder, [Document(str(i), "s", t * 20) for i, t in enumerate(texts)], tokenizer, context, chunk=True)
    assert tokens.length_R.max() <= context
    room, names = context - 1, tokens.doc_ids(range(len(tokens)))
    for i, text in enumerate(texts):
        rows = [r for r, d in enumerate(names) if d.split("#")[0] == str(i)]
        whole = tokenizer(text * 20, add_special_tokens=False)["input_ids"]
        joined = torch.cat([tokens.row(r)[0][1:] for r in rows]).tolist()
        dropped = whole[len(joined) :]
        rest = len(whole) % room
        assert joined + dropped == whole
        assert len(dropped) == (rest if len(whole) > room and rest < min(32, room // 4) else 0)
        assert [names[r] for r in rows] == ([str(i)] if len(whole) <= room else [f"{i}#{k}" for k in range(len(rows))])
        pieces = "".join(tokens.texts(rows))
        assert (text * 20).startswith(pieces) and (dropped or pieces == text * 20)


def test_truncation_keeps_the_start_and_prompts_lose_theirs(tmp_path, tokenizer):
    long = "one two three four five six seven eight nine ten"
    prompted = Document("p", "s", long + " END", long)
    tokens = store(tmp_path, [Document("d", "s", long), prompted], tokenizer, context=12)
    whole = tokenizer(long, add_special_tokens=False)["input_ids"]
    assert tokens.row(0)[0].tolist() == [tokenizer.bos_token_id, *whole[:11]]
    ids, n_given = tokens.row(1)
    assert len(ids) == 12 and tokenizer.decode(ids[n_given:]) == " END"
    batch = make_batch([(ids, n_given)], 0)
    assert tokenizer.decode(batch.labels_N) == " END"  # only the response is learned


def test_a_store_over_three_files_is_one_file_row_by_row(tmp_path, tokenizer):
    rng = random.Random(1)
    documents = [
        Document(f"d{i}", f"s{i % 3}", " ".join(rng.choices(TEXTS, k=1 + i % 3)), record=i) for i in range(2700)
    ]
    write_tokens(documents, tokenizer, tmp_path / "one.arrow", context=24)
    parts, cuts = tmp_path / "parts", (0, 1, 1500, 2700)
    parts.mkdir()
    for k in range(3):
        write_tokens(documents[cuts[k] : cuts[k + 1]], tokenizer, parts / f"{k}.arrow", context=24)
    write_tokens([], tokenizer, parts / "1b.arrow", context=24)
    one, three = TokenStore(tmp_path / "one.arrow"), TokenStore(parts)
    assert len(one) == len(three) == 2700 and one.length_R.dtype == np.int32
    assert (one.length_R == three.length_R).all() and one.length_R.max() == 24
    for i in range(2700):
        assert torch.equal(one.row(i)[0], three.row(i)[0]) and one.row(i)[1] == three.row(i)[1]
    indices = np.random.default_rng(0).permutation(2700)[:1000]
    indices[:3] = indices[3]  # the same row more than once
    assert three.doc_ids(indices) == [f"d{i}" for i in indices] == [three.doc_id(i) for i in indices]
    assert three.sources(indices) == one.sources(indices) == [f"s{i % 3}" for i in indices]
    assert three.texts(indices) == one.texts(indices)
    assert (three.column_R("record") == np.arange(2700)).all()
    assert [(p.name, p.rows) for p in three.parts] == [
        ("0", range(1)), ("1", range(1, 1500)), ("1b", range(1500, 1500)), ("2", range(1500, 2700))
    ]  # fmt: skip
    assert three.weight_R is None and TokenStore(three.paths, [1, 1, 1, 1]).weight_R is None
    weighted = TokenStore(three.paths, [1, 0.5, 9, 2]).weight_R
    assert weighted is not None and weighted[[0, 1, 1499, 1500, 2699]].tolist() == [1, 0.5, 0.5, 2, 2]
    assert three.doc_ids([]) == []
    for bad in (-1, 2700):
        with pytest.raises(IndexError):
            three.row(bad)
        with pytest.raises(IndexError):
            three.texts([bad])


def test_some_rows_can_be_copied(tmp_path, tokenizer):
    tokens = store(tmp_path, [Document(f"d{i}", "s", t) for i, t in enumerate(TEXTS)], tokenizer)
    write_rows(tokens, np.array([0, 2]), tmp_path / "some.arrow")
    some = TokenStore(tmp_path / "some.arrow")
    assert some.doc_ids(range(len(some))) == ["d0", "d2"] and some.texts([1]) == [TEXTS[2]]
    assert torch.equal(some.row(1)[0], tokens.row(2)[0])


def test_a_damaged_or_missing_token_file_is_one_line(tmp_path, tokenizer):
    store(tmp_path, [Document("d", "s", "x")], tokenizer)
    (tmp_path / "t.arrow").write_bytes(b"no arrow at all")
    with pytest.raises(BilectError, match=r"t\.arrow is damaged"):
        TokenStore(tmp_path / "t.arrow")
    with pytest.raises(BilectError, match="no file"):
        TokenStore(tmp_path / "none.arrow")


def test_a_document_without_content_gets_no_row(tmp_path, tokenizer):
    problems: list[Problem] = []
    documents = [Document("a", "s", "x"), Document("b", "s", tokenizer.bos_token * 2, record=7)]
    rows = write_tokens(documents, tokenizer, tmp_path / "t.arrow", context=8, on_problem=problems.append)
    assert rows == len(TokenStore(tmp_path / "t.arrow")) == 1
    assert [(p.record, p.reason) for p in problems] == [(7, "no tokens")]  # the start token is no content
    with pytest.raises(BilectError, match=r"data\.context: 1 leaves no room"):
        write_tokens(documents, tokenizer, tmp_path / "t.arrow", context=1)


def test_batch_targets_are_the_next_tokens():
    batch = make_batch([(torch.tensor([9, 1, 2, 3]), 1), (torch.tensor([9, 4, 5]), 2)], pad_id=0, multiple=4)
    assert batch.input_ids_BT.tolist() == [[9, 1, 2, 3], [9, 4, 5, 0]]
    assert batch.target_BT.tolist() == [[1, 2, 3, IGNORE], [IGNORE, 5, IGNORE, IGNORE]]
    assert batch.mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.labels_N.tolist() == [1, 2, 3, 5] and batch.document_N.tolist() == [0, 0, 0, 1]
    weights = batch.token_mean_weight_N(torch.tensor([0.6, 0.4]))
    torch.testing.assert_close(weights, torch.tensor([0.2, 0.2, 0.2, 0.4], dtype=torch.float64))


def test_packed_windows_lay_documents_end_to_end(tmp_path, tokenizer):
    tokens = store(tmp_path, [Document(f"d{i}", "s", t) for i, t in enumerate(TEXTS)], tokenizer)
    rows = np.array([0, 2, 3])
    windows = PackedWindows(tokens, rows, context=7, n_windows=30, seed=1)
    stream = torch.cat([windows[i]["input_ids"] for i in range(30)]).tolist()
    expected = [t for r in windows.order for t in tokens.row(int(r))[0].tolist()][: len(stream)]
    assert stream == expected and len(stream) == 210
    assert sorted(windows.order[:3]) == [0, 2, 3] and sorted(windows.order[3:6]) == [0, 2, 3]
    assert windows.passes == pytest.approx(210 / tokens.length_R[rows].sum())
    again = PackedWindows(tokens, rows, context=7, n_windows=30, seed=1)
    assert (again.order == windows.order).all()


def test_packed_prompts_are_not_learned(tmp_path, tokenizer):
    tokens = store(tmp_path, [Document("p", "s", "the sun END", "the sun")], tokenizer)
    window = PackedWindows(tokens, np.array([0]), context=int(tokens.length_R[0]), n_windows=1, seed=0)[0]
    n_given = tokens.row(0)[1]
    learned = window["labels"] != IGNORE
    assert learned.tolist() == [False] + [False] * (n_given - 1) + [True] * (len(learned) - n_given)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 600))
def test_length_buckets_partition_the_rows_within_the_budget(lengths, budget):
    length_R = np.array(lengths)
    rows = np.arange(len(lengths))[::2]
    parts = list(length_bucketed(length_R, rows, budget))
    assert sorted(np.concatenate(parts)) == rows.tolist()
    assert all(len(p) == 1 or len(p) * length_R[p].max() <= budget for p in parts)


def test_cycled_batches_cover_every_pass(tmp_path, tokenizer):
    tokens = store(tmp_path, [Document(f"d{i}", "s", f"{t} {i}") for i, t in enumerate(TEXTS * 2)], tokenizer)
    batches = BatchStream(tokens, np.arange(8), 4, 0, seed=3, device=torch.device("cpu"))
    seen = [tuple(row.tolist()) for _ in range(2) for row in next(batches).input_ids_BT[:, :6]]
    other = BatchStream(tokens, np.arange(8), 4, 0, seed=3, device=torch.device("cpu"))
    assert [tuple(r.tolist()) for _ in range(2) for r in next(other).input_ids_BT[:, :6]] == seen
    lengths = sorted(int(n) for _ in range(2) for n in next(batches).length_B)
    assert lengths == sorted(tokens.length_R.tolist())  # the second pass holds every document once


def test_batch_streams_go_on_from_their_state(tmp_path, tokenizer):
    tokens = store(tmp_path, [Document(f"d{i}", "s", f"{t} {i}") for i, t in enumerate(TEXTS * 2)], tokenizer)
    weight_R = np.linspace(0.3, 2.4, 8)
    for weights in (None, weight_R):
        whole, first, second = (
            BatchStream(tokens, np.arange(8), 3, 0, seed=seed, device=torch.device("cpu"), weight_R=weights)
            for seed in (3, 3, 99)
        )
        batches = [next(whole).input_ids_BT for _ in range(20)]
        for expected in batches[:7]:
            assert torch.equal(next(first).input_ids_BT, expected)
        torch.save(first.state_dict(), tmp_path / "state")
        second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        for expected in batches[7:]:
            assert torch.equal(next(second).input_ids_BT, expected)


def test_a_pass_without_weights_is_a_permutation_of_the_rows(tmp_path, tokenizer):
    """The draws that streams and windows have always made."""
    tokens = store(tmp_path, [Document(f"d{i}", "s", f"{t} {i}") for i, t in enumerate(TEXTS * 2)], tokenizer)
    rows = np.array([1, 2, 5, 6, 7])
    generator = np.random.default_rng(3)
    expected = np.concatenate([generator.permutation(rows) for _ in range(4)])
    stream = BatchStream(tokens, rows, 2, 0, seed=3, device=torch.device("cpu"))
    lengths = [n for _ in range(10) for n in next(stream).length_B.tolist()]
    assert lengths == tokens.length_R[expected].tolist()
    windows = PackedWindows(tokens, rows, context=5, n_windows=int(tokens.length_R[rows].sum()) * 3 // 5, seed=3)
    assert windows.order.tolist() == expected[: len(windows.order)].tolist() and len(windows.order) == 15


def test_a_weighted_pass_has_the_whole_part_always_and_the_fraction_by_chance():
    generator = np.random.default_rng(0)
    rows, weight_R = np.array([4, 1, 3]), np.array([9.0, 2.0, 9.0, 0.25, 1.5])
    counts = np.array([[(p == r).sum() for r in rows] for p in (one_pass(rows, weight_R, generator)
                                                                for _ in range(4000))])  # fmt: skip
    assert set(counts[:, 0]) == {1, 2} and set(counts[:, 1]) == {2} and set(counts[:, 2]) == {0, 1}
    assert counts.mean(axis=0) == pytest.approx([1.5, 2.0, 0.25], abs=0.03)
    assert abs(np.corrcoef(counts[:, 0], counts[:, 2])[0, 1]) < 0.05  # drawn apart


def test_weighted_windows_fill_up_and_nothing_to_draw_is_one_line(tmp_path, tokenizer):
    tokens = store(tmp_path, [Document(f"d{i}", "s", t) for i, t in enumerate(TEXTS)], tokenizer)
    rows, weight_R = np.arange(4), np.array([0.1, 3.0, 0.0, 0.5])
    windows = PackedWindows(tokens, rows, 7, 200, seed=1, weight_R=weight_R)
    assert windows.ends[-1] >= 1400 and 2 not in windows.order
    assert windows.passes == pytest.approx(1400 / (tokens.length_R * weight_R).sum())
    share = (windows.order == 1).mean()
    assert share == pytest.approx(3 / 3.6, abs=0.1)
    with pytest.raises(BilectError, match="no text to train on"):
        PackedWindows(tokens, np.array([2]), 7, 200, seed=1, weight_R=weight_R)
    with pytest.raises(BilectError, match="no documents to draw"):
        BatchStream(tokens, np.array([], dtype=np.int64), 7, 0, 1, torch.device("cpu"))
