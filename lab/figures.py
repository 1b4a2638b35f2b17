"""The paper's figures and tables from finished runs: what is in each, and how it is drawn. The one
drawing of each; lab/page.py puts them on a page, lab/claims.py takes its ledger from the same
numbers.

A run is a namespace: `path` (its directory), `summary` (that of the summary task, or None).
`FIGURES` names for each figure a function run → data (numbers as JSON keeps them, down to single
pairs and prompts, so that the ledger can draw its intervals), and a function (data of every seed)
→ (matplotlib figure, rows of the table behind it).
"""
import math
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import scipy.stats
import torch

import common
from lab.base import read_json, read_jsonl

if "matplotlib.pyplot" not in sys.modules:  # else a notebook has chosen how it draws
    matplotlib.use("Agg")  # without a display
import matplotlib.pyplot as plt  # noqa: E402

METHODS = ["baseline", "flip", "margin", "flip_margin", "soft_margin"]  # of stage 04
NOISY = ["baseline", "margin"]  # trained on the labels as they came
DENOISING = [name for name in METHODS if name not in NOISY]
CONTRASTIVE = ["simcse", "simcse_diff", "swav", "swav_diff"]            # of stage 05
# lab/metarm_variants.py's; and what PPO without KL penalty was run under
VARIANTS = {"eta": "MetaRM", "theta_prime": "theta' served", "weights": "pair weights",
            "joint": "L - eta J"}
OPTIMISED = ["baseline", "flip_margin", "soft_margin", "simcse", "metarm", "mean", "mean_std"]
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
def read(path):
    if not path.exists():
        raise Missing(f"{path} is not there")
    return (read_jsonl if path.suffix == ".jsonl" else read_json)(path)


@cache
def curve(run_path, model):
    """Training of one model of stage 04 → {"step": [S], "train_loss": [S], "right": {set:
    [S][pairs] 0 or 1}}; the sets are the three validation sets, "train" and, at the steps of
    "gold_step" only, "gold"."""
    scores = read(run_path / "04_rm_denoise" / model / "scores.jsonl")
    valid = [row for row in read(run_path / "03_strength/valid.jsonl")
             if row["id"] in scores[0]["valid"]]
    right = [common.correct(torch.tensor([s["valid"][row["id"]] for row in valid]), valid)
             for s in scores]
    train = np.array([list(s["train"].values()) for s in scores]) @ [1, -1]        # [S, N]
    gold = {s["step"]: (np.array(list(s["gold"].values())) @ [1, -1] > 0).astype(int).tolist()
            for s in scores if "gold" in s}
    return {"step": [s["step"] for s in scores], "gold_step": list(gold),
            "train_loss": np.logaddexp(0, -train).mean(1).round(4).tolist(),
            "right": {name: [r[name].int().tolist() for r in right] for name in right[0]}
            | {"train": (train > 0).astype(int).tolist()}
            | ({"gold": list(gold.values())} if gold else {})}


def curves(run, *models):
    return {model: curve(run.path, model) for model in models}


def ppo(run, *names):
    """{policy: {metric: [steps]}} from stage 06."""
    out = {}
    for name in names:
        history = read(run.path / "06_ppo" / name / "metrics.jsonl")
        out[name] = {k: [h[k] for h in history] for k in (*UNITS, "reward_std") if k in history[0]}
    return out


def evaluated(run, policies, kind=""):
    """What stage 08 says of some policies on the sets of a kind, the summary task's too: its
    comparisons, the verdicts behind them, each task's best round and where it may be measured."""
    out = {"comparisons": [], "verdicts": {}, "best": {}, "unseen": {}}
    for path in [p for p in (run.path, run.summary) if p]:
        tables = read(path / "08_evaluate/tables.json")
        out["comparisons"] += [row for row in tables["comparisons"] if row["policy"] in policies
                               and row["set"].startswith(kind)]
        out["best"] |= tables["best_round"]
        out["unseen"] |= tables["unseen"]
        for name, found in read(path / "08_evaluate/verdicts.json").items():
            if name.startswith(kind) and (found := {p: found[p] for p in policies if p in found}):
                out["verdicts"][name] = found
    if not out["comparisons"]:
        raise Missing(f"{run.path}/08_evaluate has no set {kind}* with one of "
                      f"{', '.join(policies)}")
    return out


def rounds(run, stage="06_ppo"):
    """Names of a stage's finished rounds, in order; of stage 06 the first is vanilla PPO."""
    found = [p.name for p in (run.path / stage).glob("round_*")
             if re.fullmatch(r"round_\d+", p.name)]
    return sorted(found, key=lambda name: int(name[6:]))


# ---------------------------------------------------------------- data of each figure

def data_01(run):
    train = read(run.path / "03_strength/train.jsonl")
    return {"mean": [round(r[MEAN], 4) for r in train], "std": [round(r[STD], 4) for r in train]}


def data_accuracies(run):
    """{reward model: {validation set: share of its pairs that are right, at the end}}: the voters,
    and the pipeline's models of stages 04, 05 and 07."""
    valid = read(run.path / "03_strength/valid.jsonl")
    scores = torch.tensor([[row[f"{side}_score_list"] for side in ("chosen", "rejected")]
                           for row in valid])                                      # [N, 2, M]
    out = {f"voter {m}": common.accuracies(scores[..., m], valid) for m in range(scores.shape[2])}
    for name in (*(f"04_rm_denoise/{m}" for m in METHODS),
                 *(f"05_rm_contrastive/{m}" for m in CONTRASTIVE),
                 *(f"07_metarm/{r}" for r in rounds(run, "07_metarm"))):
        if (path := run.path / name / "manifest.json").exists():
            out[name.split("/")[1]] = read(path)["metrics"]
    return {m: {k: of[f"accuracy_{k}"] for k in (*SETS, "gold") if f"accuracy_{k}" in of}
            for m, of in out.items()}


def data_03(run):
    found = read(run.path / "03_strength/consistency.json")
    if not found:
        raise Missing("no pair has a judge's label")
    return found


