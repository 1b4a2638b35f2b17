"""What every stage needs: groups, models, engines, scoring, generation, the record of a run.

Letters of shape comments: B groups, K responses per group, T response tokens (EOS included), R
rows, L columns of a row, H hidden size, V vocabulary, M models, N pairs.

The one data structure is the **group**, a prompt with its K responses, each with its end (EOS):
    {"id": str, "prompt": [token ids], "responses": [[token ids], ...]}
A pair is K = 2 (chosen first), MetaRM's meta set K = k, PPO's roll-outs K = 4 or 16, SFT K = 1.
"""
import random
from functools import partial

from lab.record import (  # noqa: F401  (first: it sets the environment; a stage sees one module)
    SAMPLING, TRAINING, barrier, begin, current, device, die, finished, finite, first_line, free,
    from_rank_0, gather_rows, inference, initialize, is_name, launch, log, new_parser, parse_args,
    progress, rank, read_json, read_jsonl, recompute_activations, replace_attention, require,
    save_checkpoint, save_stock, set_seed, setup, side_by_side, subset, user_files, world_size,
    write_jsonl, write_text)

import numpy
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint

DTYPE = {"fp32": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16}  # of parameters
ATTENTION = {"attention", "full_attention", "sliding_attention"}  # what the shared layout takes
CHUNK = 256  # places whose softmax is in memory at once: that of all would be the largest tensor
LABELS = ("margin", "smoothing")  # of a pair: mu_hat of Eq. 6, alpha of Eq. 5
SAFE = {"use_safetensors": True, "trust_remote_code": False}  # no pickles, no code with a model
load_tokenizer = partial(transformers.AutoTokenizer.from_pretrained, trust_remote_code=False)

# ---------------------------------------------------------------- groups and batches
def endings(tokenizer, run):
    """Ids that end a response: a policy's, up to the EOS that it is to say; and as a reward model
    reads it, what the chat template ends it in ("<|im_end|>\\n"); without one, EOS for both."""
    eos = tokenizer.eos_token_id
    end = tokenizer(run["end"], add_special_tokens=False)["input_ids"] \
        if run.get("form") == "chat" else [eos]
    return end[:end.index(eos) + 1] if eos in end else end + [eos], end


def for_reward(responses, tokenizer, run):
    """A policy's responses as a reward model reads them: ended as in `encode`, cut ones too."""
    policy, end = endings(tokenizer, run)
    bare = (r[:-len(policy)] if r[-len(policy):] == policy else
            r[:-1] if r[-1] == policy[-1] else r for r in responses)
    return [r + end or policy for r in bare]


def encode(tokenizer, rows, keys, run):
    """Rows with "prompt" and the texts named by `keys` (a text or a list of texts each) → groups.
    Prompts are cut on the left, responses on the right, before what ends each (`endings`). Where
    prompt + response tokenized whole begins with the prompt's own tokens (nearly always) the ids
    are those of stock tools; otherwise the response is tokenized by itself."""
    eos, chat, (_, end) = tokenizer.eos_token_id, run.get("form") == "chat", endings(tokenizer, run)
    owner = [(i, text + run.get("end", "")) for i, row in enumerate(rows) for key in keys
             for text in (row[key] if isinstance(row[key], list) else [row[key]])]
    texts = [r["prompt"] for r in rows] + [rows[i]["prompt"] + text for i, text in owner]
    whole, bare = (tokenizer("a", add_special_tokens=x)["input_ids"] for x in (True, False))
    bos = [] if chat else whole[:whole.index(bare[0])]  # OPT's is its EOS token
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    prompts, groups, T = ids[:len(rows)], [], run["max_response_tokens"]
    for row, prompt in zip(rows, prompts):
        first = prompt[:1] if prompt[:1] == [tokenizer.bos_token_id] else bos  # written already
        kept = first + prompt[first == prompt[:1]:][-(run["max_prompt_tokens"] - len(first)):]
        groups.append({"id": row["id"], "prompt": kept or [eos], "responses": []})
    for (i, text), whole in zip(owner, ids[len(rows):]):
        n = len(prompts[i])
        response = whole[n:] if whole[:n] == prompts[i] else \
            tokenizer(text, add_special_tokens=False)["input_ids"]
        if not chat or len(response) > T:
            response = response[:len(response) - (response[-1:] == end)][:T - len(end)] + end
        groups[i]["responses"].append(response)
    return groups


