"""Builds locum.dll on Linux and runs hosts' whole journey with it under Wine.

Fetches by package name what it needs of a Debian-like system into .cache/windows, without root and without installing anything: a Rust
compiler with the standard library's source, the mingw-w64 compilers, Wine. Then it compiles `locum.dll` and `locum.exe`, checks that the
library needs nothing but the system's own DLLs and exports nothing but `locum_*`, and runs host-examples/c/journey.c and killed.c.

    python tests/windows/build.py --cache .cache --target target
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TRIPLE = "x86_64-pc-windows-gnu"
# The compiler must be of the same version as the source of the standard library, which is compiled for Windows here.
PACKAGES = ["rustc-web", "cargo-web", "rust-web-src", "g++-mingw-w64-x86-64-posix", "wine64"]
# Of these all that is needed is fetched, also where the machine has some of them; of others what the machine does not have.
OURS = re.compile(r"rust|cargo|mingw|wine")
# What every Windows has; `api-ms-win-` are names under which it offers parts of kernel32.
SYSTEM_DLLS = {"advapi32", "bcrypt", "bcryptprimitives", "kernel32", "msvcrt", "ntdll", "ole32", "shell32", "userenv", "ws2_32"}
# Milliseconds between the twentieth confirmation of a recording host and its end: each is a round.
KILLED_AFTER_MS = [0, 1, 3, 7, 13, 29]


class Tools:
    """The folder with the unpacked packages, and how its programs are called."""

    def __init__(self, folder: Path) -> None:
        self.usr = folder.resolve() / "root" / "usr"
        self.prefix = folder.resolve() / "prefix"
        libraries = self.usr / "lib" / "x86_64-linux-gnu"
        self.env = os.environ | {"LD_LIBRARY_PATH": str(libraries), "PATH": f"{self.usr / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def mingw(self, name: str) -> str:
        return str(self.usr / "bin" / f"x86_64-w64-mingw32-{name}")

    def cargo(self, target: Path, *arguments: str) -> None:
        under = TRIPLE.replace("-", "_")
        env = self.env | {
            # Unlocks -Zbuild-std, for this build alone.
            "RUSTC_BOOTSTRAP": "1",
            "RUSTC": str(self.usr / "bin" / "rustc"),
            "CARGO_TARGET_DIR": str(target.resolve()),
            f"CC_{under}": self.mingw("gcc-posix"),
            f"CXX_{under}": self.mingw("g++-posix"),
            f"AR_{under}": self.mingw("ar"),
            f"CARGO_TARGET_{under.upper()}_LINKER": str(HERE / "linker.py"),
            f"CARGO_TARGET_{under.upper()}_RUSTFLAGS": "-Ctarget-feature=+crt-static",
            "LOCUM_WINDOWS_LINKER": self.mingw("g++-posix"),
        }
        command = [self.usr / "bin" / "cargo", *arguments, "--locked", "--target", TRIPLE, "-Zbuild-std=std,panic_unwind"]
        subprocess.run(command, cwd=ROOT, env=env, check=True)

    def wine(self, folder: Path, *command: str, seconds: int = 600) -> str:
        """Runs a program of `folder` in it, and gives what it printed; what goes wrong ends everything with that."""
        wine = self.usr / "lib" / "wine" / "wine64"
        env = self.env | {
            "WINEPREFIX": str(self.prefix),
            "WINEDEBUG": "-all",
            # Neither .NET nor a browser is asked for when the prefix is made.
            "WINEDLLOVERRIDES": "mscoree,mshtml=",
        }
        try:
            done = subprocess.run([wine, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as late:
            sys.exit(f"{' '.join(command)} did not end in {seconds} s; it had printed:\n{(late.stdout or b'').decode()}")
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def version(self) -> str:
        done = subprocess.run([self.usr / "lib" / "wine" / "wine64", "--version"], env=self.env, capture_output=True, text=True, check=True)
        return done.stdout.strip()


def fetch(folder: Path) -> Tools:
    """The packages, unpacked; once fetched, apt is not asked again."""
    marker = folder / "packages.txt"
    wanted = " ".join(PACKAGES)
    if not (marker.exists() and marker.read_text().startswith(wanted + "\n")):
        for program in ["apt-get", "dpkg"]:
            if not shutil.which(program):
                sys.exit(
                    f"make windows needs a Debian-like machine: there is no {program} here, with which it fetches {', '.join(PACKAGES)} "
                    f"into {folder}. Elsewhere: `cargo build --release -p locum-plugin --target {TRIPLE}` with a Rust that has that target "
                    "and mingw-w64 (posix threads)."
                )
        packages = needed()
        print(f"== fetching {len(packages)} packages, about 320 MB, into {folder}", flush=True)
        shutil.rmtree(folder / "root", ignore_errors=True)
        boxes = folder / "packages"
        shutil.rmtree(boxes, ignore_errors=True)
        boxes.mkdir(parents=True)
        apt(["-qq", "download", *packages], cwd=boxes)
        for box in sorted(boxes.glob("*.deb")):
            subprocess.run(["dpkg", "-x", box, folder / "root"], check=True)
        shutil.rmtree(boxes)
        settle_wine(folder / "root" / "usr")
        marker.write_text("\n".join([wanted, *packages, ""]))
    return Tools(folder)


def settle_wine(usr: Path) -> None:
    """What an installation of Wine does besides unpacking."""
    # Debian's is a script that looks for the server at its installed place.
    server = usr / "lib" / "wine" / "wineserver"
    server.unlink()
    server.symlink_to("wineserver64")
    # user32 needs it, and Wine looks beside user32.
    zlib = usr / "lib" / "x86_64-linux-gnu" / "wine" / "x86_64-windows" / "zlib1.dll"
    if not zlib.exists():
        zlib.symlink_to("../../../../x86_64-w64-mingw32/lib/zlib1.dll")


def needed() -> list[str]:
    """Names with versions of all that must be unpacked."""
    install = ["--simulate", "--no-install-recommends", "install", *PACKAGES]
    missing = dict(re.findall(r"^Inst (\S+) (?:\[\S+\] )?\((\S+)", apt(install), re.M))
    # As if nothing were installed: dependencies that are there already are listed as well.
    everything = dict(re.findall(r"^Inst (\S+) \((\S+)", apt(["-o", "Dir::State::status=/dev/null", *install]), re.M))
    chosen = missing | {name: version for name, version in everything.items() if OURS.search(name)}
    return [f"{name}={version}" for name, version in sorted(chosen.items())]


def apt(arguments: list[str], cwd: Path | None = None) -> str:
    # As root apt would hand its work to a user of its own, who may not write here.
    done = subprocess.run(["apt-get", "-o", "APT::Sandbox::User=root", *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(
            f"apt-get {' '.join(arguments)} failed:\n{done.stderr}"
            f"make windows fetches {', '.join(PACKAGES)} (Debian 12 with its security updates has them); if apt does not know one of them, "
            "`apt-get update` as root first."
        )
    return done.stdout


def build(tools: Tools, target: Path) -> Path:
    """The folder with `locum.dll` and `locum.exe`."""
    print(f"== compiling locum.dll and locum.exe for {TRIPLE}, the standard library too (some ten minutes the first time)", flush=True)
    tools.cargo(target, "build", "--release", "--quiet", "-p", "locum-plugin", "-p", "locum", "--lib", "--bin", "locum")
    return target / TRIPLE / "release"


def check_library(tools: Tools, library: Path) -> str:
    """Ends everything if the library needs or exports what it should not; else a sentence."""
    said = subprocess.run([tools.mingw("objdump"), "-p", library], capture_output=True, text=True, check=True).stdout
    imports = sorted(set(re.findall(r"DLL Name: (\S+)", said)))
    strange = [dll for dll in imports if not dll.startswith("api-ms-win-") and dll.lower().removesuffix(".dll") not in SYSTEM_DLLS]
    if strange or not imports:
        sys.exit(f"{library} needs {strange} besides the system's own DLLs; it imports {imports}")
    table = said.split("[Ordinal/Name Pointer] Table")[1].split("\n\n")[0]
    exports = re.findall(r"\]\s+(?:\+base\[\s*\d+\]\s+\w+\s+)?(\S+)$", table, re.M)
    declared = re.findall(r"^LOCUM_API .*?\b(locum_\w+)\(", (ROOT / "plugin-api/include/locum.h").read_text(), re.M)
    if sorted(exports) != sorted(declared):
        sys.exit(f"{library} exports {sorted(set(exports) ^ set(declared))} otherwise than locum.h declares")
    return f"needs {', '.join(imports)} and nothing else; exports the {len(exports)} functions of locum.h and nothing else"


def journey(tools: Tools, built: Path, work: Path) -> list[str]:
    """Runs the hosts in a folder of their own; sentences of what was seen."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in ["locum.dll", "locum.exe"]:
        shutil.copy(built / name, work)
    warnings = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", "-I", str(ROOT / "plugin-api" / "include")]
    for source in [ROOT / "host-examples/c/journey.c", HERE / "killed.c"]:
        program = work / f"{source.stem}.exe"
        subprocess.run([tools.mingw("gcc-posix"), *warnings, "-o", program, source, work / "locum.dll"], check=True)
    stub = [tools.mingw("gcc-posix"), "-shared", "-o", work / "bcryptprimitives.dll", HERE / "bcryptprimitives.c", "-ladvapi32"]
    subprocess.run(stub, check=True)
    seen = []

    print(f"== the journey under {tools.version()}", flush=True)
    tools.wine(work, "locum.exe", "model", "tiny", "model", "--seed", "7")
    began = time.monotonic()
    said = tools.wine(work, "journey.exe", "store", "model")
    print(said, end="")
    if not said.endswith("done\n") or "steps by the student" not in said:
        sys.exit("the journey ended otherwise than expected")
    seen.append(f"journey.c recorded, distilled, swapped and reopened in {time.monotonic() - began:.0f} s")

    began = time.monotonic()
    ended, flushed = {}, {}
    for number, milliseconds in enumerate(KILLED_AFTER_MS):
        said = tools.wine(work, "killed.exe", "store", "model", str(number), str(milliseconds))
        ended |= {task: int(steps) for task, steps in re.findall(r"^ended (\S+) (\d+)$", said, re.M)}
        flushed |= {task: int(steps) for task, steps in re.findall(r"^flushed (\S+) (\d+)$", said, re.M)}
        print("\n".join(line for line in said.splitlines() if line.startswith(("decided", "an endless"))))
    seen.append(compare(tools, work, ended, flushed) + f", in {time.monotonic() - began:.0f} s")
    locum = ["locum.exe", "--store", "store"]
    print(tools.wine(work, *locum, "store", "check"), end="")

    # The same store by the command: a base of its own, and a candidate that the gate judges.
    tools.wine(work, *locum, "model", "import", "model", "--name", "tiny")
    job = json.loads(tools.wine(work, *locum, "--json", "distil", "run", "--tokens", "4000", "--max-seconds", "60").splitlines()[-1])
    if job["state"] not in ["held", "shadow"]:
        sys.exit(f"the command's distillation ended otherwise than expected: {job}")
    seen.append(f"the command's student was judged by the gate: {job['state']}, {job['message']}")
    tools.wine(work, *locum, "report", "-o", "report.html")
    print(tools.wine(work, *locum, "doctor"), end="")
    return seen


