"""Stage 07: MetaRM, Algorithm 1 (section 3.2): keep the reward model sharp on the policy's shifted outputs.

Samples k responses per prompt from the policy of round r - 1 (samples.jsonl, the meta data set S), then trains a
reward model from pi^SFT on the original pairs D. One step, with m prompts X_s of S and n pairs X_t of D:

    J  = 2/k^2 sum_{i<j} sigma(|r_i - r_j|)         difference loss on X_s                     (Eq. 11)
    theta' = theta + eta dJ(X_s)/dtheta             plain ascent, in place                     (Eq. 12)
    g  = dL_theta'(X_t)/dtheta'                     vanilla loss (Eq. 10) at theta'            (Eq. 13)
    theta <- theta - alpha g                        the optimiser's step, applied at theta     (Eq. 14)

Departures from the paper: (1) Eq. 14 is AdamW's step, as in all stages; (2) first order: g is applied to theta as it
is (Algorithm 1), without the Jacobian of Eq. 15; (3) eta, k and m are not in the paper; (4) the paper
preset trains in autocast at ZeRO-3 where 04 uses bf16 at ZeRO-2, so compare J with a 04 run in the same precision.

    deepspeed 07_metarm.py --round 1
    deepspeed 07_metarm.py --round 2 --eta 0     # toy: bit for bit the baseline of stage 04
    deepspeed 07_metarm.py --round 1 --joint 0.1 --name joint    # not in the paper: minimise L - 0.1 J at theta
"""
import json
import random
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch

import audit
import common

denoise = import_module("04_rm_denoise")

HPARAMS = {
    # name: (paper, toy, help)
    "eta": (0.01, 0.1, "step size eta of the meta ascent, Eq. 12"),
    "k": (4, 4, "responses sampled per prompt"),
    "meta_batch_size": (32, 16, "m, prompts of X_s in a step, global"),
    "meta_prompts": (2000, 320, "prompts sampled; a tenth is held back to measure J"),
    "epochs": (1.0, 1.0, "passes over the preferences"),
    "batch_size": (32, 32, "n, pairs of X_t in a step, global"),
    "micro_batch_size": (2, 32, "pairs or meta groups per process and forward pass"),
    "eval_batch_size": (8, 64, "groups per process when evaluating"),
    "lr": (5e-6, 1e-3, "alpha, peak learning rate"),
    "warmup": (0.1, 0.1, "share of the steps with rising learning rate"),
    "eval_every": (500, 25, "steps between evaluations"),
    "temperature": (0.8, 1.0, "sampling temperature"),
    "top_p": (0.9, 1.0, "nucleus sampling"),
    "repetition_penalty": (1.1, 1.0, "of sampling"),
    "generate_batch_size": (4, 64, "prompts per process and call of generate"),
    **common.TRAINING,
    "zero": (3, 0, "DeepSpeed ZeRO stage"),
    # bf16 parameters swallow the shift: at eta = 1e-3 only 1.5 % of the entries of theta' would differ
    "precision": ("autocast", "fp32", "autocast keeps parameters in fp32; bf16 ones swallow small eta"),
}


def difference_loss(rewards):
    """Eq. 11: J = 2/k^2 sum_{i<j} sigma(|r_i - r_j|), mean over prompts. rewards: [m, k] → scalar.

    With k = 1 there is no pair and J = 0; with equal rewards J = (k - 1) / 2k, its minimum.
    """
    k = rewards.shape[1]
    i, j = torch.triu_indices(k, k, 1, device=rewards.device)
    return (2 / k ** 2 * torch.sigmoid((rewards[:, i] - rewards[:, j]).abs()).sum(1)).mean()


