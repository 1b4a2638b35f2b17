"""Stage 04: reward models on denoised preferences (sections 2.4 and 2.5).

Reads 03_strength/{train,valid}.jsonl and 01_sft/, writes 04_rm_denoise/NAME/ for each method and
04_rm_denoise/figures/ (Figure 8). The methods are settings of three independent switches:

    --flip_below S   swap chosen and rejected of the pairs in the lowest share S of strength where mu_hat < 0
    --margin         adaptive margin mu_hat inside the log-sigmoid (Eq. 6 as meant: see README, misprints)
    --smoothing a    label smoothing a (Eq. 5) on the pairs with mu_hat < 0; with --soften_all on every pair (Figure 6)

Every evaluation adds the rewards of the validation pairs and of as many training pairs to scores.jsonl:
{"step", "valid": {id: [r_c, r_r]}, "train": the same, chosen and rejected as trained on}.

Departures from the paper: (1) the margin of a flipped pair is -mu_hat; (2) with margin and smoothing together both
terms of Eq. 5 use p = sigma(r_c - r_r - mu_hat); (3) alpha is not in the paper.

    deepspeed 04_rm_denoise.py                                        # all methods in one launch
    deepspeed 04_rm_denoise.py --methods soft_margin --smoothing 0.2  # one method, another alpha
    deepspeed 04_rm_denoise.py --methods flip --percentile 0 10 --flip_below 1    # Figure 5: the weakest tenth
"""
import random
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

import audit
import common

HPARAMS = {
    # name: (paper, toy, help)
    "epochs": (1.0, 1.0, "passes over the preferences"),
    "batch_size": (32, 32, "global batch, in pairs"),
    "micro_batch_size": (2, 32, "pairs per process and forward pass"),
    "eval_batch_size": (8, 64, "pairs per process when evaluating"),
    "lr": (5e-6, 1e-3, "peak learning rate"),
    "warmup": (0.1, 0.1, "share of the steps with rising learning rate"),
    "eval_every": (500, 25, "steps between evaluations on the three validation sets"),
    **common.TRAINING,
}
INPUTS = ["03_strength", "01_sft"]
METHODS = {
    # name: (flip_below, margin, smoothing, percentile)
    "baseline": (0.0, False, 0.0, (0, 100)),
    "flip": (0.2, False, 0.0, (0, 100)),
    "margin": (0.0, True, 0.0, (0, 100)),
    "flip_margin": (0.2, True, 0.0, (0, 100)),
    "soft_margin": (0.0, True, 0.1, (0, 100)),
    # Figure 5 in small: the weakest tenth alone, as it is and flipped
    "weakest_tenth": (0.0, False, 0.0, (0, 10)),
    "weakest_tenth_flipped": (1.0, False, 0.0, (0, 10)),
}
SWITCHES = ("flip_below", "margin", "smoothing", "percentile", "soften_all")
STRENGTH = "mean preference difference"


def preference_loss(r_chosen, r_rejected, margin=0.0, smoothing=0.0):
    """Eqs. 2, 5, 6: -[(1 - alpha) log sigma(d) + alpha log sigma(-d)], d = r_c - r_r - mu_hat; mean over pairs.

    sigma(r_c - r_r) is p(y_c > y_r | x) of Eq. 1. r_chosen, r_rejected: [B]; margin (mu_hat) and smoothing (alpha):
    scalars or [B]. → scalar.
    alpha = 0 and mu_hat = 0 is the vanilla loss, Eq. 2.
    """
    d = r_chosen - r_rejected - margin                                             # [B], Eq. 6
    return -((1 - smoothing) * F.logsigmoid(d) + smoothing * F.logsigmoid(-d)).mean()      # Eq. 5


def relabel(rows, flip_below=0.0, margin=False, smoothing=0.0, soften_all=False):
    """Apply the switches: rows with `chosen`, `rejected` (swapped where flipped), `margin` and `smoothing`."""
    order = sorted(range(len(rows)), key=lambda i: rows[i][STRENGTH])
    lowest = set(order[:round(flip_below * len(rows))])
    out = []
    for i, row in enumerate(rows):
        flip = i in lowest and row[STRENGTH] < 0
        mu_hat = -row[STRENGTH] if flip else row[STRENGTH]
        out.append({**row, "chosen": row["rejected" if flip else "chosen"],
                    "rejected": row["chosen" if flip else "rejected"], "flipped": flip,
                    "margin": mu_hat if margin else 0.0,
                    # flipped or not: Figure 23 softens the labels of flipped pairs
                    "smoothing": smoothing if soften_all or row[STRENGTH] < 0 else 0.0})
    return out


