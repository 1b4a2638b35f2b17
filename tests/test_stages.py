"""The stages as they run: one and two processes, dropout and views, PPO, what is kept, refused and
recorded."""
import hashlib
import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, launched, python_stages, ranks, run
from safetensors.torch import load_file
from scipy.stats import norm

import common
from lab import verify

FLAGS = {"seed": 0, "precision": "fp32", "zero": 0, "layout": "shared"}


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def python(code, *argv):
    """A Python process in the repository's root; `stage(name, *flags)` runs one and returns its
    exit code."""
    head = ("import importlib, json, os, sys; from pathlib import Path\n"
            "def stage(name, *flags, **more):\n"
            "    try: importlib.import_module(name).main([str(x) for x in flags], **more)\n"
            "    except SystemExit as stop: return stop.code\n"
            "    return 0\n")
    return run(sys.executable, "-c", head + code, *argv).stdout


def worst(a, b):
    assert set(a) == set(b)
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---------------------------------------------------------------- two processes are one process
# (01, 04, 05; 07 has its own file)

SFT = ["--limit", 5, "--lr", 1e-4, "--hidden_size", 64, "--layers", 2]
DENOISE = ["--methods", "soft_margin", "--limit", 5, "--lr", 1e-4, "--eval_every", 5]


@pytest.fixture(scope="module")
def one_process(small_run, tmp_path_factory):
    """04's and 01's few steps in one process, and 01's start (a learning rate of nothing)."""
    out = Path(shutil.copytree(small_run, tmp_path_factory.mktemp("one") / "out"))
    python(f"out, sft, denoise = {str(out)!r}, {SFT!r}, {DENOISE!r}\n"
           "assert stage('04_rm_denoise', '--out', out, *denoise, '--name', 'one') == 0\n"
           "assert stage('01_sft', '--out', out, *sft) == 0\n"
           "Path(out, '01_sft').rename(Path(out, 'one'))\n"
           "assert stage('01_sft', '--out', out, *sft, '--lr', 1e-12) == 0\n")
    return out


def test_01_on_two_processes(one_process, run_copy):
    # four micro batches a step
    launched(2, "01_sft.py", "--out", run_copy, *SFT, "--micro_batch_size", 4)
    start, one, two = (load_file(d / "model.safetensors") for d in (
        one_process / "01_sft", one_process / "one", run_copy / "01_sft"))
    assert worst(one, two) < 1e-5 and worst(one, start) > 2e-4
    one, two = (lines(d / "metrics.jsonl")[-1] for d in (one_process / "one", run_copy / "01_sft"))
    assert one["valid_perplexity"] == pytest.approx(two["valid_perplexity"], rel=1e-5)


def test_04_on_two_processes(one_process, run_copy):
    ranks(2, "04_rm_denoise.py", "--out", run_copy, *DENOISE, "--name", "two",
          "--micro_batch_size", 8)
    one, two = one_process / "04_rm_denoise/one", run_copy / "04_rm_denoise/two"
    states = [load_file(d / "model.safetensors") for d in (one, two)]
    start = load_file(run_copy / "01_sft/model.safetensors")
    moved = max((states[0][k] - start[k]).abs().max().item() for k in states[0] if k in start)
    assert worst(*states) < 1e-5 and moved > 2e-4
    accuracies = [{
        k: v
        for k, v in lines(d / "metrics.jsonl")[-1].items()
        if k.startswith("accuracy")}
                  for d in (one, two)]
    assert accuracies[0] == accuracies[1] and len(accuracies[0]) == 5  # training pairs', gold's
    logged = [lines(d / "metrics.jsonl")[-1]["loss"] for d in (one, two)]  # of all ranks and micros
    assert logged[0] == pytest.approx(logged[1], abs=2e-6)


CASES = ["simcse", "swav", "swav_diff"]


