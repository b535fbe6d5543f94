"""bench.sanitize: what is made of compute-sanitizer's reports, and that every kernel can be called under it."""

from __future__ import annotations

import json
import subprocess

import pytest
from rich.console import Console

from bench import results, sanitize

ENV = results.Environment("NVIDIA H200", "580.1", "2.13.0", "13.0", "c" * 40, "2026-11-30T00:00:00+00:00")
RACES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void dsv3::load_codes<dsv3::Fp8Config<(int)16, (int)1>>(void *, const unsigned char *)+0x10 in decode_fp8.cuh:81
=========     and Read access at dsv3::load_matrices(unsigned int (&)[4], unsigned int)+0x20 in register_product.cuh:74 [32 hazards]
=========     and Read access at dsv3::load_matrices(unsigned int (&)[4], unsigned int)+0x90 in register_product.cuh:74 [8 hazards]
=========
========= Error: Race reported between Read access at dsv3::Attender::run()+0x910 in prefill_attend.cuh:29
=========     and Write access at dsv3::Loader::give_queries(const dsv3::QueryTile &)+0xcc60 in prefill.cuh:212 [2 hazards]
=========
"""  # noqa: E501
STRANGE = """========= Error: Race reported between Write access at dsv3::somewhere(int)+0x10 in a.cuh:8
=========     and Write access at dsv3::elsewhere(int)+0x20 in a.cuh:9 [3 hazards]
=========
"""
DIVERGENT = """========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at dsv3::named_sync(int, int)+0x62e0 in warpgroup.cuh:16
=========     by thread (128,0,0) in block (0,0,0)
=========
========= Barrier error detected. Divergent thread(s) in block.
=========     at dsv3::named_sync(int, int)+0x62e0 in warpgroup.cuh:16
=========     by thread (129,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""


def total(hazards: int) -> str:
    return f"========= RACECHECK SUMMARY: {hazards} hazards displayed ({hazards} errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("dsv3::Consumer<dsv3::DecodeConfig<(int)1>, (int)0>::give(const dsv3::Softened &)", "Consumer::give"),
        ("void dsv3::load_codes<dsv3::Fp8Config<(int)16, (int)1>>(void *, unsigned long)", "load_codes"),
        ("cute::SM90_BULK_COPY_G2S::copy(const void *, void *, int)", "SM90_BULK_COPY_G2S::copy"),
        ("__half2::operator =(const __half2&)", "__half2::operator="),
        ("dsv3::<unnamed>::Attention<(int)16>::row_of(int) const", "Attention::row_of"),
        ("void dsv3::<unnamed>::few_attention_kernel<(int)32>(dsv3::<unnamed>::Params)", "few_attention_kernel"),
    ],
)
def test_names_of_functions(written, name):
    assert sanitize.function_name(written) == name


def test_hazards_that_a_barrier_orders():
    found = sanitize.summarize(RACES + total(2), "attention")
    assert found["errors"] == 0
    assert "reports" not in found
    assert list(found["hazards"]) == ["Attender::run and Loader::give_queries", "load_codes and load_matrices"]
    assert found["hazards"]["load_codes and load_matrices"] == f"40, ordered by {sanitize.RING}"


def test_a_hazard_of_no_known_order_is_an_error():
    found = sanitize.summarize(RACES + STRANGE + total(3), "attention")
    assert found["errors"] == 3
    assert found["reports"] == {"elsewhere and somewhere": 3}
    assert len(found["hazards"]) == 2


def test_reports_count_once_a_place():
    found = sanitize.summarize(DIVERGENT, "attention")
    place = (
        "Barrier error detected. Divergent thread(s) in block. | at dsv3::named_sync(int, int)+* in warpgroup.cuh:16"
    )
    assert found == {"errors": 2, "reports": {place: 2}}


def test_what_is_not_understood_is_an_error():
    assert sanitize.summarize("========= ERROR SUMMARY: 5 errors\n", "norm")["errors"] == 5
    assert sanitize.summarize("========= ERROR SUMMARY: 0 errors\n", "norm") == {"errors": 0}
    assert sanitize.summarize("Segmentation fault\n", "norm")["errors"] is None
    assert sanitize.summarize(RACES + total(4), "attention")["errors"] == 2  # two reports more than were found
    unread = "========= Error: Race reported in a new way\n=========     somewhere\n"
    assert sanitize.summarize(RACES + unread + total(3), "attention")["errors"] == 1


def test_a_single_hazard_and_a_warning_count():
    one = STRANGE.replace("[3 hazards]", "[1 hazard]").replace("Error", "Warning")
    assert sanitize.summarize(RACES + one + total(3), "attention")["reports"] == {"elsewhere and somewhere": 1}


def test_the_order_of_one_family_is_not_that_of_another():
    found = sanitize.summarize(RACES + total(2), "gemm")
    assert found["errors"] == 42
    assert "hazards" not in found


def process(output: str, code: int):
    return lambda *args, **kwargs: subprocess.CompletedProcess(args, code, stdout=output)


def test_a_process_that_fails_is_no_success(monkeypatch):
    monkeypatch.setattr(subprocess, "run", process("ValueError: no\n========= ERROR SUMMARY: 0 errors\n", 1))
    found = sanitize.run("memcheck", "norm")
    assert found["errors"] is None
    assert "ValueError: no" in found["output"]

    def slow(*args, **kwargs):
        raise subprocess.TimeoutExpired("compute-sanitizer", kwargs["timeout"])

    monkeypatch.setattr(subprocess, "run", slow)
    assert sanitize.run("memcheck", "norm") == {"errors": None, "output": "not done after 600 s"}


@pytest.mark.parametrize(("output", "code"), [(RACES + total(2), 0), (RACES + STRANGE + total(3), 1), ("", 1)])
def test_record_of_a_run(tmp_path, monkeypatch, output, code):
    (tmp_path / "sanitizer.json").write_text('{"loss": {"commit": "before"}}')
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: name)
    monkeypatch.setattr(sanitize, "run", lambda tool, family: sanitize.summarize(output, "attention"))
    assert sanitize.run_sanitizer(["norm"], tmp_path, ENV, Console(quiet=True)) == code
    written = json.loads((tmp_path / "sanitizer.json").read_text())
    assert written["loss"] == {"commit": "before"}
    assert written["norm"]["csrc_sha"] == results.csrc_sha("norm")
    assert written["norm"]["commit"] == ENV.commit
    assert set(sanitize.TOOLS) < set(written["norm"])


def test_bad_requests(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"expected families among .*, got comm"):
        sanitize.run_sanitizer(["comm"], tmp_path, ENV, Console(quiet=True))
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="there is no compute-sanitizer"):
        sanitize.run_sanitizer([], tmp_path, ENV, Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cuda
@pytest.mark.parametrize("family", sanitize.CALLED)
def test_kernels_can_be_called(family):
    sanitize.call(family)
