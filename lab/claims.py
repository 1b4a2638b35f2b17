"""The paper's claims: what is measured for each, and the ledger of verdicts.

The claims, the quantities and the criteria stand in claims.toml. They were written before the
experiments were run (git log has the commit) and are not changed after; a criterion that proves
ill-posed is marked and a second one is put beside it, with the reason and the date. Each quantity
has a 95 % interval: Student's t over the seeds, and no narrower than a bootstrap over the seeds
and, inside a seed, over the pairs or prompts it was measured on, where there are such. The least of
several has the least of their lower and of their upper bounds, these by Bonferroni: a bootstrap of
the least itself lies too low, for the least of noisy values is below the least of the true ones. A
claim **holds** when the interval lies inside the criterion, **fails** when it lies outside, and is
**open** when it crosses it or fewer than three seeds were run.
"""
import tomllib
from functools import partial
from pathlib import Path

import numpy as np

from lab import figures
from lab.base import progress

MIN_SEEDS, REPLICATES = 3, 1000
VERDICTS = ("holds", "fails", "open", "not measured")
METHODS = [name for name in figures.METHODS if name != "baseline"]
NOISY, DENOISING = ([f"{name}_3_epochs" for name in of] for of in (
    figures.NOISY, figures.DENOISING))


# ---------------------------------------------------------------- quantities
# Each takes d, {figure: its data} of one seed as numpy arrays, and pick(n): the indices 0 .. n-1
# for the value itself, n indices drawn with replacement for a bootstrap replicate; what else it
# takes MEASURES settles. One that is the least of several values gives a list of them.

def truth(curves):
    """Where accuracy is measured: the pairs labelled by gold, else the validation pairs as the
    judge labels them, else as they came."""
    right = next(iter(curves.values()))["right"]
    return next(kind for kind in ("gold", "judge", "original") if kind in right)


def final(curves, pick, kind=None):
    """{model: its accuracy at the end of training}, all on the same drawn pairs."""
    kind = kind or truth(curves)
    i = pick(next(iter(curves.values()))["right"][kind].shape[1])
    return {name: c["right"][kind][-1][i].mean() for name, c in curves.items()}


def wins(verdicts, policy, opponent, i):
    """Share of the prompts i that `policy` wins, by stage 08's verdicts on one set; those without a
    verdict (nan) are left out."""
    found = verdicts[policy][opponent][i]
    return (found[~np.isnan(found)] == 1).mean()


def lead(verdicts, policy, opponent, i):
    """Win minus lose."""
    return np.nanmean(verdicts[policy][opponent][i])


