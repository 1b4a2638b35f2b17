"""Not in the paper: the plain joint objective L - lambda J, both at theta, beside MetaRM.

Reads what stage 07 reads and the meta data set of 07_metarm/round_R (samples.jsonl), writes
07_metarm/NAME/: a reward model trained from pi^SFT as MetaRM's, without theta', and held_back.json
with J on the same held-back samples.

    deepspeed lab/joint.py --round 1 --lam 0.1 --name joint_0.1
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402  (the project's root is on the path now)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

HPARAMS = {
    # name: (paper, small, toy, help)
    "lam": (5e-6, 5e-6, 0.1, "lambda, weight of J"),
    "meta_batch_size": (16, 16, 16, "prompts of X_s in a step, global"),
    "epochs": (1.0, 1.0, 1.0, "passes over the preferences"),
    "batch_size": (16, 16, 32, "pairs of X_t in a step, global"),
    "micro_batch_size": (2, 4, 32, "pairs or meta groups per process and forward pass"),
    "eval_batch_size": (8, 8, 64, "groups per process when evaluating"),
    "lr": (5e-6, 5e-5, 1e-3, "peak learning rate"),
    "warmup": (0.1, 0.1, 0.1, "share of the steps with rising learning rate"),
    "eval_every": (500, 50, 25, "steps between evaluations"),
    **common.TRAINING,
    "zero": (3, 0, 0, "DeepSpeed ZeRO stage"),
    "precision": ("autocast", "autocast", "fp32", "as in stage 07"),
}


def difference_loss(rewards):
    """Eq. 11, as in stage 07: [m, k] → scalar."""
    k = rewards.shape[1]
    i, j = torch.triu_indices(k, k, 1, device=rewards.device)
    return (2 / k ** 2 * torch.sigmoid((rewards[:, i] - rewards[:, j]).abs()).sum(1)).mean()


def vanilla_loss(rewards):
    """Eq. 10, as in stage 07: [n, 2] → scalar."""
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()


def backward(rm, X_t, X_s, lam):
    """Gradient of the mean of L over the micro batches of X_t minus lambda times that of J over
    those of X_s, left in the engine. → the weighted losses, whose sum is L - lambda J."""
    pairs, meta = list(rm.micro_batches(X_t)), list(rm.micro_batches(X_s))
    parts = [(1 / len(pairs), vanilla_loss, x) for x in pairs] + \
        [(-lam / len(meta), difference_loss, x) for x in meta]
    losses = []
    for i, (weight, loss_fn, micro) in enumerate(parts, 1):
        rm.engine.set_gradient_accumulation_boundary(i == len(parts))
        losses.append(weight * loss_fn(rm(micro)[0]))
        rm.engine.backward(losses[-1], scale_wrt_gas=False)
    return torch.stack(losses).detach()


def main(argv=None):
    def add_flags(flag):
        flag("--round", type=int, default=1, help="whose samples are the meta data set (default 1)")
        flag("--name", help="name of the output directory (default: joint_LAM)")
    args = common.parse_args(__doc__, HPARAMS, add_flags, argv)
    name = args.name or f"joint_{args.lam:g}"
    if not common.is_name(name) or name.startswith("round_"):
        common.die(f"--name {name} cannot be a directory of 07_metarm")
    strength = common.require(args, "03_strength", "python 03_strength.py")
    sft = common.require(args, "01_sft", "python 01_sft.py")
    source = f"07_metarm/round_{args.round}"
    samples = common.require(args, source, f"python 07_metarm.py --round {args.round}")
    common.setup(args)
    run = common.begin(args, f"07_metarm/{name}", [
        "03_strength", "01_sft", f"{source}/samples.jsonl"], script="lab/joint.py")
    tokenizer = common.load_tokenizer(sft)
    rows = common.read_jsonl(samples / "samples.jsonl")
    groups = [{**g, "responses": common.for_reward(row["response_ids"], tokenizer, args.run)}
              for g, row in zip(common.encode(tokenizer, rows, [], args.run), rows)]
    held, meta = groups[::10], [g for i, g in enumerate(groups) if i % 10] or groups

    common.set_seed(args.seed)
    _, train = common.encode_pairs(tokenizer, common.read_jsonl(strength / "train.jsonl"), args.run)
    valid_rows, valid = common.encode_pairs(
        tokenizer, common.read_jsonl(strength / "valid.jsonl"), args.run)
    steps = common.steps_for(args, len(train))
    model = common.load_reward_model(sft, args, head_seed=args.seed)
    rm = common.RewardEngine(model, run, tokenizer, train, steps)
    batches = list(zip(common.batches(train, args.batch_size, steps, args.seed),
                       common.batches(meta, args.meta_batch_size, steps, args.seed + 1)))
    for step, (X_t, X_s) in run.steps(batches, rm=rm.engine):
        run.note(loss=backward(rm, X_t, X_s, args.lam).sum(), grad_norm=rm.step())
        if run.due(step):
            rewards = rm.score(held)                                            # [m, k]
            result = common.accuracies(rm.score(valid), valid_rows)
            run.log(step, J_theta=difference_loss(rewards).item(), **result)
    rm.save()
    if common.rank() == 0:
        common.write_text(run.dir / "held_back.json", json.dumps({"theta": {
            "rewards": rewards.tolist(),
            "J": [round(difference_loss(r[None]).item(), 6) for r in rewards]}}) + "\n")
    run.finish(J_theta=difference_loss(rewards).item(), **result, steps=steps)


if __name__ == "__main__":
    common.launch(main)
