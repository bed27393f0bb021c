"""Compiles the C++ kernel of `cpu.py`, when it is first used.

    python -m pallas_kernels.build

builds it at once and says where it is and which path this processor takes. It needs g++ or clang++ ($CXX goes before
them) and keeps the library in $XDG_CACHE_HOME/spectra_jax, by default ~/.cache/spectra_jax. SPECTRA_NO_COMPILE=1 does
without it. It is not part of the installation because the headers must be those of the jaxlib that runs it.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax

SOURCE = Path(__file__).with_name("cpu.cc")
# Without contraction to fused multiply-adds all paths round alike. The paths choose their instructions themselves.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-pthread")
SECONDS = 300  # for the compiler


class Unavailable(Exception):
    """There is no library, and why, in one line."""


def library() -> Path:
    """The library's file, compiled if it is not there.

    Its name is a hash of all that it depends on. It appears whole or not at all, so processes may build at once.

    Raises:
      Unavailable: no compiler, one that fails, a folder that cannot be written, or SPECTRA_NO_COMPILE.
    """
    if os.environ.get("SPECTRA_NO_COMPILE", "0") not in ("", "0"):
        raise Unavailable("SPECTRA_NO_COMPILE is set")
    compiler = find_compiler()
    facts = [_output([*compiler, "--version"]), version("jaxlib"), platform.machine(), *FLAGS]
    name = hashlib.sha256("\n".join(facts).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    try:
        target = cache_folder() / f"cpu-{name}.so"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                built = Path(folder) / target.name
                _output([*compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(built)])
                built.replace(target)
    except OSError as e:
        raise Unavailable(f"the library cannot be kept: {e}") from e
    return target


def find_compiler() -> list[str]:
    """The command of the C++ compiler."""
    candidates = [shlex.split(os.environ.get("CXX", "")), ["g++"], ["clang++"]]
    for command in candidates:
        if command and shutil.which(command[0]):
            return command
    raise Unavailable("there is no C++ compiler: install g++ or clang++, or set CXX")


def cache_folder() -> Path:
    """Where libraries are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "spectra_jax"


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as e:
        raise Unavailable(f"{command[0]} took over {SECONDS} s") from e
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Unavailable(f"{command[0]} failed: " + next((line for line in lines if "error" in line), lines[0]))
    return done.stdout


def main() -> int:
    """Builds, and prints where and which path."""
    from pallas_kernels import cpu

    try:
        print(f"{library()}\npath: {cpu.paths()[0]}")
    except Unavailable as e:
        print(f"no kernel: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
