"""A step of PPO, in roll-outs a second: ours, the last PPOTrainer of TRL 0.x, plain `generate`.

    python bench/ppo.py                   7M Llamas, 16 prompts x 4 roll-outs of 64 tokens

Four random models of one size, prompts of HH's lengths (--pairs FILE: of real rows), one pass over
the roll-outs in two minibatches, fp32. Ours is stage 06's own functions, timed in three parts. TRL
0.29.1 runs in an environment that is made beside this file; it takes one roll-out a prompt, so it
gets each prompt four times, and shuffles them. `generate` only samples, all 64 in one call.
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

PROMPTS, K, T, MINI = 16, 4, 64, 8
TRL = ("torch==2.13.0", "trl==0.29.1", "transformers==4.57.6", "accelerate==1.15.0")


def ours(path, prompts, steps):
    """Stage 06 without its record. → seconds of each part, in all steps but the first"""
    from importlib import import_module
    from types import SimpleNamespace

    import harness

    import common
    stage = import_module("06_ppo")
    values = {name: row[2] for name, row in stage.HPARAMS.items()}  # the toy column
    args = harness.settings(**values | {
        "iterations": steps, "batch_size": PROMPTS, "rollouts": K, "minibatch_size": MINI,
        "micro_batch_size": MINI, "generate_batch_size": PROMPTS, "layout": "auto",
        "run": {"max_response_tokens": T, "end": ""}, "out": str(path.parent)})
    common.setup(args)
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=0, pad=pad)
    models = [common.make_engine(model, args, MINI, 1e-6, steps * 2) for model in (
        common.load_policy(path, args), common.load_reward_model(path, args, head_seed=0))]
    models += [common.frozen(model, args) for model in (
        common.load_policy(path, args), common.load_reward_model(path, args, head_seed=1))]
    groups = [{"id": str(i), "prompt": p} for i, p in enumerate(prompts)]
    run, running, seconds = SimpleNamespace(note=lambda **_: None), (0, 0.0, 0.0), []
    for step in range(steps):
        batch, clock = groups[step * PROMPTS:(step + 1) * PROMPTS], [harness.now()]
        responses = common.generate(models[0], tokenizer, [g["prompt"] for g in batch], K, args,
                                    step)
        clock.append(harness.now())
        batch = [{**g, "responses": r} for g, r in zip(batch, responses)]
        experience = [stage.make_experience(micro, models, args, tokenizer, "shared")
                      for micro in common.micro_batches(batch, MINI)]
        running, _ = stage.add_advantages(experience, running, args)
        clock.append(harness.now())
        stage.update(*models[:2], experience, args, run, step)
        clock.append(harness.now())
        seconds.append([b - a for a, b in zip(clock, clock[1:])])
    sampling, making, update = map(sum, zip(*seconds[1:]))
    return {"sampling": sampling, "experience": making, "update": update,
            "seconds": sampling + making + update, "memory_MiB": harness.peak_memory()}


def pad(batch, padding_side, return_tensors):
    """Left padding of token ids, as a tokenizer pads."""
    import torch
    from transformers import BatchEncoding
    ids = batch["input_ids"]
    L = max(map(len, ids))
    return BatchEncoding({
        "input_ids": torch.tensor([[0] * (L - len(x)) + x for x in ids]),
        "attention_mask": torch.tensor([[0] * (L - len(x)) + [1] * len(x) for x in ids])})


def generate(path, prompts, steps):
    """Plain `generate` on the same prompts."""
    import torch
    import transformers
    model, seconds = transformers.AutoModelForCausalLM.from_pretrained(path).eval(), []
    for step in range(steps):
        batch = pad({"input_ids": prompts[step * PROMPTS:(step + 1) * PROMPTS]}, "left", "pt")
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(**batch, do_sample=True, top_k=0, num_return_sequences=K,
                           max_new_tokens=T)
        seconds.append(time.perf_counter() - start)
    return {"sampling": sum(seconds[1:]), "seconds": sum(seconds[1:])}


def trl(path, prompts, steps):
    """TRL's PPOTrainer: as many roll-outs a step, minibatches and passes."""
    import resource

    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    classifier = transformers.AutoModelForSequenceClassification
    policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(path) for _ in "ab")
    value, reward = (classifier.from_pretrained(path, num_labels=1) for _ in "ab")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(
        {f"t{i}": i for i in range(policy.config.vocab_size)}, unk_token="t3")), eos_token="t2",
        pad_token="t0", bos_token="t1", padding_side="left")
    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            times.append(time.perf_counter())
    data = Dataset.from_list([{"input_ids": p} for p in prompts for _ in range(K)])
    with tempfile.TemporaryDirectory() as out:
        PPOTrainer(
            args=PPOConfig(
                output_dir=out, per_device_train_batch_size=PROMPTS * K,
                gradient_accumulation_steps=1, num_mini_batches=2, num_ppo_epochs=1,
                total_episodes=PROMPTS * K * steps,
                local_rollout_forward_batch_size=PROMPTS * K, response_length=T, report_to="none",
                num_sample_generations=0, save_strategy="no", learning_rate=1e-6, use_cpu=True,
                disable_tqdm=True, bf16=False, stop_token="eos", gradient_checkpointing=False),
            processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
            value_model=value, train_dataset=data, eval_dataset=data.select(range(PROMPTS * K)),
            callbacks=[Clock()]).train()
    return {"seconds": times[-1] - times[0],
            "memory_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def one(case):
    prompts = json.loads(Path(case["prompts"]).read_text())
    return {"ours": ours, "trl": trl, "generate": generate}[case["impl"]](
        Path(case["path"]), prompts, case["steps"])


def main():
    import random

    import harness
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--pairs", help="a file of HH pairs, for the lengths of its prompts")
    flags.add_argument("--size", default="7m", choices=harness.SIZES, help="model (7m)")
    flags.add_argument("--steps", type=int, default=4, help="of which the first is left out (4)")
    flags.add_argument("--impl", nargs="+", default=["ours", "trl", "generate"])
    flags.add_argument("--rounds", type=int, default=3, help="turns of each contender (3)")
    flags.add_argument("--out", help="file of the results (bench/ppo.json)")
    args = flags.parse_args()
    path, config = harness.make_model(args.size)
    count = args.steps * PROMPTS
    lengths = harness.read_lengths(args.pairs, count) if args.pairs else \
        harness.hh_lengths(count, random.Random(0))
    pythons = {"trl": harness.environment("trl-ppo", *TRL)} if "trl" in args.impl else {}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([g["prompt"] for g in harness.groups_of(lengths, config.vocab_size)], file)
        file.flush()
        rows = harness.turns(__file__, [
            {"impl": impl, "prompts": file.name, "path": str(path), "steps": args.steps}
            for impl in args.impl], args.rounds, pythons)
    for row in rows:
        row.pop("prompts"), row.pop("path")
        if "seconds" in row:
            row["rollouts_per_s"] = PROMPTS * K * (args.steps - 1) / row["seconds"]
    base = next((r["rollouts_per_s"] for r in rows if r["impl"] == "trl" and "seconds" in r), None)
    for row in rows if base else []:
        row["times_trl"] = row["rollouts_per_s"] / base
    harness.report("ppo", rows, [
        "impl", "rollouts_per_s", "sampling", "experience", "update", "memory_MiB", "times_trl"],
        args.out, prompts=PROMPTS, rollouts=K, tokens=T, size=args.size, trl=TRL)


if __name__ == "__main__":
    if "--one" in sys.argv:
        print(json.dumps(one(json.loads(sys.argv[sys.argv.index("--one") + 1]))))
    else:
        main()
