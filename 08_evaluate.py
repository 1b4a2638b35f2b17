"""Stage 08: win / tie / lose of every policy, and the best round (section 3.2.1: Tables 2 and 3).

Every finished policy answers the evaluation prompts; a judge compares it with pi^SFT, with vanilla
PPO (round 0) and with PPO under the baseline reward model, for each task, in distribution (eval_*)
and out of distribution (ood_*). verdicts.json has each verdict, 1 win, 0 tie, -1 lose; tables.json
the shares of every comparison (the numbers of Table 2, Figure 10 and Figure 13) and of each task's
best round against SFT and vanilla PPO (Table 3, Figure 15). tables.md shows both tables.

The best round of a task is the one with the highest win minus lose against SFT on every second
in-distribution prompt; it is then measured on the others, and on all out of distribution, so that
its choice does not flatter it.

Judges (lab/judges.py): `gold` and `ensemble` score one response at a time; a chat model, local
(model:PATH_OR_ID) or behind a server (http://HOST/v1), reads two in an order drawn for each item
(verdicts.jsonl has its replies; null in verdicts.json is no verdict).

Departures from the paper: (1) no GPT-4 unless --judge names it, and no people; (2) the best round
is chosen on prompts that do not measure it.

    deepspeed 08_evaluate.py               # or: python 08_evaluate.py --judge ensemble
    python 08_evaluate.py --judge model:HuggingFaceTB/SmolLM2-1.7B-Instruct --both_orders
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
    **common.SAMPLING,
    "generate_batch_size": (16, 16, 100, "prompts per process and call of generate"),
    "eval_batch_size": (8, 16, 64, "responses per process and forward pass of a judging model"),
    "precision": common.TRAINING["precision"],
    "zero": (0, 0, 0, "3: a judging chat model is sharded over the processes"),
}


def verdict(ours, theirs, tie=1e-9):
    """1 win, 0 tie, -1 lose, from the judge's scores of two responses."""
    return 0 if abs(ours - theirs) < tie else 1 if ours > theirs else -1


def compare(verdicts):
    """{"n", "win", "tie", "lose" (shares), "win_interval", "lose_interval" (95 % Wilson 1927)} of
    the verdicts that are there."""
    count = {name: verdicts.count(v) for name, v in (("win", 1), ("tie", 0), ("lose", -1))}
    n = sum(count.values())
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
        lead = {p: sum(told) / len(told) for p, against in policies.items()
                if p.startswith("round_") and p != "round_0"
                and (told := [v for v in against["sft"][::2] if v is not None])}
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
                rest = [v[i] for i in unseen[name]]
                chosen = policy == best.get(name.split("_", 1)[1]) and opponent != "baseline"
                if any(x is not None for x in v):
                    every.append(row | compare(v))
                if chosen and any(x is not None for x in rest):
                    three.append(row | compare(rest))
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


def answer(args, policies, sets, tokenizer):
    """{(policy, set, id): row with the policy's response}, one sample each."""
    rows = [(name, row) for name, of_set in sets.items() for row in of_set]
    prompts = [g["prompt"] for g in common.encode(tokenizer, [r for _, r in rows], [], args.run)]
    answers = {}
    for policy, path in policies.items():
        model = common.frozen(common.load_policy(f"{args.out}/{path}", args), args)
        ids = common.generate(model, tokenizer, prompts, 1, args, args.seed)
        texts = tokenizer.batch_decode([r[0] for r in ids], skip_special_tokens=True)
        answers |= {(policy, name, row["id"]): {
            "policy": policy, "set": name, "id": row["id"], "prompt": row["prompt"],
            "response": text} for (name, row), text in zip(rows, texts)}
        del model  # or the next one lies beside it
    return answers


