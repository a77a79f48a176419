"""Makes the reference values of the gradient mode of test-time training: chunk-wise dynamic evaluation of down-projections, by PyTorch.

Reads the models that `make_model.py` made and writes `gradient.safetensors` beside each.
Needs torch, transformers, safetensors. Run in this folder: python make_gradient.py
Made with torch 2.15, transformers 5.23, float32, one thread.
"""

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache

torch.set_num_threads(1)
CHUNK, LR, LENGTH = 12, 0.5, 45
LAYERS = {"llama": [1, 2], "qwen3": [2]}

for name, layers in LAYERS.items():
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="eager").eval()
    model.requires_grad_(False)
    downs = {i: model.model.layers[i].mlp.down_proj.weight for i in layers}
    for w in downs.values():
        w.requires_grad_(True)
    ids = torch.randint(0, model.config.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(11))
    out = {"ids": ids, "chunk": torch.tensor([CHUNK]), "lr": torch.tensor([LR]), "layers": torch.tensor(layers)}
    with torch.no_grad():
        out["logits_plain"] = model(input_ids=ids[None]).logits[0]
    cache, logits, losses = DynamicCache(config=model.config), [], []
    for chunk in ids.split(CHUNK):
        seen = model(input_ids=chunk[None], past_key_values=cache, use_cache=True).logits[0]
        logits.append(seen.detach())
        # What later chunks read of this one is a constant to them, computed with the weights that this one met.
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        if len(chunk) < CHUNK:
            break
        # The pairs inside the chunk: its last token's target lies behind the edge.
        loss = torch.nn.functional.cross_entropy(seen[:-1], chunk[1:])
        grads = torch.autograd.grad(loss, list(downs.values()))
        losses.append(loss.item())
        with torch.no_grad():
            for (i, w), grad in zip(downs.items(), grads):
                if len(losses) == 1:
                    out[f"grad.{i}"] = grad.clone()
                w.sub_(LR * grad)
    out["logits"] = torch.cat(logits)
    out["losses"] = torch.tensor(losses)
    for i, w in downs.items():
        out[f"down.{i}"] = w.detach()
    save_file({k: v.contiguous().clone() for k, v in out.items()}, f"{name}/gradient.safetensors")
    far = (out["logits"] - out["logits_plain"]).abs().max()
    print(name, losses, f"largest change of a logit {far:.3f}")
