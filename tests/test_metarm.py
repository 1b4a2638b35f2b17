"""07 against an independent plain-PyTorch Algorithm 1, on every ZeRO stage, one and two
processes."""
import hashlib
import json
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import python_stages, ranks, run
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
from lab import metarm_variants

STEPS, ETA, LR, N, M = 10, 0.5, 3e-4, 16, 8
FLAGS = ["--round", 1, "--limit", STEPS, "--eta", ETA, "--batch_size", N, "--meta_batch_size", M,
         "--lr", LR, "--meta_prompts", 40, "--eval_every", 5]


def reference(out, eta=ETA, variant="metarm"):
    """Algorithm 1, or a variant of it, with stock transformers, one right-padded row per response,
    torch's AdamW and clip_grad_norm_. Only the order of the data is taken from the project."""
    tokenizer = AutoTokenizer.from_pretrained(out / "01_sft")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(out / "01_sft", num_labels=1,
                                                               attention_dropout=0.0)
    head = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(0))
    model.score.weight.data = head / (model.config.hidden_size + 1) ** 0.5
    model.config.pad_token_id = tokenizer.pad_token_id
    args = SimpleNamespace(**json.loads((out / "run.json").read_text()))
    _, train = common.encode_pairs(tokenizer, common.read_jsonl(out / "03_strength/train.jsonl"),
                                   vars(args))
    samples = common.read_jsonl(out / "07_metarm/round_1/samples.jsonl")
    groups = [{
        **g, "responses": [
            r if r[-1] == tokenizer.eos_token_id else r + [tokenizer.eos_token_id] for r in ids]
    } for g, ids in zip(common.encode(tokenizer, samples, [], vars(args)), (s["response_ids"]
                                                                            for s in samples))]
    meta = [g for i, g in enumerate(groups) if i % 10]

    def rewards(batch):
        rows = [g["prompt"] + r for g in batch for r in g["responses"]]
        padded = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        return model(padded["input_ids"],
                     attention_mask=padded["attention_mask"]).logits.view(len(batch), -1)

    def J(batch):  # Eq. 11, by loops
        total = 0.0
        for r in rewards(batch):
            k = len(r)
            for i in range(k):
                for j in range(i + 1, k):
                    total = total + 2 / k ** 2 / len(batch) / (1 + torch.exp(-(r[i] - r[j]).abs()))
        return total

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (t / 1 if t < 1 else max(0.0, (STEPS - t) / (STEPS - 1))))
    def losses(batch):
        r = rewards(batch)
        return torch.log(1 + torch.exp(-(r[:, 0] - r[:, 1])))

    @torch.no_grad()
    def ascend(gradient):
        for p, g in zip(model.parameters(), gradient):
            p += eta * g

    def pair_weights(X_t, gradient):  # every pair's own gradient, along that of J
        dJ = torch.cat([g.flatten() for g in gradient])
        d = []
        for L_i in losses(X_t):
            dL = torch.autograd.grad(L_i, list(model.parameters()), retain_graph=True)
            d.append(torch.cat([g.flatten() for g in dL]) @ dJ / dJ.norm())
        d = torch.stack(d)
        w = torch.exp(-eta * d / d.std(correction=0))
        return w / w.mean()

    for X_t, X_s in zip(common.batches(train, N, STEPS, 0), common.batches(meta, M, STEPS, 1)):
        gradient = torch.autograd.grad(J(X_s), list(model.parameters()))
        theta = [p.detach().clone() for p in model.parameters()]
        w = pair_weights(X_t, gradient) if variant == "weights" else 1
        if variant in ("metarm", "theta_prime"):
            ascend(gradient)
        optimizer.zero_grad()
        loss = (w * losses(X_t)).mean()
        (loss - eta * J(X_s) if variant == "joint" else loss).backward()
        with torch.no_grad():
            for p, saved in zip(model.parameters(), theta):
                p.copy_(saved)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if variant == "theta_prime":
        ascend(torch.autograd.grad(J(X_s), list(model.parameters())))
    return model.state_dict()


