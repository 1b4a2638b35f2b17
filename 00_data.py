r"""Stage 00: every source of preferences, SFT examples and prompts into one clean form (appendix B.1).

The only place that knows messy formats and that drops rows; later stages read what is written here:

    train.jsonl valid.jsonl  {"id", "prompt", "chosen", "rejected", "task"} and, where known, the columns of `CARRIED`
    sft.jsonl                {"id", "prompt", "response"}
    prompts.jsonl            {"id", "prompt", "task"}: PPO's, each prompt once
    eval_TASK.jsonl ood_TASK.jsonl   {"id", "prompt", "task"}: prompts for stage 08

Texts are as the model reads them: a prompt ends in "\n\nAssistant:" and a response is " text", one leading space
(under a chat template: the template's generation prompt, and "text"). White space around a response goes, all
else stays: turns are never split on blank lines. run.json is written last, by this stage only.

A SOURCE is `toy` or `toy:summary` (the embedded world); a .jsonl, .jsonl.gz or .parquet file; or a hub id
`owner/name` or `owner/name:data_dir` (all its splits). The format is found row by row:

    preferences  {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}
                 {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}         becomes "\n\nHuman: Hi\n\nAssistant:"
                 {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
                  "rejected": [...]}             `prompt` may hold the shared messages; the chat template of --model
                                                 is used if it has one, else HH roles, system text going first
                 {"chosen": ["Hi", "Hello."], "rejected": ["Hi", "What?"], "chosen score list": [0.1, ...],
                  "mean preference difference": 0.3, "GPT4 label": 1, ...}         the authors' released set
    sft          {"prompt": "Hi", "response": "Hello."}
                 {"messages": [...]} or {"conversations": [{"from": "human", "value": "Hi"}, ...]}   last turn: response
    prompts      {"prompt": "Hi"} or "Hi" or {"messages": [...]} or a preference row

Dropped and counted, first reason that holds: no assistant turn (none, or not the last one),
prompts differ, empty prompt, empty response, identical responses, duplicate pair; among prompts: duplicate prompt;
among SFT rows and prompts: evaluation prompt. A row that cannot be read stops the run with `file:line: what is
wrong`; --skip_bad_rows counts it as unreadable instead. Row contents are never printed: some are offensive.

Departures from the paper: (1) the 10 % for validation are whole prompts, so none is on both sides, and prompts with
judge labels go there first; (2) SFT and PPO take the training split's chosen responses and prompts unless --sft
and --prompts are given; (3) one SFT example per conversation, its last turn.

    python 00_data.py                                                          # the embedded world
    python 00_data.py --preset paper                                           # Llama-2-7B on HH-RLHF
    python 00_data.py --preferences my_helpful.jsonl my_harmless.parquet --sft my_sft.jsonl.gz
    deepspeed --num_gpus 8 00_data.py                                          # rank 0 works, the others leave
"""
import functools
import gzip
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import audit
import common

HPARAMS = {
    # name: (paper, toy, help)
    "n_pairs": (0, 3000, "preference pairs made by the embedded world; 0 where it is unused"),
    "n_sft": (0, 4000, "SFT examples made by the embedded world"),
    "n_prompts": (0, 1000, "PPO prompts made by the embedded world, before equal ones are dropped"),
    "n_eval": (100, 200, "prompts per evaluation set"),
    "valid_fraction": (0.1, 0.1, "share of the pairs held out for validation, by prompt"),
    "max_prompt_tokens": (1024, 80, "later stages cut prompts to this, on the left"),
    "max_response_tokens": (512, 48, "later stages cut responses to this, EOS included"),
}
TOY = {"toy": ("helpful", "harmless"), "toy:summary": ("summary",)}
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?")
FOLDERS = {"Anthropic/hh-rlhf": [f"Anthropic/hh-rlhf:{folder}" for folder in (  # their names tell the task
    "harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")]}
TASK_WORDS = {"harmless": "harmless", "saferlhf": "harmless", "helpful": "helpful", "oasst": "helpful",
              "summar": "summary", "tldr": "summary"}  # the first word in a source's name gives its task
ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}
SCORES, LABEL = ("chosen_score_list", "rejected_score_list"), "judge_label"
NUMBERS = ("mean preference difference", "std preference difference", "margin", "gold_chosen", "gold_rejected")
SPELLINGS = {"chosen score list": SCORES[0], "rejected score list": SCORES[1], "GPT4 label": LABEL}


