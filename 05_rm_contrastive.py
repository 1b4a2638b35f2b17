"""Stage 05: contrastive learning inside reward modelling (section 3.1): SimCSE (Eq. 9) and SwAV
(Eqs. 7, 8).

Reads 04_rm_denoise/LIKE/train.jsonl (the pairs as that method trains on them: baseline, or
flip_margin, ...), 03_strength/{valid,gold}.jsonl and 01_sft/, writes 05_rm_contrastive/NAME/ for
each method. L_total = L_rm + beta L_cl; L_rm is Eqs. 5 and 6, on both views.

    simcse, swav             features of responses,  H = {f(x, y_c), f(x, y_r)}
    simcse_diff, swav_diff   preference differences,
                             H = {f(x, y_c) - f(x, y_r), f(x, y_r) - f(x, y_c)}

f(x, y) is the hidden state where the reward is read, at the response's end. The two views h_s, h_t
are two passes under different dropout, which is switched on for this stage only. With several
processes the features of all are the batch. features.json has what Figure 11 shows, for the model
and for LIKE's.

Departures from the paper: (1) the paper does not state tau, epsilon, the Sinkhorn iterations, which
are SimCSE's and SwAV's own here, nor for how many steps the prototypes are frozen, our choice;
(2) with gradient accumulation the contrastive batch is one micro batch of every process.

    deepspeed 05_rm_contrastive.py                                      # all four methods
    deepspeed 05_rm_contrastive.py --methods simcse --like flip_margin  # on denoised pairs
"""
import json
import random
from functools import partial

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F

import common

HPARAMS = {
    # name: (paper, small, toy, help)
    "epochs": (1.0, 1.0, 1.0, "passes over the preferences"),
    "batch_size": (16, 16, 32, "global batch, in pairs"),
    "micro_batch_size": (2, 4, 32, "pairs per process and forward pass"),
    "eval_batch_size": (8, 8, 64, "pairs per process when evaluating"),
    "lr": (5e-6, 5e-5, 1e-3, "peak learning rate"),
    "warmup": (0.1, 0.1, 0.1, "share of the steps with rising learning rate"),
    "eval_every": (500, 50, 50, "steps between evaluations, beside each epoch's end"),
    "dropout": (0.05, 0.05, 0.05, "dropout that makes the two views"),
    "simcse_beta": (1.0, 1.0, 1.0, "weight of L_cl, SimCSE"),
    "simcse_tau": (0.05, 0.05, 0.05, "temperature tau of Eq. 9"),
    "swav_beta": (0.1, 0.1, 0.1, "weight of L_cl, SwAV on pairs"),
    "swav_prototypes": (50, 50, 50, "K, SwAV on pairs"),
    "swav_diff_beta": (0.5, 0.5, 0.5, "weight of L_cl, SwAV on differences"),
    "swav_diff_prototypes": (20, 20, 20, "K, SwAV on differences"),
    "swav_tau": (0.1, 0.1, 0.1, "temperature tau of Eq. 8"),
    "epsilon": (0.05, 0.05, 0.05, "Sinkhorn regularisation"),
    "sinkhorn_iterations": (3, 3, 3, "Sinkhorn rounds"),
    "freeze_prototypes": (100, 50, 20, "steps with fixed prototypes"),
    "tsne_pairs": (500, 200, 150, "validation pairs drawn in Figure 11"),
    **common.TRAINING,
    # attention with dropout keeps every layer's weights: 24 GB at 0.1 billion parameters
    "gradient_checkpointing": (True, True, False, "recompute activations in the backward pass"),
}
METHODS = ("simcse", "simcse_diff", "swav", "swav_diff")


