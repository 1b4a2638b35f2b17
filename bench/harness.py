"""What the benchmarks share: rows, random models, one process a contender, tables, JSON.

A benchmark names its contenders, `turns` runs each in a process of its own, one after another and
round after round, so that a slow minute of the machine meets all of them; the ratio of two
contenders holds, seconds hold for this machine.
"""
import gzip
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402  (first: it sets DeepSpeed's environment)

import torch  # noqa: E402
import transformers  # noqa: E402

SIZES = {  # name: (vocabulary, hidden, intermediate, layers, heads)
    "0.6m": (2000, 96, 256, 4, 4), "7m": (8000, 256, 704, 6, 4), "30m": (8000, 512, 1408, 8, 8),
    "135m": (49152, 576, 1536, 30, 9), "0.5b": (32000, 1024, 2816, 30, 16),
    "1b": (32000, 2048, 5632, 18, 16)}
DEFAULTS = dict(
    zero=0, precision="fp32", max_grad_norm=1.0, gradient_checkpointing=False, warmup=0.0, lr=1e-5,
    batch_size=16, micro_batch_size=16, eval_batch_size=32, layout="shared", deterministic=False,
    preset="small", seed=0, hparams={}, limit=None, epochs=1.0)


def machine():
    """What the figures hold for."""
    names = ("torch", "transformers", "deepspeed", "trl", "accelerate")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                if line.startswith("model name")), platform.processor()) \
        if os.path.exists("/proc/cpuinfo") else platform.processor()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"date": str(date.today()), "cpu": cpu, "cores": len(os.sched_getaffinity(0)),
            "gpu": gpu, "python": platform.python_version(), **found,
            "command": " ".join(["python", *sys.argv])}


def make_model(size):
    """A random Llama of a size, saved once in the system's folder for such. → path, config"""
    path = Path(tempfile.gettempdir()) / f"secrets_bench_{size}"
    V, H, I, layers, heads = SIZES[size]  # noqa: E741
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=I, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=8192,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True)
    if not path.exists():
        torch.manual_seed(0)
        with torch.device(common.device()):
            model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(f"{path}.partial")
        os.rename(f"{path}.partial", path)
    return path, config


def hh_lengths(n, rng):
    """(prompt, chosen, rejected) tokens of n pairs, log-normal as HH's are: medians 90, 45 and 45
    (fitted to 1,800 harmless rows under a BPE of 8,000)."""
    def draw(median, sigma, most):
        return max(4, min(most, round(median * rng.lognormvariate(0, sigma))))
    return [(draw(90, 0.9, 512), draw(45, 0.8, 256), draw(45, 0.8, 256)) for _ in range(n)]


def groups_of(lengths, vocabulary, seed=0):
    """Groups of random tokens with (prompt, response, response, ...) tokens each."""
    rng = random.Random(seed)
    return [{"id": str(i), "prompt": rng.choices(range(3, vocabulary), k=p),
             "responses": [rng.choices(range(3, vocabulary), k=t - 1) + [2] for t in responses]}
            for i, (p, *responses) in enumerate(lengths)]


def read_lengths(path, n, max_prompt=512, max_response=256, vocabulary=8000):
    """The lengths of the first n rows of a file of HH pairs, under a BPE trained on its texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        (row[key] for row in rows for key in ("chosen", "rejected")),
        trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False))
    out = []
    for row in rows[:n]:
        cut = row["chosen"].rfind("\n\nAssistant:") + len("\n\nAssistant:")
        p, c, r = (len(tokenizer.encode(text).ids) for text in
                   (row["chosen"][:cut], row["chosen"][cut:], row["rejected"][cut:]))
        out.append((min(p, max_prompt), min(c, max_response) + 1, min(r, max_response) + 1))
    return out


def settings(**given):
    return SimpleNamespace(**{**DEFAULTS, **given})


def peak_memory():
    """Highest memory so far, in MiB: the GPU's where there is one, else this process's."""
    return round(torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available()
                 else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def now():
    """Seconds, after the device has done what it was given."""
    torch.cuda.is_available() and torch.cuda.synchronize()
    return time.perf_counter()


def matmul_peak(precision, size=None):
    """FLOP/s of a large square product on this machine now, median of five."""
    device = common.device()
    size = size or (8192 if device.type == "cuda" else 2048)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    seconds = []
    for _ in range(7):
        start = now()
        a @ b
        seconds.append(now() - start)
    return 2 * size ** 3 / statistics.median(seconds[2:])


def flops(config, batch):
    """Forward FLOPs of a batch through the layers (no embedding, no head), padding included: 2 a
    weight and token, and in each layer 4 H for each pair of tokens whose segments see each other
    (all pairs of a row in the separate layout; what a GPU pads the shared one with is left out)."""
    H, I, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers  # noqa
    places, mask = batch["input_ids"].numel(), batch["attention_mask"]
    if mask.dim() == 4:
        pairs = sum(n * n + sum(t * (n + t) for t in ts) for n, *ts in mask[0, 0].tolist())
    else:
        pairs = mask.shape[0] * mask.shape[1] ** 2
    return layers * (2 * places * (4 * H * H + 3 * H * I) + 4 * H * pairs)


def environment(name, *packages):
    """The Python of an environment of its own, made here once."""
    path = HERE / f".env-{name}"
    if not (path / "made").exists():
        print(f"making {path}: {' '.join(packages)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", path], check=True)
        subprocess.run([path / "bin" / "pip", "install", "-q", *packages], check=True)
        (path / "made").touch()
    return str(path / "bin" / "python")


def turns(script, contenders, rounds, pythons=None):
    """Run every contender (a dict of JSON values) `rounds` times in turn, each in a process of its
    own: `python script --one JSON`, whose last line of output is JSON. → its results: medians over
    the rounds, with the least and the most of "seconds"; one that failed has its last line."""
    found = [[] for _ in contenders]
    for turn in range(rounds):
        for i, contender in enumerate(contenders):
            python = (pythons or {}).get(contender.get("impl"), sys.executable)
            done = subprocess.run([python, script, "--one", json.dumps(contender)],
                                  capture_output=True, text=True)
            lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
            result = json.loads(lines[-1]) if done.returncode == 0 else {
                "failed": (lines or ["no output"])[-1][:300]}
            print(f"{turn + 1}/{rounds} {json.dumps(contender)} {json.dumps(result)}", flush=True)
            found[i].append(result)
    out = []
    for contender, results in zip(contenders, found):
        good = [r for r in results if "failed" not in r]
        middle = {k: statistics.median(r[k] for r in good) for k in good[0]} if good else results[0]
        if good and "seconds" in good[0]:
            all_seconds = [r["seconds"] for r in good]
            middle |= {"least": min(all_seconds), "most": max(all_seconds)}
        out.append({**contender, **middle})
    return out


def table(rows, columns):
    """Markdown, numbers to three digits."""
    def show(x):
        return f"{x:.3g}" if isinstance(x, float) and abs(x) < 1000 else \
            f"{x:,.0f}" if isinstance(x, float) else "" if x is None else str(x)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(show(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def report(name, rows, columns, out=None, **more):
    """Print the table and write it with the machine to bench/NAME.json."""
    print(table(rows, columns))
    path = Path(out or HERE / f"{name}.json")
    path.write_text(json.dumps({"machine": machine(), **more, "rows": rows}, indent=1) + "\n")
    print(f"written: {path}")
