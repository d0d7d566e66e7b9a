"""The cache: what is tokenised once, what is tokenised anew, and what is left when an entry is damaged or gone."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from bilect.config import SourceConfig
from bilect.data import blocks, cache
from bilect.data.cache import cache_folder, file_hash
from bilect.data.sources import inputs
from bilect.data.token_files import TokenFiles, link
from bilect.data.tokens import TokenStore
from bilect.errors import BilectError
from bilect.models.loading import train_tokenizer

TEXTS = ["the sun and the rain", "wind over water, wind over stone", "a b c d e f g h i j"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BILECT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 5, 300)


@pytest.fixture
def calls(monkeypatch) -> list[Path]:
    """One entry per tokenised file."""
    made: list[Path] = []
    write_tokens = blocks.write_tokens

    def counted(documents: Any, tokenizer: Any, path: Path, **more: Any) -> int:
        made.append(path)
        return write_tokens(documents, tokenizer, path, **more)

    monkeypatch.setattr(blocks, "write_tokens", counted)
    return made


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def get(path: Path, tokenizer: Any, skip: bool = False, context: int = 16, chunk: bool = False, **more: Any) -> Any:
    (source,) = inputs(SourceConfig(path=str(path), **more))
    return TokenFiles(tokenizer, context=context, chunk=chunk, skip=skip).get(source)


def test_the_same_content_is_tokenised_once(tmp_path, tokenizer, calls):
    file = write(tmp_path / "a.jsonl", TEXTS)
    first = get(file, tokenizer)
    assert (first.rows, len(calls)) == (3, 1) and TokenStore(first.path).texts([2]) == [TEXTS[2]]
    assert first.tokens == TokenStore(first.path).length_R.sum()
    os.utime(file, (1, 1))
    assert get(file, tokenizer) == get(file, tokenizer, skip=True) == get(file, tokenizer, weight=2.0) == first
    (tmp_path / "elsewhere").mkdir()
    assert get(shutil.copy(file, tmp_path / "elsewhere" / "a.jsonl"), tokenizer) == first
    assert len(calls) == 1


def test_whatever_changes_the_tokens_is_tokenised_anew(tmp_path, tokenizer, calls):
    file = write(tmp_path / "a.jsonl", TEXTS)
    changes: list[dict[str, Any]] = [{}, {"context": 12}, {"chunk": True}, {"source": "x"}, {"fields": {"id": "n"}}]
    entries = [get(file, tokenizer, **change).path for change in changes]
    entries.append(get(file, train_tokenizer([*TEXTS, "xyzzy " * 9] * 5, 310)).path)
    entries.append(get(write(file, [*TEXTS[:2], TEXTS[2][::-1]]), tokenizer).path)  # as long as before
    assert len(set(entries)) == len(entries) == len(calls) == 7


def break_arrow(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)


def cut_arrow(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-100])


def no_note(entry: Path) -> None:
    entry.with_suffix(".json").unlink()  # the process was killed between the two


def half_note(entry: Path) -> None:
    entry.with_suffix(".json").write_text('{"rows": 3, "tok')


@pytest.mark.parametrize("damage", [break_arrow, cut_arrow, no_note, half_note, Path.unlink])
def test_a_damaged_entry_is_made_again(tmp_path, tokenizer, calls, damage):
    file = write(tmp_path / "a.jsonl", TEXTS)
    first = get(file, tokenizer)
    whole = first.path.read_bytes()
    damage(first.path)
    assert get(file, tokenizer) == first and first.path.read_bytes() == whole
    assert get(file, tokenizer) == first and len(calls) == 2


def test_a_failure_leaves_nothing_behind(tmp_path, tokenizer, calls):
    file = write(tmp_path / "a.jsonl", [*TEXTS, " "])
    with pytest.raises(BilectError, match="line 4: empty document"):
        get(file, tokenizer)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    skipping = get(file, tokenizer, skip=True)
    assert [p.record for p in skipping.skipped] == [4] and get(file, tokenizer, skip=True) == skipping
    assert len(calls) == 2


def test_links_outlive_the_cache(tmp_path, tokenizer, monkeypatch):
    made = get(write(tmp_path / "a.jsonl", TEXTS), tokenizer)
    link(made.path, tmp_path / "run" / "a.arrow")
    assert os.path.samefile(made.path, tmp_path / "run" / "a.arrow")

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link(made.path, tmp_path / "run" / "b.arrow")
    assert not os.path.samefile(made.path, tmp_path / "run" / "b.arrow")
    shutil.rmtree(tmp_path / "cache")
    for name in ("a", "b"):
        assert TokenStore(tmp_path / "run" / f"{name}.arrow").texts([0, 1, 2]) == TEXTS


def test_hashes_of_large_files_are_remembered_until_they_change(tmp_path, monkeypatch):
    hashed: list[Path] = []
    content_hash = cache.content_hash

    def counted(value: Any) -> str:
        if isinstance(value, Path):
            hashed.append(value)
        return content_hash(value)

    monkeypatch.setattr(cache, "content_hash", counted)
    file = tmp_path / "large"
    file.write_bytes(bytes(1 << 20))
    first = file_hash(file)
    assert file_hash(file) == first == content_hash(file)
    assert len(hashed) == 2  # it has only just changed
    os.utime(file, ns=(1, time.time_ns() - 10**10))
    assert [file_hash(file) for _ in range(3)] == [first] * 3 and len(hashed) == 3
    file.write_bytes(b"\1" + bytes((1 << 20) - 1))
    assert file_hash(file) != first
    os.utime(file, ns=(1, time.time_ns() - 10**10 + 1))
    for note in cache_folder("hashes").iterdir():
        note.write_text("half a no")
    assert file_hash(file) == content_hash(file) != first


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("tokens") == tmp_path / "cache" / "tokens"
    monkeypatch.delenv("BILECT_CACHE")
    assert cache_folder("tokens") == tmp_path / "xdg" / "bilect" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("tokens") == tmp_path / "home" / ".cache" / "bilect" / "tokens"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BILECT_CACHE", str(tmp_path / "file"))
    with pytest.raises(BilectError, match=r"cannot make .*file/tokens: Not a directory; set BILECT_CACHE"):
        cache_folder("tokens")