def simcse_loss(h_s, h_t, tau):
    """Eq. 9: mean_i of -log [exp(sim(h_s_i, h_t_i) / tau) / sum_j exp(sim(h_s_i, h_t_j) / tau)].

    h_s, h_t: the two views, [N, H]; sim is the cosine; positives are on the diagonal. → scalar.
    """
    similarity = F.normalize(h_s, dim=-1) @ F.normalize(h_t, dim=-1).T          # [N, N]
    return F.cross_entropy(similarity / tau, torch.arange(len(h_s), device=h_s.device))


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Codes q of SwAV: scores h^T c [N, K] → [N, K], rows sum to 1, columns to about N / K. No
    gradient, fp32."""
    q = torch.exp((scores.float() - scores.max()) / epsilon)                    # [N, K]
    N, K = q.shape
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True).clamp(min=1e-30) / K                     # prototypes alike
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30) / N                     # one unit a sample
    return q * N


def swav_loss(h_s, h_t, prototypes, tau, epsilon, iterations):
    """Eqs. 7 and 8: l(h_t, q_s) + l(h_s, q_t), l(h, q) = -sum_k q_k log softmax_k(h^T c_k / tau),
    mean over N.

    h_s, h_t: [N, H]; prototypes c: [K, H]; all are L2-normalised here. → scalar.
    """
    c = F.normalize(prototypes, dim=-1)
    scores_s = F.normalize(h_s, dim=-1) @ c.T                                   # [N, K]
    scores_t = F.normalize(h_t, dim=-1) @ c.T
    q_s, q_t = (sinkhorn(scores, epsilon, iterations) for scores in (scores_s, scores_t))

    def fit(scores, q):                                                         # Eq. 8
        return -(q * F.log_softmax(scores / tau, -1)).sum(-1).mean()
    return fit(scores_t, q_s) + fit(scores_s, q_t)                              # Eq. 7


def preference_loss(r_chosen, r_rejected, margin, smoothing):
    """L_rm, Eqs. 5 and 6, as in stage 04: [B] each → scalar."""
    d = r_chosen - r_rejected - margin
    return -((1 - smoothing) * F.logsigmoid(d) + smoothing * F.logsigmoid(-d)).mean()


def contrastive_features(h, on_differences):
    """Features [B, 2, H] (chosen, rejected) → the set H of section 3.1.1, [2B, H]."""
    chosen, rejected = h.float().unbind(1)
    return torch.cat([chosen - rejected, rejected - chosen] if on_differences else
                     [chosen, rejected])


def gather_features(h):
    """This rank's features [N, H] → those of all ranks [W*N, H]; gradient flows to this rank's. A
    loss of them, times W, then has exactly the one-process gradient once the engine has averaged
    over the W ranks."""
    if common.world_size() == 1:
        return h
    parts = [torch.empty_like(h) for _ in range(common.world_size())]
    dist.all_gather(parts, h.detach().contiguous())
    parts[common.rank()] = h
    return torch.cat(parts)


class ContrastiveRewardModel(common.RewardModel):
    """A reward model with K prototypes beside it, which the saved checkpoint leaves out."""

    def __init__(self, model, K, seed):
        super().__init__(model)
        generator = torch.Generator().manual_seed(seed)
        weight = F.normalize(torch.randn(K, model.config.hidden_size, generator=generator), dim=-1)
        self.prototypes = torch.nn.Parameter(weight.to(next(model.parameters()).dtype))

    def forward(self, batch):
        # the product is a copy that outlives ZeRO-3's gathering of the parameter for this pass
        return *super().forward(batch), self.prototypes * 1


def contrastive_loss(h, prototypes, args, name, step):
    """L_cl of one micro batch: features of both views [2B, 2, H], s first → scalar."""
    h = contrastive_features(h, name.endswith("_diff"))                         # [2 * 2B, H]
    h = h.view(2, 2, -1, h.shape[-1])                                           # [c|r, s|t, B, H]
    h_s, h_t = (gather_features(view.flatten(0, 1)) for view in h.unbind(1))    # [N', H] each
    if name.startswith("simcse"):
        return simcse_loss(h_s, h_t, args.simcse_tau)
    # Every rank computes the whole loss, so the prototypes' gradient is W times too large once the
    # loss is scaled by W; while they are frozen it is zero.
    share = 0.0 if step <= args.freeze_prototypes else 1 / common.world_size()
    prototypes = share * prototypes + (1 - share) * prototypes.detach()
    return swav_loss(h_s, h_t, prototypes.float(), args.swav_tau, args.epsilon,
                     args.sinkhorn_iterations)


def train_method(args, method, name, tokenizer, train, valid_rows, gold, sft):
    """Train and save one reward model with L_rm + beta L_cl."""
    common.set_seed(args.seed)
    like = f"04_rm_denoise/{args.like}"
    run = common.begin(args, f"05_rm_contrastive/{name}",
                       [like, "03_strength", "01_sft"], keep=True)
    if run is None:
        return
    valid_rows, valid = common.encode_pairs(tokenizer, valid_rows, args.run)
    steps = common.steps_for(args, len(train))
    beta = args.hparams["simcse_beta" if method.startswith("simcse") else f"{method}_beta"]
    K = args.hparams["swav_diff_prototypes" if method == "swav_diff" else "swav_prototypes"]
    model = common.load_reward_model(sft, args, head_seed=args.seed, dropout=args.dropout).model
    rm = common.RewardEngine(ContrastiveRewardModel(model, K, args.seed), run, tokenizer, train,
                             steps)
    common.set_seed(args.seed * 1000 + common.rank())  # dropout differs between ranks
    batches = common.batches(train, args.batch_size, steps, args.seed)
    for step, batch in run.steps(batches, rm=rm.engine):
        for micro in common.micro_batches(batch, args.micro_batch_size):
            views = rm.collate(micro + micro)                                   # view s, then t
            rewards, h, prototypes = rm(views)                     # [2B, 2], [2B, 2, H], [K, H]
            if step == 1 and torch.equal(h, rm(views)[1]):  # place by place: rounding depends on it
                common.die(f"the two views are equal: dropout {args.dropout} has no effect on a "
                           f"{model.config.model_type} model; its config needs one that is used")
            loss_rm = preference_loss(*rewards.unbind(1), views["margin"], views["smoothing"])
            loss_cl = contrastive_loss(h, prototypes, args, method, step)
            # loss_cl is on every rank that of all ranks' micro batches, loss_rm this rank's
            rm.backward(loss_rm + beta * common.world_size() * loss_cl)
            run.note(loss_rm=loss_rm, loss_cl=loss_cl, grad_norm=rm.step())
        if run.due(step):
            result = run.log(step, **common.accuracies(rm.score(valid), valid_rows))
    if gold:
        result["accuracy_gold"] = common.accuracies(rm.score(gold), gold)["accuracy_original"]
    rm.save()
    result |= write_features(run, {args.like: args.out + "/" + like, name: run.dir}, valid,
                             tokenizer)
    run.finish(**result, steps=steps)


def overlap(h):
    """How far chosen and rejected features [N, 2, H] overlap, for each feature: its silhouette (1:
    apart, 0: mixed) and whether a linear probe fitted on the other folds tells what it is (mean
    0.5: it cannot). → [N, 2] each."""
    from sklearn.linear_model import LogisticRegression  # a second to import, so only where needed
    from sklearn.metrics import silhouette_samples
    from sklearn.model_selection import cross_val_predict
    x, y = h.flatten(0, 1).numpy(), torch.tensor([0, 1]).repeat(len(h)).numpy()
    folds, probe = min(5, len(h)), LogisticRegression(max_iter=1000)
    if folds < 2:  # of one pair neither can be told
        return numpy.full((2, len(h), 2), numpy.nan)
    told = cross_val_predict(probe, x, y, cv=folds) == y
    return silhouette_samples(x, y).reshape(-1, 2), told.reshape(-1, 2).astype(float)


def write_features(run, models, valid, tokenizer):
    """Figure 11's numbers: for each saved model {name: directory} the t-SNE, silhouettes and probe
    of chosen and rejected features of some validation pairs. → the last one's metrics."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits
    args = run.args
    drawn = random.Random(args.seed).sample(valid, min(args.tsne_pairs, len(valid)))
    data = {"ids": [g["id"] for g in drawn]}
    for name, path in models.items():
        _, h = common.score_by(path, drawn, args, tokenizer, features=True)     # [N, 2, H]
        tsne = TSNE(perplexity=min(30, len(h) / 2), random_state=args.seed)
        with threadpool_limits(1):  # its sums depend on the number of threads
            silhouettes, told = overlap(h)
            points = tsne.fit_transform(h.flatten(0, 1).numpy())                # [2N, 2]
        data[name] = {"points": points.reshape(-1, 2, 2).round(2).tolist(),     # [pair][c, r]
                      "silhouette": silhouettes.round(4).tolist(), "probe_right": told.tolist()}
    if common.rank() == 0:
        common.write_text(run.dir / "features.json", json.dumps(data) + "\n")
    return {"silhouette": float(silhouettes.mean()), "linear_probe_accuracy": float(told.mean())}


