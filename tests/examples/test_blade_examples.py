"""Every example runs, and does what it says."""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    selector = load("blade_plain_loop")(45)
    assert selector.synchronisations == 2 and selector.steps == 45
    assert "Delta > 0" in capsys.readouterr().out


def test_trainer(tmp_path: Path) -> None:
    trainer = load("blade_trainer")(12, str(tmp_path))
    assert trainer.selector.synchronisations >= 1 and trainer.state.global_step == 12
    assert (tmp_path / "checkpoint-12" / "selector-0.pt").is_file()


def test_lora(capsys: pytest.CaptureFixture[str]) -> None:
    selector = load("blade_lora")(12)
    assert (
        selector.synchronisations == 1
        and set(selector.reference.own) < dict(selector.reference.forward.base.named_parameters()).keys()
    )
    assert "weights of its own" in capsys.readouterr().out


def test_torchrun_on_two_processes() -> None:
    """Started as torchrun starts it, without its own processes in between."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}  # fmt: skip
        command = [sys.executable, str(EXAMPLES / "blade_torchrun.py"), "--steps", "10", "--fsdp"]
        processes.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE))
    try:
        out = [p.communicate(timeout=200)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0]
    assert "loss of the last step" in out[0]
