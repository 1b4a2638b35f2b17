"""Stage 02: M reward models from the same preferences, the voters of section 2.2.

Reads 00_data/{train,valid}.jsonl and 01_sft/, writes 02_rm_ensemble/rm_00 ... (stock sequence classifiers with
one output) and 02_rm_ensemble/figures/. Each starts from pi^SFT with its own head and its own data order, and
minimises the Bradley-Terry loss (Eq. 2)

    L = -log sigma(r(x, y_c) - r(x, y_r))            (Eq. 1, with exp(r(x, y_c)) in the denominator: see README)

Departures from the paper: (1) "the training order randomized" also gives each model its own head; (2) labels are
used as they are: this stage never sees gold or judge labels.

    deepspeed 02_rm_ensemble.py                  # all ten in one launch; finished ones are kept if it is killed
    deepspeed --num_gpus 8 02_rm_ensemble.py --members 3    # train rm_03 only
"""
import json
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

import audit
import common

HPARAMS = {
    # name: (paper, toy, help)
    "M": (10, 10, "reward models in the ensemble"),
    "epochs": (1.0, 1.0, "passes over the preferences"),
    "batch_size": (32, 32, "global batch, in pairs"),
    "micro_batch_size": (2, 32, "pairs per process and forward pass"),
    "eval_batch_size": (8, 64, "pairs per process when evaluating"),
    "lr": (5e-6, 1e-3, "peak learning rate"),
    "warmup": (0.1, 0.1, "share of the steps with rising learning rate"),
    **common.TRAINING,
}
INPUTS = ["00_data/train.jsonl", "00_data/valid.jsonl", "01_sft"]


def accuracy(rewards):
    """Share of pairs with r_chosen > r_rejected; rewards [N, 2]. A tie counts as wrong (RewardBench)."""
    return (rewards[:, 0] > rewards[:, 1]).float().mean().item()


def train_member(args, m, tokenizer, train, valid, sft):
    """Train and save reward model m. Its seed gives it a head and a data order of its own."""
    seed, pad_id = args.seed * 1000 + m, tokenizer.pad_token_id
    common.set_seed(seed)
    stage = audit.start_stage(args, f"02_rm_ensemble/rm_{m:02d}", INPUTS)
    steps = common.steps_for(args, len(train), args.batch_size, args.epochs)
    model = common.load_reward_model(sft, args, head_seed=seed)
    engine = common.make_engine(model, args, args.batch_size, args.lr, steps, args.warmup)
    layout = common.choose_layout(args, lambda batch: engine(batch)[0], train)
    done, _ = audit.resume(stage, {"rm": engine}, steps)
    batches = islice(common.batches(train, args.batch_size, steps, seed), done, None)
    for step, batch in enumerate(common.progress(batches, f"rm_{m:02d}", steps, done), done + 1):
        for micro in common.micro_batches(batch, args.micro_batch_size):
            rewards, _ = engine(common.collate(micro, pad_id, layout))              # [B, 2]
            loss = -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()              # Eq. 2
            engine.backward(loss)
            grad_norm = common.step(engine)
        if step % 10 == 0 or step == steps:
            audit.log_metrics(stage, step, loss=loss, train_accuracy=accuracy(rewards), quiet=step != steps)
        audit.end_step(stage, step, batch, loss=loss, grad_norm=grad_norm)
    valid_accuracy = accuracy(common.score(engine, valid, args, layout, pad_id))
    common.save_model(engine, stage.dir, tokenizer)
    audit.finish_stage(stage, {"valid_accuracy": valid_accuracy, "steps": steps})
    common.free(engine)


def main(argv=None):
    args = audit.parse_args(__doc__, HPARAMS, lambda flag: flag(
        "--members", type=int, nargs="+", help="train only these (default: all M)"), argv)
    data = audit.require(args, "00_data", "python 00_data.py")
    sft = audit.require(args, "01_sft", "python 01_sft.py")
    common.setup(args)
    tokenizer = common.load_tokenizer(sft)
    _, train = common.encode_pairs(tokenizer, audit.read_jsonl(data / "train.jsonl"), args.run)
    _, valid = common.encode_pairs(tokenizer, audit.read_jsonl(data / "valid.jsonl"), args.run)
    members = [f"02_rm_ensemble/rm_{m:02d}" for m in range(args.M)]
    if not args.members:
        audit.begin_launch(args, "02_rm_ensemble")
    for m in args.members or range(args.M):
        if args.members or not audit.kept(args, members[m], INPUTS):
            train_member(args, m, tokenizer, train, valid, sft)
    if not args.members:
        figures(args, members)


def figures(args, members):
    """Validation accuracy of every member: accuracies.png."""
    stage = audit.start_stage(args, "02_rm_ensemble/figures", members)
    accuracies = [json.loads((Path(args.out) / m / "manifest.json").read_text())["metrics"]["valid_accuracy"]
                  for m in members]
    mean, std = torch.tensor(accuracies).mean().item(), torch.tensor(accuracies).std(correction=0).item()
    if common.rank() == 0:
        plt = audit.pyplot()
        figure, axis = plt.subplots(figsize=(6, 3))
        axis.bar(range(len(members)), accuracies)
        axis.axhline(mean, color="k", linestyle="--", label=f"mean {mean:.3f}")
        axis.set(xlabel="reward model", ylabel="validation accuracy", ylim=(0.5, 1), xticks=range(len(members)))
        axis.legend()
        figure.savefig(stage.dir / "accuracies.png")
    audit.finish_stage(stage, {"valid_accuracy_mean": mean, "valid_accuracy_std": std})


if __name__ == "__main__":
    audit.run(main)
