"""Not in the paper: what would serve MetaRM's aim, a reward model that keeps telling the shifted
policy's samples apart. Each variant is stage 07 with other lines 4 to 7 of Algorithm 1, or one more
line after it; eta is its strength, and at eta 0 all of them are the vanilla reward model.

    theta_prime   serves theta': Algorithm 1, and one last ascent before the model is saved
                  (docs/readings.md: why theta, which stage 07 saves, lies below it on J)
    weights       what the text below Eq. 17 says and Algorithm 1 does not do: "can learn more
                  about" the pairs whose loss falls as J rises. Pair i weighs n softmax(-eta d_i /
                  std(d)), d_i the derivative of L_i along grad J, by two more forward passes
    joint         the plain joint objective L - eta J: one gradient of both

    deepspeed lab/metarm_variants.py --variant joint --round 1 --eta 0.1 --name joint_0.1
    deepspeed 07_metarm.py --help                          # its other flags
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402  (the project's root is on the path now)
from lab import experiments  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

metarm = experiments.stage_of("07_metarm.py")
STEP = 0.001  # along grad J / ||grad J||, to take a derivative by: exact to 0.2 % in fp32


def through(gradient):
    """Stage 07's loop with gradient(rm, X_t, X_s, eta) → terms of the loss for lines 4 to 7."""
    def train(run, rm, pairs, meta, evaluate):
        args, steps = run.args, common.steps_for(run.args, len(pairs))
        batches = list(zip(common.batches(pairs, args.batch_size, steps, args.seed),
                           common.batches(meta, args.meta_batch_size, steps, args.seed + 1)))
        for step, (X_t, X_s) in run.steps(batches, rm=rm.engine):
            run.note(loss=gradient(rm, X_t, X_s, args.eta).sum(), grad_norm=rm.step())
            if run.due(step):
                result = evaluate(step, X_s)
        return {**result, "steps": steps}
    return train


def theta_prime(run, rm, pairs, meta, evaluate):
    """Algorithm 1, then Eq. 12 once more; what is measured and saved is theta'."""
    last = []

    def watch(step, X_s):
        last[:] = step, X_s
        return evaluate(step, X_s)
    result = metarm.train(run, rm, pairs, meta, watch)
    metarm.backward(rm, metarm.difference_loss, last[1])
    metarm.ascend(rm.engine, run.args.eta)
    return {**result, **evaluate(*last)}


def pair_loss(rewards):
    """-log sigma(r_c - r_r) of each pair: [n, 2] → [n]."""
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])


@torch.no_grad()
def pair_losses(rm, X):
    """Of every pair of this rank's share of X."""
    return torch.cat([pair_loss(rm(micro)[0]) for micro in rm.micro_batches(X)])


def derivatives(rm, X_t, X_s):
    """Derivative of each L_i of this rank's share along grad J / ||grad J||, from the losses before
    and after a small step of ascent: in fp32 only, bf16 does not see it."""
    before = pair_losses(rm, X_t)
    metarm.backward(rm, metarm.difference_loss, X_s)
    squares = [metarm.safe_get_full_grad(p).double().square().sum() for p in rm.engine.parameters()]
    theta = metarm.ascend(rm.engine, STEP / max(sum(squares).sqrt().item(), 1e-12))
    after = pair_losses(rm, X_t)
    metarm.restore(rm.engine, theta)
    return (after - before) / STEP


def pair_weights(d, eta):
    """n softmax(-eta d / std(d)) over the n pairs of all ranks; d, → this rank's share of them."""
    everyone = torch.tensor(common.gather_rows(
        [((i, common.rank()), x) for i, x in enumerate(d.tolist())]))
    w = len(everyone) * F.softmax(-eta * everyone / everyone.std(correction=0).clamp(min=1e-12), 0)
    return w[common.rank()::common.world_size()].to(d)


def backward(rm, parts):
    """Gradient of the sum of weight * loss(rewards) over parts (weight, loss, micro batch), left in
    the engine. → the terms."""
    terms = []
    for i, (weight, loss, micro) in enumerate(parts, 1):
        rm.engine.set_gradient_accumulation_boundary(i == len(parts))
        terms.append(weight * loss(rm(micro)[0]))
        rm.engine.backward(terms[-1], scale_wrt_gas=False)
    return torch.stack(terms).detach()


def weights(rm, X_t, X_s, eta):
    """The mean of w_i L_i."""
    micros = list(rm.micro_batches(X_t))
    w = pair_weights(derivatives(rm, X_t, X_s), eta).chunk(len(micros))
    return backward(rm, [(1 / len(micros), lambda r, w=w_i: (w * pair_loss(r)).mean(), micro)
                         for w_i, micro in zip(w, micros)])


def joint(rm, X_t, X_s, eta):
    """L - eta J."""
    pairs, meta = list(rm.micro_batches(X_t)), list(rm.micro_batches(X_s))
    return backward(rm, [(1 / len(pairs), metarm.vanilla_loss, micro) for micro in pairs] +
                    [(-eta / len(meta), metarm.difference_loss, micro) for micro in meta])


VARIANTS = {"theta_prime": theta_prime, "weights": through(weights), "joint": through(joint)}


def main(argv=None):
    parser = common.new_parser(__doc__, allow_abbrev=False, epilog="other flags go to stage 07")
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--name", help="name of the output directory (default: the variant's)")
    parser.add_argument("--precision", help="stage 07's; weights takes fp32")
    args, flags = parser.parse_known_args(argv)
    if args.variant == "weights" and args.precision not in (None, "fp32"):
        common.die("the variant `weights` needs --precision fp32: its step is too small for bf16")
    precision = "fp32" if args.variant == "weights" else args.precision
    flags += ["--name", args.name or args.variant, *["--precision", precision] * bool(precision)]
    metarm.main(flags, VARIANTS[args.variant], args.variant)


if __name__ == "__main__":
    common.launch(main)
