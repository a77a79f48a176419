"""Locum beside llama.cpp and PyTorch on this processor, one run of each in turn; writes cpu.json, cpu.md and cpu.svg beside itself.

usage: run.py --locum BINARY --gguf FILE [--rows KEY,...] [--peers none] [--runs N] [--cache DIR] [--out DIR]
              [--llama-python PY] [--llama-dir DIR] [--llama-avx2-dir DIR] [--torch-python PY] [--lock FILE] [--render]

Every run is a process of its own. Peers that are not named are installed under the cache folder. Rows measured earlier stay in
cpu.json until they are measured again; each carries its own time and commit. A run that fails is written down as failed.
"""

import argparse
import contextlib
import datetime
import fcntl
import html
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LLAMA = "llama-cpp-python==0.3.36"
NATIVE = "-DGGML_NATIVE=ON"
AVX2 = "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=OFF"
LIMIT_S = 900
WEAK = 0.75


# --- what is measured ---

class Side:
    """One of the programs of a row: who, in which numbers, and the command that prints its figures as JSON on its last line."""

    def __init__(self, who, label, kind, args):
        self.who, self.label, self.kind, self.args = who, label, kind, args


def ours(label, *args):
    return Side("Locum", label, "locum", list(args))


def llama(label, *args, build="llama"):
    return Side("llama.cpp", label, build, [args[0], label, *args[1:]])


def torch(label, *args):
    return Side("PyTorch", label, "torch", list(args))


class Row:
    """`pairs`: label of ours -> labels of the peer that it is held against, of which the best counts; all of them if absent."""

    def __init__(self, key, title, sides, value="tok_s", unit="tok/s", less=False, pairs=None, note="", also=()):
        self.key, self.title, self.sides, self.value, self.unit = key, title, sides, value, unit
        self.less, self.pairs, self.note = less, pairs or {}, note
        # (key, title, value, note) of further figures that the same runs print.
        self.also = also


def prefill(key, tokens, build="llama", isa=(), ubatch="512"):
    formats = ["Q4_0", "Q8_0", "BF16", "F16"]
    weights = ["q8", "q4"] if isa else ["q8", "q4", "bf16", "f32"]
    return Row(
        key,
        f"prefill {tokens}" + (", AVX2" if isa else ""),
        [llama(f, "prefill", "--tokens", str(tokens), "--try", "flash=0,1", f"ubatch={ubatch}", build=build) for f in formats]
        + [ours(w, "prefill", "--weights", w, "--tokens", str(tokens), "--runs", "3", *isa) for w in weights],
        note="each format of ours against the peer's fastest",
    )


def decode(key, build="llama", isa=()):
    pairs = {"q8": ["Q8_0"], "q4": ["Q4_0"]} | ({} if isa else {"bf16": ["BF16"]})
    return Row(
        key,
        "decode 128" + (", AVX2" if isa else ""),
        [llama(f, "decode", "--try", "flash=0,1", build=build) for fs in pairs.values() for f in fs]
        + [ours(w, "decode", "--weights", w, "--runs", "3", *isa) for w in pairs],
        pairs=pairs,
        note="after a prompt of 32",
    )


def batch():
    pairs = {"q8": ["Q8_0"], "q4": ["Q4_0"]}
    return Row(
        "batch",
        "decode, 8 sequences",
        [llama(f, "batch", "--try", "flash=0,1", "unified=0,1") for f in ["Q8_0", "Q4_0"]]
        + [ours(w, "batch", "--weights", w, "--runs", "3") for w in pairs],
        pairs=pairs,
        note="8 x 64 generated tokens over the seconds after the prompts of 128 were read",
        also=[
            (
                "batch-whole",
                "8 x (128 read + 64 written)",
                "with_prefill_tok_s",
                "the same tokens over all seconds, prompts included",
            )
        ],
    )


def train(key, title, method):
    return Row(
        key,
        title,
        [
            torch("bf16", method, "bf16", "--steps", "2"),
            torch("f32", method, "f32", "--steps", "2"),
            ours("default", "train", "--method", method, "--runs", "2"),
        ],
        note="4 x 512 tokens a step, loss on every token",
    )


