"""What is built, installed and pinned: setup.py, the Makefile's choices, the wheel, the native module's links."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import setuptools

from dsv3.ops import registry

ROOT = Path(__file__).parents[1]
NO_NVCC = "dsv3: no nvcc found, installing without native code: every op runs on its reference\n"
NO_NVSHMEM = "dsv3: no nvidia-nvshmem wheel found, installing without the transport nvshmem\n"
NATIVE_FILE = registry._C.__file__ if registry._C else None
needs_native = pytest.mark.skipif(NATIVE_FILE is None, reason="built without nvcc")


# ---- setup.py ----
def run_setup(
    monkeypatch: pytest.MonkeyPatch, found: set[str], on_path: str | None = None, *, nvshmem: bool = True
) -> tuple[ModuleType, dict]:
    """setup.py where only the nvcc of `found` exist, and NVSHMEM or not: the module and what it gave to setuptools."""
    given: dict[str, Any] = {}
    exists = Path.exists

    def wheel(name: str) -> SimpleNamespace:
        if name == "nvidia-nvshmem-cu13" and nvshmem:
            return SimpleNamespace(locate_file=lambda path: f"/opt/{path}")
        raise importlib.metadata.PackageNotFoundError(name)

    def there(self: Path) -> bool:
        return str(self) in found if self.name == "nvcc" else self.name == "libnvshmem_device.a" or exists(self)

    monkeypatch.setattr(setuptools, "setup", lambda **values: given.update(values))
    monkeypatch.setattr(shutil, "which", lambda name: on_path)
    monkeypatch.setattr(Path, "exists", there)
    monkeypatch.setattr(importlib.metadata, "distribution", wheel)
    spec = importlib.util.spec_from_file_location("dsv3_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, given


def test_nvcc_comes_from_the_path_then_the_machine_then_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = run_setup(monkeypatch, set())
    in_wheel = str(Path(module.sysconfig.get_path("purelib")) / "nvidia/cu13/bin/nvcc")
    places = ["/opt/bin/nvcc", "/usr/local/cuda/bin/nvcc", in_wheel]
    for i, expected in enumerate(places):
        module, given = run_setup(monkeypatch, set(places[i:]), places[0] if i == 0 else None)
        assert module.find_nvcc() == Path(expected)
        assert module.find_nvshmem() == Path("/opt/nvidia/nvshmem")
        assert [extension.name for extension in given["ext_modules"]] == ["dsv3._C", "dsv3._nvshmem"]
        assert given["distclass"]({"ext_modules": given["ext_modules"]}).has_ext_modules()


def test_without_nvcc_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, given = run_setup(monkeypatch, set())
    assert capsys.readouterr() == ("", NO_NVCC)
    assert module.find_nvcc() is None
    assert given["ext_modules"] == []
    assert not given["distclass"]({"ext_modules": given["ext_modules"]}).has_ext_modules()
    run_setup(monkeypatch, {"/usr/local/cuda/bin/nvcc"})
    assert capsys.readouterr() == ("", "")


def test_without_nvshmem_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, given = run_setup(monkeypatch, {"/usr/local/cuda/bin/nvcc"}, nvshmem=False)
    assert capsys.readouterr() == ("", NO_NVSHMEM)
    assert module.find_nvshmem() is None
    assert [extension.name for extension in given["ext_modules"]] == ["dsv3._C"]


def test_a_missing_build_dependency_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = run_setup(monkeypatch, set())
    with pytest.raises(SystemExit, match=r"^dsv3: the native build needs the package no_such_package; pip install"):
        module.module_folder("no_such_package")


WITHOUT_NVCC = """
import pathlib, runpy, shutil, sys
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: self.name != "nvcc" and exists(self)
which = shutil.which
shutil.which = lambda name, *args, **kwargs: None if name == "nvcc" else which(name, *args, **kwargs)
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_the_wheel_without_nvcc_is_pure_and_whole(tmp_path: Path) -> None:
    """Every package is in it, on any platform, with the command, and it requires no particular torch minor."""
    folders = ["-q", "egg_info", "--egg-base", tmp_path, "build", "--build-base", tmp_path / "build"]
    arguments = [*folders, "bdist_wheel", "--bdist-dir", tmp_path / "bdist", "-d", tmp_path]
    command = [sys.executable, "-c", WITHOUT_NVCC, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(NO_NVCC) == 1
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
        commands = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    sources = {str(p.relative_to(ROOT / "python")) for p in (ROOT / "python" / "dsv3").rglob("*.py")}
    assert {n for n in names if ".dist-info/" not in n} == sources
    assert "dsv3 = dsv3.cli:main" in commands
    assert "Requires-Python: >=3.11\n" in metadata
    assert "Requires-Dist: torch>=2.10\n" in metadata


def test_pins() -> None:
    """What `make` installs is pinned; what the package requires is not."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line)
    assert pins["torch"] == "2.13.0"
    toolkit = {name: version for name, version in pins.items() if name.startswith("nvidia-")}
    assert toolkit == {
        "nvidia-cuda-nvcc": "13.0.88",
        "nvidia-cuda-crt": "13.0.88",
        "nvidia-nvvm": "13.0.88",
        "nvidia-cuda-cccl": "13.0.85",
    }, "and no runtime: torch's build for CUDA requires one of its own, which a pin would make impossible to install"
    makefile = (ROOT / "Makefile").read_text()
    assert "\nCUDA_RUNTIME := nvidia-cuda-runtime==13.0.88\n" in makefile
    assert "\nNVSHMEM := nvidia-nvshmem-cu13==3.4.5\n" in makefile, "of which the same is true"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [requirement for requirement in project["dependencies"] if "==" in requirement or "<" in requirement]


def test_outputs_are_ignored_by_git() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        assert "/runs/" in (ROOT / ".gitignore").read_text().splitlines()
        return
    for path in (
        "runs/demo/loss.png",
        "runs/cache/x/index.json",
        "build/x",
        "dist/x.whl",
        "python/dsv3/_C.so",
        ".venv/x",
    ):
        assert (
            subprocess.run(["git", "-c", "safe.directory=*", "check-ignore", "-q", path], cwd=ROOT).returncode == 0
        ), path


# ---- the Makefile, with programs that only write down how they were called ----
PYTHON = """#!/bin/bash
echo "${0##*/bin/} $*" >> "$LOG"
case "$*" in
  -c*) echo 0 ;;
  *--dry-run*) [ "$HAS_ALL" = 1 ] || [ -e "$LOG.installed" ] ;;
  "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"pip show"*) [ "$HAS_NVSHMEM" = 1 ] ;;
  *"pip install"*nvshmem*) exit 1 ;;
  *"pip install"*) touch "$LOG.installed" ;;