def roughness(y):
    """How unsteady a curve is: root mean square distance from a straight line through its second
    half (nan when that has fewer than three steps)."""
    y = np.asarray(y, float)[len(y) // 2:]
    if len(y) < 3:
        return np.nan
    x = np.arange(len(y))
    return np.sqrt(((y - np.polyval(np.polyfit(x, y, 1), x)) ** 2).mean()) + 1e-12


def share_below_zero(d, pick):
    return (d["figure_01"]["mean"][pick(len(d["figure_01"]["mean"]))] < 0).mean()


def u_shape(d, pick):
    """Each of the two outer groups' mean std, of 20 groups by strength, over that of the middle
    ten groups."""
    mean, std = d["figure_01"]["mean"], d["figure_01"]["std"]
    i = pick(len(mean))
    groups = np.array_split(std[i][np.argsort(mean[i], kind="stable")], 20)
    return [outer.mean() / np.concatenate(groups[5:15]).mean() for outer in (groups[0], groups[-1])]


def consistency_steps(d, pick):
    """Two rises: from the weakest group of pairs to the one near zero and from there to the
    strongest."""
    weakest, zero, strongest = (d["figure_03"][k][pick(len(d["figure_03"][k]))].mean()
                                for k in ("weakest", "near_zero", "strongest"))
    return [zero - weakest, strongest - zero]


def accuracy(d, pick, figure, of, kind=None):
    """Accuracies at the end of training; of: ["a b - c"], that of models a and b (mean) minus c's,
    all on the same pairs, of one figure or of several."""
    r = final({k: c for name in figure.split() for k, c in d[name].items()}, pick, kind)
    means = [[np.mean([r[m] for m in part.split()]) for part in text.split(" - ")] for text in of]
    return [mean[0] - sum(mean[1:]) for mean in means]


def late_change(curve, i, kind):
    """Accuracy at the end of the third epoch minus that at the end of the first."""
    right, steps = curve["right"][kind], curve["gold_step" if kind == "gold" else "step"]
    return right[-1][i].mean() - right[figures.epoch_end(steps, 1)][i].mean()


def late_changes(d, pick, signs):
    """signs[0] times the baseline's late change plus signs[1] times the denoising methods'."""
    curves, kind = d["figure_08"], truth(d["figure_08"])
    i = pick(curves["baseline_3_epochs"]["right"][kind].shape[1])
    return np.dot(signs, [np.mean([late_change(curves[name], i, kind) for name in of])
                          for of in (["baseline_3_epochs"], DENOISING)])


def steadier(d, pick, figure, others, curves):
    """Mean over some curves of log(roughness under the baseline / mean roughness under the other
    reward models)."""
    return np.mean([np.log(roughness(f(d[figure]["baseline"])) / np.mean(
        [roughness(f(d[figure][name])) for name in others])) for f in curves])


def leads_on(d, pick, name, opponent="baseline", policies=METHODS):
    """Win minus lose of each policy on one evaluation set of Figure 10 or 13."""
    verdicts = d["figure_10" if policies is METHODS else "figure_13"]["verdicts"][name]
    i = pick(len(verdicts[policies[0]][opponent]))
    return [lead(verdicts, policy, opponent, i) for policy in policies]


def less_on_helpful(d, pick):
    return np.mean(leads_on(d, pick, "eval_harmless")) - np.mean(leads_on(d, pick, "eval_helpful"))


def simcse_separates(d, pick):
    data = d["figure_11"]
    i = pick(len(data["baseline"]["silhouette"]))
    return data["simcse"]["silhouette"][i].mean() - data["baseline"]["silhouette"][i].mean()


def simcse_is_best(d, pick):
    leads = np.mean([leads_on(d, pick, name, "sft", figures.CONTRASTIVE)
                     for name in ("eval_harmless", "eval_helpful")], 0)
    return leads[0] - leads[1:]


def wider_differences(d, pick, where):
    rises = []
    for held in d["figure_16"].values():
        i = pick(len(held[where]["J"]))
        rises.append(held[where]["J"][i].mean() - held["vanilla"]["J"][i].mean())
    return np.mean(rises)


def rise_by_first_order(d, pick):
    rises = [held["rise"] for held in d["figure_16"].values()]
    return np.mean([r["measured"] / (r["first_order"] or np.nan) for r in rises])  # eta may be 0


def tasks(d, kind="eval_"):
    """(task, its best round, that round's rivals' verdicts on its set, the prompts that had no part
    in choosing it), for each task that has a set of this kind."""
    t = d["table_2"]
    for name, verdicts in t["verdicts"].items():
        task = name.split("_", 1)[1]
        if name.startswith(kind) and task in t["best"]:
            yield task, t["best"][task], verdicts, t["unseen"][name]


def last_round(verdicts, most=np.inf):
    return f"round_{min(most, max(int(policy[6:]) for policy in verdicts))}"


def more_wins(verdicts, policy, other, i):
    """How much more often one round wins against SFT than another; nan where there is but one."""
    more = wins(verdicts, policy, "sft", i) - wins(verdicts, other, "sft", i)
    return np.nan if last_round(verdicts) == "round_1" else more


def first_rounds_rise(d, pick):
    return np.mean([more_wins(v, last_round(v, 3), "round_1", pick(len(v["round_1"]["sft"])))
                    for _, _, v, _ in tasks(d)] or np.nan)


def falls_after_best(d, pick):
    return np.mean([more_wins(v, best, last_round(v), unseen[pick(len(unseen))])
                    for _, best, v, unseen in tasks(d)] or np.nan)


def best_against_vanilla(d, pick, kind):
    """{task: win minus lose of its best round against vanilla PPO} on the sets of one kind."""
    return {task: lead(verdicts, best, "round_0", unseen[pick(len(unseen))])
            for task, best, verdicts, unseen in tasks(d, kind)}


def best_beats_vanilla(d, pick, kind):
    return np.mean([*best_against_vanilla(d, pick, kind).values()] or np.nan)


def less_out_of_distribution(d, pick):
    inside, outside = (best_against_vanilla(d, pick, kind) for kind in ("eval_", "ood_"))
    return np.mean([inside[task] - outside[task] for task in outside] or np.nan)


def later_epochs(d, pick, kind=None):
    curve, kind = d["figure_19"]["baseline_3_epochs"], kind or truth(d["figure_19"])
    return late_change(curve, pick(curve["right"][kind].shape[1]), kind)


def epochs_1_to_3(d, pick, of):
    """`of` the scores [N, 2], chosen and rejected, at the ends of the first and the third epoch."""
    ends = d["figure_20"]["epoch_end"]                                    # [3, N, 2]
    i = pick(ends.shape[1])
    return of(ends[0][i], ends[-1][i])


def inflation(first, last):
    rise = (last - first).mean(0)                                         # chosen, rejected
    return rise.mean() - (rise[0] - rise[1])


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


def equation_17(d, pick, kind):
    values = d["equation_17"][kind]
    return values[pick(len(values))].mean()


# ---------------------------------------------------------------- the ledger

MEASURES = {
    "C1": share_below_zero, "C2": u_shape, "C3": consistency_steps,
    "C4": partial(accuracy, figure="figure_04", of=["tenth_01 tenth_02"]),
    "C5": partial(accuracy, figure="figure_04", of=["tenth_03 tenth_04"]),
    "C6": partial(accuracy, figure="figure_04", of=["tenth_07 tenth_08 tenth_09 - tenth_10"]),
    "C7": partial(accuracy, figure="figure_05", of=["tenth_01_flip", "tenth_02_flip"]),
    "C8": partial(accuracy, figure="figure_06", of=[
        "tenth_10_soft_margin - tenth_10_margin", "tenth_10_margin - tenth_10"]),
    "C9": partial(accuracy, figure="figure_07", of=["margin - baseline"]),
    "C10": partial(late_changes, signs=(-1, 1)), "C10b": partial(late_changes, signs=(1, 0)),
    "C10c": partial(late_changes, signs=(0, 1)),
    "C11": partial(accuracy, figure="figure_08", kind="original", of=[
        f"{' '.join(NOISY)} - {' '.join(DENOISING)}"]),
    "C12": partial(steadier, figure="figure_09", others=figures.DENOISING, curves=(
        lambda c: c["kl"], lambda c: np.log(c["perplexity_sft"]))),
    "C13": partial(leads_on, name="eval_harmless"), "C14": less_on_helpful,
    "C15": simcse_separates,
    "C16": partial(steadier, figure="figure_12", others=figures.CONTRASTIVE, curves=(
        lambda c: c["reward"] / c["reward_std"][-1], lambda c: c["return"])),
    "C17": simcse_is_best, "C18": partial(wider_differences, where="theta"),
    "C18b": partial(wider_differences, where="theta_prime"), "C18c": rise_by_first_order,
    "C19": first_rounds_rise, "C20": falls_after_best,
    "C21": partial(best_beats_vanilla, kind="eval_"),
    "C22a": partial(best_beats_vanilla, kind="ood_"), "C22b": less_out_of_distribution,
    "C23a": partial(later_epochs, kind="train"), "C23b": later_epochs,
    "C24": partial(epochs_1_to_3, of=inflation),
    "C24b": partial(epochs_1_to_3, of=lambda first, last: (last - first).mean()),
    "C24c": partial(epochs_1_to_3, of=lambda first, last: (
        (last @ [1, -1]).mean() / (first @ [1, -1]).mean())),
    "C25a": partial(accuracy, figure="figure_21 figure_22", of=["part_080_100 - part_000_060"]),
    "C25b": partial(accuracy, figure="figure_22", of=["part_040_100 - part_080_100"]),
    "C26": sooner_extreme, "C27": differ_on_weak,
    "C28a": partial(equation_17, kind="whole"), "C28b": partial(equation_17, kind="fixed")}
# [(id, entry with its criterion (low, high; None is no bound), function)]
CLAIMS = [(name, {"note": "", "paper": "", **c, "criterion": (c.get("low"), c.get("high"))},
           MEASURES[name]) for name, c in tomllib.loads(
               Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")).items()]


def verdict(low, high, criterion, seeds):
    """"holds" if the interval lies inside the criterion (low, high; None is no bound), "fails" if
    it lies outside, "open" if it crosses it, is not finite, or comes from fewer than three
    seeds."""
    floor, ceiling = (b if c is None else c for b, c in zip((-np.inf, np.inf), criterion))
    if seeds < MIN_SEEDS or not np.isfinite([low, high]).all():
        return "open"
    if floor < low and high < ceiling:
        return "holds"
    return "fails" if high <= floor or low >= ceiling else "open"


def interval(measure, seeds, rng, replicates=REPLICATES):
    """95 % interval of the mean over seeds: that of Student's t, and no narrower than a percentile
    bootstrap, whose replicates draw seeds with replacement and, inside each, pairs or prompts. With
    five seeds the bootstrap alone covers about 83 %, with three 73. measure(d, pick) → number, or
    the members of which the least is meant; seeds: [d]. → (low, high)."""
    drawn = []

    def all_of(n):
        drawn.append(n)
        return np.arange(n)

    def draw(n):
        return rng.integers(n, size=n)

    values = np.array([measure(d, all_of) for d in seeds], float).reshape(len(seeds), -1)
    above = 1 - 0.025 / values.shape[1]
    low, high = figures.student(values, above)                                  # [members] each
    if drawn:
        means = np.array([np.mean([measure(seeds[s], draw) for s in draw(len(seeds))], 0)
                          for _ in range(replicates)]).reshape(replicates, -1)  # [R, members]
        least, most = np.quantile(means, [0.025, above], axis=0)
        low, high = np.minimum(low, least), np.maximum(high, most)
    return tuple(float(x.min().round(9)) for x in (low, high))  # 1e-19 is no difference


def as_arrays(data):
    """Lists of numbers as numpy arrays, all the way down; None, as in verdicts, is nan."""
    if isinstance(data, dict):
        return {key: as_arrays(value) for key, value in data.items()}
    if isinstance(data, list) and len({len(x) for x in data if isinstance(x, list)}) > 1:
        return list(map(as_arrays, data))  # of rounds of PPO with unequal numbers of steps
    return np.array(data, float if None in data else None) if isinstance(data, list) else data


def ledger(collected):
    """CLAIMS with their value for each seed that has what they are measured on, mean (of the least
    of several the least mean, not the mean of each seed's least), interval and verdict. collected:
    {figure: {run: data}}."""
    runs, out = {}, []
    for name, data in collected.items():
        for run, values in data.items():
            runs.setdefault(run, {})[name] = as_arrays(values)
    for k, (name, claim, measure) in enumerate(progress(CLAIMS, "claims")):
        entry = {"id": name, **{k: claim[k] for k in (
            "where", "claim", "paper", "quantity", "criterion", "note")}}
        values, lacks = {}, "no run"
        for run, d in runs.items():
            try:
                values[run] = np.array(measure(d, np.arange), float)
            except KeyError as missing:  # the figure, model, set or kind of label that it has not
                lacks = f"no {missing.args[0]}"
            except figures.Missing as missing:
                lacks = missing.args[0]
        if not values or not np.isfinite(list(values.values())).all():
            reason = "too few steps, rounds or sets" if values else f"this run has {lacks}"
            out.append({**entry, "verdict": "not measured", "reason": reason})
            continue
        low, high = interval(measure, [runs[run] for run in values], np.random.default_rng(k))
        out.append({**entry, "values": {run: float(v.min()) for run, v in values.items()},
                    "mean": float(np.mean(list(values.values()), 0).min()), "interval": [low, high],
                    "verdict": verdict(low, high, claim["criterion"], len(values))})
    return out
