"""Stage 06: PPO against a reward model (section 2.1, Eq. 3; section 3.2.1 for the rounds).

Four models: the actor pi^RL (trained), the critic (trained, starts from the reward model), the reference pi^SFT and
the reward model (both frozen).

    --round 0     vanilla PPO: from pi^SFT under the vanilla reward model 04_rm_denoise/baseline → 06_ppo/round_0
    --round r     from the policy of round r - 1 under 07_metarm/round_r                        → 06_ppo/round_r
    --rm NAME     from pi^SFT, or from 06_ppo/START (--start), under the reward model NAME of
                  stage 04, 05 or 07                                                            → 06_ppo/NAME (--name)

One step: K roll-outs for each prompt (one group), the score at EOS, a per-token KL penalty against pi^SFT

    r_t = -kl_beta (log pi(y_t) - log pi^SFT(y_t)) + [t is last] score            (Eq. 3; its eta is kl_beta here)

then GAE, advantages whitened over all response tokens, clipped policy and value losses.

Departures from the paper: (1) scores are standardised by a running mean and std before they are clipped, because
reward models have no common scale or zero; (2) a response cut without EOS loses `missing_eos_penalty`; (3) the
policy's distribution is its own at the sampling temperature; top-p and repetition penalty shape sampling only.

    deepspeed 06_ppo.py --round 0
    deepspeed 06_ppo.py --rm soft_margin --kl_beta 0      # Figure 9: no KL penalty
    deepspeed 06_ppo.py --rm baseline --start round_0 --name more_1    # as long as round 1, without retraining
"""
import math
import random
from importlib import import_module
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

import audit
import common

HPARAMS = {
    # name: (paper, toy, help)
    "iterations": (2000, 30, "roll-out steps"),
    "batch_size": (32, 16, "prompts per roll-out step, global"),
    "rollouts": (4, 4, "K, responses per prompt"),
    "ppo_epochs": (1, 1, "passes over each step's roll-outs"),
    "minibatch_size": (32, 8, "prompts per optimiser step, global"),
    "micro_batch_size": (1, 8, "prompts (with their K roll-outs) per process and forward pass"),
    "actor_lr": (5e-7, 1e-4, "learning rate of the policy"),
    "critic_lr": (1.5e-6, 1e-3, "learning rate of the critic"),
    "warmup": (0.0, 0.0, "share of the steps with rising learning rate"),
    "kl_beta": (0.05, 0.05, "weight of the per-token KL penalty; 0 turns it off"),
    "reward_clip": (0.8, 0.8, "standardised scores are clipped at +- this"),
    "missing_eos_penalty": (1.0, 1.0, "taken off the clipped score of a response that was cut"),
    "gamma": (1.0, 1.0, "GAE gamma"),
    "lam": (0.95, 0.95, "GAE lambda"),
    "clip": (0.2, 0.2, "policy ratio clip"),
    "value_clip": (0.2, 0.2, "value clip"),
    "temperature": (0.8, 1.0, "sampling temperature"),
    "top_p": (0.9, 1.0, "nucleus sampling"),
    "repetition_penalty": (1.1, 1.0, "of sampling"),
    "generate_batch_size": (4, 16, "prompts per process and call of generate"),
    "eval_every": (100, 10, "steps between samples of the same ten prompts"),
    **common.TRAINING,
    "zero": (3, 0, "DeepSpeed ZeRO stage"),
    "save_every": (200, 10, common.TRAINING["save_every"][2]),
}


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation: A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t.

    rewards, values, mask: [B, T], mask 1 on response tokens, which come first. → advantages, returns [B, T], 0
    where mask is 0. The state after the last token has value 0.
    """
    mask = mask.to(values.dtype)
    values, rewards = values * mask, rewards * mask
    next_value, next_advantage, advantages = 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                  # [B]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages.insert(0, next_advantage)
    advantages = torch.stack(advantages, 1)                                        # [B, T]
    return advantages, advantages + values


def masked_mean(x, mask):
    """Mean of x over mask; 0 when nothing is masked in."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def policy_loss(logp, old_logp, advantages, mask, clip):
    """PPO's clipped surrogate: mean over response tokens of -min(rho A, clip(rho, 1 +- clip) A), all [..., T]."""
    ratio = torch.exp((logp - old_logp) * mask)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)


