"""Judges of responses: who says which of two is better.

gold      the embedded world's true preference
ensemble  the mean of stage 02's reward models, for data without a known truth (a proxy: the
          policies were trained against models of the same data, so read it as a check that runs,
          not as evidence)
"""
import common
from lab import toy_world


def gold(prompts, responses):
    """True preference of each response to its prompt in the embedded world."""
    return [toy_world.gold(p, r) for p, r in zip(prompts, responses)]


def choose(args):
    """(kind, directories of the reward models that vote) of --judge: gold in the embedded world,
    else the ensemble."""
    kind = args.judge or ("gold" if args.run.get("world") == "toy" else "ensemble")
    names = [f"02_rm_ensemble/rm_{m:02d}" for m in range(args.M)] if kind == "ensemble" else []
    for name in names:
        common.require(args, name, "python 02_rm_ensemble.py")
    return kind, names


def scorer(args, tokenizer, names):
    """→ score(prompts, responses) of the judge chosen: gold, or the mean standardised reward."""
    def score(prompts, responses):
        # decoders like Llama-2's drop the leading space that the preferences have
        lead, bare = args.run.get("lead", " "), args.run.get("form") == "none"
        rows = [{"id": str(i), "prompt": p, "response": r if bare or not r.strip()
                 else lead + r.strip()} for i, (p, r) in enumerate(zip(prompts, responses))]
        groups, total = common.encode(tokenizer, rows, ["response"], args.run), 0
        for name in names:
            r = common.score_by(f"{args.out}/{name}", groups, args, tokenizer)[:, 0]
            total = total + (r - r.mean()) / r.std(correction=0).clamp(min=1e-6)
        return (total / len(names)).tolist()
    return score if names else gold


def sample_answers(run, policy, reward_model, layout, tokenizer, prompts, texts, truth, step):
    """Answers to the same prompts (groups, their texts by id) at every evaluation of stage 06, with
    their reward and, where `truth` is known, that: samples.jsonl."""
    args = run.args
    args.eval_batch_size = args.micro_batch_size * args.rollouts
    ids = common.generate(policy, tokenizer, [g["prompt"] for g in prompts], 1, args, args.seed)
    groups = [{**g, "responses": common.for_reward(r, tokenizer, args.run)}
              for g, r in zip(prompts, ids)]
    rewards = common.score(reward_model, groups, args, layout, tokenizer.pad_token_id)  # [10, 1]
    answers = tokenizer.batch_decode([g["responses"][0] for g in groups], skip_special_tokens=True)
    known = truth([texts[g["id"]] for g in groups], answers) if truth else []
    samples = run.state.setdefault("samples", [])
    for i, (g, answer) in enumerate(zip(groups, answers)):
        samples.append({"step": step, "id": g["id"], "prompt": texts[g["id"]], "response": answer,
                        "reward": rewards[i, 0].item(), **({"gold": known[i]} if truth else {})})
    if common.rank() == 0:
        common.write_jsonl(run.dir / "samples.jsonl", samples)
