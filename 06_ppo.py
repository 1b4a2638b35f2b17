"""Stage 06: PPO against a reward model (section 2.1, Eq. 3; section 3.2.1 for the rounds).

    --round 0    vanilla PPO: from pi^SFT under 04_rm_denoise/baseline
    --round r    from the policy of round r - 1 under 07_metarm/round_r
    --rm NAME    from pi^SFT, or 06_ppo/START (--start), under that model of stage 04, 05 or 07

One step: K roll-outs for each prompt (one group), the score at its end, a KL penalty against pi^SFT
    r_t = -kl_beta (log pi(y_t) - log pi^SFT(y_t)) + [t is last] score      (Eq. 3; eta there)
then GAE, advantages whitened over all response tokens, clipped policy and value losses. The curves
of Figures 9, 12 and 17 are in metrics.jsonl (docs/metrics.md), ten answers in samples.jsonl.

Departures from the paper: (1) a running mean and std standardise scores before the clip: reward
models share no scale or zero; (2) a response cut without EOS loses --missing_eos_penalty; (3) top-p
and repetition penalty shape sampling only; (4) no dynamic KL penalty (Figure 17): kl_beta is fixed.

    deepspeed 06_ppo.py --rm soft_margin --kl_beta 0                 # Figure 9: no KL penalty
    deepspeed 06_ppo.py --rm baseline --start round_0 --name more_1 --seed 901  # as long as round 1
"""
import math
import random
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import common
from lab import judges

HPARAMS = {
    # name: (paper, small, toy, help)
    "iterations": (2000, 30, 90, "roll-out steps"),
    "batch_size": (32, 16, 16, "prompts per roll-out step, global"),
    "rollouts": (16, 4, 4, "K, responses per prompt (paper: of its follow-up; B.2 says 4)"),
    "ppo_epochs": (1, 1, 1, "passes over each step's roll-outs"),
    "minibatch_size": (32, 8, 8, "prompts per optimiser step, global"),
    "micro_batch_size": (1, 1, 8, "prompts (with their roll-outs) per process and forward pass"),
    "actor_lr": (5e-7, 1e-5, 3e-4, "learning rate of the policy"),
    "critic_lr": (1.5e-6, 3e-5, 1e-3, "learning rate of the critic"),
    "warmup": (0.0, 0.0, 0.0, "share of the steps with rising learning rate"),
    "kl_beta": (0.05, 0.05, 0.05, "weight of the per-token KL penalty; 0 turns it off"),
    "reward_clip": (0.8, 0.8, 0.8, "standardised scores are clipped at +- this"),
    "missing_eos_penalty": (1.0, 1.0, 1.0, "taken off the clipped score of a cut response"),
    "gamma": (1.0, 1.0, 1.0, "GAE gamma"),
    "lam": (0.95, 0.95, 0.95, "GAE lambda"),
    "clip": (0.2, 0.2, 0.2, "policy ratio clip"),
    "value_clip": (0.2, 0.2, 0.2, "value clip"),
    **common.SAMPLING,
    "generate_batch_size": (2, 16, 16, "prompts per process and call of generate"),
    "eval_every": (100, 10, 10, "steps between samples of the same ten prompts"),
    **common.TRAINING,
    "zero": (3, 0, 0, "DeepSpeed ZeRO stage"),
}


def gae(rewards, values, mask, gamma, lam):
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t; V after the end is 0.
    rewards, values, mask: [B, T], responses first. → advantages, returns: 0 off the mask."""
    mask = mask.to(values.dtype)
    values, rewards = values * mask, rewards * mask
    next_value, next_advantage, advantages = 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]               # [B]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages.insert(0, next_advantage)
    advantages = torch.stack(advantages, 1)                                     # [B, T]
    return advantages, advantages + values


def masked_mean(x, mask):
    """Mean of x over mask; 0 when nothing is masked in."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def policy_loss(logp, old_logp, advantages, mask, clip):
    """Mean over response tokens of -min(rho A, clip(rho, 1 +- clip) A); all [..., T] → scalar."""
    ratio = torch.exp((logp - old_logp) * mask)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)