def data_epochs(run, names=METHODS, beside=()):
    """Models over three epochs, and those `beside` them; where only the default run was made, the
    models over its one."""
    try:
        return curves(run, *beside, *(f"{name}_3_epochs" for name in names))
    except Missing:
        return curves(run, *names)


def data_11(run):
    folder = run.path / "05_rm_contrastive"
    found = {name: read(folder / name / "features.json") for name in CONTRASTIVE}
    if "baseline" not in found["simcse"]:
        raise Missing(f"{folder}/simcse is not trained on the baseline's pairs")
    return {"baseline": found["simcse"]["baseline"]} | {n: d[n] for n, d in found.items()}


def data_16(run):
    """Rewards, their differences and J (Eq. 11) of each round's held-back samples at theta, theta'
    and under the vanilla model."""
    folder = run.path / "07_metarm"
    return {name: read(folder / name / "held_back.json") for name in rounds(run, "07_metarm")}


def data_19(run):
    """The baseline over three epochs, and its last scores of the validation pairs."""
    scores = read(run.path / "04_rm_denoise/baseline_3_epochs/scores.jsonl")
    return curves(run, "baseline_3_epochs") | {"scores": list(scores[-1]["valid"].values())}


def data_20(run):
    """Scores of the validation pairs under the baseline over three epochs; at the epochs' ends
    every pair's."""
    scores = read(run.path / "04_rm_denoise/baseline_3_epochs/scores.jsonl")
    pairs = np.array([list(s["valid"].values()) for s in scores])                  # [S, N, 2]
    steps = [s["step"] for s in scores]
    return {"step": steps, "chosen": pairs[..., 0].mean(1).round(4).tolist(),
            "rejected": pairs[..., 1].mean(1).round(4).tolist(),
            "epoch_end": [pairs[epoch_end(steps, e)].tolist() for e in (1, 2, 3)]}


def epoch_end(steps, epoch, epochs=3):
    """Index of the evaluation nearest to the end of an epoch; it must lie within a quarter of
    one."""
    distance = np.abs(np.array(steps) - steps[-1] * epoch / epochs)
    if distance.min() > max(1, steps[-1] / epochs / 4):
        raise Missing(f"no evaluation near the end of epoch {epoch}: train it again")
    return int(distance.argmin())


def data_26(run):
    """p(y_c > y_r | x) of the same training pairs over training, under the labels trained on."""
    out = {}
    for name in ("baseline", "flip"):
        scores = read(run.path / f"04_rm_denoise/{name}_3_epochs/scores.jsonl")
        d = np.array([list(s["train"].values()) for s in scores]) @ [1, -1]
        out[name] = {"step": [s["step"] for s in scores],
                     "p": (1 / (1 + np.exp(-d))).round(3).tolist()}
    return out


def data_27(run):
    """Whether each validation pair is right under each method, pairs by ascending strength."""
    models = [f"{name}_3_epochs" for name in METHODS]
    kept = read(run.path / "04_rm_denoise" / models[0] / "scores.jsonl")[0]["valid"]
    strength = [r[MEAN] for r in read(run.path / "03_strength/valid.jsonl") if r["id"] in kept]
    order = np.argsort(strength, kind="stable")
    right = {m: np.array(curve(run.path, m)["right"]["original"])[:, order].tolist()
             for m in models}
    return {"step": curve(run.path, models[0])["step"], "right": right}


def data_variants(run):
    """MetaRM of round 1 and its variants at several strengths: J of each held-back prompt; accuracy
    on true labels; Kendall's tau of rewards and judge for each prompt that round 0's policy
    answered; and what stage 08 says of PPO under them."""
    folder, out = run.path / "07_metarm", {}
    samples = read(run.path / "08_best_of_n_round_0/best_of_n.jsonl")

    def model(name, kind, eta, J):
        metrics = read(run.path / name / "manifest.json")["metrics"]
        tau = [scipy.stats.kendalltau(s["judge"], s["rewards"][name]).statistic for s in samples
               if len(set(s["judge"])) > 1]                 # of equal responses there is no order
        return {"kind": kind, "eta": eta, "J": J, "tau": [round(float(t), 4) for t in tau],
                "accuracy": next(metrics[k] for k in ("accuracy_gold", "accuracy_judge",
                                                      "accuracy_original") if k in metrics)}
    for name in common.finished(folder):
        path, hyper = f"07_metarm/{name}", read(folder / name / "manifest.json")["hyperparameters"]
        kind = hyper.get("variant") or "eta" * name.startswith("eta_")
        if kind in VARIANTS and path in samples[0]["rewards"]:
            held = read(folder / name / "held_back.json")
            out[name] = model(path, kind, hyper["eta"], held["theta"]["J"])
            vanilla = held["vanilla"]["J"]                                         # the same in all
    if not out:
        raise Missing(f"{folder} has no eta_* and no variant that round 0's samples were scored by")
    out = dict(sorted(out.items(), key=lambda x: (list(VARIANTS).index(x[1]["kind"]), x[1]["eta"])))
    return {"models": {"vanilla": model("04_rm_denoise/baseline", "vanilla", 0.0, vanilla)} | out,
            **evaluated(run, ["round_1", "more_1", *VARIANTS, "weights_mild"], "eval_")}


def data_overoptimised(run):
    """Own reward, in units of its std, and the true preference during PPO without KL penalty, each
    a mean over a tenth of the steps."""
    out = {}
    for name, x in ppo(run, *OPTIMISED).items():
        if "gold" not in x:
            raise Missing("the true preference is not known")
        reward = (np.array(x["reward"]) - x["reward"][0]) / x["reward_std"][-1]
        out[name] = {key: [round(float(part.mean()), 4)
                           for part in np.array_split(values, min(10, len(values)))]
                     for key, values in (("reward", reward), ("gold", np.array(x["gold"])))}
    return out


