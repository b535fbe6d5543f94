from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from bench import __main__ as cli
from bench import results, suite, timing
from bench.cases import Baseline, Case, Timing, families, load
from bench.check import check_case, require_native
from bench.plot import plot_all
from bench.table import print_table
from dsv3.ops import registry

CPU = torch.device("cpu")
ENV = results.Environment("NVIDIA H100 80GB HBM3", "580.1", "2.13.0", "13.0", "c" * 40, "2026-11-24T00:00:00+00:00")
CEILINGS = timing.Ceilings(copy_gbs=3000.0, read_gbs=3100.0, matmul_tflops=800.0, fp8_tflops=1600.0)
DESIGN_KEYS = (
    "op case time_us flops bytes tflops gbs floor_us baselines gpu driver torch cuda commit csrc_sha date copy_fraction"
)


def row(op="rmsnorm", time_us=50.0, baselines=None):
    case = Case(op=op, case={"tokens": 4096, "hidden": 7168}, flops=4e8, bytes=120e6)
    timed = Timing(time_us, {"torch": 200.0, "torch.compile": 60.0} if baselines is None else baselines)
    return results.make_row(case, timed, ceilings=CEILINGS, env=ENV, sha="0" * 16)


# ---- cases ----
def test_cases_agree_with_their_baselines(capsys):
    assert cli.main(["all", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(family in printed for family in families())


@pytest.mark.parametrize("family", families())
def test_full_and_tiny_cases_are_the_same_list(family):
    full, tiny = load(family, tiny=False), load(family, tiny=True)
    flags = [
        [(c.op, sorted(c.case), [v for v in c.case.values() if isinstance(v, bool)]) for c in x] for x in (full, tiny)
    ]
    assert flags[0] == flags[1]
    assert len({case.title for case in full}) == len(full)
    for case, small in zip(full, tiny, strict=True):
        assert case.flops > small.flops > 0 or case.flops == small.flops == 0  # copies compute nothing
        assert case.bytes > small.bytes > 0


def test_bytes_are_those_of_the_operands():
    """The claimed minimum is what inputs and outputs hold: a case that claims more would look faster than it is."""
    gemms = [case for case in load("gemm", tiny=True) if case.op in ("fp8_gemm", "fp8_gemm_out") and not case.measure]
    norms = [case for case in load("norm", tiny=True) if case.op != "rope_"]  # which moves a part of its operand
    for case in norms + load("moe", tiny=True) + load("quant", tiny=True) + gemms:
        inputs = case.inputs(CPU)
        moved = timing.tensors(inputs) + timing.tensors(case.run(*inputs))
        assert case.bytes == sum(t.numel() * t.element_size() for t in moved), case.title


def test_a_wrong_op_is_found():
    case = load("norm", tiny=True)[0]
    wrong = dataclasses.replace(case, run=lambda *inputs: [1.01 * t for t in case.run(*inputs)])
    check_case(case, CPU, compiled=False)
    with pytest.raises(AssertionError, match="result 0 differs from torch by"):
        check_case(wrong, CPU, compiled=False)


def test_one_failing_case_does_not_stop_the_others(monkeypatch, capsys):
    ran = []

    def case(name, run):
        return Case(op=name, case={}, flops=1, bytes=1, run=run, baselines={"torch": Baseline(lambda: torch.ones(3))})

    def broken():
        raise RuntimeError("no such kernel\nand a second line")

    cases = [case("bad", broken), case("good", lambda: ran.append(1) or torch.ones(3))]
    monkeypatch.setattr(cli, "load", lambda family, tiny: cases)
    assert cli.main(["norm", "--dry-run"]) == 1
    assert "FAILED bad : RuntimeError: no such kernel\n" in capsys.readouterr().out
    assert ran == [1]


def test_an_op_on_its_reference_is_no_measurement(monkeypatch):
    monkeypatch.setattr(registry, "FALLBACKS", {("rmsnorm", "hidden 7 is odd"): 1})
    require_native("rmsnorm_backward")
    require_native("copy")
    with pytest.raises(RuntimeError, match="ran on its reference: hidden 7 is odd"):
        require_native("rmsnorm")
    monkeypatch.setitem(registry.OPS, "rope_", dataclasses.replace(registry.OPS["rope_"], native=False))
    with pytest.raises(RuntimeError, match="no native kernel"):
        require_native("rope_")


# ---- the command line ----
def test_without_a_hopper_gpu(monkeypatch, capsys):
    monkeypatch.setattr(cli, "has_hopper", lambda: False)
    for words in (["norm"], ["tests"], ["norm", "--quick"]):
        assert cli.main(words) == 2
        assert capsys.readouterr().err == "bench: no Hopper GPU here; --dry-run checks the cases on a CPU\n"


def test_without_native_code_or_a_commit(monkeypatch, capsys, tmp_path):
    """Both are said before any device time is spent."""
    monkeypatch.setattr(cli, "has_hopper", lambda: True)
    monkeypatch.setattr(registry, "NATIVE_ERROR", "dsv3 was installed without native code")
    assert cli.main(["norm"]) == 2
    assert capsys.readouterr().err == "bench: nothing to measure: dsv3 was installed without native code\n"
    monkeypatch.setattr(registry, "NATIVE_ERROR", "")
    monkeypatch.setattr(results, "_output", lambda *command, cwd=None: None)
    assert cli.main(["norm"]) == 2
    assert "name the sources with --commit" in capsys.readouterr().err


def test_an_unknown_family(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["nrom"])
    assert error.value.code == 2
    assert "got nrom" in capsys.readouterr().err


# ---- what a row holds ----
def test_row():
    got = row()
    assert sorted(got) == sorted(DESIGN_KEYS.split())
    assert got["gbs"] == 2400.0
    assert got["copy_fraction"] == 0.8
    assert got["floor_us"] == 40.0
    assert got["tflops"] == 8.0
    assert got["baselines"] == {"torch": 200.0, "torch.compile": 60.0}
    assert (got["csrc_sha"], got["gpu"]) == ("0" * 16, ENV.gpu)


def test_floor_is_the_larger_of_bytes_and_arithmetic():
    case = Case(op="x", case={}, flops=8e12, bytes=3e9)
    assert CEILINGS.floor_us(case) == 10000.0
    assert CEILINGS.floor_us(dataclasses.replace(case, flops=8e10)) == 1000.0
    assert CEILINGS.floor_us(dataclasses.replace(case, fp8=True)) == 5000.0


def test_a_family_file_is_rewritten_whole(tmp_path):
    path = tmp_path / "h100" / "norm.jsonl"
    results.write_rows(path, [row("a"), row("b"), row("c")])
    results.write_rows(path, [row("b")])
    assert [r["op"] for r in results.read_rows(path)] == ["b"]
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("Odd Card", "odd-card"),
    ],
)
def test_results_folder(name, folder):
    assert results.gpu_folder(name) == folder
    assert results.gpu_folder(name, 4) == f"{folder}-x4"


