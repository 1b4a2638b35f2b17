"""Every messy format of preferences, SFT examples and prompts, read row by row.

A SOURCE is `toy` or `toy:summary` (the embedded world); a .jsonl, .jsonl.gz or .parquet file; or a
hub id `owner/name` or `owner/name:data_dir` (all its splits). The format is found row by row:

    preferences  {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi ..."}
                 {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}
                     the prompt becomes "\n\nHuman: Hi\n\nAssistant:"
                 {"chosen": [{"role": "user", "content": "Hi"},
                             {"role": "assistant", "content": "Hello."}], "rejected": [...]}
                     `prompt` may hold the shared messages; the chat template of --model is used if
                     it has one, else HH roles, system text going first
                 {"chosen": ["Hi", "Hello."], "rejected": ["Hi", "What?"],
                  "chosen score list": [0.1, ...], "mean preference difference": 0.3,
                  "GPT4 label": 1, ...}         the authors' released set
    sft          {"prompt": "Hi", "response": "Hello."}
                 {"messages": [...]} or {"conversations": [{"from": "human", "value": "Hi"}, ...]}
                     the last turn is the response
    prompts      {"prompt": "Hi"} or "Hi" or {"messages": [...]} or a preference row

Dropped and counted, first reason that holds: no assistant turn (none, or not the last one), prompts
differ, empty prompt, empty response, identical responses, duplicate pair; among prompts: duplicate
prompt; among SFT rows and prompts: evaluation prompt. A row that cannot be read stops the run with
`file:line: what is wrong`; --skip_bad_rows counts it as unreadable instead. Row contents are never
printed: some are offensive.
"""
import functools
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import common
from lab import toy_world

TOY = {"toy": ("helpful", "harmless"), "toy:summary": ("summary",)}
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?")
# their names tell the task
FOLDERS = {"Anthropic/hh-rlhf": [f"Anthropic/hh-rlhf:{folder}" for folder in (
    "harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")]}
# the first word in a source's name gives its task
TASK_WORDS = {"harmless": "harmless", "saferlhf": "harmless", "helpful": "helpful",
              "oasst": "helpful", "summar": "summary", "tldr": "summary"}
ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant",
         "assistant": "assistant", "system": "system"}
SCORES, LABEL = ("chosen_score_list", "rejected_score_list"), "judge_label"
NUMBERS = ("mean preference difference", "std preference difference", "margin", "gold_chosen",
           "gold_rejected")
SPELLINGS = {"chosen score list": SCORES[0], "rejected score list": SCORES[1], "GPT4 label": LABEL}


def check_sources(sources):
    """Stop on a source that is neither a readable file nor a hub id nor the embedded world."""
    for s in sources:
        if Path(s).is_file() and not s.endswith(SUFFIXES):
            common.die(f"{s}: a file must end in one of {', '.join(SUFFIXES)}")
        if not Path(s).is_file() and s not in TOY and (
                s.endswith(SUFFIXES) or not HUB_ID.fullmatch(s)):
            common.die(f"{s} is no file, no hub id (owner/name or owner/name:data_dir), not toy "
                       "and not toy:summary")


class Drop(Exception):
    """A row that is left out; the message is the reason it is counted under."""


class Bad(Exception):
    """A row that cannot be read; the message says what is wrong, without the row's contents."""


# ---------------------------------------------------------------- sources → rows

def raw_rows(source, kind, args):
    """Stream (place in the source, row or Bad). A source that is unreadable as a whole stops the
    run with one line."""
    hint = ""
    try:
        if source in TOY:
            data = toy_data(source, args.seed, args.n_pairs, args.n_sft, args.n_prompts,
                            args.n_eval)
            chosen = [
                row for name, rows in data.items() if name.partition("_")[0] == kind
                for row in rows]
            yield from enumerate(chosen, 1)
        elif not Path(source).is_file():
            hint = ": it needs the network, or give a local file"
            import datasets
            name, _, folder = source.partition(":")
            for split, rows in datasets.load_dataset(name, data_dir=folder or None).items():
                yield from ((f"{split}:{n}", row) for n, row in enumerate(rows, 1))
        elif source.endswith(".parquet"):
            from pyarrow.parquet import ParquetFile
            yield from enumerate(
                (row for b in ParquetFile(source).iter_batches(1000) for row in b.to_pylist()), 1)
        else:
            with (gzip.open if source.endswith(".gz") else open)(source, "rb") as file:
                yield from ((n, parse_line(line)) for n, line in enumerate(file, 1) if line.strip())
    # the libraries raise a dozen types when the network or a file is at fault
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:150]
        common.die(f"{source} cannot be read ({type(error).__name__}: {reason}){hint}")


def parse_line(line):
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return Bad(f"not JSON in UTF-8 ({getattr(error, 'msg', type(error).__name__)})")


