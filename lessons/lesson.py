"""What every lesson begins with: a small run of the embedded world to look at, made once, and the
checks of the exercises (the answers are in lessons/solutions/).

    out = lesson.run("03_strength")                the run directory, made where it is missing
    lesson.check("2a", answer)                     right, or what is wrong with it

The run is out_lessons in the project's folder, or LESSON_RUN where that is set: the embedded world
with fewer pairs and shorter PPO than by default, three minutes on two cores for all seven lessons.
"""
import os
import shlex
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore", message="IProgress not found")  # bars of text will do
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import common  # noqa: E402  (the project's root is on the path now)

transformers.utils.logging.disable_progress_bar()
# the last directory that a command makes: the command
MADE = {
    "00_data": "00_data.py --n_pairs 1600 --n_gold 500 --n_sft 5000 --n_prompts 400 --n_eval 60",
    "01_sft": "01_sft.py",
    "02_rm_ensemble/rm_09": "02_rm_ensemble.py",
    "03_strength": "03_strength.py",
    "04_rm_denoise/baseline": "04_rm_denoise.py --methods baseline",
    "04_rm_denoise/soft_margin": "04_rm_denoise.py",
    "05_rm_contrastive/swav_diff": "05_rm_contrastive.py",
    "06_ppo/round_0": "06_ppo.py --iterations 40",
    "07_metarm/round_1": "07_metarm.py --round 1",
}


def run(*wanted):
    """Directory of the small run, once the wanted stages are in it and those of 00 to 03 that go
    before them."""
    out, names = Path(os.environ.get("LESSON_RUN", ROOT / "out_lessons")), list(MADE)
    first = names[:min(4, max(map(names.index, wanted), default=0))]
    for name in [n for n in names if n in first or n in wanted]:
        if (out / name / "manifest.json").exists():
            continue
        command = [sys.executable, *shlex.split(MADE[name]), "--out", str(out.resolve())]
        print("making", name, "...", flush=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout[-2000:]}"
                             f"{done.stderr[-2000:]}")
    return out


def stage(name):
    """A numbered script as a module: its formulas are functions."""
    return import_module(name)


def settings(out, **more):
    """What the functions of common.py ask of a stage's flags: `args`."""
    return SimpleNamespace(**{
        "out": str(out), "run": common.read_json(Path(out) / "run.json"), "precision": "fp32",
        "eval_batch_size": 64, "generate_batch_size": 64, "temperature": 1.0, "top_p": 1.0,
        "repetition_penalty": 1.0, "layout": "auto", "zero": 0, **more})


# ---------------------------------------------------------------- exercises
# Each check takes the answer and says in a line what is wrong with it, or returns None.

