"""Base models of several families, each with a chat template of its own kind, from 00 to 08; what
is saved behaves in stock transformers as it was trained. SmolLM2 where SMOLLM2 names its folder."""
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, python_stages

HEADERS = ("{{ bos_token }}{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}"
           "<|eot|>{% endfor %}{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}")
CHATML = ("{% if messages[0].role != 'system' %}<|im_start|>system\nBe of help.<|im_end|>\n"
          "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
THINK = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and "
         "loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TURNS = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception("
         "'System role not supported') }}{% endif %}<start_of_turn>{{ 'model' if m.role == "
         "'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")  # no EOS in it: Gemma
INST = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
DATED = ("{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
         "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}")
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
# family: (configuration, chat template, EOS, what the tokenizer adds to a text)
FAMILIES = {
    "llama": (transformers.LlamaConfig(**SIZE), HEADERS, "<|eot|>"),
    "qwen2": (transformers.Qwen2Config(**SIZE), CHATML, "<|im_end|>"),
    "qwen3": (transformers.Qwen3Config(**SIZE), THINK, "<|im_end|>"),
    "gemma": (transformers.GemmaConfig(**SIZE), TURNS, "</s>"),
    "gpt2": (transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4), None, "</s>"),
    "gpt_neox": (transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4), None,
        "</s>", "<s> $A </s>"),  # it would end prompts in EOS too
    "phi3": (transformers.Phi3Config(**SIZE, pad_token_id=None), DATED, "<|end|>"),
    "mixtral": (transformers.MixtralConfig(**SIZE, num_local_experts=2), INST, "</s>")}
MARKS = ["<s>", "</s>", "<|h|>", "<|/h|>", "<|eot|>", "<|im_start|>", "<|im_end|>", "<|user|>",
         "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|assistant|>", "<|system|>",
         "<|endoftext|>"]


def make(path, config, template, eos, written=None):
    """A random base with the odd generation settings that real ones have, its tokenizer's padding
    on the left and, but for the tokenizer, another EOS. written: what the tokenizer adds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["How do I bake bread? Gladly."], trainers.BpeTrainer(
        vocab_size=300, special_tokens=MARKS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if written:
        tokenizer.post_processor = processors.TemplateProcessing(
            written, special_tokens=[("<s>", 0), ("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=eos,
        padding_side="left")
    fast.chat_template = template
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config.update({"vocab_size": len(fast), "bos_token_id": 0, "eos_token_id": 5})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({
        "temperature": 0.1, "num_beams": 3, "min_p": 0.5, "suppress_tokens": [40, 41],
        "eos_token_id": [5, 6], "repetition_penalty": 3.0}))
    return path


def dialogue(i, side):
    return [{"role": "user", "content": f"How do I bake bread {i}?"},
            {"role": "assistant", "content": f"{'Gladly' if side else 'No'}: {i % 8 * 'so '}."}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{family: its run directory}, all stages of all families in one process."""
    folder, commands = tmp_path_factory.mktemp("families"), []
    mine = folder / "mine.jsonl"
    mine.write_text("".join(json.dumps(
        {"id": str(i), "chosen": dialogue(i, 1), "rejected": dialogue(i, 0)}) + "\n"
        for i in range(24)))
    for family, parts in FAMILIES.items():
        base, flags = make(folder / "bases" / family, *parts), ["--out", folder / family]
        commands += [
            ["00_data", *flags, "--preferences", mine, "--model", base, "--limit", 1,
             "--max_prompt_tokens", 128, "--max_response_tokens", 64],
            ["01_sft", *flags], ["02_rm_ensemble", *flags, "--M", 2, "--precision", "fp32"],
            ["03_strength", *flags, "--M", 2, "--precision", "fp32"],
            ["04_rm_denoise", *flags, "--methods", "baseline", "flip_margin"],
            ["05_rm_contrastive", *flags, "--methods", "simcse_diff"],
            ["06_ppo", *flags], ["07_metarm", *flags], ["06_ppo", *flags, "--round", 1],
            ["08_evaluate", *flags, "--M", 2]]
    python_stages(*commands)
    return {family: folder / family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, runs):
    out = runs[family]
    run = json.loads((out / "run.json").read_text())
    template = FAMILIES[family][1]
    assert run["preset"] == "small" and run["form"] == ("chat" if template else "hh")
    assert run["lead"] == ("" if template not in (None, INST) else " ")
    assert run["day"] == ("2024-07-26" if template == DATED else None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "02_rm_ensemble/rm_01")
    assert tokenizer.padding_side == "right" and tokenizer.pad_token_id != tokenizer.eos_token_id
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(
        out / "02_rm_ensemble/rm_01")
    scored = 0
    for split in ("train", "valid"):  # a stock classifier gives what stage 03 recorded, alone and
        rows = [json.loads(x) for x in open(out / f"03_strength/{split}.jsonl")]  # in a batch
        for side, name in enumerate(("rejected", "chosen")):
            if template:
                texts = [tokenizer.apply_chat_template(dialogue(int(r["id"]), side), tokenize=False)
                         for r in rows]
            else:
                texts = [r["prompt"] + r[name] + tokenizer.eos_token for r in rows]
            batch = tokenizer(texts, add_special_tokens=not template, padding=True,
                              return_tensors="pt")
            with torch.no_grad():
                rewards = stock(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
            recorded = torch.tensor([r[f"{name}_score_list"][1] for r in rows])
            assert (rewards[:, 0] - recorded).abs().max() < 1e-3
            scored += len(rows)
    assert scored == 48
    # transformers 4 would miss these, the second in silence
    for stage in ("01_sft", "02_rm_ensemble/rm_01"):
        config, told = (json.loads((out / stage / f"{name}config.json").read_text())
                        for name in ("", "tokenizer_"))
        assert told["tokenizer_class"] != "TokenizersBackend"
        rope = config.get("rope_parameters", {})
        assert config.get("rope_theta") == rope.get("rope_theta")
    if template:  # and so does the code on its card
        card = (out / "02_rm_ensemble/rm_01/README.md").read_text(encoding="utf-8")
        values = {"path": out / "02_rm_ensemble/rm_01", "dialogue": dialogue(int(rows[0]["id"]), 1)}
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], values)
        assert values["reward"].item() == pytest.approx(rows[0]["chosen_score_list"][1], abs=1e-3)
    for stage in ("01_sft", "06_ppo/round_1"):
        written = json.loads((out / stage / "generation_config.json").read_text())
        written.pop("transformers_version"), written.pop("_from_model_config", None)
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        assert written == {"bos_token_id": 0, "eos_token_id": eos, "pad_token_id": pad}
        config = json.loads((out / stage / "config.json").read_text())
        assert config["eos_token_id"] == eos and config["pad_token_id"] == pad


