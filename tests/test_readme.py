"""The README: its length, what it points to, and that its example for framework authors runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_length_and_what_it_points_to():
    assert 50 < len(TEXT.splitlines()) <= 200
    assert re.findall(r"@[A-Z]+@", TEXT) == []
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT)
    assert len(pictures) >= 2, "the loss curve and the expert load that the demo makes"
    for path in pictures:
        assert (ROOT / path).read_bytes().startswith(b"\x89PNG"), path
    for path in re.findall(r"`((?:bench|csrc|tests|python)/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path


def test_two_ops_under_torch_compile():
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "torch.compile" in block)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    assert "fullgraph=True" in example
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["y"].isfinite().all()
    assert names["norm_weight"].grad.abs().sum() > 0
    assert names["x_fp8"].dtype.itemsize == 1


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", TEXT, re.M))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