def percentile_slice(rows, low, high):
    """The rows between two percentiles of strength, in their original order: the subsets of Figure 4 (tenths), with
    --flip_below of Figure 5, with --margin and --smoothing of Figures 6 and 7."""
    order = sorted(range(len(rows)), key=lambda i: rows[i][STRENGTH])
    return [rows[i] for i in sorted(order[int(len(rows) * low / 100):int(len(rows) * high / 100)])]


def three_sets(rows):
    """Section 2.5: for each validation set the rows' indices and the sign of the right preference, by name."""
    judged = [(i, 2 * row["judge_label"] - 1) for i, row in enumerate(rows) if row.get("judge_label", -1) != -1]
    return {"original": [(i, 1) for i in range(len(rows))],
            "judge": judged,                                 # judge 0: the rejected response is the right one
            "consistent": [(i, sign) for i, sign in judged if sign == 1]}


def accuracies(rewards, sets):
    """Accuracy on each validation set; rewards [N, 2]. A tie counts as wrong. Empty sets are left out."""
    d = rewards[:, 0] - rewards[:, 1]
    return {f"accuracy_{name}": sum(d[i].item() * sign > 0 for i, sign in members) / len(members)
            for name, members in sets.items() if members}


def encode_labelled(tokenizer, rows, run):
    """Groups that carry their row's margin and smoothing."""
    rows, groups = common.encode_pairs(tokenizer, rows, run)
    return [{**g, "margin": row["margin"], "smoothing": row["smoothing"]} for row, g in zip(rows, groups)]


def column(groups, name):
    """One number of each group as a tensor [B]."""
    return torch.tensor([g[name] for g in groups], device=common.device())


def train_method(args, name, rows, valid_rows, sft, tokenizer):
    """Train and save one reward model; its loss is Eq. 5 / 6 on the relabelled pairs."""
    common.set_seed(args.seed)  # every method starts from the same head and sees the same order
    stage = audit.start_stage(args, f"04_rm_denoise/{name}", INPUTS)
    train, pad_id = encode_labelled(tokenizer, rows, args.run), tokenizer.pad_token_id
    valid_rows, valid = common.encode_pairs(tokenizer, valid_rows, args.run)
    steps = common.steps_for(args, len(train), args.batch_size, args.epochs)
    model = common.load_reward_model(sft, args, head_seed=args.seed)
    engine = common.make_engine(model, args, args.batch_size, args.lr, steps, args.warmup)
    layout = common.choose_layout(args, lambda batch: engine(batch)[0], train)
    sets, watched = three_sets(valid_rows), random.Random(args.seed).sample(train, min(len(train), len(valid)))

    def evaluate(step, **more):
        """Accuracy on the three sets and on training pairs; the rewards behind them go to scores.jsonl."""
        rewards = {name: common.score(engine, groups, args, layout, pad_id)
                   for name, groups in (("valid", valid), ("train", watched))}     # [N, 2]
        scores.append({"step": step} | {
            name: {g["id"]: [round(x, 4) for x in pair] for g, pair in zip(groups, rewards[name].tolist())}
            for name, groups in (("valid", valid), ("train", watched))})
        if common.rank() == 0:
            audit.write_jsonl(stage.dir / "scores.jsonl", scores)
        result = accuracies(rewards["valid"], sets) | accuracies(rewards["train"], {
            "train": [(i, 1) for i in range(len(watched))]})
        audit.log_metrics(stage, step, **more, **result)
        return result

    done, state = audit.resume(stage, {"rm": engine}, steps)
    scores = state.get("scores", [])
    if not done:
        evaluate(0)

    batches = islice(common.batches(train, args.batch_size, steps, args.seed), done, None)
    for step, batch in enumerate(common.progress(batches, name, steps, done), done + 1):
        for micro in common.micro_batches(batch, args.micro_batch_size):
            rewards, _ = engine(common.collate(micro, pad_id, layout))             # [B, 2]
            loss = preference_loss(rewards[:, 0], rewards[:, 1], column(micro, "margin"), column(micro, "smoothing"))
            engine.backward(loss)
            grad_norm = common.step(engine)
        if step % args.eval_every == 0 or step == steps:
            result = evaluate(step, loss=loss)
        audit.end_step(stage, step, batch, {"scores": scores}, loss=loss, grad_norm=grad_norm)

    common.save_model(engine, stage.dir, tokenizer)
    audit.finish_stage(stage, {**result, "steps": steps, "flipped": sum(row["flipped"] for row in rows)})
    common.free(engine)