def test_table_and_plot(tmp_path):
    rows = [row(), row("rmsnorm_backward", 80.0, {"torch": 300.0})]
    console = Console(width=200, file=io.StringIO())
    print_table(console, "norm", rows)
    text = console.file.getvalue()
    assert "80.0%" in text
    assert "1.20x" in text
    assert "torch.compile 60.0" in text
    few_bytes = row() | {"floor_us": 0.0}
    results.write_rows(tmp_path / "h100" / "norm.jsonl", [row("copy", 700.0, {}), *rows, few_bytes])
    results.write_rows(tmp_path / "h100" / "decode.jsonl", [few_bytes])
    assert plot_all(tmp_path) == [tmp_path / "h100" / "norm.png"]
    assert (tmp_path / "h100" / "norm.png").read_bytes().startswith(b"\x89PNG")


def _without_a_gpu(monkeypatch, measured):
    top = [(Case(op="copy", case={"mib": 1024}, flops=0, bytes=2**31), Timing(700.0, {}))]
    monkeypatch.setattr(cli, "has_hopper", lambda: True)
    monkeypatch.setattr(registry, "NATIVE_ERROR", "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cli, "environment", lambda commit: dataclasses.replace(ENV, commit=commit))
    monkeypatch.setattr(cli, "check_case", lambda case, device, compiled: None)
    monkeypatch.setattr(cli, "require_native", lambda op: None)
    monkeypatch.setattr(cli, "measure_ceilings", lambda protocol: (CEILINGS, top))
    monkeypatch.setattr(cli, "measure_case", measured)


def test_a_run_writes_what_succeeded(monkeypatch, tmp_path, capsys):
    """The loop around the measurements, with the measurements replaced: one case fails, one peer fails."""

    def measured(case, ceilings, protocol):
        if case.op == "rope_":
            raise RuntimeError("out of luck")
        errors = ["F.rms_norm: too old"] if case.op == "rmsnorm_backward" and not case.case["residual"] else []
        return Timing(50.0, {"torch": 60.0}, errors=errors)

    _without_a_gpu(monkeypatch, measured)
    assert cli.main(["norm", "--out", str(tmp_path), "--commit", "abc"]) == 1
    rows = results.read_rows(tmp_path / "norm.jsonl")
    assert [r["op"] for r in rows] == ["copy", *(c.op for c in load("norm", tiny=False) if c.op != "rope_")]
    assert {r["csrc_sha"] for r in rows} == {results.csrc_sha("norm")}
    assert {r["commit"] for r in rows} == {"abc"}
    printed = capsys.readouterr().out
    assert "RuntimeError: out of luck" in printed
    assert "F.rms_norm: too old" in printed


def test_a_run_that_is_stopped_writes_what_it_has(monkeypatch, tmp_path, capsys):
    done = []

    def measured(case, ceilings, protocol):
        if len(done) == 3:
            signal.raise_signal(signal.SIGTERM)
        done.append(case.op)
        return Timing(50.0, {})

    before = signal.getsignal(signal.SIGTERM)
    try:
        _without_a_gpu(monkeypatch, measured)
        for _ in range(2):  # the second is stopped at once, and takes nothing away
            assert cli.main(["norm", "quant", "--out", str(tmp_path), "--commit", "abc"]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [r["op"] for r in results.read_rows(tmp_path / "norm.jsonl")] == ["copy", *done]
    assert not (tmp_path / "quant.jsonl").exists()
    assert "stopped, as 3 cases of norm were measured" in " ".join(capsys.readouterr().out.split())


# ---- csrc_sha ----
FILES = {
    "csrc/common/vector.cuh": b"a",
    "csrc/common-x/vector.cuh": b"not common",
    "csrc/common/deep/er.h": b"\x00\xff binary",
    "csrc/norm/rmsnorm.cu": b"kernel",
    "csrc/norm/a b.cu": b"",
    "csrc/norm/README.md": b"prose",
    "csrc/loss/x.cu": b"other family",
    "csrc/ops.h": b"table",
    "python/dsv3/ops/norm.py": b"python",
    "README.md": b"top",
}


@pytest.fixture
def tree(tmp_path):
    """A git checkout with FILES, and one untracked file."""
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    (tmp_path / "csrc/norm/untracked.cu").write_bytes(b"work in progress")
    return tmp_path


def expected_sha(paths):
    """Design section 8, written down once more."""
    stream = b"".join(path.encode() + bytes(1) + FILES[path] + bytes(1) for path in paths)
    return hashlib.sha256(stream).hexdigest()[:16]


def test_csrc_sha(tree):
    norm = ["csrc/common/deep/er.h", "csrc/common/vector.cuh", "csrc/norm/a b.cu", "csrc/norm/rmsnorm.cu"]
    assert results.csrc_sha("norm", tree) == expected_sha(norm)
    model = [path for path in sorted(FILES) if path.startswith(("csrc/", "python/dsv3/")) and not path.endswith(".md")]
    assert results.csrc_sha("model", tree) == expected_sha(model)


def test_csrc_sha_in_the_shell(tree):
    """The same by git, sort and sha256sum: no Python of ours in it."""
    script = r"""git ls-files csrc/common csrc/hopper csrc/norm | grep -v '\.md$' | LC_ALL=C sort | while IFS= read -r path; do
        printf '%s\0' "$path"; cat "$path"; printf '\0'; done | sha256sum | cut -c1-16"""
    shell = subprocess.run(["bash", "-c", script], cwd=tree, check=True, capture_output=True, text=True).stdout.strip()
    assert results.csrc_sha("norm", tree) == shell


def test_csrc_sha_changes_with_its_own_family_only(tree):
    before = {family: results.csrc_sha(family, tree) for family in ("norm", "loss", "model")}

    def changed(path):
        (tree / path).write_bytes(b"changed")
        after = {family for family in before if results.csrc_sha(family, tree) != before[family]}
        (tree / path).write_bytes(FILES[path])
        return after

    assert changed("csrc/norm/rmsnorm.cu") == {"norm", "model"}
    assert changed("csrc/common/vector.cuh") == {"norm", "loss", "model"}
    assert changed("python/dsv3/ops/norm.py") == {"model"}
    assert changed("csrc/norm/README.md") == set()


def test_csrc_sha_without_git(tree):
    """A tree sent to a GPU machine without its .git counts every file but build products."""
    (tree / "csrc/norm/untracked.cu").unlink()
    before = results.csrc_sha("norm", tree)
    shutil.rmtree(tree / ".git")
    (tree / "csrc/norm/_C.so").write_bytes(b"binary")
    assert results.csrc_sha("norm", tree) == before
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)  # a repository that knows no file
    assert results.csrc_sha("norm", tree) == before


def test_csrc_sha_of_a_copy_with_an_older_index(tree):
    """--commit names a tree that was sent elsewhere; git there may know only the files of an earlier commit."""
    (tree / "csrc/norm/untracked.cu").unlink()
    expected = results.csrc_sha("norm", tree)
    subprocess.run(["git", "rm", "-q", "--cached", "csrc/norm/rmsnorm.cu"], cwd=tree, check=True)
    assert results.csrc_sha("norm", tree) != expected
    assert results.csrc_sha("norm", tree, copied=True) == expected


# ---- counts of a test run ----
TESTS = {
    "tests/ops/test_norm.py": "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip()\n",
    "tests/ops/test_rope.py": "import pytest\n@pytest.fixture\ndef bad(): 1 / 0\ndef test_a(bad): pass\ndef test_b(): pass\n",
    "tests/train/test_norm.py": "def test_a(): pass\n",
    "tests/comm/test_buffer.py": "def test_a(): pass\n",
    "tests/ops/test_moe.py": "import nothing_of_this_name\n",
}


@pytest.fixture
def small_tests(tmp_path):
    (tmp_path / "csrc/norm").mkdir(parents=True)
    (tmp_path / "csrc/norm/rope.cu").touch()
    for path, text in TESTS.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_families_of_test_files(small_tests):
    family = {path: suite.family_of(path, small_tests) for path in TESTS}
    assert list(family.values()) == ["norm", "norm", "model", "comm", "moe"]
    assert suite.files_of(["norm"], small_tests) == ["tests/ops/test_norm.py", "tests/ops/test_rope.py"]
    assert suite.files_of([], small_tests) == sorted(TESTS)


def test_every_ops_test_has_a_family():
    """tests/ops of this repository belongs to folders of csrc or to files in them."""
    files = suite.files_of(list(suite.FAMILIES))
    assert {"tests/ops/test_norm.py", "tests/ops/test_rope.py", "tests/ops/test_swiglu.py"} <= set(files)


@pytest.mark.parametrize("options", [[], ["-n2", "--dist=loadfile", "--no-loadscope-reorder"]], ids=["alone", "xdist"])
def test_counts_of_a_run(small_tests, options):
    script = f"""
import json, pytest
from pathlib import Path
from bench.suite import Tally
tally = Tally(Path({str(small_tests)!r}))
code = pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", {str(small_tests)!r},
                    "--continue-on-collection-errors", *{options}, {str(small_tests / "tests")!r}], plugins=[tally])
print(json.dumps(tally.counts))
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=results.ROOT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "norm": {"passed": 2, "failed": 2, "skipped": 1},
        "model": {"passed": 1},
        "comm": {"passed": 1},
        "moe": {"failed": 1},
    }


@pytest.mark.parametrize(
    ("codes", "expected", "recorded"),
    [
        ((0, 0), 0, True),
        ((1, 0), 1, True),
        ((0, 1), 1, True),
        ((0, 5), 0, True),
        ((5, 5), 5, True),
        ((2,), 2, False),
        ((0, 2), 2, False),
    ],
)
def test_both_parts_of_a_run_count_unless_it_is_interrupted(monkeypatch, tmp_path, codes, expected, recorded):
    """pytest's codes: 1 failures, 2 interrupted, 5 no tests."""
    left = list(codes)
    monkeypatch.setattr(suite.pytest, "main", lambda arguments, plugins: left.pop(0))
    assert suite.run_tests(["norm"], tmp_path, ENV) == expected
    assert left == []
    assert (tmp_path / "tests.json").is_file() == recorded


@pytest.mark.parametrize(
    ("words", "said"), [(["plot", "comm"], "got comm"), (["plot", "--out", "nowhere"], "is no folder")]
)
def test_plot_says_what_it_cannot_draw(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_workers_of_a_run(monkeypatch):
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: object())
    for cores, workers in ((1, []), (2, []), (3, ["-n", "2"]), (16, ["-n", "12"]), (128, ["-n", "12"]), (None, [])):
        monkeypatch.setattr(suite.os, "cpu_count", lambda cores=cores: cores)
        assert suite.parallel()[:2] == workers
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    assert suite.parallel() == []


def test_record_keeps_other_families(tmp_path):
    path = tmp_path / "h100" / "tests.json"
    suite.record(
        path,
        {"norm": {"passed": 5, "failed": 1, "skipped": 0}, "loss": {"passed": 1, "failed": 0, "skipped": 0}},
        ENV,
        9.0,
    )
    suite.record(path, {"norm": {"passed": 6, "failed": 0, "skipped": 0}}, ENV, 61.04)
    known = json.loads(path.read_text())
    assert known["loss"]["passed"] == 1
    assert known["norm"] == {
        "commit": ENV.commit, "csrc_sha": results.csrc_sha("norm"), "passed": 6, "failed": 0, "skipped": 0,
        "seconds": 61.0, "gpu": ENV.gpu, "torch": ENV.torch, "date": ENV.date,
    }  # fmt: skip


# ---- a run ----
@pytest.mark.cuda
def test_a_quick_run_measures_natively(tmp_path):
    out = tmp_path / "h"
    assert cli.main(["norm", "--quick", "--out", str(out), "--commit", ENV.commit]) == 0
    rows = results.read_rows(out / "norm.jsonl")
    assert [r["op"] for r in rows[:6]] == ["copy", "read", "matmul", "matmul", "matmul_fp8", "matmul_fp8"]
    assert len(rows) == 6 + len(load("norm", tiny=False))
    # Twice what any card can do: the floors of this run are no measure where other tests use the GPU beside it.
    assert all(r["gbs"] < 10_000 and r["tflops"] < 4000 for r in rows)
