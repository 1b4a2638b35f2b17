"""Stage 04: reward models on denoised preferences (sections 2.3 to 2.5).

Reads 03_strength/{train,valid,gold}.jsonl and 01_sft/, writes 04_rm_denoise/NAME/ for each method:
a reward model; train.jsonl, the pairs as trained on with their `margin` and `smoothing`; and
scores.jsonl, at every evaluation the rewards of the validation pairs and of as many training pairs,
after each epoch those of gold.jsonl too: {"step", "valid": {id: [r_c, r_r]}, "train": ...,
"gold": ...}. The methods are settings of three switches:

    --flip_below S   swap chosen and rejected of the pairs in the lowest share S of strength (of
                     the slice's, with --percentile) where mu_hat < 0
    --margin         adaptive margin mu_hat inside the log-sigmoid (Eq. 6; docs/readings.md)
    --smoothing a    label smoothing a (Eq. 5) on the pairs with mu_hat < 0; with --soften_all on
                     every pair (Figure 6)

and --percentile LO HI trains on a slice by strength: Figures 4 to 6 and 21 to 25 (listed in
lab/experiments.py). Figures 7, 8, 19, 20 and 26 to 28 are of the five methods on all pairs.

Departures from the paper: (1) the margin of a flipped pair is -mu_hat; (2) with margin and
smoothing together both terms of Eq. 5 use p = sigma(r_c - r_r - mu_hat); (3) alpha is not in the
paper.

    deepspeed 04_rm_denoise.py                                         # all methods in one launch
    deepspeed 04_rm_denoise.py --methods soft_margin --smoothing 0.2   # one, with another alpha
    deepspeed 04_rm_denoise.py --methods flip --percentile 0 10 --flip_below 1 --epochs 3  # Fig. 5
"""
import random
from functools import partial

import torch.nn.functional as F

import common

HPARAMS = {
    # name: (paper, small, toy, help)
    "epochs": (1.0, 1.0, 1.0, "passes over the preferences"),
    "batch_size": (32, 16, 32, "global batch, in pairs"),
    "micro_batch_size": (2, 4, 32, "pairs per process and forward pass"),
    "eval_batch_size": (8, 8, 64, "pairs per process when evaluating"),
    "lr": (5e-6, 5e-5, 1e-3, "peak learning rate"),
    "warmup": (0.1, 0.1, 0.1, "share of the steps with rising learning rate"),
    "eval_every": (500, 50, 25, "steps between evaluations, beside each epoch's end"),
    **common.TRAINING,
}
METHODS = {
    "baseline": {},
    "flip": {"flip_below": 0.2},
    "margin": {"margin": True},
    "flip_margin": {"flip_below": 0.2, "margin": True},
    "soft_margin": {"margin": True, "smoothing": 0.1},
}
SWITCHES = {"flip_below": 0.0, "margin": False, "smoothing": 0.0, "soften_all": False,
            "percentile": [0, 100]}
STRENGTH = "mean preference difference"


def preference_loss(r_chosen, r_rejected, margin=0.0, smoothing=0.0):
    """Eqs. 2, 5, 6: -[(1 - alpha) log sigma(d) + alpha log sigma(-d)] with d = r_c - r_r - mu_hat,
    mean over pairs.

    sigma(r_c - r_r) is p(y_c > y_r | x) of Eq. 1. r_chosen, r_rejected: [B]; margin (mu_hat) and
    smoothing (alpha): scalars or [B]. → scalar. alpha = 0, mu_hat = 0 is the vanilla loss, Eq. 2.
    """
    d = r_chosen - r_rejected - margin                                          # [B], Eq. 6
    return -((1 - smoothing) * F.logsigmoid(d) + smoothing * F.logsigmoid(-d)).mean()   # Eq. 5


def relabel(rows, flip_below=0.0, margin=False, smoothing=0.0, soften_all=False):
    """Apply the switches: `chosen` and `rejected` are swapped where `flipped`; `margin` and
    `smoothing` are those of the loss."""
    order = sorted(range(len(rows)), key=lambda i: rows[i][STRENGTH])
    lowest = set(order[:round(flip_below * len(rows))])
    out = []
    for i, row in enumerate(rows):
        flip = i in lowest and row[STRENGTH] < 0
        mu_hat = -row[STRENGTH] if flip else row[STRENGTH]
        soft = soften_all or row[STRENGTH] < 0  # flipped or not: Figure 23 softens flipped labels
        out.append({**row, "chosen": row["rejected" if flip else "chosen"],
                    "rejected": row["chosen" if flip else "rejected"], "flipped": flip,
                    "margin": mu_hat if margin else 0.0, "smoothing": smoothing if soft else 0.0})
    return out


def percentile_slice(rows, low, high):
    """The rows between two percentiles of strength, in their original order: the subsets of
    Figure 4 (tenths), with --flip_below of Figure 5, with --margin and --smoothing of Figure 6."""
    order = sorted(range(len(rows)), key=lambda i: rows[i][STRENGTH])
    return [rows[i] for i in sorted(order[int(len(rows) * low / 100):int(len(rows) * high / 100)])]