def train_methods(args, strength, like, sft, methods):
    """Set this process up, and train these methods one after another on the pairs of stage 04."""
    common.setup(args, one_thread=True)
    args.hparams["like"] = args.like
    tokenizer = common.load_tokenizer(sft)
    _, train = common.encode_pairs(tokenizer, common.read_jsonl(like / "train.jsonl"), args.run)
    valid, gold = (common.read_jsonl(strength / f"{name}.jsonl") for name in ("valid", "gold"))
    _, gold = common.encode_pairs(tokenizer, gold, args.run)
    for method in methods:
        name = args.name or (method if args.like == "baseline" else f"{method}_{args.like}")
        train_method(args, method, name, tokenizer, train, valid, gold, sft)


def main(argv=None):
    def add_flags(flag):
        flag("--methods", nargs="+", choices=METHODS, default=list(METHODS),
             help="which to train (default: all)")
        flag("--like", default="baseline", metavar="NAME", help="train on the pairs, margins and "
             "soft labels of this model of stage 04 (default: baseline)")
        flag("--name", help="name of the output directory (with one method)")
    args = common.parse_args(__doc__, HPARAMS, add_flags, argv)
    strength = common.require(args, "03_strength", "python 03_strength.py")
    sft = common.require(args, "01_sft", "python 01_sft.py")
    like = common.require(args, f"04_rm_denoise/{args.like}", "python 04_rm_denoise.py")
    if args.name and len(args.methods) > 1:
        common.die("--name goes with one method: add --methods NAME")
    if args.name and (not common.is_name(args.name) or args.name == args.like):
        common.die(f"--name {args.name} cannot be a directory of this stage")
    common.side_by_side(args, args.methods, partial(train_methods, args, strength, like, sft))


if __name__ == "__main__":
    common.launch(main)