def encode_pairs(tokenizer, rows, run):
    """Preference rows → (rows kept, their groups: chosen first, with the row's `margin` and
    `smoothing`); pairs equal after truncation are dropped and counted."""
    groups = encode(tokenizer, rows, ("chosen", "rejected"), run)
    kept = [(row, group | {name: row[name] for name in LABELS if name in row})
            for row, group in zip(rows, groups) if group["responses"][0] != group["responses"][1]]
    if len(kept) < len(rows):
        log(f"dropped {len(rows) - len(kept)} of {len(rows)} pairs: equal after truncation")
    if rows and not kept:
        die("no pair is left: give 00_data.py a larger --max_response_tokens")
    return tuple(map(list, zip(*kept))) or ([], [])


def group_length(group):
    return len(group["prompt"]) + sum(map(len, group["responses"]))


def collate(groups, pad_id, layout="shared"):
    """Lay groups of one K out as a batch of tensors.

    shared: one row of `[prompt | y_1 | ... | y_K]` of all groups, end to end; position ids restart
    after the prompt for each response, and lab/attention.py lets a response see its prompt and
    itself only, which is exact. separate: rows `[prompt | y_k]`, padded on the right. Both give:
        input_ids, position_ids [R, L] (shared: R = 1)
        attention_mask: int32 [1, 1, B, 1 + K] on the CPU, lengths of the segments; or long [R, L]
        response_ids, mask [B, K, T]: the response tokens and which of them are real
        predict_index [B, K, T]: where in the flattened [R*L] states each is predicted from
        last_index [B, K]: where the last token is read (EOS, say), by index, not by a search
        keep: the places that need logits, or how many of a row's last; margin, smoothing [B]
    """
    shared, rows, positions, starts = layout == "shared", [], [], []
    for group in groups:
        prompt, n = group["prompt"], len(group["prompt"])
        for k, response in enumerate(group["responses"]):
            if not shared or not rows:
                rows.append([]), positions.append([])
            if not shared or k == 0:
                rows[-1] += prompt
                positions[-1] += range(n)
                last = len(rows[-1]) - 1  # the prompt's last token, which predicts the first of y_k
            starts.append((len(rows) - 1, last, len(rows[-1])))
            rows[-1] += response
            positions[-1] += range(n, n + len(response))
    flat = [r for g in groups for r in g["responses"]]                  # B*K responses
    L, T = max(map(len, rows)), max(map(len, flat))
    def padded(lists, value, length):
        return torch.from_numpy(numpy.array([x + [value] * (length - len(x)) for x in lists]))
    row, last, start = torch.tensor(starts).T.unsqueeze(-1)             # [B*K, 1] each
    t, lengths = torch.arange(T), torch.tensor([[len(r)] for r in flat])
    index = row * L + torch.where(t == 0, last, (start + t).clamp(max=L) - 1)
    batch = {"input_ids": padded(rows, pad_id, L), "position_ids": padded(positions, 0, L),
             "response_ids": padded(flat, pad_id, T).view(shape := (len(groups), -1, T)),
             "mask": (t < lengths).view(shape), "predict_index": index.view(shape),
             "last_index": (row * L + start + lengths - 1).view(shape[:2])}
    batch |= {name: torch.tensor([g[name] for g in groups]) for name in LABELS
              if all(name in g for g in groups)}  # a user's data may have some
    batch = {k: v.to(device()) for k, v in batch.items()}
    if shared:
        lengths = [[len(g["prompt"]), *map(len, g["responses"])] for g in groups]
        mask, keep = torch.tensor([[lengths]], dtype=torch.int32), batch["predict_index"].flatten()
    else:
        mask = padded([[1] * len(row) for row in rows], 0, L).to(device())
        keep = L - min(len(g["prompt"]) for g in groups) + 1
    return batch | {"attention_mask": mask, "keep": keep}


def batches(groups, batch_size, steps, seed, window=16):
    """List of `steps` global batches (lists of groups), the same on every rank: fresh permutations,
    sorted by length inside windows of batches (little padding), the batches there shuffled."""
    rng, out, n = random.Random(seed), [], steps * batch_size
    order = [g for _ in range(0, n, len(groups)) for g in rng.sample(groups, len(groups))][:n]
    for start in range(0, n, window * batch_size):
        chunk = sorted(order[start:start + window * batch_size], key=group_length)
        chunk = [chunk[i:i + batch_size] for i in range(0, len(chunk), batch_size)]
        rng.shuffle(chunk)
        out += chunk
    return out


