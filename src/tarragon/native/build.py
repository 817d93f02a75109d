"""Build the native kernels: ``python -m tarragon.native.build``.

The result is one shared object beside this file, named by a hash of everything
that decides its code (sources, flags, torch, the CPU's features), so that an
up-to-date build is recognised by its name and one made for another CPU is
never loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = HERE / "csrc"

# -ffp-contract=off: the compiler must not fuse a multiply and an add where the source rounds them apart.
_COMPILE_FLAGS = (
    *("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-ffp-contract=off"),
    *("-fvisibility=hidden", "-Wall", "-Wextra"),
)
_LINK_FLAGS = ("-shared", "-fopenmp", "-ltorch_cpu", "-lc10")
_COMPILE_TIMEOUT_S = 900


class NativeError(ValueError):
    """The native kernels cannot be built or loaded; the message says what to do."""


def library_path() -> Path:
    """Where the shared object for these sources, this torch and this CPU is or will be."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for part in (torch.__version__, *_COMPILE_FLAGS, *_LINK_FLAGS, cpu_features()):
        digest.update(part.encode() + b"\0")
    return HERE / f"_tarragon_{digest.hexdigest()[:16]}.so"


def cpu_features() -> str:
    """The machine's architecture and CPU features: what ``-march=native`` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return " ".join([platform.machine(), *sorted(features.partition(":")[2].split())])


def build() -> tuple[Path, bool]:
    """Build unless it is up to date; returns the shared object and whether it was built now.

    Raises:
        NativeError: there is no compiler, or it failed.
    """
    target = library_path()
    if target.exists():
        return target, False
    compiler = find_compiler()
    with tempfile.TemporaryDirectory(prefix="tarragon-build-") as folder:
        units = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(folder) / f"{unit.stem}.o" for unit in units]
        commands = [
            [compiler, *_COMPILE_FLAGS, *_includes(), "-c", str(unit), "-o", str(out)]
            for unit, out in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for future in [pool.submit(_run, command) for command in commands]:
                future.result()
        linked = Path(folder) / target.name
        libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
        _run([compiler, *map(str, objects), libraries, *_LINK_FLAGS, "-o", str(linked)])
        _publish(linked, target)
    return target, True


def _publish(linked: Path, target: Path) -> None:
    """Put the shared object in its place in one step: another process sees all of it or nothing."""
    partial = target.with_suffix(f".{os.getpid()}.so")
    try:
        shutil.copyfile(linked, partial)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise NativeError(f"cannot write {target}: {error.strerror}") from error


def find_compiler() -> str:
    """The C++ compiler: $CXX, g++ or c++; NativeError when there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise NativeError("no C++ compiler was found: install g++ 11 or later, or name one in the variable CXX")


def _includes() -> list[str]:
    root = Path(torch.__file__).parent / "include"
    return ["-isystem", str(root), "-isystem", str(root / "torch/csrc/api/include")]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise NativeError(f"the C++ compiler did not finish within {_COMPILE_TIMEOUT_S} s") from error
    if done.returncode:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
        raise NativeError(f"the C++ compiler failed ({Path(command[0]).name}): {first}")


def main() -> int:
    start = time.perf_counter()
    try:
        path, built = build()
    except NativeError as error:
        print(f"tarragon.native.build: {error}", file=sys.stderr)
        return 1
    took = f"built in {time.perf_counter() - start:.0f} s" if built else "up to date"
    print(f"{path.name}: {took}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