@functools.cache
def toy_data(source, seed, *sizes):
    return toy_world.build(seed, *sizes, tasks=TOY[source])


def load(sources, kind, args, ids):
    """All clean rows of the sources, and {"read", "kept", "drops"}. `ids` counts the ids given so
    far."""
    rows, seen, drops, read = [], set(), Counter(), 0
    for source in [part for s in sources for part in FOLDERS.get(s, [s])]:
        path = Path(source)
        called = path.name if path.is_file() else source
        name = path.stem.removesuffix(".jsonl") if path.is_file() else source.split("/", 1)[-1]
        task = next((t for word, t in TASK_WORDS.items() if word in called.lower()), "general")
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
                    common.die(f"{source}:{place}: {problem} (--skip_bad_rows counts such rows "
                               "and goes on)")
                drops["unreadable"] += 1
            else:
                own = raw.get("id") if isinstance(raw, dict) else None
                new = own = own if own and isinstance(own, str) else re.sub(
                    "[:/]", "-", f"{name}-{place}")
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
        common.die(
            f"cannot load the tokenizer of --model {model}: {(str(error).splitlines() or [''])[0]}")
    return tokenizer if tokenizer and tokenizer.chat_template else None


def string(row, key):
    if not isinstance(row.get(key), str):
        raise Bad(f"`{key}` is {type(row[key]).__name__}, not text" if key in
                  row else f"column `{key}` is missing")
    return row[key]


def messages(value):
    """A list of {"role", "content"} or {"from", "value"}, checked, in the first form."""
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise Bad("not a list of messages")
    out = [{"role": m.get("role", m.get("from")), "content": m.get("content", m.get("value"))}
           for m in value]
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
            role = "Human" if m["role"] == "user" else "Assistant"
            prompt += f"\n\n{role}: {m['content'].strip()}"
        return prompt + "\n\nAssistant:"
    try:
        prompt = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise Bad(f"the chat template refuses the messages ({type(error).__name__})") from None
    adds_bos = tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    # later stages would have it twice
    return prompt.removeprefix(tokenizer.bos_token) if adds_bos else prompt


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
    return prompt if prompt.endswith(
        "\n\nAssistant:") else f"\n\nHuman: {prompt.strip()}\n\nAssistant:"


def split_side(row, key, model):
    """(prompt, response) of one side of a preference row, in any of the four formats."""
    side, prompt = row.get(key), row.get("prompt")
    # released set: last is the response
    if isinstance(side, list) and side and all(isinstance(t, str) for t in side):
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
    # HH: the prompt ends after the last mark
    head, mark, response = string(row, key).rpartition("\n\nAssistant:")
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


# ---------------------------------------------------------------- raw row → clean row

def read_row(row, kind, model, task):
    """One raw row → clean row without id. Raises Drop or Bad and nothing else."""
    if isinstance(row, Bad):
        raise row
    if isinstance(row, str) and kind not in ("pairs", "sft"):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise Bad(f"a JSON {type(row).__name__}, not an object")
    # None: absent in a parquet file
    row = {SPELLINGS.get(k, k): v for k, v in row.items() if v is not None}
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
    """The known columns beside the texts, checked; `margin` is the mean difference where only that
    is given."""
    out = {k: row[k] for k in (*SCORES, *NUMBERS, LABEL) if k in row}
    for name, value in out.items():
        for x in value if name in SCORES and isinstance(value, list) else [value]:
            # NaN is not either
            if isinstance(x, bool) or not isinstance(x, (int, float)) or not abs(x) < 1e300:
                raise Bad(f"`{name}` must hold finite numbers")
    if out.get(LABEL, 0) not in (-1, 0, 1):
        raise Bad(f"`{LABEL}` must be 1, 0 or -1")
    out |= {LABEL: int(out[LABEL])} if LABEL in out else {}
    if not all(isinstance(out.get(k, []), list)
               for k in SCORES) or len({len(out.get(k, [])) for k in SCORES}) > 1:
        raise Bad("the score columns must be two lists of equal length")
    if NUMBERS[0] in out:
        out.setdefault("margin", out[NUMBERS[0]])
    return out


def conversation(row):
    return messages(row.get(
        "messages", row.get("conversations"))) if {"messages", "conversations"} & set(row) else None


def read_sft(row, model):
    spoken = conversation(row)
    prompt, response = split_messages(spoken, chat_tokenizer(model)) if spoken is not None else \
        (prompt_of(row, model), string(row, "response"))
    return {"prompt": prompt, "response": tidy(prompt, response)[0]}


def read_prompt(row, model):
    spoken = conversation(row)
    if spoken is not None:
        prompt = render(spoken[:-1] if spoken and spoken[-1]["role"] == "assistant" else spoken,
                        chat_tokenizer(model))
    else:
        prompt = prompt_of(row, model) if "prompt" in row else split_side(row, "chosen", model)[0]
    tidy(prompt)
    return {"prompt": prompt}
