"""Stage 01: supervised fine-tuning, which gives pi^SFT (section 2.1; values of appendix B.2).

Reads 00_data/sft.jsonl, writes 01_sft/: a stock causal LM with its tokenizer. The loss is the mean
negative log-likelihood of the response and EOS tokens; prompt tokens carry none.

With `--model tiny` in stage 00 (the toy preset) a byte-level BPE tokenizer is trained on the run's
own texts and a Llama of about half a million parameters starts from random weights. A model without
a pad token, or whose pad is its EOS, gets a new one: with pad = EOS stock classifiers read the
reward one token early. A tokenizer that ends every text in EOS is saved without that.

Departures from the paper: (1) every 50th row is held out to report a validation perplexity.

    deepspeed 01_sft.py                # or: python 01_sft.py
    deepspeed --num_gpus 8 01_sft.py   # Llama-2-7B, after `python 00_data.py --preset paper`
"""
import math
from functools import partial

import tokenizers
import transformers

import common

HPARAMS = {
    # name: (paper, small, toy, help)
    "epochs": (1.0, 1.0, 3.0, "passes over the data"),
    "batch_size": (32, 16, 16, "global batch, in examples"),
    "micro_batch_size": (4, 4, 16, "examples per process and forward pass"),
    "eval_batch_size": (8, 8, 64, "examples per process when evaluating"),
    "lr": (2e-5, 1e-5, 8e-3, "peak learning rate"),
    "warmup": (0.1, 0.1, 0.1, "share of the steps with rising learning rate"),
    "eval_every": (500, 20, 500, "steps between evaluations, beside each epoch's end"),
    "vocab_size": (0, 0, 2048, "size of the trained tokenizer, --model tiny only"),
    "hidden_size": (0, 0, 112, "--model tiny only"),
    "layers": (0, 0, 2, "--model tiny only"),
    **common.TRAINING,
}


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE on the run's own texts, with pad and EOS tokens of their own."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "</s>"], show_progress=False,
        initial_alphabet=byte_level.alphabet()))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
        clean_up_tokenization_spaces=False)


