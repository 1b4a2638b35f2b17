"""What the meta step of stage 07 costs: a step of Algorithm 1 over a plain step.

    python bench/metarm.py          7M Llama; n = m = 16; k = 2, 4, 8; ZeRO 0 to 3

Plain steps and whole steps alternate in one process on rows of equal length, of which the prompt is
a half. Algorithm 1 computes J on m groups of k and L on n pairs, so beside the ratio stand the
rows, (m k + 2 n) / 2n, and the tokens with the prompt once a group, which is what is computed here.
"""
import argparse
import json
import statistics
from importlib import import_module
from types import SimpleNamespace

import harness  # first: it puts the project on the path

import common

N, M, PROMPT, T = 16, 16, 64, 64


def one(case):
    metarm = import_module("07_metarm")
    path, config = harness.make_model(case["size"])
    args = harness.settings(precision=case["precision"], zero=case["zero"], batch_size=N)
    common.setup(args)
    pairs = harness.groups_of([(PROMPT, T, T)] * N, config.vocab_size)
    meta = harness.groups_of([(PROMPT, *[T] * case["k"])] * M, config.vocab_size)
    rm = common.RewardEngine(common.load_reward_model(path, args, head_seed=0), SimpleNamespace(
        args=args, done=1), SimpleNamespace(pad_token_id=0), pairs, 1000)
    seconds = {"plain": [], "whole": []}
    for turn in range(case["steps"] + 1):
        start = harness.now()
        metarm.backward(rm, metarm.vanilla_loss, pairs)
        rm.step()
        middle = harness.now()
        metarm.backward(rm, metarm.difference_loss, meta)
        theta = metarm.ascend(rm.engine, 5e-6)
        metarm.backward(rm, metarm.vanilla_loss, pairs)
        metarm.restore(rm.engine, theta)
        rm.step()
        if turn:
            seconds["plain"].append(middle - start)
            seconds["whole"].append(harness.now() - middle)
    plain, whole = (statistics.median(x) for x in seconds.values())
    return {"seconds": plain + whole, "plain_s": plain, "whole_s": whole, "ratio": whole / plain,
            "rows": (M * case["k"] + 2 * N) / (2 * N),
            "tokens": 1 + M * (PROMPT + case["k"] * T) / (N * (PROMPT + 2 * T)),
            "memory_MiB": harness.peak_memory()}


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--one", type=json.loads, help="(for itself) one contender")
    flags.add_argument("--size", default="7m", choices=harness.SIZES, help="model (7m)")
    flags.add_argument("--k", type=int, nargs="+", default=[2, 4, 8])
    flags.add_argument("--zero", type=int, nargs="+", default=[0, 1, 2, 3])
    flags.add_argument("--precision", default="fp32", choices=["fp32", "autocast"])
    flags.add_argument("--steps", type=int, default=5, help="timed steps of each kind (5)")
    flags.add_argument("--rounds", type=int, default=3, help="turns of each contender (3)")
    flags.add_argument("--out", help="file of the results (bench/metarm.json)")
    args = flags.parse_args()
    if args.one:
        return print(json.dumps(one(args.one)))
    rows = harness.turns(__file__, [
        {"zero": zero, "k": k, "size": args.size, "precision": args.precision, "steps": args.steps}
        for zero in args.zero for k in args.k], args.rounds)
    harness.report("metarm", rows, [
        "zero", "k", "plain_s", "whole_s", "ratio", "rows", "tokens", "memory_MiB"], args.out)


if __name__ == "__main__":
    main()
