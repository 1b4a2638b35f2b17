"""What every stage needs: processes and seeds, groups and batches, models, engines, scoring, generation.

`audit.py` beside it reads command lines and keeps the record of a run.

Letters used in shape comments: B groups, K responses per group, T response tokens (EOS included),
R rows, L columns of a row, H hidden size, V vocabulary, M models, N pairs.

The one data structure is the **group**, a prompt with its K responses:
    {"id": str, "prompt": [token ids], "responses": [[token ids], ...]}      (each response ends in EOS)
A preference pair is K = 2 (chosen first), the meta data set of MetaRM K = k, PPO roll-outs K = 4, SFT K = 1.
"""
import contextlib
import gc
import os
import random
import socket
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# DeepSpeed compiles a small op at first use; the default cache is shared between versions and has crashed.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

import torch  # noqa: E402  (after the environment is set)
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it looked for a GPU

DTYPE = {"fp32": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16}  # of the parameters
SAFE = {"use_safetensors": True, "trust_remote_code": False}  # no pickles, no code that came with a model
# Rows shared by the tables of all training stages: name: (paper, toy, help).
TRAINING = {
    "zero": (2, 0, "DeepSpeed ZeRO stage"),
    "precision": ("bf16", "fp32", "bf16: parameters in bf16, master copy in fp32; autocast: parameters in fp32"),
    "max_grad_norm": (1.0, 1.0, "gradient clipping"),
    "gradient_checkpointing": (True, False, "recompute activations in the backward pass to save memory"),
    "save_every": (200, 25, "steps between checkpoints, from which the same command goes on"),
}


# ---------------------------------------------------------------- output

def die(message):
    """Print one line on rank 0 and stop with exit code 2."""
    if rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def log(*parts):
    """Print on rank 0."""
    if rank() == 0:
        print(*parts, flush=True)


def progress(iterable, description, total=None, initial=0):
    """tqdm on rank 0; few lines when stderr is a file. `initial`: steps done before this process."""
    from tqdm import tqdm
    # in a log file: a line now and then, none for what ends soon
    slow = {} if sys.stderr.isatty() else {"mininterval": 20, "delay": 20}
    return tqdm(iterable, description, total, initial=initial, disable=rank() != 0, leave=False, **slow)


# ---------------------------------------------------------------- processes and seeds

def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def device():
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() \
        else torch.device("cpu")


def set_seed(seed):
    """Same seed, same run: python, numpy and torch. Callers add the rank where ranks must differ."""
    import numpy
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def setup(args):
    """Join the process group (also under plain `python`), share the cores between ranks, seed."""
    import logging

    import deepspeed
    from transformers.utils import logging as hf_logging
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    hf_logging.disable_progress_bar()
    if "RANK" not in os.environ:  # plain `python NN.py`: a group of one on a free port
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    if device().type == "cuda":
        torch.cuda.set_device(device())
    else:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on macOS
        torch.set_num_threads(max(1, cores // local))
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if device().type == "cuda" else "gloo", verbose=False)
    set_seed(args.seed)
    log(f"{Path(sys.argv[0]).name}: preset {args.preset}, seed {args.seed}, {world_size()} process(es) on "
        f"{device().type}, " + ", ".join(f"{k} {v}" for k, v in args.hparams.items()))


def gather_rows(mine):
    """Concatenate every rank's list of (index, value) and return the values in index order. Values are pickled one by
    one: numbers and lists go fast, tensors do not."""
    parts = [mine]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, mine)
    return [value for _, value in sorted((item for part in parts for item in part), key=lambda item: item[0])]


def barrier():
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------- groups and batches