def compare(tools: Tools, work: Path, ended: dict[str, int], flushed: dict[str, int]) -> str:
    """What the store holds against what was confirmed before each end."""
    said = tools.wine(work, "locum.exe", "--store", "store", "--json", "episodes", "list", "--limit", "100000")
    found = {e["task_id"]: e for e in json.loads(said.splitlines()[-1])["episodes"]}
    for task, steps in ended.items():
        episode = found.get(task)
        if not episode or episode["teacher_steps"] != steps or episode["status"] != "success":
            sys.exit(f"{task} was confirmed with {steps} steps and a success; the store has {episode}")
    for task, steps in flushed.items():
        episode = found.get(task)
        if not episode or episode["teacher_steps"] < steps:
            sys.exit(f"{steps} steps of {task} were confirmed; the store has {episode}")
    opened = [task for task, episode in found.items() if not episode["closed"]]
    if opened or len(ended) < 20 * len(KILLED_AFTER_MS) // 2:
        sys.exit(f"{opened} are open after their process is gone, {len(ended)} were ended")
    unfinished = len(set(flushed) - set(ended))
    return f"{len(KILLED_AFTER_MS)} processes ended while they recorded, {len(ended)} episodes and {unfinished} unfinished ones as confirmed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--target", type=Path, default=Path("target"))
    args = parser.parse_args()
    began = time.monotonic()
    tools = fetch(args.cache / "windows")
    fetched = time.monotonic()
    built = build(tools, args.target)
    compiled = time.monotonic()
    library = built / "locum.dll"
    sentence = check_library(tools, library)
    bare = args.target / "windows" / "bare.dll"
    bare.parent.mkdir(exist_ok=True)
    subprocess.run([tools.mingw("strip"), "-o", bare, library], check=True)
    sizes = f"{library.stat().st_size / 1e6:.1f} MB, {bare.stat().st_size / 1e6:.1f} without line numbers"
    print(f"== {library}: {sizes}; {sentence}", flush=True)
    seen = journey(tools, built, args.target / "windows")
    for line in seen:
        print(f"== {line}")
    print(
        f"== make windows: fetched in {fetched - began:.0f} s, compiled in {compiled - fetched:.0f} s, "
        f"run under {tools.version()} in {time.monotonic() - compiled:.0f} s"
    )


if __name__ == "__main__":
    main()
