"""Stage 05: contrastive learning inside reward modelling (section 3.1): SimCSE (Eq. 9) and SwAV (Eqs. 7, 8).

Reads 03_strength/, 01_sft/ and 04_rm_denoise/baseline (to compare), writes 05_rm_contrastive/NAME/ for each method
and 05_rm_contrastive/figures/ (Figure 11). L_total = L_rm + beta L_cl; L_rm is stage 04's loss, on both views.

    simcse, swav             features of responses,  H = {f(x, y_c), f(x, y_r)}
    simcse_diff, swav_diff   preference differences, H = {f(x, y_c) - f(x, y_r), f(x, y_r) - f(x, y_c)}

f(x, y) is the hidden state at the response's EOS. The two views h_s, h_t are two passes under different dropout,
which is switched on for this stage only. With several processes the features of all of them are the batch.

Departures from the paper: (1) the paper does not state tau, epsilon, the Sinkhorn iterations or the length of the
prototypes' freeze; SimCSE's and SwAV's own values are used; (2) with gradient accumulation the contrastive batch
is one micro batch of every process.

    deepspeed 05_rm_contrastive.py                                  # all four methods
    deepspeed 05_rm_contrastive.py --methods simcse --flip_below 0.2 --margin --name simcse_flip_margin
"""
import json
import random
from importlib import import_module
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import audit
import common

denoise = import_module("04_rm_denoise")

HPARAMS = {
    # name: (paper, toy, help)
    "epochs": (1.0, 1.0, "passes over the preferences"),
    "batch_size": (16, 32, "global batch, in pairs"),
    "micro_batch_size": (2, 32, "pairs per process and forward pass"),
    "eval_batch_size": (8, 64, "pairs per process when evaluating"),
    "lr": (5e-6, 1e-3, "peak learning rate"),
    "warmup": (0.1, 0.1, "share of the steps with rising learning rate"),
    "eval_every": (500, 50, "steps between evaluations"),
    "dropout": (0.05, 0.05, "dropout that makes the two views"),
    "simcse_beta": (1.0, 1.0, "weight of L_cl, SimCSE"),
    "simcse_tau": (0.05, 0.05, "temperature tau of Eq. 9"),
    "swav_beta": (0.1, 0.1, "weight of L_cl, SwAV on pairs"),
    "swav_prototypes": (50, 50, "K, SwAV on pairs"),
    "swav_diff_beta": (0.5, 0.5, "weight of L_cl, SwAV on differences"),
    "swav_diff_prototypes": (20, 20, "K, SwAV on differences"),
    "swav_tau": (0.1, 0.1, "temperature tau of Eq. 8"),
    "epsilon": (0.05, 0.05, "Sinkhorn regularisation"),
    "sinkhorn_iterations": (3, 3, "Sinkhorn rounds"),
    "freeze_prototypes": (100, 20, "steps with fixed prototypes"),
    "tsne_pairs": (500, 150, "validation pairs drawn in Figure 11"),
    **common.TRAINING,
}
INPUTS = ["03_strength", "01_sft"]
METHODS = ("simcse", "simcse_diff", "swav", "swav_diff")


