"""Stage 03: the strength of every preference by the vote of the ensemble (section 2.2, Eq. 4).

Reads 00_data/{train,valid}.jsonl and 02_rm_ensemble/rm_*, writes 03_strength/{train,valid}.jsonl: the rows with
`chosen_score_list`, `rejected_score_list`, `mean preference difference` (mu_hat), `std preference difference`
(sigma_hat) and `margin` (= mu_hat), the names of the authors' released data set. Figures 1, 2 and 3, and
table_1.md: a wrong, an ambiguous and a strong pair.

A data set that brings the ten scores along (the released one) needs no ensemble: its numbers are used.

Departures from the paper: (1) pairs that are equal after truncation have no preference and are dropped, counted;
(2) Figure 3 uses groups of 500 validation pairs as the paper does, fewer when the set is small (`--group_size`).

    deepspeed 03_strength.py               # or: python 03_strength.py
"""
from pathlib import Path

import torch

import audit
import common

HPARAMS = {
    # name: (paper, toy, help)
    "M": (10, 10, "reward models in the ensemble"),
    "groups": (20, 20, "groups of Figure 2, by ascending strength"),
    "group_size": (500, 50, "validation pairs in a group of Figure 3"),
    "eval_batch_size": (8, 64, "pairs per process and forward pass"),
    "zero": common.TRAINING["zero"],
    "precision": common.TRAINING["precision"],
}
MEAN, STD = "mean preference difference", "std preference difference"


def preference_strength(diffs):
    """Eq. 4: mu_hat_i = 1/M sum_m d_i,m and sigma_hat_i = sqrt(1/M sum_m (d_i,m - mu_hat_i)^2).

    diffs: d_i,m = r_m(x, y_c) - r_m(x, y_r), [M, N] → mean [N], population std [N] (it divides by M).
    """
    return diffs.mean(0), diffs.std(0, correction=0)


def rank_correlation(a, b):
    """Spearman's rho (ties averaged), by scipy."""
    from scipy.stats import spearmanr
    return float(spearmanr(a, b).statistic)


def annotate(args, rows, tokenizer, members):
    """Rows with the scores of all M models and their strength; released rows already have them."""
    if rows and all("chosen_score_list" in row and "rejected_score_list" in row for row in rows):
        common.log("the data bring their own scores: the ensemble is not used")
        scores = torch.stack([torch.tensor([row["chosen_score_list"], row["rejected_score_list"]]).T for row in rows])
        scores = scores.transpose(0, 1)                                            # [M, N, 2]
    else:
        rows, groups = common.encode_pairs(tokenizer, rows, args.run)
        scores = []
        for member in members:
            model = common.frozen(common.load_reward_model(member, args), args)
            layout = common.choose_layout(args, lambda batch: model(batch)[0], groups)
            scores.append(common.score(model, groups, args, layout, tokenizer.pad_token_id))
        scores = torch.stack(scores)                                               # [M, N, 2]
    mu_hat, sigma_hat = preference_strength(scores[..., 0] - scores[..., 1])       # [N]
    rounded = (scores * 1e4).round() / 1e4
    return [{**row, "chosen_score_list": rounded[:, i, 0].tolist(), "rejected_score_list": rounded[:, i, 1].tolist(),
             MEAN: mu_hat[i].item(), STD: sigma_hat[i].item(), "margin": mu_hat[i].item()}
            for i, row in enumerate(rows)]