OLDER = ("--isa", "avx2")
ROWS = [
    prefill("prefill-512", 512),
    prefill("prefill-2048", 2048, ubatch="512,2048"),
    decode("decode"),
    batch(),
    train("lora", "LoRA r = 16, all linear", "lora"),
    train("upper", "upper 15 layers, cached lower outputs", "upper"),
    train("full", "full fine-tuning", "full"),
    Row(
        "lora-memory",
        "peak memory of LoRA",
        [
            torch("bf16, checkpointing", "lora", "bf16", "--checkpointing", "--steps", "1"),
            ours("1 GiB allowed", "train", "--method", "lora", "--runs", "1", "--memory-mib", "1024"),
        ],
        value="peak_bytes",
        unit="GiB",
        less=True,
        note="whole process, 4 x 512 tokens, two steps",
    ),
    Row(
        "step",
        "step at turn 20 / turn 2",
        [
            ours(w + shown, "step", "--weights", w, "--runs", "5", *flags)
            for w in ("q8", "q4")
            for shown, flags in (("", []), (", turns", ["--turns"]))
        ],
        value="ratio",
        unit="x",
        less=True,
        note="the host sends the whole history each time; the default view shows the last six calls, a view of turns all of it",
    ),
    Row(
        "serve",
        "p99 of a step, training / idle",
        [ours("q8", "serve-while-training", "--weights", "q8", "--method", "lora")],
        value="ratio",
        unit="x",
        less=True,
    ),
    prefill("prefill-512-avx2", 512, build="llama-avx2", isa=OLDER),
    decode("decode-avx2", build="llama-avx2", isa=OLDER),
]


# --- setting up ---

def say(text):
    print(text, flush=True)


def sh(command, **more):
    say("   $ " + " ".join(map(str, command)))
    subprocess.run(list(map(str, command)), check=True, **more)


class Place:
    """Where the programs and the models are; what is missing is installed or made when a row asks for it."""

    def __init__(self, args):
        self.args = args
        self.cache = pathlib.Path(args.cache).absolute()
        self.ready = {}

    def venv(self):
        python = self.cache / "bench-venv/bin/python"
        if not python.exists():
            sh([sys.executable, "-m", "venv", self.cache / "bench-venv"])
        return python

    def pip(self, mark, packages, target=None, cmake=None):
        """Installs once; the mark says that it went through."""
        python = self.venv()
        done = (target or self.cache / "bench-venv") / f".{mark}"
        if not done.exists():
            env = os.environ | ({"CMAKE_ARGS": cmake} if cmake else {})
            where = ["--target", target] if target else []
            sh([python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *where, *packages], env=env)
            done.touch()
        return str(python)

    def llama(self, build):
        named = self.args.llama_dir if build == "llama" else self.args.llama_avx2_dir
        target = pathlib.Path(named) if named else self.cache / f"bench-{build}"
        python = self.args.llama_python
        if not named:
            cmake = NATIVE if build == "llama" else AVX2
            python = python or self.pip(build, [LLAMA], target, cmake)
        return [python or sys.executable, HERE / "llama_peer.py"], {"PYTHONPATH": str(target)}

    def gguf(self, kind):
        path = self.cache / f"bench-gguf/{kind}.gguf"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            command, env = self.llama("llama")
            part = path.with_suffix(".part")
            sh([*command, "quantize", self.args.gguf, part, kind], env=os.environ | env)
            part.rename(path)
        return path

    def torch(self):
        python = self.args.torch_python
        if not python:
            python = self.pip("torch", ["torch", "transformers", "peft", "gguf", "numpy"])
        return [python, HERE / "torch_peer.py"]

    def store(self):
        store = self.cache / "bench"
        if not (store / "base").exists():
            sh([self.args.locum, "--store", store, "model", "import", self.args.gguf])
        return store

    def command(self, side):
        """Command and environment; installs and converts at the first call of a kind, outside of what is timed."""
        threads = ["--threads", str(self.args.threads)]
        if side.kind == "locum":
            command = [self.args.locum, "--store", self.store(), "bench", *side.args, *threads, "--json"]
            return command, {}
        if side.kind == "torch":
            method, compute, *more = side.args
            return [*self.torch(), method, compute, self.args.gguf, *threads, *more], {}
        command, env = self.llama(side.kind)
        what, kind, *more = side.args
        # What is tried settles at the first run; the others then measure the best of it alone.
        if side.label in self.ready.get((side.kind, what, tuple(more)), {}):
            chosen = self.ready[(side.kind, what, tuple(more))][side.label]
            more = [m for m in more[: more.index("--try") + 1]] + [f"{k}={v}" for k, v in chosen.items()]
        return [*command, what, self.gguf(kind), *threads, *more], env

    def settle(self, side, result):
        if side.kind.startswith("llama") and "options" in result:
            what, _, *more = side.args
            self.ready.setdefault((side.kind, what, tuple(more)), {})[side.label] = result["options"]


