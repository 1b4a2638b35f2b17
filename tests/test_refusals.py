"""What cannot work is refused at once: one line that names the flag or the file, exit code 2, and
nothing left behind. And what should not stop a run does not."""
import importlib
import json
import os
import socket
import subprocess
import sys
import zlib
from types import SimpleNamespace

import pytest
import transformers
from conftest import ROOT, run

import common

FEW = ["--limit", "1", "--n_pairs", "40", "--n_sft", "40", "--n_prompts", "9", "--n_gold", "9"]
FLAGS = [
    ("00_data", ["--seed", 2**31], "--seed"), ("00_data", ["--valid_fraction", 1.5], "--valid_f"),
    ("00_data", ["--max_prompt_tokens", 0], "--max_prompt_tokens"),
    ("00_data", ["--max_prompt_tokens", 1], "at least 2"),
    ("00_data", ["--max_response_tokens", 2], "at least 8"),
    ("01_sft", ["--lr", 0], "--lr"), ("01_sft", ["--lr", "nan"], "--lr"),
    ("01_sft", ["--warmup", 2], "--warmup"), ("02_rm_ensemble", ["--epochs", 0], "--epochs"),
    ("02_rm_ensemble", ["--epochs", -1], "--epochs"), ("02_rm_ensemble", ["--M", 0], "--M"),
    ("02_rm_ensemble", ["--batch_size", 0], "--batch_size"),
    ("02_rm_ensemble", ["--M", 3, "--folds", 2], "--folds"),
    ("02_rm_ensemble", ["--M", 2, "--members", 0, 2], "from 0 to 1"),
    ("02_rm_ensemble", ["--members", -1], "--members"),
    ("03_strength", ["--groups", 0], "--groups"),
    ("04_rm_denoise", ["--percentile", 50, 50], "--percentile"),
    ("04_rm_denoise", ["--percentile", 90, 10], "--percentile"),
    ("04_rm_denoise", ["--smoothing", 2], "--smoothing"),
    ("04_rm_denoise", ["--flip_below", -1], "--flip_below"),
    ("04_rm_denoise", ["--methods", "margin", "--soften_all"], "--soften_all"),
    ("05_rm_contrastive", ["--simcse_beta", -1], "--simcse_beta"),
    ("05_rm_contrastive", ["--dropout", 2], "--dropout"),
    ("05_rm_contrastive", ["--epsilon", "inf"], "--epsilon"),
    ("06_ppo", ["--top_p", 2], "--top_p"), ("06_ppo", ["--top_p", 0], "--top_p"),
    ("06_ppo", ["--kl_beta", -1], "--kl_beta"), ("06_ppo", ["--temperature", 0], "--temperature"),
    ("06_ppo", ["--lam", 2], "--lam"), ("06_ppo", ["--round", -1], "--round"),
    ("06_ppo", ["--rollouts", 0], "--rollouts"), ("07_metarm", ["--k", 1], "--k"),
    ("07_metarm", ["--eta", -0.1], "--eta"), ("07_metarm", ["--first_samples", "x"], "--first_sam"),
    ("08_evaluate", ["--repetition_penalty", 0], "--repetition_penalty")]


