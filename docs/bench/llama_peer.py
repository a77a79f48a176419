"""llama.cpp through the low-level functions of llama-cpp-python, measured as `locum bench` measures Locum.

usage: llama_peer.py quantize SOURCE TARGET F16|Q4_0|Q8_0|BF16
       llama_peer.py prefill|decode|batch MODEL [--tokens N] [--runs N] [--threads N] [--try flash=0,1 ubatch=512,2048 unified=0,1]

Prints one JSON line: for every combination of the options the medians of its runs, and the best of them again on top.
Prompts are arbitrary ids, a warm-up goes first, and only the last position of a prompt gets logits, as in llama-bench.
"""

import argparse
import ctypes
import itertools
import json
import os
import statistics
import sys
import time

import llama_cpp as C

FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
SEQUENCES, BATCH_PROMPT, DECODE_PROMPT = 8, 128, 32


def quiet():
    callback = C.llama_log_callback(lambda level, text, data: None)
    C.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


def quantize(source, target, kind):
    params = C.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.allow_requantize = 2, FILE_TYPES[kind], True
    status = C.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if status != 0:
        sys.exit(f"llama_model_quantize: status {status}")


class Context:
    """A fresh context, and the one batch that every call reuses."""

    def __init__(self, model, args, room, sequences, flash, ubatch, unified):
        params = C.llama_context_default_params()
        params.n_ctx, params.n_seq_max = room * sequences, sequences
        params.n_batch, params.n_ubatch = max(2048, ubatch), ubatch
        params.n_threads = params.n_threads_batch = args.threads
        params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else C.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.kv_unified, params.no_perf = bool(unified), True
        self.ctx = C.llama_init_from_model(model, params)
        if not self.ctx:
            sys.exit("llama_init_from_model gave no context")
        self.batch = C.llama_batch_init(max(2048, room * sequences), 0, 1)

    def decode(self, items):
        """`items`: (token, position, sequence, whether logits are wanted)."""
        b = self.batch
        b.n_tokens = len(items)
        for i, (token, at, sequence, logits) in enumerate(items):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, at, 1, logits
            b.seq_id[i][0] = sequence
        status = C.llama_decode(self.ctx, b)
        C.llama_synchronize(self.ctx)
        if status != 0:
            sys.exit(f"llama_decode: status {status}")

    def clear(self):
        C.llama_memory_clear(C.llama_get_memory(self.ctx), False)

    def close(self):
        C.llama_batch_free(self.batch)
        C.llama_free(self.ctx)


def token(i, vocab):
    return (i * 7919 + 101) % vocab


def prefill(context, args, vocab):
    """A prompt of `tokens` in calls of at most 2048, the largest batch."""
    context.clear()
    items = [(token(i, vocab), i, 0, i == args.tokens - 1) for i in range(args.tokens)]
    began = time.perf_counter()
    for at in range(0, len(items), 2048):
        context.decode(items[at : at + 2048])
    return {"tok_s": args.tokens / (time.perf_counter() - began)}


def decode(context, args, vocab):
    context.clear()
    context.decode([(token(i, vocab), i, 0, i == DECODE_PROMPT - 1) for i in range(DECODE_PROMPT)])
    began = time.perf_counter()
    for i in range(args.tokens):
        context.decode([(token(i, vocab), DECODE_PROMPT + i, 0, True)])
    return {"tok_s": args.tokens / (time.perf_counter() - began)}


def batch(context, args, vocab):
    """Eight prompts in one call, then one token of each sequence a call."""
    context.clear()
    items = [
        (token(i + 1000 * s, vocab), i, s, i == BATCH_PROMPT - 1) for s in range(SEQUENCES) for i in range(BATCH_PROMPT)
    ]
    began = time.perf_counter()
    context.decode(items)
    read = time.perf_counter()
    for i in range(args.tokens):
        context.decode([(token(i + s, vocab), BATCH_PROMPT + i, s, True) for s in range(SEQUENCES)])
    ended = time.perf_counter()
    generated = SEQUENCES * args.tokens
    return {"tok_s": generated / (ended - read), "with_prefill_tok_s": generated / (ended - began)}


def peak_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main():
    if sys.argv[1] == "quantize":
        keep = quiet()
        quantize(*sys.argv[2:5])
        return keep
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["prefill", "decode", "batch"])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--try", nargs="*", default=[], dest="tries")
    args = parser.parse_args()
    args.tokens = args.tokens or {"prefill": 512, "decode": 128, "batch": 64}[args.what]
    options = {"flash": [0], "ubatch": [512], "unified": [0]}
    options.update({k: [int(x) for x in v.split(",")] for k, v in (t.split("=") for t in args.tries)})

    keep = quiet()
    C.llama_backend_init()
    model = C.llama_model_load_from_file(args.model.encode(), C.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot read {args.model}")
    vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))
    sequences = SEQUENCES if args.what == "batch" else 1
    room = args.tokens + {"prefill": 0, "decode": DECODE_PROMPT, "batch": BATCH_PROMPT}[args.what]
    room = (room + 255) // 256 * 256
    body = {"prefill": prefill, "decode": decode, "batch": batch}[args.what]
    rows = []
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values))
        context = Context(model, args, room, sequences, **chosen)
        runs = [body(context, args, vocab) for _ in range(args.runs + 1)][1:]
        context.close()
        rows.append({k: statistics.median(r[k] for r in runs) for k in runs[0]} | {"options": chosen})
    best = max(rows, key=lambda r: r["tok_s"])
    features = C.llama_print_system_info().decode()
    print(
        json.dumps(
            best
            | {
                "tried": rows,
                "weight_bytes": C.llama_model_size(model),
                "file_bytes": os.path.getsize(args.model),
                "peak_bytes": peak_bytes(),
                "system": features,
            }
        )
    )
    return keep


if __name__ == "__main__":
    main()