@pytest.mark.parametrize("processes, micro", [(1, 16), (2, 4)])  # accumulation 1 and 2
def test_equals_plain_pytorch(run_copy, tmp_path, processes, micro):
    """ZeRO 0, 1, 2 and 3; each variant, on two processes `weights` at ZeRO-3, whose derivatives are
    differences of losses, which AdamW's first steps enlarge."""
    ranks(processes, "tests/metarm_worker.py", tmp_path, "--out", run_copy, *FLAGS,
          "--micro_batch_size", micro)
    expected = reference(run_copy)
    without = reference(run_copy, eta=0.0)
    effect = max((without[k] - expected[k]).abs().max().item() for k in expected)
    for zero in range(4):
        ours = load_file(tmp_path / f"{zero}.safetensors")
        assert set(ours) == set(expected)
        worst = max((ours[k] - expected[k]).abs().max().item() for k in ours)
        print(
            f"zero {zero}, {processes} process(es): off by {worst:.1e}; the meta step itself "
            f"moves {effect:.1e}"
        )
        assert worst < 1e-5 and effect > 20 * worst
    for variant in metarm_variants.VARIANTS if processes == 1 else ("weights",):
        expected = reference(run_copy, variant=variant)
        ours = load_file(tmp_path / f"{variant}.safetensors")
        off, effect = (sum((x[k] - expected[k]).square().sum().item() for k in expected) ** 0.5
                       for x in (ours, without))
        print(f"{variant}: off by {off:.1e}, moves {effect:.1e}")
        assert effect > 20 * off and (variant == "weights" or off < 1e-4)


def test_eta_zero_is_the_baseline_bit_for_bit(run_copy):
    """With eta = 0 the meta step is made, cleared and undone, and nothing of it is left; nor of an
    error before the first step, after which the samples are not drawn again."""
    flags = ["--out", run_copy, "--round", 1, "--limit", STEPS, "--eta", 0, "--meta_prompts", 40]
    done = run(sys.executable, "-c", f"""
import importlib, sys, common
def train(*_):
    raise MemoryError("no room")
sys.argv = ["07_metarm.py"]
common.launch(lambda: importlib.import_module("07_metarm").main({[*map(str, flags)]}, train))
""", check=False)
    assert done.returncode == 2 and "no room" in done.stdout
    drawn = (run_copy / "07_metarm/round_1.partial/samples.jsonl").stat()
    done = run(sys.executable, "07_metarm.py", *flags, "--lr", 1, check=False)
    assert done.returncode == 2 and "--lr (0.001 then, 1.0 now)" in done.stdout
    run(sys.executable, "07_metarm.py", *flags, "--eval_batch_size", 5, processes=2)  # on all cores
    assert (run_copy / "07_metarm/round_1/samples.jsonl").stat().st_mtime_ns == drawn.st_mtime_ns
    assert not list((run_copy / "07_metarm/round_1").glob("checkpoint*"))
    files = [
        run_copy / d / "model.safetensors" for d in ("07_metarm/round_1", "04_rm_denoise/baseline")]
    digests = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    assert digests[0] == digests[1]


def test_eta_matters(run_copy):
    """A larger eta gives another model: the test above cannot pass by a meta step that does
    nothing."""
    python_stages([
        "07_metarm", "--out", run_copy, "--round", 1, "--limit", STEPS, "--eta", ETA,
        "--meta_prompts", 40])
    ours, baseline = (load_file(run_copy / d / "model.safetensors")
                      for d in ("07_metarm/round_1", "04_rm_denoise/baseline"))
    assert max((ours[k] - baseline[k]).abs().max().item() for k in ours) > 1e-4


