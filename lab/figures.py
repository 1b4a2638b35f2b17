"""The paper's figures and tables from finished runs: what is in each, and how it is drawn. The one
drawing of each; lab/page.py puts them on a page, lab/claims.py takes its ledger from the same
numbers.

A run is a namespace: `path` (its directory), `summary` (that of the summary task, or None), `seed`.
`FIGURES` names for each figure a function run → data (numbers as JSON keeps them, down to single
pairs and prompts, so that the ledger can draw its intervals), and a function (data of every seed)
→ (matplotlib figure, rows of the table behind it).
"""
import math
import re
from functools import cache

import matplotlib
import numpy as np
import torch

import common
from lab.base import read_json, read_jsonl

matplotlib.use("Agg")  # without a display
import matplotlib.pyplot as plt  # noqa: E402

METHODS = ["baseline", "flip", "margin", "flip_margin", "soft_margin"]  # of stage 04
DENOISING = [name for name in METHODS if name not in ("baseline", "margin")]
CONTRASTIVE = ["simcse", "simcse_diff", "swav", "swav_diff"]            # of stage 05
SETS = ("original", "judge", "consistent")
TENTHS = [f"tenth_{i:02d}" for i in range(1, 11)]
PARTS = ([f"part_000_{high:03d}" for high in (20, 40, 60, 80)],
         [f"part_{low:03d}_100" for low in (80, 60, 40, 20)])
