"""What a run costs as it grows: pairs, lengths, responses, models, parameters, processes, files.

    python bench/scale.py                 all questions, about ten minutes
    python bench/scale.py --only files    one of: pairs length responses size processes files

The first four train as bench/rm.py does (shared layout, fp32) and change one thing at a time; M
models cost M times one. processes: the same global batch on 1, 2 and 4 of this machine's. files: a
reward model's checkpoint, saved model and their hashes, in seconds a gigabyte.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import harness  # first: it puts the project on the path

import common
from lab import base, checkpoint

CASE = {"impl": "shared", "precision": "fp32", "zero": 0, "size": "0.6m",
        "batch": 16, "micro": 16, "pairs": 160, "share": 0.5, "length": 256, "K": 2}
VARIED = {
    "pairs": [{"pairs": n} for n in (80, 160, 320)],
    "length": [{"length": n} for n in (128, 256, 512, 1024)],
    "responses": [{"K": k} for k in (2, 4, 8, 16)],
    "size": [{"size": s} for s in ("0.6m", "7m", "30m")]}


def files(rounds, size="30m"):
    """Seconds and gigabytes of what is written for one reward model."""
    path, config = harness.make_model(size)
    args, rows = harness.settings(batch_size=16, run={}, out="x", limit=1), []
    common.setup(args)
    groups = harness.groups_of([(32, 16, 16)] * 16, config.vocab_size)
    tokenizer = SimpleNamespace(pad_token_id=0, save_pretrained=lambda path: common.write_text(
        Path(path) / "tokenizer_config.json", "{}"))
    rm = common.RewardEngine(common.load_reward_model(path, args, head_seed=0), SimpleNamespace(
        args=args, done=1), tokenizer, groups, 10)
    for micro in rm.micro_batches(groups):
        rm.backward(rm(micro)[0].sum())
        rm.step()
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            stage = SimpleNamespace(
                dir=folder, engines={"rm": rm.engine}, settings={}, state={}, total=2, name="rm",
                start=time.time(), done=0,
                script="02_rm_ensemble.py", metrics_file=open(folder / "metrics.jsonl", "a+"))
            for what, work in (
                    ("checkpoint written and hashed", lambda: checkpoint.save(stage, 1)),
                    ("checkpoint checked and loaded", lambda: checkpoint.load(stage)),
                    ("model saved", lambda: common.save_model(rm.engine, folder / "m", tokenizer)),
                    ("model hashed, as a manifest and verify do",
                     lambda: base.sha256(folder / "m/model.safetensors"))):
                begin = time.time()
                work()
                seconds = time.time() - begin
                stage.checkpoint = checkpoint.newest(folder)
                size = sum(p.stat().st_size for p in (
                    (folder / "checkpoint_1").rglob("*") if "checkpoint" in what
                    else (folder / "m").rglob("*"))) / 1e9
                rows.append({"what": what, "seconds": seconds, "GB": size, "s_per_GB":
                             seconds / size})
    return rows[-4:]


def processes(n):
    """bench/rm.py's loop on n processes, a share of the cores each."""
    case = {**CASE, "micro": CASE["batch"] // n}
    done = subprocess.run(
        ["deepspeed", "--num_gpus", str(n), "--no_local_rank", "--master_port",
         str(random.randint(20000, 29000)), str(harness.HERE / "rm.py"), "--one",
         json.dumps(case)], capture_output=True, text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"})
    found = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    return {"what": f"{n} process(es)", **(json.loads(found[0]) if found else
                                           {"failed": done.stderr[-300:]})}


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--only", choices=[*VARIED, "processes", "files"], help="one question")
    flags.add_argument("--rounds", type=int, default=1, help="turns of each (1)")
    flags.add_argument("--out", help="file of the results (bench/scale.json)")
    args = flags.parse_args()
    rows = []
    for question, cases in VARIED.items():
        if args.only in (None, question):
            found = harness.turns(str(harness.HERE / "rm.py"), [{**CASE, **c} for c in cases],
                                  args.rounds)
            rows += [{"what": " ".join(f"{k} {v}" for k, v in c.items()), **r}
                     for c, r in zip(cases, found)]
    if args.only in (None, "processes"):
        rows += [processes(n) for n in (1, 2, 4)]
    if args.only in (None, "files"):
        rows += files(max(2, args.rounds))
    harness.report("scale", rows, ["what", "seconds", "pairs_per_s", "tokens_per_s", "memory_MiB",
                                   "score_seconds", "GB", "s_per_GB"], args.out)


if __name__ == "__main__":
    sys.exit(main())