def value_loss(values, old_values, returns, mask, clip):
    """Mean over tokens of 0.5 max((V - R)^2, (V' - R)^2), V' clipped to +- clip of the old V."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def whiten(tensors, masks):
    """To mean 0, std 1 over the masked entries of all tensors of all ranks; 0 elsewhere."""
    sums = torch.stack([
        torch.stack([(f(t.double()) * m).sum() for t, m in zip(tensors, masks)]).sum()
        for f in (torch.ones_like, lambda t: t, torch.square)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    n = sums[0].clamp(min=1)
    mean, std = sums[1] / n, (sums[2] / n - (sums[1] / n) ** 2).clamp(min=0).sqrt()
    return [((t - mean) / (std + 1e-8)).to(t.dtype) * m for t, m in zip(tensors, masks)]


def update_running(running, values):
    """Welford's (count, mean, sum of squared deviations) with values. → (that, mean, std)"""
    count, mean, m2 = running
    for x in values:
        count += 1
        delta = x - mean
        mean += delta / count
        m2 += delta * (x - mean)
    return (count, mean, m2), mean, max(math.sqrt(m2 / count), 1e-6)


def paths(args):
    """(stage name, policy to start from, reward model); errors name the missing stage."""
    r, name, start, rm = args.round, args.name or args.rm, "01_sft", "04_rm_denoise/baseline"
    if r < 0 or args.rm and r or (args.start or args.name) and not args.rm:
        common.die("give --rm, or --round from 0 on; --start and --name go with --rm")
    if not args.rm:
        name = f"round_{r}"
        start, rm = (f"06_ppo/round_{r - 1}", f"07_metarm/round_{r}") if r else (start, rm)
    else:
        start = f"06_ppo/{args.start}" if args.start else "01_sft"
        rm = next((f"{d}/{args.rm}" for d in ("04_rm_denoise", "05_rm_contrastive", "07_metarm")
                   if (Path(args.out) / d / args.rm).is_dir()), None) or common.die(
            f"no finished reward model {args.rm} in {args.out} of stage 04, 05 or 07")
        if not common.is_name(name) or name == "sft" or name.startswith("round_"):
            common.die(f"--name {name} cannot be a directory of 06_ppo (sft, round_r are taken)")
    for path in (start, rm):
        stage, _, number = path.replace("/round_", "/").partition("/")
        common.require(args, path, f"python {stage}.py" + (
            f" --round {number}" if number.isdigit() else f" --name {number}" * ("06" in stage)))
    return f"06_ppo/{name}", start, rm