MEAN, STD = "mean preference difference", "std preference difference"
# the colours of Okabe and Ito, which colour-blind people can tell apart; without yellow, too pale
OKABE_ITO = ["#000000", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#999999"]
plt.rcParams.update({
    "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "savefig.bbox": "tight",
    "axes.prop_cycle": matplotlib.cycler(color=OKABE_ITO)})


class Missing(Exception):
    """A run has not made what a figure shows; the message says what."""


# ---------------------------------------------------------------- reading runs

@cache
def rows(path):
    if not path.exists():
        raise Missing(f"{path} is not there")
    return read_jsonl(path)


@cache
def read(path):
    if not path.exists():
        raise Missing(f"{path} is not there")
    return read_json(path)


@cache
def curve(run_path, model):
    """Training of one model of stage 04 → {"step": [S], "train_loss": [S], "right": {set:
    [S][pairs]
    0 or 1}}; the sets are the three validation sets and "train"."""
    scores = rows(run_path / "04_rm_denoise" / model / "scores.jsonl")
    valid = [row for row in rows(run_path / "03_strength/valid.jsonl")
             if row["id"] in scores[0]["valid"]]
    right = [common.correct(torch.tensor([s["valid"][row["id"]] for row in valid]), valid)
             for s in scores]
    train = np.array([list(s["train"].values()) for s in scores]) @ [1, -1]        # [S, N]
    return {"step": [s["step"] for s in scores],
            "train_loss": np.logaddexp(0, -train).mean(1).round(4).tolist(),
            "right": {name: [r[name].int().tolist() for r in right] for name in right[0]}
            | {"train": (train > 0).astype(int).tolist()}}


def curves(run, *models):
    return {model: curve(run.path, model) for model in models}


def ppo(run, *names):
    """{policy: {metric: [steps]}} from stage 06."""
    out = {}
    for name in names:
        history = rows(run.path / "06_ppo" / name / "metrics.jsonl")
        out[name] = {k: [h[k] for h in history] for k in (*UNITS, "entropy", "reward_std")
                     if k in history[0]}
    return out


def evaluated(run, policies, kinds=("eval_", "ood_")):
    """What stage 08 says of some policies on the sets of some kinds, the summary task's too: its
    comparisons, the verdicts behind them, each task's best round and where it may be measured."""
    out = {"comparisons": [], "verdicts": {}, "best": {}, "unseen": {}}
    for path in [p for p in (run.path, run.summary) if p]:
        tables = read(path / "08_evaluate/tables.json")
        out["comparisons"] += [row for row in tables["comparisons"] if row["policy"] in policies
                               and row["set"].startswith(kinds)]
        out["best"] |= tables["best_round"]
        out["unseen"] |= tables["unseen"]
        for name, found in read(path / "08_evaluate/verdicts.json").items():
            if name.startswith(kinds) and (found := {p: found[p] for p in policies if p in found}):
                out["verdicts"][name] = found
    if not out["comparisons"]:
        raise Missing(f"{run.path}/08_evaluate has no {' or '.join(kinds)} set with one of "
                      f"{', '.join(policies)}")
    return out


def mean_scores(run, policies, kind="eval_"):
    """{set: {policy: mean score of the judge}} from stage 08."""
    found = {}
    for path in [p for p in (run.path, run.summary) if p]:
        for policy, sets in read(path / "08_evaluate/tables.json")["mean_score"].items():
            for name, value in sets.items():
                if policy in policies and name.startswith(kind):
                    found.setdefault(name, {})[policy] = value
    return found


def rounds(run):
    """Names of vanilla PPO and the finished rounds, in order."""
    found = [p.name for p in (run.path / "06_ppo").glob("round_*")
             if re.fullmatch(r"round_\d+", p.name)]
    return sorted(found, key=lambda name: int(name[6:]))


# ---------------------------------------------------------------- data of each figure

def data_01(run):
    train = rows(run.path / "03_strength/train.jsonl")
    return {"mean": [round(r[MEAN], 4) for r in train], "std": [round(r[STD], 4) for r in train]}


def data_03(run):
    found = read(run.path / "03_strength/consistency.json")
    if not found:
        raise Missing("no pair has a judge's label")
    return found


def data_08(run):
    """The five methods over three epochs; where only the default run was made, over its one."""
    try:
        return curves(run, *(f"{name}_3_epochs" for name in METHODS))
    except Missing:
        return curves(run, *METHODS)


def data_11(run):
    folder = run.path / "05_rm_contrastive"
    found = {name: read(folder / name / "features.json") for name in CONTRASTIVE}
    return {"baseline": found["simcse"]["baseline"]} | {n: d[n] for n, d in found.items()}


def data_16(run):
    """Rewards, their differences and J of each round's held-back samples at theta, theta' and under
    the vanilla model."""
    folder = run.path / "07_metarm"
    held = {name: read(folder / name / "held_back.json") for name in rounds(run)[1:]}
    if not held:
        raise Missing(f"{run.path}/07_metarm has no rounds")
    return held


def data_19(run):
    """The baseline over three epochs, and its last scores of the validation pairs."""
    scores = rows(run.path / "04_rm_denoise/baseline_3_epochs/scores.jsonl")
    return curves(run, "baseline_3_epochs") | {"scores": list(scores[-1]["valid"].values())}


def data_20(run):
    """Scores of the validation pairs under the baseline over three epochs; at the epochs' ends
    every pair's."""
    scores = rows(run.path / "04_rm_denoise/baseline_3_epochs/scores.jsonl")
    pairs = np.array([list(s["valid"].values()) for s in scores])                  # [S, N, 2]
    steps = [s["step"] for s in scores]
    ends = [epoch_end(steps, epoch) for epoch in (1, 2, 3)]
    return {"step": steps, "chosen": pairs[..., 0].mean(1).round(4).tolist(),
            "rejected": pairs[..., 1].mean(1).round(4).tolist(),
            "epoch_end_step": [steps[i] for i in ends],
            "epoch_end": [pairs[i].tolist() for i in ends]}


def epoch_end(steps, epoch, epochs=3):
    """Index of the evaluation nearest to the end of an epoch; it must lie within a quarter of
    one."""
    distance = np.abs(np.array(steps) - steps[-1] * epoch / epochs)
    if distance.min() > max(1, steps[-1] / epochs / 4):
        raise Missing(f"no evaluation near the end of epoch {epoch}: lower --eval_every")
    return int(distance.argmin())


def data_26(run):
    """p(y_c > y_r | x) of the same training pairs over training, under the labels trained on."""
    out = {}
    for name in ("baseline", "flip"):
        scores = rows(run.path / f"04_rm_denoise/{name}_3_epochs/scores.jsonl")
        d = np.array([list(s["train"].values()) for s in scores]) @ [1, -1]
        out[name] = {"step": [s["step"] for s in scores],
                     "p": (1 / (1 + np.exp(-d))).round(3).tolist()}
    return out


def data_27(run):
    """Whether each validation pair is right under each method, pairs by ascending strength."""
    models = [f"{name}_3_epochs" for name in METHODS]
    kept = rows(run.path / "04_rm_denoise" / models[0] / "scores.jsonl")[0]["valid"]
    strength = [r[MEAN] for r in rows(run.path / "03_strength/valid.jsonl") if r["id"] in kept]
    order = np.argsort(strength, kind="stable")
    right = {m: np.array(curve(run.path, m)["right"]["original"])[:, order].tolist()
             for m in models}
    return {"step": curve(run.path, models[0])["step"], "right": right}


def data_joint(run):
    """MetaRM of round 1 and the plain joint objective at the same strength: J of each held-back
    prompt, accuracy; and what stage 08 says of PPO under them."""
    def model(folder, kind, strength, held):
        metrics = read(folder / "manifest.json")["metrics"]
        return {"kind": kind, "strength": strength, "J": held["J"], "accuracy": {
            k.removeprefix("accuracy_"): v for k, v in metrics.items() if k[:9] == "accuracy_"}}
    folder, out = run.path / "07_metarm", {}
    held = read(folder / "round_1/held_back.json")["vanilla"]                      # same samples
    vanilla = model(run.path / "04_rm_denoise/baseline", "vanilla", 0.0, held)
    for name in common.finished(folder):
        kind = {"eta": "eta", "joint": "lam"}.get(name.split("_")[0])
        if kind:
            strength = read(folder / name / "manifest.json")["hyperparameters"][kind]
            held = read(folder / name / "held_back.json")["theta"]
            out[name] = model(folder / name, kind, strength, held)
    if not out:
        raise Missing(f"{folder} has no eta_* and no joint_*")
    out = dict(sorted(out.items(), key=lambda item: (item[1]["kind"], item[1]["strength"])))
    return {"models": {"vanilla": vanilla} | out,
            **evaluated(run, ["round_1", "joint", "more_1"], ("eval_",))}


def data_table_1(run):
    """The weakest pair, the one nearest zero and the strongest, with their texts."""
    return {row["kind"]: row for row in rows(run.path / "03_strength/table_1.jsonl")}


def data_samples(run, prompts=3):
    """The last answers of every round to the same few prompts, with their reward and, if it is
    known, gold."""
    out = {}
    for name in ["round_0", *rounds(run)[1:]]:
        samples = rows(run.path / "06_ppo" / name / "samples.jsonl")
        for step, policy in ((0, "sft"), (samples[-1]["step"], name)):
            if step or name == "round_0":
                for s in [s for s in samples if s["step"] == step][:prompts]:
                    entry = out.setdefault(s["id"], {"prompt": s["prompt"], "answers": []})
                    entry["answers"].append({"policy": policy} | {
                        k: s[k] for k in ("response", "reward", "gold") if k in s})
    return out


def data_table_3(run):
    """Stage 08's comparisons of each task's best round, which it chose on other prompts."""
    tables = [read(p / "08_evaluate/tables.json")["table_3"] for p in (run.path, run.summary) if p]
    if not sum(tables, []):
        raise Missing(f"{run.path} has no round of MetaRM")
    return sum(tables, [])


def data_15(run):
    found = [row for row in data_table_3(run) if row["set"].startswith("ood_")]
    if not found:
        raise Missing("no evaluation set is out of distribution (00_data.py --ood_prompts)")
    return found


def data_more(run):
    policies = [*rounds(run)[:4], "more_1", "more_2", "more_3"]
    found = {name: x for name, x in mean_scores(run, policies).items() if "more_1" in x}
    if not found:
        raise Missing(f"{run.path}/08_evaluate has no more_1 (run 06_ppo.py --name more_1, then "
                      "08_evaluate.py)")
    return found


def data_best_of_n(run):
    """Expected judge's score and own reward of the best of n under each reward model, for each
    prompt."""
    samples = rows(run.path / "08_best_of_n/best_of_n.jsonl")
    total = len(samples[0]["judge"])
    ns = [2 ** i for i in range(int(math.log2(total)) + 1)]
    out = {"n": ns, "sets": [s["set"] for s in samples], "judge": {}, "reward": {}}
    for model in samples[0]["rewards"]:
        name = model.split("/")[1] if "metarm" not in model else f"metarm_{model.split('/')[1]}"
        for key in ("judge", "reward"):
            out[key][name] = [
                [round(best_of(s["rewards"][model], s["judge"] if key == "judge" else
                               s["rewards"][model], n), 4) for n in ns] for s in samples]
    return out


def best_of(rewards, values, n):
    """Mean of `values` at the highest of n rewards over all ways to draw n of the samples without
    replacement: the i-th lowest of N is the best of n in C(i - 1, n - 1) of C(N, n) draws (Nakano
    et al. 2021, WebGPT, appendix I)."""
    N = len(rewards)
    order = np.argsort(rewards, kind="stable")
    weights = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
    return float(np.array(values)[order] @ weights)


# ---------------------------------------------------------------- drawing
# Each takes [data of a seed] and returns (matplotlib figure or None, rows of the table behind it,
# the first its head).

def canvas(columns, rows=1, width=3.6, height=3.1, **more):
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows),
                                squeeze=False, layout="constrained", **more)
    return figure, list(axes.flat)