def near(found, expected, what, within=2e-4):
    found = torch.as_tensor(found, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    if found.shape != expected.shape:
        return f"{what}: a shape of {tuple(found.shape)}, {tuple(expected.shape)} was expected"
    if not torch.allclose(found, expected, rtol=1e-3, atol=within):
        return f"{what}: yours is {found.tolist()}; that is not it"
    return None


def check_1a(share):
    rows = common.read_jsonl(run() / "00_data/train.jsonl")
    return near(share, sum(r["gold_chosen"] > r["gold_rejected"] for r in rows) / len(rows),
                "the share of labels that gold confirms (equal gold confirms nothing)")


def check_1b(gradient):
    d = torch.linspace(-3, 3, 7, requires_grad=True)
    stage("04_rm_denoise").preference_loss(d, torch.zeros(7)).mul(7).backward()
    return near(gradient(d.detach()), d.grad, "the gradient at d = -3, -2, ... 3")


def check_2a(strength):
    diffs = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for d in (diffs, diffs[:1]):
        rights = stage("03_strength").preference_strength(d)
        for mine, right, what in zip(strength(d.clone()), rights, ("mu_hat", "sigma_hat")):
            if wrong := near(mine, right, f"{what} of {len(d)} voters"):
                return wrong
    return None


def check_2b(share):
    rows = common.read_jsonl(run() / "03_strength/train.jsonl")
    weak = sorted(rows, key=lambda r: r["mean preference difference"])[:round(0.2 * len(rows))]
    return near(share, sum(r["gold_chosen"] < r["gold_rejected"] for r in weak) / len(weak),
                "the share of wrong labels in the weakest fifth", 1.1 / len(weak))


def check_3a(optimum):
    loss = stage("04_rm_denoise").preference_loss
    for alpha, mu in ((0.1, 0.0), (0.2, 0.5), (0.4, -1.0)):
        d = torch.linspace(-6, 6, 120_001)
        losses = [loss(part, torch.zeros(1), mu, alpha) for part in d[::500]]
        rough = d[::500][int(torch.stack(losses).argmin())]
        if abs(float(optimum(alpha, mu)) - float(rough)) > 0.06:
            return f"alpha {alpha}, mu_hat {mu}: the loss is not least at {optimum(alpha, mu)}"
    return None


def check_3b(share):
    rows = [r for r in common.read_jsonl(run("04_rm_denoise/soft_margin") /
                                         "04_rm_denoise/flip/train.jsonl") if r["flipped"]]
    gold = {r["id"]: r["gold_chosen"] - r["gold_rejected"]
            for r in common.read_jsonl(run() / "03_strength/train.jsonl")}
    return near(share, sum(gold[r["id"]] < 0 for r in rows) / len(rows),
                "the share of flips that gold agrees with")


def check_4a(loss):
    h = torch.ones(32, 4)
    return near(loss, stage("05_rm_contrastive").simcse_loss(h, h, 0.05),
                "the loss of 32 equal features")


def check_4b(differences):
    h = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    return near(differences(h.clone()), stage("05_rm_contrastive").contrastive_features(h, True),
                "the differences of three pairs")


def check_5a(kl):
    n = np.array([1, 2, 8, 64])
    return near([float(kl(k)) for k in n], np.log(n) - (n - 1) / n, "KL of best of 1, 2, 8, 64")


def check_5b(advantages):
    rewards, values = torch.tensor([[0., 0., 1.]]), torch.full((1, 3), 0.5)
    right = stage("06_ppo").gae(rewards, values, torch.ones(1, 3), 1.0, 0.95)[0]
    return near(advantages, right[0], "A_1, A_2, A_3")


def check_6a(least):
    loss = stage("07_metarm").difference_loss
    return near([float(least(k)) for k in (1, 2, 4, 8)],
                [float(loss(torch.zeros(3, k))) for k in (1, 2, 4, 8)], "J of k = 1, 2, 4, 8")


def check_6b(step):
    theta, eta, alpha = torch.tensor([1., -2.]), 0.3, 0.1

    def dJ(x):
        return torch.stack([x[1], x[0] ** 2])

    def dL(x):
        return 2 * x - 1
    right = theta - alpha * dL(theta + eta * dJ(theta))
    return near(step(theta.clone(), dL, dJ, alpha, eta), right, "theta after one step")


def check_7a(mend):
    row = mend({"question": "Hi", "good": "Hello.", "bad": "What?"})
    from lab import formats
    read = formats.read_row(row, "pairs", formats.style_of("tiny", "auto"), "mine")
    return None if [read[k] for k in ("prompt", "chosen", "rejected")] == [
        "\n\nHuman: Hi\n\nAssistant:", " Hello.", " What?"] else f"stage 00 reads it as {read}"


def check_7b(keep):
    rows = [{"verdict": v, "split": s, "margin": m} for v, s, m in (
        ("keep", "train", 1.0), ("flip", "train", 0.4), ("soften", "train", -0.1),
        ("keep", "valid", 0.7))]
    found = keep([dict(r) for r in rows])
    if [r["margin"] for r in found] != [1.0, 0.4]:
        return f"of {[(r['verdict'], r['split']) for r in rows]} yours keeps " \
               f"{[(r['verdict'], r['split']) for r in found]}"
    return None


def check(exercise, answer):
    """Say whether an answer is right. → bool"""
    if answer is ... or answer is None:
        print(f"{exercise}: not yet. Put your answer in the place of the dots.")
        return False
    try:
        wrong = globals()[f"check_{exercise}"](answer)
    except Exception as error:  # of the answer's own code
        wrong = f"{type(error).__name__}: {error}"
    print(f"{exercise}: not right yet. {wrong}" if wrong else f"{exercise}: right.")
    return not wrong