def value_loss(values, old_values, returns, mask, clip):
    """0.5 max((V - R)^2, (V_clipped - R)^2) with V_clipped within +- clip of the old value; mean over tokens."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def whiten(tensors, masks):
    """Shift and scale to mean 0, std 1 over the masked entries of all tensors of all ranks; 0 elsewhere."""
    n, total, square = (torch.stack([(f(t.double()) * m).sum() for t, m in zip(tensors, masks)]).sum()
                        for f in (torch.ones_like, lambda t: t, torch.square))
    sums = torch.stack([n, total, square])
    if dist.is_initialized():
        dist.all_reduce(sums)
    n = sums[0].clamp(min=1)
    mean = sums[1] / n
    std = (sums[2] / n - mean ** 2).clamp(min=0).sqrt()
    return [((t - mean) / (std + 1e-8)).to(t.dtype) * m for t, m in zip(tensors, masks)]


def update_running(running, values):
    """Fold values into (count, mean, sum of squared deviations), Welford's way. → (new statistics, mean, std)."""
    count, mean, m2 = running
    for x in values:
        count += 1
        delta = x - mean
        mean += delta / count
        m2 += delta * (x - mean)
    return (count, mean, m2), mean, max(math.sqrt(m2 / count), 1e-6)


def paths(args):
    """(stage name, policy to start from, reward model) of --round or --rm; errors name the missing stage."""
    out = Path(args.out)
    if args.rm:
        folders, name = ("04_rm_denoise", "05_rm_contrastive", "07_metarm"), args.name or args.rm
        found = [f"{d}/{args.rm}" for d in folders if (out / d / args.rm / "manifest.json").exists()]
        if not found:
            common.die(f"no finished reward model {args.rm} in {out}/04_rm_denoise, 05_rm_contrastive or 07_metarm")
        if not audit.is_name(name) or name.startswith("round_"):
            common.die(f"--name {name} cannot be a directory of 06_ppo (round_r is that of --round r): give another")
        audit.require(args, found[0], f"python {found[0].split('/')[0]}.py")
        if args.start:
            audit.require(args, f"06_ppo/{args.start}", "python 06_ppo.py")
        return f"06_ppo/{name}", f"06_ppo/{args.start}" if args.start else "01_sft", found[0]
    r = args.round
    if r == 0:
        audit.require(args, "04_rm_denoise/baseline", "python 04_rm_denoise.py")
        return "06_ppo/round_0", "01_sft", "04_rm_denoise/baseline"
    audit.require(args, f"06_ppo/round_{r - 1}", f"python 06_ppo.py --round {r - 1}")
    audit.require(args, f"07_metarm/round_{r}", f"python 07_metarm.py --round {r}")
    return f"06_ppo/round_{r}", f"06_ppo/round_{r - 1}", f"07_metarm/round_{r}"


@torch.no_grad()
def make_experience(groups, models, args, tokenizer, layouts, reward_fn):
    """Everything the update needs of one micro batch of groups: old and reference log-probabilities, values, raw
    scores [B, K]. `reward_fn(groups)` → [B, K] replaces the reward model (tests use it)."""
    actor, critic, reference, reward_model = models
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    batch = common.collate(groups, pad, layouts["policy"])
    with common.inference(args):
        logps = common.token_logps(common.response_logits(actor, batch), batch["response_ids"], args.temperature)
        logits = common.response_logits(reference, batch)
        ref_logps = common.token_logps(logits, batch["response_ids"], args.temperature)     # [B, K, T]
        sft_logps = common.token_logps(logits, batch["response_ids"])  # at temperature 1, for the perplexity
        values_batch = common.collate(groups, pad, layouts["reward"])
        values = critic(values_batch, values=True)[0].float()                      # [B, K, T]
        full = [{**g, "responses": common.finished(g["responses"], eos)} for g in groups]
        scores = reward_fn(full) if reward_fn else reward_model(common.collate(full, pad, layouts["reward"]))[0]
    cut = torch.tensor([[r[-1] != eos for r in g["responses"]] for g in groups], device=common.device())
    return {"batch": batch, "values_batch": values_batch, "logps": logps, "ref_logps": ref_logps, "values": values,
            "sft_logps": sft_logps, "scores": scores.float(), "cut": cut, "mask": batch["mask"]}