def by_strength(rows, count):
    """Rows in ascending order of mu_hat, cut into `count` groups of (nearly) equal size."""
    rows, count = sorted(rows, key=lambda row: row[MEAN]), min(count, len(rows))
    return [rows[len(rows) * i // count:len(rows) * (i + 1) // count] for i in range(count)]


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def agreement(rows):
    """Share of rows whose original label the judge confirms (label 1; -1 is no verdict)."""
    return mean(row["judge_label"] for row in rows if row.get("judge_label", -1) != -1)


def consistency(valid, group_size):
    """Figure 3: agreement with the judge in the weakest, middle and strongest group, per group, and its rank
    correlation with strength. Empty when no row has a verdict."""
    judged = sorted((row for row in valid if row.get("judge_label", -1) != -1), key=lambda row: row[MEAN])
    if not judged:
        return {}, []
    size = max(1, min(group_size, len(judged) // 3))
    groups = by_strength(judged, max(1, len(judged) // size))
    zero = min(range(len(judged)), key=lambda i: abs(judged[i][MEAN]))  # middle: strength near zero
    start = max(0, min(zero - size // 2, len(judged) - size))
    return {"consistency_weakest": agreement(judged[:size]),
            "consistency_near_zero": agreement(judged[start:start + size]),
            "consistency_middle": agreement(judged[(len(judged) - size) // 2:][:size]),
            "consistency_strongest": agreement(judged[-size:]), "consistency_group_size": size,
            "consistency_rank_correlation": rank_correlation([row[MEAN] for row in judged],
                                                             [row["judge_label"] for row in judged])}, groups


def figures(path, train, twenty, judged):
    """Figure 1, Figure 2 and Figure 3."""
    plt = audit.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5))
    for axis, name in zip(axes, (MEAN, STD)):
        axis.hist([row[name] for row in train], bins=60)
        axis.set(xlabel=name, ylabel="pairs")
    axes[0].axvline(0, color="k", linestyle="--")
    figure.suptitle("Figure 1: mean and std of the preference differences, training set")
    figure.savefig(path / "figure_01.png")

    figure, axis = plt.subplots(figsize=(5, 3.5))
    axis.plot([mean(row[MEAN] for row in g) for g in twenty], "o-", label="mean")
    axis.plot([mean(row[STD] for row in g) for g in twenty], "s-", label="std")
    axis.set(xlabel="group, by ascending strength", ylabel="preference difference", title="Figure 2")
    axis.legend()
    figure.savefig(path / "figure_02.png")

    if judged:
        figure, axis = plt.subplots(figsize=(5, 3.5))
        axis.plot([mean(row[MEAN] for row in g) for g in judged], [agreement(g) for g in judged], "o-")
        axis.set(xlabel="mean preference difference of the group", ylabel="consistency with the judge",
                 ylim=(0, 1), title="Figure 3: validation set")
        figure.savefig(path / "figure_03.png")


def table_1(rows):
    """Table 1 as Markdown: the weakest pair (incorrect), the one nearest zero (ambiguous), the strongest."""
    rows = sorted(rows, key=lambda row: row[MEAN])
    chosen = {"Incorrect": rows[0], "Ambiguous": min(rows, key=lambda row: abs(row[MEAN])), "Strong": rows[-1]}
    return "".join(f"## {kind}: mean {row[MEAN]:.2f}, standard deviation {row[STD]:.2f}\n\n" + "".join(
        f"{name}:\n\n    " + row[key].strip().replace("\n", "\n    ") + "\n\n"
        for name, key in (("Prompt", "prompt"), ("Chosen", "chosen"), ("Rejected", "rejected")))
        for kind, row in chosen.items())


def main(argv=None):
    args = audit.parse_args(__doc__, HPARAMS, argv=argv)
    data = audit.require(args, "00_data", "python 00_data.py")
    train, valid = (audit.read_jsonl(data / f"{split}.jsonl") for split in ("train", "valid"))
    scored = all("chosen_score_list" in row for row in train + valid)
    names = [] if scored else [f"02_rm_ensemble/rm_{m:02d}" for m in range(args.M)]
    members = [audit.require(args, name, "python 02_rm_ensemble.py") for name in names]
    common.setup(args)
    stage = audit.start_stage(args, "03_strength", ["00_data/train.jsonl", "00_data/valid.jsonl", *names])
    tokenizer = None if scored else common.load_tokenizer(members[0])
    train, valid = (annotate(args, rows, tokenizer, members) for rows in (train, valid))

    twenty = by_strength(train, args.groups)
    for i, group in enumerate(twenty):
        gold = [float(row["gold_chosen"] > row["gold_rejected"]) for row in group if "gold_chosen" in row]
        audit.log_metrics(stage, i, quiet=True, mean=mean(row[MEAN] for row in group),
                          std=mean(row[STD] for row in group), **({"gold_agreement": mean(gold)} if gold else {}))
    consistent, judged = consistency(valid, args.group_size)
    if common.rank() == 0:
        audit.write_jsonl(stage.dir / "train.jsonl", train)
        audit.write_jsonl(stage.dir / "valid.jsonl", valid)
        (stage.dir / "table_1.md").write_text(table_1(train), encoding="utf-8")
        figures(Path(stage.dir), train, twenty, judged)
    audit.finish_stage(stage, {
        "pairs": len(train), "share_mean_below_zero": mean(float(row[MEAN] < 0) for row in train),
        "group_means": [round(mean(row[MEAN] for row in g), 4) for g in twenty],
        "group_stds": [round(mean(row[STD] for row in g), 4) for g in twenty], **consistent})


if __name__ == "__main__":
    audit.run(main)
