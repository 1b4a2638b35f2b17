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
"""
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


def figure_16(path, differences):
    """Figure 16: distribution of |r_i - r_j| on held-back samples, both models on one 0-1 scale."""
    plt = audit.pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.5))
    top = max(d.max().item() for d in differences.values())
    for name, d in differences.items():
        axis.hist((d / top).tolist(), bins=40, range=(0, 1), alpha=0.6, density=True, label=name)
    axis.set(xlabel="reward difference, normalised", ylabel="density", title="Figure 16")
    axis.legend()
    figure.savefig(path)


def main(argv=None):
    args = audit.parse_args(__doc__, HPARAMS, lambda flag: flag(
        "--round", type=int, default=1, help="round r >= 1: samples come from 06_ppo/round_{r-1} (default 1)"), argv)
    r = args.round
    if r < 1:
        common.die("--round must be 1 or more: round 0 is vanilla PPO, which has no MetaRM")
    data = audit.require(args, "00_data", "python 00_data.py")
    strength = audit.require(args, "03_strength", "python 03_strength.py")
    sft = audit.require(args, "01_sft", "python 01_sft.py")
    vanilla_dir = audit.require(args, "04_rm_denoise/baseline", "python 04_rm_denoise.py")
    policy_dir = audit.require(args, f"06_ppo/round_{r - 1}", f"python 06_ppo.py --round {r - 1}")
    common.setup(args)
    stage = audit.start_stage(args, f"07_metarm/round_{r}", [
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

    def held_back_J(model):
        return difference_loss(common.score(model, held, args, layout, pad_id)).item()

    pair_batches = common.batches(train, args.batch_size, steps, args.seed)
    meta_batches = common.batches(meta, args.meta_batch_size, steps, args.seed + 1)
    done, state = audit.resume(stage, {"rm": engine}, steps)
    before = state["J_initial"] if done else held_back_J(engine)
    steps_left = islice(zip(pair_batches, meta_batches), done, None)
    for step, (X_t, X_s) in enumerate(common.progress(steps_left, stage.name, steps, done), done + 1):
        J_X_s = backward(engine, micros(J, X_s))                                   # Algorithm 1, line 4, Eq. 11
        theta = ascend(engine, args.eta)                                           # line 5, Eq. 12: theta'
        measured = step % args.eval_every == 0 or step == steps
        if measured:
            J_theta_prime = held_back_J(engine)
        loss = backward(engine, micros(L, X_t))                                    # line 6, Eq. 13: at theta'
        restore(engine, theta)
        if measured:
            J_theta = held_back_J(engine)
        grad_norm = common.step(engine)                                            # line 7, Eq. 14: at theta
        if measured:
            result = denoise.accuracies(common.score(engine, valid, args, layout, pad_id),
                                        denoise.three_sets(valid_rows))
            audit.log_metrics(stage, step, loss=loss, J_meta_batch=J_X_s, J_theta=J_theta, J_theta_prime=J_theta_prime,
                               **result)
        audit.end_step(stage, step, X_t + X_s, {"J_initial": before}, loss=loss, J=J_X_s, grad_norm=grad_norm)

    common.save_model(engine, stage.dir, tokenizer)
    vanilla = common.frozen(common.load_reward_model(vanilla_dir, args), args)
    rewards = {"MetaRM": common.score(engine, held, args, layout, pad_id),         # [m, k]
               "vanilla RM": common.score(vanilla, held, args, layout, pad_id)}
    i, j = torch.triu_indices(args.k, args.k, 1)
    differences = {name: (x[:, i] - x[:, j]).abs().flatten() for name, x in rewards.items()}
    if common.rank() == 0:
        figure_16(Path(stage.dir) / "figure_16.png", differences)
    audit.finish_stage(stage, {
        "J_initial": before, "J_theta": difference_loss(rewards["MetaRM"]).item(),
        "J_vanilla": difference_loss(rewards["vanilla RM"]).item(), "J_theta_last_step": J_theta,
        "J_theta_prime_last_step": J_theta_prime, "mean_difference": differences["MetaRM"].mean().item(),
        "mean_difference_vanilla": differences["vanilla RM"].mean().item(), **result, "steps": steps})


if __name__ == "__main__":
    audit.run(main)
