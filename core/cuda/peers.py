"""PyTorch beside Locum on the same card: a model of the default base's shape, eager, and compiled with CUDA graphs.

Prints one JSON object a line, as the speed test of core/src/device does. Run by check.sh.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

CONFIG = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    head_dim=64, max_position_embeddings=33000, rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=True,
)  # fmt: skip


def say(engine: str, what: str, values: list[float], unit: str) -> None:
    row = {"engine": engine, "what": what, "median": statistics.median(values), "least": min(values), "most": max(values)}
    print(json.dumps(row | {"unit": unit, "runs": len(values)}), flush=True)


def seconds(run: Callable[[], None], runs: int = 5) -> list[float]:
    run()
    found = []
    for _ in range(runs):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found


def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(CONFIG).to("cuda", torch.bfloat16)


def decode(net: LlamaForCausalLM, n: int, compiled: bool) -> list[float]:
    """Tokens a second of 64 steps for n sequences behind 64 tokens, with logits read back as Locum's are."""
    cache = StaticCache(config=CONFIG, max_cache_len=1024)
    ids = torch.randint(0, 49152, (n, 64), device="cuda")
    step = torch.compile(net.forward, mode="reduce-overhead", fullgraph=True) if compiled else net.forward
    with torch.inference_mode():
        net(ids, past_key_values=cache, cache_position=torch.arange(64, device="cuda"), use_cache=True)
        at = 64

        def run() -> None:
            nonlocal at
            for _ in range(64):
                position = torch.tensor([at], device="cuda")
                out = step(ids[:, :1].clone(), past_key_values=cache, cache_position=position, use_cache=True)
                out.logits[:, -1].float().cpu()
                at += 1

        return [n * 64 / s for s in seconds(run)]


def prefill(net: LlamaForCausalLM, length: int) -> list[float]:
    ids = torch.randint(0, 49152, (1, length), device="cuda")
    with torch.inference_mode():
        return [length / s for s in seconds(lambda: net(ids, use_cache=True, logits_to_keep=1))]


def lora(net: LlamaForCausalLM, compiled: bool) -> list[float]:
    """Tokens a second of a LoRA step of 32 rows of 512 tokens, adapters of rank 16 written out by hand."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)

    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.a = torch.nn.Parameter(torch.randn(16, base.in_features, device="cuda") * 0.02)
            self.b = torch.nn.Parameter(torch.zeros(base.out_features, 16, device="cuda"))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + 2.0 * (x @ self.a.to(x.dtype).T) @ self.b.to(x.dtype).T

    for layer in net.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(part, name, Adapted(linear))
    moving = [p for p in net.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(moving, lr=1e-5, fused=True)
    ids = torch.randint(0, 49152, (32, 512), device="cuda")
    forward = torch.compile(net) if compiled else net

    def run() -> None:
        forward(ids, labels=ids).loss.backward()
        adam.step()
        adam.zero_grad()

    return [32 * 512 / s for s in seconds(run)]


def main() -> None:
    rows: list[tuple[str, str, Callable[[], list[float]]]] = []
    for compiled, name in [(False, "torch eager"), (True, "torch compiled")]:
        rows += [(name, f"decode, {n} at once", lambda n=n, c=compiled: decode(model(), n, c)) for n in (1, 64)]
    rows += [("torch eager", f"prefill {n}, not learning", lambda n=n: prefill(model(), n)) for n in (2048, 8192, 32768)]
    rows += [(f"torch {word}", "lora step, 32 x 512", lambda c=c: lora(model(), c)) for c, word in [(False, "eager"), (True, "compiled")]]
    for engine, what, measure in rows:
        try:
            say(engine, what, measure(), "tok/s")
        except Exception as error:  # a peer that fails is a row that is missing, and said
            print(f"{engine}, {what}: {error!r}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