def shape_rewards(e, mean, std, args):
    """Eq. 3 per token [B, K, T]: the KL penalty everywhere, the standardised and clipped score on the last token."""
    score = ((e["scores"] - mean) / std).clamp(-args.reward_clip, args.reward_clip)
    score = score - args.missing_eos_penalty * e["cut"]
    rewards = -args.kl_beta * (e["logps"] - e["ref_logps"]) * e["mask"]
    last = e["mask"].sum(-1, keepdim=True) - 1                                     # [B, K, 1]
    return rewards.scatter_add(-1, last, score[..., None].to(rewards.dtype))


def rollout_metrics(experience, gold):
    """Means over this step's roll-outs of all ranks (see README: what each metric means)."""
    rows = []
    for e in experience:
        kl = (e["logps"] - e["ref_logps"]) * e["mask"]                             # [B, K, T]
        k3 = (torch.exp(-kl) - 1 + kl) * e["mask"]
        tokens = e["mask"].sum(-1)                                                 # [B, K]
        columns = (e["scores"], e["rewards"].sum(-1), kl.sum(-1), k3.sum(-1), tokens, e["cut"].float(),
                   -(e["sft_logps"] * e["mask"]).sum(-1), e["entropy"])
        rows += torch.stack([c.flatten().double() for c in columns], 1).tolist()
    rows = common.gather_rows([((i, common.rank()), row) for i, row in enumerate(rows)])
    reward, ret, kl, k3, length, cut, nll, entropy = torch.tensor(rows, dtype=torch.float64).T
    values = {"reward": reward.mean(), "return": ret.mean(), "kl": kl.mean(), "kl_nonnegative": k3.mean(),
              "kl_per_token": kl.sum() / length.sum(), "perplexity_sft": (nll.sum() / length.sum()).exp(),
              "entropy": entropy.sum() / length.sum(), "length": length.mean(), "cut": cut.mean()}
    return {k: v.item() for k, v in values.items()} | ({"gold": sum(gold) / len(gold)} if gold else {})


