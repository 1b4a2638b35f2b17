"""Training and scoring of a reward model: ours with the prompt shared, ours separate, TRL.

    python bench/rm.py                               rows of HH's length distribution, 7M Llama
    python bench/rm.py --pairs hh.jsonl.gz           lengths of real rows
    python bench/rm.py --sweep                       prompt shares 0.3 to 0.9, K = 2, 4, 8
    python bench/rm.py --size 0.5b --precision bf16 autocast --zero 0 1 2 3 --impl shared

All contenders take the same pairs in batches of 16, random weights and tokens (the time does not
depend on them), AdamW, no checkpoints. TRL is the RewardTrainer of requirements.txt, in its own
defaults but for the batch and the precision; so its batches are random, ours sorted by length in
windows (`common.batches`). Two steps warm up, then an epoch is timed. of_peak: the share of a large
matrix product's FLOP/s, measured in the same process, over what `harness.flops` counts.
"""
import argparse
import json
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import harness  # first: it puts the project on the path

import torch
import torch.nn.functional as F

import common


def make_groups(case, config):
    if case.get("lengths"):
        lengths = json.loads(Path(case["lengths"]).read_text())
    elif case.get("share"):  # rows of equal length, of which the prompt is a share
        L = case.get("length", 256)
        prompt = round(L * case["share"])
        lengths = [(prompt, *[L - prompt] * case.get("K", 2))] * case["pairs"]
    else:
        lengths = harness.hh_lengths(case["pairs"], random.Random(0))
    return harness.groups_of(lengths[:case["pairs"]], config.vocab_size)


def ours(case, config, path, groups):
    """Stage 02's loop. → measured numbers"""
    args = harness.settings(precision=case["precision"], zero=case.get("zero", 0),
                            layout=case["impl"], batch_size=case["batch"],
                            deterministic=case.get("deterministic", False),
                            gradient_checkpointing=case.get("checkpointing", False),
                            micro_batch_size=case.get("micro", case["batch"]))
    common.setup(args)

    class Tokenizer:
        pad_token_id = 0
    model = common.load_reward_model(path, args, head_seed=0)
    steps = len(groups) // case["batch"]
    rm = common.RewardEngine(model, SimpleNamespace(args=args, done=1), Tokenizer, groups, steps)
    flops = 0
    batches = common.batches(groups, case["batch"], steps, 0)
    for step, batch in enumerate(batches[:2] + batches):
        if step == 2:
            start = harness.now()
        for micro in rm.micro_batches(batch):
            rewards = rm(micro)[0]
            # Eq. 2 for pairs; all differences for K > 2, as 07's J has them
            loss = -F.logsigmoid(rewards[:, :1] - rewards[:, 1:]).mean()
            rm.backward(loss)
            rm.step()
            flops += harness.flops(config, micro) if step > 1 else 0
    seconds = harness.now() - start
    flops *= 4 if args.gradient_checkpointing else 3  # a backward pass is two forward passes
    memory, start = harness.peak_memory(), harness.now()
    rm.score(groups)
    return {"seconds": seconds, "score_seconds": harness.now() - start, "memory_MiB": memory,
            "steps": steps, "of_peak": flops / seconds / harness.matmul_peak(args.precision)}