def encode(tokenizer, rows, keys, run):
    """Rows of text → groups. Prompts are cut on the left, responses on the right, EOS is forced.

    rows: dicts with "prompt" and the texts named by `keys` (a text or a list of texts each). Where tokenizing
    prompt + response whole begins with the prompt's own tokens (nearly always) that split is used, so the
    token ids are those of stock tools; otherwise the response is tokenized by itself.
    """
    eos = tokenizer.eos_token_id
    texts, owner = [row["prompt"] for row in rows], []
    for i, row in enumerate(rows):
        for key in keys:
            for text in row[key] if isinstance(row[key], list) else [row[key]]:
                texts.append(row["prompt"] + text)
                owner.append((i, text))
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    bos = whole[:whole.index(bare[0])]  # OPT's is its EOS token
    ids = [t[:-1] if len(t) > len(bos) and t[-1] == eos else t
           for t in tokenizer(texts)["input_ids"]] if texts else []
    prompts, groups = ids[:len(rows)], []
    for i, row in enumerate(rows):
        cut = prompts[i][len(bos):][-(run["max_prompt_tokens"] - len(bos)):]
        groups.append({"id": row["id"], "prompt": bos + cut or [eos], "responses": []})
    for (i, text), whole in zip(owner, ids[len(rows):]):
        n = len(prompts[i])
        response = whole[n:] if whole[:n] == prompts[i] else tokenizer(text, add_special_tokens=False)["input_ids"]
        groups[i]["responses"].append(response[:run["max_response_tokens"] - 1] + [eos])
    return groups


def encode_pairs(tokenizer, rows, run):
    """Preference rows → (rows kept, groups with chosen first); pairs equal after truncation are dropped and counted."""
    groups = encode(tokenizer, rows, ("chosen", "rejected"), run)
    keep = [i for i, g in enumerate(groups) if g["responses"][0] != g["responses"][1]]
    if rows and not keep:
        die(f"none of the {len(rows)} pairs is left: all are equal after truncation (00_data.py --max_response_tokens)")
    if len(keep) < len(rows):
        log(f"dropped {len(rows) - len(keep)} of {len(rows)} pairs: equal after truncation")
    return [rows[i] for i in keep], [groups[i] for i in keep]


def finished(responses, eos):
    """The same responses, each ending in EOS: where the reward model reads."""
    return [r if r[-1] == eos else r + [eos] for r in responses]


def group_length(group):
    return len(group["prompt"]) + sum(map(len, group["responses"]))


def collate(groups, pad_id, layout="shared"):
    """Lay groups of one K out as a batch of tensors.

    shared: one row per group, `[prompt | y_1 | ... | y_K]`; position ids restart after the prompt for each
    response and a response sees the prompt and itself only, which is exact. separate: one row per response,
    `[prompt | y_k]`. Rows are padded on the right. Both give, with T the longest response:
        input_ids [R, L]; attention_mask bool [R, 1, L, L] or long [R, L]; position_ids [R, L] (shared only)
        response_ids, mask [B, K, T]: the response tokens and which of them are real
        predict_index [B, K, T]: where in the flattened [R*L] states each response token is predicted from
        last_index [B, K]: where the response's last token (EOS) is read, by index, never by looking for pad
    """
    shared = layout == "shared" and len(groups[0]["responses"]) > 1
    rows, segments, positions, starts = [], [], [], []  # one entry a row; starts: (row, first column) a response
    for group in groups:
        prompt, offset = group["prompt"], len(group["prompt"])
        if shared:
            rows.append(list(prompt)), segments.append([0] * offset), positions.append(list(range(offset)))
        for k, response in enumerate(group["responses"], 1):
            if not shared:
                rows.append(list(prompt)), segments.append([0] * offset), positions.append(list(range(offset)))
            starts.append((len(rows) - 1, len(rows[-1]), offset))
            rows[-1] += response
            segments[-1] += [k] * len(response)
            positions[-1] += range(offset, offset + len(response))
    L, T = max(map(len, rows)), max(len(r) for g in groups for r in g["responses"])

    def padded(lists, value):
        return torch.tensor([x + [value] * (L - len(x)) for x in lists])

    segment = padded(segments, -1)                                                            # [R, L]
    batch = {"input_ids": padded(rows, pad_id)}
    if shared:
        query, key = segment[:, :, None], segment[:, None, :]                                 # [R, L, 1], [R, 1, L]
        seen = ((key == 0) | (key == query)) & (key >= 0) & torch.ones(L, L, dtype=torch.bool).tril()
        seen |= torch.eye(L, dtype=torch.bool)  # padding sees itself: an empty softmax row would be NaN
        batch["attention_mask"] = seen[:, None]                                               # [R, 1, L, L]
        batch["position_ids"] = padded(positions, 0)
    else:
        batch["attention_mask"] = (segment >= 0).long()

    flat = [r for g in groups for r in g["responses"]]                                        # B*K responses
    shape = (len(groups), -1, T)
    batch["response_ids"] = torch.tensor([r + [pad_id] * (T - len(r)) for r in flat]).view(shape)
    batch["mask"] = torch.tensor([[1] * len(r) + [0] * (T - len(r)) for r in flat], dtype=torch.bool).view(shape)
    # token t is predicted from the state before it; the first one from the prompt's last token
    batch["predict_index"] = torch.tensor([
        [row * L + (prompt - 1 if t == 0 else min(column + t, L) - 1) for t in range(T)]
        for row, column, prompt in starts]).view(shape)
    batch["last_index"] = torch.tensor([row * L + column + len(r) - 1 for (row, column, _), r in zip(starts, flat)]
                                       ).view(shape[:2])
    first = min(len(g["prompt"]) for g in groups) - 1
    batch["keep"] = L - first  # columns from the first predicting state on: only these need logits
    return {k: v.to(device()) if torch.is_tensor(v) else v for k, v in batch.items()}