def train_method(args, name, rows, valid_rows, gold, sft, tokenizer):
    """Train and save one reward model; its loss is Eq. 5 / 6 on the relabelled pairs."""
    common.set_seed(args.seed)  # every method starts from the same head and sees the same order
    run = common.begin(args, f"04_rm_denoise/{name}", ["03_strength", "01_sft"], keep=True)
    if run is None:
        return
    columns = ("id", "prompt", "chosen", "rejected", "flipped", "margin", "smoothing")
    rows, train = common.encode_pairs(tokenizer, rows, args.run)
    if common.rank() == 0:
        common.write_jsonl(run.dir / "train.jsonl", [{k: row[k] for k in columns} for row in rows])
    valid_rows, valid = common.encode_pairs(tokenizer, valid_rows, args.run)
    watched = random.Random(args.seed).sample(train, min(len(train), len(valid)))
    steps = common.steps_for(args, len(train))
    model = common.load_reward_model(sft, args, head_seed=args.seed)
    rm = common.RewardEngine(model, run, tokenizer, train, steps)
    scores = run.state.setdefault("scores", [])

    def evaluate(step):
        """Accuracy on the three validation sets and on training pairs, under their own labels;
        after each epoch on those of gold, if there are any."""
        last = scores[-1]["step"] if scores else 0
        epoch, before = (int(args.epochs * s / steps) for s in (step, last))
        sets = {"valid": valid, "train": watched}
        sets |= {"gold": gold} if gold and step and (epoch > before or step == steps) else {}
        rewards = {split: rm.score(groups) for split, groups in sets.items()}   # [N, 2] each
        scores.append({"step": step} | {
            split: {g["id"]: [round(r, 6) for r in pair]
                    for g, pair in zip(sets[split], r.tolist())} for split, r in rewards.items()})
        result = common.accuracies(rewards.pop("valid"), valid_rows)
        for split, r in rewards.items():
            result[f"accuracy_{split}"] = common.accuracies(r, sets[split])["accuracy_original"]
        run.log(step, **result)
        return result

    if not run.done:
        evaluate(0)
    batches = common.batches(train, args.batch_size, steps, args.seed)
    for step, batch in run.steps(batches, rm=rm.engine):
        for micro in rm.micro_batches(batch):
            r_c, r_r = rm(micro)[0].unbind(1)                                   # [B] each
            loss = preference_loss(r_c, r_r, micro["margin"], micro["smoothing"])
            rm.backward(loss)
            run.note(loss=loss, grad_norm=rm.step())
        if run.due(step):
            result = evaluate(step)
    if common.rank() == 0:
        common.write_jsonl(run.dir / "scores.jsonl", scores)
    rm.save()
    run.finish(**result, steps=steps, flipped=sum(row["flipped"] for row in rows))


def directory_name(method, given):
    """The method with the switches that make it another one: `soft_margin_smoothing_0.2`."""
    parts = [name if value is True else f"{name}_" + "_".join(
        f"{x:g}" for x in (value if isinstance(value, list) else [value]))
        for name, value in given.items()]
    return "_".join([method, *parts])


def train_methods(args, train, valid, gold, sft, methods):
    """Set this process up, and train these methods one after another, each on its relabelled
    pairs (sections 2.4, 2.5)."""
    common.setup(args, one_thread=True)
    tokenizer = common.load_tokenizer(sft)
    _, gold = common.encode_pairs(tokenizer, gold, args.run)
    given = {k: getattr(args, k) for k in SWITCHES if getattr(args, k) is not None}
    values = args.hparams
    for method in methods:
        switches = SWITCHES | METHODS[method] | given
        args.hparams = values | switches
        low, high = switches.pop("percentile")
        rows = relabel(percentile_slice(train, low, high), **switches)
        name = args.name or directory_name(method, given)
        train_method(args, name, rows, valid, gold, sft, tokenizer)


def main(argv=None):
    def add_flags(flag):
        flag("--methods", nargs="+", choices=METHODS, default=list(METHODS),
             help="which to train (default: all)")
        flag("--flip_below", type=float, help="flip pairs in this lowest share of strength, where "
             "mu_hat < 0")
        flag("--margin", action="store_true", default=None, help="adaptive margin mu_hat (Eq. 6)")
        flag("--smoothing", type=float, help="label smoothing alpha where mu_hat < 0 (Eq. 5)")
        flag("--soften_all", action="store_true", default=None, help="smoothing on every pair")
        flag("--percentile", type=float, nargs=2, metavar=("LO", "HI"),
             help="train on this slice by strength only")
        flag("--name", help="name of the output directory (with one method)")
    args = common.parse_args(__doc__, HPARAMS, add_flags, argv)
    strength = common.require(args, "03_strength", "python 03_strength.py")
    sft = common.require(args, "01_sft", "python 01_sft.py")
    if args.name and len(args.methods) > 1:
        common.die("--name goes with one method: add --methods NAME")
    if args.name and not common.is_name(args.name):
        common.die(f"--name {args.name} cannot be a directory of this stage")
    train, valid = (common.read_jsonl(strength / f"{split}.jsonl") for split in ("train", "valid"))
    low, high = args.percentile or (0, 100)
    if not 0 <= low < high <= 100 or not percentile_slice(train, low, high):
        common.die("--percentile leaves no pair: LO and HI are in per cent, 0 to 100, LO below HI")
    if args.soften_all and not args.smoothing and "soft_margin" not in args.methods:
        common.die("--soften_all softens nothing without --smoothing")
    for name in ("flip_below", "smoothing"):
        if not 0 <= (getattr(args, name) or 0) <= 1:
            common.die(f"--{name} must lie between 0 and 1")
    common.side_by_side(args, args.methods, partial(
        train_methods, args, train, valid, common.read_jsonl(strength / "gold.jsonl"), sft))


if __name__ == "__main__":
    common.launch(main)
