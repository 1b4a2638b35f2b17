"""Every messy format of preferences, SFT examples and prompts, read row by row.

A SOURCE is a file, a folder of files or a glob of .jsonl, .json, .csv, .tsv (plain, .gz or .zst) or
.parquet; a folder that datasets' save_to_disk wrote; a hub id `owner/name` or `owner/name:data_dir`
(all its splits); `toy` or `toy:summary` (the embedded world). The format is found row by row:

    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi ..."}    HH
    {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}      the prompt also as `instruction`,
        `question`, `query`, with `input`, `system`, `history`; as an HH or templated text
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", ...}], ...}
        also `messages`, `conversations`; whole dialogues on both sides, with or without `prompt`;
        single messages; JSON text of them; "from" and "value"; content in text parts
    pairs by name: rejected_response (ms-swift), preferred_output (OpenAI), response_0 and
        response_1 with better_response_id, safer_response_id, a choice or a winner, human_ref_A and
        _B with labels (SHP), completions with overall_score (UltraFeedback), summaries with choice
        (OpenAI's TL;DR comparisons), {"chosen": ["Hi", "Hello."], "chosen score list": [0.1, ...],
        "mean preference difference": 0.3, "GPT4 label": 1} (the authors' released set)
    sft: a prompt as above with `response`, `output`, `completion`, `answer`, or whole messages,
        whose last turn is the response; prompts: any of these, or a text

Dropped and counted, first reason that holds: no assistant turn (none, or not the last one), column
`prompt` is missing, no preference (a tie), prompts differ, empty prompt, empty response, identical
responses, duplicate pair; among prompts: duplicate prompt; among SFT rows and prompts: evaluation
prompt. A row that cannot be read stops the run with `file:line: what is wrong`; --skip_bad_rows
counts it as unreadable instead. Columns that are not used are named once. Row contents are never
printed: some are offensive.
"""
import json
import re
from collections import Counter
from pathlib import Path

import common
from lab import sources
from lab.sources import Bad, Drop
from lab.templates import (
    ASSISTANT, CALLS, ENDS, OPEN, OPENINGS, ROLES, apply_template, is_transcript, markup, render,
    style_of, transcript)

# the first word in a source's name gives its task
TASK_WORDS = {"harmless": "harmless", "saferlhf": "harmless", "helpful": "helpful",
              "oasst": "helpful", "summar": "summary", "tldr": "summary"}
SCORES, LABEL = ("chosen_score_list", "rejected_score_list"), "judge_label"
NUMBERS = ("mean preference difference", "std preference difference", "margin", "gold_chosen",
           "gold_rejected")
SPELLINGS = {"chosen score list": SCORES[0], "rejected score list": SCORES[1], "GPT4 label": LABEL}
PROMPTS = ("prompt", "instruction", "question", "query", "messages", "conversations",
           "conversation")
PAIRS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"),
         ("messages", "rejected_response"), ("messages", "rejected_messages"),
         ("chosen_response", "rejected_response"), ("response", "rejected_response"))
CHOSEN_OF_TWO = [(a, b) for stem in ("response", "answer", "output", "completion", "human_ref",
                                     "conversation")
                 for a, b in ((f"{stem}_0", f"{stem}_1"), (f"{stem}_1", f"{stem}_2"),
                              (f"{stem}_a", f"{stem}_b"), (f"{stem}_A", f"{stem}_B"))]
CHOICES = ("better_response_id", "safer_response_id", "choice", "winner", "preference", "preferred",
           "chosen", "label", "labels")
ANSWERS = ("response", "output", "completion", "answer", "chosen")
# what a prompt may not lose, in a row or a message
CARRIERS = ("tools", "functions", "context", "documents", "images")
REASONING = ("reasoning_content", "reasoning", "thinking")


# ---------------------------------------------------------------- columns → messages

def string(row, key):
    if not isinstance(row.get(key), str):
        raise Bad(f"`{key}` is {type(row[key]).__name__}, not text" if key in
                  row else f"column `{key}` is missing")
    return row[key]


