"""Stage 08: win / tie / lose of every policy (section 3.2.1: Tables 2 and 3; Figures 10, 13, 15).

Every finished policy answers the evaluation prompts; a judge compares it with pi^SFT and with vanilla PPO (round 0),
for each task, in distribution (eval_*) and out of distribution (ood_*). Tables are printed and written as JSON and
Markdown: table_2 (every policy against SFT), table_3 (the best round against SFT and vanilla PPO).

Judges: `gold` is the embedded world's true preference; `ensemble` is the mean of stage 02's reward models, for data
without a known truth (a proxy: the policies were trained against models of the same data, so read it as a check that
runs, not as evidence). A judge that reads text goes into `judge`; the order of the two responses is random there.

With `--best_of n` also best_of_n.jsonl: n responses of pi^SFT to each of some prompts, the judge's score of each and
its reward under every reward model on all the data, for the curves of gold against reward.

Departures from the paper: (1) no GPT-4 and no people; (2) the best round of Table 3 is chosen by the mean win minus
lose over the in-distribution tasks, one round for all, on the same prompts (a small optimism the paper shares).

    deepspeed 08_evaluate.py               # or: python 08_evaluate.py --judge ensemble
"""
import json
import random
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import audit
import common

denoise, contrastive = import_module("04_rm_denoise"), import_module("05_rm_contrastive")

HPARAMS = {
    # name: (paper, toy, help)
    "prompts": (100, 200, "prompts per task and distribution, at most"),
    "M": (10, 10, "reward models of --judge ensemble"),
    "best_of": (0, 0, "n: responses of SFT per prompt that all reward models score; 0 leaves it out"),
    "best_of_prompts": (100, 30, "prompts of each evaluation set that get them"),
    "temperature": (0.8, 1.0, "sampling temperature"),
    "top_p": (0.9, 1.0, "nucleus sampling"),
    "repetition_penalty": (1.1, 1.0, "of sampling"),
    "generate_batch_size": (16, 100, "prompts per process and call of generate"),
    "eval_batch_size": (8, 64, "responses per process and forward pass of a judging model"),
    "zero": common.TRAINING["zero"],
    "precision": common.TRAINING["precision"],
}


def map_list(function, *columns):
    return list(map(function, *columns))


def ensemble_judge(args, tokenizer):
    """score(prompts, responses) → mean standardised reward of the ensemble of stage 02."""
    members = [audit.require(args, f"02_rm_ensemble/rm_{m:02d}", "python 02_rm_ensemble.py") for m in range(args.M)]

    def scores(prompts, responses):
        # decoders like Llama-2's drop the leading space that the preference data have
        rows = [{"id": str(i), "prompt": p, "response": " " + r.strip() if r.strip() else ""}
                for i, (p, r) in enumerate(zip(prompts, responses))]
        groups, total = common.encode(tokenizer, rows, ["response"], args.run), 0
        for member in members:
            model = common.frozen(common.load_reward_model(member, args), args)
            rewards = common.score(model, groups, args, "separate", tokenizer.pad_token_id)[:, 0]
            total = total + (rewards - rewards.mean()) / rewards.std(correction=0).clamp(min=1e-6)
        return (total / len(members)).tolist()
    return scores


def judge(prompts, ours, theirs, score, seed):
    """Verdicts "win", "tie" or "lose" for `ours`. `score(prompts, responses)` → numbers; an LLM judge goes here: it
    reads both texts, which it must see in random order (`swap`)."""
    swap = [random.Random(f"{seed} {i}").random() < 0.5 for i in range(len(prompts))]
    first, second = ([b if s else a for a, b, s in zip(x, y, swap)] for x, y in ((ours, theirs), (theirs, ours)))
    difference = [a - b for a, b in zip(score(prompts, first), score(prompts, second))]
    return ["tie" if abs(d) < 1e-9 else "win" if (d > 0) != s else "lose" for d, s in zip(difference, swap)]


