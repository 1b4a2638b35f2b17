"""The paper's figures and tables from finished runs: what is in each, and how it is drawn. 09_report.py puts them on a
page and takes its ledger from the same numbers.

A run is a namespace: `path` (its directory), `summary` (that of the summary task, or None), `seed`. `FIGURES` names for
each figure a function run → data (numbers only, as JSON keeps them, down to single pairs and prompts, so that the ledger
can draw its intervals), and a function (data of every seed) → (matplotlib figure, rows of the table behind it).
"""
import math
import re
from functools import cache
from importlib import import_module

import numpy as np
import torch

import audit
import common

denoise, contrastive, metarm = (import_module(n) for n in ("04_rm_denoise", "05_rm_contrastive", "07_metarm"))
WHOLE = [name for name, (*_, part) in denoise.METHODS.items() if part == (0, 100)]
DENOISING = [name for name in WHOLE if name not in ("baseline", "margin")]
SETS = ("original", "judge", "consistent")
TENTHS = [f"tenth_{i:02d}" for i in range(1, 11)]
PARTS = ([f"part_000_{high:03d}" for high in (20, 40, 60, 80)], [f"part_{low:03d}_100" for low in (80, 60, 40, 20)])
MEAN, STD = "mean preference difference", "std preference difference"


class Missing(Exception):
    """A run has not made what a figure shows; the message says what."""


# ---------------------------------------------------------------- reading runs

@cache
def rows(path):
    if not path.exists():
        raise Missing(f"{path} is not there")
    return audit.read_jsonl(path)


@cache
def read(path):
    if not path.exists():
        raise Missing(f"{path} is not there")
    return audit.read_json(path)


@cache
def curve(run_path, model):
    """Training of one model of stage 04 → {"step": [S], "train_loss": [S], "right": {set: [S][pairs] 0 or 1}}; the sets
    are the three validation sets and "train"."""
    scores = rows(run_path / "04_rm_denoise" / model / "scores.jsonl")
    valid = [row for row in rows(run_path / "03_strength/valid.jsonl") if row["id"] in scores[0]["valid"]]
    d = np.array([[s["valid"][row["id"]] for row in valid] for s in scores]) @ [1, -1]      # [S, N]
    train = np.array([list(s["train"].values()) for s in scores]) @ [1, -1]
    right = {name: (d[:, [i for i, _ in members]] * [sign for _, sign in members] > 0).astype(int).tolist()
             for name, members in denoise.three_sets(valid).items() if members}
    return {"step": [s["step"] for s in scores], "train_loss": np.logaddexp(0, -train).mean(1).round(4).tolist(),
            "right": right | {"train": (train > 0).astype(int).tolist()}}


def curves(run, *models):
    return {model: curve(run.path, model) for model in models}


def ppo(run, *names, keys=("reward", "return", "kl", "perplexity_sft", "entropy", "length", "gold", "reward_std")):
    """{policy: {metric: [steps]}} from stage 06."""
    out = {}
    for name in names:
        history = rows(run.path / "06_ppo" / name / "metrics.jsonl")
        out[name] = {k: [h[k] for h in history] for k in keys if k in history[0]}
    return out


@cache
def answers(path):
    """{set: {policy: [score of each prompt]}} from stage 08, the prompts in the same order for every policy."""
    out = {}
    for row in rows(path / "08_evaluate/responses.jsonl"):
        out.setdefault(row["set"], {}).setdefault(row["policy"], []).append(row["score"])
    return out


def judged(run, policies, kinds=("eval_", "ood_")):
    """`answers` of some policies to the sets of some kinds, the summary task's too."""
    merged = answers(run.path) | (answers(run.summary) if run.summary else {})
    out = {name: {p: scores[p] for p in policies if p in scores} for name, scores in merged.items()
           if name.startswith(kinds)}
    if not any(len(scores) > 1 for scores in out.values()):
        raise Missing(f"{run.path}/08_evaluate has none of the policies {', '.join(policies)}")
    return out


def rounds(run):
    """Names of vanilla PPO and the finished rounds, in order."""
    found = [p.name for p in (run.path / "06_ppo").glob("round_*") if re.fullmatch(r"round_\d+", p.name)]
    return sorted(found, key=lambda name: int(name[6:]))


# ---------------------------------------------------------------- data of each figure

