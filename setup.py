"""Builds dsv3._C with CMake where nvcc is found, and dsv3._nvshmem where NVSHMEM is too; installs pure Python otherwise. The
metadata is in pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


def find_nvcc() -> Path | None:
    """nvcc on the PATH, in /usr/local/cuda, or in the nvidia-cuda-nvcc wheel of this interpreter's environment."""
    candidates = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    candidates += [Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvcc"]
    return next((Path(c) for c in candidates if c and Path(c).exists()), None)


def module_folder(name: str) -> Path:
    """Folder of an installed build dependency."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"dsv3: the native build needs the package {name}; pip install --no-deps {name}")
    return Path(spec.origin).parent


def find_nvshmem() -> Path | None:
    """Folder of the nvidia-nvshmem-cu13 wheel of this interpreter's environment, with headers and libraries."""
    try:
        wheel = importlib.metadata.distribution("nvidia-nvshmem-cu13")
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(wheel.locate_file("nvidia/nvshmem")))
    return folder if (folder / "lib" / "libnvshmem_device.a").exists() else None


class CMakeBuild(build_ext):
    def run(self) -> None:
        # An editable install uses what `build_ext --inplace` built, so that it is quick and never compiles unasked.
        if not self.editable_mode:
            super().run()

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-Dpybind11_DIR={module_folder('pybind11') / 'share' / 'cmake' / 'pybind11'}",
            f"-DCUTLASS_INCLUDE_DIR={module_folder('cutlass_library') / 'source' / 'include'}",
        ]  # fmt: skip
        configure.append(f"-DNVSHMEM_DIR={find_nvshmem() or ''}")
        wheel_libraries = nvcc.parent.parent / "lib"
        if "site-packages" in nvcc.parts:
            configure.append(f"-DCMAKE_CUDA_FLAGS=-L{wheel_libraries}")
        # The cmake and ninja of this interpreter's environment come first, whether or not it is activated.
        env = os.environ | {"PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])}
        subprocess.run(configure, check=True, env=env)
        target = ext.name.rpartition(".")[2]
        done = subprocess.run(["cmake", "--build", str(build), "--target", target], env=env)
        if done.returncode != 0:  # of an optional one setuptools says so and goes on
            raise CompileError(f"{ext.name} did not compile")


class MaybeBinary(Distribution):
    def has_ext_modules(self) -> bool:
        return bool(self.ext_modules)


names = [] if find_nvcc() is None else ["_C"] if find_nvshmem() is None else ["_C", "_nvshmem"]
extensions = [Extension(f"dsv3.{name}", sources=[], optional=name != "_C") for name in names]
if names == ["_C"]:
    print("dsv3: no nvidia-nvshmem wheel found, installing without the transport nvshmem", file=sys.stderr)
if not extensions:
    print("dsv3: no nvcc found, installing without native code: every op runs on its reference", file=sys.stderr)

setup(package_dir={"": "python"}, ext_modules=extensions, cmdclass={"build_ext": CMakeBuild}, distclass=MaybeBinary)
