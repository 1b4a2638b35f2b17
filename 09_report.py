"""Stage 09: the paper's figures and tables beside ours on one page, and a verdict on each of its claims.

Reads OUT/seed_0, OUT/seed_1, ... as `experiments.py` makes them, or OUT itself when it is one run (a default run, or
one on your own data: what was not measured there is left out). Writes OUT/09_report/index.html, one file that needs no
network; ledger.json, the claims with their values, intervals and verdicts; tables.json, the rows of the page's tables;
figures/NAME.png and NAME.json, each figure with its numbers down to single pairs and prompts, from which the ledger is
computed.

The claims, what is measured for each and the criterion stand in CLAIMS below. They were written before the experiments
were run (git log has the commit) and are not changed after; a criterion that proves ill-posed is marked and a second one
is put beside it, with the reason and the date (NOTES). Each quantity has a 95 % interval: a bootstrap over the
seeds and, inside a seed, over the pairs or prompts it was measured on. A claim **holds** when the interval lies inside
the criterion, **fails** when it lies outside, and is **open** when it crosses it or fewer than three seeds were run.

    python 09_report.py                    # after run_all.sh experiments, or after any run
    python 09_report.py --texts            # show dialogues of your own data too (they may be offensive)
"""
import base64
import html
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import audit
import common
import figures

MIN_SEEDS, REPLICATES = 3, 1000
VERDICTS = ("holds", "fails", "open", "not measured")
TEXTS = ("table_1", "samples")
METHODS = [name for name in figures.WHOLE if name != "baseline"]


# ---------------------------------------------------------------- quantities
# Each takes d, {figure: its data} of one seed as numpy arrays, and pick(n): the indices 0 .. n-1 for the value itself,
# n indices drawn with replacement for a bootstrap replicate.

def accuracy(curve, i, at=-1, kind="judge"):
    """Accuracy on the pairs i at one evaluation."""
    return curve["right"][kind][at][i].mean()


def final(curves, pick, kind="judge"):
    """{model: its accuracy at the end of training}, all on the same drawn pairs."""
    i = pick(next(iter(curves.values()))["right"][kind].shape[1])
    return {name: accuracy(c, i, kind=kind) for name, c in curves.items()}


def wins(scores, policy, opponent, i):
    """Share of the prompts i that `policy` wins, and that it loses."""
    difference = scores[policy][i] - scores[opponent][i]
    return (difference > 1e-9).mean(), (difference < -1e-9).mean()


def lead(scores, policy, opponent, i):
    """Win minus lose."""
    win, lose = wins(scores, policy, opponent, i)
    return win - lose