class Drop(Exception):
    """A row that is left out; the message is the reason it is counted under."""


class Bad(Exception):
    """A row that cannot be read; the message says what is wrong, without the row's contents."""


# ---------------------------------------------------------------- sources → rows

def raw_rows(source, kind, args):
    """Stream (place in the source, row or Bad). A source that is unreadable as a whole stops the run with one line."""
    hint = ""
    try:
        if source in TOY:
            data = toy_data(source, args.seed, args.n_pairs, args.n_sft, args.n_prompts, args.n_eval)
            chosen = [row for name, rows in data.items() if name.partition("_")[0] == kind for row in rows]
            yield from enumerate(chosen, 1)
        elif not Path(source).is_file():
            hint = ": it needs the network, or give a local file"
            import datasets
            name, _, folder = source.partition(":")
            for split, rows in datasets.load_dataset(name, data_dir=folder or None).items():
                yield from ((f"{split}:{n}", row) for n, row in enumerate(rows, 1))
        elif source.endswith(".parquet"):
            from pyarrow.parquet import ParquetFile
            yield from enumerate((row for b in ParquetFile(source).iter_batches(1000) for row in b.to_pylist()), 1)
        else:
            with (gzip.open if source.endswith(".gz") else open)(source, "rb") as file:
                yield from ((n, parse_line(line)) for n, line in enumerate(file, 1) if line.strip())
    except Exception as error:  # the libraries raise a dozen types when the network or a file is at fault
        reason = (str(error).splitlines() or [""])[0][:150]
        common.die(f"{source} cannot be read ({type(error).__name__}: {reason}){hint}")


def parse_line(line):
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return Bad(f"not JSON in UTF-8 ({getattr(error, 'msg', type(error).__name__)})")


@functools.cache
def toy_data(source, seed, *sizes):
    import toy_world
    return toy_world.build(seed, *sizes, tasks=TOY[source])


def load(sources, kind, args, ids):
    """All clean rows of the sources, and {"read", "kept", "drops"}. `ids` counts the ids given so far."""
    rows, seen, drops, read = [], set(), Counter(), 0
    for source in [part for s in sources for part in FOLDERS.get(s, [s])]:
        path = Path(source)
        name = path.name[:-len(path.suffix)].removesuffix(".jsonl") if path.is_file() else source.split("/", 1)[-1]
        task = next((t for word, t in TASK_WORDS.items() if word in (path.name if path.is_file() else source).lower()),
                    "general")
        for place, raw in common.progress(raw_rows(source, kind, args), f"reading {name}"):
            read += 1
            try:
                row = read_row(raw, kind, args.model, task)
                key = tuple(row.get(k) for k in ("prompt", "chosen", "rejected"))
                if kind != "sft" and key in seen:
                    raise Drop("duplicate pair" if kind == "pairs" else "duplicate prompt")
                seen.add(key)
            except Drop as reason:
                drops[str(reason)] += 1
            except Bad as problem:
                if not args.skip_bad_rows:
                    common.die(f"{source}:{place}: {problem} (--skip_bad_rows counts such rows and goes on)")
                drops["unreadable"] += 1
            else:
                own = raw.get("id") if isinstance(raw, dict) else None
                new = own = own if own and isinstance(own, str) else re.sub("[:/]", "-", f"{name}-{place}")
                while new in ids:
                    ids[own] += 1
                    new = f"{own}-{ids[own]}"
                ids[new] = 1
                rows.append({"id": new, **row})
    return rows, {"read": read, "kept": len(rows), "drops": dict(sorted(drops.items()))}


# ---------------------------------------------------------------- formats → prompt and response

@functools.cache
def chat_tokenizer(model):
    """Tokenizer of --model if it has a chat template, else None."""
    try:
        tokenizer = None if model == "tiny" else common.load_tokenizer(model)
    except Exception as error:
        common.die(f"cannot load the tokenizer of --model {model}: {(str(error).splitlines() or [''])[0]}")
    return tokenizer if tokenizer and tokenizer.chat_template else None


def string(row, key):
    if not isinstance(row.get(key), str):
        raise Bad(f"`{key}` is {type(row[key]).__name__}, not text" if key in row else f"column `{key}` is missing")
    return row[key]