def ascend(engine, eta):
    """Eq. 12 in place on the engine's parameters, theta' = theta + eta dJ/dtheta, from the gradients of a backward
    pass just made; then clear those gradients. → theta, for `restore`. Every rank must call it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    theta, zero3 = [], engine.zero_optimization_stage() == 3
    for p in engine.module.parameters():
        gradient = safe_get_full_grad(p)  # a collective, already averaged over ranks
        theta.append((p.ds_tensor if zero3 else p).data.clone())
        # DeepSpeed's own setter would change the fp32 master copy only, which the next forward pass does not see
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=zero3):
            p.data.add_(gradient.to(p.dtype), alpha=eta)
    clear_gradients(engine)
    return theta


def clear_gradients(engine):
    """Forget the gradients of J, or they leak into those of L: differently in each ZeRO stage."""
    engine.optimizer.zero_grad()
    averaged = getattr(engine.optimizer, "averaged_gradients", None)
    if engine.zero_optimization_stage() in (1, 2) and averaged:
        for key in averaged:
            averaged[key] = None


@torch.no_grad()
def restore(engine, theta):
    """Put theta back, before the optimiser's step (Eq. 14 moves theta, not theta')."""
    zero3 = engine.zero_optimization_stage() == 3
    for p, saved in zip(engine.module.parameters(), theta):
        (p.ds_tensor if zero3 else p).data.copy_(saved)


def backward(engine, losses):
    """Gradient of the mean of the micro batches' losses, left in the engine. `losses`: functions → scalar, called
    one by one so that one graph is alive at a time. → the mean on this rank."""
    total = 0.0
    for i, loss_fn in enumerate(losses, 1):
        engine.set_gradient_accumulation_boundary(i == len(losses))
        loss = loss_fn() / len(losses)
        engine.backward(loss, scale_wrt_gas=False)
        total += loss.item()
    return total


def joint_loss(L, J, lam):
    """The plain joint objective L - lam J, both at theta: micro-batch losses for `backward`, which takes their mean."""
    parts = [(1 / len(L), f) for f in L] + [(-lam / len(J), f) for f in J]
    return [lambda w=weight, f=f: len(parts) * w * f() for weight, f in parts]


def sample_meta(args, policy_dir, prompt_rows, stage, tokenizer):
    """k responses per prompt from the previous round's policy → groups, the meta data set S; samples.jsonl keeps them
    as text and as the ids they are trained on (decoding and encoding again need not give the same)."""
    groups = common.encode(tokenizer, prompt_rows, [], args.run)
    if stage.checkpoint:  # sampled before this process was started again
        responses = [row["response_ids"] for row in audit.read_jsonl(stage.dir / "samples.jsonl")]
        return [{**g, "responses": common.finished(r, tokenizer.eos_token_id)} for g, r in zip(groups, responses)]
    if args.precision == "autocast":  # fp32 weights are for the meta step; sampling fits 80 GB in bf16
        args = SimpleNamespace(**{**vars(args), "precision": "bf16"})
    policy = common.frozen(common.load_policy(policy_dir, args), args)
    responses = common.generate(policy, tokenizer, [g["prompt"] for g in groups], args.k, args, args.seed + args.round)
    rows = [{"id": row["id"], "prompt": row["prompt"],
             "responses": tokenizer.batch_decode(r, skip_special_tokens=True), "response_ids": r}
            for row, r in zip(prompt_rows, responses)]
    if common.rank() == 0:
        audit.write_jsonl(stage.dir / "samples.jsonl", rows)
    return [{**g, "responses": common.finished(r, tokenizer.eos_token_id)} for g, r in zip(groups, responses)]


def all_differences(rewards):
    """|r_i - r_j| of all pairs i < j of every prompt: [m, k] → [m * k (k - 1) / 2]."""
    i, j = torch.triu_indices(rewards.shape[1], rewards.shape[1], 1)
    return (rewards[:, i] - rewards[:, j]).abs().flatten()


def figure_16(path, rewards):
    """Figure 16: distribution of |r_i - r_j| on held-back samples, every model's [m, k] rewards on one 0-1 scale."""
    plt = audit.pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.5))
    differences = {name: all_differences(r) for name, r in rewards.items()}
    top = max(d.max().item() for d in differences.values())
    for name, d in differences.items():
        axis.hist((d / top).tolist(), bins=40, range=(0, 1), alpha=0.6, density=True, label=name)
    axis.set(xlabel="reward difference, normalised", ylabel="density", title="Figure 16")
    axis.legend()
    figure.savefig(path)