def roughness(y):
    """How unsteady a curve is: root mean square distance from a straight line through its second half (nan when that
    has fewer than three steps)."""
    y = np.asarray(y, float)[len(y) // 2:]
    if len(y) < 3:
        return np.nan
    x = np.arange(len(y))
    return np.sqrt(((y - np.polyval(np.polyfit(x, y, 1), x)) ** 2).mean()) + 1e-12


def share_below_zero(d, pick):
    return (d["figure_01"]["mean"][pick(len(d["figure_01"]["mean"]))] < 0).mean()


def u_shape(d, pick):
    """The lower of the two outer groups' mean std, of 20 groups by strength, over that of the middle ten groups."""
    mean, std = d["figure_01"]["mean"], d["figure_01"]["std"]
    i = pick(len(mean))
    groups = np.array_split(std[i][np.argsort(mean[i], kind="stable")], 20)
    return min(groups[0].mean(), groups[-1].mean()) / np.concatenate(groups[5:15]).mean()


def consistency_steps(d, pick):
    """The lesser of two rises: from the weakest to the near-zero and from there to the strongest sixth of pairs."""
    mean, agrees = d["figure_03"]["mean"], d["figure_03"]["agrees"]
    i = pick(len(mean))
    i = i[np.argsort(mean[i], kind="stable")]
    size, zero = max(1, len(i) // 6), np.abs(mean[i]).argmin()
    start = np.clip(zero - size // 2, 0, len(i) - size)
    weakest, middle, strongest = (agrees[j].mean() for j in (i[:size], i[start:start + size], i[-size:]))
    return min(middle - weakest, strongest - middle)


def tenths_mean(*numbers):
    def measure(d, pick):
        result = final(d["figure_04"], pick)
        return np.mean([result[f"tenth_{n:02d}"] for n in numbers])
    return measure


def strongest_is_not_best(d, pick):
    result = final(d["figure_04"], pick)
    return np.mean([result[f"tenth_{n:02d}"] for n in (7, 8, 9)]) - result["tenth_10"]


def both_flipped(d, pick):
    result = final(d["figure_05"], pick)
    return min(result["tenth_01_flip"], result["tenth_02_flip"])


def strongest_order(d, pick):
    r = final(d["figure_06"], pick)
    return min(r["tenth_10_soft_margin"] - r["tenth_10_margin"], r["tenth_10_margin"] - r["tenth_10"])


def margin_helps(d, pick):
    result = final({name: d["figure_07"][name] for name in ("baseline", "margin")}, pick)
    return result["margin"] - result["baseline"]


def late_change(curve, i, kind):
    """Accuracy at the end of the third epoch minus that at the end of the first."""
    return accuracy(curve, i, -1, kind) - accuracy(curve, i, figures.epoch_end(curve["step"], 1), kind)


def late_changes(d, pick):
    """Late change on the judge's and the consistent set: (baseline's, mean of the denoising methods')."""
    change = {}
    for kind in ("judge", "consistent"):
        i = pick(d["figure_08"]["baseline_3_epochs"]["right"][kind].shape[1])
        for name in ("baseline", *figures.DENOISING):
            change.setdefault(name, []).append(late_change(d["figure_08"][f"{name}_3_epochs"], i, kind))
    return np.mean(change["baseline"]), np.mean([change[name] for name in figures.DENOISING])


def less_overfitting(d, pick):
    baseline, denoising = late_changes(d, pick)
    return denoising - baseline


def noisy_set_leaders(d, pick):
    result = final(d["figure_08"], pick, "original")
    return np.mean([result[f"{n}_3_epochs"] for n in ("baseline", "margin")]) - np.mean(
        [result[f"{n}_3_epochs"] for n in figures.DENOISING])


def steadier(d, figure, others, curves):
    """Mean over some curves of log(roughness under the baseline / mean roughness under the other reward models)."""
    return np.mean([np.log(roughness(f(d[figure]["baseline"])) /
                           np.mean([roughness(f(d[figure][name])) for name in others])) for f in curves])


def steadier_kl(d, pick):
    return steadier(d, "figure_09", figures.DENOISING, (lambda c: c["kl"], lambda c: np.log(c["perplexity_sft"])))


def steadier_reward(d, pick):
    return steadier(d, "figure_12", figures.contrastive.METHODS,
                    (lambda c: c["reward"] / c["reward_std"][-1], lambda c: c["return"]))


def leads_on(d, pick, name, opponent="baseline", policies=METHODS):
    """Win minus lose of each policy on one evaluation set of Figure 10 or 13."""
    figure = "figure_10" if policies is METHODS else "figure_13"
    scores = d[figure]["scores"][name]
    i = pick(len(scores[opponent]))
    return [lead(scores, policy, opponent, i) for policy in policies]


def all_win_harmless(d, pick):
    return min(leads_on(d, pick, "eval_harmless"))


def less_on_helpful(d, pick):
    return np.mean(leads_on(d, pick, "eval_harmless")) - np.mean(leads_on(d, pick, "eval_helpful"))


def simcse_separates(d, pick):
    data = d["figure_11"]
    i = pick(len(data["baseline"]["silhouette"]))
    return data["simcse"]["silhouette"][i].mean() - data["baseline"]["silhouette"][i].mean()


def simcse_is_best(d, pick):
    leads = np.mean([leads_on(d, pick, name, "sft", figures.contrastive.METHODS)
                     for name in ("eval_harmless", "eval_helpful")], 0)
    return leads[0] - leads[1:].max()


def wider_differences(d, pick):
    rises = []
    for held in d["figure_16"].values():
        i = pick(len(held["theta"]))
        rises.append(held["J_theta"][i].mean() - held["J_vanilla"][i].mean())
    return np.mean(rises)


def tasks(d, kind="eval_"):
    return {name: scores for name, scores in d["table_2"]["scores"].items() if name.startswith(kind)}


def first_rounds_rise(d, pick):
    rises = []
    for scores in tasks(d).values():
        i, last = pick(len(scores["sft"])), min(3, len(scores) - 2)
        if last < 2:
            return np.nan
        rises.append(wins(scores, f"round_{last}", "sft", i)[0] - wins(scores, "round_1", "sft", i)[0])
    return np.mean(rises)


def halves(n, pick):
    """Even prompts, on which the best round is chosen, and odd ones, on which it is measured."""
    return 2 * pick(-(-n // 2)), 2 * pick(n // 2) + 1


def best_round(scores, i, last):
    return max((f"round_{r}" for r in range(1, last + 1)), key=lambda policy: wins(scores, policy, "sft", i)[0])


def falls_after_best(d, pick):
    falls = []
    for scores in tasks(d).values():
        last, (choose, measure) = len(scores) - 2, halves(len(scores["sft"]), pick)
        if last < 2:
            return np.nan
        best = best_round(scores, choose, last - 1)
        falls.append(wins(scores, best, "sft", measure)[0] - wins(scores, f"round_{last}", "sft", measure)[0])
    return np.mean(falls)


def best_against_vanilla(d, pick):
    """Win minus lose of each task's best round against vanilla PPO: [(in distribution, out of it or nan)]. The best round
    is that of the even in-distribution prompts; it is measured on the odd ones and on all those out of distribution."""
    leads = []
    for name, scores in tasks(d).items():
        choose, measure = halves(len(scores["sft"]), pick)
        best = best_round(scores, choose, len(scores) - 2)
        other = d["table_2"]["scores"].get(name.replace("eval_", "ood_"))
        leads.append((lead(scores, best, "round_0", measure),
                      lead(other, best, "round_0", pick(len(other["sft"]))) if other else np.nan))
    return np.array(leads)


def best_beats_vanilla(d, pick):
    return best_against_vanilla(d, pick)[:, 0].mean()


def best_beats_vanilla_ood(d, pick):
    leads = best_against_vanilla(d, pick)[:, 1]
    return leads[~np.isnan(leads)].mean() if not np.isnan(leads).all() else np.nan


def less_out_of_distribution(d, pick):
    difference = best_against_vanilla(d, pick) @ [1, -1]                           # of the tasks that have both
    return difference[~np.isnan(difference)].mean() if not np.isnan(difference).all() else np.nan


def later_epochs(kind):
    def measure(d, pick):
        curve = d["figure_19"]["baseline_3_epochs"]
        return late_change(curve, pick(curve["right"][kind].shape[1]), kind)
    return measure


def inflation(d, pick):
    first, last = d["figure_20"]["epoch_end"][0], d["figure_20"]["epoch_end"][-1]   # [N, 2]
    i = pick(len(first))
    rise = (last[i] - first[i]).mean(0)                                            # chosen, rejected
    return rise.mean() - (rise[0] - rise[1])


def score_rise(d, pick):
    first, last = d["figure_20"]["epoch_end"][0], d["figure_20"]["epoch_end"][-1]
    i = pick(len(first))
    return (last[i] - first[i]).mean()


def gap_ratio(d, pick):
    first, last = d["figure_20"]["epoch_end"][0], d["figure_20"]["epoch_end"][-1]
    i = pick(len(first))
    return (last[i] @ [1, -1]).mean() / (first[i] @ [1, -1]).mean()


def weak_end_costs(d, pick):
    r = final({k: c for f in ("figure_21", "figure_22") for k, c in d[f].items()}, pick)
    return r["part_080_100"] - r["part_000_060"]


def strong_end_keeps(d, pick):
    result = final(d["figure_22"], pick)
    return result["part_040_100"] - result["part_080_100"]


def sooner_extreme(d, pick):
    i = pick(d["figure_26"]["baseline"]["p"].shape[1])
    extreme = {name: np.abs(2 * c["p"][1:, i] - 1).mean() for name, c in d["figure_26"].items()}
    return extreme["flip"] - extreme["baseline"]


def differ_on_weak(d, pick):
    """Share of pairs on which a method's verdict is another than the baseline's, weak half minus strong half."""
    right = d["figure_27"]["right"]
    n = right["baseline_3_epochs"].shape[1] // 2
    weak, strong = pick(n), pick(n) + right["baseline_3_epochs"].shape[1] - n
    other = [right[f"{name}_3_epochs"][-1] != right["baseline_3_epochs"][-1] for name in METHODS]
    return np.mean([o[weak].mean() - o[strong].mean() for o in other])


def equation_17(kind):
    def measure(d, pick):
        values = d["equation_17"][kind]
        return values[pick(len(values))].mean()
    return measure


# ---------------------------------------------------------------- the ledger

# id, where, the claim, the paper's number, what is measured here, criterion (low, high), function of it
CLAIMS = [
    ("C1", "2.2, Figure 1", "About a quarter of the pairs has a mean preference difference below 0.", "about 0.25",
     "share of training pairs with mean < 0", (0.20, 0.30), share_below_zero),
    ("C2", "2.2, Figure 2", "The std is U-shaped over strength.", "",
     "lower mean std of the two outer of 20 groups / mean std of the middle ten", (1, None), u_shape),
    ("C3", "2.2, Figure 3", "Consistency with the judge rises with strength.", "0.164, 0.544, 0.956",
     "lesser of the two rises, weakest to near-zero to strongest sixth of the validation pairs", (0, None),
     consistency_steps),
    ("C4", "2.3, Figure 4", "The weakest fifth trains a model worse than chance.", "below 0.5",
     "accuracy on the judge's labels, mean of tenths 1 and 2", (None, 0.5), tenths_mean(1, 2)),
    ("C5", "2.3, Figure 4", "The 20-40 % slice trains a model near chance.", "about 0.5",
     "accuracy on the judge's labels, mean of tenths 3 and 4", (0.45, 0.55), tenths_mean(3, 4)),
    ("C6", "2.3, Figure 4", "The strongest tenth alone is not the best tenth.", "",
     "accuracy of tenths 7 to 9 (mean) minus that of tenth 10", (0, None), strongest_is_not_best),
    ("C7", "2.4.1, Figure 5", "Flipping the labels of the two weakest tenths makes each useful.", "",
     "accuracy after flipping, the lesser of tenths 1 and 2", (0.5, None), both_flipped),
    ("C8", "2.4.2, Figure 6", "On the strongest tenth soft labels + margin beat margin, which beats nothing.", "",
     "lesser of the two steps in accuracy", (0, None), strongest_order),
    ("C9", "2.4.2, Figure 7", "A margin on all data helps.", "",
     "accuracy of margin minus baseline, one epoch", (0, None), margin_helps),
    ("C10", "2.5, Figure 8", "Denoising methods overfit less: their accuracy does not fall late, the baseline's does.", "",
     "change of accuracy from epoch 1 to 3, judge and consistent sets: mean of flip, flip+margin, soft+margin, minus "
     "baseline", (0, None), less_overfitting),
    ("C10b", "2.5, Figure 8", "The baseline's accuracy falls late in training.", "",
     "the baseline's own change of accuracy from epoch 1 to 3, judge and consistent sets", (None, 0),
     lambda d, pick: late_changes(d, pick)[0]),
    ("C10c", "2.5, Figure 8", "That of the denoising methods does not.", "",
     "their own change, mean of the three (a fall is more than 0.02)", (-0.02, None),
     lambda d, pick: late_changes(d, pick)[1]),
    ("C11", "2.5, Figure 8", "Baseline and margin lead on the original, noisy validation set.", "",
     "accuracy after three epochs, mean of baseline and margin minus mean of the three denoising methods", (0, None),
     noisy_set_leaders),
    ("C12", "2.5, Figure 9", "Without KL penalty, KL and perplexity of PPO are steadier under denoised reward models.", "",
     "log of roughness under baseline / under the denoised models, mean over KL and log perplexity", (0, None),
     steadier_kl),
    ("C13", "2.5, Figure 10", "All four methods win against the baseline on harmless prompts.", "",
     "win minus lose, the least of the four methods", (0, None), all_win_harmless),
    ("C14", "2.5, Figure 10", "The gain is smaller on helpful prompts.", "",
     "win minus lose against baseline, harmless minus helpful, mean of the four methods", (0, None), less_on_helpful),
    ("C15", "3.1, Figure 11", "SimCSE lowers the overlap of chosen and rejected features.", "",
     "silhouette under SimCSE minus under the baseline", (0, None), simcse_separates),
    ("C16", "3.1, Figure 12", "Reward and return of PPO are steadier under contrastive reward models.", "",
     "log of roughness under baseline / under the four models, mean over reward and return", (0, None),
     steadier_reward),
    ("C17", "3.1, Figure 13", "SimCSE on pairs is the best of the contrastive variants.", "",
     "win minus lose against SFT over harmless and helpful, SimCSE minus the best other", (0, None), simcse_is_best),
    ("C18", "3.2, Figure 16", "MetaRM widens the reward differences on the shifted policy's samples.", "",
     "J (Eq. 11) at theta minus the vanilla model's, held-back samples, mean of the rounds", (0, None),
     wider_differences),
    ("C19", "3.2.1, Table 2", "The win rate over SFT rises over the first rounds.", "harmless 44 to 69 %",
     "win rate of round 3 minus round 1, mean of the tasks", (0, None), first_rounds_rise),
    ("C20", "3.2.1, Table 2", "After some round it falls.", "harmless 69 to 64 %",
     "win rate of the best earlier round (chosen on other prompts) minus that of the last", (0, None), falls_after_best),
    ("C21", "3.2.1, Table 3", "The best round beats vanilla PPO.", "harmless 54 : 15",
     "win minus lose, best round (chosen on other prompts) against round 0, mean of the tasks", (0, None),
     best_beats_vanilla),
    ("C22a", "3.2.1, Figure 15", "Out of distribution the best round beats vanilla PPO too.", "",
     "the same on out-of-distribution prompts", (0, None), best_beats_vanilla_ood),
    ("C22b", "3.2.1, Figure 15", "Out of distribution its gain is a little smaller.", "",
     "win minus lose in distribution minus out of distribution", (0, None), less_out_of_distribution),
    ("C23a", "A, Figure 19", "After the first epoch training accuracy goes on rising.", "",
     "training accuracy at the end of epoch 3 minus epoch 1, baseline", (0, None), later_epochs("train")),
    ("C23b", "A, Figure 19", "Validation accuracy does not.", "",
     "accuracy on the original validation set at the end of epoch 3 minus epoch 1, baseline", (None, 0.02),
     later_epochs("original")),
    ("C24", "A, Figure 20", "Scores inflate from epoch to epoch without a wider gap.", "",
     "rise of the mean score from epoch 1 to 3 minus that of the chosen-rejected gap, baseline", (0, None), inflation),
    ("C24b", "A, Figure 20", "Scores rise from epoch to epoch.", "",
     "mean score at the end of epoch 3 minus epoch 1, baseline", (0, None), score_rise),
    ("C24c", "A, Figure 20", "The gap between chosen and rejected hardly grows meanwhile.", "",
     "gap at the end of epoch 3 / at the end of epoch 1, baseline (hardly: by less than a fifth)", (None, 1.2), gap_ratio),
    ("C25a", "C, Figure 21", "Growing from the weakest end, much good data is needed to make up for it.", "",
     "accuracy from the strongest fifth alone minus from the weakest three fifths, equal steps", (0, None),
     weak_end_costs),
    ("C25b", "C, Figure 22", "Growing from the strongest end, accuracy does not fall.", "",
     "accuracy from the strongest three fifths minus from the strongest fifth, equal steps", (-0.02, None),
     strong_end_keeps),
    ("C26", "C, Figure 26", "With flipped labels p moves to 0 and 1 sooner.", "5k against 10k steps",
     "mean |2p - 1| of training pairs over three epochs, flip minus baseline", (0, None), sooner_extreme),
    ("C27", "C, Figure 27", "The methods differ mostly on weak slices.", "",
     "share of pairs judged otherwise than by the baseline, weak half minus strong half, mean of the four methods",
     (0, None), differ_on_weak),
    ("C28a", "3.2, Eq. 17", "The meta step changes the gradient by that of grad L . grad J.", "",
     "cosine of grad L(theta') - grad L(theta) and grad (grad L . grad J), at the baseline", (0.9, None),
     equation_17("whole")),
    ("C28b", "3.2, Eq. 17", "It does if grad J is held fixed, as Eq. 15's Jacobian is.", "",
     "the same with grad J held fixed", (0.9, None), equation_17("fixed")),
]


# What was found about a claim's criterion after it was written; the criterion stays as it is.
NOTES = {
    "C1": "the value depends on the world's share of wrong labels, about 0.32 here",
    "C10": "the difference alone can hold without any fall (2026-11-24, in review): see C10b and C10c, added then, when two "
           "seeds had been seen",
    "C12": "one curve a seed: the interval is over seeds only and too narrow with few",
    "C16": "one curve a seed: the interval is over seeds only and too narrow with few",
    "C24": "ill-posed: it holds also when scores fall and the gap falls more, or when both rise (2026-11-24, in review): see "
           "C24b and C24c, added then, when two seeds had been seen",
}


def verdict(low, high, criterion, seeds):
    """"holds" if the interval lies inside the criterion (low, high; None is no bound), "fails" if it lies outside,
    "open" if it crosses it, is not finite, or comes from fewer than three seeds."""
    floor, ceiling = (b if c is None else c for b, c in zip((-np.inf, np.inf), criterion))
    if seeds < MIN_SEEDS or not np.isfinite([low, high]).all():
        return "open"
    if floor < low and high < ceiling:
        return "holds"
    return "fails" if high <= floor or low >= ceiling else "open"


def interval(measure, seeds, rng, replicates=REPLICATES):
    """95 % percentile bootstrap interval of the mean over seeds: a replicate draws seeds with replacement and, inside
    each, pairs or prompts with replacement. measure(d, pick) → number; seeds: [d]. → (low, high)."""
    def draw(n):
        return rng.integers(n, size=n)
    means = [np.mean([measure(seeds[s], draw) for s in draw(len(seeds))]) for _ in range(replicates)]
    return tuple(float(x) for x in np.percentile(means, [2.5, 97.5]).round(9))     # 1e-19 is no difference


def as_arrays(data):
    """Lists of numbers as numpy arrays, all the way down."""
    if isinstance(data, dict):
        return {key: as_arrays(value) for key, value in data.items()}
    return np.array(data) if isinstance(data, list) else data


def ledger(collected):
    """CLAIMS with their value for each seed that has what they are measured on, mean, interval and verdict.
    collected: {figure: {run: data}}."""
    runs = {}
    for name, data in collected.items():
        for run, values in data.items():
            runs.setdefault(run, {})[name] = as_arrays(values)
    out = []
    for k, (claim, where, text, paper, quantity, criterion, measure) in enumerate(common.progress(CLAIMS, "claims")):
        entry = {"id": claim, "where": where, "claim": text, "paper": paper, "quantity": quantity, "criterion": criterion,
                 "note": NOTES.get(claim, "")}
        values, lacks = {}, "run"
        for run, d in runs.items():
            try:
                values[run] = float(measure(d, np.arange))
            except KeyError as missing:  # the figure, model, evaluation set or kind of label that it has not
                lacks = missing.args[0]
        if not values or not np.isfinite(list(values.values())).all():
            reason = "too few steps, rounds or sets" if values else f"this run has no {lacks}"
            out.append({**entry, "verdict": "not measured", "reason": reason})
            continue
        low, high = interval(measure, [runs[run] for run in values], np.random.default_rng(k))
        out.append({**entry, "values": values, "mean": float(np.mean(list(values.values()))), "interval": [low, high],
                    "verdict": verdict(low, high, criterion, len(values))})
    return out


# ---------------------------------------------------------------- the page

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Secrets of RLHF Part II, replayed</title>
<style>
:root { color-scheme: light dark; --text: #1c1c1c; --page: #fff; --soft: #f3f3f1; --line: #d8d8d4; --mute: #5c5c58; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e2; --page: #191a1b; --soft: #242627; --line: #3c3f41; --mute: #a5a5a0; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0 auto;
  max-width: 64rem; padding: 1rem; overflow-wrap: break-word; }
h1 { line-height: 1.2; }
h2 { margin: 2.5rem 0 .3rem; border-top: 1px solid var(--line); padding-top: 1rem; font-size: 1.2rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.wide { overflow-x: auto; } .wide table { min-width: 40rem; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .5rem; border-bottom: 1px solid var(--line); }
th { background: var(--soft); } td.n { white-space: nowrap; font-variant-numeric: tabular-nums; }
.v { font-weight: 600; padding: .05rem .5rem; border-radius: 1rem; white-space: nowrap; color: #fff; }
.holds { background: #0072b2; } .fails { background: #b34700; } .open, .not { background: #666; }
.mute, summary { color: var(--mute); } code, pre { font-size: .85rem; background: var(--soft); }
pre { padding: .5rem; white-space: pre-wrap; } details { margin: .4rem 0; } summary { cursor: pointer; }
#runs td:last-child { overflow-wrap: anywhere; min-width: 14rem; }
@media (max-width: 45rem) { .wide .ledger { min-width: 0; } .ledger th { display: none; }
  .ledger tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--line); }
  .ledger td { display: block; border: 0; padding: .1rem 0; }
  .ledger td.n:nth-child(4)::before { content: "mean, 95 %: "; } .ledger td.n:nth-child(5)::before { content: "seeds: "; }
  .ledger td br { display: none; } .ledger td span { margin-left: .4rem; } }
@media print { body { max-width: none; font-size: 11px; } h2, img, tr { break-inside: avoid; } h2 { break-after: avoid; }
  details::details-content { content-visibility: visible; } summary { display: none; } }
</style></head><body>
<h1>Secrets of RLHF Part II, replayed</h1>
BODY
</body></html>
"""


def escape(value):
    return html.escape(str(value))


def html_table(rows):
    """Rows, the first the head → a table that scrolls inside the page when it is wide."""
    line = lambda row, tag: "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in row) + "</tr>"  # noqa: E731
    return f"<div class=wide><table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table></div>"


def folded(title, content):
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def number(x):
    return f"{x:.2g}" if abs(x) < 0.01 else f"{x:.3f}"


def bounds(criterion):
    """(low, high) for people."""
    low, high = criterion
    return f"{low:g} to {high:g}" if low is not None and high is not None else f"> {low:g}" if low is not None else \
        f"< {high:g}"


def ledger_table(entries):
    rows = []
    for e in entries:
        kind = f"<span class='v {e['verdict'].split()[0]}'>{e['verdict']}</span>"
        if "values" in e:
            seeds = ", ".join(map(number, e["values"].values()))
            result = f"<td class=n>{number(e['mean'])}<br><span class=mute>{number(e['interval'][0])} to " \
                     f"{number(e['interval'][1])}</span></td><td class=n>{seeds}</td>"
        else:
            result = f"<td colspan=2 class=mute>{escape(e['reason'])}</td>"
        more = f"<br><span class=mute>paper: {escape(e['paper'])}</span>" if e["paper"] else ""
        more += f"<br><i>{escape(e['note'])}</i>" if e["note"] else ""
        rows.append(f"<tr id={e['id']}><td>{e['id']}<br><span class=mute>{escape(e['where'])}</span></td>"
                    f"<td>{escape(e['claim'])}{more}</td><td>{kind}</td>{result}"
                    f"<td>{escape(e['quantity'])}<br><b>{escape(bounds(e['criterion']))}</b></td></tr>")
    titles = ("claim, section", "", "verdict", "mean, 95 %", "each seed", "what is measured; holds if")
    return f"<div class=wide><table class=ledger><tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>" \
           f"{''.join(rows)}</table></div>"


def texts(name, data):
    """Table 1 or the answers of each round, from the first seed."""
    if name == "table_1":
        return "".join(f"<h3>{kind}: mean {pair[figures.MEAN]:.2f}, std {pair[figures.STD]:.2f}</h3><pre>" + "\n\n".join(
            f"{key}: {escape(pair[key].strip())}" for key in ("prompt", "chosen", "rejected")) + "</pre>"
            for kind, pair in data.items())
    out = "<p>The reward is each round's own reward model's; where it rises and gold falls, the policy has learned the " \
          "model's mistakes.</p>"
    for sample in data.values():
        rows = [["policy", "answer", "reward", "gold"]] + [
            [a["policy"], a["response"], f"{a['reward']:.2f}", f"{a['gold']:.2f}" if "gold" in a else ""]
            for a in sample["answers"]]
        out += f"<pre>{escape(sample['prompt'].strip())}</pre>{html_table(rows)}"
    return out


def commands(run, patterns):
    """The recorded command lines of the stages that a figure comes from."""
    found = sorted({p for pattern in patterns for p in run.path.glob(f"{pattern}/manifest.json")})
    lines = dict.fromkeys(" ".join(w for w in shlex.split(audit.read_json(p)["command"])
                                   if not w.startswith("--local_rank")) for p in found)
    return [f"deepspeed {line}" for line in lines]


def what_was_run(runs):
    """Preset, data, model, minutes, hardware and head of every run directory."""
    rows = [["run", "preset", "data", "model", "minutes", "hardware", "head (run_all.sh verify)"]]
    for path in [p for run in runs for p in (run.path, run.summary) if p]:
        manifests = {name: audit.read_json(path / name / "manifest.json") for name in audit.finished(path)
                     if name != "09_report"}
        info, last = audit.read_json(path / "run.json"), manifests.get("01_sft", {"hardware": "", "world_size": "0"})
        rows.append([path.name, info["preset"] + (f", limit {info['limit']}" if info.get("limit") else ""),
                     ", ".join(map(str, info["preferences"])), info["model"],
                     f"{sum(m['seconds'] for m in manifests.values()) / 60:.1f}",
                     f"{last['hardware']}, {last['world_size']} process(es)", audit.head(manifests)])
    return rows


def ours(entries, title):
    """The ledger's lines on a figure or table, by its number."""
    place = re.match(r"(?:Figure|Table|Equation) \d+", title)
    number_ = re.compile(rf"\b{place[0].replace('Equation', 'Eq.')}\b") if place else None
    lines = [f"<a href=#{e['id']}>{e['id']}</a> <span class='v {e['verdict'].split()[0]}'>{e['verdict']}</span> "
             f"{escape(e['claim'])} {result(e)}" for e in entries if number_ and number_.search(e["where"])]
    return "<p><b>Ours:</b></p><ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>" if lines else ""


def result(entry):
    """Value and interval in words."""
    if "values" not in entry:
        return ""
    return f"<span class=mute>({escape(entry['quantity'])}: {number(entry['mean'])}, {number(entry['interval'][0])} to " \
           f"{number(entry['interval'][1])})</span>"


def section(name, entries, body, lines, table):
    """A figure or table: its number, what the paper saw, ours, the commands and the numbers behind it."""
    title, saw, *_ = figures.FIGURES[name]
    open_table = table if title.startswith("Not in the paper") else []  # no claim says what it shows
    return f"<section id={name}><h2>{escape(title)}</h2>" + (f"<p><b>Paper:</b> {escape(saw)}</p>" if saw else "") + \
        ours(entries, title) + body + (html_table(open_table) if open_table else "") + \
        (folded("commands", f"<pre>{escape(chr(10).join(lines))}</pre>") if lines else "") + \
        (folded("numbers", html_table(table)) if len(table) > 1 and not open_table else "") + "</section>"


def collect(runs, show_texts):
    """({figure: {run: data}}, {figure: why it is not there}); a run that lacks a figure is left out of it."""
    collected, absent = {}, {}
    for name, (_, _, _, data, _) in common.progress(figures.FIGURES.items(), "reading"):
        if name in TEXTS and not show_texts:
            absent[name] = "dialogues of your own data are not shown (--texts shows them)"
            continue
        for run in runs:
            try:
                collected.setdefault(name, {})[run.path.name] = data(run)
            except figures.Missing as missing:
                absent[name] = f"not measured: {missing}"
    return {name: data for name, data in collected.items() if data}, absent


def page(runs, entries, collected, absent, folder):
    """(index.html's text, {figure: rows of the table behind it}); draws the figures into `folder`."""
    sections, tables, plt = [], {}, audit.pyplot()
    for name, (title, _, made, _, draw) in common.progress(figures.FIGURES.items(), "drawing"):
        if name not in collected:
            sections.append(section(name, entries, f"<p class=mute>{escape(absent[name])}</p>", [], []))
            continue
        seeds = list(collected[name].values())
        figure, table = draw(seeds)
        tables[name] = table
        if figure:
            figure.savefig(folder / f"{name}.png", dpi=90)
            plt.close(figure)
            image = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
            body = f"<img alt=\"{escape(title)}, ours\" src=\"data:image/png;base64,{image}\">"
        elif name in TEXTS:
            body = texts(name, seeds[0])
        else:
            body, table = html_table(table), []
        sections.append(section(name, entries, body, commands(runs[0], made), table))
    words = dict(zip(VERDICTS, ("hold", "fail", "are open", "were not measured")))
    count = [f"{n} {word}" for v, word in words.items() if (n := sum(e["verdict"] == v for e in entries))]
    few = f" Only {len(runs)} seed(s) were run: below {MIN_SEEDS} every claim stays open." * (len(runs) < MIN_SEEDS)
    intro = f"<p>Of {len(entries)} claims: {', '.join(count)}.{few} The criteria were written before the experiments were " \
            "run, but for those whose note says otherwise. The intervals are bootstraps over seeds and, in a seed, over " \
            "pairs or prompts: with so few seeds they show the order of the spread, not more.</p>"
    body = f"<h2>What was run</h2><div id=runs>{html_table(what_was_run(runs))}</div><h2 id=ledger>The ledger</h2>{intro}" \
           f"{ledger_table(entries)}{''.join(sections)}"
    return PAGE.replace("BODY", body), {name: table for name, table in tables.items() if table}


def find_runs(out):
    """Runs of a directory: OUT/seed_0, seed_1, ... with their summary_S, or OUT itself."""
    seeds = sorted(int(p.parent.name[5:]) for p in out.glob("seed_*/run.json") if p.parent.name[5:].isdigit())
    if (out / "run.json").exists():
        return [SimpleNamespace(path=out, seed=audit.read_json(out / "run.json")["seed"], summary=None)]
    if not seeds:
        common.die(f"{out} holds no run: bash run_all.sh --out {out}, or bash run_all.sh experiments --out {out}")
    done = {s: (out / f"summary_{s}/08_evaluate/manifest.json").exists() for s in seeds}
    return [SimpleNamespace(path=out / f"seed_{s}", seed=s, summary=out / f"summary_{s}" if done[s] else None)
            for s in seeds]


def own_texts(path):
    """Whether a run has dialogues other than the embedded world's."""
    info = audit.read_json(path / "run.json")
    return info.get("world") != "toy" or any(info.get(k) for k in ("sft", "prompts", "ood_prompts"))


def main(argv=None):
    args = audit.parse_args(__doc__, {}, lambda flag: flag(
        "--texts", action="store_true", help="show dialogues of data other than the embedded world's"), argv, False)
    if common.rank() > 0:  # one process does it
        return
    out = Path(args.out)
    runs = find_runs(out)
    for name in ("preset", "seed", "limit"):
        setattr(args, name, audit.read_json(runs[0].path / "run.json").get(name))
    single = runs[0].path == out
    stage = audit.start_stage(args, "09_report", [n for n in audit.finished(out) if n != "09_report"] if single else [])
    collected, absent = collect(runs, args.texts or not any(own_texts(run.path) for run in runs))
    folder = stage.dir / "figures"
    folder.mkdir()
    for name, data in collected.items():
        audit.write_text(folder / f"{name}.json", json.dumps(data) + "\n")
    entries = ledger(collected)
    record = {"claims": entries, "runs": what_was_run(runs)}
    audit.write_text(stage.dir / "ledger.json", json.dumps(record, indent=1) + "\n")
    text, tables = page(runs, entries, collected, absent, folder)
    audit.write_text(stage.dir / "index.html", text)
    audit.write_text(stage.dir / "tables.json", json.dumps(tables, indent=1) + "\n")
    for e in entries:
        common.log(f"{e['id']:5} {e['verdict']:13}" + (f"{e['mean']:8.3f}  [{e['interval'][0]:.3f}, {e['interval'][1]:.3f}]"
                                                       if "values" in e else "") + f"  {e['claim']}")
    audit.finish_stage(stage, {"verdicts": {v: sum(e["verdict"] == v for e in entries) for v in VERDICTS}})


if __name__ == "__main__":
    audit.run(main)
