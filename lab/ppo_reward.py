"""Not in the paper: stage 06 under another reward than one model's.

    gold      the embedded world's true preference: what a perfect reward model would give
    mean      the mean of stage 02's M models, the vote of section 2.2 as a reward
    mean_std  their mean minus their standard deviation: trust what they agree on (Coste et al.
              2024, "Reward Model Ensembles Help Mitigate Overoptimization")

Each model's rewards are first standardised by its mean and std over training pairs: reward models
have neither a common scale nor a zero. The critic starts from --rm's, and the rewards of
samples.jsonl are its.

    deepspeed lab/ppo_reward.py --reward mean_std --rm baseline --kl_beta 0 --name mean_std
    deepspeed 06_ppo.py --help                                                # its other flags
"""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402  (the project's root is on the path now)
from lab import experiments, judges  # noqa: E402

import torch  # noqa: E402

MOST, loaded = 500, []  # training pairs that tell a reward model's scale; what `ensemble` gave


def gold(groups, args, tokenizer):
    """True preference of the groups' responses, [B, K]."""
    texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in (g["prompt"], r)]
             for g in groups for r in g["responses"]]
    return torch.tensor(judges.gold(*zip(*texts)), device=common.device()).view(len(groups), -1)


def mean(groups, args, tokenizer):
    """Mean of the ensemble's standardised rewards, [B, K]."""
    return votes(groups, args, tokenizer).mean(0)


def mean_std(groups, args, tokenizer):
    """Their mean minus their population std."""
    rewards = votes(groups, args, tokenizer)
    return rewards.mean(0) - rewards.std(0, correction=0)


def votes(groups, args, tokenizer):
    """Standardised rewards under each model of the ensemble, [M, B, K]."""
    loaded[:] = loaded or ensemble(args, tokenizer)
    batch = common.collate(groups, tokenizer.pad_token_id, "separate")
    return torch.stack([(model(batch)[0] - c) / s for model, c, s in loaded])


def ensemble(args, tokenizer):
    """Stage 02's models, each with the mean and std of its rewards on (some) training pairs."""
    rows = common.subset(common.read_jsonl(f"{args.out}/00_data/train.jsonl"), MOST, args.seed)
    _, pairs = common.encode_pairs(tokenizer, rows, args.run)
    found, few = [], SimpleNamespace(precision=args.precision, eval_batch_size=16)
    for name in members(args.out):
        model = common.load_reward_model(f"{args.out}/{name}", args)
        model = common.frozen(model, args, shard=True)
        rewards = common.score(model, pairs, few, "separate", tokenizer.pad_token_id)
        found.append((model, rewards.mean().item(), rewards.std().item()))
    return found


def members(out):
    """Names of the finished reward models of stage 02."""
    return [name for name in common.finished(out) if name.startswith("02_rm_ensemble/")]


REWARDS = {f.__name__: f for f in (gold, mean, mean_std)}


def main(argv=None):
    parser = common.new_parser(__doc__, allow_abbrev=False, epilog="other flags go to stage 06")
    parser.add_argument("--reward", choices=REWARDS, required=True)
    parser.add_argument("--rm", required=True, help="reward model that the critic starts from")
    parser.add_argument("--name", help="name of the output directory (default: the reward's)")
    parser.add_argument("--out", default="out", help="run directory (default: out)")
    args, flags = parser.parse_known_args(argv)
    reward_fn, asks = REWARDS[args.reward], "--dry_run" in flags
    known = asks or common.read_json(Path(args.out) / "run.json").get("world") == "toy"
    if reward_fn is gold and not known:
        common.die("--reward gold: the true preference is known in the embedded world only")
    if reward_fn is not gold:
        reward_fn.inputs = ["00_data/train.jsonl", *members(args.out)]
        if len(reward_fn.inputs) == 1 and not asks:
            common.die(f"no reward model of stage 02 in {args.out}: run python 02_rm_ensemble.py")
        for name in reward_fn.inputs[1:]:
            common.require(args, name, "python 02_rm_ensemble.py")
    flags += ["--rm", args.rm, "--name", args.name or args.reward, "--out", args.out]
    try:
        experiments.stage_of("06_ppo.py").main(flags, reward_fn)
    finally:
        loaded.clear()  # of this run's models; lab/experiments.py goes on


if __name__ == "__main__":
    common.launch(main)
