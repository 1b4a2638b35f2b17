"""Stage 02: M reward models from the same preferences, the voters of section 2.2.

Reads 00_data/{train,valid}.jsonl and 01_sft/, writes 02_rm_ensemble/rm_00 ...: stock sequence
classifiers with one output. Each starts from pi^SFT with its own head and its own data order, and
minimises the Bradley-Terry loss

    L = -log sigma(r(x, y_c) - r(x, y_r))                                                (Eq. 2)

sigma(...) being the probability of Eq. 1, whose misprint docs/readings.md names.

Departures from the paper: (1) "the training order randomized" also gives each model its own head;
(2) labels are used as they are: this stage never sees gold or judge labels; (3) with --folds k,
which is ours, model m leaves the fold m mod k of the prompts out, and stage 03 scores a pair by
those models only that did not train on it (held_out.json).

    deepspeed 02_rm_ensemble.py                # all ten in one launch; finished ones are kept
    deepspeed --num_gpus 8 02_rm_ensemble.py --members 3    # train rm_03 only
"""
import json
import random
from functools import partial

import torch.nn.functional as F

import common

HPARAMS = {
    # name: (paper, small, toy, help)
    "M": (10, 10, 10, "reward models in the ensemble"),
    "folds": (0, 0, 0, "k: each model leaves a k-th of the prompts out, to score it; 0: none"),
    "epochs": (1.0, 1.0, 1.0, "passes over the preferences"),
    "batch_size": (32, 16, 32, "global batch, in pairs"),
    "micro_batch_size": (2, 4, 32, "pairs per process and forward pass"),
    "eval_batch_size": (8, 8, 64, "pairs per process when evaluating"),
    "lr": (5e-6, 5e-5, 1e-3, "peak learning rate"),
    "warmup": (0.1, 0.1, 0.1, "share of the steps with rising learning rate"),
    **common.TRAINING,
}
INPUTS = ["00_data/train.jsonl", "00_data/valid.jsonl", "01_sft"]


def fold(groups, k, m, seed):
    """The m-th of k folds of the pairs, whole prompts: their ids."""
    prompts = sorted({tuple(g["prompt"]) for g in groups})
    random.Random(seed).shuffle(prompts)
    mine = set(prompts[m % k::k])
    return {g["id"] for g in groups if tuple(g["prompt"]) in mine}


def train_member(args, m, tokenizer, train, valid, sft):
    """Train and save reward model m. Its seed gives it a head and a data order of its own."""
    seed = args.seed * 1000 + m
    common.set_seed(seed)
    run = common.begin(args, f"02_rm_ensemble/rm_{m:02d}", INPUTS, keep=True)
    if run is None:
        return
    if args.folds:
        held_out = fold(train, args.folds, m, args.seed)
        train = [g for g in train if g["id"] not in held_out]
        if not held_out or not train:
            common.die(f"--folds {args.folds}: there are fewer prompts than folds")
        if common.rank() == 0:
            common.write_text(run.dir / "held_out.json", json.dumps(sorted(held_out)) + "\n")
    steps = common.steps_for(args, len(train))
    model = common.load_reward_model(sft, args, head_seed=seed)
    rm = common.RewardEngine(model, run, tokenizer, train, steps)
    batches = common.batches(train, args.batch_size, steps, seed)
    for step, batch in run.steps(batches, rm=rm.engine):
        for micro in rm.micro_batches(batch):
            r_c, r_r = rm(micro)[0].unbind(1)                                   # [B] each
            loss = -F.logsigmoid(r_c - r_r).mean()                              # Eq. 2
            rm.backward(loss)
            run.note(loss=loss, grad_norm=rm.step(), train_accuracy=(r_c > r_r).float().mean())
        if step % 10 == 0 or step == steps:
            run.log(step, quiet=step != steps)
    result = common.accuracies(rm.score(valid), valid)
    rm.save()
    run.finish(valid_accuracy=result["accuracy_original"], steps=steps)


def train_members(args, data, sft, members):
    """Set this process up, and train these members one after another."""
    common.setup(args, one_thread=True)
    tokenizer = common.load_tokenizer(sft)
    _, train = common.encode_pairs(tokenizer, common.read_jsonl(data / "train.jsonl"), args.run)
    _, valid = common.encode_pairs(tokenizer, common.read_jsonl(data / "valid.jsonl"), args.run)
    del args.hparams["M"]  # of the launch, not of a member: a larger M keeps those there are
    for m in members:
        train_member(args, m, tokenizer, train, valid, sft)


def main(argv=None):
    args = common.parse_args(__doc__, HPARAMS, lambda flag: flag(
        "--members", type=int, nargs="+", help="train only these (default: all M)"), argv)
    if args.folds == 1 or args.folds and args.M % args.folds:
        common.die("--folds must be 2 or more, and --M a multiple of it")
    if out := [m for m in args.members or () if not 0 <= m < args.M]:
        common.die(f"--members are numbers from 0 to {args.M - 1} (--M is {args.M}), not {out[0]}")
    data = common.require(args, "00_data", "python 00_data.py")
    sft = common.require(args, "01_sft", "python 01_sft.py")
    common.side_by_side(args, args.members or range(args.M),
                        partial(train_members, args, data, sft))


if __name__ == "__main__":
    common.launch(main)
