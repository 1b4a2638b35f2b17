"""Stage 03: the strength of every preference by the vote of the ensemble (section 2.2, Eq. 4).

Reads 00_data/{train,valid}.jsonl and 02_rm_ensemble/rm_*, writes 03_strength/{train,valid}.jsonl:
the rows with `chosen_score_list`, `rejected_score_list`, `mean preference difference` (mu_hat),
`std preference difference` (sigma_hat) and `margin` (= mu_hat), the names of the authors' released
data set. Also the numbers of Figure 1 (those columns), Figure 2 (groups.json), Figure 3
(consistency.json) and Table 1 (table_1.jsonl: a wrong, an ambiguous and a strong pair); stage 09
draws them. gold.jsonl is handed on: the embedded world's pairs with true labels, which 04, 05 and
07 measure with and no stage trains on.

A data set that brings its scores along (the released one) needs no ensemble. With --judge a chat
model (lab/judges.py: model:PATH_OR_ID, http://HOST/v1) labels the validation pairs, as GPT-4 does
in the paper: `judge_label` 1 agrees, 0 disagrees, -1 is a tie or no verdict.

Departures from the paper: (1) pairs that are equal after truncation have no preference and are
dropped, counted (by 04, 05 and 07 where the data bring scores); (2) Figure 3's groups are of 500
validation pairs as the paper's, smaller when the set is small (--group_size); (3) where the models
of stage 02 left folds out (--folds, ours), M of Eq. 4 is, for a training pair, the number of those
that did not train on it.

    deepspeed 03_strength.py               # or: python 03_strength.py
"""
import json
from collections import Counter
from pathlib import Path

import numpy as np
import scipy.stats
import torch

import common
from lab import judges

HPARAMS = {
    # name: (paper, small, toy, help)
    "M": (10, 10, 10, "reward models in the ensemble; a multiple of stage 02's --folds"),
    "groups": (20, 20, 20, "groups of Figure 2, by ascending strength"),
    "group_size": (500, 100, 50, "validation pairs in a group of Figure 3"),
    "eval_batch_size": (8, 8, 64, "pairs per process and forward pass"),
    "precision": common.TRAINING["precision"],
    "zero": (0, 0, 0, "3: a judging chat model is sharded over the processes"),
}
MEAN, STD = "mean preference difference", "std preference difference"


def preference_strength(diffs):
    """Eq. 4: mu_hat_i = 1/M sum_m d_i,m, sigma_hat_i = sqrt(1/M sum_m (d_i,m - mu_hat_i)^2).

    diffs: d_i,m = r_m(x, y_c) - r_m(x, y_r), [M, N] → mean [N], population std [N] (it divides by
    M).
    """
    return diffs.mean(0), diffs.std(0, correction=0)


def annotate(args, rows, tokenizer, members):
    """Rows with the scores of all M models and their strength; released rows already have them."""
    if rows and all("chosen_score_list" in row for row in rows):
        common.log("the data bring their own scores: the ensemble is not used")
        scores = torch.tensor([[row["chosen_score_list"], row["rejected_score_list"]]
                               for row in rows]).permute(2, 0, 1)
    else:
        rows, groups = common.encode_pairs(tokenizer, rows, args.run)
        scores = torch.stack(vote(args, groups, tokenizer, members), 1)         # [M, N, 2]
    mu_hat, sigma_hat = preference_strength(scores[..., 0] - scores[..., 1])    # [N]
    rounded = (scores.double() * 1e4).round() / 1e4
    return [{**row, "chosen_score_list": rounded[:, i, 0].tolist(),
             "rejected_score_list": rounded[:, i, 1].tolist(),
             MEAN: mu_hat[i].item(), STD: sigma_hat[i].item(), "margin": mu_hat[i].item()}
            for i, row in enumerate(rows)]


def vote(args, groups, tokenizer, members):
    """Rewards of each pair under the models that may score it: a list of N tensors [M, 2], M as
    many for each; stops where some pairs would have more votes than others."""
    shares = []
    for member in members:
        left_out = Path(member) / "held_out.json"
        ids = set(common.read_json(left_out)) if left_out.exists() else {g["id"] for g in groups}
        shares.append([g for g in groups if g["id"] in ids] or groups)  # validation: in no fold
    counts = Counter(g["id"] for share in shares for g in share)
    if len(counts) < len(groups) or len(set(counts.values())) > 1:
        common.die("pairs have unequal numbers of votes: --M must be a multiple of stage 02's "
                   "--folds")
    votes = {g["id"]: [] for g in groups}
    for member, share in zip(members, shares):
        for g, rewards in zip(share, common.score_by(member, share, args, tokenizer)):
            votes[g["id"]].append(rewards)
    return [torch.stack(v) for v in votes.values()]


