"""What other code sees of the package: its names, what an import costs, the list of ops, two ops under torch.compile."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dsv3
from bench.cases import Case, families, load
from bench.check import require_native
from dsv3 import doctor, ops
from dsv3.ops import __main__ as listing
from dsv3.ops import registry

ROOT = Path(__file__).parents[1]
# The ops that the issues want natively, as primitives.
NATIVE = {
    "rmsnorm", "rmsnorm_backward", "rope_", "swiglu", "swiglu_backward", "per_token_cast", "per_block_cast",
    "cast_transpose", "cross_entropy_", "adamw", "fp8_gemm", "grouped_fp8_gemm", "masked_grouped_fp8_gemm",
    "grouped_fp8_wgrad", "rmsnorm_cast", "swiglu_cast", "swiglu_cast_backward", "per_token_cast_and_transpose",
    "swiglu_backward_both_casts", "mla_append_kv", "mla_schedule", "mla_decode", "mla_attention",
    "mla_attention_backward", "mla_merge",
}  # fmt: skip


# ---- names ----
def test_public_names() -> None:
    assert {"Config", "DeepSeekV3", "SamplingParams", "generate"} <= set(dsv3.__all__)
    assert len(dsv3.__all__) <= 12
    assert all(getattr(dsv3, name) is not None for name in dsv3.__all__)
    assert set(dsv3.__all__) <= set(dir(dsv3))
    with pytest.raises(AttributeError, match="module 'dsv3' has no attribute 'generat'"):
        _ = dsv3.generat


def test_the_ops_are_not_burdened_with_the_rest() -> None:
    """A framework that imports an op gets no model, no trainer, no command line, no tokenizer."""
    heavy = "dsv3.model dsv3.train dsv3.inference dsv3.weights dsv3.cli transformers tokenizers safetensors typer rich"
    code = f"import sys, dsv3.ops; print(*sorted(set({heavy.split()}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_nothing_is_read_from_the_environment() -> None:
    """torch wants one variable for deterministic cuBLAS calls, which is set for it; torchrun says in one how many ranks a
    machine has, and torch has no function for it; no other is touched."""
    touched = []
    for path in (ROOT / "python" / "dsv3").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv"):
                touched.append(path.name)
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                touched += [path.name for name in node.names if name.name in ("environ", "getenv")]
    assert set(touched) == {"data.py", "launch.py"}
    lines = (ROOT / "python/dsv3/parallel/data.py").read_text().splitlines()
    assert {"LOCAL_WORLD_SIZE" in line for line in lines if "environ" in line} == {True}
    assert 'os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ' in (ROOT / "python/dsv3/train/launch.py").read_text()
    native = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h")]
    assert len(native) > 10
    assert [p.name for p in native if "getenv" in p.read_text()] == []


def test_loading_onto_a_device(device: torch.device, tmp_path: Path) -> None:
    config = dataclasses.replace(dsv3.Config.preset("tiny"), num_hidden_layers=2)
    saved = dsv3.DeepSeekV3(config).init_weights()
    saved.save_pretrained(tmp_path)
    model = dsv3.DeepSeekV3.from_pretrained(tmp_path, dtype=torch.bfloat16, device=device)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device.type, torch.bfloat16)}
    with torch.no_grad():
        logits = model(torch.zeros(2, 5, dtype=torch.int64, device=device))
    assert logits.shape == (2, 5, config.vocab_size)
    assert torch.equal(model.embed.weight.cpu(), saved.embed.weight.bfloat16())


# ---- the list of ops ----
def test_the_list_may_be_read_in_part() -> None:
    listed = subprocess.Popen([sys.executable, "-m", "dsv3.ops"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert listed.stdout.readline().startswith(b"native module")
    listed.stdout.close()
    assert listed.stderr.read() == b""
    listed.wait()


def test_the_list_of_ops_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    listing.main()
    head, *entries = capsys.readouterr().out.strip().split("\n\n")
    assert (registry.NATIVE_ERROR or "available") in head
    found = {}
    for entry in entries:
        schema, shapes, where = entry.split("\n")
        name = re.fullmatch(r"dsv3::(\w+)\(.*\) -> .+", schema).group(1)
        assert re.search(r"\[[\w\]]", shapes), f"{name}: no shapes"
        assert re.search("bf16|fp32|int32|int64|e4m3", shapes), f"{name}: no dtypes"
        found[name] = where.strip()
        assert torch._C.parse_schema(schema) == getattr(torch.ops.dsv3, name).default._schema
    registered = {
        str(name).removeprefix("dsv3::") for name in torch._C._dispatch_get_all_op_names() if "dsv3::" in name
    }
    assert found.keys() == registered
    assert set(found.values()) <= {"native", "reference"}
    assert {name for name, where in found.items() if where == "native"} >= NATIVE


def test_the_list_is_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "dsv3.ops"], capture_output=True, text=True, check=True)
    assert done.stdout.count("dsv3::") == len(registry.OPS)
    assert done.stderr == ""


def test_every_native_op_is_checked_and_measured() -> None:
    """A test of its registration (schema, fake kernel), a native function, a benchmark case."""
    checked = "".join(path.read_text() for path in (ROOT / "tests" / "ops").glob("test_*.py"))
    measured = {case.op for family in families() for case in load(family, tiny=True)}
    declared = set(re.findall(r"^void (\w+)\(", (ROOT / "csrc" / "ops.h").read_text(), re.M))
    assert {name for name in NATIVE if f'check_registration("{name}"' not in checked} == set()
    assert NATIVE - measured == set()
    assert {name.removesuffix("_") for name in NATIVE} - {name.removesuffix("_") for name in declared} == set()


def kernels_of_the_dispatcher() -> dict[str, tuple[list[str], str]]:
    """Types of the arguments of every kernel in csrc/torch_ops.cpp, and of its result."""
    source = (ROOT / "csrc/torch_ops.cpp").read_text()
    found = {}
    for name, function in re.findall(r'op<"(\w+)", (\w+)>\(\)', source):
        result, arguments = re.search(rf"^([^\n]+) {function}\(([^)]*)\) {{", source, re.M).groups()
        found[name] = [argument.split()[0] for argument in arguments.split(",")], result
    return found


def test_kernels_of_the_dispatcher_take_the_arguments_of_their_schemas() -> None:
    """They find their arguments by position, and nothing checks them when they run."""
    found = kernels_of_the_dispatcher()
    assert "fp8_gemm" in found
    results = ["void", "NewTensor", "std::array<NewTensor, 2>"]
    for name, kernel in found.items():
        schema = getattr(torch.ops.dsv3, name).default._schema
        types = [str(a.real_type).replace("float", "double") for a in schema.arguments]
        assert kernel == (types, results[len(schema.returns)]), name


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["norm", "quant", "gemm", "attention", "moe", "decode", "loss", "optim"])
def test_nothing_falls_back_on_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """A test that compares an op with its reference says nothing where the op quietly runs on it."""
    monkeypatch.setattr(registry, "FALLBACKS", {})
    for case in load(family, tiny=True):
        case.run(*case.inputs(torch.device("cuda")))
        require_native(case.op)


def test_doctor_names_the_gpu_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three machines that this one is not: no GPU, another GPU, no native code."""
    hopper = registry.is_hopper
    monkeypatch.setattr(registry, "NATIVE_ERROR", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (doctor.why_no_native_ops(), doctor.gpu()[:10]) == ("no GPU", "none found")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 9")
    monkeypatch.setattr(registry, "is_hopper", lambda device: False)
    assert doctor.why_no_native_ops() == "RTX 9 is not a Hopper GPU"
    monkeypatch.setattr(registry, "is_hopper", lambda device: True)
    assert doctor.why_no_native_ops() == ""
    monkeypatch.setattr(registry, "NATIVE_ERROR", "no native code")
    assert doctor.why_no_native_ops() == "no native code"
    monkeypatch.undo()
    assert registry.is_hopper is hopper
    doctor.report()
    out = capsys.readouterr().out
    for name in ("dsv3", "python", *doctor.REQUIRED, *doctor.OPTIONAL, "GPU"):
        assert re.search(rf"^ *{name} +\S", out, re.M), name
    assert doctor.gpu().split(" (")[0] in " ".join(out.split())  # a long name is wrapped


# ---- for framework authors ----
def test_two_ops_under_compile(device: torch.device) -> None:
    """The default backend, code generation included: no graph break, the eager result and gradients."""

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return ops.swiglu(ops.rmsnorm(x, weight))

    compiled = torch.compile(layer, fullgraph=True)
    weight = torch.rand(64, device=device).add(0.5).requires_grad_()
    results = []
    for f in (layer, compiled):
        x = torch.linspace(-3, 3, 320, device=device).view(5, 64).requires_grad_()
        y = f(x, weight)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


# ---- what the issue wants measured ----
def rows(family: str, op: str) -> list[Case]:
    return [case for case in load(family, tiny=False) if case.op == op]


def test_the_benchmark_has_the_sizes_of_the_issue() -> None:
    row_wise = {
        "norm": NATIVE & {"rmsnorm", "rmsnorm_cast", "rmsnorm_backward"},
        "quant": {name for name in NATIVE if "cast" in name and "rmsnorm" not in name and "swiglu" not in name},
    }
    for family, names in row_wise.items():
        for op in names:
            assert (4096, 7168) in {(c.case["tokens"], c.case["hidden"]) for c in rows(family, op)}, op
    assert {c.case["residual"] for c in rows("norm", "rmsnorm")} == {False, True}
    for op in ("swiglu_cast", "swiglu_cast_backward", "swiglu_backward_both_casts"):
        assert (32768, 2048) in {(c.case["tokens"], c.case["hidden"]) for c in rows("moe", op)}, op
    (rope,) = rows("norm", "rope_")
    assert (rope.case["tokens"], rope.case["heads"], rope.case["head_dim"]) == (4096, 128, 192)
    rotated = 4096 * 128 * 64 * 2  # bytes: two whole sectors a head, read and written
    assert 2 * rotated < rope.bytes < 2.1 * rotated
    (loss,) = rows("loss", "cross_entropy_")
    assert (loss.case["tokens"], loss.case["hidden"]) == (4096, 129280)
    logits = 4096 * 129280 * 2
    assert 2 * logits <= loss.bytes < 2.01 * logits
    for adamw in rows("optim", "adamw"):
        assert adamw.case["tensors"] == 200
        assert 0.99e9 < adamw.case["parameters"] < 1.01e9
    for family in ("norm", "quant", "moe", "loss", "optim"):
        assert load(family, tiny=False)
        assert all("torch.compile" in case.baselines for case in load(family, tiny=False)), family
    decode = [c.case for c in rows("attention", "mla_decode") if not {"varlen", "layer"} & c.case.keys()]
    assert len([case for case in decode if case["kv"] == "bf16"]) == 13
    assert {case["heads"] for case in decode} == {16, 64, 128}
    layers = [c.case for c in rows("attention", "mla_decode") if c.case.get("layer")]
    assert [(case["batch"], case["heads"], case["s_k"]) for case in layers] == [(b, 128, 4096) for b in (1, 32, 128)]
    assert {c.case["tokens"] for c in rows("attention", "mla_append_kv")} == {128, 4096}
    generation = [(c.case["batch"], c.case["prompt"], c.case["speculative"]) for c in rows("model", "generate")]
    plain = [(1, 512, False), (1, 512, True), (32, 512, False), (32, 512, True)]
    assert generation == [*plain, (1, 512, False), (32, 512, False)], "the last two with weights in FP8"
    steps = [
        tuple(c.case.get(key) for key in ("model", "rows", "length", "mtp", "precision"))
        for c in rows("model", "train_step")
    ]
    mini = [("mini", 8, 2048, False, None), ("mini", 8, 2048, True, None), ("mini", 8, 2048, False, "fp8")]
    assert steps == [*mini, ("2b", 8, 4096, False, "fp8")]
    (layer,) = rows("model", "expert_layer")
    assert layer.case == {"tokens": 4096, "hidden": 7168, "inner": 2048, "groups": 4, "rows": 8192}
    assert [c.case["steps"] for c in rows("model", "train_losses")] == [200]


def test_the_benchmark_has_the_products_of_the_issue() -> None:
    def sizes(op: str, *keys: str) -> list[tuple[int, ...]]:
        return [tuple(case.case[key] for key in keys) for case in rows("gemm", op) if "mode" not in case.case]

    dense = [(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
    expected = [(m, *shape) for m in (1, 8, 16, 32, 64, 128, 4096) for shape in dense]
    assert sizes("fp8_gemm", "m", "n", "k") == expected
    weight_gradients = {(4096, 7168, 4096), (7168, 2048, 4096), (2112, 7168, 4096)}
    assert set(sizes("fp8_gemm_out", "m", "n", "k")) == weight_gradients
    shapes = [(4096, 7168), (7168, 2048)]
    for op, groups in (
        ("grouped_fp8_wgrad", [(4, 8192), (8, 4096)]),
        ("grouped_fp8_gemm", [(4, 8192), (8, 4096)]),
        ("masked_grouped_fp8_gemm", [(32, 192), (6, 1024), (32, 20), (6, 20)]),
    ):
        found = set(sizes(op, "groups", "rows", "n", "k"))
        assert found >= {(*group, *shape) for group in groups for shape in shapes}, op
    assert {(4, 8192, 6144, 7168), (4, 8192, 7168, 3072)} < set(sizes("grouped_fp8_gemm", "groups", "rows", "n", "k"))
    assert [case.case["mode"] for case in rows("gemm", "fp8_gemm") if "mode" in case.case] == ["host"]
    assert all(case.fp8 and "torch bf16" in case.baselines for case in load("gemm", tiny=False) if not case.measure)
