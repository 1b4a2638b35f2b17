"""Not in the paper: how far the best of n responses by a reward model is the best by the judge.

n responses of a policy to some prompts of each in-distribution evaluation set; the judge's score of
each, and its reward under every reward model named. Writes 08_best_of_n/best_of_n.jsonl, or
08_best_of_n_POLICY's, rows {"set", "id", "judge": [n], "rewards": {model: [n]}}.

    deepspeed lab/best_of_n.py --n 64 --models 04_rm_denoise/baseline 07_metarm/round_1
    deepspeed lab/best_of_n.py --n 16 --policy round_0     # on the shifted policy's own responses
"""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402  (the project's root is on the path now)
from lab import judges  # noqa: E402

HPARAMS = {
    # name: (paper, small, toy, help)
    "n": (16, 16, 64, "responses per prompt"),
    "prompts": (100, 30, 30, "prompts of each evaluation set"),
    "M": (10, 10, 10, "reward models of --judge ensemble"),
    **common.SAMPLING,
    "generate_batch_size": (16, 16, 100, "responses per process and call of generate"),
    "eval_batch_size": (8, 16, 64, "responses per process and forward pass"),
    "precision": common.TRAINING["precision"],
}


def main(argv=None):
    def add_flags(flag):
        flag("--policy", metavar="NAME", help="of 06_ppo (default: pi^SFT)")
        flag("--judge", choices=("gold", "ensemble"), help="as in stage 08")
        flag("--models", nargs="+", metavar="DIR", help="reward models (default: all that are "
             "finished in 04_rm_denoise, 05_rm_contrastive and 07_metarm)")
    args = common.parse_args(__doc__, HPARAMS, add_flags, argv)
    data = common.require(args, "00_data", "python 00_data.py")
    source = f"06_ppo/{args.policy}" if args.policy else "01_sft"
    sft = common.require(args, "01_sft", "python 01_sft.py")
    answers = common.require(args, source, "python 06_ppo.py")
    names = args.models or [name for name in common.finished(args.out)
                            if name.startswith(("04_", "05_", "07_"))]
    paths = {name: common.require(args, name, f"python {name.split('/')[0]}.py") for name in names}
    voters = judges.choose(args, "gold" if args.run.get("world") == "toy" else "ensemble")
    common.setup(args)
    name = "08_best_of_n" + (f"_{args.policy}" if args.policy else "")
    run = common.begin(args, name, dict.fromkeys(["00_data", "01_sft", source, *names, *voters]),
                       script="lab/best_of_n.py")
    tokenizer, n = common.load_tokenizer(sft), args.n
    score = judges.scorer(args, tokenizer, voters)
    rows = [{**row, "set": f.stem} for f in sorted(data.glob("eval_*.jsonl"))
            for row in common.subset(common.read_jsonl(f), args.prompts, args.seed)]
    encoded = common.encode(tokenizer, rows, [], args.run)
    policy = common.frozen(common.load_policy(answers, args), args)
    few = SimpleNamespace(**vars(args) | {"generate_batch_size": -(-args.generate_batch_size // n)})
    ids = common.generate(policy, tokenizer, [g["prompt"] for g in encoded], n, few, args.seed + 1)
    texts = [text for r in ids for text in tokenizer.batch_decode(r, skip_special_tokens=True)]
    judged = score([row["prompt"] for row in rows for _ in range(n)], texts)
    groups = [{**g, "responses": [r]} for g, responses in zip(encoded, ids)
              for r in common.for_reward(responses, tokenizer, args.run)]
    rewards = {name: common.score_by(path, groups, args, tokenizer)[:, 0].tolist()
               for name, path in paths.items()}
    if common.rank() == 0:
        common.write_jsonl(run.dir / "best_of_n.jsonl", [
            {"set": row["set"], "id": row["id"], "judge": judged[i * n:(i + 1) * n],
             "rewards": {m: r[i * n:(i + 1) * n] for m, r in rewards.items()}}
            for i, row in enumerate(rows)])
    run.finish(judge=args.judge, n=n, prompts=len(rows))


if __name__ == "__main__":
    common.launch(main)
