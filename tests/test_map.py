"""tests/README.md names tests and recorded runs that exist; what nothing proves is open."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
MAP = (TESTS / "README.md").read_text()
SECTIONS = [
    "The two commands", "The model", "Checkpoints", "Training", "Expert parallelism", "The FP8 stack", "Attention on Hopper",
    "The native path", "Bad input", "Done when",
]  # fmt: skip


def test_every_test_of_the_map_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::([\w, ]+)`", MAP)
    assert len(named) > 80
    assert len(named) == MAP.count(".py::"), "an entry that this test does not understand"
    missing = []
    for path, names in named:
        tree = ast.parse((TESTS / path).read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        missing += [f"{path}::test_{name}" for name in names.split(", ") if f"test_{name}" not in defined]
    assert missing == []


def test_every_section_of_the_issue_is_there() -> None:
    assert re.findall(r"^## (.+)", MAP, re.M) == SECTIONS
    rows = [line for line in MAP.splitlines() if re.match(r"\| (?!---|sentence|input)", line)]
    assert len(rows) > 70
    for row in rows:
        assert len(re.findall(r"(?<!\\) \|", row)) == 2, row
        proof = row.split(" | ", 1)[1]
        assert ".py::" in proof or "**open**" in proof or ".ci/run" in proof or "by construction" in proof, row


def test_a_recorded_run_is_there() -> None:
    checked = 0
    for row in MAP.splitlines():
        folder = ""
        for named, names in re.findall(r"`(bench/results/[\w-]+/)?(\{[\w,]+\}\.\w+|\w+\.jsonl?|README\.md)`", row):
            if not named and not (folder and row.startswith("| ")):
                continue
            folder = named or folder  # in a table a bare name is in the folder that was named before
            stem, suffix = names.rsplit(".", 1)
            for name in stem.strip("{}").split(","):
                assert (TESTS.parent / folder / f"{name}.{suffix}").is_file(), row
                checked += 1
    assert checked > 30
