"""Stage 07: MetaRM, Algorithm 1 (section 3.2): keep the reward model sharp on the policy's shifted
outputs.

Samples k responses per prompt from the policy of round r - 1 (for round 1 from pi^SFT with
--first_samples sft; samples.jsonl, the meta data set S), then trains a reward model from pi^SFT on
the original pairs D. One step (Figure 14), with m prompts X_s of S and n pairs X_t of D:

    J  = 2/k^2 sum_{i<j} sigma(|r_i - r_j|)      difference loss on X_s                   (Eq. 11)
    theta' = theta + eta dJ(X_s)/dtheta          plain ascent, in place                   (Eq. 12)
    g  = dL_theta'(X_t)/dtheta'                  vanilla loss (Eq. 10) at theta'          (Eq. 13)
    theta <- theta - alpha g                     the optimiser's step, applied at theta   (Eq. 14)

A tenth of the prompts is held back to measure J at theta, which is saved, and at theta' (Figure 16,
held_back.json; docs/readings.md says why theta's is lower); equation_17.json: Eqs. 15 to 17.

Departures from the paper: (1) Eq. 14 is AdamW's step, as in all stages; (2) eta, k, m, n and the
first round's samples from pi^SFT (--first_samples) are not in the paper: its column has those of
the authors' follow-up (Dou et al., AAAI 2025, arXiv 2405.00438), --meta_prompts is ours; (3) the
paper preset has autocast and n = 16 where 04 has bf16 and 32: compare J with 04's at --precision
autocast --batch_size 16.

    deepspeed 07_metarm.py --round 1
    deepspeed 07_metarm.py --round 2 --eta 0     # toy: bit for bit the baseline of stage 04
"""
import json
import random
from types import SimpleNamespace

import common  # first: it sets DeepSpeed's environment

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad

HPARAMS = {
    # name: (paper, small, toy, help)
    "eta": (5e-6, 5e-6, 0.1, "step size eta of the meta ascent, Eq. 12"),
    "k": (5, 4, 4, "responses sampled per prompt"),
    "meta_batch_size": (16, 16, 16, "m, prompts of X_s in a step, global"),
    "first_samples": ("sft", "policy", "policy", "who answers for round 1: pi^SFT, or round 0's"),
    "meta_prompts": (2000, 320, 320, "prompts sampled; a tenth is held back to measure J"),
    "epochs": (1.0, 1.0, 1.0, "passes over the preferences"),
    "batch_size": (16, 16, 32, "n, pairs of X_t in a step, global"),
    "micro_batch_size": (2, 4, 32, "pairs or meta groups per process and forward pass"),
    "eval_batch_size": (8, 8, 64, "groups per process when evaluating"),
    "lr": (5e-6, 5e-5, 1e-3, "alpha, peak learning rate"),
    "warmup": (0.1, 0.1, 0.1, "share of the steps with rising learning rate"),
    "eval_every": (500, 50, 25, "steps between evaluations, beside each epoch's end"),
    "equation_17": (0, 0, 6, "batches of four to measure Eq. 17 on (second derivatives)"),
    **common.SAMPLING,
    "generate_batch_size": (4, 16, 64, "prompts per process and call of generate"),
    **common.TRAINING,
    "zero": (3, 0, 0, "DeepSpeed ZeRO stage"),
    # bf16 parameters swallow the shift: at eta = 1e-3 only 1.5 % of theta' would differ from theta
    "precision": ("autocast", "autocast", "fp32", "autocast keeps parameters in fp32"),
}


def difference_loss(rewards):
    """Eq. 11: J = 2/k^2 sum_{i<j} sigma(|r_i - r_j|), mean over prompts. [m, k] → scalar.

    With k = 1 there is no pair and J = 0; with equal rewards J = (k - 1) / 2k, its minimum.
    """
    k = rewards.shape[1]
    return (2 / k ** 2 * torch.sigmoid(all_differences(rewards)).sum(1)).mean()