def messages(value):
    """A list of {"role", "content"} or {"from", "value"}, checked, in the first form."""
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise Bad("not a list of messages")
    out = [{"role": m.get("role", m.get("from")), "content": m.get("content", m.get("value"))} for m in value]
    for m in out:
        if not isinstance(m["role"], str) or m["role"] not in ROLES:
            raise Bad(f"a message's role must be one of {', '.join(ROLES)}")
        m["role"] = ROLES[m["role"]]
        string(m, "content")
    return out


def render(history, tokenizer=None):
    """Messages → prompt, by the tokenizer's chat template or in HH form."""
    spoken = [m for m in history if m["role"] != "system"]
    if not any(m["content"].strip() for m in spoken):
        raise Drop("empty prompt")
    if tokenizer is None:
        prompt = "\n\n".join(m["content"].strip() for m in history if m["role"] == "system")
        for m in spoken:
            prompt += f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content'].strip()}"
        return prompt + "\n\nAssistant:"
    try:
        prompt = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise Bad(f"the chat template refuses the messages ({type(error).__name__})") from None
    adds_bos = tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return prompt.removeprefix(tokenizer.bos_token) if adds_bos else prompt  # later stages would have it twice


def split_messages(conversation, tokenizer=None):
    """Messages → (prompt, response); the last one must be the assistant's."""
    if not conversation or conversation[-1]["role"] != "assistant":
        raise Drop("no assistant turn")
    return render(conversation[:-1], tokenizer), conversation[-1]["content"]


def prompt_of(row, model):
    """The `prompt` column: messages, an HH prompt as it is, or the text of one human turn."""
    if isinstance(row.get("prompt"), list):
        return render(messages(row["prompt"]), chat_tokenizer(model))
    prompt = string(row, "prompt").rstrip()
    return prompt if prompt.endswith("\n\nAssistant:") else f"\n\nHuman: {prompt.strip()}\n\nAssistant:"


def split_side(row, key, model):
    """(prompt, response) of one side of a preference row, in any of the four formats."""
    side, prompt = row.get(key), row.get("prompt")
    if isinstance(side, list) and side and all(isinstance(t, str) for t in side):  # released set: last is the response
        roles = ["assistant" if (len(side) - i) % 2 else "user" for i in range(len(side))]
        return split_messages([{"role": r, "content": t} for r, t in zip(roles, side)])
    if isinstance(side, list):
        side = messages(side)
        if isinstance(prompt, str) and len(side) == 1:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, list):
            history = messages(prompt)
            side = side if side[:len(history)] == history else history + side
        return split_messages(side, chat_tokenizer(model))
    if "prompt" in row:
        prompt = prompt_of(row, model)
        return prompt, string(row, key).removeprefix(prompt)  # some copies repeat the prompt
    head, mark, response = string(row, key).rpartition("\n\nAssistant:")  # HH: the prompt ends after the last mark
    if not mark or "\n\nHuman:" in response:
        raise Drop("no assistant turn")
    return head + mark, response


def tidy(prompt, *responses):
    """Responses as the model reads them; raises Drop where a text is empty."""
    if not re.sub(r"\n\n(Human|Assistant):", "", prompt).strip():
        raise Drop("empty prompt")
    if not all(r.strip() for r in responses):
        raise Drop("empty response")
    return [(" " if prompt.endswith("\n\nAssistant:") else "") + r.strip() for r in responses]


# ---------------------------------------------------------------- raw row → clean row, Drop or Bad

def read_row(row, kind, model, task):
    """One raw row → clean row without id. Raises Drop or Bad and nothing else."""
    if isinstance(row, Bad):
        raise row
    if isinstance(row, str) and kind not in ("pairs", "sft"):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise Bad(f"a JSON {type(row).__name__}, not an object")
    row = {SPELLINGS.get(k, k): v for k, v in row.items() if v is not None}  # None: absent in a parquet file
    clean = {"pairs": read_pair, "sft": read_sft}.get(kind, read_prompt)(row, model)
    if kind != "sft":
        own = re.sub(r"[^a-z0-9]+", "_", string(row, "task").lower()) if "task" in row else ""
        clean["task"] = own.strip("_")[:40] or task  # becomes part of a file name
    try:
        json.dumps([clean, str(row.get("id"))], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Bad("a text holds a lone surrogate, which UTF-8 cannot write") from None
    return clean


def read_pair(row, model):
    extra, sides, drop = carried(row), [], None
    for key in ("chosen", "rejected"):
        try:
            sides.append(split_side(row, key, model))
        except Drop as reason:  # the other side must be readable all the same
            drop = drop or reason
    if drop:
        raise drop
    (prompt, chosen), (other, rejected) = sides
    if prompt != other:
        raise Drop("prompts differ")
    chosen, rejected = tidy(prompt, chosen, rejected)
    if chosen == rejected:
        raise Drop("identical responses")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extra}