def label(run, rows):
    """Rows with the judge's labels, in the place of those that came along, and its report."""
    verdicts, report = judges.compare(run, judges.pair_items(rows))
    labels = [{1: 1, -1: 0}.get(v, -1) for v in verdicts]
    return [row | {"judge_label": label} for row, label in zip(rows, labels)], report


def by_strength(rows, count):
    """Rows in ascending order of mu_hat, in `count` groups of (nearly) equal size: Figure 2."""
    rows = sorted(rows, key=lambda row: row[MEAN])
    return [[rows[i] for i in part] for part in np.array_split(range(len(rows)),
                                                               min(count, len(rows)))]


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


def consistency(valid, group_size):
    """Figure 3: whether the judge confirms a label (1 or 0; pairs of verdict -1 are left out), in
    the weakest group of pairs, the one around strength 0 and the strongest, and in groups of that
    size by strength: (mean strength, share confirmed) each. → {} when no row has a verdict.
    """
    judged = sorted((row for row in valid if row.get("judge_label", -1) != -1),
                    key=lambda row: row[MEAN])
    if not judged:
        return {}
    size = max(1, min(group_size, len(judged) // 3))
    zero = min(range(len(judged)), key=lambda i: abs(judged[i][MEAN]))
    start = max(0, min(zero - size // 2, len(judged) - size))
    groups = {"weakest": judged[:size], "near_zero": judged[start:start + size],
              "strongest": judged[-size:]}
    labels = [r["judge_label"] for r in judged]
    rho = float(scipy.stats.spearmanr([r[MEAN] for r in judged], labels).statistic) \
        if len(set(labels)) > 1 else None
    return {"group_size": size, "rank_correlation": rho,
            **{name: [row["judge_label"] for row in rows] for name, rows in groups.items()},
            "groups": [(mean(g, MEAN), mean(g, "judge_label"))
                       for g in by_strength(judged, max(1, len(judged) // size))]}


def table_1(rows):
    """Table 1: the weakest pair (incorrect), the one nearest zero (ambiguous) and the strongest."""
    rows = sorted(rows, key=lambda row: row[MEAN])
    chosen = {"Incorrect": rows[0], "Ambiguous": min(rows, key=lambda row: abs(row[MEAN])),
              "Strong": rows[-1]}
    keys = ("prompt", "chosen", "rejected", MEAN, STD)
    return [{"kind": kind, **{k: row[k] for k in keys}} for kind, row in chosen.items()]


def main(argv=None):
    args = common.parse_args(__doc__, HPARAMS, judges.add_flags, argv)
    data = common.require(args, "00_data", "python 00_data.py")
    train, valid = (common.read_jsonl(data / f"{split}.jsonl") for split in ("train", "valid"))
    gold = common.read_jsonl(path) if (path := data / "gold.jsonl").exists() else []
    scored = all("chosen_score_list" in row for row in train + valid)
    names = [] if scored else [f"02_rm_ensemble/rm_{m:02d}" for m in range(args.M)]
    members = [common.require(args, name, "python 02_rm_ensemble.py") for name in names]
    if args.judge in ("gold", "ensemble"):
        common.die(f"--judge {args.judge} is stage 08's: labels are judged by one that reads, "
                   "model:PATH_OR_ID or http://HOST/v1 (gold's come with the embedded world)")
    read = judges.choose(args)
    common.setup(args)
    run = common.begin(args, "03_strength", ["00_data/train.jsonl", "00_data/valid.jsonl",
                                             *["00_data/gold.jsonl"] * bool(gold), *names, *read])
    tokenizer = None if scored else common.load_tokenizer(members[0])
    train, valid = (annotate(args, rows, tokenizer, members) for rows in (train, valid))
    valid, report = label(run, valid) if args.judge else (valid, None)

    groups = [{"mean": mean(group, MEAN), "std": mean(group, STD)}
              for group in by_strength(train, args.groups)]
    found = consistency(valid, args.group_size)
    if common.rank() == 0:
        common.write_jsonl(run.dir / "train.jsonl", train)
        common.write_jsonl(run.dir / "valid.jsonl", valid)
        common.write_jsonl(run.dir / "gold.jsonl", gold)
        common.write_jsonl(run.dir / "table_1.jsonl", table_1(train))
        common.write_text(run.dir / "groups.json", json.dumps(groups) + "\n")
        common.write_text(run.dir / "consistency.json", json.dumps(found) + "\n")
    run.finish(
        pairs=len(train), share_mean_below_zero=sum(row[MEAN] < 0 for row in train) / len(train),
        group_means=[round(g["mean"], 4) for g in groups],
        group_stds=[round(g["std"], 4) for g in groups],
        **{f"consistency_{k}": v if isinstance(v, (int, float)) else sum(v) / len(v)
           for k, v in found.items() if k != "groups"}, **{"judge": report} if report else {})


if __name__ == "__main__":
    common.launch(main)