def tiny_llama(args, tokenizer):
    """A Llama from scratch; its size follows --hidden_size and --layers."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden_size,
        intermediate_size=8 * args.hidden_size // 3, num_hidden_layers=args.layers,
        num_attention_heads=4, tie_word_embeddings=True, max_position_embeddings=4096,
        initializer_range=0.05, attention_dropout=0.0, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None))


def load_base(args, rows):
    """(model, tokenizer) to start from: made here for `tiny`, else from a local path or hub id."""
    name = args.run["model"]
    if name == "tiny":
        for size in ("vocab_size", "hidden_size", "layers"):  # the other columns have none
            setattr(args, size, getattr(args, size) or HPARAMS[size][2])
        tokenizer = train_tokenizer((row["prompt"] + row["response"] for row in rows),
                                    args.vocab_size)
        return tiny_llama(args, tokenizer), tokenizer
    if args.preset != "toy" and (args.vocab_size or args.hidden_size or args.layers):
        common.die("--vocab_size, --hidden_size and --layers are for --model tiny of 00_data.py")
    try:
        model, tokenizer = common.load_policy(name, args), common.load_tokenizer(name)
    except (OSError, ValueError) as error:
        common.die(f"cannot load --model {name}: {common.first_line(error)}")
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    ends = tokenizer("a")["input_ids"]
    if ends[-1] == tokenizer.eos_token_id:  # stock tools would end prompts in it, too
        tokenizer.add_bos_token, tokenizer.add_eos_token = ends[0] == tokenizer.bos_token_id, False
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
           for name in ("bos", "eos", "pad")}
    model.config.update(ids)
    # beams, suppressed tokens, min_p of the base's would shape every sample, or cannot be saved
    model.generation_config = transformers.GenerationConfig(**ids)
    return model, tokenizer


def nll(model, batch):
    """Negative log-likelihood (nats) of the responses of a batch, [B, 1]."""
    logps = common.token_logps(common.response_logits(model, batch), batch["response_ids"])
    return -(logps * batch["mask"]).sum(-1)


def perplexity(model, groups, args, collate):
    """exp of the mean negative log-likelihood per response token of all groups, ranks sharing."""
    model.eval()
    size, mine = args.eval_batch_size * common.world_size(), []
    with common.inference(args):
        for start in range(0, len(groups), size):
            chunk = groups[start:start + size]
            share = chunk[common.rank()::common.world_size()]
            # ZeRO-3: a rank without a share runs the forward pass too
            batch = collate(share or chunk[:1])
            total, count = nll(model, batch).sum().item(), batch["mask"].sum().item()
            mine.append((start + common.rank(), (total, count) if share else (0.0, 0)))
    model.train()
    totals, counts = zip(*common.gather_rows(mine))
    common.finite(totals)
    return math.exp(sum(totals) / sum(counts))


def main(argv=None):
    args = common.parse_args(__doc__, HPARAMS, argv=argv)
    data = common.require(args, "00_data", "python 00_data.py")
    n = common.read_json(data / "manifest.json")["metrics"]["rows"]
    if n["train"] < 10 or n["valid"] < 2:
        common.die(f"{n['train']} pairs to train on and {n['valid']} to validate are left, ten and "
                   "two are needed: give 00_data.py more, or another --valid_fraction")
    common.setup(args)
    base = [] if args.run["model"] == "tiny" else common.user_files(args.run["model"])
    template = "00_data/chat_template.jinja"
    run = common.begin(args, "01_sft", ["00_data/sft.jsonl", template, *base])
    rows = common.read_jsonl(data / "sft.jsonl")
    model, tokenizer = load_base(args, rows)
    used = data / "chat_template.jinja"  # as 00 used it, with the date that it is told; or not
    tokenizer.chat_template = used.read_text(encoding="utf-8") if used.exists() else None
    common.log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, vocabulary "
               f"{len(tokenizer)}")
    policy_end, end = common.endings(tokenizer, args.run)  # the policy learns to say EOS last
    groups = [{**g, "responses": [r[:len(r) - len(end)] + policy_end for r in g["responses"]]}
              for g in common.encode(tokenizer, rows, ["response"], args.run)]
    valid, train = groups[::50], [g for i, g in enumerate(groups) if i % 50] or groups
    steps = common.steps_for(args, len(train))
    engine = common.make_engine(model, args, args.batch_size, args.lr, steps)
    collate = partial(common.collate, pad_id=tokenizer.pad_token_id,
                      layout=common.choose_layout(
                          args, lambda batch: nll(engine, batch) / batch["mask"].sum(-1), train))

    if not run.done:
        common.save_model(engine, run.dir, tokenizer)  # what cannot be saved fails now
        run.state["start"] = perplexity(engine, valid, args, collate)
        run.log(0, valid_perplexity=run.state["start"])
    batches = common.batches(train, args.batch_size, steps, args.seed)
    for step, batch in run.steps(batches, sft=engine):
        micros = common.micro_batches(batch, args.micro_batch_size)
        tokens = sum(len(g["responses"][0]) for g in batch)  # the global batch's mean is over them
        for micro in micros:
            loss = nll(engine, collate(micro)).sum() * common.world_size() * len(micros) / tokens
            engine.backward(loss)
            run.note(loss=loss, grad_norm=common.step(engine))
        early = step in (3, 6, 12) and args.run["model"] != "tiny"  # a base harmed is seen at once
        if run.due(step) or early:
            valid_perplexity = perplexity(engine, valid, args, collate)
            run.log(step, valid_perplexity=valid_perplexity)
            if valid_perplexity > 2 * run.state["start"]:
                common.log(f"warning: perplexity {valid_perplexity:.1f} on held-out responses, more"
                           f" than twice the {run.state['start']:.1f} at the start: stop here and "
                           "try a smaller --lr, or 00_data.py with another --preset")

    common.save_model(engine, run.dir, tokenizer)
    sample(engine, tokenizer, train, run)
    run.finish(valid_perplexity=valid_perplexity, steps=steps)


def sample(engine, tokenizer, groups, run):
    """Greedy responses to a few training prompts, for the eye: samples.jsonl."""
    prompts = [g["prompt"] for g in groups[:5]]
    pad = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    model = common.whole_model(engine).eval()
    with common.inference(run.args):
        out = model.generate(
            **{k: pad[k].to(common.device()) for k in ("input_ids", "attention_mask")},
            do_sample=False, max_new_tokens=run.args.run["max_response_tokens"],
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(out[:, pad["input_ids"].shape[1]:], skip_special_tokens=True)
    if common.rank() == 0:
        common.write_jsonl(run.dir / "samples.jsonl", [
            {"prompt": tokenizer.decode(p), "response": text} for p, text in zip(prompts, texts)])


if __name__ == "__main__":
    common.launch(main)
