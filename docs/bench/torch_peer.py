"""Training steps of the same model with PyTorch, transformers and PEFT, measured as `locum bench train` measures Locum.

usage: torch_peer.py lora|upper|full f32|bf16 GGUF [--threads N] [--steps N] [--checkpointing]

4 x 512 tokens a step, loss on every token, masters and moments in f32; bf16 means autocast. `upper` computes the outputs of the lower
half of the layers once, without gradients, and then trains the layers above them and the final norm. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

ROWS, TOKENS = 4, 512
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peak_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class Upper(torch.nn.Module):
    """The layers above a cached hidden state, the final norm, and the frozen head."""

    def __init__(self, model):
        super().__init__()
        self.decoder, self.head = model.model, model.lm_head
        self.cut = len(self.decoder.layers) - (len(self.decoder.layers) + 1) // 2
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for part in [*self.decoder.layers[self.cut :], self.decoder.norm]:
            part.requires_grad_(True)

    def run(self, hidden, layers):
        positions = torch.arange(hidden.shape[1])[None]
        turns = self.decoder.rotary_emb(hidden, positions)
        for layer in layers:
            out = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=turns)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    @torch.no_grad()
    def lower(self, ids):
        return self.run(self.decoder.embed_tokens(ids), self.decoder.layers[: self.cut])

    def forward(self, hidden, labels):
        hidden = self.decoder.norm(self.run(hidden, self.decoder.layers[self.cut :]))
        logits = self.head(hidden[:, :-1]).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=["lora", "upper", "full"])
    parser.add_argument("compute", choices=["f32", "bf16"])
    parser.add_argument("gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder, file = os.path.split(os.path.abspath(args.gguf))
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    if args.method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LINEARS))
    if args.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    ids = (torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) * 7919 + 101) % model.config.vocab_size
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.compute == "bf16")
    if args.method == "upper":
        upper = Upper(model)
        with autocast:
            cached = upper.lower(ids)
        loss_of = lambda: upper(cached, ids)
    else:
        loss_of = lambda: model(input_ids=ids, labels=ids).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    seconds, losses = [], []
    for _ in range(args.steps + 1):
        began = time.perf_counter()
        with autocast:
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    seconds = sorted(seconds[1:])
    print(
        json.dumps(
            {
                "tok_s": ROWS * TOKENS / statistics.median(seconds),
                "peak_bytes": peak_bytes(),
                "trained": sum(p.numel() for p in trained),
                "losses": losses,
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
