"""The script for a GPU: a part that fails, or ends without figures, shows in its table and in its exit code.

That its lines are right is seen in .ci/run, which carries out all of it at toy sizes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
PYTHON = """#!/bin/sh
case "$1" in
  benchmarks/*) {benchmark} ;;
  -m) echo "3 passed in 0.1s" ;;
  *) exec {python} "$@" ;;
esac
"""


@pytest.mark.parametrize(
    ("benchmark", "failed"),
    [
        ("echo '{\"time_ratio\": 0.5}'", {}),
        ('case "$1" in *scoring.py) echo broken >&2; exit 3 ;; *) echo "{}" ;; esac', {"scores, tiny-100k": 3}),
        ('case "$1" in *hot_path.py) echo no figures ;; *) echo "{}" ;; esac', {"waits and launches": 1}),
    ],
)
def test_a_failed_part_does_not_hide(tmp_path, benchmark, failed):
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("{benchmark}", benchmark).replace("{python}", sys.executable))
    python.chmod(0o755)
    given = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": str(python)}
    done = subprocess.run([SCRIPT, "--toy"], env=given, capture_output=True, text=True, check=False)
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {r["part"]: r["rc"] for r in results if r["rc"]} == failed
    assert len(results) == 7 and done.returncode == (1 if failed else 0), done.stdout + done.stderr
    table = (tmp_path / "out" / "table.txt").read_text()
    assert f"{7 - len(failed)} of 7 parts are well" in table and table.count("FAILED") == len(failed)
    assert {r["part"]: r for r in results}["tests"]["figures"] == {"passed": 3}


def test_another_option_is_refused():
    done = subprocess.run([SCRIPT, "--small"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage:")
