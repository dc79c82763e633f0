"""Builds `dino_fast._C` with CMake and Ninja; everything else is in pyproject.toml.

DINO_FAST_CUDA=0 leaves the CUDA sources out, =1 insists on them, unset compiles them where nvcc is found.
DINO_FAST_SANITIZE=address builds for AddressSanitizer, for tests/test_native_sanitized.py alone: the library stays in
the build folder (build_ext --build-temp) and replaces nothing.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        if platform.system() != "Linux":
            sys.exit(f"dino-fast builds on Linux only; this is {platform.system()}. On Windows, use WSL 2.")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        sanitizer = os.environ.get("DINO_FAST_SANITIZE", "")
        name = f"cmake-{sys.implementation.cache_tag}" + (sanitizer and f"-{sanitizer}")
        build = Path(self.build_temp).resolve() / name
        build.mkdir(parents=True, exist_ok=True)
        if (build / "CMakeCache.txt").exists() and f"={pybind11.get_cmake_dir()}\n" not in (
            build / "CMakeCache.txt"
        ).read_text():
            shutil.rmtree(build)  # an isolated build's pybind11 is gone the next time; a stale cache names it still
            build.mkdir()
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDINO_FAST_CUDA={os.environ.get('DINO_FAST_CUDA', 'AUTO')}",
            f"-DDINO_FAST_SANITIZE={sanitizer}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        if sanitizer:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)


setup(
    ext_modules=[Extension("dino_fast._C", [])],
    cmdclass={"build_ext": CMakeBuild},
    packages=[
        *find_packages(include=["dino_fast", "dino_fast.*"]),
        "dino_fast.kernels",
        "dino_fast.benchmarks",
        "dino_fast.benchmarks.original",
    ],
    package_dir={
        "dino_fast": "dino_fast",
        "dino_fast.kernels": "kernels",
        "dino_fast.benchmarks": "benchmarks",
        "dino_fast.benchmarks.original": "tests/original",
    },
    package_data={
        "dino_fast": ["py.typed", "*.pyi"],
        "dino_fast.data": ["*.parquet", "*.md"],
        "dino_fast.report": ["*.css", "*.html", "*.js"],
    },
)