def all_differences(rewards):
    """|r_i - r_j| of all pairs i < j of each prompt: [m, k] → [m, k (k - 1) / 2]."""
    i, j = torch.triu_indices(rewards.shape[1], rewards.shape[1], 1, device=rewards.device)
    return (rewards[:, i] - rewards[:, j]).abs()


def held_back(rewards):
    """What held_back.json has of rewards [m, k]: those, Figure 16's differences, J of each."""
    return {"rewards": rewards.tolist(), "differences": all_differences(rewards).tolist(),
            "J": [round(difference_loss(r[None]).item(), 6) for r in rewards]}


def vanilla_loss(rewards):
    """Eq. 10: L = -log sigma(r_c - r_r), mean over pairs. rewards: [n, 2] → scalar."""
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()


def backward(rm, loss_fn, X):
    """Gradient of loss_fn(rewards) of a global batch, left in the engine. → the micro batches'
    losses."""
    micros, losses = list(rm.micro_batches(X)), []
    for i, micro in enumerate(micros, 1):
        rm.engine.set_gradient_accumulation_boundary(i == len(micros))
        losses.append(loss_fn(rm(micro)[0]))
        rm.engine.backward(losses[-1] / len(micros), scale_wrt_gas=False)
    return torch.stack(losses).detach()


def ascend(engine, eta):
    """Eq. 12 in place on the engine's parameters, theta' = theta + eta dJ/dtheta, from the
    gradients of a backward pass just made; then clear those gradients. → theta, for `restore`.
    Every rank must call it."""
    theta, zero3 = [], engine.zero_optimization_stage() == 3
    for p in engine.module.parameters():
        gradient = safe_get_full_grad(p)  # a collective, already averaged over ranks
        theta.append((p.ds_tensor if zero3 else p).data.clone())
        # DeepSpeed's own setter would change the fp32 master copy only, which the next forward
        # pass does not see
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


def train(run, rm, pairs, meta, evaluate):
    """Algorithm 1. pairs: D, meta: S, as groups; its lines are numbered as in the paper."""
    args, steps = run.args, common.steps_for(run.args, len(pairs))
    batches = list(zip(common.batches(pairs, args.batch_size, steps, args.seed),
                       common.batches(meta, args.meta_batch_size, steps, args.seed + 1)))
    for step, (X_t, X_s) in run.steps(batches, rm=rm.engine):  # 1, 2, 3
        backward(rm, difference_loss, X_s)                     # 4: J_theta(X_s), Eq. 11
        theta = ascend(rm.engine, args.eta)                    # 5: theta' of Eq. 12
        losses = backward(rm, vanilla_loss, X_t)               # 6: L_theta'(X_t), Eqs. 10 and 13
        restore(rm.engine, theta)                              # 7: theta, not theta', is moved:
        norm = rm.step()                                       #    Eq. 14
        run.note(loss=losses.mean(), grad_norm=norm)           # 8
        if run.due(step):
            result = evaluate(step, X_s)
    return {**result, "steps": steps}


def ascend_and_return(rm, held, X_s, eta):
    """One ascent on X_s, undone. → rewards of the held-back samples at theta and at theta' [m, k];
    J(theta') - J(theta) on X_s, and what it is to first order, eta ||dJ||^2."""
    rewards, J = [rm.score(held)], [difference_loss(rm.score(X_s))]
    backward(rm, difference_loss, X_s)
    squares = [safe_get_full_grad(p).double().square().sum() for p in rm.engine.parameters()]
    theta = ascend(rm.engine, eta)
    rewards.append(rm.score(held)), J.append(difference_loss(rm.score(X_s)))
    restore(rm.engine, theta)
    return dict(zip(("theta", "theta_prime"), rewards)), {
        "measured": (J[1] - J[0]).item(), "first_order": eta * sum(squares).item()}


