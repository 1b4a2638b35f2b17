"""Peak memory of a process in each stage, worked out before anything is run.

    python bench/memory.py           Llama-2-7B in the paper preset, 0.5B in the small one
    python bench/memory.py --model my/model --preset small --gpus 1 [--out_of 24]

Bytes from the shapes of a Llama-like decoder (Gemma, Mistral, Qwen) and the stages' own
hyperparameters, with every row as long as 00_data.py lets it be. docs/scale.md explains the terms,
tests/test_scale.py holds them against measured peaks. CUDA's own gigabyte, and what its allocator
loses between tensors, are not in it.
"""
import argparse
import sys
from importlib import import_module
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import CHUNK  # noqa: E402  (the project's root is on the path now)
from lab.record import CHOICES  # noqa: E402

LLAMA = transformers.LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False)
QWEN = transformers.Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)
CASES = [("Llama-2-7B", LLAMA, "paper", 8, 79), ("Qwen2.5-0.5B", QWEN, "small", 1, 24)]
STAGES = ["00_data", "01_sft", "02_rm_ensemble", "04_rm_denoise", "05_rm_contrastive", "06_ppo",
          "07_metarm", "08_evaluate"]
BUCKET, LIVE = 500_000_000, 1_000_000_000  # DeepSpeed's reduce_bucket_size, stage3_max_live_...


def parameters(config, policy):
    """Parameters of a policy or reward model."""
    kind = transformers.AutoModelForCausalLM if policy else transformers.AutoModel
    with torch.device("meta"):
        return sum(p.numel() for p in kind.from_config(config).parameters())


def casts(config, policy, precision):
    """Autocast's copies in bf16 of what linear layers multiply by."""
    embedding = config.vocab_size * config.hidden_size * (not policy or
                                                          not config.tie_word_embeddings)
    return 2 * (parameters(config, policy) - embedding) if precision == "autocast" else 0


def widths(config):
    """Of all queries, and of all keys, of a token."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return size * heads, size * config.num_key_value_heads


def states(P, precision, zero, G=1):
    """Weights, gradients, master copy, Adam's two moments; from ZeRO-1 on also DeepSpeed's buffer
    for gradients, with those that wait to be sent, and at ZeRO-3 gathered parameters."""
    width = 2 if precision == "bf16" else 4
    zero = max(zero, precision == "bf16")  # as common.engine_config has it
    share = [G if zero >= stage else 1 for stage in (3, 2, 1)]
    master = 4 if zero else 0
    return P * (width / share[0] + width / share[1] + (master + 8) / share[2]) + \
        width * (BUCKET * (zero > 0) + min(P, BUCKET) * (zero in (1, 2)) +
                 min(P, LIVE) * (zero == 3 and G > 1))


def layer(config, rows, row, precision):
    """What one layer keeps for its backward pass, of `rows` rows of `row` tokens: per token
    norms: their input and normalised input in fp32, and their output (in autocast once for each of
    the five linear layers that read it); q, k, v, the output of attention twice; of the MLP gate,
    its activation, up and their product; and the mask, a number for each pair of a row's tokens."""
    H, I = config.hidden_size, config.intermediate_size  # noqa: E741
    (q, kv), width = widths(config), 4 if precision == "fp32" else 2
    norms = {"fp32": 24, "bf16": 16, "autocast": 16 + 10}[precision] * H
    token = norms + width * (3 * q + 2 * kv + 4 * I + row) + 4 * config.num_attention_heads + 8
    return rows * row * token


def forward_and_backward(config, rows, prompt, K, response, precision, checkpointing, policy):
    """Activations at the start of the backward pass of a micro batch of groups in the shared
    layout; those of a policy have the logits of the response tokens."""
    H, I, V = config.hidden_size, config.intermediate_size, config.vocab_size  # noqa: E741
    row, layers = prompt + K * response, config.num_hidden_layers
    width, tokens = 4 if precision == "fp32" else 2, rows * (prompt + K * response)
    one = layer(config, rows, row, precision)
    work, places = tokens * (16 * H + 2 * width * I), rows * K * response
    head = policy * V * max(3 * width * places, 2 * width * places + (12 - width) * CHUNK)
    if checkpointing:  # the inputs of the layers, and one layer made again when the head is done
        inputs = layers * tokens * H * (2 if precision == "bf16" else 4)
        return inputs + max(one + work, head) + casts(config, policy, precision) / layers
    return layers * one + work + head + casts(config, policy, precision)