def test_05_on_two_processes_and_all_zero_stages(run_copy, tmp_path):
    """The global batch's features make the loss, and every gradient has its one-process size
    (prototypes too)."""
    flags = [
        "--", "--out", run_copy, "--limit", 3, "--batch_size", 16, "--lr", 0.05, "--warmup", 0,
        "--freeze_prototypes", 1, "--max_grad_norm", 0, "--like", "soft_margin", "--tsne_pairs", 5]
    several = [
        f"{m}:{z}" for m, z in [("simcse", 0), ("swav", 0), ("swav_diff",
                                                             0), ("swav", 2), ("simcse",
                                                                               3), ("swav", 3)]]
    worker = "tests/contrastive_worker.py"
    python(f"assert stage('04_rm_denoise', '--out', {str(run_copy)!r}, '--methods', 'soft_margin',"
           " '--limit', 1) == 0")
    ranks(1, worker, tmp_path / "one", *[f"{m}:0" for m in CASES], *flags, "--micro_batch_size", 8)
    ranks(2, worker, tmp_path / "two", *several, *flags, "--micro_batch_size", 4)
    prototypes = torch.nn.functional.normalize(
        torch.randn(50, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    for case in several:
        method, zero = case.split(":")
        one, two = torch.load(tmp_path / f"one_{method}_0.pt"), torch.load(
            tmp_path / f"two_{method}_{zero}.pt")
        assert worst(one, two) < 1e-5, case
        if method == "swav":
            # far more than the tolerance
            assert (one["prototypes"] - prototypes).abs().max() > 2e-4
        logged = [lines(run_copy / f"05_rm_contrastive/{n}_{method}_{z}/metrics.jsonl")[-1]
                  for n, z in (("one", 0), ("two", zero))]
        assert logged[0]["loss_cl"] == pytest.approx(logged[1]["loss_cl"], abs=2e-5), case
    assert worst(torch.load(tmp_path / "one_simcse_0.pt"),
                 torch.load(tmp_path / "one_swav_0.pt")) > 1e-3


# ---------------------------------------------------------------- 05: views, gradients, what is
# saved

def preference_groups(out, n):
    tokenizer = common.load_tokenizer(out / "01_sft")
    run_json = json.loads((out / "run.json").read_text())
    return tokenizer, common.encode_pairs(tokenizer,
                                          lines(out / "03_strength/train.jsonl")[:n], run_json)[1]


@pytest.mark.parametrize("method", ["simcse", "simcse_diff", "swav", "swav_diff"])
def test_views_differ_and_the_contrastive_loss_reaches_the_backbone(small_run, method):
    contrastive = import_module("05_rm_contrastive")
    tokenizer, groups = preference_groups(small_run, 8)
    args = SimpleNamespace(**FLAGS, simcse_tau=0.05, swav_tau=0.1, epsilon=0.05,
                           sinkhorn_iterations=3, freeze_prototypes=0)
    torch.manual_seed(0)
    model = common.load_reward_model(small_run / "01_sft", args, head_seed=0, dropout=0.05)
    model = contrastive.ContrastiveRewardModel(model.model, 10, 0).train()
    _, h, prototypes = model(common.collate(groups + groups, tokenizer.pad_token_id))
    assert (h[:8] - h[8:]).abs().amax(-1).min() > 1e-4  # every response has two views
    contrastive.contrastive_loss(h, prototypes, args, method, step=1).backward()
    assert model.model.get_input_embeddings().weight.grad.abs().max() > 1e-6
    grad = model.prototypes.grad
    assert (grad is not None and grad.abs().max() > 1e-6) == method.startswith("swav")
    model.eval()
    for layout, most in (("separate", 0), ("shared", 1e-5)):  # it was the dropout
        _, h, _ = model(common.collate(groups + groups, tokenizer.pad_token_id, layout))
        assert (h[:8] - h[8:]).abs().max() <= most
    batch = common.collate(groups, tokenizer.pad_token_id)
    assert torch.equal(model(batch)[1], model(batch)[1])  # as stage 05 asks


@pytest.fixture(scope="module")
def more_stages(small_run, tmp_path_factory):
    """Stages of one process on a copy: 04's slice, 05, 08 by both judges, and refusals. → (out,
    exit codes, text)."""
    out = Path(shutil.copytree(small_run, tmp_path_factory.mktemp("more") / "out"))
    text = python(
        f"out = ['--out', {str(out)!r}]\n"
        "codes = {}\n"
        "codes['slice'] = stage('04_rm_denoise', *out, '--methods', 'flip', '--percentile', 0, 10,"
        " '--flip_below', 1,"
        " '--limit', 1)\n"
        "contrastive = lambda *more: stage('05_rm_contrastive', *out, '--limit', 2, *more)\n"
        "codes['swav'] = contrastive('--methods', 'swav', '--name', 'short', '--tsne_pairs', 10)\n"
        "codes['dropout'] = contrastive('--methods', 'simcse', '--dropout', 0)\n"
        "codes['ensemble'] = stage('08_evaluate', *out, '--judge', 'ensemble', '--M', 2,"
        " '--prompts', 5)\n"
        "Path(out[1], '08_evaluate').rename(Path(out[1], 'ensemble'))\n"
        "codes['gold'] = stage('08_evaluate', *out)\n"
        "print('CODES', json.dumps(codes))\n")
    codes = json.loads(next(line for line in text.splitlines() if line.startswith("CODES "))[6:])
    return out, codes, text


def test_dropout_without_effect_stops_with_one_line(more_stages):
    out, codes, text = more_stages
    assert codes["dropout"] == 2
    errors = [line for line in text.splitlines() if "error:" in line]
    assert len(errors) == 1 and "two views are equal" in errors[0] and "Traceback" not in text
    assert not (out / "05_rm_contrastive/simcse").exists()


def test_a_contrastive_model_is_saved_without_prototypes(more_stages):
    from transformers import AutoModelForSequenceClassification
    path = more_stages[0] / "05_rm_contrastive/short"
    assert more_stages[1]["swav"] == 0
    assert not [k for k in load_file(path / "model.safetensors") if "prototypes" in k]
    model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert model.num_labels == 1 and not info["missing_keys"] and not info["unexpected_keys"]
    start = load_file(more_stages[0] / "01_sft/model.safetensors")
    assert (model.model.embed_tokens.weight - start["model.embed_tokens.weight"]).abs().max() > 1e-4


def test_04_on_a_slice_writes_its_own_directory(more_stages):
    out, codes, _ = more_stages
    manifest = json.loads(
        (out / "04_rm_denoise/flip_flip_below_1_percentile_0_10/manifest.json").read_text())
    rows = sorted(lines(out / "03_strength/train.jsonl"),
                  key=lambda row: row["mean preference difference"])
    weakest = rows[:len(rows) // 10]
    trained = lines(out / "04_rm_denoise/flip_flip_below_1_percentile_0_10/train.jsonl")
    assert {r["id"] for r in trained} == {r["id"] for r in weakest}
    assert codes["slice"] == 0
    assert manifest["metrics"]["flipped"] == sum(row["mean preference difference"] < 0
                                                 for row in weakest) > 0
    assert not (out / "04_rm_denoise/flip").exists()


@pytest.mark.parametrize("name", ["04_rm_denoise", "05_rm_contrastive"])
def test_a_name_for_two_methods_is_refused(small_run, name, capsys):
    methods = {"04_rm_denoise": ("flip", "margin"), "05_rm_contrastive": ("simcse", "swav")}[name]
    with pytest.raises(SystemExit) as stop:
        import_module(name).main(["--out", str(small_run), "--methods", *methods, "--name", "x"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: --name") and error.count("\n") == 1


VARIANT = "lab.metarm_variants", ["--variant", "joint", "--name", "round_7"]
WEIGHTS = "lab.metarm_variants", ["--variant", "weights", "--precision", "autocast"]


@pytest.mark.parametrize("name, flags", [VARIANT, WEIGHTS,
                                         ("07_metarm", ["--name", "round_7"]),
                                         ("07_metarm", ["--name", "../x"]),
                                         ("06_ppo", ["--name", "x"]),
                                         ("06_ppo", ["--start", "round_0"]),
                                         ("06_ppo", ["--rm", "baseline", "--name", "round_7"]),
                                         ("06_ppo", ["--rm", "baseline", "--name", "sft"]),
                                         ("05_rm_contrastive", ["--methods", "swav", "--name",
                                                                "baseline"]),
                                         ("06_ppo", ["--rm", "baseline", "--start", "round_8"]),
                                         ("06_ppo", ["--rm", "nothing"])])
def test_names_that_are_refused(small_run, name, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        import_module(name).main(["--out", str(small_run), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert {p.name for p in (small_run / "06_ppo").iterdir()} == {"round_0"}


# ---------------------------------------------------------------- 08

def test_08_tables_follow_from_the_responses(more_stages):
    from lab.toy_world import gold
    out, codes, _ = more_stages
    assert codes["gold"] == codes["ensemble"] == 0
    assert json.loads((out / "ensemble/tables.json").read_text())["judge"] == "ensemble, a proxy"
    tables = json.loads((out / "08_evaluate/tables.json").read_text())
    rows = lines(out / "08_evaluate/responses.jsonl")
    verdicts = json.loads((out / "08_evaluate/verdicts.json").read_text())
    assert tables["judge"] == "gold"
    by = {(r["policy"], r["set"], r["id"]): r for r in rows}
    assert len(by) == len(rows)
    for r in rows:
        assert r["score"] == pytest.approx(gold(r["prompt"], r["response"]))
    assert {(t["policy"], t["opponent"]) for t in tables["comparisons"]} == {("round_0", "sft")}
    assert tables["best_round"] == {} and tables["table_3"] == []  # no round of MetaRM
    assert {t["set"] for t in tables["comparisons"]
            } == {p.stem for p in (out / "00_data").glob("eval_*.jsonl")} | {
                p.stem for p in (out / "00_data").glob("ood_*.jsonl")}
    z = norm.ppf(0.975)
    for t in tables["comparisons"]:
        mine = [(r["score"], by[t["opponent"], t["set"], r["id"]]["score"]) for r in rows
                if (r["policy"], r["set"]) == (t["policy"], t["set"])]
        assert verdicts[t["set"]]["round_0"]["sft"] == [(a > b) - (a < b) for a, b in mine]
        share = {
            "win": np.mean([a > b for a, b in mine]), "tie": np.mean([a == b for a, b in mine]),
            "lose": np.mean([a < b for a, b in mine])}
        assert len(mine) == t["n"] and {k: t[k] for k in share} == pytest.approx(share)
        # the Wilson bounds are where the normal test just accepts the share
        for side in ("win", "lose"):
            for p in t[f"{side}_interval"]:
                assert abs(p - share[side]) == pytest.approx(z * np.sqrt(p * (1 - p) / t["n"]),
                                                             abs=1e-9)
    for policy, means in tables["mean_score"].items():
        for name, value in means.items():
            assert value == pytest.approx(
                np.mean([r["score"] for r in rows if (r["policy"], r["set"]) == (policy, name)]))


# ---------------------------------------------------------------- 06

def test_kl_is_exactly_zero_before_the_first_update(small_run, run_copy):
    first = lines(small_run / "06_ppo/round_0/metrics.jsonl")[0]
    assert first["kl"] == 0 == first["kl_nonnegative"]
    ranks(2, "06_ppo.py", "--out", run_copy, "--rm", "baseline", "--zero", 3, "--kl_beta", 0,
          "--limit", 2, "--micro_batch_size", 4)
    first, second = lines(run_copy / "06_ppo/baseline/metrics.jsonl")
    assert first["kl"] == 0 == first["kl_nonnegative"] and first["return"] != 0
    assert second["kl_nonnegative"] > 0
    assert json.loads(
        (run_copy / "06_ppo/baseline/manifest.json").read_text())["hyperparameters"]["kl_beta"] == 0


def test_advantages_live_on_response_tokens(small_run, monkeypatch):
    """On real ragged roll-outs, some cut without EOS: score on the last token, penalty on the cut
    ones."""
    ppo = import_module("06_ppo")
    monkeypatch.setattr(common, "gather_rows",
                        lambda mine: [v for _, v in sorted(mine, key=lambda x: x[0])])
    args = SimpleNamespace(**FLAGS, temperature=1.0, top_p=1.0, repetition_penalty=1.0,
                           generate_batch_size=8, reward_clip=0.8, missing_eos_penalty=1.0,
                           kl_beta=0.05, run={"max_prompt_tokens": 80, "max_response_tokens": 24})
    tokenizer = common.load_tokenizer(small_run / "01_sft")
    eos = tokenizer.eos_token_id
    prompts = common.encode(tokenizer,
                            lines(small_run / "00_data/prompts.jsonl")[:16], [], args.run)
    policy, reference = (common.load_policy(small_run / d, args).eval()
                         for d in ("06_ppo/round_0", "01_sft"))
    rm, critic = (common.load_reward_model(small_run / "04_rm_denoise/baseline", args).eval()
                  for _ in "ab")
    responses = common.generate(policy, tokenizer, [g["prompt"] for g in prompts], 4, args,
                                seed=1 + 2**63)  # as large as of the largest --seed
    groups = [{**g, "responses": r} for g, r in zip(prompts, responses)]
    lengths = {len(r) for g in groups for r in g["responses"]}
    cut = torch.tensor([[r[-1] != eos for r in g["responses"]] for g in groups])
    assert cut.any() and not cut.all() and len(lengths) > 3

    e = ppo.make_experience(groups, (policy, critic, reference, rm), args, tokenizer, "shared")
    assert torch.equal(e["cut"], cut) and e["scores"].std() > 0
    mean, std = e["scores"].mean().item(), e["scores"].std().item()
    rewards = ppo.shape_rewards(e, mean, std, args)
    kl_part = ppo.shape_rewards(
        {**e, "scores": torch.full_like(e["scores"], mean), "cut": torch.zeros_like(cut)}, mean,
        std, args)
    on_last = rewards - kl_part
    for b, group in enumerate(groups):
        for k, response in enumerate(group["responses"]):
            n = len(response)
            assert e["mask"][b, k].sum() == n
            score = ((e["scores"][b, k] - mean) / std).clamp(-0.8, 0.8) - float(cut[b, k])
            expected = torch.zeros_like(on_last[b, k])
            expected[n - 1] = score
            torch.testing.assert_close(on_last[b, k], expected)
            assert (kl_part[b, k, :n] != 0).any() and (kl_part[b, k, n:] == 0).all()
    flat = [x.flatten(0, 1) for x in (rewards, e["values"], e["mask"])]
    advantages, returns = ppo.gae(*flat, 1.0, 0.95)
    whitened, = ppo.whiten([advantages], [flat[2]])
    for x in (advantages, whitened):
        assert torch.equal(x != 0, flat[2])  # nonzero on every response token, exactly 0 off them
    assert (returns[~flat[2]] == 0).all()
    inside = whitened[flat[2]]
    assert inside.mean().abs() < 1e-5 and inside.std(correction=0) == pytest.approx(1, abs=1e-4)


def test_ppo_under_the_vote(run_copy):
    """The ensemble's standardised mean, less its std, against numpy; the manifest says what the
    reward was and whose, and its place is not that of --rm's own policy."""
    from lab import ppo_reward
    python_stages(["lab.ppo_reward", "--out", run_copy, "--reward", "mean_std", "--rm", "baseline",
                   "--limit", 1])
    assert not (run_copy / "06_ppo/baseline").exists()
    manifest = json.loads((run_copy / "06_ppo/mean_std/manifest.json").read_text())
    assert manifest["hyperparameters"]["reward"] == "mean_std"
    assert manifest["script"] == "lab/ppo_reward.py"
    members = [f"02_rm_ensemble/rm_{m:02d}" for m in range(2)]
    assert {f"{m}/model.safetensors" for m in members} <= set(manifest["inputs"])
    args = SimpleNamespace(out=str(run_copy), precision="fp32", eval_batch_size=4, seed=0,
                           layout="separate", zero=0,
                           run=json.loads((run_copy / "run.json").read_text()))
    tokenizer = common.load_tokenizer(run_copy / "01_sft")
    _, groups = common.encode_pairs(tokenizer, lines(run_copy / "03_strength/valid.jsonl"),
                                    args.run)
    told = np.array([row[f"{side}_score_list"] for side in ("chosen", "rejected")
                     for row in lines(run_copy / "03_strength/train.jsonl")])           # [2N, M]
    z = np.stack([(common.score_by(run_copy / m, groups[:6], args, tokenizer).numpy() - center) / s
                  for m, center, s in zip(members, told.mean(0), told.std(0, ddof=1))])
    for name, expected in (("mean", z.mean(0)), ("mean_std", z.mean(0) - z.std(0))):
        found = ppo_reward.REWARDS[name](groups[:6], args, tokenizer)
        np.testing.assert_allclose(found.detach(), expected, atol=1e-4)


def test_ppo_learns_to_emit_a_token(run_copy):
    """Reward: how often the response holds one token. 30 steps raise it severalfold."""
    tokenizer = common.load_tokenizer(run_copy / "01_sft")
    token = tokenizer(" the", add_special_tokens=False)["input_ids"][-1]
    # so small a model is no faster on two cores
    python(
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        f"import torch\nout, token = {str(run_copy)!r}, {token}\n"
        "count = lambda groups, *_: torch.tensor([[float(r.count(token)) for r in g['responses']]"
        " for g in groups])\n"
        "assert stage('06_ppo', '--out', out, '--round', 0, '--iterations', 30, '--batch_size', 8,"
        " '--minibatch_size',"
        " 8, '--actor_lr', 1e-3, '--eval_every', 100, reward_fn=count) == 0")
    counts = [row["reward"] for row in lines(run_copy / "06_ppo/round_0/metrics.jsonl")]
    first, last = np.mean(counts[:3]), np.mean(counts[-3:])
    print(f"mean count {first:.2f} at first, {last:.2f} at last")
    assert len(counts) == 30 and last > 2 * first + 1


# ---------------------------------------------------------------- 02 and 03

def test_02_members_differ_are_reproduced_and_kept(run_copy, small_run):
    """Same seed, same bytes; a launch cut short keeps what it finished, unless an input has
    changed."""
    text = python(
        f"out = Path({str(run_copy)!r}) / '02_rm_ensemble'\n"
        "import shutil\n"
        "go = lambda *more: stage('02_rm_ensemble', '--out', out.parent, '--M', 2, '--limit', 5,"
        " *more)\n"
        "stamp = lambda: [(out / m / 'manifest.json').stat().st_mtime_ns"
        " for m in ('rm_00', 'rm_01')]\n"
        "stamps = [stamp()]\n"
        "def again(*more):\n"
        "    assert go(*more) == 0\n"
        "    stamps.append(stamp())\n"
        "again('--restart')\n"  # 0 → 1: all anew
        "shutil.rmtree(out / 'rm_01'); again()\n"  # 1 → 2: rm_00 kept
        "rows = out.parent / '00_data/train.jsonl'\n"
        # the same rows in another file
        "rows.write_text(rows.read_text().replace('{', '{ '))\n"
        "again()\n"  # 2 → 3: none kept
        "print('STAMPS', json.dumps(stamps))\n")
    first, anew, short, changed = json.loads(
        next(x for x in text.splitlines() if x.startswith("STAMPS "))[7:])
    assert all(a != b for a, b in zip(first, anew))
    assert anew[0] == short[0] and anew[1] != short[1]
    assert all(a != b for a, b in zip(short, changed))
    for member in ("rm_00", "rm_01"):
        file = f"02_rm_ensemble/{member}/model.safetensors"
        assert digest(run_copy / file) == digest(small_run / file)
    a, b = (load_file(small_run / f"02_rm_ensemble/{m}/model.safetensors")
            for m in ("rm_00", "rm_01"))
    assert (a["score.weight"] - b["score.weight"]).abs().max() > 0.05  # not the same head
    groups = [{"id": i, "prompt": [0] * i, "responses": [[1]]} for i in range(40)]
    batches = [[g["id"] for batch in common.batches(groups, 8, 5, seed) for g in batch]
               for seed in (0, 1)]  # members' seeds
    assert batches[0] != batches[1] and sorted(batches[0]) == sorted(batches[1]) == list(range(40))


def test_03_uses_the_scores_of_the_released_set(tmp_path):
    """Rows that bring their ten scores need no ensemble, and keep Eq. 4's numbers."""
    rng = np.random.default_rng(0)
    rows = [{
        "chosen": [f"question {i}", "a"], "rejected": [f"question {i}", "b"],
        "chosen score list": rng.normal(0.3, 1, 10).tolist(),
        "rejected score list": rng.normal(0, 1, 10).tolist(), "GPT4 label": i % 2}
            for i in range(60)]
    (tmp_path / "released.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "out"
    python(
        f"out = ['--out', {str(out)!r}]\n"
        f"own = {str(tmp_path / 'released.jsonl')!r}\n"
        "assert stage('00_data', *out, '--preset', 'toy', '--preferences', own) == 0\n"
        "assert stage('03_strength', *out) == 0\n")
    given = {f"question {i}": r for i, r in enumerate(rows)}
    annotated = lines(out / "03_strength/train.jsonl") + lines(out / "03_strength/valid.jsonl")
    assert len(annotated) == 60
    for row in annotated:
        source = given[row["prompt"].split("Human: ")[1].split("\n")[0]]
        d = np.array(source["chosen score list"]) - np.array(source["rejected score list"])
        assert row["mean preference difference"] == row["margin"] == pytest.approx(
            d.mean(), abs=1e-5)
        assert row["std preference difference"] == pytest.approx(
            np.sqrt(((d - d.mean())**2).mean()), abs=1e-5)
        assert row["chosen_score_list"] == pytest.approx(source["chosen score list"], abs=1e-4)


# ---------------------------------------------------------------- what is recorded and refused

def test_manifests_account_for_every_file(more_stages):
    out = more_stages[0]
    shutil.rmtree(out / "ensemble", ignore_errors=True)
    recorded, manifests = {}, {
        p.parent: json.loads(p.read_text()) for p in out.rglob("manifest.json")}
    for folder, manifest in manifests.items():
        assert manifest["stage"] == str(folder.relative_to(out))
        recorded |= manifest["outputs"]
    for path, value in recorded.items():
        assert digest(out / path) == value, path
    files = {str(p.relative_to(out)) for p in out.rglob("*")
             if p.is_file() and ".partial/" not in str(p)}
    assert files - (verify.ROOT_FILES - {"run.json"}) == set(recorded) | {
        str((d / "manifest.json").relative_to(out)) for d in manifests}
    for folder, manifest in manifests.items():
        assert manifest["inputs"] or manifest["stage"] == "00_data"
        assert all(recorded[path] == value for path, value in manifest["inputs"].items())
        assert {
            "command", "hyperparameters", "start", "end", "seconds", "git_commit", "packages",
            "hardware", "world_size", "metrics"} <= set(manifest)
        assert manifest["code"][f"{manifest['stage'].split('/')[0]}.py"] == digest(
            ROOT / f"{manifest['stage'].split('/')[0]}.py")


def test_no_partial_directory_is_left(small_run):
    assert not list(small_run.rglob("*.partial")) and not list(small_run.rglob("*.old"))


@pytest.mark.parametrize("without, stage, flags, command", [
    ("run.json", "01_sft", [], "python 00_data.py"),
    ("00_data", "01_sft", [], "python 00_data.py"),
    ("01_sft", "02_rm_ensemble", [], "python 01_sft.py"),
    ("02_rm_ensemble", "03_strength", ["--M", "2"], "python 02_rm_ensemble.py"),
    ("03_strength", "04_rm_denoise", [], "python 03_strength.py"),
    ("03_strength", "05_rm_contrastive", [], "python 03_strength.py"),
    ("04_rm_denoise", "05_rm_contrastive", [], "python 04_rm_denoise.py"),
    ("04_rm_denoise", "06_ppo", [], "python 04_rm_denoise.py"),
    ("01_sft", "06_ppo", [], "python 01_sft.py"),
    ("06_ppo", "07_metarm", ["--round", "1"], "python 06_ppo.py --round 0"),
    ("06_ppo", "08_evaluate", [], "python 06_ppo.py --round 0"),
    (None, "06_ppo", ["--round", "1"], "python 07_metarm.py --round 1"),
    (None, "06_ppo", ["--round", "2"], "python 06_ppo.py --round 1"),
    (None, "07_metarm", ["--round", "2"], "python 06_ppo.py --round 1"),
    (None, "06_ppo", ["--rm", "margin"], "no finished reward model margin"),
    ("06_ppo", "lab.metarm_variants", ["--variant", "joint"], "python 06_ppo.py --round 0"),
    (None, "07_metarm", ["--round", "0"], "--round must be 1 or more"),
])
def test_a_missing_stage_is_named_in_one_line(small_run, tmp_path, without, stage, flags, command,
                                              capsys):
    out = tmp_path / "out"
    out.mkdir()
    for path in small_run.iterdir():
        if path.name != without:
            (out / path.name).symlink_to(path)
    with pytest.raises(SystemExit) as stop:
        import_module(stage).main(["--out", str(out), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count(
        "\n") == 1 and command in error
    assert "python" not in command or f"`{command} --out {out}`" in error


def test_a_policy_of_another_sft_model_is_not_judged(run_copy):
    """Stale ones beside those of this run are named; run_all.sh does not wait for them."""
    from lab import experiments
    for name in ("round_1", "mine"):
        shutil.copytree(run_copy / "06_ppo/round_0", run_copy / f"06_ppo/{name}")
        path = run_copy / f"06_ppo/{name}/manifest.json"
        manifest = json.loads(path.read_text()) | {"stage": f"06_ppo/{name}"}
        manifest["inputs"]["01_sft/model.safetensors"] = "0" * 64
        path.write_text(json.dumps(manifest))
    said = python_stages(["08_evaluate", "--out", run_copy, "--prompts", 4]).stdout
    assert {row["policy"] for row in lines(run_copy / "08_evaluate/responses.jsonl")} == {
        "sft", "round_0"}
    assert all(f"06_ppo/{name} is not judged" in said for name in ("round_1", "mine"))
    assert experiments.why(run_copy, ["08_evaluate"]) is None


def test_an_unfinished_stage_counts_as_missing(run_copy, capsys):
    (run_copy / "01_sft").rename(run_copy / "01_sft.partial")
    with pytest.raises(SystemExit) as stop:
        common.require(SimpleNamespace(out=run_copy), "01_sft", "python 01_sft.py")
    assert stop.value.code == 2 and "unfinished" in capsys.readouterr().err