def equation_17(L, J, theta, eta):
    """Eqs. 15 to 17: what the meta step adds to the gradient of L, and what Eq. 17 says it adds.

    Eq. 15 writes the gradient at theta', which Algorithm 1 follows, by d/dtheta instead of
    d/dtheta': times (1 + eta J'')^-1, a constant to the paper. By Taylor (Eq. 16) L(theta') = L +
    eta dL . dJ + o(eta), hence Eq. 17: dL(theta') ~ d/dtheta [L + eta dL . dJ], with the eta that
    the paper drops. To first order that is exact with dJ held fixed; the whole derivative has the
    term eta J'' dL besides, which Eq. 15's factor takes off again.
    L, J: functions without arguments → scalar, at the present theta; theta: list of tensors.
    → dL, dL(theta') - dL, and Eq. 17's term with dJ held fixed and whole: four flat vectors.
    """
    def gradient(scalar, **more):
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(scalar, theta, **more)])
    dJ = gradient(J(), create_graph=True)
    dL = gradient(L(), create_graph=True)
    whole = eta * gradient(dL @ dJ, retain_graph=True)
    fixed = eta * gradient(dL @ dJ.detach())
    saved = [p.data.clone() for p in theta]
    for p, g in zip(theta, dJ.detach().split([p.numel() for p in theta])):
        p.data += eta * g.view_as(p)                                            # Eq. 12
    change = gradient(L()) - dL.detach()                                        # Eq. 13
    for p, old in zip(theta, saved):
        p.data = old
    return dL.detach(), change, fixed, whole


def measure_equation_17(args, path, pairs, meta, tokenizer, size=4):
    """Cosines of the two sides of Eq. 17 at the vanilla reward model, in float64, one for each of
    some batches; and the size of what the meta step adds, as a share of dL."""
    model = common.load_reward_model(path, SimpleNamespace(precision="fp32")).double()
    model.model.config._attn_implementation = "eager"  # the fused kernels have no second derivative
    head = torch.nn.Linear(model.model.score.in_features, 1, bias=False, dtype=torch.float64)
    head.weight.data = model.model.score.weight.data  # in float64, unlike the model's own
    model.model.score = head
    model.to(common.device())
    draw, out = random.Random(args.seed), {"whole": [], "fixed": [], "size": [], "eta": args.eta}

    def rewards(groups):
        return model(common.collate(groups, tokenizer.pad_token_id, "separate"))[0]

    for _ in range(args.equation_17):
        X_t = draw.sample(pairs, min(size, len(pairs)))
        X_s = draw.sample(meta, min(size, len(meta)))
        dL, change, fixed, whole = equation_17(
            lambda: vanilla_loss(rewards(X_t)), lambda: difference_loss(rewards(X_s)),  # noqa: B023
            list(model.parameters()), args.eta)
        for name, vector in (("whole", whole), ("fixed", fixed)):
            cosine = torch.cosine_similarity(change, vector, dim=0).item()
            out[name].append(round(cosine, 6))
        out["size"].append(round((change.norm() / dL.norm()).item(), 6))
    return out


def sample_meta(args, policy_dir, rows, run, tokenizer):
    """k responses to each of some prompts, drawn anew each round, from the policy in `policy_dir` →
    groups, the meta data set S; samples.jsonl keeps their texts and the ids, which train."""
    count = min(args.meta_prompts, 16 * (args.limit or args.meta_prompts), len(rows))
    rows = random.Random(f"{args.seed} {args.round}").sample(rows, count)
    path, groups = run.dir / "samples.jsonl", common.encode(tokenizer, rows, [], args.run)
    if run.checkpoint:  # sampled before this process was started again
        responses = [row["response_ids"] for row in common.read_jsonl(path)]
    else:
        if args.precision == "autocast":  # fp32 is for the meta step; sampling fits 80 GB in bf16
            args = SimpleNamespace(**{**vars(args), "precision": "bf16"})
        policy = common.frozen(common.load_policy(policy_dir, args), args)
        responses = common.generate(policy, tokenizer, [g["prompt"] for g in groups], args.k, args,
                                    args.seed + args.round)
        if common.rank() == 0:
            common.write_jsonl(path, [
                {"id": row["id"], "prompt": row["prompt"], "response_ids": r,
                 "responses": tokenizer.batch_decode(r, skip_special_tokens=True)}
                for row, r in zip(rows, responses)])
        common.save_checkpoint(run, 0)  # they are kept, whatever comes
    return [{**g, "responses": common.for_reward(r, tokenizer, args.run)}
            for g, r in zip(groups, responses)]


