"""The driver, `bash run_all.sh`: real data, the paper preset with a tiny model, what it skips, prints and refuses."""
import gzip
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run

REAL = ROOT.parent / "shared/data/hh_harmless_sample.jsonl.gz"
STAGES = ["00_data", "01_sft", "02_rm_ensemble/figures", "03_strength", "04_rm_denoise/figures",
          "05_rm_contrastive/figures", "06_ppo/round_0", "07_metarm/round_1", "06_ppo/round_1", "08_evaluate"]


def driver(*flags, check=True):
    """run_all.sh in the active environment (that of the tests)."""
    return run("bash", "run_all.sh", *flags, check=check)


def metrics(out, stage="00_data"):
    return json.loads((out / stage / "manifest.json").read_text())["metrics"]


def one_error(done, *words):
    """Exit code 2 and one line that says all the words."""
    lines = done.stdout.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stdout[-2000:]
    for word in words:
        assert word in lines[0], lines[0]


# ---------------------------------------------------------------- real data

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The whole pipeline on the real sample, once; without it, on the embedded world. → (out, flags, output)."""
    out = tmp_path_factory.mktemp("real") / "out"
    flags = ["--preferences", REAL if REAL.exists() else "toy", "--limit", 4, "--rounds", 1, "--out", out]
    return out, flags, driver(*flags).stdout


def sample_rows():
    return [json.loads(line) for line in gzip.open(REAL, "rt", encoding="utf-8")]


def test_every_stage_is_complete(real):
    out, _, text = real
    for stage in STAGES:
        assert (out / stage / "manifest.json").exists(), stage
    assert not list(out.rglob("*.partial")) and "Traceback" not in text
    assert len(list(out.glob("02_rm_ensemble/rm_*/model.safetensors"))) == 10
    assert {p.name for p in out.glob("04_rm_denoise/*")} == {
        "baseline", "flip", "margin", "flip_margin", "soft_margin", "weakest_tenth", "weakest_tenth_flipped", "figures"}
    assert {p.name for p in out.glob("05_rm_contrastive/*")} == {"simcse", "simcse_diff", "swav", "swav_diff", "figures"}
    figures = {p.name for p in out.rglob("figure_*.png")}
    assert {f"figure_{n}.png" for n in ("01", "02", "08", "11", "16")} <= figures
    markdown = (out / "08_evaluate/tables.md").read_text()
    assert "Table 2" in markdown and "Table 3" in markdown and markdown.strip() in text
    assert metrics(out, "01_sft")["steps"] == metrics(out, "04_rm_denoise/margin")["steps"] == 4
    assert max(metrics(out)["rows"].values()) <= 64 * 4


@pytest.mark.skipif(not REAL.exists(), reason="the real sample lies outside the project")
def test_drop_counts_on_real_data(real):
    counts, seen, kept = {}, set(), 0
    for row in sample_rows():
        (p, c), (q, r) = (re.fullmatch(r"(.*\n\nAssistant:)(.*)", row[k], re.DOTALL).groups()
                          for k in ("chosen", "rejected"))
        c, r = c.strip(), r.strip()
        reason = "prompts differ" if p != q else "empty response" if not c or not r else \
            "identical responses" if c == r else "duplicate pair" if (p, c, r) in seen else None
        seen.add((p, c, r))
        if reason:
            counts[reason] = counts.get(reason, 0) + 1
        else:
            kept += 1
    got = metrics(real[0])
    assert got["drops"] == counts and got["kept"] == kept and got["read"] == 1800


@pytest.mark.skipif(not REAL.exists(), reason="the real sample lies outside the project")
def test_no_row_is_printed(real):
    texts = {piece.strip() for row in sample_rows() for key in ("chosen", "rejected")
             for piece in re.split(r"\n\n(?:Human|Assistant):", row[key])}
    texts = [text for text in texts if len(text) > 30]
    assert len(texts) > 2000 and not [text for text in texts if text in real[2]]


def test_each_stage_is_announced_with_its_command_and_minutes(real):
    out, flags, text = real
    logged = [shlex.split(line) for line in (out / "commands.log").read_text().splitlines()]
    assert len(logged) == len(STAGES)
    assert logged[0] == ["python", "00_data.py", *map(str, flags[:4]), "--out", str(out)]
    assert all(command[0] == "deepspeed" and command[-2:] == ["--out", str(out)] for command in logged[1:])
    for command in logged:
        assert "   " + " ".join(command) in text.splitlines()
    assert text.count("minutes expected: ") == text.count("minutes taken: ") == len(STAGES)


def test_a_complete_run_is_skipped_stage_by_stage(real):
    out, flags, _ = real
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    start = time.time()
    lines = driver(*flags).stdout.splitlines()
    assert [x for x in lines if x.startswith("==")] == [
        f"== {s.removesuffix('/figures')} is complete, skipped" for s in STAGES] and time.time() - start < 20
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before


def test_from_runs_a_stage_and_all_after_it(real):
    """--from the last stage: that one alone runs again, to the same bytes; it is also a logged command by hand."""
    out, flags, _ = real
    tables = (out / "08_evaluate/responses.jsonl").read_bytes()
    text = driver("--from", "08", "--rounds", 1, "--out", out).stdout
    assert text.count("skipped") == len(STAGES) - 1 and "== 08_evaluate: " in text
    assert (out / "08_evaluate/responses.jsonl").read_bytes() == tables


def test_logged_commands_and_stages_work_by_hand(real):
    """A line of commands.log as it stands, and a stage by plain python with no flag but --out: the same bytes."""
    out = real[0]
    model = out / "07_metarm/round_1/model.safetensors"
    digests = [hashlib.sha256(model.read_bytes()).hexdigest()]
    logged = next(x for x in (out / "commands.log").read_text().splitlines() if "07_metarm.py" in x)
    assert shlex.split(logged)[-5:] == ["07_metarm.py", "--round", "1", "--out", str(out)]
    for command in (shlex.split(logged), ["python", "07_metarm.py", "--round", "1", "--out", out]):
        stamp = model.stat().st_mtime_ns
        run(*command)
        assert model.stat().st_mtime_ns != stamp
        digests.append(hashlib.sha256(model.read_bytes()).hexdigest())
    assert len(set(digests)) == 1


# ---------------------------------------------------------------- refusals

def test_other_flags_on_an_existing_run_are_refused(real):
    out, flags, _ = real
    one_error(driver(*flags[:2], "--limit", 3, "--out", out, check=False), str(out), "other flags")


@pytest.mark.parametrize("flags, words", [
    (["--lmit", "4"], ["--lmit", "--help"]), (["--limit"], ["--limit needs a value"]),
    (["--limit", "many"], ["--limit", "many"]), (["--preset", "huge"], ["--preset"]),
    (["--seed", "1", "2"], ["--seed takes one value"]), (["stray"], ["stray"]),
    (["--from", "99_nothing", "--dry_run"], ["--from", "99_nothing"]),
])
def test_bad_flags(flags, words, tmp_path):
    one_error(driver(*flags, "--out", tmp_path / "out", check=False) if flags != ["--limit"] else
              driver("--out", tmp_path / "out", *flags, check=False), *words)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_one_line_with_the_install_command(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    environment = os.environ | {"VIRTUAL_ENV": str(tmp_path / "venv"), "PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(["bash", "run_all.sh", "--out", tmp_path / "out"], cwd=ROOT, text=True, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    one_error(done, "torch", "deepspeed", f"pip install -r {ROOT}/requirements.txt")


# ---------------------------------------------------------------- the paper preset

PAPER = {  # appendix B.2
    "01_sft": {"batch_size": 32, "lr": 2e-5, "epochs": 1, "warmup": 0.1},
    "02_rm_ensemble": {"M": 10, "batch_size": 32, "lr": 5e-6},
    "03_strength": {"M": 10},
    "04_rm_denoise": {"batch_size": 32, "lr": 5e-6},
    "05_rm_contrastive": {"batch_size": 16, "lr": 5e-6, "dropout": 0.05, "simcse_beta": 1, "swav_diff_prototypes": 20,
                          "swav_diff_beta": 0.5, "swav_prototypes": 50, "swav_beta": 0.1},
    "06_ppo": {"actor_lr": 5e-7, "critic_lr": 1.5e-6, "iterations": 2000, "batch_size": 32, "rollouts": 4,
               "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "lam": 0.95, "gamma": 1, "kl_beta": 0.05,
               "reward_clip": 0.8},
    "07_metarm": {"batch_size": 32, "lr": 5e-6, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1},
    "08_evaluate": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1},
    "00_data": {"max_response_tokens": 512, "valid_fraction": 0.1},
}


def test_dry_run_prints_the_papers_values(tmp_path):
    lines = driver("--dry_run", "--preset", "paper", "--out", tmp_path / "out").stdout.splitlines()
    resolved = [json.loads(line) for line in lines if line.startswith("{")]
    commands = [line for line in lines if line.startswith(("deepspeed", "python"))]
    assert not (tmp_path / "out").exists() and len(resolved) == len(commands) == 16  # 00-05, round 0, four rounds, 08
    assert {r["stage"] for r in resolved} == set(PAPER)
    for r in resolved:
        assert r["preset"] == "paper"
        for name, value in PAPER[r["stage"]].items():
            assert r[name] == value, (r["stage"], name)
    assert sum("06_ppo.py --round 4" in c for c in commands) == 1 == sum("07_metarm.py --round 4" in c for c in commands)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A small local Llama (untied, BOS, no pad token, as Llama-2) that soon says EOS: a constant first feature."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    path = tmp_path_factory.mktemp("tiny") / "llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(["\n\nHuman: How do I bake bread?\n\nAssistant: Gladly."], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=0, eos_token_id=1, max_position_embeddings=2048))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[1, 0] = 0.5  # times sqrt(32) after the norm: one token in about twenty
    model.save_pretrained(path)
    return path


def test_the_paper_preset_runs_end_to_end(tiny_llama, tmp_path):
    """Its precision, ZeRO stages, gradient checkpointing and accumulation, through the launcher."""
    out = tmp_path / "out"
    text = driver("--preset", "paper", "--limit", 2, "--rounds", 1, "--model", tiny_llama, "--preferences", "toy",
                  "--out", out).stdout
    assert "Traceback" not in text
    for stage in STAGES:
        manifest = json.loads((out / stage / "manifest.json").read_text())
        assert manifest["preset"] == "paper" and manifest["limit"] == 2
        values, name = manifest["hyperparameters"], stage.split("/")[0]
        for key, value in PAPER[name].items():
            assert values[key] == value, (stage, key)
        if "gradient_checkpointing" in values:
            assert values["gradient_checkpointing"] and values["zero"] == (3 if name in ("06_ppo", "07_metarm") else 2)
            assert values["precision"] == ("autocast" if name == "07_metarm" else "bf16")
    first = json.loads((out / "06_ppo/round_0/metrics.jsonl").read_text().splitlines()[0])
    assert first["kl"] == 0 and first["length"] > 1
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    AutoModelForCausalLM.from_pretrained(out / "06_ppo/round_1")
    AutoModelForSequenceClassification.from_pretrained(out / "07_metarm/round_1")
    tokenizer = AutoTokenizer.from_pretrained(out / "01_sft")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
