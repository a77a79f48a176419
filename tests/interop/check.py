"""Opens what Locum wrote with transformers and PEFT, and compares their numbers with Locum's own (`make interop`).

    python check.py --locum COMMAND --gguf FILE --work FOLDER [--cargo CARGO]

A base is imported from a GGUF file and a tiny one is made; students are distilled from made-up episodes by each method. Then,
for each folder: the logits of about 200 tokens, greedy text, token ids and rendered chats, as transformers has them and as
Locum has them (`mod.rs` beside this file answers for Locum). The LoRA student's adapter is put over the base by PEFT.
All arithmetic is in float32, whatever the files hold. Exit status 1: something differs by more than the limits below.
"""

import argparse
import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")  # Folders on this machine only.

import numpy
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

# Largest difference of two logits, as a share of the largest logit. Two orders of adding the same float32 products.
SAME = 2e-5
# The same where one side's merged weights were rounded to bfloat16 and the other's were not.
ROUNDED = 2e-2
# Share of merged weights that may be rounded to the neighbouring bfloat16: sums that differ in their last float32 bit.
NEIGHBOURS = 1e-3
NEW_TOKENS = 64
TRAINED_TOKENS = 2000

TEXT = """The harbour master keeps two ledgers. In the first she writes every vessel that enters: its name, the flag it
sails under, the hour at which the pilot stepped on board, and the draught in metres, for example 7.35. In the second she
writes what leaves, and why. On the night of 14 November the first ledger had 23 entries and the second 22; nobody could say
which ship had stayed. "Count again," she said, and they counted: 1, 2, 3, ... 22, 23. The lamp smoked; the rain ran down the
panes; somewhere a chain dragged over stone. At a quarter past four the youngest clerk laughed, because the entry that was
one too many was her own small rowing boat, written down by a stranger who had wanted to be thorough. She did not strike it
out. She wrote beside it, in red ink: stays."""

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time there was a lighthouse keeper who",
    '{"name": "Ada", "born": 1815, "field":',
    "Three ways to sort a list of numbers:\n1.",
]

TEXTS = [
    "Grüße aus Köln! 你好，世界 — naïve café, Ελλάδα, русский текст, עברית, العربية, हिन्दी",
    "for (int i = 0; i < 10; ++i) {\n\tprintf(\"%d\\n\", i);\n}\r\n",
    "numbers 1 12 123 1234567890 3.14159 1e-9 0xDEADBEEF ١٢٣ ½",
    "emoji 🙂🙃👩‍👩‍👧‍👦🏳️‍🌈 and combining é ñ, zero\u200bwidth, no\u00a0break",
    "   leading, trailing   and\n\n\nmany\t\twhite   spaces \n",
    "it's I'm we'll you'd they've isn't 'quoted' \"double\"",
    "<|im_start|>user\nspecial tokens<|im_end|>\n<|endoftext|>",
    "",
    TEXT,
]

CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "You steer a robot."}, {"role": "user", "content": "Go left.\nThen stop."}],
    [
        {"role": "system", "content": "Antworte auf Deutsch — knapp."},
        {"role": "user", "content": "Wer bist du? 🙂"},
        {"role": "assistant", "content": "Ein Assistent."},
        {"role": "user", "content": "  Danke {{ name }} {% if x %} </s>  "},
    ],
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--locum", type=pathlib.Path, required=True)
    parser.add_argument("--gguf", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--cargo", default="cargo")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # Between these libraries.
    work = args.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    cases = make(args.locum.resolve(), args.gguf.resolve(), work)
    for name, folder in cases.items():
        case = work / "said" / name
        case.mkdir(parents=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        question = {
            "folder": str(folder),
            "out": str(case),
            "ids": tokenizer(TEXT)["input_ids"][:200],
            "prompts": [tokenizer(p)["input_ids"] for p in PROMPTS] if name.startswith("base") else [],
            "new_tokens": NEW_TOKENS,
            "texts": TEXTS,
            "chats": CHATS,
        }
        (case / "question.json").write_text(json.dumps(question))
    questions = [json.loads((work / "said" / name / "question.json").read_text()) for name in cases]
    (work / "questions.json").write_text(json.dumps(questions))
    say("asking Locum")
    command = [args.cargo, "test", "--release", "--workspace", "--quiet", "--test", "main", "--", "interop::", "--nocapture"]
    run(command, env={**os.environ, "LOCUM_INTEROP": str(work / "questions.json")})

    wrong = []
    logits = {}
    for name, folder in cases.items():
        logits[name] = compare(name, folder, work / "said" / name, wrong)
    for name in cases:
        if name.startswith("student") and far(logits[name], logits["base"]) < 10 * SAME:
            wrong.append(f"{name} says what its base says: nothing was trained")
    compare_adapter(cases["base"], cases["student-lora"], logits["student-lora"], wrong)
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    if wrong:
        sys.exit(1)
    say("everything agrees")


def make(locum, gguf, work):
    """Folders by name: the imported bases, and a student by each method."""

    def command(*arguments, store="store"):
        out = run([locum, "--store", work / store, "--json", "--quiet", *arguments], stdout=subprocess.PIPE).stdout
        return json.loads(out.decode().splitlines()[-1])

    say("importing the bases")
    command("model", "tiny", work / "tiny")
    command("model", "import", work / "tiny", "--name", "tiny", store="store-tiny")
    imported = command("model", "import", gguf)["imported"]
    cases = {"base-tiny": work / "store-tiny/base/tiny", "base": work / "store/base" / imported["name"]}
    episodes = work / "episodes.jsonl"
    episodes.write_text("".join(json.dumps(episode(i)) + "\n" for i in range(30)))
    command("episodes", "import", episodes)
    for method in ["upper", "full", "lora"]:
        say(f"distilling {TRAINED_TOKENS} tokens by {method}")
        job = command("distil", "run", "--method", method, "--tokens", TRAINED_TOKENS, "--no-trial")
        assert job["state"] == "stored", job
        cases[f"student-{method}"] = work / "store/students" / job["student"]
    return cases


def episode(i):
    """A mail desk: look the customer up, send the letter that belongs to the answer."""
    letters = ["welcome", "reminder", "invoice", "thanks"]
    letter = letters[i % len(letters)]

    def call(name, arguments):
        function = {"name": name, "arguments": json.dumps(arguments)}
        return {"role": "assistant", "content": None, "tool_calls": [{"id": name, "type": "function", "function": function}]}

    def tool(name, parameter, schema):
        parameters = {"type": "object", "properties": {parameter: schema}, "required": [parameter]}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    return {
        "messages": [
            {"role": "system", "content": "You work at a mail desk."},
            {"role": "user", "content": f"Send customer {i} the letter they wait for."},
            call("lookup", {"customer": str(i)}),
            {"role": "tool", "tool_call_id": "lookup", "content": f"customer {i} waits for: {letter}"},
            call("send", {"letter": letter}),
            {"role": "tool", "tool_call_id": "send", "content": "sent"},
        ],
        "tools": [tool("lookup", "customer", {"type": "string"}), tool("send", "letter", {"type": "string", "enum": letters})],
        "outcome": {"success": True},
    }


def compare(name, folder, case, wrong):
    """One folder: transformers' numbers and words against Locum's. Returns transformers' logits."""
    question = json.loads((case / "question.json").read_text())
    said = json.loads((case / "said.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load(folder)
    logits = forward(model, question["ids"])
    ours = numpy.fromfile(case / "logits.f32", dtype="<f4").reshape(logits.shape)
    difference = far(ours, logits)
    print(f"{name}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"  logits of {len(question['ids'])} tokens: differ by {difference:.1e} of the largest, {numpy.abs(logits).max():.1f}")
    if not difference <= SAME:
        wrong.append(f"{name}: logits differ by {difference:.1e}, at most {SAME:.0e} is allowed")

    same = 0
    for prompt, ours in zip(question["prompts"], said["greedy"]):
        theirs = greedy(model, prompt, NEW_TOKENS)
        same += theirs == ours
        if theirs != ours:
            wrong.append(f"{name}: greedy text after {prompt[:8]} is {ours}, transformers says {theirs}")
    if question["prompts"]:
        print(f"  greedy text of {NEW_TOKENS} tokens: {same} of {len(question['prompts'])} equal")

    theirs = [tokenizer(text)["input_ids"] for text in TEXTS]
    count("ids of texts", name, theirs, said["ids"], TEXTS, wrong)
    theirs = [
        [tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False) for prompt in (True, False)]
        for chat in CHATS
    ]
    count("rendered chats", name, theirs, said["rendered"], CHATS, wrong)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if ends not in (said["eos"], said["eos"][0]):
        wrong.append(f"{name}: generation_config.json ends with {ends}, Locum with {said['eos']}")
    return logits


def count(what, name, theirs, ours, questions, wrong):
    same = [t == o for t, o in zip(theirs, ours, strict=True)]
    print(f"  {what}: {sum(same)} of {len(same)} equal")
    for i, equal in enumerate(same):
        if not equal:
            wrong.append(f"{name}: {what}: {questions[i]!r} is {ours[i]!r}, transformers says {theirs[i]!r}")


def compare_adapter(base, student, merged_logits, wrong):
    """PEFT's merge of the adapter over the base against the student that Locum merged and rounded to bfloat16."""
    ids = json.loads((student.parents[1].parent / "said/student-lora/question.json").read_text())["ids"]
    peft = PeftModel.from_pretrained(load(base), student / "adapter").eval()
    logits = forward(peft, ids)
    difference = far(merged_logits, logits)
    print(f"adapter: PEFT's logits differ from the merged student's by {difference:.1e} of the largest (bfloat16 rounding)")
    if not difference <= ROUNDED:
        wrong.append(f"adapter: logits differ by {difference:.1e}, at most {ROUNDED:.0e} is allowed")
    theirs = peft.merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).state_dict()
    if theirs.keys() != ours.keys():
        wrong.append(f"adapter: tensors differ: {sorted(theirs.keys() ^ ours.keys())}")
        return
    total, other, worst = 0, 0, 0
    for key, tensor in theirs.items():
        # Neighbouring bfloat16 numbers of one sign are neighbouring integers.
        apart = (tensor.to(torch.bfloat16).view(torch.int16).int() - ours[key].view(torch.int16).int()).abs()
        total, other, worst = total + apart.numel(), other + int((apart > 0).sum()), max(worst, int(apart.max()))
    print(f"adapter: {other:,} of {total:,} merged weights are rounded to a neighbour, the farthest {worst} apart")
    if other > NEIGHBOURS * total:
        wrong.append(f"adapter: {other} of {total} merged weights differ")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def forward(model, ids):
    """Logits (t, v)."""
    gc.collect()
    return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


@torch.no_grad()
def greedy(model, prompt, n):
    said, new, cache = [], prompt, None
    while len(said) < n:
        out = model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache, new = out.past_key_values, [int(out.logits[0, -1].argmax())]
        said += new
    return said


def far(a, b):
    """Largest difference as a share of the largest value."""
    return float(numpy.abs(a - b).max() / numpy.abs(b).max())


def run(command, **options):
    done = subprocess.run([str(part) for part in command], **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(str(part) for part in command[:8])} ...: exit status {done.returncode}")
    return done


def say(text):
    print(f"== {text}", flush=True)


if __name__ == "__main__":
    main()