def steps_for(args, rows):
    """Optimiser steps for --epochs passes over `rows` rows, capped by --limit."""
    return min(steps := max(1, -(-int(rows * args.epochs) // args.batch_size)), args.limit or steps)


def micro_size(batch_size, most):
    """Size of the equal micro batches, `most` or less, of a rank's share of a global batch."""
    size = min(most, mine := batch_size // world_size())
    if not size or batch_size % world_size() or mine % size:
        die(f"a batch of {batch_size} does not split evenly over {world_size()} processes in "
            f"micro batches of {size}")
    return size


def micro_batches(batch, most):
    """This rank's share of a global batch (every world_size-th group), in equal micro batches."""
    mine, size = batch[rank()::world_size()], micro_size(len(batch), most)
    return [mine[i:i + size] for i in range(0, len(mine), size)]


# ---------------------------------------------------------------- models
class Float32Linear(torch.nn.Linear):
    """The reward head computes in fp32 in every precision: bf16 scores tie."""
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class RewardModel(torch.nn.Module):
    """A stock classifier with one output, read at each response's end. ZeRO-3 needs a module."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, values=False):
        """→ rewards [B, K] and features [B, K, H] there; with `values`, V(s_t) [B, K, T] at the
        state before each response token and its features [B, K, T, H]."""
        hidden = self.model.base_model(**model_inputs(batch, self.model)).last_hidden_state
        h = hidden.flatten(0, 1)[batch["predict_index" if values else "last_index"]]  # of [R*L, H]
        return self.model.score(h).squeeze(-1), h


def model_inputs(batch, model):
    names, config = ["input_ids", "attention_mask"], getattr(model, "module", model).config
    if batch["attention_mask"].dim() == 4:  # convolutions and recurrences see the group before
        replace_attention()
        if config._attn_implementation != "sdpa" or \
                not {*(getattr(config, "layer_types", None) or ())} <= ATTENTION:
            raise ValueError("not all its layers are transformers' sdpa")
        names.append("position_ids")
    return {name: batch[name] for name in names} | {"use_cache": False}


def response_logits(model, batch):
    """Logits [B, K, T, V] that predict the response tokens, of a causal LM or its engine."""
    index, keep, L = batch["predict_index"], batch["keep"], batch["input_ids"].shape[1]
    logits = model(**model_inputs(batch, model), logits_to_keep=keep).logits        # [R, keep, V]
    return logits.view(*index.shape, -1) if torch.is_tensor(keep) else \
        logits[index // L, index % L - (L - keep)]


def token_logps(logits, ids, temperature=1.0):
    """log softmax(logits / temperature) at `ids`, in fp32 or more: [..., V], [...] → [...]."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    def logps(x, ids):
        return -F.cross_entropy(x.to(wide) / temperature, ids, reduction="none")
    pieces = zip(logits.flatten(0, -2).split(CHUNK), ids.flatten().split(CHUNK))
    return torch.cat([checkpoint(logps, *x, use_reentrant=False, preserve_rng_state=False)
                      for x in pieces]).view(ids.shape)


def load_config(path, kind, dropout=0.0):
    """Config with every dropout set to `dropout`. Stops when the checkpoint is not of a `kind`, for
    transformers would make the head that it lacks up."""
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    made = (config.architectures or [kind])[0]
    if kind not in made and not (kind == "CausalLM" and "LMHead" in made):
        die(f"{path} is a {made}, not a "
            f"{'causal language model' if kind == 'CausalLM' else 'reward model'}")
    for name, value in config.to_dict().items():
        if ("dropout" in name or "pdrop" in name) and type(value) in (int, float):
            setattr(config, name, dropout)
    return config


def load_policy(path, args):
    """A causal LM, dropout off, in the parameter type of --precision."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, config=load_config(path, "CausalLM"), dtype=DTYPE[args.precision], **SAFE)


def load_reward_model(path, args, head_seed=None, dropout=0.0):
    """A reward model; with `head_seed`, a new head N(0, 1/sqrt(H+1)) on the policy in `path`."""
    kind = "SequenceClassification" if head_seed is None else "CausalLM"
    config = load_config(path, kind, dropout)
    config.num_labels = 1
    transformers.logging.set_verbosity_error()  # that the head is new is no warning here
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, config=config, dtype=DTYPE[args.precision], **SAFE)
    transformers.logging.set_verbosity_warning()
    H, weight = model.score.in_features, model.score.weight.data
    if head_seed is not None:
        weight = torch.randn(1, H, generator=torch.Generator().manual_seed(head_seed)) / (H + 1)**.5
    model.score = Float32Linear(H, 1, bias=False, dtype=DTYPE[args.precision])
    model.score.weight.data.copy_(weight)
    return RewardModel(model)


def engine_config(args, micro_batch_size, accumulation):
    """DeepSpeed's configuration; what its versions default differently is written out."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": getattr(args, "max_grad_norm", 0.0),
        "bf16": {"enabled": (bf16 := args.precision == "bf16"), "check_grad_overflow": False},
        # in bf16 AdamW counts a step too many at ZeRO-0; round-robin gradients break
        # safe_get_full_grad; parameters gathered at ZeRO-3 would have two copies for MetaRM
        "zero_optimization": {"stage": max(args.zero, bf16), "round_robin_gradients": False,
                              "stage3_param_persistence_threshold": 0},
        "torch_autocast": {"enabled": args.precision == "autocast", "dtype": "bfloat16",
                           "lower_precision_safe_modules": []}}


def make_engine(module, args, batch_size, lr, steps):
    """DeepSpeed engine with AdamW: linear warm-up over a share of the steps, linear decay to 0."""
    micro = micro_size(batch_size, args.micro_batch_size)
    if args.gradient_checkpointing:
        recompute_activations(module.model if isinstance(module, RewardModel) else module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = transformers.get_scheduler("linear", optimizer, int(args.warmup * steps), steps)
    return initialize(
        model=module.train(), optimizer=optimizer, lr_scheduler=schedule,
        config=engine_config(args, micro, batch_size // (micro * world_size())))


def step(engine):
    """engine.step(). → norm of the gradient before clipping, None while gradients accumulate."""
    due = engine.is_gradient_accumulation_boundary()
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]  # at ZeRO-0 only
    norm = torch.nn.utils.get_total_norm(grads) if grads and due else None
    engine.step()
    return float(engine.get_global_grad_norm() or 0.0 if norm is None else norm) if due else None


class RewardEngine:
    """A stage's reward model at training: its engine and the layout of its batches, which `score`
    and `micro_batches` (this rank's share of a global batch, collated) need not be told."""

    def __init__(self, module, run, tokenizer, groups, steps):
        self.run, self.tokenizer, args = run, tokenizer, run.args
        self.engine = make_engine(module, args, args.batch_size, args.lr, steps)
        run.done or save_model(self.engine, run.dir, tokenizer)  # what cannot be saved fails now
        self.engine.eval()
        self.layout = choose_layout(args, lambda batch: self.engine(batch)[0], groups)
        self.engine.train()
        self.backward, self.step = self.engine.backward, partial(step, self.engine)
        layout = {"pad_id": tokenizer.pad_token_id, "layout": self.layout}
        self.collate = partial(collate, **layout)
        self.score = partial(score, self.engine, args=args, **layout)

    def __call__(self, batch):
        return self.engine(batch)

    def micro_batches(self, batch):
        return map(self.collate, micro_batches(batch, self.run.args.micro_batch_size))

    def save(self):
        """Write the model, and give the memory back for the next one of the launch."""
        save_model(self.engine, self.run.dir, self.tokenizer)
        free(self.engine)


def frozen(module, args, shard=False):
    """A model for inference: the module on the device; with `shard`, at ZeRO-3, sharded."""
    module = module.eval().requires_grad_(False)
    return initialize(model=module, config=engine_config(args, 1, 1)) \
        if shard and args.zero == 3 else module.to(device())


def save_model(engine, path, tokenizer):
    """Write a stock transformers checkpoint (safetensors) with its tokenizer, at any ZeRO stage."""
    module = getattr(engine, "module", engine)
    zero3 = getattr(engine, "zero_optimization_stage", int)() == 3
    state = engine._zero3_consolidated_16bit_state_dict() if zero3 else module.state_dict()
    if rank() == 0:
        tokenizer.padding_side = "left"  # for generation
        if isinstance(module, RewardModel):
            module, tokenizer.padding_side = module.model, "right"  # GPT-2's scores depend on it
            state = {k[6:]: v for k, v in state.items() if k.startswith("model.")}
        module.config.pad_token_id = tokenizer.pad_token_id
        save_stock(module, state, tokenizer, path)
    barrier()


def choose_layout(args, forward, groups):
    """Settle --layout auto: compare `forward(batch)` → [B, K] in both, on short to long groups."""
    if args.layout != "auto":
        return args.layout
    few = sorted(groups, key=group_length, reverse=True)[::max(1, (len(groups) - 1) // 3)][:4]
    tolerance = 1e-3 if args.precision == "fp32" else 0.1  # bf16 keeps 8 bits
    try:
        with inference(args):
            shared, separate = (forward(collate(few, 0, x)) for x in ("shared", "separate"))
        difference = ((shared - finite(separate)).abs() / separate.abs().clamp(min=1)).max().item()
        if difference <= tolerance:
            return "shared"
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        difference = first_line(error)
    log(f"layout: the model does not take the shared one ({difference}): one row per response")
    return "separate"


def score(model, groups, args, layout, pad_id, features=False):
    """Rewards [N, K] (fp32, CPU) of all groups under a reward model or its engine, ranks sharing
    the work; with `features` also the features [N, K, H] that they are read from. Stops at NaN."""
    was_training, mine = model.training, []
    model.eval()
    order = sorted(range(len(groups)), key=lambda i: group_length(groups[i]))
    size = args.eval_batch_size * world_size()
    with inference(args):
        for start in progress(range(0, len(order), size), "scoring"):
            chunk = order[start:start + size]
            share = chunk[rank()::world_size()]
            # a rank without a share still runs the forward pass: ZeRO-3 gathers weights in it
            r, h = model(collate([groups[i] for i in share or chunk[:1]], pad_id, layout))[:2]
            mine += zip(share, zip(r.tolist(), h.tolist() if features else share))
    model.train(was_training)
    rewards, h = zip(*gather_rows(mine))
    rewards = finite(rewards)
    return (rewards, torch.tensor(h)) if features else rewards


def score_by(path, groups, args, tokenizer, features=False):
    """`score` by the saved reward model in a directory."""
    model = frozen(load_reward_model(path, args), args)
    layout = choose_layout(args, lambda batch: model(batch)[0], groups)
    return score(model, groups, args, layout, tokenizer.pad_token_id, features)


def correct(rewards, rows):
    """Section 2.5: which pairs a model of rewards [N, 2] gets right on each validation set that has
    any: {set: bool [n]}. original: labels as they came; judge: as the judge has them (0 turns a
    pair round, -1 leaves it out); consistent: where both agree. A tie is wrong (RewardBench)."""
    d = rewards[:, 0] - rewards[:, 1]
    judged = torch.tensor([row.get("judge_label", -1) for row in rows])
    sets = {"original": d > 0, "judge": (d * (2 * judged - 1) > 0)[judged != -1],
            "consistent": (d > 0)[judged == 1]}
    return {name: right for name, right in sets.items() if len(right)}


def accuracies(rewards, rows):
    """{"accuracy_SET": share of `correct` pairs}."""
    return {f"accuracy_{name}": right.sum().item() / len(right)
            for name, right in correct(rewards, rows).items()}


def whole_model(engine):
    """The engine's model with all weights. At ZeRO-3 a plain copy, refreshed: the sharded modules'
    hooks are collectives, and ranks whose samples differ in length would deadlock."""
    module = getattr(engine, "module", engine)
    if getattr(engine, "zero_optimization_stage", int)() < 3:
        return module
    import deepspeed
    if "whole" not in engine.__dict__:  # not an attribute: it would become a submodule
        with torch.device(device()):
            engine.__dict__["whole"] = transformers.AutoModelForCausalLM.from_config(
                module.config, dtype=module.dtype)
    for p, sharded in zip(engine.__dict__["whole"].parameters(), module.parameters()):
        with deepspeed.zero.GatheredParameters([sharded]):
            p.data.copy_(sharded.data)
    return engine.__dict__["whole"]


def generate(engine, tokenizer, prompts, K, args, seed):
    """Sample K responses to each prompt (token ids) → [[response ids] * K], model.eval() from then
    on. Only those that ended carry EOS. Seeds are by chunk: processes do not change the samples."""
    model, mine, size = whole_model(engine).eval(), [], args.generate_batch_size
    chunks = [range(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    with inference(args), torch.random.fork_rng([device()] * (device().type == "cuda")):
        for c in progress(range(rank(), len(chunks), world_size()), "sampling"):
            torch.manual_seed((seed * 100_003 + c) % 2**63)
            batch = tokenizer.pad({"input_ids": [prompts[i] for i in chunks[c]]},
                                  padding_side="left", return_tensors="pt").to(device())
            out = model.generate(
                **{k: batch[k] for k in ("input_ids", "attention_mask")}, do_sample=True, top_k=0,
                temperature=args.temperature, top_p=args.top_p, eos_token_id=eos, pad_token_id=pad,
                repetition_penalty=args.repetition_penalty, num_return_sequences=K, use_cache=True,
                max_new_tokens=args.run["max_response_tokens"])[:, batch["input_ids"].shape[1]:]
            ids = [r[:r.index(eos) + 1] if eos in r else r for r in out.tolist()]
            mine += [(i, ids[j * K:(j + 1) * K]) for j, i in enumerate(chunks[c])]
    return gather_rows(mine)
