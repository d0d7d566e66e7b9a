"""What people's machines, disks and terminals are like: locks, unwritable folders, labels, runs that are repeated."""

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from bilect.cli.commands import main
from bilect.config import parse_config
from bilect.errors import BilectError, explain
from bilect.models.loading import train_tokenizer
from bilect.pipeline.stages import run
from bilect.runtime.interrupts import Interrupted, ends_promptly
from bilect.runtime.locks import locked
from bilect.runtime.progress import RichProgress
from bilect.runtime.terminal import PlainConsole, any_terminal, printable
from bilect.runtime.workers import cores
from tests.corpus import tiny_settings, write_corpus, write_jsonl
from tests.killing import in_fork

LABELS = ("[/maths]", "[red]sun[/red] :smile: \x1b[2J")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, its config and its corpus, whose labels are no friends of a terminal."""
    folder = tmp_path_factory.mktemp("machines")
    write_corpus(folder / "corpus", pool=120)
    pool = folder / "corpus" / "pool.jsonl"
    records = [json.loads(line) for line in pool.read_text().splitlines()]
    write_jsonl(pool, [{**r, "source": LABELS[r["source"] == "weather"]} for r in records])
    settings = tiny_settings(folder / "corpus", controls=["random"])
    for part in (*settings["warmup"].values(), settings["training"], settings["fit"]):
        part["steps"] = 4
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    run(parse_config(settings), folder / "run")
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A run of one's own to break."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def settings_of(finished, **changes):
    return {**yaml.safe_load((finished / "config.yaml").read_text()), **changes}


def said_by(monkeypatch, capsys, *words):
    """Exit code, and what a command says on standard error, where a traceback would be too."""
    monkeypatch.setattr(sys, "argv", ["bilect", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "300")
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def contents(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock")}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- locks


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def no_locks(request, monkeypatch):
    """A file system as Lustre without -o flock; ENOSYS is also what there is without the module fcntl."""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_a_file_stands_for_a_lock_where_there_is_none(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "r"):
            soft = tmp_path / "r" / ".lock.soft"
            with pytest.raises(BilectError) as caught, locked(tmp_path / "r"):
                pass
            assert str(caught.value).startswith(f"run: {tmp_path / 'r'} is in use by process {os.getpid()} on ")
            assert str(caught.value).endswith(f"if that process is no more, delete {soft}")
        assert not soft.exists()


@pytest.mark.usefixtures("no_locks")
def test_a_killed_holder_on_this_machine_is_found_dead_and_one_elsewhere_is_named(tmp_path):
    def die():
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(die) == -signal.SIGKILL
    assert (tmp_path / ".lock.soft").is_file()
    with locked(tmp_path):
        pass
    (tmp_path / ".lock.soft").write_text("123\nanother-machine\n")
    (tmp_path / ".lock.holder").write_text("123 on another-machine")
    with (
        pytest.raises(BilectError, match=r"process 123 on another-machine; .*delete .*/\.lock\.soft$"),
        locked(tmp_path),
    ):
        pass


def test_nothing_needs_a_module_that_windows_lacks():
    source = Path(main.__globals__["__file__"]).parents[1]
    found = [p.name for p in source.rglob("*.py") if re.search(r"^import (fcntl|resource)$", p.read_text(), re.M)]
    assert found == []


# ------------------------------------------------------------------------------------------ folders that are no folders


def unwritable(kind, folder, monkeypatch):
    """A path that cannot be made, and what is to be said of it."""
    if kind == "a file":
        (folder / "taken").write_text("mine")
        return folder / "taken", "taken"
    if kind == "below a file":
        (folder / "taken").write_text("mine")
        return folder / "taken" / "deep" / "r", "taken"
    if kind == "too long":
        return folder / ("n" * 300), "too long"
    number = errno.EROFS if kind == "read-only" else errno.EACCES
    make = os.mkdir

    def refuse(path, *more, **options):
        if str(path).startswith(str(folder / "ro")):
            raise OSError(number, os.strerror(number), str(path))
        return make(path, *more, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    return folder / "ro" / "r", "read-only" if kind == "read-only" else "ermission"


def command_lines(finished, out):
    config, data = finished / "config.yaml", finished / "corpus" / "heldout.jsonl"
    return {
        "run": ["run", config, "--out", out],
        "fit": ["fit", config, "--out", out],
        "compare": ["compare", config, "--out", out],
        "verify": ["verify", "--quick", "--out", out],
        "retrain": ["verify", "--retrain", config, "--out", out],
        "demo": ["demo", "--out", out],
        "score": ["score", finished / "run", "--data", data, "--out", out],
        "select": ["select", finished / "run", "--keep", "0.5", "--out", out],
        "init": ["init", out / "config.yaml"],
        "report": ["report", out],
    }


COMMANDS = ("run", "fit", "compare", "verify", "retrain", "demo", "score", "select", "init", "report")


@pytest.mark.parametrize("kind", ["a file", "below a file", "too long", "read-only", "no permission"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_written_is_one_line(command, kind, finished, tmp_path, monkeypatch, capsys):
    out, word = unwritable(kind, tmp_path, monkeypatch)
    code, _, error = said_by(monkeypatch, capsys, *command_lines(finished, out)[command])
    assert code == 2, error
    if "Usage:" in error:  # typer's own, before anything
        assert "is a file" in error
        return
    lines = error.splitlines()
    assert len(lines) == 1 and lines[0].startswith("bilect: "), error
    assert word in error.lower() or command == "report"
    assert not (tmp_path / "taken").exists() or (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EROFS, "read-only"), (errno.ENAMETOOLONG, "too long"), (errno.ENOTDIR, "no folder"), (errno.EIO, "failed"),
     (errno.ESTALE, "network"), (errno.EMFILE, "ulimit"), (errno.EISDIR, "folder"), (errno.EDQUOT, "no space")],
)  # fmt: skip
def test_an_error_of_the_disk_is_one_line_wherever_it_is_met(number, words):
    error = RuntimeError("some library failed")
    error.__cause__ = OSError(number, os.strerror(number), "/data/" + "x" * 400)
    said = explain(error)
    assert said is not None and words in said and "/data/xx" in said and "\n" not in said


def test_no_folder_for_temporary_files(monkeypatch):
    monkeypatch.setattr(tempfile, "_get_default_tempdir", lambda: (_ for _ in ()).throw(
        FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']")))  # fmt: skip
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.mkdtemp()
    assert "TMPDIR" in (explain(caught.value) or "")


# ------------------------------------------------------------------------------------------------------------ terminals

HOSTILE = "[/nope] [bold]x[/] [link=file:///etc]y[/link] :smile: \x1b[2J\x1b]0;title\x07\x9b1m \u202egnp.exe"
SHOWN = "[/nope] [bold]x[/] [link=file:///etc]y[/link] :smile: \\x1b[2J\\x1b]0;title\\x07\\x9b1m \\u202egnp.exe"


def test_whatever_comes_from_data_is_printed_as_it_is(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    with RichProgress() as progress:
        with progress.task(HOSTILE, total=1) as task:
            task.advance(1, loss=1.0)
        progress.note(HOSTILE)
        table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
        table.add_row(HOSTILE)
        progress.console.print(table)
    shown = capsys.readouterr().out
    assert shown.count(SHOWN) == 7  # started, done, noted, and four in the table
    assert "\x1b" not in shown and "\x07" not in shown


def test_the_bar_of_a_live_terminal_prints_it_too(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "300")
    with RichProgress() as progress, progress.task(HOSTILE, total=2) as task:
        task.advance(1)
        progress.bars.refresh()
    shown = capsys.readouterr().out
    assert "\x1b" in shown  # live
    assert SHOWN in shown and "\x1b[2J" not in shown and "\x1b]0;" not in shown


@given(st.text(max_size=40))
def test_no_text_commands_a_terminal(text):
    shown = printable(text)
    assert all(c in "\t\n" or c.isprintable() or c.isspace() or ord(c) > 0xFF for c in shown)
    assert not any(c in shown for c in "\x1b\x07\x9b\r\u202e")
    console = PlainConsole()
    with console.capture() as capture:
        console.print(text)
    assert capture.get() == shown + "\n"


def test_the_table_of_a_selection_shows_labels_as_they_are(finished, monkeypatch, capsys, tmp_path):
    code, shown, error = said_by(
        monkeypatch, capsys, "select", finished / "run", "--keep", "0.5", "--out", tmp_path / "[b]out[/i]"
    )
    assert code == 0, error
    assert LABELS[0] in shown and "[red]sun[/red] :smile: \\x1b[2J" in shown and f"{tmp_path}/[b]out[/i]" in shown
    assert "\x1b" not in shown


def test_a_message_about_data_does_not_command_the_terminal(monkeypatch, capsys, tmp_path):
    code, _, error = said_by(monkeypatch, capsys, "run", tmp_path / "[red]\x1b[2Jno.yaml", "--out", tmp_path / "r")
    assert code == 2 and "[red]\\x1b[2Jno.yaml" in error and "\x1b" not in error


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_unicode(encoding, tmp_path, monkeypatch):
    file = tmp_path / "out"
    with file.open("w", encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        any_terminal()
        table = Table("a")
        table.add_row("0.1 ± 0.2 …")
        PlainConsole().print(table, "\udcff")
    assert b"0.1 " in file.read_bytes() and b"\\udcff" in file.read_bytes()


# -------------------------------------------------------------------------------------------- a finished run, once more


def test_the_same_content_under_another_path_repeats_nothing(finished, copy, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere"
    shutil.copytree(finished / "corpus", moved)
    before = contents(copy)
    monkeypatch.chdir(moved)
    for path in (str(moved), "../elsewhere", "."):
        data = settings_of(finished)["data"]
        for role in ("lower_data", "upper_data", "heldout_data"):
            data[role] = [{"path": f"{path}/{Path(data[role][0]['path']).name}"}]
        run(parse_config(settings_of(finished, data=data)), copy)
    after = contents(copy)
    assert {n for n in after if before.get(n) != after[n]} <= {"run.json", "config.yaml", "summary.json", "report.html"}


def test_what_has_changed_is_said_and_nothing_is_replaced(finished, copy, tmp_path):
    shutil.copytree(finished / "corpus", tmp_path / "corpus")
    data = json.loads(json.dumps(settings_of(finished)["data"]).replace(str(finished), str(tmp_path)))
    run(parse_config(settings_of(finished, data=data)), copy)  # only moved
    with (tmp_path / "corpus" / "pool.jsonl").open("a") as file:
        file.write(json.dumps({"id": "new", "text": "one more", "source": LABELS[0]}) + "\n")
    before = contents(copy)
    grown = settings_of(finished, data=data, selection={"keep_ratio": 0.3})
    with pytest.raises(BilectError) as caught:
        run(parse_config(grown), copy)
    said = str(caught.value)
    assert f"{copy} holds a finished run, and data.lower_data: {tmp_path}/corpus/pool.jsonl has changed; " in said
    assert "selection.keep_ratio 0.2 -> 0.3" in said and "tokenise pool, tokenise held-out" in said
    assert said.endswith("say --yes, or choose another --out") and "\n" not in said
    assert contents(copy) == before
    run(parse_config(grown), copy, repeat=True)
    documents = [json.loads((f / "run.json").read_text())["stages"]["tokenise pool"]["documents"]
                 for f in (finished / "run", copy)]  # fmt: skip
    assert documents[1] == documents[0] + 1
    run(parse_config(grown), copy)  # done, and nothing to say


def test_only_what_a_setting_touches_would_be_repeated(finished, copy):
    with pytest.raises(BilectError) as caught:
        run(parse_config(settings_of(finished, selection={"top_k": 9})), copy)
    said = str(caught.value)
    assert "selection.keep_ratio 0.2 -> none; selection.top_k none -> 9" in said
    assert "tokenise" not in said and "fit" not in said and "round 1: select" in said
    run(parse_config(settings_of(finished, device="auto", score_batch_tokens=4096)), copy)  # nothing depends on these


def test_a_model_is_known_by_its_files(finished, copy, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(copy / "warmup" / "proxy", tmp_path / name)
    short = settings_of(finished, models={**settings_of(finished)["models"], "proxy": str(tmp_path / "a")})
    run(parse_config(short), copy, repeat=True)
    short["models"]["proxy"] = str(tmp_path / "b")
    run(parse_config(short), copy)
    weights = tmp_path / "b" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(BilectError, match=r"models\.proxy\.model\.safetensors .* -> .*warm up proxy"):
        run(parse_config(short), copy)


def test_an_unfinished_run_goes_on_as_before(finished, copy):
    manifest = json.loads((copy / "run.json").read_text())
    del manifest["finished"]
    (copy / "run.json").write_text(json.dumps(manifest))
    run(parse_config(settings_of(finished, selection={"top_k": 9})), copy)
    assert "finished" in json.loads((copy / "run.json").read_text())


# --------------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_an_exception_while_python_listens(number):
    def work():
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        with pytest.raises(Interrupted) as caught, ends_promptly("late"):
            time.sleep(30)
        assert caught.value.code == 128 + number
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    assert in_fork(work) == 0


def test_ctrl_c_ends_the_training_of_a_tokenizer_within_two_seconds(tmp_path):
    start, line = tmp_path / "start", "bilect: interrupted; the same command goes on from here"

    def work():
        os.dup2(os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT), 2)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

        def interrupt():
            time.sleep(0.5)
            start.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGINT)

        letters = "abcdefghijklmnopqrstuvwxyz"
        text = [
            "".join(random.Random(0).choices(letters, k=3_000_000))
        ]  # a word that keeps the trainer busy for minutes
        with ends_promptly(line):
            threading.Thread(target=interrupt, daemon=True).start()
            try:
                train_tokenizer(text, 60_000)
            except Interrupted:  # as the command line does
                os.write(2, (line + "\n").encode())
                os._exit(130)

    assert in_fork(work) == 130
    assert time.time() - float(start.read_text()) < 4  # two, and the load of the machine
    assert (tmp_path / "said").read_text() == line + "\n"


def test_an_ignored_interrupt_stays_ignored():
    def work():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
        with ends_promptly("late"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    assert in_fork(work) == 0


def test_the_command_says_how_to_go_on(monkeypatch, finished, capsys, tmp_path):
    def work():
        os.dup2(os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT), 2)
        monkeypatch.setattr(sys, "stderr", os.fdopen(2, "w"))
        monkeypatch.setattr(sys, "argv", ["bilect", "run", str(finished / "config.yaml"), "--out", str(tmp_path / "r")])
        monkeypatch.setattr("bilect.pipeline.texts.tokenise_pool", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        main()

    assert in_fork(work) == 130
    assert (tmp_path / "said").read_text() == "bilect: interrupted; the same command goes on from here\n"


# ----------------------------------------------------------------------------------------------------------- containers


def test_cores_are_those_that_the_container_allows(tmp_path):
    bound = len(os.sched_getaffinity(0))
    assert cores(tmp_path) == bound
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores(tmp_path) == bound
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cores(tmp_path) == 1
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for quota, expected in (("-1", bound), ("150000", min(bound, 2)), ("10", 1)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
        assert cores(tmp_path) == expected
