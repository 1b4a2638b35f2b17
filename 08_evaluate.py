"""Stage 08: win / tie / lose of every policy, and the best round (section 3.2.1: Tables 2 and 3).

Every finished policy answers the evaluation prompts; a judge compares it with pi^SFT, with vanilla
PPO (round 0) and with PPO under the baseline reward model, for each task, in distribution (eval_*)
and out of distribution (ood_*). verdicts.json has each verdict, 1 win, 0 tie, -1 lose; tables.json
the shares of every comparison (the numbers of Table 2, Figure 10 and Figure 13) and of each task's
best round against SFT and vanilla PPO (Table 3, Figure 15). tables.md shows both tables.

The best round of a task is the one with the highest win minus lose against SFT on every second
in-distribution prompt; it is then measured on the others, and on all out of distribution, so that
its choice does not flatter it.

Judges: lab/judges.py says what `gold` and `ensemble` are. Both score one response at a time, so
the order in which two are shown does not matter.

Departures from the paper: (1) no GPT-4 and no people; (2) the best round is chosen on prompts that
do not measure it.

    deepspeed 08_evaluate.py               # or: python 08_evaluate.py --judge ensemble
"""
import json
from pathlib import Path

from scipy.stats import binomtest

import common
from lab import judges

HPARAMS = {
    # name: (paper, small, toy, help)
    "prompts": (100, 50, 400, "prompts per task and distribution, at most"),
    "M": (10, 10, 10, "reward models of --judge ensemble"),
    "temperature": (0.8, 0.8, 1.0, "sampling temperature"),
    "top_p": (0.9, 0.9, 1.0, "nucleus sampling"),
    "repetition_penalty": (1.1, 1.1, 1.0, "of sampling"),
    "generate_batch_size": (16, 16, 100, "prompts per process and call of generate"),
    "eval_batch_size": (8, 16, 64, "responses per process and forward pass of a judging model"),
    "precision": common.TRAINING["precision"],
}
OPPONENTS = ("sft", "round_0", "baseline")


def verdict(ours, theirs, tie=1e-9):
    """1 win, 0 tie, -1 lose, from the judge's scores of two responses."""
    return 0 if abs(ours - theirs) < tie else 1 if ours > theirs else -1


def compare(verdicts):
    """{"n", "win", "tie", "lose" (shares), "win_interval", "lose_interval" (95 % Wilson 1927)}."""
    n, count = len(verdicts), {name: verdicts.count(v)
                               for name, v in (("win", 1), ("tie", 0), ("lose", -1))}
    out = {"n": n, **{name: c / n for name, c in count.items()}}
    for name in ("win", "lose"):
        interval = binomtest(count[name], n).proportion_ci(0.95, method="wilson")
        out[f"{name}_interval"] = (interval.low, interval.high)
    return out


def best_rounds(verdicts):
    """{task: its best round}: highest win minus lose against SFT, that is mean verdict, on the
    prompts of even place in eval_TASK; the first of equals. → that, and {set: places of the
    prompts that had no part in it}. verdicts: {set: {policy: {opponent: [verdict of each]}}}."""
    best, unseen = {}, {}
    for name, policies in verdicts.items():
        kind, task = name.split("_", 1)
        lead = {p: sum(against["sft"][::2]) for p, against in policies.items()
                if p.startswith("round_") and p != "round_0"}
        if kind == "eval" and lead:
            best[task] = max(lead, key=lead.get)
        n = len(next(iter(policies.values()))["sft"])
        unseen[name] = list(range(1, n, 2) if kind == "eval" else range(n))
    return best, unseen


def tables(verdicts, best, unseen):
    """(every comparison, table 3): rows {"set", "policy", "opponent", "n", "win", ...}."""
    every, three = [], []
    for name, policies in sorted(verdicts.items()):
        for policy, against in policies.items():
            for opponent, v in against.items():
                row = {"set": name, "policy": policy, "opponent": opponent}
                every.append(row | compare(v))
                chosen = policy == best.get(name.split("_", 1)[1]) and opponent != "baseline"
                if chosen and unseen[name]:
                    three.append(row | compare([v[i] for i in unseen[name]]))
    return every, three