def carried(row):
    """The known columns beside the texts, checked; `margin` is the mean difference where only that is given."""
    out = {k: row[k] for k in (*SCORES, *NUMBERS, LABEL) if k in row}
    for name, value in out.items():
        for x in value if name in SCORES and isinstance(value, list) else [value]:
            if isinstance(x, bool) or not isinstance(x, (int, float)) or not abs(x) < 1e300:  # NaN is not either
                raise Bad(f"`{name}` must hold finite numbers")
    if out.get(LABEL, 0) not in (-1, 0, 1):
        raise Bad(f"`{LABEL}` must be 1, 0 or -1")
    out |= {LABEL: int(out[LABEL])} if LABEL in out else {}
    if not all(isinstance(out.get(k, []), list) for k in SCORES) or len({len(out.get(k, [])) for k in SCORES}) > 1:
        raise Bad("the score columns must be two lists of equal length")
    if NUMBERS[0] in out:
        out.setdefault("margin", out[NUMBERS[0]])
    return out


def conversation(row):
    return messages(row.get("messages", row.get("conversations"))) if {"messages", "conversations"} & set(row) else None


def read_sft(row, model):
    spoken = conversation(row)
    prompt, response = split_messages(spoken, chat_tokenizer(model)) if spoken is not None else \
        (prompt_of(row, model), string(row, "response"))
    return {"prompt": prompt, "response": tidy(prompt, response)[0]}


def read_prompt(row, model):
    spoken = conversation(row)
    if spoken is not None:
        prompt = render(spoken[:-1] if spoken and spoken[-1]["role"] == "assistant" else spoken, chat_tokenizer(model))
    else:
        prompt = prompt_of(row, model) if "prompt" in row else split_side(row, "chosen", model)[0]
    tidy(prompt)
    return {"prompt": prompt}


# ---------------------------------------------------------------- splits

def split_by_prompt(rows, fraction, seed):
    """(train, valid): whole prompts drawn until `fraction` of the rows is reached, judge-labelled ones first."""
    count = Counter(row["prompt"] for row in rows)
    labelled = {row["prompt"] for row in rows if row.get(LABEL) in (0, 1)}
    order, valid, n = list(count), set(), 0
    random.Random(seed).shuffle(order)
    for prompt in sorted(order, key=lambda p: p not in labelled)[:-1]:  # train keeps one, valid gets one
        if not valid or n < fraction * len(rows):
            valid.add(prompt)
            n += count[prompt]
    return [r for r in rows if r["prompt"] not in valid], [r for r in rows if r["prompt"] in valid]


def unique_prompts(rows):
    first = {row["prompt"]: row for row in reversed(rows)}
    return [{k: row[k] for k in ("id", "prompt", "task")} for row in rows if first[row["prompt"]] is row]


def subset(rows, n, seed):
    """n of the rows drawn at random, in their old order; all of them when there are no more."""
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), min(n, len(rows))))]


# ---------------------------------------------------------------- the stage

def add_flags(flag):
    flag("--model", help="base model: tiny (made by 01), a hub id or a path (paper meta-llama/Llama-2-7b-hf, toy tiny)")
    flag("--preferences", nargs="+", metavar="SOURCE", help="preference pairs (paper Anthropic/hh-rlhf, toy toy)")
    flag("--sft", nargs="+", metavar="SOURCE", help="SFT examples (default: the chosen responses; toy: its own)")
    flag("--prompts", nargs="+", metavar="SOURCE", help="PPO prompts (default: the training pairs'; toy: its own)")
    flag("--ood_prompts", nargs="+", metavar="SOURCE", help="prompts for the evaluation out of distribution")
    flag("--skip_bad_rows", action="store_true", help="count rows that cannot be read instead of stopping")