def test_the_families_in_the_docs_are_those_that_were_tried():
    rows = json.loads((ROOT / "bench/families.json").read_text())["rows"]
    text = " ".join((ROOT / "docs/models.md").read_text().split())
    for first, begins in (("work", "00 to 07"), ("refused by 00", "00_data"), (
            "stop in stage 05", "05_rm"), ("were not made", "not made")):
        said = re.search(rf"- {first}[^(]* \((\d+)\): (.*?)\.(?: - |\s*All)", text)
        names = [row["family"] for row in rows if row["result"].startswith(begins)]
        assert said[2].split(", ") == names and int(said[1]) == len(names), first
    assert {row["family"] for row in rows} >= set(FAMILIES)
    assert max(row["difference"] or 0 for row in rows) < 6e-5


def test_a_family_that_cannot_recompute_activations_keeps_them(capsys):
    from lab.base import recompute_activations
    for config, can in ((transformers.LlamaConfig(**SIZE), True),
                        (transformers.OpenAIGPTConfig(n_embd=32, n_layer=1, n_head=4), False)):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        recompute_activations(model)
        assert model.is_activation_checkpointing == can
        assert ("cannot recompute" in capsys.readouterr().out) != can


SMOLLM2 = Path(os.environ.get("SMOLLM2", "/nowhere"))
HH = ROOT.parent / "shared/data/hh_harmless_sample.jsonl.gz"


@pytest.mark.skipif(not (SMOLLM2.is_dir() and HH.exists()), reason="SMOLLM2 names no folder")
def test_smollm2_from_real_rows_to_the_page(tmp_path):
    """A pretrained model through the driver as a user would: about an hour on two cores."""
    out = tmp_path / "out"
    done = subprocess.run(["bash", "run_all.sh", "--preferences", HH, "--model", SMOLLM2, "--limit",
                           "2", "--rounds", "1", "--out", out], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (out / "09_report/index.html").exists()
    assert json.loads((out / "run.json").read_text())["preset"] == "small"
    history = [json.loads(line) for line in open(out / "01_sft/metrics.jsonl")]
    assert history[-1]["valid_perplexity"] < history[0]["valid_perplexity"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "04_rm_denoise/baseline")
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(
        out / "04_rm_denoise/baseline")
    import common
    from types import SimpleNamespace
    args = SimpleNamespace(precision="fp32", layout="auto", eval_batch_size=4, zero=0,
                           run=json.loads((out / "run.json").read_text()))
    rows = [json.loads(line) for line in open(out / "00_data/valid.jsonl")][:8]
    groups = common.encode(tokenizer, rows, ["chosen"], args.run)
    ours = common.score_by(out / "04_rm_denoise/baseline", groups, args, tokenizer)[:, 0]
    for row, reward in zip(rows, ours):
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", row["prompt"], re.DOTALL)
        talk = [{"role": r, "content": c} for r, c in [*turns, ("assistant", row["chosen"])]]
        ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)
        if ids["input_ids"].shape[1] < 512:  # neither side was cut
            with torch.no_grad():
                assert abs(stock(**ids).logits.item() - reward) < 1e-3
    policy = transformers.AutoModelForCausalLM.from_pretrained(out / "06_ppo/round_1")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "What is 1 + 1?"}],
                                        add_generation_prompt=True, return_tensors="pt",
                                        return_dict=True)
    answer = policy.generate(**ids, max_new_tokens=200)[0, ids["input_ids"].shape[1]:].tolist()
    assert answer[-1] == tokenizer.eos_token_id and answer.count(tokenizer.eos_token_id) == 1