def main(argv=None, reward_fn=None):
    def add_flags(flag):
        flag("--round", type=int, default=0, help="MetaRM round; 0 is vanilla PPO (default)")
        flag("--rm", metavar="NAME", help="PPO under this reward model of stage 04, 05 or 07, instead of --round")
        flag("--start", metavar="NAME", help="with --rm: the policy of stage 06 to start from (default: SFT)")
        flag("--name", help="with --rm: name of the output directory (default: that of the reward model)")
    args = audit.parse_args(__doc__, HPARAMS, add_flags, argv)
    data = audit.require(args, "00_data", "python 00_data.py")
    sft = audit.require(args, "01_sft", "python 01_sft.py")
    if args.batch_size % args.minibatch_size:
        common.die("--batch_size must be a multiple of --minibatch_size")
    if args.rm and args.round:
        common.die("--rm has no rounds: give --rm or --round")
    if (args.start or args.name) and not args.rm:
        common.die("--start and --name go with --rm")
    name, start, rm = paths(args)
    common.setup(args)
    seed = args.seed * 1000 + args.round
    inputs = list(dict.fromkeys(["00_data/prompts.jsonl", "01_sft", start, rm]))
    stage = audit.start_stage(args, name, inputs)
    tokenizer = common.load_tokenizer(sft)
    gold_fn = import_module("toy_world").gold if args.run.get("world") == "toy" else None
    prompts = common.encode(tokenizer, audit.read_jsonl(data / "prompts.jsonl"), [], args.run)
    texts = {row["id"]: row["prompt"] for row in audit.read_jsonl(data / "prompts.jsonl")}

    micro_batch_size = min(args.micro_batch_size, args.minibatch_size // common.world_size())
    accumulation = args.minibatch_size // common.world_size() // max(1, micro_batch_size)
    iterations = min(args.iterations, args.limit or args.iterations)
    updates = iterations * args.ppo_epochs * (args.batch_size // args.minibatch_size)
    out = Path(args.out)
    actor = common.make_engine(common.load_policy(out / start, args), args, args.minibatch_size, args.actor_lr, updates,
                               args.warmup)
    critic = common.make_engine(common.load_reward_model(out / rm, args), args, args.minibatch_size, args.critic_lr,
                                updates, args.warmup)
    reference = common.frozen(common.load_policy(sft, args), args, shard=True)
    reward_model = common.frozen(common.load_reward_model(out / rm, args), args, shard=True)
    models = actor, critic, reference, reward_model
    longest = sorted(prompts, key=common.group_length)[-8:]  # the probe needs rows as long as the roll-outs will be
    probe = [{**g, "responses": [(g["prompt"] * args.run["max_response_tokens"])[:args.run["max_response_tokens"] - k]
                                 for k in range(args.rollouts)]} for g in longest]
    layouts = {"policy": common.choose_layout(args, lambda b: (b["mask"] * common.token_logps(
                   common.response_logits(reference, b), b["response_ids"])).sum(-1) / b["mask"].sum(-1), probe),
               "reward": common.choose_layout(args, lambda b: reward_model(b)[0], probe)}

    def evaluate(step):
        """The same ten prompts at every evaluation: samples.jsonl and their mean reward (and gold)."""
        ten = prompts[:10]
        responses = common.generate(actor, tokenizer, [g["prompt"] for g in ten], 1, args, seed=args.seed)
        groups = [{**g, "responses": common.finished(r, tokenizer.eos_token_id)} for g, r in zip(ten, responses)]
        args.eval_batch_size = args.micro_batch_size * args.rollouts
        rewards = common.score(reward_model, groups, args, layouts["reward"], tokenizer.pad_token_id)[:, 0]
        decoded = tokenizer.batch_decode([g["responses"][0] for g in groups], skip_special_tokens=True)
        rows = [{"step": step, "id": g["id"], "prompt": texts[g["id"]], "response": text, "reward": r.item()}
                | ({"gold": gold_fn(texts[g["id"]], text)} if gold_fn else {})
                for g, text, r in zip(ten, decoded, rewards)]
        samples.extend(rows)
        if common.rank() == 0:
            audit.write_jsonl(stage.dir / "samples.jsonl", samples)

    done, state = audit.resume(stage, {"actor": actor, "critic": critic}, iterations)
    samples, history = state.get("samples", []), state.get("history", [])
    running = state.get("running", (0, 0.0, 0.0))
    if not done:
        evaluate(0)
    steps = islice(common.batches(prompts, args.batch_size, iterations, seed), done, None)
    for step, batch in enumerate(common.progress(steps, name, iterations, done), done + 1):
        # roll-outs: K responses per prompt, this rank's share of the groups in micro batches
        responses = common.generate(actor, tokenizer, [g["prompt"] for g in batch], args.rollouts, args,
                                    seed=seed * iterations + step)
        groups = [{**g, "responses": r} for g, r in zip(batch, responses)]
        actor.eval(), critic.eval()
        experience = [make_experience(micro, models, args, tokenizer, layouts, reward_fn)
                      for micro in common.micro_batches(groups, micro_batch_size)]
        scores = common.gather_rows([((i, common.rank()), s) for i, s in enumerate(
            s for e in experience for s in e["scores"].flatten().tolist())])
        running, mean, std = update_running(running, scores)
        for e in experience:
            e["rewards"] = shape_rewards(e, mean, std, args)                       # [B, K, T]
            flat = [e[k].flatten(0, 1) for k in ("rewards", "values", "mask")]
            e["advantages"], e["returns"] = (x.view_as(e["values"]) for x in gae(*flat, args.gamma, args.lam))
        whitened = whiten([e["advantages"] for e in experience], [e["mask"] for e in experience])
        for e, advantages in zip(experience, whitened):
            e["advantages"] = advantages

        # updates: every minibatch is one optimiser step of the actor and of the critic
        actor.train(), critic.train()
        stats = []
        for epoch in range(args.ppo_epochs):
            order = random.Random(seed * iterations * 10 + step * 10 + epoch).sample(experience, len(experience))
            for i, e in enumerate(order):
                mask = e["mask"]
                if i % accumulation == 0:  # the losses are means over the tokens of the global minibatch
                    tokens = torch.stack([x["mask"].sum() for x in order[i:i + accumulation]]).sum()
                    dist.all_reduce(tokens)
                share = mask.sum() * common.world_size() * accumulation / tokens
                logits = common.response_logits(actor, e["batch"])                 # [B, K, T, V]
                logps = common.token_logps(logits, e["batch"]["response_ids"], args.temperature)
                loss_pi = policy_loss(logps, e["logps"], e["advantages"], mask, args.clip)
                actor.backward(loss_pi * share)
                norm_pi = common.step(actor)
                values = critic(e["values_batch"], values=True)[0]                 # [B, K, T]
                loss_v = value_loss(values, e["values"], e["returns"], mask, args.value_clip)
                critic.backward(loss_v * share)
                norm_v = common.step(critic)
                with torch.no_grad():
                    p = torch.log_softmax(logits / args.temperature, -1)
                    e["entropy"] = (-(p.exp() * p).sum(-1) * mask).sum(-1)         # [B, K]
                    clipped = masked_mean(((logps - e["logps"]).exp() - 1).abs().gt(args.clip).float(), mask)
                stats.append([loss_pi.item(), loss_v.item(), clipped.item()])
        stats = torch.tensor(stats, device=common.device()).mean(0)
        dist.all_reduce(stats)
        loss_pi, loss_v, clip_fraction = (stats / common.world_size()).tolist()
        gold = [gold_fn(texts[g["id"]], tokenizer.decode(r, skip_special_tokens=True))
                for g in groups for r in g["responses"]] if gold_fn else None
        values = rollout_metrics(experience, gold)
        history.append(values)
        audit.log_metrics(stage, step, quiet=step % args.eval_every != 0, **values, policy_loss=loss_pi,
                           value_loss=loss_v, clip_fraction=clip_fraction, actor_grad_norm=norm_pi,
                           critic_grad_norm=norm_v, reward_std=std)
        if step % args.eval_every == 0 or step == iterations:
            evaluate(step)
        audit.end_step(stage, step, batch, {"samples": samples, "running": running, "history": history},
                       policy_loss=loss_pi, value_loss=loss_v, actor_grad_norm=norm_pi, critic_grad_norm=norm_v,
                       reward=values["reward"])

    common.save_model(actor, stage.dir, tokenizer)
    curves(stage, history)
    last = history[-min(5, len(history)):]
    audit.finish_stage(stage, {k: round(float(sum(h[k] for h in last) / len(last)), 4) for k in last[0]}
                        | {"first_" + k: round(float(history[0][k]), 4) for k in ("reward", "kl", "gold")
                           if k in history[0]})
    common.free(actor), common.free(critic)


def curves(stage, history):
    """Reward, return, KL, perplexity (and gold) over the steps, curves.png: one line of Figure 9, Figure 12 or
    Figure 17, by the reward model."""
    if common.rank() == 0:
        plt = audit.pyplot()
        keys = [k for k in ("reward", "return", "kl", "perplexity_sft", "length", "gold") if k in history[0]]
        figure, axes = plt.subplots(2, 3, figsize=(12, 6))
        for axis, key in zip(axes.flat, keys):
            axis.plot(range(1, len(history) + 1), [float(h[key]) for h in history])
            axis.set(xlabel="step", title=key)
        figure.suptitle(stage.name)
        figure.savefig(stage.dir / "curves.png")


if __name__ == "__main__":
    audit.run(main)