def wilson(successes, n, z=1.959964):
    """95 % Wilson score interval of a share (Wilson 1927). → (low, high)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    centre, half = p + z2 / (2 * n), z * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def compare(verdicts):
    """{"n", "win", "tie", "lose" (shares), "win_interval", "lose_interval" (95 % Wilson)}."""
    n, count = len(verdicts), {v: verdicts.count(v) for v in ("win", "tie", "lose")}
    return {"n": n, **{v: c / n for v, c in count.items()}, "win_interval": wilson(count["win"], n),
            "lose_interval": wilson(count["lose"], n)}


def best_of_samples(args, tokenizer, sets, score, names):
    """Rows {"set", "id", "judge": [n], "rewards": {model: [n]}} for n responses of pi^SFT to each prompt."""
    rows = [(name, row) for name, members in sets.items() for row in members[:args.best_of_prompts]]
    encoded = common.encode(tokenizer, [row for _, row in rows], [], args.run)
    policy = common.frozen(common.load_policy(Path(args.out) / "01_sft", args), args)
    few = SimpleNamespace(**vars(args) | {"generate_batch_size": -(-args.generate_batch_size // args.best_of)})
    ids = common.generate(policy, tokenizer, [g["prompt"] for g in encoded], args.best_of, few, args.seed + 1)
    flat = [(row["prompt"], text) for (_, row), r in zip(rows, ids)
            for text in tokenizer.batch_decode(r, skip_special_tokens=True)]
    judged = score(*zip(*flat))
    groups = [{**g, "responses": [r]} for g, responses in zip(encoded, ids)
              for r in common.finished(responses, tokenizer.eos_token_id)]
    rewards = {}
    for name in names:
        model = common.frozen(common.load_reward_model(Path(args.out) / name, args), args)
        rewards[name] = common.score(model, groups, args, "separate", tokenizer.pad_token_id)[:, 0].tolist()
    part = lambda values, i: values[i * args.best_of:(i + 1) * args.best_of]  # noqa: E731
    return [{"set": name, "id": row["id"], "judge": part(judged, i),
             "rewards": {m: part(r, i) for m, r in rewards.items()}} for i, (name, row) in enumerate(rows)]


def table(title, rows):
    """Markdown table of (policy, opponent, set, compare()) rows, in per cent."""
    lines = [f"**{title}**", "", "| set | policy | opponent | win | tie | lose | win, 95 % | n |",
             "|---|---|---|" + "---:|" * 5]
    for policy, opponent, name, c in rows:
        lines.append(f"| {name} | {policy} | {opponent} | {c['win']:.0%} | {c['tie']:.0%} | {c['lose']:.0%} | "
                     f"{c['win_interval'][0]:.0%}–{c['win_interval'][1]:.0%} | {c['n']} |")
    return "\n".join(lines) + "\n"


def figure(path, results):
    """Win / tie / lose bars of every policy against SFT, a panel per set: Figure 10 and Figure 13 (--rm policies),
    Figure 15 (the ood_* sets)."""
    plt = audit.pyplot()
    sets = list(dict.fromkeys(name for _, opponent, name, _ in results if opponent == "sft"))
    fig, axes = plt.subplots(1, len(sets), figsize=(4 * len(sets), max(3.5, 0.06 * len(results))),
                             squeeze=False, sharey=True)
    for axis, name in zip(axes[0], sets):
        rows = [(p, c) for p, opponent, n, c in results if opponent == "sft" and n == name][::-1]
        left = [0.0] * len(rows)
        for verdict, color in (("win", "#0072b2"), ("tie", "#bbbbbb"), ("lose", "#d55e00")):
            axis.barh([p for p, _ in rows], [c[verdict] for _, c in rows], left=left, label=verdict, color=color)
            left = [x + c[verdict] for x, (_, c) in zip(left, rows)]
        axis.set(title=f"{name} against SFT", xlim=(0, 1), xlabel="share")
    axes[0][0].legend()
    fig.tight_layout()
    fig.savefig(path)


def main(argv=None):
    args = audit.parse_args(__doc__, HPARAMS, lambda flag: flag(
        "--judge", choices=("gold", "ensemble"), help="default: gold in the embedded world, else ensemble"), argv)
    data = audit.require(args, "00_data", "python 00_data.py")
    audit.require(args, "01_sft", "python 01_sft.py")
    audit.require(args, "06_ppo/round_0", "python 06_ppo.py --round 0")
    common.setup(args)
    kind = args.judge or ("gold" if args.run.get("world") == "toy" else "ensemble")
    policies = {"sft": "01_sft"} | {name.split("/")[1]: name for name in audit.finished(args.out)
                                    if name.startswith("06_ppo/")}
    members = [f"02_rm_ensemble/rm_{m:02d}" for m in range(args.M)] if kind == "ensemble" else []
    whole = [n for n, (*_, part) in denoise.METHODS.items() if part == (0, 100)]  # reward models of all the data
    models = [name for name in audit.finished(args.out) if name.startswith("07_metarm/round_") or name in
              [*(f"04_rm_denoise/{n}" for n in whole), *(f"05_rm_contrastive/{n}" for n in contrastive.METHODS)]]
    stage = audit.start_stage(args, "08_evaluate", ["00_data", *policies.values(), *members,
                                                    *(models if args.best_of else [])])
    tokenizer = common.load_tokenizer(Path(args.out) / "01_sft")
    if kind == "gold":
        score = partial(map_list, import_module("toy_world").gold)
    else:
        score = ensemble_judge(args, tokenizer)

    files = sorted(data.glob("eval_*.jsonl")) + sorted(data.glob("ood_*.jsonl"))
    sets = {f.stem: audit.read_jsonl(f)[:args.prompts] for f in files}
    rows = [(name, row) for name, members in sets.items() for row in members]
    prompts = [row["prompt"] for _, row in rows]
    encoded = [g["prompt"] for g in common.encode(tokenizer, [row for _, row in rows], [], args.run)]
    responses = {}
    for policy, path in policies.items():
        model = common.frozen(common.load_policy(Path(args.out) / path, args), args)
        ids = common.generate(model, tokenizer, encoded, 1, args, args.seed)
        responses[policy] = tokenizer.batch_decode([r[0] for r in ids], skip_special_tokens=True)

    flat = score(prompts * len(policies), [text for policy in policies for text in responses[policy]])
    scores = {policy: flat[i * len(prompts):(i + 1) * len(prompts)] for i, policy in enumerate(policies)}
    known = {(p, r): s for policy in policies for p, r, s in zip(prompts, responses[policy], scores[policy])}
    lookup = lambda ps, rs: [known[p, r] for p, r in zip(ps, rs)]  # noqa: E731  every pair was scored above, once
    results = []
    for policy in policies:
        for opponent in ("sft", "round_0"):
            if policy in ("sft", opponent):
                continue
            verdicts = judge(prompts, responses[policy], responses[opponent], lookup, args.seed)
            for name in sets:
                chosen = [v for v, (n, _) in zip(verdicts, rows) if n == name]
                results.append((policy, opponent, name, compare(chosen)))

    def margin(policy):
        inside = [c for p, opponent, name, c in results
                  if (p, opponent) == (policy, "sft") and name.startswith("eval_")]
        return sum(c["win"] - c["lose"] for c in inside) / len(inside)
    rounds = [p for p in policies if p.startswith("round_") and p != "round_0"]
    best = max(rounds, key=margin) if rounds else "round_0"
    table_2 = [x for x in sorted(results, key=lambda x: x[2]) if x[1] == "sft"]
    table_3 = [x for x in sorted(results, key=lambda x: x[2]) if x[0] == best]
    markdown = table(f"Table 2: every policy against SFT, judge {kind}", table_2) + "\n" + \
        table(f"Table 3: the best round ({best}) against SFT and vanilla PPO, judge {kind}", table_3)
    means = {policy: {name: sum(s for s, (n, _) in zip(scores[policy], rows) if n == name) / len(sets[name])
                      for name in sets} for policy in policies}
    inside = {name: members for name, members in sets.items() if name.startswith("eval_")}
    samples = best_of_samples(args, tokenizer, inside, score, models) if args.best_of else []
    if common.rank() == 0:
        if samples:
            audit.write_jsonl(stage.dir / "best_of_n.jsonl", samples)
        audit.write_jsonl(stage.dir / "responses.jsonl", [
            {"policy": policy, "set": name, "id": row["id"], "prompt": row["prompt"], "response": text, "score": s}
            for policy in policies for (name, row), text, s in zip(rows, responses[policy], scores[policy])])
        keys = ("policy", "opponent", "set")
        (stage.dir / "tables.json").write_text(json.dumps({
            "judge": kind, "best_round": best, "mean_score": means,
            "table_2": [{**dict(zip(keys, x)), **x[3]} for x in table_2],
            "table_3": [{**dict(zip(keys, x)), **x[3]} for x in table_3]}, indent=1) + "\n")
        (stage.dir / "tables.md").write_text(markdown, encoding="utf-8")
        figure(stage.dir / "win_tie_lose.png", results)
    common.log("\n" + markdown)
    audit.finish_stage(stage, {"judge": kind, "best_round": best, "mean_score": means})


if __name__ == "__main__":
    audit.run(main)