def band(axis, x, lines, label=None, **style):
    """Mean over seeds of curves that may differ in length, the range over seeds as a band."""
    length = min(len(x), *map(len, lines))
    values, x = np.array([line[:length] for line in lines], float), np.array(x[:length])
    drawn, = axis.plot(x, values.mean(0), label=label, **style)
    if len(lines) > 1:
        axis.fill_between(x, values.min(0), values.max(0), color=drawn.get_color(), alpha=0.15,
                          linewidth=0)


def cell(values):
    """Mean over seeds, and the range when there are several."""
    text = f"{np.mean(values):.3f}"
    return text + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def mean_right(c, kind, at=None):
    right = np.array(c["right"][kind])
    return right.mean(1) if at is None else right[at].mean()


def label(model):
    return model.replace("_3_epochs", ", 3 epochs").replace("_", " ")


def draw_01(seeds):
    figure, axes = canvas(2)
    for axis, key in zip(axes, ("mean", "std")):
        axis.hist(np.concatenate([d[key] for d in seeds]), bins=60, color=OKABE_ITO[2])
        axis.set(xlabel=f"{key} of the preference difference, ten models", ylabel="pairs")
    figure.axes[0].axvline(0, color="k", linestyle="--")
    table = [["seed", "pairs", "share with mean < 0", "median mean", "median std"]]
    values = [(len(d["mean"]), np.mean(np.array(d["mean"]) < 0), np.median(d["mean"]),
               np.median(d["std"])) for d in seeds]
    return figure, table + [[i, n, *(f"{v:.3f}"
                                     for v in rest)]
                            for i, (n, *rest) in enumerate(values)]


def draw_02(seeds):
    figure, (axis,) = canvas(1, width=5)
    groups = range(min(map(len, seeds)))
    for name in ("mean", "std"):
        band(axis, [i + 1 for i in groups], [[g[name] for g in d] for d in seeds], name, marker=".")
    axis.set(xlabel="group of pairs, by ascending strength", ylabel="preference difference")
    axis.legend()
    return figure, [["group", "mean", "std"]] + [
        [i + 1, *(cell([d[i][name] for d in seeds]) for name in ("mean", "std"))] for i in groups]


