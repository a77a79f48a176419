"""Builds the doors with libFuzzer on the stable toolchain and opens each for a while: `make fuzz`, `make asan`.

A corpus is kept packed, a file a door: before each input its length in four bytes, the lowest first.
`--keep` adds what was found to reach code that no kept input reaches.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CORPUS = HERE / "corpus"
TRIPLE = "x86_64-unknown-linux-gnu"
# Of doors.rs and abi.c, with the longest input that is tried, in bytes.
DOORS = {
    "step": 2048,
    "episodes": 4096,
    "safetensors": 4096,
    "config": 2048,
    "tokenizer": 4096,
    "template": 2048,
    "gguf": 2048,
    "tools": 2048,
    "reply": 512,
    "secrets": 1024,
    "registry": 2048,
    "policy": 2048,
    "abi": 1024,
}
# What `cargo fuzz` passes too: counters of edges, a table of their places, and comparisons told to the fuzzer.
COVERAGE = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
]


@dataclass
class Ran:
    door: str
    executions: int
    edges: int
    inputs: int
    seconds: int
    complaint: str  # the last lines, if it ended badly


def environment(asan: bool) -> dict[str, str]:
    """What cargo is told; with `asan` also how C and C++ are compiled, for one runtime watches all."""
    flags, env = COVERAGE, dict(os.environ)
    if asan:
        flags = [*COVERAGE, "-Zsanitizer=address"]
        # The runtime comes with the stable toolchain; its switch alone is behind this.
        env["RUSTC_BOOTSTRAP"] = "1"
        for kind in ("CFLAGS", "CXXFLAGS"):
            env[f"{kind}_{TRIPLE.replace('-', '_')}"] = "-fsanitize=address -fno-omit-frame-pointer"
    env["CARGO_ENCODED_RUSTFLAGS"] = "\x1f".join(flags)
    return env


def build(target: Path, cargo: str, asan: bool) -> Path:
    print(f"== compiling the doors{' for AddressSanitizer' if asan else ''} (some minutes the first time)", flush=True)
    command = [cargo, "build", "--release", "--manifest-path", str(HERE / "Cargo.toml"), "--target", TRIPLE, "--target-dir", str(target)]
    subprocess.run(command, env=environment(asan), check=True)
    return target / TRIPLE / "release" / "locum-fuzz"


def unpack(packed: bytes) -> list[bytes]:
    """
    >>> unpack(pack([b"a", b"", b"bcd"]))
    [b'', b'a', b'bcd']
    """
    inputs = []
    while packed:
        end = 4 + int.from_bytes(packed[:4], "little")
        inputs.append(packed[4:end])
        packed = packed[end:]
    return inputs


def pack(inputs: list[bytes]) -> bytes:
    ordered = sorted(set(inputs), key=lambda i: (len(i), i))
    return b"".join(len(i).to_bytes(4, "little") + i for i in ordered)


def fill(folder: Path, door: str) -> Path:
    """A folder with the kept inputs of a door."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    packed = CORPUS / f"{door}.bin"
    for number, content in enumerate(unpack(packed.read_bytes()) if packed.exists() else []):
        (folder / f"kept-{number}").write_bytes(content)
    return folder


WATCHED = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=0:allocator_may_return_null=1",
    "LSAN_OPTIONS": f"suppressions={HERE}/lsan.supp:print_suppressions=0",
}