def simcse_loss(h_s, h_t, tau):
    """Eq. 9: mean over i of -log [ exp(sim(h_s_i, h_t_i) / tau) / sum_j exp(sim(h_s_i, h_t_j) / tau) ].

    h_s, h_t: the two views, [N, H]; sim is the cosine; the positives are on the diagonal. → scalar.
    """
    similarity = F.normalize(h_s, dim=-1) @ F.normalize(h_t, dim=-1).T             # [N, N]
    return F.cross_entropy(similarity / tau, torch.arange(len(h_s), device=h_s.device))


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Codes q of SwAV: scores h^T c [N, K] → [N, K], rows sum to 1, columns to about N / K. No gradient, fp32."""
    q = torch.exp((scores.float() - scores.max()) / epsilon)                       # [N, K]
    N, K = q.shape
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True).clamp(min=1e-30) / K                        # prototypes equally used
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30) / N                        # then one unit per sample
    return q * N


def swav_loss(h_s, h_t, prototypes, tau, epsilon, iterations):
    """Eqs. 7 and 8: l(h_t, q_s) + l(h_s, q_t) with l(h, q) = -sum_k q_k log softmax_k(h^T c_k / tau), mean over N.

    h_s, h_t: [N, H]; prototypes c: [K, H]; all are L2-normalised here. → scalar.
    """
    c = F.normalize(prototypes, dim=-1)
    scores_s, scores_t = F.normalize(h_s, dim=-1) @ c.T, F.normalize(h_t, dim=-1) @ c.T     # [N, K]
    q_s, q_t = sinkhorn(scores_s, epsilon, iterations), sinkhorn(scores_t, epsilon, iterations)

    def fit(scores, q):                                                            # Eq. 8
        return -(q * F.log_softmax(scores / tau, -1)).sum(-1).mean()
    return fit(scores_t, q_s) + fit(scores_s, q_t)                                 # Eq. 7


def contrastive_features(h, on_differences):
    """EOS features [B, 2, H] (chosen, rejected) → the set H of section 3.1.1, [2B, H]."""
    chosen, rejected = h.float().unbind(1)
    return torch.cat([chosen - rejected, rejected - chosen] if on_differences else [chosen, rejected])


def gather_features(h):
    """This rank's features [N, H] → those of all ranks [W*N, H]; gradient flows to this rank's own. A loss of them,
    times W, then has exactly the one-process gradient once the engine has averaged over the W ranks."""
    if common.world_size() == 1:
        return h
    parts = [torch.empty_like(h) for _ in range(common.world_size())]
    dist.all_gather(parts, h.detach().contiguous())
    parts[common.rank()] = h
    return torch.cat(parts)


class ContrastiveRewardModel(common.RewardModel):
    """A reward model with K prototypes beside it; they are not part of the saved checkpoint."""

    def __init__(self, model, prototypes, seed):
        super().__init__(model)
        weight = torch.randn(prototypes, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
        self.prototypes = torch.nn.Parameter(F.normalize(weight, dim=-1).to(next(model.parameters()).dtype))

    def forward(self, batch, values=False):
        # the product is a copy that outlives ZeRO-3's gathering of the parameter for this forward pass
        return *super().forward(batch, values), self.prototypes * 1


def contrastive_loss(h, prototypes, args, name, step):
    """L_cl of one micro batch: features of both views [2B, 2, H] (view s first) → scalar over all ranks."""
    h = contrastive_features(h, name.endswith("_diff"))                            # [2 * 2B, H]
    h = h.view(2, 2, -1, h.shape[-1])                                              # [chosen|rejected, s|t, B, H]
    h_s, h_t = (gather_features(view.flatten(0, 1)) for view in h.unbind(1))       # [N', H] each
    if name.startswith("simcse"):
        return simcse_loss(h_s, h_t, args.simcse_tau)
    # Every rank computes the whole loss, so the prototypes' gradient is W times too large once the loss is scaled
    # by W; while they are frozen it is zero (not None: every engine must see every parameter).
    share = 0.0 if step <= args.freeze_prototypes else 1 / common.world_size()
    prototypes = share * prototypes + (1 - share) * prototypes.detach()
    return swav_loss(h_s, h_t, prototypes.float(), args.swav_tau, args.epsilon, args.sinkhorn_iterations)


def train_method(args, method, name, rows, valid_rows, sft, tokenizer):
    """Train and save one reward model with L_rm + beta L_cl."""
    common.set_seed(args.seed)
    stage = audit.start_stage(args, f"05_rm_contrastive/{name}", INPUTS)
    train, pad_id = denoise.encode_labelled(tokenizer, rows, args.run), tokenizer.pad_token_id
    valid_rows, valid = common.encode_pairs(tokenizer, valid_rows, args.run)
    steps = common.steps_for(args, len(train), args.batch_size, args.epochs)
    beta = args.hparams["simcse_beta" if method.startswith("simcse") else f"{method}_beta"]
    K = args.hparams["swav_diff_prototypes" if method == "swav_diff" else "swav_prototypes"]
    model = common.load_reward_model(sft, args, head_seed=args.seed, dropout=args.dropout)
    engine = common.make_engine(ContrastiveRewardModel(model.model, K, args.seed), args, args.batch_size, args.lr,
                                steps, args.warmup)
    engine.eval()
    layout = common.choose_layout(args, lambda batch: engine(batch)[0], train)
    engine.train()
    common.set_seed(args.seed * 1000 + common.rank())  # dropout differs between ranks
    sets = denoise.three_sets(valid_rows)

    done, _ = audit.resume(stage, {"rm": engine}, steps)
    batches = islice(common.batches(train, args.batch_size, steps, args.seed), done, None)
    for step, batch in enumerate(common.progress(batches, name, steps, done), done + 1):
        for micro in common.micro_batches(batch, args.micro_batch_size):
            views = micro + micro                                                  # view s, then view t
            rewards, h, prototypes = engine(common.collate(views, pad_id, layout))         # [2B, 2], [2B, 2, H]
            if step == 1 and torch.equal(h[:len(micro)], h[len(micro):]):
                common.die(f"the two views are equal: dropout {args.dropout} has no effect on a "
                           f"{model.model.config.model_type} model; its config needs a dropout that is used")
            loss_rm = denoise.preference_loss(rewards[:, 0], rewards[:, 1], denoise.column(views, "margin"),
                                              denoise.column(views, "smoothing"))
            loss_cl = contrastive_loss(h, prototypes, args, method, step)
            # loss_cl is the loss of the whole global batch on every rank, loss_rm this rank's share of a mean
            engine.backward(loss_rm + beta * common.world_size() * loss_cl)
            grad_norm = common.step(engine)
        if step % args.eval_every == 0 or step == steps:
            result = denoise.accuracies(common.score(engine, valid, args, layout, pad_id), sets)
            audit.log_metrics(stage, step, loss_rm=loss_rm, loss_cl=loss_cl, **result)
        audit.end_step(stage, step, batch, loss_rm=loss_rm, loss_cl=loss_cl, grad_norm=grad_norm)

    common.save_model(engine, stage.dir, tokenizer)
    audit.finish_stage(stage, {**result, "loss_cl": loss_cl.item(), "steps": steps})
    common.free(engine)


def overlap(h):
    """How far chosen and rejected features [N, 2, H] overlap, for each feature: its silhouette (1: apart, 0: mixed)
    and whether a linear probe fitted on the other folds tells what it is (mean 0.5: it cannot). → [N, 2] each."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import silhouette_samples
    from sklearn.model_selection import cross_val_predict
    x, y = h.flatten(0, 1).numpy(), torch.tensor([0, 1]).repeat(len(h)).numpy()
    folds = min(5, len(h))
    told = cross_val_predict(LogisticRegression(max_iter=1000), x, y, cv=folds) == y if folds > 1 else y * float("nan")
    return silhouette_samples(x, y).reshape(-1, 2), told.reshape(-1, 2).astype(float)


