"""The paper's claims: what is measured for each, and the ledger of verdicts.

The claims, the quantities and the criteria stand in CLAIMS. They were written before the
experiments were run (git log has the commit) and are not changed after; a criterion that proves
ill-posed is marked and a second one is put beside it, with the reason and the date (NOTES). Each
quantity has a 95 % interval: a bootstrap over the seeds and, inside a seed, over the pairs or
prompts it was measured on. A claim **holds** when the interval lies inside the criterion, **fails**
when it lies outside, and is **open** when it crosses it or fewer than three seeds were run.
"""
import numpy as np

from lab import figures
from lab.base import progress

MIN_SEEDS, REPLICATES = 3, 1000
VERDICTS = ("holds", "fails", "open", "not measured")
METHODS = [name for name in figures.METHODS if name != "baseline"]


# ---------------------------------------------------------------- quantities
# Each takes d, {figure: its data} of one seed as numpy arrays, and pick(n): the indices 0 .. n-1
# for the value itself,
# n indices drawn with replacement for a bootstrap replicate.

def accuracy(curve, i, at=-1, kind="judge"):
    """Accuracy on the pairs i at one evaluation."""
    return curve["right"][kind][at][i].mean()


def final(curves, pick, kind="judge"):
    """{model: its accuracy at the end of training}, all on the same drawn pairs."""
    i = pick(next(iter(curves.values()))["right"][kind].shape[1])
    return {name: accuracy(c, i, kind=kind) for name, c in curves.items()}


def wins(verdicts, policy, opponent, i):
    """Share of the prompts i that `policy` wins, by stage 08's verdicts on one set."""
    return (verdicts[policy][opponent][i] == 1).mean()


def lead(verdicts, policy, opponent, i):
    """Win minus lose."""
    return verdicts[policy][opponent][i].mean()