def data_01(run):
    train = rows(run.path / "03_strength/train.jsonl")
    return {"mean": [round(r[MEAN], 4) for r in train], "std": [round(r[STD], 4) for r in train]}


def data_03(run):
    known = sorted((r for r in rows(run.path / "03_strength/valid.jsonl") if r.get("judge_label", -1) != -1),
                   key=lambda r: r[MEAN])
    if not known:
        raise Missing("no pair has a judge's label")
    return {"mean": [round(r[MEAN], 4) for r in known], "agrees": [r["judge_label"] for r in known]}


def data_11(run):
    return read(run.path / "05_rm_contrastive/figures/figure_11.json")


def data_16(run):
    return {name: read(run.path / "07_metarm" / name / "held_back.json") for name in rounds(run)[1:]}


def data_20(run):
    """Scores of the validation pairs under the baseline over three epochs; at the epochs' ends every pair's."""
    scores = rows(run.path / "04_rm_denoise/baseline_3_epochs/scores.jsonl")
    pairs = np.array([list(s["valid"].values()) for s in scores])                  # [S, N, 2]
    ends = [epoch_end(scores, epoch) for epoch in (1, 2, 3)]
    return {"step": [s["step"] for s in scores], "chosen": pairs[..., 0].mean(1).round(4).tolist(),
            "rejected": pairs[..., 1].mean(1).round(4).tolist(), "epoch_end_step": [scores[i]["step"] for i in ends],
            "epoch_end": [pairs[i].tolist() for i in ends]}


def epoch_end(evaluations, epoch, epochs=3):
    """Index of the evaluation nearest to the end of an epoch."""
    steps = np.array([e["step"] if isinstance(e, dict) else e for e in evaluations])
    return int(np.abs(steps - steps[-1] * epoch / epochs).argmin())


def data_26(run):
    """p(y_c > y_r | x) of the same training pairs over training, under the labels trained on."""
    out = {}
    for name in ("baseline", "flip"):
        scores = rows(run.path / f"04_rm_denoise/{name}_3_epochs/scores.jsonl")
        d = np.array([list(s["train"].values()) for s in scores]) @ [1, -1]
        out[name] = {"step": [s["step"] for s in scores], "p": (1 / (1 + np.exp(-d))).round(3).tolist()}
    return out


def data_27(run):
    """Whether each validation pair is right under each method, pairs in ascending order of strength."""
    models = [f"{name}_3_epochs" for name in WHOLE]
    kept = rows(run.path / "04_rm_denoise" / models[0] / "scores.jsonl")[0]["valid"]
    strength = [r[MEAN] for r in rows(run.path / "03_strength/valid.jsonl") if r["id"] in kept]
    order = np.argsort(strength, kind="stable")
    right = {m: np.array(curve(run.path, m)["right"]["original"])[:, order].tolist() for m in models}
    return {"step": curve(run.path, models[0])["step"], "right": right}


def data_joint(run):
    """MetaRM of round 1 and the plain joint objective at the same strength: J of each held-back prompt, accuracy."""
    out = {}
    for folder in sorted((run.path / "07_metarm").glob("*_*")):
        kind, strength = folder.name.split("_", 1)
        if kind not in ("eta", "joint") or not (folder / "manifest.json").exists():
            continue
        held, metrics = read(folder / "held_back.json"), read(folder / "manifest.json")["metrics"]
        out[folder.name] = {"kind": kind, "strength": float(strength), "J": J(held["theta"]), "accuracy": {
            k.removeprefix("accuracy_"): v for k, v in metrics.items() if k.startswith("accuracy_")}}
        out["vanilla"] = {"kind": "vanilla", "strength": 0.0, "J": J(held["vanilla"]), "accuracy": {
            k.removeprefix("accuracy_"): v for k, v in
            read(run.path / "04_rm_denoise/baseline/manifest.json")["metrics"].items() if k.startswith("accuracy_")}}
    if not out:
        raise Missing(f"{run.path}/07_metarm has no eta_* and no joint_*")
    return {"models": out, "scores": judged(run, ["sft", "round_0", "round_1", "joint", "more_1"])}


def J(rewards):
    """Eq. 11 of each prompt: [m, k] → [m]."""
    return [round(metarm.difference_loss(torch.tensor([r])).item(), 6) for r in rewards]


