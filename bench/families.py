"""Which families of base models work: a tiny random model of each through the stages.

    python bench/families.py                    every family that transformers has a classifier for
    python bench/families.py llama qwen3        some

Each is made with a byte-level tokenizer and a ChatML template and goes through 00 to 07 (of 04 the
baseline, of 05 SimCSE on differences, of 06 round 0), a step each, in fp32. difference: the largest
between stage 03's scores (four decimals) and what a stock AutoModelForSequenceClassification gives
the dialogues, one by one and in padded batches.
"""
import argparse
import contextlib
import io
import json
import tempfile
from importlib import import_module
from pathlib import Path

import harness  # first: it puts the project on the path

import torch
import transformers
from transformers.models.auto import modeling_auto

TYPES = [t for t in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
         if t in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES]
SIZE = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, moe_intermediate_size=32, num_experts=4, num_local_experts=4,
    n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
    shared_expert_intermediate_size=32)
SIZES = [{**SIZE, "head_dim": 8}, SIZE, {**SIZE, "num_key_value_heads": 4}]  # the first it takes
LATENT = {"num_key_value_heads": 4, "head_dim": 16, "qk_rope_head_dim": 16, "n_group": 1,
          "topk_group": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
          "linear_value_head_dim": 8}
MORE = {**dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "minicpm3"), LATENT),
        **dict.fromkeys(("qwen3_5_text", "qwen3_next"), LINEAR),
        "gptj": {"rotary_dim": 4}, "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
        "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16}}
MOST = 20e6  # parameters: what these sizes do not make small is not tried
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def dialogue(i, chosen):
    return [{"role": "user", "content": f"How do I bake bread {i}?"}, {
        "role": "assistant", "content": f"{'Gladly' if chosen else 'No'}: {i % 8 * 'so '}."}]


def make(family, path):
    """A tiny base in a directory. → why there is none, or None"""
    tokenizer = import_module("01_sft").train_tokenizer(["How do I bake bread? Gladly."], 320)
    tokenizer.chat_template = TEMPLATE
    problem = None
    for size in SIZES:
        try:
            config = transformers.AutoConfig.for_model(
                family, vocab_size=320, pad_token_id=tokenizer.pad_token_id,
                **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id),
                **size | MORE.get(family, {}))
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
            if sum(p.numel() for p in model.parameters()) > MOST:
                return "not made small by these sizes"
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
            tokenizer.save_pretrained(path)
            return None
        except Exception as error:  # a configuration refuses sizes in its own way
            problem = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return problem


def run(out, base, rows):
    """The stages, as commands. → what ended them, or None"""
    few = "--batch_size 4 --minibatch_size 4 --rollouts 2"
    for script, flags in (
            ("00_data", f"--preferences {rows} --model {base} --limit 1 --max_prompt_tokens 128 "
                        "--max_response_tokens 64"), ("01_sft", ""), ("02_rm_ensemble", "--M 2"),
            ("03_strength", "--M 2"), ("04_rm_denoise", "--methods baseline"),
            ("05_rm_contrastive", "--methods simcse_diff"), ("06_ppo", few),
            ("07_metarm", "--meta_prompts 20")):
        precision = ["--precision", "fp32"] if script != "00_data" else []
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                import_module(script).main([*flags.split(), *precision, "--out", str(out)])
        except SystemExit:
            return f"{script}: {said.getvalue().split('error: ')[-1].strip()}"
        except Exception as error:
            return f"{script}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def difference(out):
    """Between stock scores and stage 03's."""
    path = out / "02_rm_ensemble/rm_01"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model, largest = transformers.AutoModelForSequenceClassification.from_pretrained(path), 0.0
    rows = [json.loads(line) for split in ("train", "valid")
            for line in open(out / f"03_strength/{split}.jsonl", encoding="utf-8")]
    for side, name in enumerate(("rejected", "chosen")):
        texts = [tokenizer.apply_chat_template(dialogue(int(r["id"]), side), tokenize=False)
                 for r in rows]
        recorded = torch.tensor([r[f"{name}_score_list"][1] for r in rows])
        for size in (1, len(texts)):
            for i in range(0, len(texts), size):
                batch = tokenizer(texts[i:i + size], padding=True, return_tensors="pt")
                with torch.no_grad():
                    scores = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
                largest = max(largest, (scores[:, 0] - recorded[i:i + size]).abs().max().item())
    return largest


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("families", nargs="*", help="model types (all)")
    flags.add_argument("--report", help="file of the results (bench/families.json)")
    args, found = flags.parse_args(), []
    for family in args.families or TYPES:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            rows = folder / "rows.jsonl"
            rows.write_text("".join(json.dumps({
                "id": str(i), "chosen": dialogue(i, 1), "rejected": dialogue(i, 0)}) + "\n"
                for i in range(24)))
            problem = make(family, folder / "base")
            problem = f"not made: {problem}" if problem else run(
                folder / "out", folder / "base", rows)
            row = {"family": family, "result": (problem or "00 to 07").replace(f"{folder}/", ""),
                   "difference": None if problem else difference(folder / "out")}
        print(json.dumps(row), flush=True)
        found.append(row)
    harness.report("families", found, ["family", "result", "difference"], args.report)


if __name__ == "__main__":
    main()