def roughness(y):
    """How unsteady a curve is: root mean square distance from a straight line through its second
    half (nan when that
    has fewer than three steps)."""
    y = np.asarray(y, float)[len(y) // 2:]
    if len(y) < 3:
        return np.nan
    x = np.arange(len(y))
    return np.sqrt(((y - np.polyval(np.polyfit(x, y, 1), x)) ** 2).mean()) + 1e-12


def share_below_zero(d, pick):
    return (d["figure_01"]["mean"][pick(len(d["figure_01"]["mean"]))] < 0).mean()


def u_shape(d, pick):
    """The lower of the two outer groups' mean std, of 20 groups by strength, over that of the
    middle ten groups."""
    mean, std = d["figure_01"]["mean"], d["figure_01"]["std"]
    i = pick(len(mean))
    groups = np.array_split(std[i][np.argsort(mean[i], kind="stable")], 20)
    return min(groups[0].mean(), groups[-1].mean()) / np.concatenate(groups[5:15]).mean()


def consistency_steps(d, pick):
    """The lesser of two rises: from the weakest group of pairs to the one near zero and from there
    to the strongest."""
    weakest, zero, strongest = (d["figure_03"][k][pick(len(d["figure_03"][k]))].mean()
                                for k in ("weakest", "near_zero", "strongest"))
    return min(zero - weakest, strongest - zero)


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
    return min(r["tenth_10_soft_margin"] - r["tenth_10_margin"],
               r["tenth_10_margin"] - r["tenth_10"])


def margin_helps(d, pick):
    result = final({name: d["figure_07"][name] for name in ("baseline", "margin")}, pick)
    return result["margin"] - result["baseline"]


def late_change(curve, i, kind):
    """Accuracy at the end of the third epoch minus that at the end of the first."""
    return accuracy(curve, i, -1, kind) - accuracy(curve, i, figures.epoch_end(curve["step"], 1),
                                                   kind)


def late_changes(d, pick):
    """Late change on the judge's and the consistent set: (baseline's, mean of the denoising
    methods')."""
    change = {}
    for kind in ("judge", "consistent"):
        i = pick(d["figure_08"]["baseline_3_epochs"]["right"][kind].shape[1])
        for name in ("baseline", *figures.DENOISING):
            change.setdefault(name,
                              []).append(late_change(d["figure_08"][f"{name}_3_epochs"], i, kind))
    return np.mean(change["baseline"]), np.mean([change[name] for name in figures.DENOISING])


def less_overfitting(d, pick):
    baseline, denoising = late_changes(d, pick)
    return denoising - baseline


def noisy_set_leaders(d, pick):
    result = final(d["figure_08"], pick, "original")
    return np.mean([result[f"{n}_3_epochs"] for n in ("baseline", "margin")]) - np.mean(
        [result[f"{n}_3_epochs"] for n in figures.DENOISING])


def steadier(d, figure, others, curves):
    """Mean over some curves of log(roughness under the baseline / mean roughness under the other
    reward models)."""
    return np.mean([
        np.log(
            roughness(f(d[figure]["baseline"])) /
            np.mean([roughness(f(d[figure][name])) for name in others])) for f in curves])


def steadier_kl(d, pick):
    return steadier(d, "figure_09", figures.DENOISING,
                    (lambda c: c["kl"], lambda c: np.log(c["perplexity_sft"])))


def steadier_reward(d, pick):
    return steadier(d, "figure_12", figures.CONTRASTIVE,
                    (lambda c: c["reward"] / c["reward_std"][-1], lambda c: c["return"]))


def leads_on(d, pick, name, opponent="baseline", policies=METHODS):
    """Win minus lose of each policy on one evaluation set of Figure 10 or 13."""
    verdicts = d["figure_10" if policies is METHODS else "figure_13"]["verdicts"][name]
    i = pick(len(verdicts[policies[0]][opponent]))
    return [lead(verdicts, policy, opponent, i) for policy in policies]


def all_win_harmless(d, pick):
    return min(leads_on(d, pick, "eval_harmless"))


def less_on_helpful(d, pick):
    return np.mean(leads_on(d, pick, "eval_harmless")) - np.mean(leads_on(d, pick, "eval_helpful"))


def simcse_separates(d, pick):
    data = d["figure_11"]
    i = pick(len(data["baseline"]["silhouette"]))
    return data["simcse"]["silhouette"][i].mean() - data["baseline"]["silhouette"][i].mean()


def simcse_is_best(d, pick):
    leads = np.mean([leads_on(d, pick, name, "sft", figures.CONTRASTIVE)
                     for name in ("eval_harmless", "eval_helpful")], 0)
    return leads[0] - leads[1:].max()


def wider_differences(d, pick):
    rises = []
    for held in d["figure_16"].values():
        i = pick(len(held["theta"]["J"]))
        rises.append(held["theta"]["J"][i].mean() - held["vanilla"]["J"][i].mean())
    return np.mean(rises)


def tasks(d, kind="eval_"):
    """(task, its best round, that round's rivals' verdicts on its set, the prompts that had no part
    in choosing it), for each task that has a set of this kind."""
    t = d["table_2"]
    for name, verdicts in t["verdicts"].items():
        task = name.split("_", 1)[1]
        if name.startswith(kind) and task in t["best"]:
            yield task, t["best"][task], verdicts, t["unseen"][name]


def last_round(verdicts):
    return max(int(policy[6:]) for policy in verdicts)


def first_rounds_rise(d, pick):
    rises = []
    for _, _, verdicts, _ in tasks(d):
        i, last = pick(len(verdicts["round_1"]["sft"])), min(3, last_round(verdicts))
        if last < 2:
            return np.nan
        rises.append(
            wins(verdicts, f"round_{last}", "sft", i) - wins(verdicts, "round_1", "sft", i))
    return np.mean(rises)


def falls_after_best(d, pick):
    falls = []
    for _, best, verdicts, unseen in tasks(d):
        last, i = last_round(verdicts), unseen[pick(len(unseen))]
        if last < 2:
            return np.nan
        falls.append(wins(verdicts, best, "sft", i) - wins(verdicts, f"round_{last}", "sft", i))
    return np.mean(falls)


def best_against_vanilla(d, pick, kind):
    """{task: win minus lose of its best round against vanilla PPO} on the sets of one kind."""
    return {task: lead(verdicts, best, "round_0", unseen[pick(len(unseen))])
            for task, best, verdicts, unseen in tasks(d, kind)}


def mean_or_nan(values):
    return np.mean(values) if values else np.nan


def best_beats_vanilla(d, pick):
    return mean_or_nan(list(best_against_vanilla(d, pick, "eval_").values()))


def best_beats_vanilla_ood(d, pick):
    return mean_or_nan(list(best_against_vanilla(d, pick, "ood_").values()))


def less_out_of_distribution(d, pick):
    inside, outside = (best_against_vanilla(d, pick, kind) for kind in ("eval_", "ood_"))
    return mean_or_nan([inside[task] - outside[task] for task in outside])


def later_epochs(kind):
    def measure(d, pick):
        curve = d["figure_19"]["baseline_3_epochs"]
        return late_change(curve, pick(curve["right"][kind].shape[1]), kind)
    return measure


def inflation(d, pick):
    first, last = d["figure_20"]["epoch_end"][0], d["figure_20"]["epoch_end"][-1]   # [N, 2]
    i = pick(len(first))
    # chosen, rejected
    rise = (last[i] - first[i]).mean(0)
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
    """Share of pairs on which a method's verdict is another than the baseline's, weak half minus
    strong half."""
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

# id, where, the claim, the paper's number, what is measured here, criterion (low, high), function
# of it
CLAIMS = [
    ("C1", "2.2, Figure 1",
     "About a quarter of the pairs has a mean preference difference below 0.", "about 0.25",
     "share of training pairs with mean < 0", (0.20, 0.30), share_below_zero),
    ("C2", "2.2, Figure 2", "The std is U-shaped over strength.", "",
     "lower mean std of the two outer of 20 groups / mean std of the middle ten", (1,
                                                                                   None), u_shape),
    ("C3", "2.2, Figure 3", "Consistency with the judge rises with strength.",
     "0.164, 0.544, 0.956",
     "lesser of the two rises, weakest to near-zero to strongest group of Figure 3", (0, None),
     consistency_steps),
    ("C4", "2.3, Figure 4", "The weakest fifth trains a model worse than chance.", "below 0.5",
     "accuracy on the judge's labels, mean of tenths 1 and 2", (None, 0.5), tenths_mean(1, 2)),
    ("C5", "2.3, Figure 4", "The 20-40 % slice trains a model near chance.", "about 0.5",
     "accuracy on the judge's labels, mean of tenths 3 and 4", (0.45, 0.55), tenths_mean(3, 4)),
    ("C6", "2.3, Figure 4", "The strongest tenth alone is not the best tenth.", "",
     "accuracy of tenths 7 to 9 (mean) minus that of tenth 10", (0, None), strongest_is_not_best),
    ("C7", "2.4.1, Figure 5", "Flipping the labels of the two weakest tenths makes each useful.",
     "", "accuracy after flipping, the lesser of tenths 1 and 2", (0.5, None), both_flipped),
    ("C8", "2.4.2, Figure 6",
     "On the strongest tenth soft labels + margin beat margin, which beats nothing.", "",
     "lesser of the two steps in accuracy", (0, None), strongest_order),
    ("C9", "2.4.2, Figure 7", "A margin on all data helps.", "",
     "accuracy of margin minus baseline, one epoch", (0, None), margin_helps),
    ("C10", "2.5, Figure 8",
     "Denoising methods overfit less: their accuracy does not fall late, the baseline's does.", "",
     "change of accuracy from epoch 1 to 3, judge and consistent sets: mean of flip, flip+margin, "
     "soft+margin, minus "
     "baseline", (0, None), less_overfitting),
    ("C10b", "2.5, Figure 8", "The baseline's accuracy falls late in training.", "",
     "the baseline's own change of accuracy from epoch 1 to 3, judge and consistent sets",
     (None, 0), lambda d, pick: late_changes(d, pick)[0]),
    ("C10c", "2.5, Figure 8", "That of the denoising methods does not.", "",
     "their own change, mean of the three (a fall is more than 0.02)", (-0.02, None),
     lambda d, pick: late_changes(d, pick)[1]),
    ("C11", "2.5, Figure 8", "Baseline and margin lead on the original, noisy validation set.", "",
     "accuracy after three epochs, mean of baseline and margin minus mean of the three denoising "
     "methods", (0, None), noisy_set_leaders),
    ("C12", "2.5, Figure 9",
     "Without KL penalty, KL and perplexity of PPO are steadier under denoised reward models.", "",
     "log of roughness under baseline / under the denoised models, mean over KL and log perplexity",
     (0, None), steadier_kl),
    ("C13", "2.5, Figure 10", "All four methods win against the baseline on harmless prompts.", "",
     "win minus lose, the least of the four methods", (0, None), all_win_harmless),
    ("C14", "2.5, Figure 10", "The gain is smaller on helpful prompts.", "",
     "win minus lose against baseline, harmless minus helpful, mean of the four methods", (0, None),
     less_on_helpful),
    ("C15", "3.1, Figure 11", "SimCSE lowers the overlap of chosen and rejected features.", "",
     "silhouette under SimCSE minus under the baseline", (0, None), simcse_separates),
    ("C16", "3.1, Figure 12",
     "Reward and return of PPO are steadier under contrastive reward models.", "",
     "log of roughness under baseline / under the four models, mean over reward and return",
     (0, None), steadier_reward),
    ("C17", "3.1, Figure 13", "SimCSE on pairs is the best of the contrastive variants.", "",
     "win minus lose against SFT over harmless and helpful, SimCSE minus the best other", (0, None),
     simcse_is_best),
    ("C18", "3.2, Figure 16",
     "MetaRM widens the reward differences on the shifted policy's samples.", "",
     "J (Eq. 11) at theta minus the vanilla model's, held-back samples, mean of the rounds",
     (0, None), wider_differences),
    ("C19", "3.2.1, Table 2", "The win rate over SFT rises over the first rounds.",
     "harmless 44 to 69 %", "win rate of round 3 minus round 1, mean of the tasks", (0, None),
     first_rounds_rise),
    ("C20", "3.2.1, Table 2", "After some round it falls.", "harmless 69 to 64 %",
     "win rate of the best round (chosen on other prompts) minus that of the last", (0, None),
     falls_after_best),
    ("C21", "3.2.1, Table 3", "The best round beats vanilla PPO.", "harmless 54 : 15",
     "win minus lose, best round (chosen on other prompts) against round 0, mean of the tasks",
     (0, None), best_beats_vanilla),
    ("C22a", "3.2.1, Figure 15", "Out of distribution the best round beats vanilla PPO too.", "",
     "the same on out-of-distribution prompts", (0, None), best_beats_vanilla_ood),
    ("C22b", "3.2.1, Figure 15", "Out of distribution its gain is a little smaller.", "",
     "win minus lose in distribution minus out of distribution", (0,
                                                                  None), less_out_of_distribution),
    ("C23a", "A, Figure 19", "After the first epoch training accuracy goes on rising.", "",
     "training accuracy at the end of epoch 3 minus epoch 1, baseline", (0, None),
     later_epochs("train")),
    ("C23b", "A, Figure 19", "Validation accuracy does not.", "",
     "accuracy on the original validation set at the end of epoch 3 minus epoch 1, baseline",
     (None, 0.02), later_epochs("original")),
    ("C24", "A, Figure 20", "Scores inflate from epoch to epoch without a wider gap.", "",
     "rise of the mean score from epoch 1 to 3 minus that of the chosen-rejected gap, baseline",
     (0, None), inflation),
    ("C24b", "A, Figure 20", "Scores rise from epoch to epoch.", "",
     "mean score at the end of epoch 3 minus epoch 1, baseline", (0, None), score_rise),
    ("C24c", "A, Figure 20", "The gap between chosen and rejected hardly grows meanwhile.", "",
     "gap at the end of epoch 3 / at the end of epoch 1, baseline (hardly: by less than a fifth)",
     (None, 1.2), gap_ratio),
    ("C25a", "C, Figure 21",
     "Growing from the weakest end, much good data is needed to make up for it.", "",
     "accuracy from the strongest fifth alone minus from the weakest three fifths, equal steps",
     (0, None), weak_end_costs),
    ("C25b", "C, Figure 22", "Growing from the strongest end, accuracy does not fall.", "",
     "accuracy from the strongest three fifths minus from the strongest fifth, equal steps",
     (-0.02, None), strong_end_keeps),
    ("C26", "C, Figure 26", "With flipped labels p moves to 0 and 1 sooner.",
     "5k against 10k steps",
     "mean |2p - 1| of training pairs over three epochs, flip minus baseline", (0, None),
     sooner_extreme),
    ("C27", "C, Figure 27", "The methods differ mostly on weak slices.", "",
     "share of pairs judged otherwise than by the baseline, weak half minus strong half, mean of "
     "the four methods", (0, None), differ_on_weak),
    ("C28a", "3.2, Eq. 17", "The meta step changes the gradient by that of grad L . grad J.", "",
     "cosine of grad L(theta') - grad L(theta) and grad (grad L . grad J), at the baseline",
     (0.9, None), equation_17("whole")),
    ("C28b", "3.2, Eq. 17", "It does if grad J is held fixed, as Eq. 15's Jacobian is.", "",
     "the same with grad J held fixed", (0.9, None), equation_17("fixed")),]


# What was found about a claim's criterion after it was written; the criterion stays as it is.
SAME_BEST = "until 2026-11-25 the best round was chosen anew in each bootstrap replicate, by win " \
    "rate; since then it is stage 08's, the one of Table 3"
NOTES = {
    "C3": "until 2026-11-25 the groups were sixths of the pairs; since then they are stage 03's",
    "C20": SAME_BEST + ", and it may be the last round, which makes the fall 0", "C21": SAME_BEST,
    "C22a": SAME_BEST, "C22b": SAME_BEST,
    "C1": "the value depends on the world's share of wrong labels, about 0.32 here", "C10":
        "the difference alone can hold without any fall (2026-11-24, in review): see C10b and "
        "C10c, added then, when two "
        "seeds had been seen",
    "C12": "one curve a seed: the interval is over seeds only and too narrow with few",
    "C16": "one curve a seed: the interval is over seeds only and too narrow with few", "C24":
        "ill-posed: it holds also when scores fall and the gap falls more, or when both rise "
        "(2026-11-24, in review): see "
        "C24b and C24c, added then, when two seeds had been seen",}


def verdict(low, high, criterion, seeds):
    """"holds" if the interval lies inside the criterion (low, high; None is no bound), "fails" if
    it lies outside,
    "open" if it crosses it, is not finite, or comes from fewer than three seeds."""
    floor, ceiling = (b if c is None else c for b, c in zip((-np.inf, np.inf), criterion))
    if seeds < MIN_SEEDS or not np.isfinite([low, high]).all():
        return "open"
    if floor < low and high < ceiling:
        return "holds"
    return "fails" if high <= floor or low >= ceiling else "open"


def interval(measure, seeds, rng, replicates=REPLICATES):
    """95 % percentile bootstrap interval of the mean over seeds: a replicate draws seeds with
    replacement and, inside
    each, pairs or prompts with replacement. measure(d, pick) → number; seeds: [d]. → (low,
    high)."""
    def draw(n):
        return rng.integers(n, size=n)

    means = [
        np.mean([measure(seeds[s], draw) for s in draw(len(seeds))]) for _ in range(replicates)]
    # 1e-19 is no difference
    return tuple(float(x) for x in np.percentile(means, [2.5, 97.5]).round(9))


def as_arrays(data):
    """Lists of numbers as numpy arrays, all the way down."""
    if isinstance(data, dict):
        return {key: as_arrays(value) for key, value in data.items()}
    return np.array(data) if isinstance(data, list) else data


def ledger(collected):
    """CLAIMS with their value for each seed that has what they are measured on, mean, interval and
    verdict.
    collected: {figure: {run: data}}."""
    runs = {}
    for name, data in collected.items():
        for run, values in data.items():
            runs.setdefault(run, {})[name] = as_arrays(values)
    out = []
    for k, (claim, where, text, paper, quantity, criterion,
            measure) in enumerate(progress(CLAIMS, "claims")):
        entry = {
            "id": claim, "where": where, "claim": text, "paper": paper, "quantity": quantity,
            "criterion": criterion, "note": NOTES.get(claim, "")}
        values, lacks = {}, "run"
        for run, d in runs.items():
            try:
                values[run] = float(measure(d, np.arange))
            # the figure, model, evaluation set or kind of label that it has not
            except KeyError as missing:
                lacks = missing.args[0]
        if not values or not np.isfinite(list(values.values())).all():
            reason = "too few steps, rounds or sets" if values else f"this run has no {lacks}"
            out.append({**entry, "verdict": "not measured", "reason": reason})
            continue
        low, high = interval(measure, [runs[run] for run in values], np.random.default_rng(k))
        out.append({
            **entry, "values": values, "mean": float(np.mean(list(values.values()))),
            "interval": [low, high], "verdict": verdict(low, high, criterion, len(values))})
    return out