def data_best_of_n(run):
    """Expected judge's score and own reward of the best of n under each reward model, for each prompt."""
    samples = rows(run.path / "08_evaluate/best_of_n.jsonl")
    total = len(samples[0]["judge"])
    ns = [2 ** i for i in range(int(math.log2(total)) + 1)]
    out = {"n": ns, "sets": [s["set"] for s in samples], "judge": {}, "reward": {}}
    for model in samples[0]["rewards"]:
        for key in ("judge", "reward"):
            out[key][model.split("/")[1] if "metarm" not in model else "metarm_" + model.split("/")[1]] = [
                [round(best_of(s["rewards"][model], s["judge"] if key == "judge" else s["rewards"][model], n), 4)
                 for n in ns] for s in samples]
    return out


def best_of(rewards, values, n):
    """Mean of `values` at the highest of n rewards over all ways to draw n of the samples without replacement: the
    i-th lowest of N is the best of n in C(i - 1, n - 1) of C(N, n) draws (Nakano et al. 2021, WebGPT, appendix I)."""
    N = len(rewards)
    order = np.argsort(rewards, kind="stable")
    weights = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
    return float(np.array(values)[order] @ weights)


def data_equation_17(run, batches=8, size=8, largest=5_000_000):
    """Eq. 17 on the run's own model and data, in float64: how the change that the meta step makes to the gradient of
    L, grad L(theta') - grad L(theta), lies to grad (grad L . grad J), whole and with grad J held fixed. One entry a
    batch. Left out for large models: it takes second derivatives."""
    import random
    from types import SimpleNamespace
    path = run.path / "04_rm_denoise/baseline"
    if not (path / "manifest.json").exists() or sum(f.stat().st_size for f in path.glob("*.safetensors")) > 4 * largest:
        raise Missing("the model is too large for second derivatives, or not there")
    args = SimpleNamespace(precision="fp32", run=read(run.path / "run.json"))
    model = common.load_reward_model(path, args).double()
    model.model.config._attn_implementation = "eager"  # the fused kernels have no second derivative
    model.model.score = torch.nn.Linear(model.model.score.in_features, 1, bias=False, dtype=torch.float64)
    model.model.score.weight.data = common.load_reward_model(path, args).model.score.weight.data.double()
    tokenizer, eta = common.load_tokenizer(path), metarm.HPARAMS["eta"][1]
    _, pairs = common.encode_pairs(tokenizer, rows(run.path / "03_strength/train.jsonl"), args.run)
    samples = rows(run.path / "07_metarm/round_1/samples.jsonl")
    prompts = common.encode(tokenizer, samples, [], args.run)
    meta = [{**g, "responses": common.finished(s["response_ids"], tokenizer.eos_token_id)}
            for g, s in zip(prompts, samples)]
    draw, theta, out = random.Random(run.seed), list(model.parameters()), {"whole": [], "fixed": [], "size": []}

    def flat(scalar, **more):
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(scalar, theta, allow_unused=False, **more)])

    def L(groups):
        rewards, _ = model(common.collate(groups, tokenizer.pad_token_id, "separate"))
        return denoise.preference_loss(rewards[:, 0], rewards[:, 1])

    for _ in range(batches):
        X_t, X_s = draw.sample(pairs, min(size, len(pairs))), draw.sample(meta, min(size, len(meta)))
        dJ = flat(metarm.difference_loss(model(common.collate(X_s, tokenizer.pad_token_id, "separate"))[0]),
                  create_graph=True)
        dL = flat(L(X_t), create_graph=True)
        whole, fixed = flat(dL @ dJ, retain_graph=True), flat(dL @ dJ.detach())
        saved = [p.data.clone() for p in theta]
        for p, g in zip(theta, dJ.detach().split([p.numel() for p in theta])):
            p.data += eta * g.view_as(p)
        change = flat(L(X_t)) - dL.detach()                                        # Eq. 13 at theta' minus at theta
        for p, s in zip(theta, saved):
            p.data = s
        for name, vector in (("whole", whole), ("fixed", fixed)):
            out[name].append(round(torch.cosine_similarity(change, vector, dim=0).item(), 6))
        out["size"].append(round((change.norm() / dL.norm()).item(), 6))
    return out | {"eta": eta}
