"""Builds liblocum_cuda.so on a machine with or without a GPU.

Fetches NVIDIA's compiler and headers by package name, compiles the kernels for Ampere and Hopper (and as PTX for what comes later),
prints what each takes of registers and whether it spills, and puts them into the object.

    python core/cuda/build.py --cache .cache --target target
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

# The compiler and what it reads; neither driver nor cuBLAS is needed to build.
PACKAGES = {
    "nvidia-cuda-nvcc": "13.0.88",
    "nvidia-nvvm": "13.0.88",
    "nvidia-cuda-crt": "13.0.88",
    "nvidia-cuda-runtime": "13.0.96",
    "nvidia-cuda-cccl": "13.0.85",
}
# Generation 8.0 is Ampere, and runs on Ada too; 9.0 is Hopper; its PTX is compiled by the driver for what comes later.
GENERATIONS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
]
# Bytes of a thread's registers kept in memory, stores and loads together, above which a kernel is not let pass.
MOST_SPILLED = 64
HERE = Path(__file__).resolve().parent


def fetch(cache: Path) -> Path:
    """The toolkit's folder, with the packages unpacked in it."""
    home = cache / "cuda" / "toolkit"
    wanted = "\n".join(f"{name}=={version}" for name, version in PACKAGES.items())
    marker = home / "packages.txt"
    if marker.exists() and marker.read_text() == wanted:
        return home / "nvidia" / "cu13"
    print("== fetching NVIDIA's compiler and headers, about 105 MB", flush=True)
    shutil.rmtree(home, ignore_errors=True)
    wheels = home / "wheels"
    wheels.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
    subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "--dest", wheels, *wanted.split("\n")], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as box:
            box.extractall(home)
    shutil.rmtree(wheels)
    toolkit = home / "nvidia" / "cu13"
    # A wheel is only a box here: unpacking loses the permission to run.
    for folder in [toolkit / "bin", toolkit / "nvvm" / "bin"]:
        for program in folder.iterdir():
            if program.is_file():
                program.chmod(0o755)
    marker.write_text(wanted)
    return toolkit


def compile_kernels(toolkit: Path, out: Path) -> Path:
    """The fat binary; compiled again only when a source or this file is newer."""
    binary = out / "kernels.fatbin"
    sources = [*sorted((HERE / "kernels").iterdir()), Path(__file__)]
    if binary.exists() and all(s.stat().st_mtime < binary.stat().st_mtime for s in sources):
        print((out / "kernels.txt").read_text(), end="")
        return binary
    print("== compiling the kernels for sm_80 and sm_90", flush=True)
    nvcc = [toolkit / "bin" / "nvcc", "-std=c++17", "-O3", "--fatbin", "-compress-mode=size", "--threads=2", "-Xptxas=-v"]
    # The compiler looks for the others of its kind beside itself and on the path.
    env = os.environ | {"PATH": f"{toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}", "CUDA_HOME": str(toolkit)}
    partial = out / "kernels.part"
    done = subprocess.run([*nvcc, *GENERATIONS, "-o", partial, HERE / "kernels" / "all.cu"], env=env, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    table, spilled = tabulate(done.stderr)
    (out / "kernels.txt").write_text(table)
    print(table, end="")
    if spilled > MOST_SPILLED:
        sys.exit(f"a kernel spills {spilled} bytes of its registers: {MOST_SPILLED} are let pass")
    partial.rename(binary)
    return binary


def tabulate(said: str) -> tuple[str, int]:
    """ptxas' report as a table, and the most bytes that one kernel spills."""
    found = []
    for part in said.split("Compiling entry function ")[1:]:
        name, generation = re.match(r"'(\w+)' for '(\w+)'", part).groups()
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        used = re.search(r"Used (\d+) registers([^\n]*)", part)
        shared = re.search(r"(\d+) bytes smem", used[2])
        found.append((name, generation, int(used[1]), shared and shared[1], int(stores) + int(loads)))
    if not found:
        sys.exit("the compiler's report has no kernel in it:\n" + said)
    lines = [f"{'kernel':<24} {'for':<6} registers  shared bytes  spilled bytes"]
    most = 0
    for name, generation, registers, shared, spilled in sorted(found):
        most = max(most, spilled)
        lines.append(f"{name:<24} {generation:<6} {registers:>9}  {shared or 0:>12}  {spilled or '-':>13}")
    spilling = sum(spilled > 0 for *_, spilled in found)
    lines.append(f"{len(found)} kernels, {spilling} of them spill, at most {most} bytes")
    return "\n".join(lines) + "\n", most


def build_object(kernels: Path, target: Path, cargo: str) -> Path:
    print("== compiling liblocum_cuda.so", flush=True)
    work = target / "cuda" / "cargo"
    env = os.environ | {"LOCUM_CUDA_KERNELS": str(kernels.resolve()), "CARGO_TARGET_DIR": str(work.resolve())}
    subprocess.run([cargo, "build", "--release", "--locked", "--quiet", "--manifest-path", HERE / "Cargo.toml"], env=env, check=True)
    to = target / "release" / "liblocum_cuda.so"
    to.parent.mkdir(parents=True, exist_ok=True)
    # Beside it and renamed, so that a process which has the old one open keeps it.
    partial = to.with_suffix(".part")
    shutil.copy(work / "release" / "liblocum_cuda.so", partial)
    partial.rename(to)
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--target", type=Path, default=Path("target"))
    parser.add_argument("--cargo", default="cargo")
    args = parser.parse_args()
    began = time.monotonic()
    out = args.target / "cuda"
    out.mkdir(parents=True, exist_ok=True)
    toolkit = fetch(args.cache)
    fetched = time.monotonic()
    kernels = compile_kernels(toolkit, out)
    compiled = time.monotonic()
    made = build_object(kernels, args.target, args.cargo)
    ended = time.monotonic()
    print(
        f"== {made}: {made.stat().st_size / 1e6:.1f} MB, {kernels.stat().st_size / 1e6:.1f} of it kernels; "
        f"fetched in {fetched - began:.0f} s, kernels {compiled - fetched:.0f} s, object {ended - compiled:.0f} s"
    )


if __name__ == "__main__":
    main()