def batches(groups, batch_size, steps, seed, window=16):
    """`steps` global batches (lists of groups), the same on every rank: fresh permutations one after another,
    sorted by length inside windows of `window` batches (little padding), the batches of a window shuffled."""
    rng, order = random.Random(seed), []
    while len(order) < steps * batch_size:
        order += rng.sample(range(len(groups)), len(groups))
    for start in range(0, steps * batch_size, window * batch_size):
        chunk = order[start:min(start + window * batch_size, steps * batch_size)]
        chunk.sort(key=lambda i: group_length(groups[i]))
        chunk = [chunk[i:i + batch_size] for i in range(0, len(chunk), batch_size)]
        rng.shuffle(chunk)
        yield from ([groups[i] for i in batch] for batch in chunk)


def steps_for(args, rows, batch_size, epochs=1):
    """Optimiser steps for `epochs` passes over `rows` rows, capped by --limit."""
    steps = max(1, -(-int(rows * epochs) // batch_size))
    return min(steps, args.limit) if args.limit else steps


def micro_batches(batch, micro_batch_size):
    """This rank's share of a global batch (every world_size-th group), in equal micro batches."""
    mine = batch[rank()::world_size()]
    size = min(micro_batch_size, len(mine))
    if len(batch) % world_size() or len(mine) % size:
        die(f"a batch of {len(batch)} does not split evenly over {world_size()} processes in micro batches of {size}")
    return [mine[i:i + size] for i in range(0, len(mine), size)]


# ---------------------------------------------------------------- models

class Float32Linear(torch.nn.Linear):
    """The reward head computes in fp32 in every precision: bf16 scores tie."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class RewardModel(torch.nn.Module):
    """A stock sequence classifier with one output, read at each response's EOS. A module of its own because
    ZeRO-3 must see the forward pass through its engine."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, values=False):
        """→ rewards [B, K] and features [B, K, H] at EOS; with `values`, V(s_t) [B, K, T] at the state before
        each response token and its features [B, K, T, H]."""
        hidden = self.model.base_model(**model_inputs(batch, self.model)).last_hidden_state  # [R, L, H]
        h = hidden.flatten(0, 1)[batch["predict_index" if values else "last_index"]]
        return self.model.score(h).squeeze(-1), h


def model_inputs(batch, model):
    mask = batch["attention_mask"]
    if mask.dim() == 4 and model.config._attn_implementation == "eager":  # Gemma-2: eager attention adds its mask
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)
    return {k: batch[k] for k in ("input_ids", "position_ids") if k in batch} | {"attention_mask": mask,
                                                                                 "use_cache": False}


def response_logits(model, batch):
    """fp32 logits [B, K, T, V] that predict the response tokens. `model`: a causal LM or its engine."""
    inputs = model_inputs(batch, getattr(model, "module", model))
    logits = model(**inputs, logits_to_keep=batch["keep"]).logits                              # [R, keep, V]
    L = batch["input_ids"].shape[1]
    row, column = batch["predict_index"] // L, batch["predict_index"] % L - (L - batch["keep"])
    return logits[row, column].float()


def token_logps(logits, ids, temperature=1.0):
    """log softmax(logits / temperature) at `ids`: [..., V], [...] → [...]."""
    return F.log_softmax(logits / temperature, -1).gather(-1, ids[..., None]).squeeze(-1)


def load_tokenizer(path):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    tokenizer.padding_side = "left"  # for generation; training batches are padded by `collate`
    return tokenizer


def load_config(path, kind, dropout=0.0):
    """Config with every dropout set to `dropout` (off everywhere but in stage 05). Stops when the checkpoint is not of
    a `kind`: transformers would make the head that it lacks up at random."""
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    made = (config.architectures or [kind])[0]
    if kind not in made and not (kind == "CausalLM" and "LMHead" in made):
        die(f"{path} is a {made}, not a {'causal language model' if kind == 'CausalLM' else 'reward model'}")
    for name, value in config.to_dict().items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, dropout)
    return config


