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


def example_with(word):
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if word in block)
    return example


def test_two_ops_under_torch_compile():
    example = example_with("torch.compile")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    assert "fullgraph=True" in example
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["y"].isfinite().all()
    assert names["norm_weight"].grad.abs().sum() > 0
    assert names["x_fp8"].dtype.itemsize == 1


def test_a_decoding_step():
    names: dict = {}
    for word in ("torch.compile", "mla_decode"):  # the second goes on from the first
        exec(compile(example_with(word), "README.md", "exec"), names)
    assert names["out"].shape == (2, 1, 16, 512)
    assert names["lse"].isfinite().all()
    assert names["cache"].view(-1, 576).any(-1).nonzero().flatten().tolist() == [69, 132]


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", TEXT, re.M))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