# --- measuring ---

def busy_jiffies():
    fields = list(map(int, open("/proc/stat").readline().split()[1:9]))
    user, nice, system, _idle, _wait, irq, softirq, steal = fields
    return user + nice + system + irq + softirq + steal, steal


def own_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def alone(lock):
    """Holds the lock file, if one is named, so that other work that takes it too waits for the end of a run."""
    if not lock:
        yield
        return
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure(command, env):
    """Runs once and gives what the program printed, with how much of the machine others had meanwhile."""
    tick, cores = os.sysconf("SC_CLK_TCK"), os.cpu_count()
    (busy, steal), own, began = busy_jiffies(), own_seconds(), time.monotonic()
    try:
        done = subprocess.run(
            list(map(str, command)), env=os.environ | env, capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no result within {LIMIT_S} s"}
    except OSError as error:
        return {"failed": str(error)}
    wall = time.monotonic() - began
    (busy_after, steal_after), own_after = busy_jiffies(), own_seconds()
    others = max(0.0, (busy_after - busy) / tick - (own_after - own)) / (wall * cores)
    disturbed = {"others": round(others, 3), "stolen": round((steal_after - steal) / tick / (wall * cores), 3), "wall_s": round(wall, 1)}
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
    except (IndexError, ValueError):
        result = {"failed": f"status {done.returncode}"}
    if done.returncode != 0 or "failed" in result or "error" in result:
        words = (done.stderr.strip().splitlines() or [""])[-1]
        why = result.get("error") or " ".join(filter(None, [result.get("failed"), words]))
        result = {"failed": why.replace(str(ROOT), ".").replace(str(pathlib.Path.home()), "~")[:200]}
    return result | disturbed


def first_row(result):
    """Engines report a row for each format of weights; the other modes have none."""
    rows = result.get("rows")
    return rows[0] if isinstance(rows, list) and rows else {}


def detail(side, result):
    """What is kept of a run beside its figure."""
    row = first_row(result)
    keep = {k: result[k] for k in ("peak_bytes", "options", "others", "stolen", "wall_s", "losses", "trained_tok_s") if k in result}
    keep |= {k: row[k] for k in ("kernels", "limit_share", "weight_bytes") if k in row}
    keep |= {k: v for k, v in result.items() if k.endswith("_ms") and isinstance(v, float)}
    keep |= {"limits": result["limits"]} if "limits" in result else {}
    return keep


def figure(row, key, result):
    value = result.get(key, first_row(result).get(key))
    return value / 2**30 if row.unit == "GiB" and value is not None else value


def measure_row(row, place, args):
    sides = [s for s in row.sides if args.peers != "none" or s.who == "Locum"]
    runs = {id(s): [] for s in sides}
    # In turn: one of theirs, one of ours.
    peers, mine = [s for s in sides if s.who != "Locum"], [s for s in sides if s.who == "Locum"]
    order = [s for pair in zip_longest(peers, mine) for s in pair if s]
    failed, weak = {}, set()
    for n in range(args.runs):
        for side in order:
            if id(side) in failed or id(side) in weak:
                continue
            try:
                command, env = place.command(side)
            except (subprocess.CalledProcessError, OSError) as error:
                failed[id(side)] = f"it could not be set up: {error}"[:200]
                continue
            with alone(args.lock):
                result = measure(command, env)
            if "failed" in result:
                failed[id(side)] = result["failed"]
                say(f"   {row.key} {n + 1}/{args.runs} {side.who} {side.label}: failed: {result['failed']}")
                continue
            place.settle(side, result)
            value = figure(row, row.value, result)
            runs[id(side)].append(result)
            say(f"   {row.key} {n + 1}/{args.runs} {side.who} {side.label}: {value:.3g} {row.unit} (others {result['others']:.0%})")
        # A format of the peer's that is far behind its best after a run cannot be the one that counts.
        if n == 0 and not row.pairs and not row.less and row.key.startswith("prefill"):
            first = {id(s): figure(row, row.value, runs[id(s)][0]) for s in peers if runs[id(s)]}
            weak = {i for i, value in first.items() if value < WEAK * max(first.values())}
    rows = [summary(row, row.key, row.title, row.value, row.note, sides, runs, failed, args)]
    for key, title, value, note in row.also:
        rows.append(summary(row, key, title, value, note, sides, runs, failed, args))
    return rows


def summary(row, key, title, value, note, sides, runs, failed, args):
    out = {"key": key, "title": title, "unit": row.unit, "less_is_better": row.less, "note": note}
    out |= {"at": now(), "commit": commit(), "threads": args.threads, "sides": []}
    for side in sides:
        own = [{"value": figure(row, value, result)} | detail(side, result) for result in runs[id(side)]]
        values = [r["value"] for r in own]
        entry = {"who": side.who, "label": side.label, "runs": own}
        if values:
            entry |= {"median": statistics.median(values), "min": min(values), "max": max(values)}
        if id(side) in failed:
            entry["failed"] = failed[id(side)]
        out["sides"].append(entry)
    out["ratios"] = ratios(row, out["sides"])
    return out


def zip_longest(a, b):
    return [(a[i] if i < len(a) else None, b[i] if i < len(b) else None) for i in range(max(len(a), len(b)))]


def ratios(row, sides):
    """Ours over the best of the peer's formats that it is held against; above 1 is faster, or for memory below 1 is smaller."""
    usable = [s for s in sides if "median" in s and "failed" not in s]
    found = []
    for mine in (s for s in usable if s["who"] == "Locum"):
        against = row.pairs.get(mine["label"])
        peers = [s for s in usable if s["who"] != "Locum" and (against is None or s["label"] in against)]
        if not peers:
            continue
        best = (min if row.less else max)(peers, key=lambda s: s["median"])
        pairs = [m["value"] / p["value"] for m, p in zip(mine["runs"], best["runs"])]
        found.append(
            {
                "ours": mine["label"],
                "peer": f"{best['who']} {best['label']}",
                "of_medians": mine["median"] / best["median"],
                "median_of_pairs": statistics.median(pairs),
            }
        )
    return found


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def commit():
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return (done.stdout.strip() or "unknown") + ("+" if dirty.stdout.strip() else "")


def machine():
    model = [l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")]
    flags = next((l for l in open("/proc/cpuinfo") if l.startswith("flags")), "").split()
    memory = next(l for l in open("/proc/meminfo") if l.startswith("MemTotal")).split()[1]
    known = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "processor": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory) / 2**20, 1),
        "features": [f for f in known if f in flags],
    }