def sampling(config, sequences, prompt, response, precision):
    """Of one call of generate: keys and values, and what the prompts' pass holds in its last layer,
    or at the end the next token's distribution, sorted for top-p."""
    H, I = config.hidden_size, config.intermediate_size  # noqa: E741
    _, kv = widths(config)
    width = {"fp32": 8, "bf16": 4, "autocast": 6}[precision]  # a key (fp32 in autocast), a value
    cached = config.num_hidden_layers * kv * width  # a token
    return casts(config, True, precision) + sequences * max(
        prompt * (cached + 5 * H * (2 if precision == "bf16" else 4) +
                  3 * I * (4 if precision == "fp32" else 2)),
        (prompt + response) * cached + 38 * config.vocab_size)


def stages(config, tables, G):
    """{stage: {what it holds at its peak: bytes}} from the hyperparameters of each."""
    policy, reward = (parameters(config, x) for x in (True, False))
    out, run = {}, tables["00_data"]
    prompt, response = run["max_prompt_tokens"], run["max_response_tokens"]

    def training(h, K, policy=False, views=1):
        return forward_and_backward(config, h["micro_batch_size"] * views, prompt, K, response,
                                    h["precision"], h["gradient_checkpointing"], policy)

    def held(h, *models):
        return sum(states(P, h["precision"], h["zero"], G) for P in models)

    def generation(h, precision, K):
        return sampling(config, h["generate_batch_size"] * K, prompt, response, precision)

    for name in ("01_sft", "02_rm_ensemble", "04_rm_denoise", "05_rm_contrastive"):
        h, sft = tables[name], name == "01_sft"
        out[name] = {"states": held(h, policy if sft else reward), "activations": training(
            h, 1 if sft else 2, sft, views=1 + (name == "05_rm_contrastive"))}
    h = tables["06_ppo"]
    width, sharded = 2 if h["precision"] == "bf16" else 4, h["zero"] == 3
    out["06_ppo"] = {
        "states": held(h, policy, reward),
        "reference and reward model": (policy + reward) * width / (G if sharded else 1),
        "copy to sample from": policy * width * sharded,
        "activations": training(h, h["rollouts"], True),
        "sampling": generation(h, h["precision"], h["rollouts"])}
    h = tables["07_metarm"]
    share, width = G if h["zero"] == 3 else 1, 2 if h["precision"] == "bf16" else 4
    out["07_metarm"] = {
        "states": held(h, reward), "theta": reward * width / share,
        "activations": max(training(h, K) for K in (2, h["k"]))}
    sampled = "fp32" if h["precision"] == "fp32" else "bf16"
    out["07_metarm, sampling"] = {"policy": policy * (4 if sampled == "fp32" else 2),
                                  "sampling": generation(h, sampled, h["k"])}
    h = tables["08_evaluate"]
    out["03_strength, 08_evaluate"] = {"model": policy * (2 if h["precision"] == "bf16" else 4),
                                       "sampling": generation(h, h["precision"], 1)}
    return out


def total(parts):
    """Peak of a stage: it does not train while it samples."""
    either = max(parts.get("activations", 0), parts.get("sampling", 0))
    return either + sum(v for k, v in parts.items() if k not in ("activations", "sampling"))


def hyperparameters(preset):
    """{stage: its hyperparameters} on a GPU."""
    column = CHOICES["preset"].index(preset)
    return {name: {k: row[column] for k, row in import_module(name).HPARAMS.items()}
            for name in STAGES}


def report(name, config, tables, preset, G, most):
    """Lines of Markdown: a row a stage, in GiB."""
    out = [f"{name}, {parameters(config, True) / 1e9:.2f} billion parameters, preset {preset}, "
           f"{G} x {most} GiB:", "", "| stage | GiB | of which |", "| --- | --- | --- |"]
    for stage, parts in stages(config, tables, G).items():
        held = ", ".join(f"{k} {v / 2**30:.1f}" for k, v in parts.items() if v)
        over = " (too much)" if total(parts) > most * 2**30 else ""
        out.append(f"| {stage} | {total(parts) / 2**30:.1f}{over} | {held} |")
    return "\n".join(out)


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", help="a model's folder, or hub id (default: the two above)")
    flags.add_argument("--preset", default="small", choices=("paper", "small", "toy"),
                       help="of --model (small)")
    flags.add_argument("--gpus", type=int, default=1, help="processes for --model (1)")
    flags.add_argument("--out_of", type=float, default=24, help="GiB of one GPU (24)")
    args = flags.parse_args()
    cases = CASES if not args.model else [
        (args.model, transformers.AutoConfig.from_pretrained(args.model), args.preset, args.gpus,
         args.out_of)]
    print("\n\n".join(report(name, config, hyperparameters(preset), preset, G, size)
                      for name, config, preset, G, size in cases))


if __name__ == "__main__":
    sys.exit(main())