@pytest.mark.parametrize("stage, flags, names", FLAGS)
def test_a_value_that_cannot_be_meant(stage, flags, names, small_run, capsys, tmp_path):
    out = tmp_path / "out" if stage == "00_data" else small_run
    before = sorted(small_run.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(stage).main(["--out", str(out), *map(str, flags)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and names in error
    assert sorted(small_run.rglob("*")) == before and not (tmp_path / "out").exists()


def test_too_few_pairs_are_refused_before_anything_is_trained(tmp_path, capsys):
    rows = [{"prompt": f"Why {i}?", "chosen": "So.", "rejected": "No."} for i in range(6)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ["--out", str(tmp_path / "out")]
    importlib.import_module("00_data").main([*flags, "--preferences", str(tmp_path / "x.jsonl")])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("01_sft").main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "5 pairs to train on and 1 to validate" in error
    assert not list((tmp_path / "out").glob("01_sft*"))


def a_base(path, config, eos="</s>", weights="model.safetensors"):
    from tokenizers import Tokenizer, models
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token=eos).save_pretrained(path)
    config.save_pretrained(path)
    (path / weights).write_bytes(b"")
    return path


LLAMA = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 2}


@pytest.mark.parametrize("make, says", [
    (lambda p: p / "nowhere", "nowhere"),
    (lambda p: a_base(p, transformers.MambaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, architectures=["MambaForCausalLM"])),
     "no sequence classifier for mamba"),
    (lambda p: a_base(p, transformers.BertConfig(architectures=["BertForMaskedLM"])),
     "not a causal language model"),
    (lambda p: a_base(p, transformers.LlamaConfig(vocab_size=8, **LLAMA), eos=None), "EOS"),
    (lambda p: a_base(p, transformers.LlamaConfig(vocab_size=1, **LLAMA)), "larger vocabulary"),
    (lambda p: a_base(p, transformers.LlamaConfig(vocab_size=8, **LLAMA),
                      weights="pytorch_model.bin"), "no *.safetensors"),
    (lambda p: a_base(p, transformers.LlamaConfig(
        vocab_size=8, max_position_embeddings=64, **LLAMA)), "reads 64 tokens"),
    (lambda p: a_base(p, transformers.LlamaConfig(  # a cut response is ended for a reward model
        vocab_size=8, max_position_embeddings=768, **LLAMA)), "may have 769")])
def test_a_base_model_that_cannot_be_trained_is_refused_in_00(make, says, tmp_path, capsys):
    model = make(tmp_path / "model")
    with pytest.raises(SystemExit) as stop:
        common.launch(lambda: importlib.import_module("00_data").main(
            ["--model", str(model), "--out", str(tmp_path / "out")]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and says in error
    assert not (tmp_path / "out").exists()


def test_tasks_of_any_script_keep_their_own_evaluation_sets(tmp_path):
    tasks = ("帮助", "無害", "Größe/x", "помощь")
    rows = [{"prompt": f"Why {i}?", "chosen": "So.", "rejected": "No.", "task": tasks[i % 4]}
            for i in range(80)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    importlib.import_module("00_data").main(["--preferences", str(tmp_path / "x.jsonl"), "--out",
                                             str(tmp_path / "out"), "--valid_fraction", "0.5"])
    assert {p.name for p in (tmp_path / "out/00_data").glob("eval_*")} == {
        "eval_帮助.jsonl", "eval_無害.jsonl", "eval_größe_x.jsonl", "eval_помощь.jsonl"}


def test_a_relative_model_works_from_any_folder_and_a_latin_terminal_ends_nothing(tmp_path):
    from test_models import FAMILIES, make
    make(tmp_path / "base", *FAMILIES["gpt2"])
    rows = [{"prompt": f"Why {i}?", "chosen": "So “it” is.", "rejected": "No.", "task": "帮助"}
            for i in range(30)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    env = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    code = ("import importlib, sys\nfor line in sys.argv[1].split(';'):\n"
            "  name, *flags = line.split()\n"
            "  importlib.import_module(name).main([*flags, '--out', sys.argv[2]])")
    first = "00_data --model base --preferences x.jsonl --limit 1 --max_response_tokens 8"
    rest = ("01_sft; 02_rm_ensemble --M 2; 03_strength --M 2; 04_rm_denoise --methods baseline; "
            "06_ppo; 08_evaluate --M 2")
    for cwd, stages in ((tmp_path, first), (ROOT, rest)):
        done = subprocess.run([sys.executable, "-c", code, stages, str(tmp_path / "out")], cwd=cwd,
                              env=env, capture_output=True)
        assert done.returncode == 0, done.stderr.decode("latin-1")[-2000:]
    assert "eval_??" in done.stdout.decode("latin-1")
    assert json.loads((tmp_path / "out/run.json").read_text())["model"] == str(tmp_path / "base")


def test_a_refusal_leaves_nothing_behind(tmp_path):
    """Through the driver: before it makes the directory, and of data, after it made it."""
    (tmp_path / "x.jsonl").write_text('{"chosen": 1}\n')
    for flags in (["--model", "/nowhere"], ["--preferences", tmp_path / "x.jsonl"]):
        done = run("bash", "run_all.sh", *flags, "--out", tmp_path / "out", check=False)
        assert done.returncode == 2 and "error: " in done.stdout
        assert not (tmp_path / "out").exists()
    out = tmp_path / "данные"
    done = subprocess.run(["bash", "run_all.sh", *FEW, "--to", "00", "--out", out],
                          cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0 and (out / "00_data/manifest.json").exists()
    assert "данные" in (out / "commands.log").read_text(encoding="utf-8")


def test_a_port_in_use_is_left_to_its_user(tmp_path):
    out = tmp_path / "out"
    port = 20000 + zlib.crc32(bytes(out)) % 9000
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        done = run("bash", "run_all.sh", "--out", out, *FEW, "--to", "01", "--gpus", 1)
    assert f"--master_port {port + 1}" in done.stdout


def test_a_size_that_a_given_model_cannot_take(capsys):
    args = SimpleNamespace(run={"model": "mine"}, preset="small", vocab_size=0, hidden_size=64,
                           layers=0)
    with pytest.raises(SystemExit):
        importlib.import_module("01_sft").load_base(args, [])
    assert "--hidden_size" in capsys.readouterr().err


PATCHED = """
import importlib
import common
sft, values = importlib.import_module("01_sft"), iter([10.0, 21.0])
def refuse(*args):
    raise ValueError("GenerationConfig is invalid")
{}
sft.main(["--out", {!r}, "--limit", "1", "--restart"])
"""


def test_what_cannot_be_saved_fails_before_it_is_trained_and_harm_is_told(run_copy):
    unsaved = "common.save_model = refuse; common.step = None"  # a step would be another error
    done = run(sys.executable, "-c", PATCHED.format(unsaved, str(run_copy)), check=False)
    assert done.returncode == 1 and "ValueError: GenerationConfig is invalid" in done.stdout
    harmed = "sft.perplexity = lambda *args: next(values)"
    done = run(sys.executable, "-c", PATCHED.format(harmed, str(run_copy)))
    assert "warning: perplexity 21.0 on held-out responses, more than twice the 10.0" in done.stdout
    broken = ("nll, calls = sft.nll, iter('12')\n"  # after the probe of the layout
              "sft.nll = lambda *args: nll(*args) * (1 if next(calls, 0) else float('nan'))")
    done = run(sys.executable, "-c", PATCHED.format(broken, str(run_copy)), check=False)
    assert done.returncode == 2 and "values of the model are not finite" in done.stdout
    sampled = "import common, torch; common.launch(lambda: torch.multinomial(torch.ones(2) / 0, 1))"
    done = run(sys.executable, "-c", sampled, check=False)
    assert done.returncode == 2 and "error: -c: a policy's probabilities are no" in done.stdout