def figure_8(args):
    """Figure 8: accuracy of every standard method on the three validation sets during training."""
    names = [f"04_rm_denoise/{n}" for n, (*_, percentile) in METHODS.items() if percentile == (0, 100)]
    stage = audit.start_stage(args, "04_rm_denoise/figures", [f"{name}/metrics.jsonl" for name in names])
    curves = {name: audit.read_jsonl(Path(args.out) / name / "metrics.jsonl") for name in names}
    keys = [k for k in ("accuracy_original", "accuracy_judge", "accuracy_consistent") if k in curves[names[0]][0]]
    if common.rank() == 0:
        plt = audit.pyplot()
        figure, axes = plt.subplots(1, len(keys), figsize=(5 * len(keys), 3.5), squeeze=False)
        for axis, key in zip(axes[0], keys):
            for name, curve in curves.items():
                axis.plot([c["step"] for c in curve], [c[key] for c in curve], label=name.split("/")[1])
            axis.set(xlabel="step", ylabel="accuracy", title=key.removeprefix("accuracy_") + " validation set")
        axes[0][0].legend()
        figure.suptitle("Figure 8", y=1.02)
        figure.savefig(stage.dir / "figure_08.png")
    audit.finish_stage(stage, {name.split("/")[1]: {k: curve[-1][k] for k in keys} for name, curve in curves.items()})


def add_switches(flag):
    """The three switches, shared with stage 05."""
    flag("--flip_below", type=float, help="flip pairs in this lowest share of strength, where mu_hat < 0")
    flag("--margin", action="store_true", default=None, help="adaptive margin mu_hat (Eq. 6)")
    flag("--smoothing", type=float, help="label smoothing alpha on pairs with mu_hat < 0 (Eq. 5)")
    flag("--soften_all", action="store_true", default=None, help="label smoothing on every pair")
    flag("--percentile", type=float, nargs=2, metavar=("LO", "HI"), help="train on this slice by strength only")
    flag("--name", help="name of the output directory (with one method)")


def directory_name(args, method):
    """--name, or the method with the flags that make it another: `soft_margin_smoothing_0.2`."""
    parts = [f"{k}_" + "_".join(f"{x:g}" for x in (v if isinstance(v, list) else [v])) if v is not True else k
             for k, v in given_switches(args).items()]
    return args.name or "_".join([method, *parts])


def check_name(args):
    """--name is one directory, for one method."""
    if args.name and len(args.methods) > 1:
        common.die("--name goes with one method: add --methods NAME")
    if args.name and not audit.is_name(args.name):
        common.die(f"--name {args.name} cannot be a directory of this stage")


def given_switches(args):
    """The switches set on the command line."""
    return {k: getattr(args, k) for k in SWITCHES if getattr(args, k) is not None}


def main(argv=None):
    def add_flags(flag):
        flag("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to train (default: all)")
        add_switches(flag)
    args = audit.parse_args(__doc__, HPARAMS, add_flags, argv)
    strength = audit.require(args, "03_strength", "python 03_strength.py")
    sft = audit.require(args, "01_sft", "python 01_sft.py")
    changed = given_switches(args)
    standard = not changed and not args.name
    check_name(args)
    common.setup(args)
    tokenizer = common.load_tokenizer(sft)
    train, valid = (audit.read_jsonl(strength / f"{split}.jsonl") for split in ("train", "valid"))
    if standard:
        audit.begin_launch(args, "04_rm_denoise")
    for method in args.methods:
        switches = dict(zip(SWITCHES, METHODS[method])) | changed
        name = directory_name(args, method)
        args.hparams |= switches | {"percentile": list(switches["percentile"])}
        rows = percentile_slice(train, *switches.pop("percentile"))
        if not (standard and audit.kept(args, f"04_rm_denoise/{name}", INPUTS)):
            train_method(args, name, relabel(rows, **switches), valid, sft, tokenizer)
    if standard and all((Path(args.out) / f"04_rm_denoise/{m}/manifest.json").exists() for m in METHODS):
        args.hparams = {k: v for k, v in args.hparams.items() if k not in SWITCHES}
        figure_8(args)


if __name__ == "__main__":
    audit.run(main)
