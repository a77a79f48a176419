"""Makes the reference values of `model.rs`: tiny random Llama and Qwen3 models run by transformers, gradients by PyTorch, LoRA by PEFT.

Needs torch, transformers, peft, safetensors. Run in this folder: python make_model.py
Made with torch 2.15, transformers 5.23, peft 0.21, float32, one thread.
"""

import json
import os

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

torch.set_num_threads(1)
COMMON = dict(vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, attention_bias=False, initializer_range=0.2)
CASES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**COMMON, head_dim=6, rope_theta=10000.0, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**COMMON, head_dim=8, rope_theta=1000000.0, tie_word_embeddings=False)),
}


def loss_of(model, ids, start):
    """Mean next-token cross-entropy of ids[start:], each predicted from what stands before it."""
    logits = model(input_ids=ids[None]).logits[0]
    return torch.nn.functional.cross_entropy(logits[start - 1:-1], ids[start:])


for name, (kind, config) in CASES.items():
    torch.manual_seed(7)
    os.makedirs(name, exist_ok=True)
    model = kind(config).float().eval()
    with torch.no_grad():  # norms of 1 would hide a norm that is left out
        for key, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    ids = torch.randint(0, 96, (41,))
    out = {"ids": ids, "logits": model(input_ids=ids[None]).logits[0].detach()}
    greedy = model.generate(input_ids=ids[None, :9], attention_mask=torch.ones(1, 9, dtype=torch.long),
                            max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    out["greedy"] = greedy[0]
    loss = loss_of(model, ids, 30)
    loss.backward()
    out["loss"] = loss.detach()[None]
    for key, p in model.named_parameters():
        out["grad." + key] = p.grad.clone()
    json.dump(json.loads(model.config.to_json_string()), open(f"{name}/config.json", "w"), indent=1)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()
               if not (k == "lm_head.weight" and config.tie_word_embeddings)}, f"{name}/model.safetensors", metadata={"format": "pt"})
    # Ten steps of full fine-tuning: the loss before each.
    twin = kind(config).float()
    twin.load_state_dict(model.state_dict())
    adam = torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    curve = []
    for _ in range(10):
        adam.zero_grad()
        loss = loss_of(twin, ids, 30)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        adam.step()
        curve.append(loss.item())
    out["full_curve"] = torch.tensor(curve)
    # LoRA: gradients of both matrices with B away from zero.
    model.zero_grad()
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]))
    with torch.no_grad():
        for key, p in peft.named_parameters():
            if "lora_" in key:
                p.copy_(0.3 * torch.randn_like(p))
    loss = loss_of(peft, ids, 30)
    loss.backward()
    out["lora_loss"] = loss.detach()[None]
    out["lora_logits"] = peft(input_ids=ids[None]).logits[0].detach()
    for key, p in peft.named_parameters():
        if "lora_" in key:
            clean = key.replace(".default", "")
            out["lora." + clean] = p.detach().clone()
            out["grad." + clean] = p.grad.clone()
    save_file({k: v.contiguous() for k, v in out.items()}, f"{name}/values.safetensors")
    print(name, float(out["loss"]), curve[-1], os.path.getsize(f"{name}/values.safetensors"))