def load_policy(path, args):
    """A causal LM, dropout off, in the parameter type of `--precision`."""
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(path, config=load_config(path, "CausalLM"), dtype=DTYPE[args.precision],
                                                **SAFE)


def load_reward_model(path, args, head_seed=None, dropout=0.0):
    """A reward model from `path`; with `head_seed`, a new head N(0, 1/sqrt(H+1)) on the policy found there."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as hf_logging
    config = load_config(path, "SequenceClassification" if head_seed is None else "CausalLM", dropout)
    config.num_labels = 1
    hf_logging.set_verbosity_error()  # that the head is new is no warning here
    model = AutoModelForSequenceClassification.from_pretrained(path, config=config, dtype=DTYPE[args.precision],
                                                               **SAFE)
    hf_logging.set_verbosity_warning()
    if not hasattr(model, "score"):
        die(f"{path}: {config.model_type} has no `score` head, so it cannot be a reward model here")
    head = Float32Linear(model.score.in_features, 1, bias=False, dtype=DTYPE[args.precision])
    with torch.no_grad():
        if head_seed is None:
            head.weight.copy_(model.score.weight)
        else:
            generator = torch.Generator().manual_seed(head_seed)
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5)
    model.score = head
    return RewardModel(model)


def engine_config(args, micro_batch_size, accumulation):
    """DeepSpeed's configuration; what its versions default differently is written out."""
    config = {
        "train_micro_batch_size_per_gpu": micro_batch_size, "gradient_accumulation_steps": accumulation,
        "gradient_clipping": args.max_grad_norm if hasattr(args, "max_grad_norm") else 0.0,
        # round-robin gradients break safe_get_full_grad on several processes; parameters that stay gathered at
        # ZeRO-3 would have two copies for MetaRM to restore
        "zero_optimization": {"stage": args.zero, "round_robin_gradients": False,
                              "stage3_param_persistence_threshold": 0},
    }
    if args.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    elif args.precision == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def frozen(module, args, shard=False):
    """A model for inference: the plain module on the device or, with `shard`, sharded when the run is at ZeRO-3."""
    if not shard or args.zero < 3:
        return module.to(device()).eval().requires_grad_(False)
    import deepspeed
    engine = deepspeed.initialize(model=module.requires_grad_(False), config=engine_config(args, 1, 1))[0]
    engine.eval()
    return engine


def make_engine(module, args, batch_size, lr, steps, warmup):
    """DeepSpeed engine with AdamW: linear warm-up over `warmup` of the steps, then linear decay to 0."""
    import deepspeed
    from transformers import get_scheduler
    micro = min(args.micro_batch_size, batch_size // world_size())
    if not micro or batch_size % (micro * world_size()):
        die(f"a batch of {batch_size} does not split evenly over {world_size()} processes in micro batches of {micro}")
    inner = module.model if isinstance(module, RewardModel) else module
    if args.gradient_checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, int(warmup * steps), steps)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=schedule,
                                  config=engine_config(args, micro, batch_size // (micro * world_size())))[0]
    engine.train()
    return engine


def free(engine):
    """Give a finished model's memory back before the next one of the launch (engines sit in reference cycles)."""
    engine.destroy()
    engine.optimizer = engine.module = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step(engine):
    """engine.step(). → norm of the gradient before clipping (0 between accumulation boundaries)."""
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]  # left there at ZeRO-0 only
    norm = torch.nn.utils.get_total_norm(grads) if grads and engine.is_gradient_accumulation_boundary() else None
    engine.step()
    return float(engine.get_global_grad_norm() or 0.0 if norm is None else norm)


@contextlib.contextmanager
def inference(args):
    """Forward passes without gradient, in the run's precision."""
    with torch.no_grad(), torch.autocast(device().type, torch.bfloat16, enabled=args.precision == "autocast"):
        yield