# --- showing ---

def shown(value, unit):
    return f"{value:,.0f}" if unit == "tok/s" else f"{value:.2f}"


def disturbance(runs):
    return statistics.median(r["others"] for r in runs) if runs else 0.0


def table(data):
    m = data["machine"]
    lines = [
        "# Locum beside its peers on a processor",
        "",
        "Written by `make bench` ([run.py](run.py)); the raw figures are in [cpu.json](cpu.json).",
        "",
        f"{m['processor']}, {m['cores']} cores ({', '.join(m['features'])}), {m['memory_gib']} GiB; SmolLM2-135M, {data['threads']} threads.",
        f"Peers: llama.cpp as in {LLAMA}, built on this machine; PyTorch with transformers and PEFT.",
        "Every run is a process of its own, theirs and ours in turn; medians with lowest and highest.",
        "The ratio is ours over the peer's best format of the row, of medians and as the median of pairs that ran one after the other.",
        "“Others” is the median share of the machine's time that other processes had during the runs: above a few percent both sides are slower than they could be.",
        "",
        "![ratios](cpu.svg)",
        "",
        "| row | who | median | lowest | highest | n | ratio | of pairs | others |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in data["rows"]:
        found = {r["ours"]: r for r in row["ratios"]}
        for n, side in enumerate(row["sides"]):
            title = f"**{row['title']}**, {row['unit']}" if n == 0 else ""
            name = f"{side['who']} {side['label']}"
            if "failed" in side:
                lines.append(f"| {title} | {name} | failed: {side['failed'].replace('|', '/')} | | | {len(side['runs'])} | | | |")
                continue
            ratio = found.get(side["label"]) if side["who"] == "Locum" else None
            cells = [shown(side[k], row["unit"]) for k in ("median", "min", "max")]
            cells += [str(len(side["runs"]))]
            cells += [f"**{ratio['of_medians']:.2f}**", f"{ratio['median_of_pairs']:.2f}"] if ratio else ["", ""]
            lines.append(f"| {title} | {name} | {' | '.join(cells)} | {disturbance(side['runs']):.0%} |")
    lines += ["", "## How each row is counted", ""]
    lines += [f"- {row['title']}: {row['note']}." for row in data["rows"] if row["note"]]
    lines += ["", "## When", "", "| row | measured | commit |", "| --- | --- | --- |"]
    lines += [f"| {row['title']} | {row['at']} | {row['commit']} |" for row in data["rows"]]
    shares = [
        (row, side, [r["limit_share"] for r in side["runs"] if r.get("limit_share")])
        for row in data["rows"]
        for side in row["sides"]
        if side["who"] == "Locum"
    ]
    if any(s for *_, s in shares):
        lines += [
            "",
            "## Locum against the machine's limits",
            "",
            "Prefill: operations over the measured rate of the widest multiply-add of these numbers; decoding: bytes of weights over the measured read bandwidth.",
            "Weights that fit the last-level cache can be read faster than memory.",
            "",
            "| row | weights | kernels | share |",
            "| --- | --- | --- | --: |",
        ]
        lines += [
            f"| {row['title']} | {side['label']} | {side['runs'][0].get('kernels', '')} | {statistics.median(s):.0%} |"
            for row, side, s in shares
            if s
        ]
    return "\n".join(lines) + "\n"


def drawing(data):
    """A bar for each ratio, with a line where the peer stands."""
    bars = [(row, r) for row in data["rows"] for r in row["ratios"]]
    left, width, line, top = 330, 380, 22, 46
    most = max([2.0, *(r["of_medians"] for _, r in bars)])
    x = lambda value: left + width * value / most
    height = top + line * max(1, len(bars)) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {height}" font-family="system-ui, sans-serif" font-size="12" role="img">',
        "<title>Locum over the best peer of each row</title>",
        "<style>",
        "text { fill: #24292f } .soft { fill: #57606a } .win { fill: #1a7f37 } .loss { fill: #bc4c00 } line { stroke: #57606a }",
        "@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .soft { fill: #9198a1 } .win { fill: #3fb950 } .loss { fill: #f0883e } line { stroke: #9198a1 } }",
        "</style>",
        '<text x="10" y="20" font-size="14">Locum over its best peer: ratio of medians, above 1 is faster (memory: below 1 is smaller)</text>',
    ]
    last = None
    for n, (row, r) in enumerate(bars):
        y = top + line * n
        name = f"{row['title']}: {r['ours']}" if r["ours"] != "default" else row["title"]
        win = (r["of_medians"] < 1) == row["less_is_better"]
        parts.append(f'<text x="{left - 10}" y="{y + 12}" text-anchor="end">{html.escape(name)}</text>')
        parts.append(
            f'<rect x="{left}" y="{y + 1}" width="{x(r["of_medians"]) - left:.1f}" height="{line - 7}" rx="2" class="{"win" if win else "loss"}"/>'
        )
        note = f'{r["of_medians"]:.2f}'
        parts.append(f'<text x="{x(r["of_medians"]) + 6:.1f}" y="{y + 12}">{note}<tspan class="soft"> of {html.escape(r["peer"])}</tspan></text>')
        last = y
    if last is None:
        parts.append(f'<text x="10" y="{top + 12}" class="soft">No peer was measured.</text>')
    else:
        parts.append(f'<line x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{top - 8}" y2="{last + line}" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{x(1):.1f}" y="{last + line + 16}" text-anchor="middle" class="soft">1 = the peer</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def write(out, name, text):
    part = out / (name + ".part")
    part.write_text(text)
    part.rename(out / name)


def show(out, data):
    keys = [key for row in ROWS for key in (row.key, *(a[0] for a in row.also))]
    order = {key: n for n, key in enumerate(keys)}
    data["rows"].sort(key=lambda row: order.get(row["key"], len(order)))
    write(out, "cpu.json", json.dumps(data, indent=1) + "\n")
    write(out, "cpu.md", table(data))
    write(out, "cpu.svg", drawing(data))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--locum")
    parser.add_argument("--gguf")
    parser.add_argument("--rows", default=os.environ.get("BENCH_ONLY", ""), help="keys, with commas; a part of a key will do")
    parser.add_argument("--peers", choices=["all", "none"], default="all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", default=str(ROOT / ".cache"))
    parser.add_argument("--out", default=str(HERE))
    parser.add_argument("--llama-python")
    parser.add_argument("--llama-dir")
    parser.add_argument("--llama-avx2-dir")
    parser.add_argument("--torch-python")
    parser.add_argument("--lock", help="a file locked during each run, for machines that do other work between runs")
    parser.add_argument("--render", action="store_true", help="draw from cpu.json and measure nothing")
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "cpu.json"
    data = json.loads(kept.read_text()) if kept.exists() else {"rows": []}
    if args.render:
        return show(out, data)
    if not (args.locum and args.gguf):
        parser.error("--locum and --gguf say what is measured")
    args.locum, args.gguf = os.path.abspath(args.locum), os.path.abspath(args.gguf)
    wanted = [part for part in args.rows.replace(" ", ",").split(",") if part]
    exact = {row.key for row in ROWS}
    rows = [r for r in ROWS if not wanted or any(r.key == w or (w not in exact and w in r.key) for w in wanted)]
    if not rows:
        parser.error(f"no row is called {args.rows}; there are {', '.join(sorted(exact))}")
    if data.get("machine", machine()) != machine():
        say("== the figures kept are another machine's; starting anew")
        data = {"rows": []}
    data |= {"schema": 1, "machine": machine(), "threads": args.threads, "peers": LLAMA}
    place = Place(args)
    for row in rows:
        if args.peers == "none" and not any(s.who == "Locum" for s in row.sides):
            continue
        say(f"== {row.title}")
        measured = measure_row(row, place, args)
        fresh = {m["key"] for m in measured}
        data["rows"] = [r for r in data["rows"] if r["key"] not in fresh] + measured
        show(out, data)
        for r in measured[0]["ratios"]:
            say(f"   {r['ours']}: {r['of_medians']:.2f} of {r['peer']} (pairs {r['median_of_pairs']:.2f})")
    say(f"== {os.path.relpath(out / 'cpu.md')}")


if __name__ == "__main__":
    main()
