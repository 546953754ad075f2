"""Builds the extension module `jrt_kernels` with nvcc alone. The source files are compiled in parallel.

Called by setup.py when JRT_BUILD_KERNELS=1, or by hand: `python kernels/build.py OUTPUT_DIRECTORY`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

NAME = "jrt_kernels"
HERE = Path(__file__).resolve().parent
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")
OLDEST_NVCC = (12, 5)  # cudaGetDriverEntryPointByVersion
SOURCES = (
    *("prefill_bf16.cu", "prefill_fp16.cu", "prefill.cu", "decode.cu", "backward.cu"),
    *("tensor_maps.cpp", "pieces.cpp", "bindings.cpp", "backward_bindings.cpp"),
    *("selective_scan.cu", "selective_scan_backward.cu", "selective_scan_bindings.cpp"),
)
NEEDS_NVCC = f"JRT_BUILD_KERNELS=1 needs nvcc, the CUDA compiler ({'.'.join(map(str, OLDEST_NVCC))} or newer)"
WITHOUT = "Without the kernels everything works, through PyTorch: install again with JRT_BUILD_KERNELS unset."


class BuildError(RuntimeError):
    """The extension cannot be built; the message says what is missing."""


def find_nvcc() -> Path:
    """The CUDA compiler: CUDA_HOME, then PATH, then the usual place.

    Raises:
        BuildError: there is none.
    """
    candidates = [Path(os.environ["CUDA_HOME"], "bin", "nvcc")] if "CUDA_HOME" in os.environ else []
    found = shutil.which("nvcc")
    candidates += [Path(found)] if found else []
    candidates.append(USUAL_NVCC)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise BuildError(f"{NEEDS_NVCC}, and found none: put it on PATH or set CUDA_HOME. {WITHOUT}")


def check_tools(nvcc: Path) -> None:
    """Raises BuildError if nvcc is too old or pybind11 is not installed."""
    release = re.search(r"release (\d+)\.(\d+)", _run([str(nvcc), "--version"]))
    if release is None or (int(release[1]), int(release[2])) < OLDEST_NVCC:
        found = "one that does not say its release" if release is None else f"{release[1]}.{release[2]}"
        raise BuildError(f"{NEEDS_NVCC}, and found {found} at {nvcc}. {WITHOUT}")
    if importlib.util.find_spec("pybind11") is None:
        raise BuildError("JRT_BUILD_KERNELS=1 needs pybind11: pip install pybind11")


def compile_module(output: Path, build_directory: Path, extra_flags: tuple[str, ...] = ()) -> str:
    """Compiles and links the module to the file `output`.

    Returns:
        What the compiler reported: registers, spills and shared memory of each kernel.

    Raises:
        BuildError: no nvcc, an old one, no pybind11, or the compiler failed.
    """
    nvcc = find_nvcc()
    check_tools(nvcc)
    import pybind11

    build_directory.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", "-lineinfo", "-gencode", "arch=compute_90a,code=sm_90a"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags += ["-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"], *extra_flags]

    def compile_source(source: str) -> tuple[Path, str]:
        target = build_directory / (Path(source).stem + ".o")
        report = ["-Xptxas", "-v"] if source.endswith(".cu") else []
        return target, _run([str(nvcc), *flags, *report, "-c", str(HERE / source), "-o", str(target)])

    with ThreadPoolExecutor(len(SOURCES)) as pool:
        results = list(pool.map(compile_source, SOURCES))
    output.parent.mkdir(parents=True, exist_ok=True)
    objects = [str(target) for target, _ in results]
    _run([str(nvcc), "-shared", "--cudart", "static", "-o", str(output), *objects])
    return "".join(text for _, text in results)


def extensions() -> list[Extension]:
    """Returns the extension for setuptools' setup(), with BuildKernels as build_ext.

    Exits with one line if the build cannot work."""
    try:
        check_tools(find_nvcc())
    except BuildError as error:
        raise SystemExit(str(error)) from error
    return [Extension(NAME, [f"{HERE.name}/{source}" for source in SOURCES])]


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            compile_module(Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve())
        except BuildError as error:
            raise SystemExit(str(error)) from error


def _run(command: list[str]) -> str:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python kernels/build.py OUTPUT_DIRECTORY [nvcc flags]")
    output = Path(sys.argv[1]) / (NAME + sysconfig.get_config_var("EXT_SUFFIX"))
    with tempfile.TemporaryDirectory() as directory:
        try:
            print(compile_module(output, Path(directory), tuple(sys.argv[2:])))
        except BuildError as error:
            sys.exit(str(error))
    print(output)


if __name__ == "__main__":
    main()