def data_parting(run):
    """The rounds' PPO steps one after another: each round's own reward in units of its std, from
    that round's start, and the true preference; the running mean of the latter over a fifth of a
    round; and the step of its highest value, the point where reward and gold part, or None: where
    it falls from there to the end by no more than it does in 95 % of random orders of the steps."""
    found = list(ppo(run, *(rounds(run) or ["round_0"])).values())
    if any("gold" not in x for x in found):
        raise Missing("the true preference is not known")
    gold = np.concatenate([x["gold"] for x in found])
    width = max(1, len(found[0]["gold"]) // 5)

    def running_mean(x):
        return np.convolve(x, np.ones(width) / width, "valid")
    draw, smooth = np.random.default_rng(0), running_mean(gold)
    falls = [x.max() - x[-1] for x in (running_mean(draw.permutation(gold)) for _ in range(400))]
    return {"reward": [((np.array(x["reward"]) - x["reward"][0]) / x["reward_std"][-1]
                        ).round(4).tolist() for x in found],
            "gold": gold.tolist(), "smooth": smooth.round(4).tolist(),
            "part": int(smooth.argmax()) + width
            if smooth.max() - smooth[-1] > np.quantile(falls, 0.95) else None}


def data_table_1(run):
    """The weakest pair, the one nearest zero and the strongest, with their texts."""
    return {row["kind"]: row for row in read(run.path / "03_strength/table_1.jsonl")}


def data_samples(run):
    """The last answers of every round to the same few prompts, with their reward and, if it is
    known, gold. The first prompt is the one whose reward vanilla PPO raised most: where there is
    most to see, by a choice that knows neither gold nor the text."""
    out = {}
    for name in ["round_0", *rounds(run)[1:]]:
        samples = read(run.path / "06_ppo" / name / "samples.jsonl")
        policy = {samples[-1]["step"]: name} | ({0: "sft"} if name == "round_0" else {})
        for s in [s for s in samples if s["step"] in policy]:
            entry = out.setdefault(s["id"], {"prompt": s["prompt"], "answers": []})
            entry["answers"].append({"policy": policy[s["step"]]} | {
                k: s[k] for k in ("response", "reward", "gold") if k in s})
    most = max(out, key=lambda prompt: out[prompt]["answers"][1]["reward"] -
               out[prompt]["answers"][0]["reward"])
    return {most: out.pop(most)} | out


def data_table_3(run):
    """Stage 08's comparisons of each task's best round, which it chose on other prompts."""
    tables = [read(p / "08_evaluate/tables.json")["table_3"] for p in (run.path, run.summary) if p]
    if not sum(tables, []):
        raise Missing(f"{run.path} has no round of MetaRM")
    return sum(tables, [])


def data_15(run):
    found = [row for row in data_table_3(run) if row["set"].startswith("ood_")]
    if not found:
        raise Missing("no prompts out of distribution (00_data.py --ood_prompts) are of a task "
                      "whose best round is known: it is chosen on the task's eval_ set")
    return found


def data_more(run):
    """{set: {policy: mean score of the judge}} of the rounds of MetaRM and of more PPO, as far as
    there are both."""
    scores, last = read(run.path / "08_evaluate/tables.json")["mean_score"], 0
    while {f"round_{last + 1}", f"more_{last + 1}"} <= scores.keys():
        last += 1
    if not last:
        raise Missing(f"{run.path}/08_evaluate has not both round_1 and more_1 (run 06_ppo.py "
                      "--name more_1, then 08_evaluate.py), or no mean scores")
    names = ["round_0", *(f"{kind}_{r}" for r in range(1, last + 1) for kind in ("round", "more"))]
    return {s: {n: scores[n][s] for n in names} for s in scores["round_0"] if s[:5] == "eval_"}


def data_best_of_n(run):
    """Expected judge's score and own reward of the best of n under each reward model, and under the
    mean and mean - std of stage 02's standardised rewards, for each prompt."""
    samples = read(run.path / "08_best_of_n/best_of_n.jsonl")
    ns = [2 ** i for i in range(int(math.log2(len(samples[0]["judge"]))) + 1)]
    rewards = {name: np.array([s["rewards"][name] for s in samples]) for name in
               samples[0]["rewards"]}                                            # [prompts, N]
    voters = [rewards.pop(name) for name in list(rewards) if name.startswith("02_")]
    if voters:
        votes = np.array([(r - r.mean()) / r.std() for r in voters])
        rewards["ensemble/mean"] = votes.mean(0)
        rewards["ensemble/mean_std"] = votes.mean(0) - votes.std(0)
    out = {"n": ns, "sets": [s["set"] for s in samples], "judge": {}, "reward": {}}
    for model, r in rewards.items():
        folder, name = model.split("/")
        name = f"metarm_{name}" if folder == "07_metarm" else name
        for key in ("judge", "reward"):
            out[key][name] = [[round(best_of(x, s["judge"] if key == "judge" else x, n), 4)
                               for n in ns] for x, s in zip(r, samples)]
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

def show(panels, columns=None, width=4.2, height=3.1, **more):
    """A figure of panels: dicts of the axes' settings and, of these, what is in them.

    lines: {label: (x, [curve of each seed])}, drawn as the mean over seeds of curves that may
    differ in length, the range over seeds as a band; style: {label: settings}; bars: {label:
    values} as histograms of settings hist; level, at: where a dotted line lies.
    """
    columns = columns or len(panels)
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, squeeze=False,
                                figsize=(width * columns, height * -(-len(panels) // columns)),
                                layout="constrained", **more)
    names, several = [], any(len({**p.get("lines", {}), **p.get("bars", {})}) > 1 for p in panels)
    for axis, panel in zip(axes.flat, panels):
        style = panel.pop("style", {})
        for name, (x, curves_) in panel.pop("lines", {}).items():
            n = min(len(x), *map(len, curves_))
            values, x = np.array([c[:n] for c in curves_], float), np.array(x[:n])
            drawn, = axis.plot(x, values.mean(0), label="_" * (name in names) + str(name),
                               **style.get(name, {}))
            names.append(name)
            if len(values) > 1:
                axis.fill_between(x, values.min(0), values.max(0), color=drawn.get_color(),
                                  alpha=0.15, linewidth=0)
        for name, values in panel.pop("bars", {}).items():
            axis.hist(values, alpha=0.6, label="_" * (name in names) + str(name),
                      **style.get(name, {}), **panel.get("hist", {}))
            names.append(name)
        panel.pop("hist", None)
        for x in panel.pop("at", ()):
            axis.axvline(x, color="k", linestyle=":", linewidth=1)
        if "level" in panel:
            axis.axhline(panel.pop("level"), color="k", linestyle=":", linewidth=1)
        axis.set(**panel)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    if several:
        figure.legend(loc="outside right center", fontsize=8)
    return figure


def cell(values):
    """Mean over seeds, and the range when there are several."""
    text = f"{np.mean(values):.3f}"
    return text + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def student(values, above=0.975):
    """95 % interval of the mean of one number a seed, or of each of several ([S, ...]), Student's
    t: (low, high), the high one at the level `above`; of one seed the number itself."""
    error = scipy.stats.sem(values) if len(values) > 1 else 0.0
    return tuple(np.mean(values, 0) + scipy.stats.t.ppf(level, max(len(values) - 1, 1)) * error
                 for level in (0.025, above))


def beside(values, control, form="+.3f"):
    """Difference of two means over the same seeds, with its interval when there are several."""
    difference = np.subtract(values, control)
    low, high = student(difference)
    return f"{np.mean(difference):{form}}" + (
        f" ({low:{form}} to {high:{form}})" if len(difference) > 1 else "")


def label(model):
    if model in ("mean", "mean_std"):
        return "ensemble's mean" + (" - std" if model == "mean_std" else "")
    return model.replace("_3_epochs", ", 3 epochs").replace("_", " ")


def accuracy(seeds, model, kind):
    """(steps, [share right at each evaluation of each seed])"""
    return seeds[0][model]["step"], [np.mean(d[model]["right"][kind], 1) for d in seeds]


def kinds_of(seeds):
    """The validation sets that are there, and "train"."""
    return [k for k in (*SETS, "train") if k in next(iter(seeds[0].values()))["right"]]


def same_models(seeds):
    """The runs that have all models of the first; of others the experiments are not over."""
    return [d for d in seeds if seeds[0].keys() <= d.keys()]


def final_table(seeds):
    models, kinds = [m for m in seeds[0] if "right" in seeds[0][m]], kinds_of(seeds)
    kinds += ["gold"] * all("gold" in d[m]["right"] for d in seeds for m in models)
    return [["model", *(f"accuracy, {k}" for k in kinds)]] + [
        [label(m), *(cell([a[-1] for a in accuracy(seeds, m, k)[1]]) for k in kinds)]
        for m in models]


def draw_01(seeds):
    mean, std = (np.concatenate([d[key] for d in seeds]) for key in ("mean", "std"))
    width = (mean.max() - min(mean.min(), 0)) / 60 or 1.0  # 0 lies between two bars
    bins = np.arange(np.floor(mean.min() / width), np.ceil(mean.max() / width) + 2) * width
    sides = {"mean below 0": mean[mean < 0], "0 and above": mean[mean >= 0]}
    figure = show([
        {"bars": sides, "hist": {"bins": bins}, "at": [0], "ylabel": "pairs", "style": {
            name: {"color": OKABE_ITO[k]} for name, k in zip(sides, (3, 2))},
         "xlabel": "mean of the preference difference (strength)"},
        {"bars": {"std": std}, "hist": {"bins": 60}, "style": {"std": {"color": OKABE_ITO[2]}},
         "xlabel": "std of the preference difference", "ylabel": "pairs"}])
    return figure, [["seed", "pairs", "share with mean < 0", "median mean", "median std"]] + [
        [i, len(d["mean"]), *(f"{v:.3f}" for v in (
            np.mean(np.array(d["mean"]) < 0), np.median(d["mean"]), np.median(d["std"])))]
        for i, d in enumerate(seeds)]


def draw_02(seeds):
    groups, keys = range(1, min(map(len, seeds)) + 1), ("mean", "std")
    figure = show([{"lines": {k: (groups, [[g[k] for g in d] for d in seeds]) for k in keys},
                    "xlabel": "group of pairs, by ascending strength",
                    "ylabel": "preference difference"}], width=6)
    return figure, [["group", *keys]] + [
        [i, *(cell([d[i - 1][k] for d in seeds]) for k in keys)] for i in groups]


def draw_03(seeds):
    figure = show([{"lines": {f"seed {i}": (*np.array(d["groups"])[:, :1].T, [
        [share for _, share in d["groups"]]]) for i, d in enumerate(seeds)}, "ylim": (0, 1),
        "xlabel": "mean preference difference of the group",
        "ylabel": "share of labels the judge confirms"}], width=6)
    table = [["seed", "group", "mean strength", "labels the judge confirms"]]
    for i, d in enumerate(seeds):
        table += [[i, j, f"{mean:.3f}", f"{share:.3f}"]
                  for j, (mean, share) in enumerate(d["groups"], 1)]
        table += [[i, name.replace("_", " "), "", f"{np.mean(d[name]):.3f}"]
                  for name in ("weakest", "near_zero", "strongest")]
    return figure, table


def draw_models(seeds):
    """Accuracy and loss of several models of stage 04 during training: Figures 4 to 7 and 21 to
    25."""
    seeds = same_models(seeds)
    models, kind = list(seeds[0]), "judge" if "judge" in kinds_of(seeds) else "original"
    colours = plt.get_cmap("viridis")(np.linspace(0, 1, len(models)))
    style = {label(m): {"color": c} for m, c in zip(models, colours)} if len(models) > 6 else {}
    losses = {label(m): (seeds[0][m]["step"], [d[m]["train_loss"] for d in seeds]) for m in models}
    return show([
        {"lines": {label(m): accuracy(seeds, m, kind) for m in models}, "style": style,
         "level": 0.5, "xlabel": "step", "ylabel": f"accuracy, {kind} labels"},
        {"lines": losses, "style": style, "xlabel": "step",
         "ylabel": "loss on training pairs (nats, Eq. 2)"}]), final_table(seeds)


def draw_08(seeds):
    seeds = same_models(seeds)
    return show([{"lines": {label(m): accuracy(seeds, m, kind) for m in seeds[0]},
                  "title": "training pairs" if kind == "train" else f"{kind} validation set",
                  "xlabel": "step", "ylabel": "accuracy"} for kind in kinds_of(seeds)],
                width=3.4, sharey=True), final_table(seeds)


def draw_19(seeds):
    name = "baseline_3_epochs"
    last, scores = seeds[0][name]["step"][-1], np.concatenate([d["scores"] for d in seeds])
    return show([
        {"lines": {kind: accuracy(seeds, name, kind) for kind in kinds_of(seeds)},
         "at": [last * e / 3 for e in (1, 2, 3)], "xlabel": "step", "ylabel": "accuracy"},
        {"bars": {"chosen": scores[:, 0], "rejected": scores[:, 1]}, "hist": {"bins": 40},
         "xlabel": "reward after three epochs", "ylabel": "validation pairs"}]), final_table(seeds)


def draw_20(seeds):
    steps, sides = seeds[0]["step"], ("chosen", "rejected")
    axes = {"at": [steps[-1] * e / 3 for e in (1, 2, 3)],
            "xlabel": "step (dotted: ends of the epochs)"}
    figure = show([
        {"lines": {side: (steps, [d[side] for d in seeds]) for side in sides},
         "ylabel": "mean reward, validation pairs", **axes},
        {"lines": {"gap": (steps, [np.subtract(d["chosen"], d["rejected"]) for d in seeds])},
         "style": {"gap": {"color": OKABE_ITO[2]}},  # one legend for both panels
         "ylabel": "mean reward, chosen minus rejected", **axes}])
    ends = [[np.mean(d["epoch_end"][e], 0) for d in seeds] for e in range(3)]      # [2] each
    return figure, [["end of epoch", *sides, "gap"]] + [
        [e + 1, *(cell([f(x) for x in end]) for f in (
            lambda x: x[0], lambda x: x[1], lambda x: x[0] - x[1]))] for e, end in enumerate(ends)]


def draw_26(seeds):
    panels, table = [], [["labels", "step", "mean |2p - 1|"]]
    for name, first in seeds[0].items():
        n = min(len(d[name]["step"]) for d in seeds)
        for i in np.linspace(0, n - 1, 4).round().astype(int):
            panels.append({"bars": {name: np.concatenate([d[name]["p"][i] for d in seeds])},
                           "hist": {"bins": 25, "range": (0, 1)}, "ylabel": "pairs",
                           "title": f"{name}, step {first['step'][i]}", "xlabel": "p(c > r)"})
        table += [[name, first["step"][i], cell([np.abs(2 * np.array(d[name]["p"][i]) - 1).mean()
                                                 for d in seeds])] for i in range(n)]
    return show(panels, 4, width=2.6, height=2.2, sharex=True, sharey=True), table


def slices(values, count):
    """Mean of each of `count` slices of the last axis."""
    return [part.mean(-1) for part in np.array_split(np.array(values), count, axis=-1)]


def draw_27(seeds):
    count = 20 if len(seeds[0]["right"]["baseline_3_epochs"][-1]) >= 100 else 5
    lines = {label(m): [slices(d["right"][m][-1], count) for d in seeds] for m in seeds[0]["right"]}
    return show([{"lines": {m: (range(1, count + 1), x) for m, x in lines.items()},
                  "xlabel": "slice of the validation pairs, by ascending strength",
                  "ylabel": "accuracy, original labels"}], width=6), \
        [["method", *(f"slice {i + 1}" for i in range(count))]] + [
            [m, *(f"{v:.2f}" for v in np.mean(x, 0))] for m, x in lines.items()]


def draw_28(seeds):
    base, *models = seeds[0]["right"]
    lines = {label(m): [np.subtract(slices(d["right"][m], 4), slices(d["right"][base], 4))
                        for d in seeds] for m in models}                           # [4, S] each
    return show([{"lines": {m: (seeds[0]["step"], [x[k] for x in xs]) for m, xs in lines.items()},
                  "title": f"quarter {k + 1} by strength", "xlabel": "step",
                  "ylabel": "accuracy minus baseline's, original labels"} for k in range(4)],
                width=3, sharey=True), \
        [["method", *(f"quarter {i}, last step" for i in range(1, 5))]] + [
            [m, *(cell([x[k][-1] for x in xs]) for k in range(4))] for m, xs in lines.items()]


UNITS = {"reward": "mean reward (own scale)", "return": "mean return",
         "kl": "KL from SFT (nats per response)", "perplexity_sft": "perplexity under SFT",
         "length": "tokens per response", "gold": "true preference (gold)"}


def draw_ppo(seeds):
    """Training curves of PPO: Figures 9, 12 and 17."""
    keys = [k for k in UNITS if k in next(iter(seeds[0].values()))]
    lines = {k: {label(name): [d[name][k] for d in seeds if name in d] for name in seeds[0]}
             for k in keys}
    return show([{"lines": {m: (range(1, len(x[0]) + 1), x) for m, x in lines[k].items()},
                  "xlabel": "step", "ylabel": UNITS[k]} for k in keys], 3, 3.6, 2.6), \
        [["policy", *(f"{UNITS[k]}, last five steps" for k in keys)]] + [
            [m, *(cell([np.mean(x[-5:]) for x in lines[k][m]]) for k in keys)]
            for m in lines[keys[0]]]


def pooled(rows, opponents, kind, best=False):
    """Comparisons of stage 08 over all seeds: rows (set, policy, opponent, win, tie, lose in %, not
    rounded, prompts). best: of the best round, which may be another in each seed."""
    found = {}
    for row in rows:
        if row["set"].startswith(kind) and row["opponent"] in opponents:
            policy = "best" if best else row["policy"]
            found.setdefault((row["set"], row["opponent"], policy), []).append(row)
    table = [["set", "policy", "opponent", "win %", "tie %", "lose %", "prompts"]]
    for (name, opponent, _), same in found.items():
        n = sum(row["n"] for row in same)
        table.append([name, ", ".join(dict.fromkeys(row["policy"] for row in same)), opponent, *(
            100 * sum(row[k] * row["n"] for row in same) / n for k in ("win", "tie", "lose")), n])
    return table


def rounded(table):
    return [[f"{x:.0f}" if isinstance(x, float) else x for x in row] for row in table]


def draw_wins(opponents, kind="eval_", best=False):
    """Bars of win, tie and lose, a panel for each set and opponent: Figures 10, 13, 15, Table 2."""
    def draw(seeds):
        table = pooled([row for d in seeds for row in (d if best else d["comparisons"])],
                       opponents, kind, best)
        panels = list(dict.fromkeys((row[0], row[2]) for row in table[1:]))
        if not panels:  # a judge's limit left no verdict
            return None, rounded(table)
        shown = {p: [r for r in table[1:] if (r[0], r[2]) == p][::-1] for p in panels}
        figure = show([{"title": f"{name} against {opponent}", "xlim": (0, 100),
                        "xlabel": "% of prompts"} for name, opponent in panels],
                      len(opponents) if len(opponents) > 1 else len(panels),
                      4.6, 0.9 + 0.3 * max(map(len, shown.values())))
        for axis, panel in zip(figure.axes, panels):
            left = np.zeros(len(shown[panel]))
            for k, colour in ((3, OKABE_ITO[2]), (4, "#bbbbbb"), (5, OKABE_ITO[3])):
                width = np.array([row[k] for row in shown[panel]])
                axis.barh([label(row[1]) for row in shown[panel]], width, left=left, color=colour,
                          label="_" * (panel != panels[0]) + table[0][k].removesuffix(" %"))
                left += width
        figure.legend(loc="outside right center", fontsize=8)
        return figure, rounded(table)
    return draw


def draw_accuracies(seeds):
    """A row for each reward model, a mark for each set; over seeds the mean."""
    models = [m for m in seeds[0] if all(m in d for d in seeds)]
    sets = list(seeds[0][models[0]]) + ["gold"] * ("gold" in seeds[0][models[-1]])
    figure = show([{"xlabel": "share of pairs that are right",
                    "xlim": (0.4, 1) if min(v for d in seeds for m in models
                                            for v in d[m].values()) > 0.4 else (0, 1)}],
                  width=6.5, height=0.8 + 0.2 * len(models))
    axis, marks = figure.axes[0], dict(zip((*SETS, "gold"), "o^sD"))
    for name in sets:
        of = [m for m in models if name in seeds[0][m]]
        axis.plot([np.mean([d[m][name] for d in seeds]) for m in of], [label(m) for m in of],
                  marks[name], label="true labels" if name == "gold" else f"{name} labels"
                  if name != "consistent" else "pairs where both agree", alpha=0.85)
    axis.set_yticks(range(len(models)), map(label, models), fontsize=8)
    axis.invert_yaxis()
    axis.axvline(0.5, color="k", linestyle=":", linewidth=1)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return figure, [["reward model", *sets]] + [
        [label(m), *(cell([d[m][k] for d in seeds]) if k in seeds[0][m] else "" for k in sets)]
        for m in models]


def draw_parting(seeds):
    """Reward and gold over all rounds' steps, the first seed's parting dotted."""
    ends = np.cumsum([len(r) for r in seeds[0]["reward"]])
    steps, n = range(1, ends[-1] + 1), len(seeds[0]["smooth"])
    width = ends[-1] - n + 1
    at = {"at": [seeds[0]["part"]] if seeds[0]["part"] else [], "xlim": (1, ends[-1]),
          "xlabel": "PPO step, all rounds" + ", dotted: they part" * bool(seeds[0]["part"])}
    rewards = {f"round {r}": (range(ends[r] - len(x) + 1, ends[r] + 1),
                              [d["reward"][r] for d in seeds if len(d["reward"]) > r])
               for r, x in enumerate(seeds[0]["reward"])}
    gold = {"each step": (steps, [d["gold"] for d in seeds]),
            f"running mean of {width}": (range(width, ends[-1] + 1), [d["smooth"] for d in seeds])}
    style = {"each step": {"color": "#999999", "linewidth": 0.7},
             f"running mean of {width}": {"color": OKABE_ITO[3]}}
    return show([{"lines": rewards, "ylabel": "own reward, std from the round's start", **at},
                 {"lines": gold, "style": style, "ylabel": UNITS["gold"], **at}], width=4.6), [
        ["seed", "gold at first", "highest", "at last", "they part at step", "of"]] + [
        [i, *(f"{d['smooth'][k]:.3f}" for k in (0, int(np.argmax(d["smooth"])), -1)),
         d["part"] or "they do not", len(d["gold"])] for i, d in enumerate(seeds)]


def draw_11(seeds):
    figure = show([{"title": f"{label(name)}\nsilhouette {np.mean(d['silhouette']):.3f}",
                    "xlabel": "t-SNE 1", "ylabel": "t-SNE 2", "xticks": [], "yticks": []}
                   for name, d in seeds[0].items()], width=2.6, height=2.8)
    for axis, d in zip(figure.axes, seeds[0].values()):
        for k, side in enumerate(("chosen", "rejected")):
            axis.scatter(*np.array(d["points"])[:, k].T, s=4, color=OKABE_ITO[2 + k],
                         label="_" * (axis is not figure.axes[0]) + side)
    figure.legend(loc="outside right center", fontsize=8)
    return figure, [["method", "silhouette", "linear probe accuracy"]] + [
        [label(name), *(cell([np.mean(d[name][key]) for d in seeds])
                        for key in ("silhouette", "probe_right"))] for name in seeds[0]]


def draw_16(seeds):
    panels = []
    for key, text in (("theta", "theta"), ("theta_prime", "theta' (after the meta step)")):
        bars = {name: np.concatenate([np.ravel(held[k]["differences"]) for d in seeds
                                      for held in d.values()])
                for name, k in (("MetaRM", key), ("vanilla RM", "vanilla"))}
        top = max(v.max() for v in bars.values())
        panels.append({"bars": {name: v / top for name, v in bars.items()}, "ylabel": "density",
                       "hist": {"bins": 40, "range": (0, 1), "density": True},
                       "xlabel": "reward difference, share of the largest",
                       "title": f"MetaRM at {text}"})
    return show(panels, sharey=True), [["round", "J at theta", "J at theta'", "J, vanilla RM"]] + [
        [r, *(cell([np.mean(d[r][k]["J"]) for d in seeds if r in d])
              for k in ("theta", "theta_prime", "vanilla"))] for r in seeds[0]]


def draw_variants(seeds, within=0.01):
    """MetaRM and its variants beside the vanilla model; PPO under them beside PPO under it."""
    models = {m: v for m, v in seeds[0]["models"].items() if all(m in d["models"] for d in seeds)}
    value = {m: [[np.mean(d["models"][m][key]) for d in seeds] for key in ("J", "accuracy", "tau")]
             for m in models}
    titles = ["J on held-back samples", "accuracy, true labels", "Kendall's tau, shifted samples"]
    kinds = {text: [m for m in models if models[m]["kind"] == kind]
             for kind, text in VARIANTS.items()}
    panels = [{"lines": {text: ([models[m]["eta"] for m in of],
                                [[value[m][k][s] for m in of] for s in range(len(seeds))])
                         for text, of in kinds.items() if of},
               "level": np.mean(value["vanilla"][k]), "xscale": "log", "ylabel": title,
               "xlabel": "eta (dotted: vanilla RM)"} for k, title in enumerate(titles)]
    panels.append({"lines": {text: ([np.mean(value[m][0]) for m in of], [
        [np.mean(value[m][2]) for m in of]]) for text, of in kinds.items() if of},
        "style": {text: {"linestyle": "none", "marker": "o"} for text in kinds},
        "level": np.mean(value["vanilla"][2]), "xlabel": titles[0], "ylabel": titles[2]})
    table = [["model (difference from the vanilla RM, 95 % interval over seeds)", *titles],
             ["vanilla RM", *(f"{np.mean(v):.3f}" for v in value["vanilla"])]]

    def measured(m):
        return [f"{np.mean(v):.3f}, {beside(v, vanilla)}"
                for v, vanilla in zip(value[m], value["vanilla"])]
    for text, of in kinds.items():
        table += [[f"{text}, eta {models[m]['eta']:g}", *measured(m)] for m in of]
    least = np.mean(value["vanilla"][1]) - within
    for text, of in kinds.items():  # at equal accuracy the strongest
        if equal := [m for m in of if np.mean(value[m][1]) > least]:
            best = max(equal, key=lambda m: np.mean(value[m][0]))
            table.append([f"{text}: widest J within {within} of vanilla's accuracy, eta "
                          f"{models[best]['eta']:g}", *measured(best)])
    order = scipy.stats.spearmanr(*(  # of all models: does a wider J go with a better order?
        [np.mean(value[m][k]) for m in models] for k in (0, 2))).statistic
    table.append(["rank correlation of J and tau over the models", "", "", f"{order:.2f}"])
    names = {"round_1": "MetaRM", "more_1": "the vanilla RM once more", **VARIANTS,
             "weights": "pair weights, eta 1", "weights_mild": "pair weights, eta 0.1"}
    leads = [{(row["set"], row["policy"]): 100 * (row["win"] - row["lose"])
              for row in d["comparisons"] if row["opponent"] == "round_0"} for d in seeds]
    shown = dict.fromkeys(key for of in leads for key in of if key[1] in names)
    sets = {name for name, policy in shown if policy in VARIANTS}  # the summary task's has none
    for name, policy in [key for key in shown if key[0] in sets]:
        pairs = [(of[name, policy], of[name, "more_1"]) for of in leads
                 if {(name, policy), (name, "more_1")} <= of.keys()]
        lead = np.mean([of[name, policy] for of in leads if (name, policy) in of])
        table.append([
            f"PPO under {names[policy]} against round 0, {name}",
            f"win minus lose {round(lead)} points", f"{beside(*zip(*pairs), '+.1f')} from "
            f"{names['more_1']}" if pairs and policy != "more_1" else "", ""])
    return show(panels, width=3.6), table


def draw_overoptimised(seeds):
    steps = range(1, len(seeds[0]["baseline"]["gold"]) + 1)
    lines = {key: {label(m): [d[m][key] for d in seeds] for m in seeds[0]}
             for key in ("reward", "gold")}
    tenths = {"xlabel": "tenth of the steps"}
    table = [["reward", "own reward's rise, std", "gold, first tenth", "highest tenth",
              "last tenth", "fall from the highest"]]
    for m in lines["gold"]:
        reward, gold = np.array(lines["reward"][m]), np.array(lines["gold"][m])      # [seeds, 10]
        table.append([m, *map(cell, (reward[:, -1], gold[:, 0], gold.max(1), gold[:, -1],
                                     gold.max(1) - gold[:, -1]))])
    return show([
        {"lines": {m: (steps, x) for m, x in lines["reward"].items()}, **tenths,
         "ylabel": "own reward, std from the start"},
        {"lines": {m: (steps, x) for m, x in lines["gold"].items()}, **tenths,
         "ylabel": UNITS["gold"]},
        {"lines": {m: (np.mean(lines["reward"][m], 0), [np.mean(x, 0)])
                   for m, x in lines["gold"].items()}, "xlabel": "own reward, std from the start",
         "ylabel": UNITS["gold"]}], width=3.8), table


def draw_more(seeds):
    names, texts = list(seeds[0]), {"MetaRM rounds": "round", "more PPO, same model": "more"}
    after = range(len(seeds[0][names[0]]) // 2 + 1)
    lines = {name: {text: (after, [[d[name][f"{prefix}_{r}" if r else "round_0"] for r in after]
                                   for d in seeds]) for text, prefix in texts.items()}
             for name in names}
    return show([{"lines": lines[name], "title": name, "xlabel": "round", "xticks": after,
                  "ylabel": "mean score of the judge"} for name in names], width=3), \
        [["set", "after round", *texts]] + [
            [name, r, *(cell([v[r] for v in values]) for _, values in lines[name].values())]
            for name in names for r in after]


def draw_best_of_n(seeds):
    n, sets = seeds[0]["n"], list(dict.fromkeys(seeds[0]["sets"]))
    models = [m for m in seeds[0]["judge"] if all(m in d["judge"] for d in seeds)]
    lines = {name: {label(m): (n, [np.mean([v for v, s in zip(d["judge"][m], d["sets"])
                                            if s == name], 0) for d in seeds]) for m in models}
             for name in sets}
    rise = {}
    for m in models:
        own = [np.mean(d["reward"][m], 0) for d in seeds]
        rise[label(m)] = (n, [(r - r[0]) / (r[-1] - r[0] + 1e-12) for r in own])
    axes = {"xscale": "log", "xlabel": "n, responses of SFT", "style": {
        label(m): {"color": OKABE_ITO[j % 8], "linestyle": "-" if j < 8 else "--"}
        for j, m in enumerate(models)}}
    return show([*({"lines": lines[name], "title": name, "ylabel": "judge's score of the best of n",
                    **axes} for name in sets),
                 {"lines": rise, "title": "own reward", **axes,
                  "ylabel": "rise from n = 1, share of the whole"}], width=3.6), \
        [["reward model", "set", *(f"n = {k}" for k in n)]] + [
            [m, name, *(f"{v:.2f}" for v in np.mean(values, 0))]
            for name in sets for m, (_, values) in lines[name].items()]


def draw_equation_17(seeds):
    return None, [["seed", "cosine, whole", "cosine, grad J fixed", "size of the change / grad L",
                   "eta"]] + [[i, *(f"{np.mean(d[k]):.4f}" for k in ("whole", "fixed", "size")),
                               d["eta"]] for i, d in enumerate(seeds)]


# name: (data of a run, drawing; None: page.html sets the texts)
DRAWN = {
    "figure_01": (data_01, draw_01),
    "table_1": (data_table_1, None),
    "accuracies": (data_accuracies, draw_accuracies),
    "figure_02": (lambda run: read(run.path / "03_strength/groups.json"), draw_02),
    "figure_03": (data_03, draw_03),
    "figure_04": (lambda run: curves(run, *TENTHS), draw_models),
    "figure_05": (lambda run: curves(run, "tenth_01", "tenth_01_flip", "tenth_02", "tenth_02_flip"),
                  draw_models),
    "figure_06": (lambda run: curves(run, *(f"tenth_10{s}" for s in (
        "", "_soft", "_margin", "_soft_margin"))), draw_models),
    "figure_07": (lambda run: data_epochs(run, NOISY, NOISY), draw_models),
    "figure_08": (data_epochs, draw_08),
    "figure_09": (lambda run: ppo(run, *METHODS), draw_ppo),
    "figure_10": (lambda run: evaluated(run, METHODS, "eval_"), draw_wins(("baseline", "sft"))),
    "figure_11": (data_11, draw_11),
    "figure_12": (lambda run: ppo(run, "baseline", *CONTRASTIVE), draw_ppo),
    "figure_13": (lambda run: evaluated(run, CONTRASTIVE, "eval_"),
                  draw_wins(("baseline", "sft"))),
    "equation_17": (lambda run: read(run.path / "07_metarm/round_1/equation_17.json"),
                    draw_equation_17),
    "table_2": (lambda run: evaluated(run, rounds(run)), draw_wins(("sft",))),
    "table_3": (data_table_3, lambda seeds: (None, rounded(pooled(
        sum(seeds, []), ("sft", "round_0"), "eval_", best=True)))),
    "figure_15": (data_15, draw_wins(("sft", "round_0"), "ood_", best=True)),
    "figure_16": (data_16, draw_16),
    "figure_17": (lambda run: ppo(run, *rounds(run)), draw_ppo),
    "parting": (data_parting, draw_parting),
    "samples": (data_samples, None),
    "figure_19": (data_19, draw_19),
    "figure_20": (data_20, draw_20),
    "figure_21": (lambda run: curves(run, *PARTS[0], "baseline"), draw_models),
    "figure_22": (lambda run: curves(run, *PARTS[1], "baseline"), draw_models),
    "figure_23": (lambda run: curves(run, *(f"tenth_01_flip{s}" for s in (
        "", "_soft", "_margin", "_soft_margin"))), draw_models),
    "figure_24": (lambda run: curves(run, "tenth_04", "tenth_04_soft", "tenth_04_margin"),
                  draw_models),
    "figure_25": (lambda run: curves(run, "tenth_01", "tenth_01_soft", "tenth_01_flip"),
                  draw_models),
    "figure_26": (data_26, draw_26),
    "figure_27": (data_27, draw_27),
    "figure_28": (data_27, draw_28),
    "variants": (data_variants, draw_variants),
    "more": (data_more, draw_more),
    "best_of_n": (data_best_of_n, draw_best_of_n),
    "overoptimised": (data_overoptimised, draw_overoptimised),
}
# name: (title, what the paper saw, stage directories it comes from, data, drawing)
FIGURES = {name: (f["title"], f.get("saw", ""), f["made"], *DRAWN[name])
           for name, f in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(
               encoding="utf-8")).items()}