def figure_11(args, valid_rows, tokenizer):
    """Figure 11: t-SNE of chosen and rejected features under the baseline and every finished standard method."""
    names = ["04_rm_denoise/baseline", *(f"05_rm_contrastive/{m}" for m in METHODS)]
    stage = audit.start_stage(args, "05_rm_contrastive/figures", ["03_strength/valid.jsonl", *names])
    drawn = random.Random(args.seed).sample(valid_rows, min(args.tsne_pairs, len(valid_rows)))
    _, groups = common.encode_pairs(tokenizer, drawn, args.run)
    metrics, panels = {}, []
    for name in names:
        model = common.frozen(common.load_reward_model(Path(args.out) / name, args), args)
        layout = common.choose_layout(args, lambda batch: model(batch)[0], groups)
        _, h = common.score(model, groups, args, layout, tokenizer.pad_token_id, features=True)     # [N, 2, H]
        silhouettes, told = overlap(h)
        metrics[name.split("/")[1]] = m = {"silhouette": float(silhouettes.mean()),
                                           "linear_probe_accuracy": float(told.mean())}
        panels.append((name.split("/")[1], m, h, silhouettes, told))
    if common.rank() == 0:
        from sklearn.manifold import TSNE
        plt = audit.pyplot()
        figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.2), squeeze=False)
        data = {"ids": [g["id"] for g in groups]}
        for axis, (name, m, h, silhouettes, told) in zip(axes[0], panels):
            points = TSNE(perplexity=min(30, len(h) / 2), random_state=args.seed).fit_transform(h.flatten(0, 1).numpy())
            for k, label in enumerate(("chosen", "rejected")):
                axis.scatter(*points[k::2].T, s=5, label=label)
            axis.set(title=f"{name}\nsilhouette {m['silhouette']:.3f}, probe {m['linear_probe_accuracy']:.2f}",
                     xticks=[], yticks=[])
            data[name] = {"points": points.reshape(-1, 2, 2).round(2).tolist(),
                          "silhouette": silhouettes.round(4).tolist(), "probe_right": told.tolist()}
        axes[0][0].legend()
        figure.suptitle("Figure 11: features at EOS, t-SNE", y=1.08)
        figure.savefig(stage.dir / "figure_11.png")
        audit.write_text(stage.dir / "figure_11.json", json.dumps(data) + "\n")  # [pair][chosen, rejected]
    audit.finish_stage(stage, metrics)


def main(argv=None):
    def add_flags(flag):
        flag("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to train (default: all)")
        denoise.add_switches(flag)
    args = audit.parse_args(__doc__, HPARAMS, add_flags, argv)
    strength = audit.require(args, "03_strength", "python 03_strength.py")
    sft = audit.require(args, "01_sft", "python 01_sft.py")
    audit.require(args, "04_rm_denoise/baseline", "python 04_rm_denoise.py")
    denoise.check_name(args)
    switches = {"flip_below": 0.0, "margin": False, "smoothing": 0.0} | denoise.given_switches(args)
    percentile = switches.pop("percentile", [0, 100])
    standard = not denoise.given_switches(args) and not args.name
    common.setup(args)
    tokenizer = common.load_tokenizer(sft)
    train, valid = (audit.read_jsonl(strength / f"{split}.jsonl") for split in ("train", "valid"))
    train = denoise.relabel(denoise.percentile_slice(train, *percentile), **switches)
    args.hparams |= switches | {"percentile": percentile}
    if standard:
        audit.begin_launch(args, "05_rm_contrastive")
    for method in args.methods:
        name = denoise.directory_name(args, method)
        if not (standard and audit.kept(args, f"05_rm_contrastive/{name}", INPUTS)):
            train_method(args, method, name, train, valid, sft, tokenizer)
    if standard and all((Path(args.out) / f"05_rm_contrastive/{m}/manifest.json").exists() for m in METHODS):
        figure_11(args, valid, tokenizer)


if __name__ == "__main__":
    audit.run(main)
