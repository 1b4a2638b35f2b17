"""How much room the embedded world leaves a method: what the truth as a reward, a reward model and
clean labels win on it. Measured on development seeds, never on those of recorded experiments.

    python lab/headroom.py                                       three seeds, half an hour
    python lab/headroom.py --seeds 100 --limit 2 --out out_small    a smoke run

Runs stages 00, 01, 02 and 03 (two voters), 04 (baseline), 06 (round 0, and once more with the true
preference in the reward model's place, lab/ppo_reward.py) and 08, with their toy hyperparameters,
for helpful and harmless prompts (OUT/seed_S) and for summaries (OUT/summary_S); complete stages are
kept. Then it trains a reward model as the baseline on labels put right, and prints the table.
"""
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402  (the project's root is on the path now)
from lab import experiments, toy_world  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

WANTED = {  # quantity: (least, most), written before any was measured
    "SFT responses garbled or broken off": (0, 0.05),
    "gold as reward, helpful": (0.5, 1), "gold as reward, harmless": (0.5, 1),
    "gold as reward, summary": (0.3, 1),
    "baseline reward model, helpful": (0.15, 1), "baseline reward model, harmless": (0.15, 1),
    "baseline reward model, summary": (0.15, 1),
    "clean minus noisy labels": (0.04, 1), "clean minus noisy labels, helpful": None,
    "labels that agree with gold": (0.63, 0.73)}


def run(out, seed, source, limit):
    """All stages of one world and seed."""
    table = experiments.summary_table(0, source)
    table.insert(-1, (["06_ppo/gold"], "", 0,
                       "lab/ppo_reward.py --reward gold --rm baseline --name gold"))
    for directories, _, _, command in table:
        script, *flags = command.split()
        if script == "00_data.py":
            flags += ["--preset", "toy", "--seed", str(seed)]
            flags += ["--limit", str(limit)] if limit else []
        if not experiments.complete(out, directories, flags):
            sys.argv = [script, *flags, "--out", str(out)]
            experiments.stage_of(script).main(sys.argv[1:])


def put_right(row):
    """A pair with the label that gold has."""
    if row["gold_chosen"] >= row["gold_rejected"]:
        return row
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def accuracy(out, rows, gold):
    """Train a reward model as stage 04's baseline. → which pairs of `gold` it gets right, [N]"""
    hparams = experiments.stage_of("04_rm_denoise.py").HPARAMS
    args = common.parse_args("", hparams, argv=["--out", str(out)])
    tokenizer = common.load_tokenizer(out / "01_sft")
    common.set_seed(args.seed)
    _, pairs = common.encode_pairs(tokenizer, rows, args.run)
    steps = common.steps_for(args, len(pairs))
    model = common.load_reward_model(out / "01_sft", args, head_seed=args.seed)
    rm = common.RewardEngine(model, SimpleNamespace(args=args, done=True), tokenizer, pairs, steps)
    for batch in common.batches(pairs, args.batch_size, steps, args.seed):
        for micro in rm.micro_batches(batch):
            r_c, r_r = rm(micro)[0].unbind(1)
            rm.backward(-F.logsigmoid(r_c - r_r).mean())                        # Eq. 2
            rm.step()
    rewards = rm.score(common.encode(tokenizer, gold, ("chosen", "rejected"), args.run))
    common.free(rm.engine)
    return (rewards[:, 0] > rewards[:, 1]).double()


def measure(out):
    """{quantity: value} of a finished run."""
    rows = {name: common.read_jsonl(out / f"00_data/{name}.jsonl") for name in ("train", "gold")}
    told = [r["gold_chosen"] > r["gold_rejected"] for r in rows["train"]
            if r["gold_chosen"] != r["gold_rejected"]]
    scores = common.read_jsonl(out / "04_rm_denoise/baseline/scores.jsonl")[-1]["gold"]
    kept = [row for row in rows["gold"] if row["id"] in scores]
    noisy = torch.tensor([scores[row["id"]][0] > scores[row["id"]][1] for row in kept]).double()
    gain = accuracy(out, list(map(put_right, rows["train"])), kept) - noisy
    helpful = torch.tensor([row["task"] == "helpful" for row in kept])
    found = {"labels that agree with gold": sum(told) / len(told),
             "clean minus noisy labels": gain.mean().item()}
    if helpful.any():
        found["clean minus noisy labels, helpful"] = gain[helpful].mean().item()
    for row in json.loads((out / "08_evaluate/tables.json").read_text())["comparisons"]:
        kind, task = row["set"].split("_")
        name = {"gold": "gold as reward", "round_0": "baseline reward model"}[row["policy"]]
        if kind == "eval" and row["opponent"] == "sft":
            found[f"{name}, {task}"] = row["win"] - row["lose"]
    answers = [row for row in common.read_jsonl(out / "08_evaluate/responses.jsonl")
               if row["policy"] == "sft" and row["set"].startswith("eval_")]
    bad = [any(kind in ("unknown", "cut") for _, kind in toy_world.judge(
        row["prompt"], row["response"])) for row in answers]
    return found | {"SFT responses garbled or broken off": sum(bad) / len(bad)}


def main():
    parser = common.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--out", default="out_headroom", help="directory of the runs")
    parser.add_argument("--limit", type=int, help="as for 00_data.py: a smoke run")
    args = parser.parse_args()
    common.setup(SimpleNamespace(deterministic=False, seed=0, preset="toy", hparams={}))
    values = {name: [] for name in WANTED}
    for seed in args.seeds:
        for name, source in (("seed", "toy"), ("summary", "toy:summary")):
            out = Path(args.out) / f"{name}_{seed}"
            run(out, seed, source, args.limit)
            for quantity, value in measure(out).items():
                values[quantity].append(value)
    lines = ["| quantity | wanted | mean | each |", "|---|---|---:|---|"]
    for name, found in values.items():
        mean, (low, high) = statistics.mean(found), WANTED[name] or (-1, 1)
        wanted = f"{low} to {high}" if WANTED[name] else ""
        lines.append(f"| {name} | {wanted} | {mean:.3f}{'' if low <= mean <= high else ' !'} | "
                     f"{', '.join(f'{x:.3f}' for x in found)} |")
    print("\n".join(lines))
    Path(args.out, "headroom.json").write_text(json.dumps(
        {"seeds": args.seeds, "wanted": WANTED, "found": values}, indent=1) + "\n")


if __name__ == "__main__":
    common.launch(main)
