"""The paper preset: its resolved values are those of appendix B.2, and it runs end to end with a
tiny local Llama."""
import json

import pytest
from conftest import python_stages
from test_pipeline import ROWS, driver

PAPER = {  # appendix B.2
    "01_sft": {"batch_size": 32, "lr": 2e-5, "epochs": 1, "warmup": 0.1},
    "02_rm_ensemble": {"M": 10, "batch_size": 32, "lr": 5e-6},
    "03_strength": {"M": 10},
    "04_rm_denoise": {"batch_size": 32, "lr": 5e-6},
    "05_rm_contrastive": {
        "batch_size": 16, "lr": 5e-6, "dropout": 0.05, "simcse_beta": 1,
        "swav_diff_prototypes": 20, "swav_diff_beta": 0.5, "swav_prototypes": 50, "swav_beta": 0.1},
    "06_ppo": {
        "actor_lr": 5e-7, "critic_lr": 1.5e-6, "iterations": 2000, "batch_size": 32, "rollouts": 16,
        "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "lam": 0.95, "gamma": 1,
        "kl_beta": 0.05, "reward_clip": 0.8},
    # and of the follow-up (AAAI 2025), with its 16 roll-outs above
    "07_metarm": {"eta": 5e-6, "k": 5, "batch_size": 16, "meta_batch_size": 16, "lr": 5e-6,
                  "first_samples": "sft", "temperature": 0.8, "top_p": 0.9,
                  "repetition_penalty": 1.1},
    "08_evaluate": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1},
    "00_data": {"max_response_tokens": 512, "valid_fraction": 0.1},
}


def test_dry_run_prints_the_papers_values(tmp_path):
    lines = driver("--dry_run", "--preset", "paper", "--out", tmp_path / "out").stdout.splitlines()
    resolved = [json.loads(line) for line in lines if line.startswith("{")]
    commands = [line for line in lines if line.startswith(("deepspeed", "python"))]
    # 00-05, round 0, four rounds, 08, 09
    assert not (tmp_path / "out").exists() and len(resolved) == len(commands) == 17
    assert {r["stage"] for r in resolved} == {*PAPER, "09_report"}
    for r in resolved:
        assert r["preset"] == "paper"
        for name, value in PAPER.get(r["stage"], {}).items():
            assert r[name] == value, (r["stage"], name)
    assert sum("06_ppo.py --round 4" in c
               for c in commands) == 1 == sum("07_metarm.py --round 4" in c for c in commands)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A small local Llama (untied, BOS, no pad token, as Llama-2) that soon says EOS: a constant
    first feature."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    path = tmp_path_factory.mktemp("tiny") / "llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(
        add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(["\n\nHuman: How do I bake bread?\n\nAssistant: Gladly."],
                                  trainers.BpeTrainer(
                                      vocab_size=300, special_tokens=["<s>", "</s>"],
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                      show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B",
                                                             [("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>",
                            eos_token="</s>").save_pretrained(path)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64,
                    num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, eos_token_id=1,
                    max_position_embeddings=2048))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[1, 0] = 0.5  # times sqrt(32) after the norm: one token in about twenty
    model.save_pretrained(path)
    return path


def test_the_paper_preset_runs_end_to_end(tiny_llama, tmp_path):
    """Its precision, ZeRO stages, gradient checkpointing and accumulation; in one process, the
    launcher has tests of its own."""
    out = tmp_path / "out"
    python_stages([
        "00_data", "--preset", "paper", "--limit", 1, "--model", tiny_llama, "--preferences", "toy",
        "--max_response_tokens", 64, "--n_pairs", 300, "--n_sft", 300, "--out", out],
                  *([command.split(".py")[0], *command.split()[1:], "--out", out]
                    for *_, command in ROWS[1:]))
    for stage in (stage for directories, *_ in ROWS for stage in directories):
        manifest = json.loads((out / stage / "manifest.json").read_text())
        assert manifest["preset"] == "paper" and manifest["limit"] == 1
        values, name = manifest["hyperparameters"], stage.split("/")[0]
        for key, value in PAPER.get(name, {}).items():
            if (name, key) not in (("02_rm_ensemble", "M"),  # of the launch, not of a member
                                   ("00_data", "max_response_tokens")):  # a minute less
                assert values[key] == value, (stage, key)
        if "gradient_checkpointing" in values:
            assert values["gradient_checkpointing"] and values["zero"] == (3 if name in (
                "06_ppo", "07_metarm") else 2)
            assert values["precision"] == ("autocast" if name == "07_metarm" else "bf16")
    first = json.loads((out / "06_ppo/round_0/metrics.jsonl").read_text().splitlines()[0])
    assert first["kl"] == 0 and first["length"] > 1
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    AutoModelForCausalLM.from_pretrained(out / "06_ppo/round_1")
    AutoModelForSequenceClassification.from_pretrained(out / "07_metarm/round_1")
    tokenizer = AutoTokenizer.from_pretrained(out / "01_sft")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