def draw_03(seeds):
    figure, (axis,) = canvas(1, width=5)
    table = [["seed", "group", "mean strength", "labels the judge confirms"]]
    for i, d in enumerate(seeds):
        axis.plot(*zip(*d["groups"]), ".-", label=f"seed {i}")
        table += [[i, j, f"{mean:.3f}", f"{share:.3f}"]
                  for j, (mean, share) in enumerate(d["groups"], 1)]
        table += [[i, name.replace("_", " "), "", f"{np.mean(d[name]):.3f}"]
                  for name in ("weakest", "near_zero", "strongest")]
    axis.set(xlabel="mean preference difference of the group",
             ylabel="share of labels the judge confirms", ylim=(0, 1))
    axis.legend()
    return figure, table


def draw_models(seeds):
    """Accuracy and loss of several models of stage 04 during training: Figures 4 to 7 and 21 to
    25."""
    models = list(seeds[0])
    kind = "judge" if "judge" in seeds[0][models[0]]["right"] else "original"
    figure, axes = canvas(2, width=4.6)
    for j, model in enumerate(models):
        style = {"color": plt.get_cmap("viridis")
                          (j / max(1,
                                   len(models) - 1))} if len(models) > 6 else {}
        steps = seeds[0][model]["step"]
        band(axes[0], steps, [mean_right(d[model], kind) for d in seeds], label(model), **style)
        band(axes[1], steps, [d[model]["train_loss"] for d in seeds], **style)
    axes[0].axhline(0.5, color="k", linestyle=":", linewidth=1)
    axes[0].set(xlabel="step", ylabel=f"accuracy, {kind} labels")
    axes[1].set(xlabel="step", ylabel="loss on training pairs (nats, Eq. 2)")
    figure.legend(loc="outside right center", fontsize=8)
    return figure, final_table(seeds, models)


def final_table(seeds, models):
    kinds = [k for k in (*SETS, "train") if k in seeds[0][models[0]]["right"]]
    return [["model", *(f"accuracy, {k}" for k in kinds)]] + [[
        label(m), *(cell([mean_right(d[m], k, -1) for d in seeds]) for k in kinds)] for m in models]


def draw_08(seeds):
    kinds = [k for k in (*SETS, "train") if k in next(iter(seeds[0].values()))["right"]]
    figure, axes = canvas(len(kinds), sharey=True)
    for axis, kind in zip(axes, kinds):
        for model in seeds[0]:
            band(axis, seeds[0][model]["step"], [mean_right(d[model], kind) for d in seeds],
                 label(model) if kind == kinds[0] else None)
        axis.set(title="training pairs" if kind == "train" else f"{kind} validation set",
                 xlabel="step")
    figure.axes[0].set_ylabel("accuracy")
    figure.legend(loc="outside right center", fontsize=8)
    return figure, final_table(seeds, list(seeds[0]))


def draw_19(seeds):
    name = "baseline_3_epochs"
    figure, axes = canvas(2, width=4.6)
    for kind in ("train", *(k for k in SETS if k in seeds[0][name]["right"])):
        band(axes[0], seeds[0][name]["step"], [mean_right(d[name], kind) for d in seeds], kind)
    mark_epochs(axes[0], seeds[0][name]["step"][-1])
    axes[0].set(xlabel="step", ylabel="accuracy")
    axes[0].legend(fontsize=8)
    scores = np.concatenate([d["scores"] for d in seeds])
    for k, side in enumerate(("chosen", "rejected")):
        axes[1].hist(scores[:, k], bins=40, alpha=0.6, label=side, color=OKABE_ITO[2 + k])
    axes[1].set(xlabel="reward after three epochs", ylabel="validation pairs")
    axes[1].legend()
    return figure, final_table(seeds, [name])


def mark_epochs(axis, last, epochs=3):
    for epoch in range(1, epochs + 1):
        axis.axvline(last * epoch / epochs, color="k", linestyle=":", linewidth=1)


def draw_20(seeds):
    figure, axes = canvas(2, width=4.6)
    steps = seeds[0]["step"]
    for side in ("chosen", "rejected"):
        band(axes[0], steps, [d[side] for d in seeds], side)
    band(axes[1], steps, [np.subtract(d["chosen"], d["rejected"]) for d in seeds])
    for axis, name in zip(axes,
                          ("mean reward, validation pairs", "mean reward, chosen minus rejected")):
        mark_epochs(axis, steps[-1])
        axis.set(xlabel="step (dotted: ends of the epochs)", ylabel=name)
    axes[0].legend()
    ends = [[np.array(d["epoch_end"][e]) for d in seeds] for e in range(3)]
    return figure, [["end of epoch", "chosen", "rejected", "gap"]] + [[
        e + 1, *(cell([x[:, k].mean() for x in end]) for k in (0, 1)),
        cell([(x[:, 0] - x[:, 1]).mean() for x in end])] for e, end in enumerate(ends)]


def draw_26(seeds):
    columns = 4
    figure, axes = canvas(columns, 2, width=2.4, height=2.2, sharex=True, sharey=True)
    table = [["labels", "step", "mean |2p - 1|"]]
    for row, (name, first) in enumerate(seeds[0].items()):
        at = np.linspace(0,
                         min(len(d[name]["step"]) for d in seeds) - 1, columns).round().astype(int)
        for axis, i in zip(axes[row * columns:], at):
            p = np.concatenate([d[name]["p"][i] for d in seeds])
            axis.hist(p, bins=25, range=(0, 1), color=OKABE_ITO[2 + row])
            axis.set_title(f"{name}, step {first['step'][i]}", fontsize=9)
        table += [[
            name, step,
            cell([np.abs(2 * np.array(d[name]["p"][i]) - 1).mean()
                  for d in seeds])]
                  for i, step in enumerate(first["step"])
                  if i < min(len(d[name]["p"]) for d in seeds)]
    figure.supxlabel("p(chosen > rejected), training pairs as labelled")
    figure.supylabel("pairs")
    return figure, table