def test_algorithm_1_rests_below_the_vanilla_model():
    """Run to its rest on a small convex L, theta' is the minimum of L, and theta, which is served,
    lies below it on J by eta ||dJ||^2 to first order: halving eta halves what is left over
    (docs/readings.md)."""
    metarm = import_module("07_metarm")
    generator = torch.Generator().manual_seed(2)  # whose samples do not tie: there J has a kink
    x_t = torch.randn(64, 2, 5, generator=generator, dtype=torch.float64)  # noise: L has a minimum
    x_s = 3 * torch.randn(8, 4, 5, generator=generator, dtype=torch.float64)

    def gradient(loss, x, theta):
        theta = theta.clone().requires_grad_()
        return torch.autograd.grad(loss(x @ theta), theta)[0]

    def rest(eta):
        theta = torch.zeros(5, dtype=torch.float64) + 0.1
        for _ in range(1500):
            ahead = theta + eta * gradient(metarm.difference_loss, x_s, theta)  # Eq. 12
            theta = theta - gradient(metarm.vanilla_loss, x_t, ahead)           # Eqs. 13, 14
        return theta, ahead

    def J(theta):
        return metarm.difference_loss(x_s @ theta).item()

    vanilla, _ = rest(0.0)
    assert gradient(metarm.vanilla_loss, x_t, vanilla).norm() < 1e-12
    square = gradient(metarm.difference_loss, x_s, vanilla).square().sum().item()
    left = []
    for eta in (0.05, 0.025, 0.0125):
        theta, ahead = rest(eta)
        assert (ahead - vanilla).norm() < 1e-9 and J(theta) < J(vanilla)
        left.append((J(vanilla) - J(theta)) / (eta * square) - 1)
    print("drop over eta ||dJ||^2, minus 1:", left)
    assert abs(left[-1]) < 0.05 and all(1.8 < a / b < 2.2 for a, b in zip(left, left[1:])), left


def test_equation_17():
    """Eqs. 15 to 17, by Taylor (Eq. 16): dL(theta + eta dJ) - dL is Eq. 17's term with dJ held
    fixed up to O(eta^2): halving eta quarters the error (float64). The whole derivative is another
    one, which Eq. 15's factor mends. This also settles Eq. 17's missing eta."""
    metarm = import_module("07_metarm")
    generator = torch.Generator().manual_seed(0)
    x_t, x_s = (torch.randn(8, k, 5, generator=generator, dtype=torch.float64) for k in (2, 4))
    theta = [torch.randn(5, 6, generator=generator, dtype=torch.float64, requires_grad=True),
             torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)]
    before = [p.clone() for p in theta]

    def rewards(x):
        return torch.tanh(x @ theta[0]) @ theta[1]

    def flat(scalar, **more):
        return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, theta, **more)])
    dJ = flat(metarm.difference_loss(rewards(x_s)), create_graph=True)
    J2 = torch.stack([flat(g, retain_graph=True) for g in dJ])
    errors = {"fixed": [], "whole": [], "factor": []}
    for i in range(5):
        eta = 0.2 / 2 ** i
        dL, change, fixed, whole = metarm.equation_17(
            lambda: metarm.vanilla_loss(rewards(x_t)), lambda: metarm.difference_loss(rewards(x_s)),
            theta, eta)
        right = torch.linalg.solve(torch.eye(len(J2), dtype=J2.dtype) + eta * J2, dL + whole)
        errors["factor"].append((right - dL - change).norm().item())
        errors["fixed"].append((change - fixed).norm().item())
        errors["whole"].append((change - whole).norm().item())
    assert all(torch.equal(p, q) for p, q in zip(theta, before)) and dL.norm() > 1e-3
    ratios = {k: [a / b for a, b in zip(x, x[1:])][-2:] for k, x in errors.items()}
    assert all(3.5 < r < 4.5 for name in ("fixed", "factor") for r in ratios[name]), ratios
    assert all(1.8 < r < 2.2 for r in ratios["whole"]), ratios  # off to first order
