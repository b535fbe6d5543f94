"""A run killed with SIGKILL at 50 random moments, also while saving, resumes from the last complete checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from bench.results import ROOT
from tests.train.test_data_parallel import rows
from tests.train.test_resume import tensors


def test_killed_at_fifty_random_moments(token_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.train.kill_worker", str(token_folder), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert counts["kills"] == 50
    assert counts["while_saving"] >= 3
    assert counts["resumed"] >= 10
    expected = rows(tmp_path / "whole")
    final = tensors(tmp_path / "whole")
    for number in range(counts["rounds"]):
        folder = tmp_path / f"killed-{number}"
        found = rows(folder)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        assert [row["loss"] for row in found] == [row["loss"] for row in expected]
        assert [row["grad_norm"] for row in found] == [row["grad_norm"] for row in expected]
        state = tensors(folder)
        assert state.keys() == final.keys()
        assert all(torch.equal(state[name], final[name]) for name in final)
        assert not list(folder.glob(".*"))