def slices(values, count):
    """Mean of each of `count` slices of the last axis."""
    return [part.mean(-1) for part in np.array_split(np.array(values), count, axis=-1)]


def draw_27(seeds):
    count = 20 if len(seeds[0]["right"]["baseline_3_epochs"][-1]) >= 100 else 5
    figure, (axis,) = canvas(1, width=6)
    table = [["method", *(f"slice {i + 1}" for i in range(count))]]
    for model in seeds[0]["right"]:
        lines = [slices(d["right"][model][-1], count) for d in seeds]
        band(axis, range(1, count + 1), lines, label(model), marker=".")
        table.append([label(model), *(f"{v:.2f}" for v in np.mean(lines, 0))])
    axis.set(xlabel="slice of the validation pairs, by ascending strength",
             ylabel="accuracy, original labels")
    axis.legend(fontsize=8)
    return figure, table


def draw_28(seeds):
    figure, axes = canvas(4, width=3, sharey=True)
    models, table = list(seeds[0]["right"]), [[
        "method", *(f"quarter {i}, last step" for i in range(1, 5))]]
    for model in models[1:]:
        lines = [[
            a - b
            for a, b in zip(slices(d["right"][model], 4), slices(d["right"][models[0]], 4))]
                 for d in seeds]
        for k, axis in enumerate(axes):
            band(axis, seeds[0]["step"], [line[k] for line in lines],
                 label(model) if k == 0 else None)
            axis.set(title=f"quarter {k + 1} by strength", xlabel="step")
        table.append([label(model), *(cell([line[k][-1] for line in lines]) for k in range(4))])
    figure.axes[0].set_ylabel("accuracy minus baseline's, original labels")
    figure.legend(loc="outside right center", fontsize=8)
    return figure, table


UNITS = {
    "reward": "mean reward (own scale)", "return": "mean return",
    "kl": "KL from SFT (nats per response)", "perplexity_sft": "perplexity under SFT",
    "length": "tokens per response", "gold": "true preference (gold)"}


def draw_ppo(seeds):
    """Training curves of PPO: Figures 9, 12 and 17."""
    keys = [k for k in UNITS if k in next(iter(seeds[0].values()))]
    figure, axes = canvas(3, 2, width=3.6, height=2.6)
    table = [["policy", *(f"{UNITS[k]}, last five steps" for k in keys)]]
    for name in seeds[0]:
        lines = {k: [d[name][k] for d in seeds if name in d] for k in keys}
        for axis, k in zip(axes, keys):
            band(axis, range(1,
                             len(lines[k][0]) + 1), lines[k],
                 label(name) if k == keys[0] else None)
            axis.set(xlabel="step", ylabel=UNITS[k])
        table.append([
            label(name), *(cell([np.mean(line[-5:]) for line in lines[k]]) for k in keys)])
    figure.legend(loc="outside right center", fontsize=8)
    return figure, table


def pooled(seeds, opponents, kinds=("eval_", "ood_"), policies=None):
    """Comparisons of stage 08 over all seeds: rows (set, policy, opponent, win, tie, lose in %,
    prompts). `policies` None: of the best round, which may be another in each seed."""
    found = {}
    for row in [row for d in seeds for row in d]:
        if row["set"].startswith(kinds) and row["opponent"] in opponents and (
                policies is None or row["policy"] in policies):
            policy = row["policy"] if policies else "best"
            found.setdefault((row["set"], row["opponent"], policy), []).append(row)
    table = [["set", "policy", "opponent", "win %", "tie %", "lose %", "prompts"]]
    for (name, opponent, policy), same in found.items():
        n = sum(row["n"] for row in same)
        shares = [sum(row[k] * row["n"] for row in same) / n for k in ("win", "tie", "lose")]
        names = ", ".join(dict.fromkeys(row["policy"] for row in same))
        table.append([name, policy if policies else names, opponent,
                      *(f"{100 * x:.0f}" for x in shares), n])
    return table