def trl(case, config, path, groups):
    """TRL's RewardTrainer on the same token ids."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import RewardConfig, RewardTrainer
    steps, times = len(groups) // case["batch"], []
    data = Dataset.from_list([{
        "chosen_ids": g["prompt"] + g["responses"][0],
        "rejected_ids": g["prompt"] + g["responses"][1]} for g in groups])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(
        {f"t{i}": i for i in range(config.vocab_size)}, unk_token="t3")), eos_token="t2",
        pad_token="t0", bos_token="t1")
    model = common.load_reward_model(path, harness.settings(), head_seed=0).model

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            times.append(harness.now())
    with tempfile.TemporaryDirectory() as out:
        trainer = RewardTrainer(
            model=model, processing_class=tokenizer, train_dataset=data, callbacks=[Clock()],
            args=RewardConfig(
                output_dir=out, per_device_train_batch_size=case.get("micro", case["batch"]),
                gradient_accumulation_steps=case["batch"] // case.get("micro", case["batch"]),
                max_steps=steps + 2, bf16=case["precision"] != "fp32", report_to="none",
                save_strategy="no", gradient_checkpointing=case.get("checkpointing", False),
                max_length=None, disable_tqdm=True,
                use_cpu=not torch.cuda.is_available()))
        trainer.train()
    return {"seconds": times[-1] - times[1], "memory_MiB": harness.peak_memory(),
            "steps": steps}


def one(case):
    path, config = harness.make_model(case["size"])
    groups = make_groups(case, config)
    result = (trl if case["impl"] == "trl" else ours)(case, config, path, groups)
    pairs = result["steps"] * case["batch"]
    tokens = sum(len(g["prompt"]) * len(g["responses"]) + sum(map(len, g["responses"]))
                 for g in groups) / len(groups) * pairs  # as separate rows have them
    return {**result, "pairs_per_s": pairs / result["seconds"],
            "tokens_per_s": tokens / result["seconds"]}


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--one", type=json.loads, help="(for itself) one contender")
    flags.add_argument("--pairs", help="a file of HH pairs, for its lengths")
    flags.add_argument("--count", type=int, default=160, help="pairs (160)")
    flags.add_argument("--size", default="7m", choices=harness.SIZES, help="model (7m)")
    flags.add_argument("--precision", nargs="+", default=["fp32", "autocast"])
    flags.add_argument("--impl", nargs="+", default=["shared", "separate", "trl"])
    flags.add_argument("--zero", nargs="+", type=int, default=[0], help="ZeRO stages, ours (0)")
    flags.add_argument("--batch", type=int, default=16, help="pairs a step (16)")
    flags.add_argument("--micro", type=int, help="pairs a forward pass (the batch)")
    flags.add_argument("--checkpointing", action="store_true", help="recompute activations")
    flags.add_argument("--deterministic", action="store_true", help="ours: as the flag of a stage")
    flags.add_argument("--sweep", action="store_true", help="prompt shares and K instead")
    flags.add_argument("--rounds", type=int, default=3, help="turns of each contender (3)")
    flags.add_argument("--out", help="file of the results (bench/rm.json, rm_sweep.json)")
    args = flags.parse_args()
    if args.one:
        result = json.dumps(one(args.one))
        return common.rank() == 0 and print(result, flush=True)
    case = {"size": args.size, "batch": args.batch, "pairs": args.count,
            "micro": args.micro or args.batch, "checkpointing": args.checkpointing,
            "deterministic": args.deterministic}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        if args.pairs:
            json.dump(harness.read_lengths(args.pairs, args.count), file)
            file.flush()
            case["lengths"] = file.name
        contenders = [{**case, "precision": p, "impl": i, "zero": z}
                      for p in args.precision for z in args.zero for i in args.impl]
        if args.sweep:
            contenders = [{**c, "share": share, "K": K} for c in contenders
                          for share in (0.3, 0.5, 0.7, 0.9) for K in (2, 4, 8)
                          if c["impl"] != "trl" or K == 2]
        rows = harness.turns(__file__, contenders, args.rounds)
    columns = ["impl", "precision", "zero", "share", "K", "pairs_per_s",
               "tokens_per_s", "memory_MiB", "of_peak", "score_seconds"]
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    for row in rows:
        row.pop("lengths", None)
        base = next((r for r in rows if r["impl"] == "trl" and r["precision"] == row["precision"]
                     and r.get("share") == row.get("share") and r.get("K") == row.get("K")), None)
        if base and "seconds" in base and "seconds" in row:
            row["times_trl"] = row["pairs_per_s"] / base["pairs_per_s"]
    harness.report("rm_sweep" if args.sweep else "rm", rows, [*columns, "times_trl"], args.out,
                   pairs=args.pairs)


if __name__ == "__main__":
    main()