def load_models(args, start, rm, prompts):
    """(actor, critic, reference, reward model), and the layout, tried on long rows."""
    steps = args.iterations * args.ppo_epochs * (args.batch_size // args.minibatch_size)
    actor, critic = (common.make_engine(model, args, args.minibatch_size, lr, steps)
                     for model, lr in ((common.load_policy(start, args), args.actor_lr),
                                       (common.load_reward_model(rm, args), args.critic_lr)))
    reference = common.frozen(common.load_policy(f"{args.out}/01_sft", args), args, shard=True)
    reward_model = common.frozen(common.load_reward_model(rm, args), args, shard=True)
    T = args.run["max_response_tokens"]
    probe = [{**g, "responses": [(g["prompt"] * T)[:max(1, T - k)] for k in range(args.rollouts)]}
             for g in sorted(prompts, key=common.group_length)[-8:]]
    def both(batch):  # rewards and mean log-probabilities: both models must take the layout
        logps = common.token_logps(common.response_logits(reference, batch), batch["response_ids"])
        return reward_model(batch)[0] + (batch["mask"] * logps).sum(-1) / batch["mask"].sum(-1)
    return (actor, critic, reference, reward_model), common.choose_layout(args, both, probe)


def make_experience(groups, models, args, tokenizer, layout, reward_fn=None):
    """What the update needs of a micro batch. reward_fn → [B, K], instead of the reward model."""
    actor, critic, reference, reward_model = models
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    batch = common.collate(groups, pad, layout)
    full = [g | {"responses": common.for_reward(g["responses"], tokenizer, args.run)}
            for g in groups]
    with common.inference(args):
        ids = batch["response_ids"]
        logps = common.token_logps(common.response_logits(actor, batch), ids, args.temperature)
        logits = common.response_logits(reference, batch)
        ref_logps = common.token_logps(logits, ids, args.temperature)           # [B, K, T]
        sft_logps = common.token_logps(logits, ids)  # at temperature 1, for the perplexity
        values = critic(batch, values=True)[0].float()                          # [B, K, T]
        scores = reward_fn(full, args, tokenizer) if reward_fn else \
            reward_model(common.collate(full, pad, layout))[0]
    cut = torch.tensor([[r[-1] != eos for r in g["responses"]] for g in groups]).to(scores.device)
    return {"batch": batch, "mask": batch["mask"], "logps": logps, "ref_logps": ref_logps,
            "sft_logps": sft_logps, "values": values, "scores": scores.float(), "cut": cut}


def shape_rewards(e, mean, std, args):
    """Eq. 3 per token [B, K, T]: the KL penalty everywhere, the clipped score on the last token."""
    score = ((e["scores"] - mean) / std).clamp(-args.reward_clip, args.reward_clip) - \
        args.missing_eos_penalty * e["cut"]                                     # [B, K]
    rewards = -args.kl_beta * (e["logps"] - e["ref_logps"]) * e["mask"]
    last = e["mask"].sum(-1, keepdim=True) - 1                                  # [B, K, 1]
    return rewards.scatter_add(-1, last, score[..., None].to(rewards.dtype))


def add_advantages(experience, running, args):
    """Rewards (Eq. 3), advantages and returns of a step's micro batches. → (running, its std)"""
    mine = [s for e in experience for s in e["scores"].flatten().tolist()]
    scores = common.gather_rows([((i, common.rank()), s) for i, s in enumerate(mine)])
    running, mean, std = update_running(running, scores)
    for e in experience:
        e["rewards"] = shape_rewards(e, mean, std, args)                        # [B, K, T]
        flat = [e[k].flatten(0, 1) for k in ("rewards", "values", "mask")]      # [B*K, T]
        e["advantages"], e["returns"] = (x.view_as(e["values"])
                                         for x in gae(*flat, args.gamma, args.lam))
    whitened = whiten([e["advantages"] for e in experience], [e["mask"] for e in experience])
    for e, advantages in zip(experience, whitened):
        e["advantages"] = advantages
    return running, std


def update(actor, critic, experience, args, run, seed):
    """Passes over a step's roll-outs: each minibatch is one step of the actor and the critic."""
    actor.train(), critic.train()
    accumulation = actor.gradient_accumulation_steps()
    for epoch in range(args.ppo_epochs):
        order = random.Random(seed + epoch).sample(experience, len(experience))
        for i, e in enumerate(order):
            mask, ids = e["mask"], e["batch"]["response_ids"]
            if i % accumulation == 0:  # losses are means over the tokens of the global minibatch
                tokens = torch.stack([x["mask"].sum() for x in order[i:i + accumulation]]).sum()
                dist.all_reduce(tokens)
            share = mask.sum() * common.world_size() * accumulation / tokens
            logits = common.response_logits(actor, e["batch"])                  # [B, K, T, V]
            logps = common.token_logps(logits, ids, args.temperature)
            loss_pi = policy_loss(logps, e["logps"], e["advantages"], mask, args.clip)
            actor.backward(loss_pi * share)
            run.note(policy_loss=loss_pi, actor_grad_norm=common.step(actor))
            values = critic(e["batch"], values=True)[0]                         # [B, K, T]
            loss_v = value_loss(values, e["values"], e["returns"], mask, args.value_clip)
            critic.backward(loss_v * share)
            run.note(value_loss=loss_v, critic_grad_norm=common.step(critic))
            with torch.no_grad():
                p = (torch.softmax(x.float() / args.temperature, -1) for x in logits.flatten(0, 1))
                e["entropy"] = torch.stack([torch.special.entr(x).sum(-1) for x in p]).view_as(mask)
                outside = ((logps - e["logps"]).exp() - 1).abs().gt(args.clip)
                run.note(clip_fraction=masked_mean(outside.float(), mask))


def rollout_metrics(experience, gold):
    """Means over this step's roll-outs of all ranks; docs/metrics.md explains them."""
    rows, names = [], "reward return kl kl_nonnegative length cut nll entropy".split()
    for e in experience:
        kl = (e["logps"] - e["ref_logps"]) * e["mask"]                          # [B, K, T]
        k3 = (torch.exp(-kl) - 1 + kl) * e["mask"]
        nll = -(e["sft_logps"] * e["mask"]).sum(-1)
        columns = (e["scores"], e["rewards"].sum(-1), kl.sum(-1), k3.sum(-1), e["mask"].sum(-1),
                   e["cut"], nll, (e["entropy"] * e["mask"]).sum(-1))           # [B, K] each
        rows += torch.stack([c.flatten().double() for c in columns], 1).tolist()
    rows = common.gather_rows([((i, common.rank()), row) for i, row in enumerate(rows)])
    x = dict(zip(names, torch.tensor(rows, dtype=torch.float64).T))
    per_token = {name: x[name].sum() / x["length"].sum() for name in ("kl", "nll", "entropy")}
    values = {name: x[name].mean() for name in names[:6]} | {
        "kl_per_token": per_token["kl"], "entropy": per_token["entropy"],
        "perplexity_sft": per_token["nll"].exp()}
    values |= {"gold": torch.tensor(gold, dtype=torch.float64).mean()} if gold else {}
    return {k: v.item() for k, v in values.items()}


def main(argv=None, reward_fn=None):
    """reward_fn: of lab/ppo_reward.py, with the directories that it reads as `inputs`."""
    def add_flags(flag):
        flag("--round", type=int, default=0, help="MetaRM round; 0 is vanilla PPO (default)")
        flag("--rm", metavar="NAME", help="PPO under this reward model of stage 04, 05 or 07")
        flag("--start", metavar="NAME", help="with --rm: policy to start from (default: SFT)")
        flag("--name", help="with --rm: name of the output directory (default: NAME)")
    args = common.parse_args(__doc__, HPARAMS, add_flags, argv)
    data, sft = (common.require(args, s, f"python {s}.py") for s in ("00_data", "01_sft"))
    if args.batch_size % args.minibatch_size:
        common.die("--batch_size must be a multiple of --minibatch_size")
    name, start, rm = paths(args)
    args.hparams |= {"reward": reward_fn.__name__} if reward_fn else {}
    common.setup(args)
    read = ["00_data/prompts.jsonl", "01_sft", start, rm, *getattr(reward_fn, "inputs", ())]
    run = common.begin(args, name, dict.fromkeys(read), script=reward_fn and "lab/ppo_reward.py")
    tokenizer, rows = common.load_tokenizer(sft), common.read_jsonl(data / "prompts.jsonl")
    prompts = common.encode(tokenizer, rows, [], args.run)
    texts = {row["id"]: row["prompt"] for row in rows}
    gold = judges.gold if args.run.get("world") == "toy" else None
    seed, args.iterations = args.seed * 1000 + args.round, min(args.iterations, args.limit or 10**9)
    models, layout = load_models(args, f"{args.out}/{start}", f"{args.out}/{rm}", prompts)
    actor, critic = models[:2]
    run.done or common.save_model(actor, run.dir, tokenizer)  # what cannot be saved fails now
    history = run.state.setdefault("history", [])
    run.state.setdefault("running", (0, 0.0, 0.0))  # count, mean and deviations of the scores
    answer = partial(judges.sample_answers, run, actor, models[3], layout, tokenizer, prompts[:10],
                     texts, gold)
    run.done or answer(0)
    batches = common.batches(prompts, args.batch_size, args.iterations, seed)
    for step, batch in run.steps(batches, actor=actor, critic=critic):
        actor.eval(), critic.eval()
        responses = common.generate(actor, tokenizer, [g["prompt"] for g in batch], args.rollouts,
                                    args, seed=seed * args.iterations + step)
        groups = [{**g, "responses": r} for g, r in zip(batch, responses)]
        experience = [make_experience(micro, models, args, tokenizer, layout, reward_fn) for micro
                      in common.micro_batches(groups, actor.train_micro_batch_size_per_gpu())]
        run.state["running"], std = add_advantages(experience, run.state["running"], args)
        update(actor, critic, experience, args, run, (seed * args.iterations + step) * 10)
        answers = [(texts[g["id"]], tokenizer.decode(r, skip_special_tokens=True))
                   for g in groups for r in g["responses"]]
        values = rollout_metrics(experience, gold and gold(*zip(*answers)))
        history.append(values), run.note(reward=values["reward"])
        run.log(step, quiet=not run.due(step), **values, reward_std=std)
        run.due(step) and answer(step)
    common.save_model(actor, run.dir, tokenizer)
    h, last = history[0], history[-5:]
    run.finish(**{k: round(sum(x[k] for x in last) / len(last), 4) for k in last[0]},
               **{f"first_{k}": round(h[k], 4) for k in ("reward", "kl", "gold") if k in h})
    common.free(actor), common.free(critic)


if __name__ == "__main__":
    common.launch(main)