def settle(args):
    """Fill the defaults that depend on preset and sources; stop on what cannot work. Returns all sources."""
    args.model = args.model or ("meta-llama/Llama-2-7b-hf" if args.preset == "paper" else "tiny")
    args.preferences = args.preferences or ["Anthropic/hh-rlhf" if args.preset == "paper" else "toy"]
    sources = [s for group in (args.preferences, args.sft, args.prompts, args.ood_prompts) for s in group or ()]
    for s in sources:
        if Path(s).is_file() and not s.endswith(SUFFIXES):
            common.die(f"{s}: a file must end in one of {', '.join(SUFFIXES)}")
        if not Path(s).is_file() and s not in TOY and (s.endswith(SUFFIXES) or not HUB_ID.fullmatch(s)):
            common.die(f"{s} is no file, no hub id (owner/name or owner/name:data_dir), not toy and not toy:summary")
    if not 0 < args.valid_fraction < 1 or (args.limit or 1) < 1:
        common.die("--valid_fraction must lie between 0 and 1, --limit must be positive")
    for name in ("n_pairs", "n_sft", "n_prompts"):
        if set(TOY) & set(sources):  # the paper's column has no sizes for the embedded world
            args.hparams[name] = getattr(args, name) or HPARAMS[name][1]
            setattr(args, name, args.hparams[name])
    return sources


def main(argv=None):
    args = audit.parse_args(__doc__, HPARAMS, add_flags, argv, reads_run=False)
    if common.rank() > 0:
        sys.exit(0)
    sources = settle(args)
    world = "toy" if set(args.preferences) <= set(TOY) else None  # gold is known
    stage, ids, counts = audit.start_stage(args, "00_data"), {}, {}

    pairs, counts["pairs"] = load(args.preferences, "pairs", args, ids)
    train, valid = split_by_prompt(pairs, args.valid_fraction, args.seed)
    if not train or not valid:
        common.die(f"{len(pairs)} pairs of {len(unique_prompts(pairs))} prompts are left ({counts['pairs']}): training "
                   "and validation split without a common prompt need two")
    if world:
        for row in valid:  # the judge is gold: 1 agrees with the label, 0 disagrees, -1 sees a tie
            c, r = row["gold_chosen"], row["gold_rejected"]
            row[LABEL] = -1 if c == r else int(c > r)

    rows = {"sft": [{"id": r["id"], "prompt": r["prompt"], "response": r["chosen"]} for r in train],
            "prompts": unique_prompts(train), "eval": unique_prompts(valid), "ood": []}
    for kind, given in (("sft", args.sft), ("prompts", args.prompts), ("eval", None), ("ood", args.ood_prompts)):
        if given or world:
            rows[kind], counts[kind] = load(given or args.preferences, kind, args, ids)

    splits = {"train": train, "valid": valid}
    for kind in ("eval", "ood"):
        for task in dict.fromkeys(r["task"] for r in rows[kind]):
            splits[f"{kind}_{task}"] = subset([r for r in rows[kind] if r["task"] == task], args.n_eval, args.seed)
    held_out = {r["prompt"] for name, split in splits.items() if name.startswith(("eval_", "ood_")) for r in split}
    for kind in ("sft", "prompts"):
        splits[kind] = [r for r in rows[kind] if r["prompt"] not in held_out]
        if n := len(rows[kind]) - len(splits[kind]):
            count = counts.setdefault(kind, {"read": len(rows[kind]), "kept": len(rows[kind]), "drops": {}})
            count["kept"], count["drops"]["evaluation prompt"] = count["kept"] - n, n
        if not splits[kind]:
            common.die(f"no row is left for {kind}.jsonl ({counts.get(kind)})")

    for kind, count in counts.items():
        audit.log_metrics(stage, 0, kind=kind, **count)
    cut = {}
    for name, split in splits.items():
        cap = args.limit and args.limit * (64 if name in ("train", "sft", "prompts") else 16)
        splits[name] = subset(split, cap, args.seed) if cap else split
        cut[name] = len(split) - len(splits[name])
        audit.write_jsonl(stage.dir / f"{name}.jsonl", splits[name])
        common.log(f"  {name}.jsonl: {len(splits[name])} rows" + f", {cut[name]} cut by --limit" * bool(cut[name]))
    run = {key: getattr(args, key) for key in (
        "preset", "model", "seed", "limit", "preferences", "sft", "prompts", "ood_prompts", "max_prompt_tokens",
        "max_response_tokens")} | {"world": world, "tasks": [name[5:] for name in splits if name.startswith("eval_")]}
    audit.finish_stage(stage, {
        **counts.pop("pairs"), "other_sources": counts, "rows": {name: len(split) for name, split in splits.items()},
        "cut_by_limit": cut, "sources": {s: audit.sha256(s) for s in sources if Path(s).is_file()}}, run=run)


if __name__ == "__main__":
    audit.run(main)