def judge(run, answers, items, tokenizer, voters):
    """→ a verdict for each item, the judge's report. A judge that scores leaves each answer's
    `score` in its row."""
    if judges.reads(run.args):
        return judges.compare(run, items)
    score = judges.scorer(run.args, tokenizer, voters)
    rows = list(answers.values())
    for row, s in zip(rows, score([r["prompt"] for r in rows], [r["response"] for r in rows])):
        row["score"] = s
    return [verdict(*(answers[policy, item["set"], item["of"]]["score"] for policy in (
        item["policy"], item["opponent"]))) for item in items], {"judge": judges.title(run.args)}


def mean_scores(answers):
    """{policy: {set: mean score}}, of a judge that scores."""
    scores = {}
    for (policy, name, _), row in answers.items():
        if "score" in row:
            scores.setdefault(policy, {}).setdefault(name, []).append(row["score"])
    return {policy: {name: sum(x) / len(x) for name, x in of.items()} for policy, of in
            scores.items()}


def main(argv=None):
    def add_flags(flag):
        judges.add_flags(flag)
        flag("--name", help="write 08_evaluate_NAME: a second judge beside the first")
    args = common.parse_args(__doc__, HPARAMS, add_flags, argv)
    if args.name and not common.is_name(args.name):
        common.die(f"--name {args.name} cannot be part of a directory's name")
    data = common.require(args, "00_data", "python 00_data.py")
    common.require(args, "01_sft", "python 01_sft.py")
    common.require(args, "06_ppo/round_0", "python 06_ppo.py --round 0")
    names, stale = common.from_rank_0(lambda: common.current(args.out, "06_ppo"))
    for name in stale:
        common.log(f"{name} is not judged: it was made from other models or data than are here now")
    policies = {"sft": "01_sft"} | {name.split("/")[1]: name for name in names}
    read = judges.choose(args, "gold" if args.run.get("world") == "toy" else "ensemble")
    common.setup(args)
    name = "08_evaluate" + (f"_{args.name}" if args.name else "")
    run = common.begin(args, name, ["00_data", *policies.values(), *read],
                       script="08_evaluate.py")
    tokenizer = common.load_tokenizer(Path(args.out) / "01_sft")

    files = [*sorted(data.glob("eval_*.jsonl")), *sorted(data.glob("ood_*.jsonl"))]
    sets = {f.stem: common.subset(common.read_jsonl(f), args.prompts, args.seed) for f in files}
    answers = answer(args, policies, sets, tokenizer)
    items = judges.comparison_items(answers)
    found, report = judge(run, answers, items, tokenizer, read)
    verdicts = {name: {} for name in sets}
    for item, v in zip(items, found):
        against = verdicts[item["set"]].setdefault(item["policy"], {})
        against.setdefault(item["opponent"], []).append(v)
    best, unseen = best_rounds(verdicts)
    for name in sets:
        if f"eval_{name.split('_', 1)[1]}" not in sets:
            common.log(f"{name}: its task has no eval_ set to choose a best round on: no Table 3")
    every, table_3 = tables(verdicts, best, unseen)
    table_2 = [row for row in every if row["opponent"] == "sft"]
    text = markdown(f"Table 2: every policy against SFT, judge {report['judge']}", table_2)
    text += "\n" + markdown("Table 3: each task's best round against SFT and vanilla PPO, judge "
                            f"{report['judge']}", table_3)
    text += "\n" + judges.describe(report) + "\n" if judges.reads(args) else ""
    means = mean_scores(answers)
    if common.rank() == 0:
        common.write_jsonl(run.dir / "responses.jsonl", answers.values())
        common.write_text(run.dir / "verdicts.json", json.dumps(verdicts) + "\n")
        common.write_text(run.dir / "tables.json", json.dumps({
            "judge": report["judge"], "report": report, "best_round": best, "unseen": unseen,
            "mean_score": means, "table_3": table_3, "comparisons": every}) + "\n")
        common.write_text(run.dir / "tables.md", text)
    common.log("\n" + text)
    run.finish(judge=report["judge"], report=report, best_round=best, mean_score=means)


if __name__ == "__main__":
    common.launch(main)