def markdown(title, rows):
    """A Markdown table of rows of `tables`, in per cent."""
    lines = [f"**{title}**", "", "| set | policy | opponent | win | tie | lose | win, 95 % | n |",
             "|---|---|---|" + "---:|" * 5]
    for row in rows:
        low, high = row["win_interval"]
        shares = " | ".join(f"{row[k]:.0%}" for k in ("win", "tie", "lose"))
        lines.append(f"| {row['set']} | {row['policy']} | {row['opponent']} | {shares} | "
                     f"{low:.0%}–{high:.0%} | {row['n']} |")
    return "\n".join(lines) + "\n"


def answer(args, policies, rows, tokenizer):
    """{policy: its response to each prompt}, one sample each."""
    prompts = [g["prompt"] for g in common.encode(tokenizer, rows, [], args.run)]
    responses = {}
    for policy, path in policies.items():
        model = common.frozen(common.load_policy(f"{args.out}/{path}", args), args)
        ids = common.generate(model, tokenizer, prompts, 1, args, args.seed)
        responses[policy] = tokenizer.batch_decode([r[0] for r in ids], skip_special_tokens=True)
        del model  # or the next one lies beside it
    return responses


def judge_all(scores, sets):
    """{set: {policy: {opponent: [verdict]}}} from {policy: [score of each prompt of all sets]}."""
    out, start = {}, 0
    for name, rows in sets.items():
        part = {policy: x[start:start + len(rows)] for policy, x in scores.items()}
        start += len(rows)
        out[name] = {policy: {opponent: list(map(verdict, part[policy], part[opponent]))
                              for opponent in OPPONENTS if opponent in part and opponent != policy}
                     for policy in part if policy != "sft"}
    return out


def main(argv=None):
    args = common.parse_args(__doc__, HPARAMS, lambda flag: flag(
        "--judge", choices=("gold", "ensemble"),
        help="default: gold in the embedded world, else ensemble"), argv)
    data = common.require(args, "00_data", "python 00_data.py")
    common.require(args, "01_sft", "python 01_sft.py")
    common.require(args, "06_ppo/round_0", "python 06_ppo.py --round 0")
    kind, names = judges.choose(args)
    common.setup(args)
    policies = {"sft": "01_sft"} | {name.split("/")[1]: name for name in common.finished(args.out)
                                    if name.startswith("06_ppo/")}
    run = common.begin(args, "08_evaluate", ["00_data", *policies.values(), *names])
    tokenizer = common.load_tokenizer(Path(args.out) / "01_sft")
    score = judges.scorer(args, tokenizer, names)

    files = [*sorted(data.glob("eval_*.jsonl")), *sorted(data.glob("ood_*.jsonl"))]
    sets = {f.stem: common.read_jsonl(f)[:args.prompts] for f in files}
    rows = [{**row, "set": name} for name, of_set in sets.items() for row in of_set]
    responses = answer(args, policies, rows, tokenizer)
    flat = score([row["prompt"] for row in rows] * len(policies), sum(responses.values(), []))
    scores = {policy: flat[i * len(rows):(i + 1) * len(rows)] for i, policy in enumerate(policies)}
    verdicts = judge_all(scores, sets)
    best, unseen = best_rounds(verdicts)
    every, table_3 = tables(verdicts, best, unseen)
    table_2 = [row for row in every if row["opponent"] == "sft"]
    text = markdown(f"Table 2: every policy against SFT, judge {kind}", table_2) + "\n" + markdown(
        f"Table 3: each task's best round against SFT and vanilla PPO, judge {kind}", table_3)
    means = {policy: {name: sum(s for s, row in zip(x, rows) if row["set"] == name) / len(of_set)
                      for name, of_set in sets.items()} for policy, x in scores.items()}
    if common.rank() == 0:
        common.write_jsonl(run.dir / "responses.jsonl", [
            {"policy": policy, "set": row["set"], "id": row["id"], "prompt": row["prompt"],
             "response": response, "score": s}
            for policy in policies
            for row, response, s in zip(rows, responses[policy], scores[policy])])
        common.write_text(run.dir / "verdicts.json", json.dumps(verdicts) + "\n")
        common.write_text(run.dir / "tables.json", json.dumps({
            "judge": kind, "best_round": best, "unseen": unseen, "mean_score": means,
            "table_3": table_3, "comparisons": every}) + "\n")
        common.write_text(run.dir / "tables.md", text)
    common.log("\n" + text)
    run.finish(judge=kind, best_round=best, mean_score=means)


if __name__ == "__main__":
    common.launch(main)