def libfuzzer(program: Path, door: str, arguments: list[str], work: Path) -> tuple[int, str]:
    temporary = work / "tmp" / door
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    env = {**os.environ, **WATCHED, "LOCUM_FUZZ_DOOR": door, "TMPDIR": str(temporary)}
    said = subprocess.run([str(program), *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    shutil.rmtree(temporary, ignore_errors=True)
    return said.returncode, said.stdout.decode(errors="replace")


def last(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def fuzz(program: Path, door: str, seconds: int, work: Path, keep: bool) -> Ran:
    folder = fill(work / door, door)
    limits = [f"-max_len={DOORS[door]}", "-timeout=30", "-rss_limit_mb=6000"]
    to = [f"-artifact_prefix={work}/{door}-", "-print_final_stats=1", f"-max_total_time={seconds}"]
    status, text = libfuzzer(program, door, [*limits, *to, str(folder)], work)
    (work / f"{door}.log").write_text(text)
    executions = last(r"number_of_executed_units: (\d+)", text) or last(r"#(\d+)\s", text)
    ran = Ran(door, executions, last(r"cov: (\d+)", text), len(list(folder.iterdir())), seconds, "")
    if status != 0:
        ran.complaint = "\n".join(text.splitlines()[-40:])
    elif keep:
        merged = work / f"{door}-merged"
        shutil.rmtree(merged, ignore_errors=True)
        merged.mkdir()
        status, text = libfuzzer(program, door, ["-merge=1", *limits, str(merged), str(folder)], work)
        if status != 0:
            ran.complaint = f"merging: {text[-2000:]}"
        else:
            inputs = [path.read_bytes() for path in merged.iterdir()]
            (CORPUS / f"{door}.bin").write_bytes(pack(inputs))
            ran.inputs = len(inputs)
    return ran


# Hosts in C and C++, with what follows their store's folder.
TINY = ROOT / "tests/fixtures/stores/0.1.0/store/base/tiny"
HOSTS: dict[str, list[Path]] = {
    "host-examples/c/journey.c": [TINY],
    "host-examples/cpp/journey.cpp": [],
    "tests/abi/misuse.c": [],
    "tests/abi/callbacks.c": [],
    "tests/abi/replay.c": [TINY, CORPUS / "abi.bin"],
}


def host(source: str, arguments: list[Path], target: Path, work: Path) -> str:
    """Builds a host and its library's loader with AddressSanitizer, and runs it; what it complained of, or nothing."""
    sysroot = subprocess.run(["rustc", "--print", "sysroot"], stdout=subprocess.PIPE, check=True, text=True).stdout.strip()
    runtime = Path(sysroot) / "lib/rustlib" / TRIPLE / "lib/librustc-stable_rt.asan.a"
    libraries = target / TRIPLE / "release/deps"
    scene = work / "hosts" / Path(source).stem
    shutil.rmtree(scene, ignore_errors=True)
    scene.mkdir(parents=True)
    # The name that the loader looks for is the library's SONAME.
    (scene / "liblocum.so.0").symlink_to(libraries / "liblocum.so")
    compiler, standard = ("c++", "-std=c++17") if source.endswith("pp") else ("cc", "-std=c11")
    common = [standard, "-g", "-O1", "-pthread", f"-I{ROOT}/plugin-api/include", f"-I{ROOT}/tests/abi"]
    # The compiler's own runtime would be a second one beside that of the library.
    subprocess.run([compiler, *common, "-fsanitize=address", "-c", str(ROOT / source), "-o", str(scene / "host.o")], check=True)
    link = ["-Wl,--whole-archive", str(runtime), "-Wl,--no-whole-archive", "-rdynamic", f"-L{scene}", "-l:liblocum.so.0"]
    subprocess.run([compiler, str(scene / "host.o"), *link, "-o", str(scene / "host"), "-pthread", "-ldl", "-lm", "-lrt"], check=True)
    env = {**os.environ, **WATCHED, "LD_LIBRARY_PATH": str(scene)}
    command = [str(scene / "host"), str(scene / "store"), *map(str, arguments)]
    said = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = said.stdout.decode(errors="replace")
    return "" if said.returncode == 0 and text.endswith("done\n") else f"{source}: {said.returncode}\n{text[-6000:]}"


def main() -> int:
    p = argparse.ArgumentParser(prog="run.py", description=__doc__.splitlines()[0])
    p.add_argument("doors", nargs="*", default=list(DOORS), help=f"default: {' '.join(DOORS)}")
    p.add_argument("--seconds", type=int, default=60, help="of each door (default: 60)")
    p.add_argument("--asan", action="store_true", help="with AddressSanitizer, in Rust, C and C++ alike")
    p.add_argument("--keep", action="store_true", help="write what was worth keeping to tests/fuzz/corpus")
    p.add_argument("--target", type=Path, default=ROOT / "target")
    p.add_argument("--cargo", default="cargo")
    p.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="doors open at a time (default: one a core)")
    options = p.parse_args()
    if unknown := set(options.doors) - set(DOORS):
        p.error(f"{', '.join(unknown)}: the doors are {', '.join(DOORS)}")
    target = (options.target / ("asan" if options.asan else "fuzz")).resolve()
    program = build(target, options.cargo, options.asan)
    work = target / "work"
    work.mkdir(parents=True, exist_ok=True)
    print(f"== {len(options.doors)} doors, {options.seconds} s each, {options.at_once} at a time", flush=True)
    bad = 0
    print(f"{'door':<12} {'executions':>11} {'a second':>9} {'edges':>7} {'inputs':>7}")
    with ThreadPoolExecutor(options.at_once) as pool:
        for ran in pool.map(lambda door: fuzz(program, door, options.seconds, work, options.keep), options.doors):
            rate = ran.executions / max(ran.seconds, 1)
            print(f"{ran.door:<12} {ran.executions:>11} {rate:>9.0f} {ran.edges:>7} {ran.inputs:>7}", flush=True)
            if ran.complaint:
                bad += 1
                print(f"{ran.complaint}\n== {ran.door}: the input lies in {work}/{ran.door}-*", file=sys.stderr, flush=True)
    for source, arguments in HOSTS.items() if options.asan else []:
        complaint = host(source, arguments, target, work)
        print(f"{source}: {'no error' if not complaint else complaint}", flush=True)
        bad += bool(complaint)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