def main(argv=None):
    def add_flags(flag):
        flag("--round", type=int, default=1, help="round r >= 1: samples come from 06_ppo/round_{r-1} (default 1)")
        flag("--joint", type=float, metavar="LAMBDA", help="no meta step: minimise L - LAMBDA J (needs --name)")
        flag("--name", help="name of the output directory (default: round_R)")
    args = audit.parse_args(__doc__, HPARAMS, add_flags, argv)
    r = args.round
    if r < 1:
        common.die("--round must be 1 or more: round 0 is vanilla PPO, which has no MetaRM")
    if args.name and (not audit.is_name(args.name) or args.name.startswith("round_")):
        common.die(f"--name {args.name} cannot be a directory of 07_metarm")
    if args.joint is not None and not args.name:
        common.die("--joint is not MetaRM: give it a --name")
    args.hparams |= {"joint": args.joint} if args.joint is not None else {}
    data = audit.require(args, "00_data", "python 00_data.py")
    strength = audit.require(args, "03_strength", "python 03_strength.py")
    sft = audit.require(args, "01_sft", "python 01_sft.py")
    vanilla_dir = audit.require(args, "04_rm_denoise/baseline", "python 04_rm_denoise.py")
    policy_dir = audit.require(args, f"06_ppo/round_{r - 1}", f"python 06_ppo.py --round {r - 1}")
    common.setup(args)
    stage = audit.start_stage(args, f"07_metarm/{args.name or f'round_{r}'}", [
        "00_data/prompts.jsonl", "03_strength", "01_sft", "04_rm_denoise/baseline", f"06_ppo/round_{r - 1}"])
    tokenizer = common.load_tokenizer(sft)
    pad_id = tokenizer.pad_token_id
    count = min(args.meta_prompts, 16 * args.limit if args.limit else args.meta_prompts)
    rows = audit.read_jsonl(data / "prompts.jsonl")  # in the order of the sources: draw, anew each round
    rows = random.Random(f"{args.seed} {r}").sample(rows, min(count, len(rows)))
    groups = sample_meta(args, policy_dir, rows, stage, tokenizer)
    held, meta = groups[::10], [g for i, g in enumerate(groups) if i % 10] or groups

    common.set_seed(args.seed)  # from here on as stage 04's baseline: same head, same order of pairs
    _, train = common.encode_pairs(tokenizer, audit.read_jsonl(strength / "train.jsonl"), args.run)
    valid_rows, valid = common.encode_pairs(tokenizer, audit.read_jsonl(strength / "valid.jsonl"), args.run)
    steps = common.steps_for(args, len(train), args.batch_size, args.epochs)
    model = common.load_reward_model(sft, args, head_seed=args.seed)
    engine = common.make_engine(model, args, args.batch_size, args.lr, steps, args.warmup)
    layout = common.choose_layout(args, lambda batch: engine(batch)[0], train)

    def J(X):
        """Eq. 11 on a micro batch, at the present parameters."""
        return difference_loss(engine(common.collate(X, pad_id, layout))[0])       # of rewards [m, k]

    def L(X):
        """Eq. 10 on a micro batch, at the present parameters."""
        rewards, _ = engine(common.collate(X, pad_id, layout))                     # [n, 2]
        return denoise.preference_loss(rewards[:, 0], rewards[:, 1])

    def micros(loss, X):
        return [partial(loss, x) for x in common.micro_batches(X, args.micro_batch_size)]

    def held_back():
        return common.score(engine, held, args, layout, pad_id)                    # [m, k]

    pair_batches = common.batches(train, args.batch_size, steps, args.seed)
    meta_batches = common.batches(meta, args.meta_batch_size, steps, args.seed + 1)
    done, state = audit.resume(stage, {"rm": engine}, steps)
    before = state["J_initial"] if done else difference_loss(held_back()).item()
    at = {}                                                                        # last held-back rewards
    steps_left = islice(zip(pair_batches, meta_batches), done, None)
    for step, (X_t, X_s) in enumerate(common.progress(steps_left, stage.name, steps, done), done + 1):
        measured = step % args.eval_every == 0 or step == steps
        if args.joint is None:
            backward(engine, micros(J, X_s))                                       # Algorithm 1, line 4, Eq. 11
            theta = ascend(engine, args.eta)                                       # line 5, Eq. 12: theta'
            if measured:
                at["theta_prime"] = held_back()
            loss = backward(engine, micros(L, X_t))                                # line 6, Eq. 13: at theta'
            restore(engine, theta)
        else:
            # no theta', no J of its own: `loss` is L - lambda J
            loss = backward(engine, joint_loss(micros(L, X_t), micros(J, X_s), args.joint))
        if measured:
            at["theta"] = held_back()
        grad_norm = common.step(engine)                                            # line 7, Eq. 14: at theta
        if measured:
            result = denoise.accuracies(common.score(engine, valid, args, layout, pad_id),
                                        denoise.three_sets(valid_rows))
            J_held = {f"J_{name}": difference_loss(x).item() for name, x in at.items()}
            audit.log_metrics(stage, step, loss=loss, **J_held, **result)
        audit.end_step(stage, step, X_t + X_s, {"J_initial": before}, loss=loss, grad_norm=grad_norm)

    common.save_model(engine, stage.dir, tokenizer)
    vanilla = common.frozen(common.load_reward_model(vanilla_dir, args), args)
    rewards = {"theta": held_back(), "vanilla": common.score(vanilla, held, args, layout, pad_id)}     # [m, k]
    if "theta_prime" in at:
        rewards["theta_prime"] = at["theta_prime"]
    if common.rank() == 0:
        figure_16(Path(stage.dir) / "figure_16.png", rewards)
        audit.write_text(stage.dir / "held_back.json", json.dumps({n: x.tolist() for n, x in rewards.items()}) + "\n")
    audit.finish_stage(stage, {
        "J_initial": before, "J_theta": difference_loss(rewards["theta"]).item(),
        "J_vanilla": difference_loss(rewards["vanilla"]).item(),
        **{f"{name}_last_step": value for name, value in J_held.items()},
        "mean_difference": all_differences(rewards["theta"]).mean().item(),
        "mean_difference_vanilla": all_differences(rewards["vanilla"]).mean().item(), **result, "steps": steps})
    common.free(engine)


if __name__ == "__main__":
    audit.run(main)