def draw_wins(opponents, kinds=("eval_",), policies=None):
    """Bars of win, tie and lose, a panel for each set and opponent: Figures 10, 13, 15."""
    def draw(seeds):
        rows_ = [d["comparisons"] if policies else d for d in seeds]
        table = pooled(rows_, opponents, kinds, policies)
        panels = list(dict.fromkeys((row[0], row[2]) for row in table[1:]))
        bars = max(sum((row[0], row[2]) == panel for row in table[1:]) for panel in panels)
        columns = len(opponents)
        figure, axes = canvas(columns, -(-len(panels) // columns), width=4.6,
                              height=0.9 + 0.3 * bars)
        for axis, panel in zip(axes, panels):
            shown = [row for row in table[1:] if (row[0], row[2]) == panel][::-1]
            left = np.zeros(len(shown))
            for k, color in ((3, OKABE_ITO[2]), (4, "#bbbbbb"), (5, OKABE_ITO[3])):
                width = np.array([float(row[k]) for row in shown])
                text = table[0][k].removesuffix(" %") if panel == panels[0] else None
                axis.barh([label(row[1]) for row in shown], width, left=left, color=color,
                          label=text)
                left += width
            axis.set(title=f"{panel[0]} against {panel[1]}", xlim=(0, 100), xlabel="% of prompts")
            axis.grid(False)
        for axis in axes[len(panels):]:
            axis.remove()
        figure.legend(loc="outside right center", fontsize=8)
        return figure, table
    return draw


def draw_11(seeds):
    data = seeds[0]
    methods = [name for name in data if name != "ids"]
    figure, axes = canvas(len(methods), width=2.6, height=2.8)
    for axis, name in zip(axes, methods):
        points = np.array(data[name]["points"])
        for k, side in enumerate(("chosen", "rejected")):
            axis.scatter(*points[:, k].T, s=4, color=OKABE_ITO[2 + k],
                         label=side if name == methods[0] else None)
        axis.set(title=f"{label(name)}\nsilhouette {np.mean(data[name]['silhouette']):.3f}",
                 xticks=[], yticks=[], xlabel="t-SNE 1",
                 ylabel="t-SNE 2" if name == methods[0] else "")
    figure.legend(loc="outside right center", fontsize=8)
    return figure, [["method", "silhouette", "linear probe accuracy"]] + [[
        label(name), *(cell([np.mean(d[name][key])
                             for d in seeds])
                       for key in ("silhouette", "probe_right"))]
                                                                          for name in methods]


def draw_16(seeds):
    figure, axes = canvas(2, width=4.2, sharey=True)
    names = {"theta": "theta", "theta_prime": "theta' (after the meta step)"}
    for axis, key in zip(axes, names):
        values = {k: np.concatenate([np.ravel(held[k]["differences"]) for d in seeds
                                     for held in d.values()]) for k in (key, "vanilla")}
        top = max(v.max() for v in values.values())
        for (k, v), color in zip(values.items(), (3, 2)):
            axis.hist(v / top, bins=40, range=(0, 1), alpha=0.6, density=True,
                      color=OKABE_ITO[color], label="vanilla RM" if k == "vanilla" else "MetaRM")
        axis.set(xlabel="reward difference, share of the largest", title=f"MetaRM at {names[key]}")
        axis.legend()
    figure.axes[0].set_ylabel("density")
    return figure, [["round", "J at theta", "J at theta'", "J, vanilla RM"]] + [[
        r, *(cell([np.mean(d[r][k]["J"]) for d in seeds if r in d]) for k in
             ("theta", "theta_prime", "vanilla"))] for r in seeds[0]]


def draw_joint(seeds):
    figure, axes = canvas(2, width=4.6)
    models = {m: v for m, v in seeds[0]["models"].items() if all(m in d["models"] for d in seeds)}
    kind = "judge" if "judge" in models["vanilla"]["accuracy"] else "original"
    table = [["model", "J on held-back samples", f"accuracy, {kind}"]]
    value = {
        m: ([np.mean(d["models"][m]["J"])
             for d in seeds], [d["models"][m]["accuracy"][kind]
                               for d in seeds]) for m in models}
    for name, text in (("eta", "MetaRM"), ("lam", "L - lambda J")):
        ordered = sorted((m for m in models if models[m]["kind"] == name),
                         key=lambda m: models[m]["strength"])
        for k, axis in enumerate(axes):
            band(axis, [models[m]["strength"] for m in ordered],
                 [[value[m][k][s] for m in ordered] for s in range(len(seeds))], text, marker=".")
    for k, (axis,
            text) in enumerate(zip(axes, ("J on held-back samples", f"accuracy, {kind}'s labels"))):
        axis.axhline(np.mean(value["vanilla"][k]), color="k", linestyle=":", label="vanilla RM")
        axis.set(xscale="log", xlabel="strength: eta, lambda", ylabel=text)
    axes[0].legend(fontsize=8)
    table += [[
        m.replace("eta_", "MetaRM, eta ").replace("joint_", "L - lambda J, lambda "),
        *map(cell, value[m])] for m in models]
    names = {"round_1": "PPO under MetaRM", "joint": "PPO under L - lambda J",
             "more_1": "more PPO, same model"}
    wins = pooled([d["comparisons"] for d in seeds], ("round_0",), ("eval_",), list(names))[1:]
    both = {row[0] for row in wins if row[1] == "joint"}  # not the summary task, which has none
    return figure, table + [
        [f"{names[r[1]]} against round 0, {r[0]}", f"win {r[3]} %, tie {r[4]} %", f"lose {r[5]} %"]
        for r in wins if r[0] in both]


def draw_more(seeds):
    names = list(seeds[0])
    figure, axes = canvas(len(names), width=3)
    last = max(int(p[5:]) for p in seeds[0][names[0]] if p.startswith("more_"))
    table = [["set", "after round", "MetaRM rounds", "more PPO under the same model"]]
    for axis, name in zip(axes, names):
        lines = {text: [[d[name][f"{prefix}_{r}" if r else "round_0"] for r in range(last + 1)]
                        for d in seeds]
                 for text, prefix in (("MetaRM", "round"), ("more PPO", "more"))}
        for text, values in lines.items():
            band(axis, range(last + 1), values, text if name == names[0] else None, marker=".")
        axis.set(title=name, xlabel="round", xticks=range(last + 1))
        table += [[name, r, *(cell([v[r] for v in values]) for values in lines.values())]
                  for r in range(last + 1)]
    figure.axes[0].set_ylabel("mean score of the judge")
    figure.legend(loc="outside right center", fontsize=8)
    return figure, table


def draw_best_of_n(seeds):
    sets = list(dict.fromkeys(seeds[0]["sets"]))
    figure, axes = canvas(len(sets) + 1, width=3.6)
    n, table = seeds[0]["n"], [["reward model", "set", *(f"n = {k}" for k in seeds[0]["n"])]]
    for j, model in enumerate(m for m in seeds[0]["judge"] if all(m in d["judge"] for d in seeds)):
        style = {"color": OKABE_ITO[j % 8], "linestyle": "-" if j < 8 else "--"}
        for axis, name in zip(axes, sets):
            lines = [
                np.mean([v for v, s in zip(d["judge"][model], d["sets"]) if s == name],
                        0) for d in seeds]
            band(axis, n, lines, label(model) if name == sets[0] else None, **style)
            axis.set(title=name, ylabel="judge's score of the best of n")
            table.append([label(model), name, *(f"{v:.2f}" for v in np.mean(lines, 0))])
        rewards = [np.mean(d["reward"][model], 0) for d in seeds]
        band(axes[-1], n, [(r - r[0]) / (r[-1] - r[0] + 1e-12) for r in rewards], **style)
    axes[-1].set(title="own reward", ylabel="rise from n = 1, share of the whole")
    for axis in axes:
        axis.set(xscale="log", xlabel="n, responses of SFT")
    figure.legend(loc="outside right center", fontsize=8)
    return figure, table


def draw_equation_17(seeds):
    return None, [[
        "seed", "cosine, whole", "cosine, grad J fixed", "size of the change / grad L", "eta"]
                  ] + [[i, *(f"{np.mean(d[k]):.4f}"
                             for k in ("whole", "fixed", "size")), d["eta"]]
                       for i, d in enumerate(seeds)]


def draw_table_2(seeds):
    policies = dict.fromkeys(row["policy"] for d in seeds for row in d["comparisons"])
    return None, pooled([d["comparisons"] for d in seeds], ("sft",), ("eval_",), list(policies))


def draw_table_3(seeds):
    return None, pooled(seeds, ("sft", "round_0"), ("eval_",))


def draw_texts(seeds):
    return None, []  # lab/page.py sets the texts


ROUND = ("06_ppo/round_*", "07_metarm/round_*")
# name: (title, what the paper saw, stage directories it comes from, data, drawing), in the paper's
# order
FIGURES = {
    "figure_01": ("Figure 1: strength of the preferences",
                  "Many means near 0 and about a quarter below it; the stds have a long tail.",
                  ("03_strength",), data_01, draw_01), "table_1":
                      ("Table 1: examples", "A wrong, an ambiguous and a strong pair.",
                       ("03_strength",), data_table_1, draw_texts),
    "figure_02":
        ("Figure 2: mean and std in 20 groups", "The std is U-shaped over strength.",
         ("03_strength",), lambda run: read(run.path / "03_strength/groups.json"), draw_02),
    "figure_03": ("Figure 3: consistency with the judge",
                  "0.164 in the weakest 500 pairs, 0.544 near zero, 0.956 in the strongest.",
                  ("03_strength",), data_03, draw_03),
    "figure_04": (
        "Figure 4: each tenth alone",
        "The lowest fifth trains models worse than chance, the next fifth models near chance; the "
        "strongest tenth is not the best.", ("04_rm_denoise/tenth_??",),
        lambda run: curves(run, *TENTHS),
        draw_models), "figure_05":
            ("Figure 5: the two weakest tenths flipped", "Flipped labels make both useful.",
             ("04_rm_denoise/tenth_??_flip",),
             lambda run: curves(run, "tenth_01", "tenth_01_flip", "tenth_02", "tenth_02_flip"),
             draw_models),
    "figure_06": (
        "Figure 6: the strongest tenth",
        "Soft labels keep the loss from 0 and help; with a margin they help most, a margin alone "
        "helps little.",
        ("04_rm_denoise/tenth_10*",),
        lambda run: curves(run, *(f"tenth_10{s}" for s in
                                  ("", "_soft", "_margin", "_soft_margin"))), draw_models),
    "figure_07":
        ("Figure 7: a margin on all data", "It improves accuracy.", ("04_rm_denoise/*_3_epochs",),
         lambda run: curves(run, "baseline", "margin", "baseline_3_epochs", "margin_3_epochs"),
         draw_models),
    "figure_08": (
        "Figure 8: five methods on three validation sets",
        "Baseline and margin lead on the original set and fall after a peak; the denoising methods "
        "stay level on the other two.", ("04_rm_denoise/*_3_epochs",), data_08, draw_08
    ), "figure_09": (
        "Figure 9: PPO under five reward models, no KL penalty",
        "KL and perplexity grow steadily under denoised models and fluctuate late under baseline "
        "and margin.",
        tuple(f"06_ppo/{name}" for name in METHODS), lambda run: ppo(run, *METHODS), draw_ppo
    ), "figure_10": ("Figure 10: the four methods against baseline and SFT",
                     "All four win clearly on harmless prompts, less on helpful ones.",
                     ("08_evaluate",), lambda run: evaluated(run, METHODS, ("eval_",)),
                     draw_wins(("baseline", "sft"), policies=METHODS)),
    "figure_11":
        ("Figure 11: features with and without contrastive learning, t-SNE of the first seed",
         "SimCSE lowers the overlap of chosen and rejected.",
         tuple(f"05_rm_contrastive/{name}" for name in CONTRASTIVE), data_11, draw_11), "figure_12":
             ("Figure 12: PPO under contrastive reward models, no KL penalty",
              "Return and reward are steadier than under the baseline.",
              tuple(f"06_ppo/{name}" for name in CONTRASTIVE),
              lambda run: ppo(run, "baseline", *CONTRASTIVE), draw_ppo), "figure_13":
                  ("Figure 13: contrastive methods against baseline and SFT",
                   "Slightly better; SimCSE on pairs is best.", ("08_evaluate",),
                   lambda run: evaluated(run, CONTRASTIVE, ("eval_",)),
                   draw_wins(("baseline", "sft"), policies=CONTRASTIVE)),
    "equation_17":
        ("Equation 17, measured",
         "The meta step adds dot products of the two gradients to the loss.",
         ("07_metarm/round_1",), lambda run: read(run.path / "07_metarm/round_1/equation_17.json"),
         draw_equation_17), "table_2":
             ("Table 2: every round against SFT",
              "Win rates rise to round 3 (summary: 4) and then fall.", ROUND,
              lambda run: evaluated(run, rounds(run)), draw_table_2), "table_3":
                  ("Table 3: the best round (chosen on other prompts) against SFT and vanilla PPO",
                   "It wins clearly against both, in all three tasks.", ROUND, data_table_3,
                   draw_table_3),
    "figure_15":
        ("Figure 15: the best round out of distribution",
         "It beats SFT and vanilla PPO there too, by a little less.", ("08_evaluate",), data_15,
         draw_wins(("sft", "round_0"), ("ood_",))), "figure_16":
             ("Figure 16: reward differences, MetaRM and vanilla",
              "MetaRM's are clearly larger on the shifted policy's samples.",
              ("07_metarm/round_*",), data_16, draw_16), "figure_17":
                  ("Figure 17: vanilla PPO and each round",
                   "Rewards rise in every round; perplexity falls in round 3 and rises in round 4.",
                   ("06_ppo/round_*",), lambda run: ppo(run, *rounds(run)), draw_ppo), "samples":
                       ("Answers of each round", "", ("06_ppo/round_*",), data_samples, draw_texts),
    "figure_19": (
        "Figure 19: training dynamics",
        "After the first epoch training accuracy rises, validation accuracy does not; chosen and "
        "rejected scores overlap widely.", ("04_rm_denoise/baseline_3_epochs",), data_19, draw_19
    ), "figure_20":
        ("Figure 20: reward inflation",
         "At the end of each epoch scores jump, the gap hardly grows.",
         ("04_rm_denoise/baseline_3_epochs",), data_20, draw_20), "figure_21":
             ("Figure 21: growing from the weakest",
              "With wrong pairs inside, much good data is needed to make up for them.",
              ("04_rm_denoise/part_000_*",), lambda run: curves(run, *PARTS[0], "baseline"),
              draw_models), "figure_22":
                  ("Figure 22: growing from the strongest",
                   "Without wrong pairs accuracy does not fall.", ("04_rm_denoise/part_*_100",),
                   lambda run: curves(run, *PARTS[1], "baseline"), draw_models),
    "figure_23":
        ("Figure 23: the weakest tenth, flipped",
         "Soft labels and margin together beat either alone.", ("04_rm_denoise/tenth_01_flip*",),
         lambda run: curves(
             run, *(f"tenth_01_flip{s}" for s in ("", "_soft", "_margin", "_soft_margin"))),
         draw_models), "figure_24":
             ("Figure 24: the fourth tenth", "A margin helps slightly, soft labels hardly.",
              ("04_rm_denoise/tenth_04*",),
              lambda run: curves(run, "tenth_04", "tenth_04_soft", "tenth_04_margin"), draw_models),
    "figure_25":
        ("Figure 25: the weakest tenth", "Flipping and soft labels each remove most of the harm.",
         ("04_rm_denoise/tenth_01", "04_rm_denoise/tenth_01_soft", "04_rm_denoise/tenth_01_flip"),
         lambda run: curves(run, "tenth_01", "tenth_01_soft", "tenth_01_flip"), draw_models
         ), "figure_26":
             ("Figure 26: p(chosen > rejected) during training",
              "Mass moves to 0 and 1, sooner with flipped labels.",
              ("04_rm_denoise/baseline_3_epochs", "04_rm_denoise/flip_3_epochs"), data_26, draw_26),
    "figure_27":
        ("Figure 27: accuracy by strength",
         "The methods differ mainly on ambiguous and wrong slices.", ("04_rm_denoise/*_3_epochs",),
         data_27, draw_27), "figure_28":
             ("Figure 28: accuracy by strength minus the baseline's, during training",
              "The same over the steps.", ("04_rm_denoise/*_3_epochs",), data_27, draw_28), "joint":
                  ("Not in the paper: MetaRM beside the joint objective L - lambda J", "",
                   ("07_metarm/eta_*", "07_metarm/joint_*"), data_joint, draw_joint), "more":
                       ("Not in the paper: MetaRM rounds beside more PPO without retraining", "",
                        ("06_ppo/more_*",), data_more, draw_more), "best_of_n":
                            ("Not in the paper: best of n under each reward model", "",
                             ("08_best_of_n",), data_best_of_n, draw_best_of_n),}