def main(argv=None, train=train, variant=None):
    """`train` is Algorithm 1 unless lab/metarm_variants.py gives another."""
    def add_flags(flag):
        flag("--round", type=int, default=1, help="r >= 1: samples of round r - 1 (1)")
        flag("--name", help="name of the output directory (default: round_R)")
    args = common.parse_args(__doc__, HPARAMS, add_flags, argv)
    r = args.round
    if r < 1:
        common.die("--round must be 1 or more: round 0 is vanilla PPO, which has no MetaRM")
    if args.name and (not common.is_name(args.name) or args.name.startswith("round_")):
        common.die(f"--name {args.name} cannot be a directory of 07_metarm")
    data, sft, strength, vanilla = (
        common.require(args, name, f"python {name.split('/')[0]}.py")
        for name in ("00_data", "01_sft", "03_strength", "04_rm_denoise/baseline"))
    source = "01_sft" if r == 1 and args.first_samples == "sft" else f"06_ppo/round_{r - 1}"
    policy = common.require(args, source, f"python 06_ppo.py --round {r - 1}")
    common.setup(args, one_thread=True)
    for size in (args.batch_size, args.meta_batch_size):
        common.micro_size(size, args.micro_batch_size)  # refused before the long sampling
    args.hparams |= {"variant": variant} if variant else {}
    run = common.begin(args, f"07_metarm/{args.name or f'round_{r}'}", dict.fromkeys([
        "00_data/prompts.jsonl", "03_strength", "01_sft", "04_rm_denoise/baseline", source]),
        script=variant and "lab/metarm_variants.py")
    tokenizer, prompts = common.load_tokenizer(sft), common.read_jsonl(data / "prompts.jsonl")
    groups = sample_meta(args, policy, prompts, run, tokenizer)
    held, meta = groups[::10], [g for i, g in enumerate(groups) if i % 10] or groups

    common.set_seed(args.seed)  # from here on as stage 04's baseline: same head, same order
    train_rows, valid_rows, gold = (common.read_jsonl(strength / f"{name}.jsonl")
                                    for name in ("train", "valid", "gold"))
    _, pairs = common.encode_pairs(tokenizer, train_rows, args.run)
    valid_rows, valid = common.encode_pairs(tokenizer, valid_rows, args.run)
    _, gold = common.encode_pairs(tokenizer, gold, args.run)
    model = common.load_reward_model(sft, args, head_seed=args.seed)
    rm = common.RewardEngine(model, run, tokenizer, pairs, common.steps_for(args, len(pairs)))
    if not run.done:
        run.state["J_initial"] = difference_loss(rm.score(held)).item()
    measured = []

    def evaluate(step, X_s):
        """J on held-back samples at theta and, after one more ascent, at theta'; accuracies."""
        measured[:] = ascend_and_return(rm, held, X_s, args.eta)
        J = {f"J_{k}": difference_loss(x).item() for k, x in measured[0].items()}
        return run.log(step, **J, **common.accuracies(rm.score(valid), valid_rows))

    result = train(run, rm, pairs, meta, evaluate)
    rewards, rise = measured
    if gold:
        result["accuracy_gold"] = common.accuracies(rm.score(gold), gold)["accuracy_original"]
    rm.save()
    rewards["vanilla"] = common.score_by(vanilla, held, args, tokenizer)
    if common.rank() == 0:
        found = {name: held_back(x) for name, x in rewards.items()} | {"rise": rise}
        common.write_text(run.dir / "held_back.json", json.dumps(found) + "\n")
        if args.equation_17:
            found = measure_equation_17(args, vanilla, pairs, groups, tokenizer)
            common.write_text(run.dir / "equation_17.json", json.dumps(found) + "\n")
    J_vanilla = difference_loss(rewards["vanilla"]).item()
    run.finish(J_initial=run.state["J_initial"], J_vanilla=J_vanilla, **result, rise=rise)


if __name__ == "__main__":
    common.launch(main)