def save_model(engine, path, tokenizer):
    """Write a stock transformers checkpoint (safetensors) and the tokenizer, from any ZeRO stage."""
    module = getattr(engine, "module", engine)
    zero3 = getattr(engine, "zero_optimization_stage", lambda: 0)() == 3
    state = engine._zero3_consolidated_16bit_state_dict() if zero3 else module.state_dict()
    if rank() == 0:
        model = module.model if isinstance(module, RewardModel) else module
        if isinstance(module, RewardModel):
            state = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(path, state_dict=state)
        tokenizer.save_pretrained(path)
    barrier()


def choose_layout(args, forward, groups):
    """Settle --layout auto: compare `forward(batch)` → [B, K] on a few groups in both layouts (fp32: 1e-3)."""
    if args.layout != "auto":
        return args.layout
    few = sorted(groups, key=group_length)
    few = [few[i * (len(few) - 1) // 3] for i in range(4)]  # the longest too: a sliding window shows there only
    tolerance = 1e-3 if args.precision == "fp32" else 0.1  # bf16 keeps 8 bits
    try:
        with inference(args):
            shared, separate = (forward(collate(few, 0, layout)) for layout in ("shared", "separate"))
        difference = ((shared - separate).abs() / separate.abs().clamp(min=1)).max().item()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        difference = str(error).splitlines()[0]
    if isinstance(difference, float) and difference <= tolerance:
        return "shared"
    log(f"layout: this model does not take the shared layout ({difference}); one row per response is used")
    return "separate"


def score(model, groups, args, layout, pad_id, features=False):
    """Rewards [N, K] (fp32, CPU) of all groups under a reward model or its engine, the work split over ranks;
    with `features` also the EOS features [N, K, H]."""
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
    return (torch.tensor(rewards), torch.tensor(h)) if features else torch.tensor(rewards)


def whole_model(engine):
    """The engine's model in eval mode with all weights in place. At ZeRO-3 a plain copy, refreshed: the sharded
    modules' hooks are collectives, and ranks whose samples differ in length would wait for each other for ever."""
    module = getattr(engine, "module", engine)
    if getattr(engine, "zero_optimization_stage", lambda: 0)() == 3:
        import deepspeed
        from transformers import AutoModelForCausalLM
        if "whole" not in engine.__dict__:  # not an attribute: it would become a submodule
            with torch.device(device()):
                engine.__dict__["whole"] = AutoModelForCausalLM.from_config(module.config, dtype=module.dtype)
        for p, sharded in zip(engine.__dict__["whole"].parameters(), module.parameters()):
            with deepspeed.zero.GatheredParameters([sharded]):
                p.data.copy_(sharded.data)
        module = engine.__dict__["whole"]
    return module


def generate(engine, tokenizer, prompts, K, args, seed):
    """Sample K responses for each prompt (lists of token ids) → [[response ids] * K] in the prompts' order.

    Sampling is shaped by temperature, top_p and repetition_penalty. A response that ended carries its EOS; one
    cut at max_response_tokens does not. Each chunk of prompts has its own seed, so the samples do not depend
    on the number of processes.
    """
    model, mine = whole_model(engine), []
    was_training = model.training
    model.eval()
    chunks = [range(i, min(i + args.generate_batch_size, len(prompts)))
              for i in range(0, len(prompts), args.generate_batch_size)]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    devices = [device()] if device().type == "cuda" else []
    with inference(args), torch.random.fork_rng(devices):
        for c in progress(range(rank(), len(chunks), world_size()), "sampling"):
            torch.manual_seed(seed * 100_003 + c)
            batch = tokenizer.pad({"input_ids": [prompts[i] for i in chunks[c]]}, return_tensors="pt").to(device())
            out = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=True, top_k=0,
                temperature=args.temperature, top_p=args.top_p, repetition_penalty=args.repetition_penalty,
                max_new_tokens=args.run["max_response_tokens"], num_return_sequences=K, use_cache=True,
                eos_token_id=eos, pad_token_id=pad)[:, batch["input_ids"].shape[1]:].tolist()
            ids = [r[:r.index(eos) + 1] if eos in r else r for r in out]
            mine += [(i, ids[j * K:(j + 1) * K]) for j, i in enumerate(chunks[c])]
    model.train(was_training)
    return gather_rows(mine)


if __name__ == "__main__":  # python common.py verify DIR: see audit.py
    import audit
    audit.run(lambda: audit.command_line(sys.argv[1:]))