esac
"""
NVIDIA_SMI = '#!/bin/bash\n[ -n "$CAPABILITY" ] && echo "$CAPABILITY"\n'


def make(
    folder: Path,
    target: str,
    *,
    capability: str = "",
    has_all: bool = True,
    has_nvshmem: bool = True,
    arguments: str = "",
) -> list[str]:
    """The calls of python that `make target` makes in a fresh tree, without those that only ask."""
    shutil.copy(ROOT / "Makefile", folder)
    programs = folder / "programs"
    programs.mkdir()
    for name, text in (("python3", PYTHON), ("nvidia-smi", NVIDIA_SMI), ("nvcc", "#!/bin/bash\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    log = folder / "log"
    env = {"PATH": f"{programs}:/usr/bin:/bin", "LOG": str(log), "HAS_ALL": str(int(has_all)), "CAPABILITY": capability}
    env["HAS_NVSHMEM"] = str(int(has_nvshmem))
    command = ["make", target, f"ARGS={arguments}"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = [line.split(" ", 1)[1] for line in log.read_text().splitlines()]
    return [call for call in calls if "--dry-run" not in call and not call.startswith(("-c ", "-m pip show "))]


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


@needs_make
@pytest.mark.parametrize("capability", ["", "8.9", "12.0"])
def test_make_demo_compiles_nothing_without_a_hopper_gpu(tmp_path: Path, capability: str) -> None:
    """And where the interpreter has everything, nothing is installed: no network."""
    calls = make(tmp_path, "demo", capability=capability, arguments="--seconds 9")
    assert calls == ["-m dsv3 demo --seconds 9"]


@needs_make
def test_make_demo_compiles_on_a_hopper_gpu(tmp_path: Path) -> None:
    assert make(tmp_path, "demo", capability="9.0") == ["setup.py -q build_ext --inplace", "-m dsv3 demo"]


@needs_make
def test_make_demo_makes_an_environment_where_something_is_missing(tmp_path: Path) -> None:
    first, *installs, last = make(tmp_path, "demo", has_all=False)
    assert first == "-m venv .venv"
    assert last == "-m dsv3 demo"
    assert len(installs) == 2
    assert re.search(r"pip install .* -c constraints.txt .*torch>=2.10 .*tokenizers", installs[0])
    assert installs[1].endswith("--no-deps --no-build-isolation -e .")


@needs_make
def test_make_test_compiles_and_passes_its_arguments_on(tmp_path: Path) -> None:
    calls = make(tmp_path, "test", arguments="tests/ops -x")
    assert calls == ["setup.py -q build_ext --inplace", "-m pytest tests/ops -x"]


@needs_make
def test_make_goes_on_without_nvshmem(tmp_path: Path) -> None:
    """Asked for once, also where there is no network, which the stand-in for pip says."""
    install, *others = make(tmp_path, "test", has_nvshmem=False)
    assert re.search(r"pip install .* --no-deps nvidia-nvshmem-cu13==3.4.5$", install)
    assert others == ["setup.py -q build_ext --inplace", "-m pytest"]


# ---- the native module ----
@needs_native
def test_it_imports_without_torch_and_without_a_gpu() -> None:
    code = "import sys; from dsv3 import _C; assert 'torch' not in sys.modules; print(len(dir(_C)))"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


@needs_native
def test_it_links_neither_torch_nor_cuda() -> None:
    needed = subprocess.run(["ldd", str(NATIVE_FILE)], capture_output=True, text=True, check=True).stdout
    assert "libstdc++.so." in needed
    for name in ("libtorch", "libc10", "libcudart", "libcublas", "libpython"):
        assert name not in needed, name


@needs_native
def test_it_holds_code_for_sm_90a_alone() -> None:
    targets = set(re.findall(rb"\.target (sm_\w+)", Path(str(NATIVE_FILE)).read_bytes()))
    assert targets == {b"sm_90a"}


def copied(folder: Path) -> Path:
    """The package without its native module."""
    target = folder / "dsv3"
    shutil.copytree(ROOT / "python" / "dsv3", target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


ALONE = """
import torch, dsv3
from dsv3 import ops, doctor
from dsv3.ops import registry
assert dsv3.__file__.startswith({folder!r}), dsv3.__file__
x, w = torch.randn(3, 64), torch.rand(64)
torch.testing.assert_close(ops.rmsnorm(x, w), torch.nn.functional.rms_norm(x, (64,), w, 1e-6))
print(registry.NATIVE_ERROR)
doctor.report()
"""


@pytest.mark.parametrize("broken", [False, True])
def test_ops_run_and_say_why_where_there_is_no_native_module(tmp_path: Path, broken: bool) -> None:
    package = copied(tmp_path)
    if broken:
        (package / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_text("not a shared object")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "400"}
    code = ALONE.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reason, *doctor = done.stdout.splitlines()
    if broken:
        assert str(package / "_C") in reason, "a module that does not load is not the same as none"
    else:
        assert reason == "dsv3 was installed without native code"
    (line,) = (line for line in doctor if line.split()[:1] == ["rmsnorm"])
    assert line.split(maxsplit=1)[1].rstrip() == f"reference: {reason}"


def test_a_source_distribution_holds_what_it_is_built_of(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "csrc", "CMakeLists.txt"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode or not tracked.stdout:
        pytest.skip("no git checkout")
    sources = {
        name for name in tracked.stdout.split() if (ROOT / name).exists()
    }  # of a copied tree the index may be older
    copy = tmp_path / "tree"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "*.so", "*.egg-info")
    )
    command = [
        sys.executable,
        "-c",
        "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=copy, check=True, capture_output=True, timeout=120)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*sources, "setup.py", "constraints.txt", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith(".so")]