def parsed(value):
    """JSON text of messages and a single message as a list of messages; any other value as it
    is."""
    if isinstance(value, str) and re.match(r'\s*\[?\s*\{\s*"', value):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        items = found if isinstance(found, list) else [found]
        value = found if all(isinstance(m, dict) and {"role", "from"} & set(m)
                             for m in items) else value
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return value["messages"]
    return [value] if isinstance(value, dict) else value


def message(m):
    """{"role", "content"} or {"from", "value"} → the first form, and what may stand beside it."""
    role, content = (m[a] if m.get(a) is not None else m.get(b)
                     for a, b in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        raise Bad(f"a message's role must be one of {', '.join(ROLES)}")
    if lost := [k for k in CARRIERS if m.get(k)]:
        raise Bad(f"`{lost[0]}` of a message cannot be used")
    more = {k: m[k] for k in (*CALLS, *REASONING, "tool_call_id", "name") if m.get(k)}
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise Bad(f"a message's `content` has a part that is not text ({str(kind)[:20]})")
        content = "".join(part["text"] for part in content)
    if content is None and (more.keys() & set(CALLS)):
        content = ""
    string({"content": content}, "content")
    return {"role": ROLES[role.strip().lower()], "content": content, **more}


def messages(value):
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise Bad("not a list of messages")
    return [message(m) for m in value]


def alternate(texts):
    """Texts in turn, the last one the assistant's → messages."""
    return [{"role": "assistant" if (len(texts) - i) % 2 else "user", "content": text}
            for i, text in enumerate(texts)]


def is_texts(value):
    return isinstance(value, list) and bool(value) and all(isinstance(t, str) for t in value)


def split_last(conversation):
    if not conversation or conversation[-1]["role"] != "assistant":
        raise Drop("no assistant turn")
    return conversation[:-1], conversation[-1]


def take_history(row):
    """Take the columns of a prompt out of the row → messages, or a text that is templated, or None
    where there are none."""
    if isinstance(row.get("info"), dict):
        return [{"role": "user", "content": tldr(row.pop("info"))}]
    if isinstance(row.get("history"), str) and "prompt" not in row:  # SHP
        row["prompt"] = row.pop("history")
    names = [k for k in (*PROMPTS, "input") if k in row]
    if not names:
        return None
    base = parsed(row.pop(names[0]))
    if is_texts(base):
        base = [{**m, "role": "user" if m["role"] == "assistant" else "assistant"}
                for m in alternate(base)]
    elif not isinstance(base, str):
        base = messages(base)
    elif not markup(base):
        base = prompt_messages(base)
    if not base:
        raise Drop("empty prompt")
    more = {name: row.pop(name) for name in names[1:] if isinstance(parsed(row[name]), str)}
    more |= {name: string(row, name) for name in ("system", "system_prompt") if name in row}
    for name in more:
        row.pop(name, None)
    if isinstance(base, str):
        if lost := [name for name, text in more.items() if text.strip() not in base]:
            raise Bad(f"column `{lost[0]}` beside a prompt that is templated already")
        return base
    said, before = {m["content"].strip() for m in base} | {""}, earlier(row)
    for name, text in more.items():
        if text.strip() not in said and name.startswith("system"):
            before.insert(0, {"role": "system", "content": text})
        elif text.strip() not in said:  # the material of an instruction
            base[-1]["content"] += f"\n\n{text}"
    return before + base


def earlier(row):
    """Take `history` out of the row, turns or [question, answer] pairs before the prompt →
    messages."""
    turns, out = parsed(row.pop("history", [])), []
    for turn in turns if isinstance(turns, list) else [turns]:
        if isinstance(turn, dict):
            out.append(message(turn))
        elif is_texts(turn) and len(turn) < 3:
            out += [{"role": r, "content": t} for r, t in zip(("user", "assistant"), turn)]
        else:
            raise Bad("`history` is no list of messages or of [question, answer] pairs")
    return out


def prompt_messages(text):
    """A prompt's text → messages: HH turns, where an assistant's that is only opened is none, or
    one turn of the user's."""
    if not is_transcript(text):
        return [{"role": "user", "content": text}]
    out = transcript(text)
    return out[:-1] if out[-1]["role"] == "assistant" and not out[-1]["content"] else out


def tldr(info):
    """The post of OpenAI's TL;DR comparisons, or its news article, as a request."""
    lines = [f"{name.upper()}: {info[key]}" for name, key in (
        ("subreddit", "subreddit"), ("title", "title"), ("post", "post"), ("article", "article"))
        if isinstance(info.get(key), str)]
    if not {"post", "article"} & set(info):
        raise Bad("`info` has neither `post` nor `article`")
    return "\n\n".join(lines) + "\n\nTL;DR:"


def take_sides(row):
    """Take the two responses out of the row → (chosen, rejected), in any form."""
    for names in PAIRS:
        if set(names) <= row.keys() and not isinstance(row[names[0]], (int, float)):
            chosen, rejected = (row.pop(name) for name in names)
            if names[0] == "messages":  # ms-swift: the whole dialogue, and what else may end it
                row["messages"], chosen = split_last(messages(parsed(chosen)))
            return chosen, rejected
    if isinstance(row.get("summaries"), list):
        two = [s.get("text") if isinstance(s, dict) else s for s in row.pop("summaries")]
        return by_choice(row, two, ("summary_0", "summary_1"))
    for names in CHOSEN_OF_TWO:
        if set(names) <= row.keys():
            return by_choice(row, [row.pop(name) for name in names], names)
    if isinstance(row.get("completions"), list):
        scored = [(c["overall_score"], c["response"]) for c in row.pop("completions")
                  if isinstance(c, dict) and isinstance(c.get("overall_score"), (int, float))
                  and isinstance(c.get("response"), str)]
        if len(scored) < 2:
            raise Bad("`completions` has no two responses with an `overall_score`")
        (low, rejected), (high, chosen) = (f(scored, key=lambda x: x[0]) for f in (min, max))
        if low == high:
            raise Drop("no preference")
        return chosen, rejected
    missing = next((k for k in ("chosen", "rejected") if k not in row), None)
    if missing and "label" in row:
        raise Bad("column `label` marks single responses; pairs of `chosen` and `rejected` are "
                  "needed")
    raise Bad(f"column `{missing}` is missing" if missing else
              f"`chosen` is {type(row['chosen']).__name__}, not text")


def by_choice(row, two, names):
    """(chosen, rejected) of two responses by the first column that says which is better."""
    key = next((k for k in CHOICES if k in row), None)
    if key is None:
        raise Bad(f"no column says which of `{names[0]}` and `{names[1]}` is better "
                  f"({', '.join(CHOICES)})")
    value = row.pop(key)
    said = str(int(value) if isinstance(value, (bool, float)) and value == value
               and abs(value) < 9 else value).lower()
    if "tie" in said or said in ("-1", "both"):
        raise Drop("no preference")
    first, second = (n.lower() for n in names)
    which = {first: 0, second: 1, f"model_{first[-1]}": 0, f"model_{second[-1]}": 1,
             first[-1]: 0, second[-1]: 1}
    if key == "labels" and first.startswith("human_ref"):
        which = {"1": 0, "0": 1}  # SHP: 1 means that A is preferred
    if said not in which or len(two) != 2:
        raise Bad(f"`{key}` does not say which of two responses is better")
    return two[which[said]], two[1 - which[said]]


# ---------------------------------------------------------------- one side of a pair

def same(a, b):
    return a["role"] == b["role"] and a["content"].split() == b["content"].split()


def join(history, side):
    """A prompt's messages and a side's: those of the side alone where it repeats the prompt."""
    said, heard = ([m for m in x if m["role"] != "system"] for x in (history, side))
    system = [m for m in side if m["role"] == "system"] or [
        m for m in history if m["role"] == "system"]
    for repeated in (said, said[:-1] if said[-1:] and said[-1]["role"] == "assistant" else said):
        if len(heard) > len(repeated) and all(map(same, repeated, heard)):
            return system + heard
    if any(m["role"] in ("user", "system") for m in side):
        raise Drop("prompts differ")
    return history + side


def read_side(value, history, name):
    """(messages or a templated prompt, the assistant's message) of one side."""
    value = parsed(value)
    if is_texts(value):
        value = value[0] if history is not None and len(value) == 1 else alternate(value)
    if not isinstance(value, str):
        side = messages(value)
    elif history is None and markup(value):
        return split_markup(value)
    elif history is None and not is_transcript(value):
        raise Drop("column `prompt` is missing")
    elif history is None or re.match(r"\s*Human:", value) and re.search(r"\n\s*Assistant:", value):
        side = transcript(value)
    else:
        side = [{"role": "assistant", "content": value}]
    if isinstance(history, str):
        if len(side) > 1:
            raise Bad(f"`{name}` has several messages beside a prompt that is templated already")
        return history, split_last(side)[1]
    return split_last(join(history, side) if history else side)


def split_markup(text):
    """A whole dialogue in a template's markup → (prompt, the assistant's message)."""
    opening = markup(text)
    head, mark, response = text.rpartition(opening.rstrip("\n"))
    if not mark or OPEN[OPENINGS.index(opening)] in response:
        raise Drop("no assistant turn")
    return head + opening, {"role": "assistant", "content": response}


def without_prompt(row, values, style):
    """The responses without the prompt's text, where both begin with it."""
    said = row.get(next((k for k in PROMPTS if k in row), None))
    said = said.strip() if isinstance(said, str) else ""
    texts = [v.lstrip() if isinstance(v, str) else "" for v in values]
    if not said or not all(t.startswith(said) for t in texts):
        return values
    rest = [t[len(said):] for t in texts]
    if not (is_transcript(said) or markup(said) or all(r[:1].isspace() for r in rest)):
        return values
    style.notes["prompts repeated in both responses, taken out there"] += 1
    return rest


# ---------------------------------------------------------------- raw row → clean row

def write(style, history, answers, tools=None):
    """(prompt, responses) as the model reads them."""
    texts, marked = [a["content"] for a in answers], isinstance(history, str)
    keys = {} if marked else other_keys([*history, *answers])
    if marked:  # templated already: only an opening may lack
        opening = markup(history)
        if not history.rstrip().endswith(opening.rstrip()):
            history = history.rstrip("\n") + ("\n" if opening[0] == "<" else " ") + opening
        prompt, texts = history, [ENDS.sub("", t).strip() for t in texts]
    else:
        if style.form == "chat" and (keys or tools):
            check_used(style, history, answers, tools)
        elif set(CALLS) & keys:
            raise Bad("`tool_calls` needs a --model whose chat template writes them")
        elif len(set(texts)) == 1 < len({json.dumps(a, sort_keys=True) for a in answers}):
            raise Bad(f"the responses differ in `{min(keys)}` only, which is not used")
        prompt, texts = render(style, history, answers, tools)
    if not prompt.strip():
        raise Drop("empty prompt")
    if not all(t.strip() for t in texts):
        raise Drop("empty response")
    lead = style.lead if style.form == "hh" and not marked else ""  # a chat template writes its own
    return prompt, [lead + t for t in texts]


def write_none(row, names):
    """--template none: (prompt, responses) as they stand in the columns; an HH dialogue is divided
    after its last mark."""
    prompt, texts = row.pop("prompt", None), [string(row, name).rstrip() for name in names]
    if not isinstance(prompt, str | None):
        raise Bad("messages need --template auto or hh")
    if prompt is None:
        divided = [text.rpartition(ASSISTANT) for text in texts]
        if not all(mark for _, mark, _ in divided):
            raise Drop("column `prompt` is missing")
        if len({head for head, *_ in divided}) > 1:
            raise Drop("prompts differ")
        prompt, texts = divided[0][0] + ASSISTANT, [text for *_, text in divided]
    if not prompt.strip() or not all(t.strip() for t in texts):
        raise Drop("empty response" if prompt.strip() else "empty prompt")
    for name in names:
        del row[name]
    return prompt, texts


def other_keys(history):
    """What messages have beside role and content."""
    return {k for m in history for k in m} - {"role", "content", "name"}


def check_used(style, history, answers, tools):
    """Bad where the chat template does not write a key of the messages, or the tools: calls and
    tools always, reasoning where the responses differ in nothing else."""
    alike = len({a["content"] for a in answers}) == 1
    whole = [apply_template(style, [*history, a], tools) for a in answers]
    for key in sorted(other_keys([*history, *answers]) | ({"tools"} if tools else set())):
        bare = [apply_template(style, [{k: v for k, v in m.items() if k != key}
                                       for m in [*history, a]], tools if key != "tools" else None)
                for a in answers]
        if bare == whole and (key not in REASONING or alike):
            raise Bad(f"`{key}` cannot be used: the chat template does not write it")


def take_tools(row, style):
    """Columns that belong to the prompt: `tools` for a chat template; Bad where one cannot be
    used."""
    if isinstance(row.get("input"), dict):  # OpenAI: messages, and tools beside them
        inner = row.pop("input")
        row |= {"prompt": inner.get("messages"), **{k: inner[k] for k in CARRIERS if k in inner}}
    tools = None
    for name in CARRIERS:
        value = row.pop(name, None)
        if name == "tools" and isinstance(value, str):
            try:
                value = json.loads(value or "[]")
            except ValueError:
                raise Bad("`tools` is not JSON") from None
        if value and name == "tools" and style.form == "chat":
            tools = value if isinstance(value, list) else [value]
        elif value:
            raise Bad(f"column `{name}` belongs to the prompt and cannot be used" + (
                ": it needs a --model whose chat template writes it" if name == "tools" else ""))
    return tools


def read_row(row, kind, style, task, ignored=None):
    """One raw row → clean row without id. Raises Drop or Bad and nothing else. `ignored` counts
    the columns that were not used."""
    if isinstance(row, Bad):
        raise row
    if isinstance(row, str) and kind not in ("pairs", "sft"):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise Bad(f"a JSON {type(row).__name__}, not an object")
    # None: absent in a parquet file
    row = {SPELLINGS.get(k, k): v for k, v in row.items() if v is not None}
    given = re.sub(r"\W+", "_", string(row, "task").lower()) if "task" in row else ""
    own = [row.pop(k, None) for k in ("task", "id")]
    clean = {"pairs": read_pair, "sft": read_sft}.get(kind, read_prompt)(row, style)
    if kind != "sft":
        clean["task"] = given.strip("_")[:40] or task  # becomes part of a file name
    try:
        json.dumps([clean, str(own)], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Bad("a text holds a lone surrogate, which UTF-8 cannot write") from None
    if ignored is not None:
        ignored.update(k for k in row if isinstance(k, str))
    return clean


def read_pair(row, style):
    extra = carried(row)
    if style.form == "none":
        prompt, texts = write_none(row, ("chosen", "rejected"))
    else:
        prompt, texts = read_dialogues(row, style)
    if texts[0].strip() == texts[1].strip():
        raise Drop("identical responses")
    return {"prompt": prompt, "chosen": texts[0], "rejected": texts[1], **extra}


def read_dialogues(row, style):
    """(prompt, [chosen, rejected]) of a preference row in any format but --template none's."""
    tools = take_tools(row, style)
    before, answers, _ = divide(row, style)
    return write(style, before, answers, tools)


def divide(row, style):
    """Take prompt and responses out of a preference row → (messages or a templated prompt, [chosen,
    rejected] as messages, the two as they came)."""
    came = take_sides(row)
    values = without_prompt(row, came, style)
    history, sides, drop = take_history(row), [], None
    for name, value in zip(("chosen", "rejected"), values):
        try:
            sides.append(read_side(value, history, name))
        except Drop as reason:  # the other side must be readable all the same
            drop = drop or reason
    if drop:
        raise drop
    (before, chosen), (other, rejected) = sides
    if before != other:
        raise Drop("prompts differ")
    return before, [chosen, rejected], came


def as_came(row, style):
    """A preference row that `read_row` reads, in the layout that it came in, under TRL's names:
    messages as messages, whole dialogues as texts, else a prompt's text and two responses'."""
    row = {k: v for k, v in row.items() if v is not None}
    given = row.get("prompt")
    if style.form == "none":
        return {k: row[k] for k in ("prompt", "chosen", "rejected") if k in row}
    before, answers, came = divide(row, style)
    texts = all(isinstance(parsed(v), str) for v in came)
    if texts and isinstance(given, str):
        return {"prompt": given, "chosen": came[0], "rejected": came[1]}
    if texts and (isinstance(before, str) or any(map(is_transcript, came))):
        return {"chosen": came[0], "rejected": came[1]}
    if texts and len(before) == 1:
        return {"prompt": before[0]["content"], "chosen": came[0], "rejected": came[1]}
    return {"prompt": before, "chosen": answers[:1], "rejected": answers[1:]}


def carried(row):
    """Take the known columns beside the texts out of the row, checked; `margin` is the mean
    difference where only that is given."""
    out = {k: row.pop(k) for k in (*SCORES, *NUMBERS, LABEL) if k in row}
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
    out = {k: v for k, v in out.items() if v != []}  # no scores
    if NUMBERS[0] in out:
        out.setdefault("margin", out[NUMBERS[0]])
    return out


def read_sft(row, style):
    names = [k for k in ANSWERS if k in row]
    if style.form == "none":
        prompt, (response,) = write_none(row, names[:1] or ["response"])
        return {"prompt": prompt, "response": response}
    tools, spoken = take_tools(row, style), {"messages", "conversations"} & row.keys()
    answer = row.pop(names[0]) if names else None
    history = take_history(row)
    if answer is not None:
        before, answer = read_side(answer, history, names[0])
    elif spoken:
        before, answer = split_last(history)
    else:
        raise Bad("column `response` is missing")
    prompt, (response,) = write(style, before, [answer], tools)
    return {"prompt": prompt, "response": response}


def read_prompt(row, style):
    if style.form == "none" and "prompt" in row:
        row["response"] = "-"
        return {"prompt": write_none(row, ["response"])[0]}
    tools, history = take_tools(row, style), take_history(row)
    if history is None:
        history, _ = read_side(take_sides(row)[0], None, "chosen")
    elif isinstance(history, list) and len(history) > 1 and history[-1]["role"] == "assistant":
        history = history[:-1]
    return {"prompt": write(style, history, [{"role": "assistant", "content": "-"}], tools)[0]}


# ---------------------------------------------------------------- all rows of all sources

def load(given, kind, args, ids, originals=None):
    """All clean rows of the sources, and {"read", "kept", "drops", "notes", "unused"}. `ids` counts
    the ids given so far; `originals` gets {id: the raw row}."""
    rows, drops, ignored, read = [], Counter(), Counter(), 0
    style, seen = style_of(args.model, args.template), {}
    style.notes.clear()
    for source, called in [(part, sources.called(s, part)) for s in given
                           for part in sources.parts(s)]:
        name = called.split("/")[-1] if Path(source).exists() else called.split("/", 1)[-1]
        name = name.removesuffix("".join(sources.container(name) or ()))
        task = next((t for word, t in TASK_WORDS.items() if word in called.lower()), "general")
        stream = sources.raw_rows(source, kind, args)
        for place, raw in common.progress(stream, f"reading {name}"):
            read += 1
            try:
                row = read_row(raw, kind, style, task, ignored)
                key = tuple(row.get(k) for k in ("prompt", "chosen", "rejected"))
                if kind != "sft" and key in seen:
                    raise Drop("duplicate pair" if kind == "pairs" else "duplicate prompt")
                length = len(row.get(SCORES[0], ()))
                if length and length != seen.setdefault("scores", length):
                    raise Bad(f"`{SCORES[0]}` has {length} scores, the rows before it "
                              f"{seen['scores']}")
                seen[key] = True
                if kind == "pairs" and (key[0], key[2], key[1]) in seen:
                    style.notes["pairs contradict another one, both are kept"] += 1
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
                    "[:/ ]", "-", f"{name}-{place}")
                while new in ids:
                    ids[own] += 1
                    new = f"{own}-{ids[own]}"
                ids[new] = 1
                rows.append({"id": new, **row})
                if originals is not None:
                    originals[new] = raw
    if "scores" in seen and not all(SCORES[0] in row for row in rows):
        style.notes["rows have scores and others none: scores are left out"] += sum(
            SCORES[0] in row for row in rows)
        rows = [{k: v for k, v in row.items() if k not in SCORES} for row in rows]
    for note, n in style.notes.items():
        common.log(f"  {kind}: {n} {note}")
    if ignored:
        common.log(f"  {kind}: columns that are not used: {', '.join(sorted(ignored))}")
    return rows, {"read": read, "kept": len(rows), "drops": dict(sorted(drops.items())),
                  **({"notes": dict(style.notes)} if style.notes else {}),
                  **({"unused": sorted(ignored)} if ignored else {})}
