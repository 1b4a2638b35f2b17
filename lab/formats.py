"""Every messy format of preferences, SFT examples and prompts, read row by row.

A SOURCE is a file, a folder of files or a glob of .jsonl, .json, .csv, .tsv (plain, .gz or .zst) or
.parquet; a folder that datasets' save_to_disk wrote; a hub id `owner/name`, `owner/name:data_dir`
or `owner/name:configuration` (all its splits); `toy` or `toy:summary` (the embedded world). The
format is found row by row:

    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi ..."}    HH
    {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}      the prompt also as `instruction`,
        `question`, `query`, with `input`, `system`, `history`; as an HH or templated text
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", ...}], ...}
        also `messages`, `conversations`; whole dialogues on both sides, with or without `prompt`;
        single messages; JSON text of them; "from" and "value"; content in text parts
    pairs by name: rejected_response (ms-swift), preferred_output (OpenAI), response_chosen,
        response_j and _k (Stack Exchange, paired), response_0 and response_1 with
        better_response_id, safer_response_id, a choice or a winner, winner_model_a, _b and
        winner_tie (the Arena), human_ref_A and _B with labels (SHP),
        completions with overall_score (UltraFeedback), summaries with choice (OpenAI's TL;DR
        comparisons), {"chosen": ["Hi", "Hello."], "chosen score list": [0.1, ...],
        "mean preference difference": 0.3, "GPT4 label": 1} (the authors' released set)
    sft: a prompt as above with `response`, `output`, `completion`, `answer`, or whole messages,
        whose last turn is the response; prompts: any of these, or a text

Dropped and counted, first reason that holds: no assistant turn (none, or not the last one), column
`prompt` is missing, no preference (a tie), prompts differ, empty prompt, empty response, identical
responses, duplicate pair, the header once more; among prompts: duplicate prompt; among SFT rows and
prompts: held-out prompt. A row that cannot be read stops the run with `file:line: what is wrong`;
--skip_bad_rows counts it as unreadable instead. Columns that are not used are named once. Row
contents are never printed: some are offensive.
"""
import ast
import contextlib
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import common
from lab import sources
from lab.manifest import hash_text
from lab.sources import Bad, Cells, Drop, Misread
from lab.templates import (
    ASSISTANT, CALLS, ENDS, HUMAN, MARKUPS, ROLES, SPECIAL, apply_template, is_transcript, markup,
    open_turn, render, reworded, split_markup, style_of, transcript)

# the first word in a source's name gives its task
TASK_WORDS = {"harmless": "harmless", "saferlhf": "harmless", "helpful": "helpful",
              "oasst": "helpful", "summar": "summary", "tldr": "summary"}
SCORES, LABEL = ("chosen_score_list", "rejected_score_list"), "judge_label"
NUMBERS = ("mean preference difference", "std preference difference", "margin", "gold_chosen",
           "gold_rejected")
SCORED = [(form.format("chosen"), form.format("rejected")) for form in (
    "score_{}", "{}_score", "rating_{}", "{}_rating", "{}-rating")]
SPELLINGS = {"chosen score list": SCORES[0], "rejected score list": SCORES[1], "GPT4 label": LABEL}
PROMPTS = ("prompt", "instruction", "question", "query", "messages", "conversations",
           "conversation")
PAIRS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"),
         ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected"),
         ("response_j", "response_k"), ("response", "rejected_response"),
         ("messages", "rejected_response"), ("messages", "rejected_messages"))
CHOSEN_OF_TWO = [(stem + a, stem + b) for stem in (
    "response", "answer", "output", "completion", "human_ref", "conversation")
    for a, b in (("_0", "_1"), ("_1", "_2"), ("1", "2"), ("_a", "_b"), ("_A", "_B"))]
CHOICES = ("better_response_id", "safer_response_id", "choice", "winner", "preference", "preferred",
           "chosen", "label", "labels")
ARENA = ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie")
TIE = re.compile(  # and a few words, but no reason that begins so
    r"(?!.*([,;:.].*\w|_but_))(tied?|ties|both(bad|good)?|neither|draw|equal(ly)?|(the_)?same|a=b)"
    r"(?![^\W_])([\W_]+[^\W_]+){0,4}[\W_]*")
NAME = re.compile(
    r"((model|response|answer|output|completion|assistant|option|summary)_?)?(\d|[a-d])")
ANSWERS = ("response", "output", "completion", "answer", "chosen")
# what a prompt may not lose, in a row or a message
CARRIERS = ("tools", "functions", "context", "contexts", "passage", "documents", "image", "images",
            "image_path", "image_paths", "img_path", "image_url", "video", "videos", "audio",
            "audios", "audio_path",
            "chat_history", "conversation_history", "initial_reason_steps")
SYSTEM = ("system", "system_prompt", "system_message")
REASONING = ("reasoning_content", "reasoning", "thinking")
KEYS = {"role", "from", "content", "value", "input", "output", "tool_call_id", "name", *CALLS,
        *REASONING}
TEXT = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|None)"""
UNSEPARATED = re.compile(rf"\[[\[\s]*{TEXT}([\s\[\]]+{TEXT})+[\s\]]*\]", re.DOTALL)
OPENED = re.compile(rf"\A(\s*(Assistant:|{'|'.join(re.escape(m.rstrip()) for m in MARKUPS)}))+\s*")


# ---------------------------------------------------------------- columns → messages

def string(row, key):
    if not isinstance(row.get(key), str):
        raise Bad(f"`{key}` is {type(row[key]).__name__}, not text" if key in
                  row else f"column `{key}` is missing")
    return row[key]


def parsed(value):
    """JSON or Python text of messages and a single message as a list of messages; any other value
    as it is."""
    if isinstance(value, str) and re.match(
            r"""\s*("\s*|array\()?(\[\s*)*\{\s*\\?["']\w+\\?["']\s*:""", value):
        found = literal(value)
        found = literal(found) if isinstance(found, str) else found  # written twice
        while isinstance(found, list) and len(found) == 1 and isinstance(found[0], list):
            found = found[0]
        if found is None and re.search(
                rf"""["'](role|from)\\?["']\s*:\s*\\?["']({'|'.join(ROLES)})\\?["']""", value):
            raise Bad("a text that looks like messages is neither JSON nor Python")
        items = found if isinstance(found, list) else [found]
        if all(isinstance(m, dict) for m in items) and (
                isinstance(items[0].get("messages"), list) or all(map(is_message, items))):
            value = found
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return value["messages"]
    return [value] if isinstance(value, dict) else value


def is_message(m):
    return any(str(m.get(role)).strip().lower() in ROLES and {content, *CALLS} & m.keys()
               for role, content in (("role", "content"), ("from", "value")))


def literal(text):
    """The value of a JSON or Python text, or None; Bad where Python would make one text of those
    that numpy prints without commas."""
    text = text.strip()
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    if UNSEPARATED.fullmatch(text):
        raise Bad("a list of texts without commas between them, as numpy prints it")
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ast.literal_eval(text)


def message(m):
    """{"role", "content"} or {"from", "value"} → the first form, and what may stand beside it."""
    role, content = (m[a] if m.get(a) is not None else m.get(b)
                     for a, b in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        raise Bad(f"a message's role must be one of {', '.join(ROLES)}")
    if len({v for k in ("content", "value") if isinstance(v := m.get(k), str) and v.strip()}) > 1:
        raise Bad("`content` and `value` of a message differ")
    more = {k: m[k] for k in (*CALLS, *REASONING, "tool_call_id", "name") if m.get(k)}
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str) or (
                    part.get("type") or "text") not in ("text", "input_text", "output_text"):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise Bad(f"a message's `content` has a part that is not text ({str(kind)[:20]})")
        content = "".join(part["text"] for part in content)
    if content is None and (more.keys() & set(CALLS)):
        content = ""
    string({"content": content}, "content")
    return {"role": ROLES[role.strip().lower()], "content": content, **more}


def messages(value, name):
    """A list of messages, or of {"input", "output"}, from the column `name` → messages."""
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise Bad(f"`{name}` is not a list of messages" if isinstance(value, list) else
                  f"`{name}` is {type(value).__name__}, neither text nor a list of messages")
    turns = [m for item in value for m in (
        [{"role": role, "content": item[key]} for role, key in (
            ("user", "input"), ("assistant", "output")) if item[key] is not None]
        if {"input", "output"} <= item.keys() and item.get("role") is item.get("from") is None
        else [item])]
    if lost := [k for item in value for k in (*CARRIERS, *SYSTEM) if item.get(k)]:
        raise Bad(f"`{name}`: `{lost[0]}` of a message cannot be used")
    try:
        return [message(m) for m in turns]
    except Bad as problem:
        raise Bad(f"`{name}`: {problem}") from None


def alternate(texts):
    """Texts in turn, the last one the assistant's → messages."""
    return [{"role": "assistant" if (len(texts) - i) % 2 else "user", "content": text}
            for i, text in enumerate(texts)]


def is_texts(value):
    return isinstance(value, list) and bool(value) and all(isinstance(t, str) for t in value)


def is_blank(value):
    return value == [] or isinstance(value, str) and not value.strip()


def split_last(conversation):
    if not conversation or conversation[-1]["role"] != "assistant":
        raise Drop("no assistant turn")
    return conversation[:-1], conversation[-1]


def take_history(row, style, whole=False):
    """Take the columns of a prompt out of the row → messages, or a text that is templated, or None
    where there are none. An empty one is none beside another, or beside `whole` dialogues."""
    names = [k for k in (*PROMPTS, "input") if k in row]
    blank = [k for k in names if is_blank(row[k])]
    for name in blank if whole or len(blank) < len(names) else ():
        names.remove(name), row.pop(name)
    info = row.get("info")
    if not names and isinstance(info, dict) and {"post", "article"} & info.keys():
        return [{"role": "user", "content": tldr(row.pop("info"))}]
    if not names and isinstance(row.get("history"), str):  # SHP
        names = ["history"]
    if not names:
        return None
    base = parsed(row.pop(names[0]))
    if isinstance(row, Cells) and isinstance(base, str) and re.match(r"""\s*\[\s*["']""", base):
        only = literal(base)  # a list of one text
        base = is_texts(only) and len(only) == 1 and only[0] or base
    if is_texts(base):
        if len(base) % 2 == 0:
            raise Bad(f"`{names[0]}` has an even number of texts: the last one is not the user's")
        base = alternate([*base, ""])[:-1]  # the last one is the user's
    elif not isinstance(base, str):
        base = messages(base, names[0])
    elif not markup(base):
        base = prompt_messages(base)
    if not base:
        raise Drop("empty prompt")
    return with_columns(row, base, style, names[1:])


def with_columns(row, base, style, names=()):
    """A prompt with what the columns `names`, `system` and `history` add to it; taken out of the
    row."""
    more = {name: row.pop(name) for name in names if isinstance(parsed(row[name]), str)}
    more |= {name: string(row, name) for name in SYSTEM if name in row}
    for name in more:
        row.pop(name, None)
    said = [base] if isinstance(base, str) else [m["content"].strip() for m in base]
    whole = "\n".join(said)
    more = {name: text for name, text in more.items() if text.strip() and not (
        len(text.strip()) > 7 and held(text, whole)  # a short one must be a line, or its end
        or re.search(rf"(^|[:：]\s*){re.escape(text.strip())}\s*$", whole, re.MULTILINE))}
    if isinstance(base, str):
        if more:
            raise Bad(f"column `{min(more)}` beside a prompt that is templated already")
        return base
    before = earlier(row)
    if all(map(same, before, base)) and len(before) < len(base):  # `base` repeats them
        before = []
    for name, text in more.items():
        if not name.startswith("system"):  # the material of an instruction
            asked = next((m for m in base[::-1] if m["role"] == "user"), base[-1])
            asked["content"] += f"\n\n{text}"
            style.notes[f"prompts take in column `{name}`"] += 1
        elif any(m["role"] == "system" for m in base):
            raise Bad(f"column `{name}` beside another system turn")
        else:
            before.insert(0, {"role": "system", "content": text})
    return before + base


def held(text, whole):
    """Whether a text stands in another one, as whole words, whatever the white space."""
    text, whole = (" ".join(x.split()) for x in (text, whole))
    edges = [in_word(c) and c.isascii() for c in (text[:1], text[-1:])]  # Chinese has no spaces
    at = whole.find(text)
    while at >= 0:
        end = at + len(text)
        around = whole[max(at - 1, 0):at], whole[end:end + 1]
        if not any(edge and in_word(c) for edge, c in zip(edges, around)):
            return True
        at = whole.find(text, at + 1)
    return False


def in_word(c):
    """Whether a character is of a word, as regular expressions have it."""
    return c.isalnum() or c == "_"


def earlier(row):
    """Take `history` out of the row, turns or [question, answer] pairs before the prompt →
    messages."""
    turns, out = row.pop("history", None) or [], []
    if isinstance(turns, str):
        found = literal(turns.strip() or "[]")
        turns = turns if found is None else found
    for turn in turns if isinstance(turns, list) else [turns]:
        if is_texts(turn) and len(turn) < 3:
            out += [{"role": r, "content": t} for r, t in zip(("user", "assistant"), turn)]
        else:
            out += messages([turn], "history")
    return out


def prompt_messages(text):
    """A prompt's text → messages: HH turns, where an assistant's that is only opened is none, or
    one turn of the user's, which may quote some."""
    out = transcript(text) if is_transcript(text) else []
    quoted = out[-1:] and out[-1]["role"] == "assistant" and out[-1]["content"] and not re.match(
        r"\s*(Human|User|Assistant):", text) and (  # announced, or the text goes on behind it
        out[0]["content"].endswith(":") or "\n\n" in out[-1]["content"])
    if not out or quoted:
        return [{"role": "user", "content": text}]
    return out[:-1] if out[-1]["role"] == "assistant" and not out[-1]["content"] else out


def tldr(info):
    """The post of OpenAI's TL;DR comparisons, or its news article, as a request."""
    lines = [f"{key.upper()}: {info[key]}" for key in ("subreddit", "title", "post", "article")
             if isinstance(info.get(key), str)]
    if not any(str(info.get(key) or "").strip() for key in ("post", "article")):
        raise Drop("empty prompt")
    return "\n\n".join(lines) + "\n\nTL;DR:"


def arena(prompt, response_a, response_b, *won):
    """The Arena's columns, lists of the turns (in JSON, too) or single texts, and which of the last
    three is 1 → whole dialogues (chosen, rejected)."""
    won = [spelled(x) in ("1", "true") for x in won]
    asked, *two = (turns_of(v) for v in (prompt, response_a, response_b))
    if sum(won) != 1 or not len(asked) == len(two[0]) == len(two[1]):
        raise Bad(f"one of {', '.join(ARENA[3:])} must be 1, with as many turns in each response "
                  "as in `prompt`")
    if won[2]:
        raise Drop("no preference")
    sides = [[{"role": role, "content": "" if text is None else text}
              for turn in zip(asked, answers) for role, text in zip(("user", "assistant"), turn)]
             for answers in two]
    return sides[won[1]], sides[won[0]]


def turns_of(value):
    """The turns in a column of the Arena's."""
    if isinstance(value, str) and re.match(r"""\s*\[\s*(["']|null|None)""", value):  # no answer
        found = literal(value)
        if not isinstance(found, list) and value.lstrip().startswith(('["', "[null")):
            raise Bad("a list of turns is not JSON")
        value = found if isinstance(found, list) else value
    return value if isinstance(value, list) else [value]


def take_sides(row):
    """Take the two responses out of the row → (chosen, rejected), in any form."""
    if set(ARENA) <= row.keys():
        return arena(*map(row.pop, ARENA))
    for names in CHOSEN_OF_TWO:
        if set(names) <= row.keys() and ("chosen" not in row or is_named(
                row, [row[name] for name in names], spellings(row, names))):
            return by_choice(row, [row.pop(name) for name in names], names)
    listed = row.get("responses")
    listed = literal(listed) if isinstance(listed, str) else listed
    if is_texts(listed):
        is_named(row, listed, {})  # Bad where `chosen` is a place in the list
    for names in PAIRS:
        if set(names) <= row.keys() and not isinstance(row[names[0]], (int, float)):
            chosen, rejected = (row.pop(name) for name in names)
            if names[0] == "messages":  # ms-swift: the whole dialogue, and what else may end it
                row["messages"], chosen = split_last(messages(parsed(chosen), names[0]))
            return chosen, rejected
    if isinstance(row.get("summaries"), list):
        two = [s.get("text") if isinstance(s, dict) else s for s in row.pop("summaries")]
        return by_choice(row, two, ("summary_0", "summary_1"))
    if isinstance(row.get("completions"), list):
        scored = [(c["overall_score"], c["response"]) for c in row.pop("completions")
                  if isinstance(c, dict) and isinstance(c.get("response"), str)
                  and "overall_score" in present(c)]  # neither None nor NaN
        if len(scored) < 2 or not all(type(score) in (int, float) for score, _ in scored):
            raise Bad("`completions` has no two responses with an `overall_score`, or one that is "
                      "no number")
        (low, rejected), (high, chosen) = (f(scored, key=lambda x: x[0]) for f in (min, max))
        if low == high:
            raise Drop("no preference")
        return chosen, rejected
    missing = next((k for k in ("chosen", "rejected") if k not in row), None)
    if missing and "label" in row and len({*ANSWERS, "text"} & row.keys()) == 1:
        raise Bad("column `label` marks single responses; pairs of `chosen` and `rejected` are "
                  "needed")
    names = sorted(k for k in row if re.fullmatch(r"\w{1,30}", str(k)))  # others may be contents
    found = "the header in the first line" if isinstance(row, Cells) else \
        f"the columns {', '.join(names)[:150]}".rstrip()
    raise Bad(f"column `{missing}` is missing, and no other form fits {found} "
              "(00_data.py --help lists them)" if missing
              else f"`chosen` is {type(row['chosen']).__name__}, not text")


def spelled(choice):
    """A choice as text: 1, 1.0 and " 1" are one, and "Response A" and "response_a"."""
    text = re.sub(r"(?<=\w)[\s-]+(?=\w)", "_", str(choice).strip().lower()).removesuffix(".0")
    return "".join(text.split())


def spellings(row, names):
    """{what a choice of one of two columns may say: 0 or 1}; a model's name, too."""
    models = [spelled(row[name]) for name in ("model_a", "model_b") if name in row]
    which = dict(zip(models, (0, 1))) if len(set(models)) == 2 else {}
    which |= {"a": 0, "b": 1, "a>b": 0, "b>a": 1, "a>>b": 0, "b>>a": 1}
    for i, name in enumerate(map(str.lower, names)):
        which |= {f"{stem}{name[-1]}": i for stem in ("", "model_", "response_", "assistant_")}
        which[name] = i
    return which


def is_named(row, texts, which):
    """Whether `chosen` says which of the responses it is; Bad where it looks like a name and is no
    name of theirs."""
    chosen, rejected = (str(row.get(name)).strip() for name in ("chosen", "rejected"))
    if {chosen, rejected} <= {text.strip() for text in texts if isinstance(text, str)}:
        return False
    said = spelled(chosen)
    if said in which or "rejected" not in row and (TIE.fullmatch(said) or said.isdecimal()):
        return True
    look = NAME.fullmatch(said)
    if look and isinstance(row["chosen"], str) and not (
            look[3].isdecimal() and int(look[3]) > len(texts)):
        raise Bad("`chosen` is neither the text nor the name of one of the responses beside it")
    return False


def by_choice(row, two, names):
    """(chosen, rejected) of two responses by the first column that says which is better."""
    key = next((k for k in CHOICES if k in row), None)
    if key is None:
        raise Bad(f"no column says which of `{names[0]}` and `{names[1]}` is better "
                  f"({', '.join(CHOICES)})")
    said, which = spelled(row.pop(key)), spellings(row, names)
    if key == "labels" and names[0].startswith("human_ref"):
        which = {"1": 0, "0": 1, "true": 0, "false": 1}  # SHP: 1 means that A is preferred
    if said not in which and TIE.fullmatch(said):
        raise Drop("no preference")
    if said == "-1":
        raise Bad(f"`{key}` is -1, a tie in some data and the second response in others")
    if said not in which and said.isdecimal() and names[0][-1].isdecimal() and len(two) == 2:
        raise Misread(f"`{key}` is {said} beside `{names[0]}` and `{names[1]}`: a tie, or counted "
                      "from another number than the columns? Write theirs, and \"tie\"")
    if said not in which or len(two) != 2:
        raise Bad(f"`{key}` does not say which of two responses is better "
                  f"({names[0]}, {names[1]}, {names[0][-1]}, {names[1][-1]} or tie)")
    return two[which[said]], two[1 - which[said]]


# ---------------------------------------------------------------- one side of a pair

def same(a, b):
    return a["role"] == b["role"] and a["content"].split() == b["content"].split()


def plain(before):
    """A prompt, messages or a text, without white space and without an empty system turn."""
    return before.split() if isinstance(before, str) else [
        {**m, "content": m["content"].split()} for m in before
        if m["role"] != "system" or m["content"].strip()]


def join(history, side):
    """A prompt's messages and a side's: those of the side alone where it repeats the prompt."""
    split_last(side)  # or it has no assistant's
    said, heard = ([m for m in x if m["role"] != "system"] for x in (history, side))
    system, own = ([m for m in x if m["role"] == "system"] for x in (history, side))
    if system and own and [m["content"].split() for m in system] != [
            m["content"].split() for m in own]:
        raise Drop("prompts differ")
    for repeated in (said, said[:-1] if said[-1:] and said[-1]["role"] == "assistant" else said):
        if len(heard) > len(repeated) and any(
                all(map(same, repeated, part)) for part in (heard, heard[-1 - len(repeated):-1])):
            return side if own else system + heard
    last = heard[:-1]
    if last and len(last) <= len(said) and all(map(same, last, said[-len(last):])):
        return history + heard[-1:]
    begins = side and side[0]["role"] == "assistant" and said and said[-1]["role"] != "assistant"
    if not begins and any(m["role"] in ("user", "system") for m in side):
        raise Drop("prompts differ")
    return history + side


def read_side(value, history, name):
    """(messages or a templated prompt, the assistant's message) of one side, `parsed`."""
    if is_texts(value):
        if history is not None and len(value) % 2 and len(value) > 1:
            raise Drop("prompts differ")
        value = value[0] if history is not None and len(value) == 1 else alternate(value)
    if not isinstance(value, str):
        side = messages(value, name)
    elif history is not None and value[:1] == " ":  # as 00 writes it; a dialogue has a mark first
        side = [answer_of(value, history)]
    elif markup(value):
        before, answer = split_markup(value)
        said = [history] if isinstance(history, str) else [m["content"] for m in history or []]
        if not all(held(text, before) for text in said):
            raise Drop("prompts differ")
        return before, answer
    elif history is None and not is_transcript(value) and not re.search(
            r"\A.*\n\nAssistant:|\nHuman:.*\nAssistant:", value, re.DOTALL):
        raise Drop("column `prompt` is missing")
    elif history is None or re.match(r"\s*Human:", value) and re.search(r"\n *Assistant:", value):
        side = transcript(value)
    else:
        side = [answer_of(value, history)]
        if isinstance(history, list) and HUMAN in value and ASSISTANT in value:
            with contextlib.suppress(Drop):  # a dialogue that begins with another turn
                return split_last(join(history, transcript(value)))
    if isinstance(history, str):
        if len(side) > 1:
            raise Bad(f"`{name}` has several messages beside a prompt that is templated already")
        return history, split_last(side)[1]
    return split_last(join(history, side) if history else side)


def is_dialogue(side):
    """Whether a side, as it came, is more than a response."""
    side = parsed(side)
    return len(side) > 1 if isinstance(side, list) else isinstance(side, str) and bool(
        is_transcript(side) or markup(side))


def answer_of(text, history):
    """A response's text as a message; white space before it is kept where it goes on with a turn,
    and else but for empty lines and a single space."""
    goes_on = isinstance(history, str) or history and history[-1]["role"] == "assistant"
    return {"role": "assistant", "content": text if goes_on else re.sub(
        r"\A(\s*\n)? ?(?!\s)|\A\s*\n", "", text.rstrip())}


def parsed_sides(row, values, history):
    """Both sides `parsed`; texts beside a prompt that are messages on one side only are texts, and
    what begins with a space is one. The row says whether a list of texts may be one itself."""
    if history is not None and any(isinstance(v, str) and v[:1] == " " for v in values):
        return list(values)
    found = [parsed(v) for v in values]
    if all(isinstance(v, str) for v in found) and (history is None or isinstance(row, Cells)):
        lists = [literal(v) if v[:1] == "[" else None for v in found]
        return lists if all(map(is_texts, lists)) else found
    texts = [isinstance(v, str) for v in values]
    one = history is not None and all(texts) and any(isinstance(v, str) for v in found)
    return list(values) if one else found


def without_prompt(row, values, style):
    """The responses without the prompt's text, where all begin with it: a templated one, or one
    that a new line or four words and a space make more than a beginning they share."""
    said = row.get(next((k for k in PROMPTS if k in row), None))
    said = said.strip() if isinstance(said, str) else ""
    texts = [v.lstrip() if isinstance(v, str) else "" for v in values]
    if not said or not all(t.startswith(said) for t in texts):
        return values
    rest = [t[len(said):] for t in texts]
    space = re.compile(r"\s" if len(said.split()) > 3 else r"[ \t]*[\r\n]")
    marked = is_transcript(said) or markup(said)
    if not marked and not all(map(space.match, rest)) or marked and any(
            HUMAN in r or ASSISTANT in r or any(m.search(r) for m in MARKUPS.values())
            for r in rest):  # other turns follow: `join` has them
        return values
    style.notes["prompts repeated in every response, taken out there"] += 1
    return rest


def bare(before, answers, style):
    """Prompt and responses without what belongs to neither: the marks of a turn around all
    responses, and a last turn of the prompt that is the beginning of all or the whole of one."""
    if isinstance(before, list):
        for mark in (OPENED, ENDS):
            if all(mark.search(a["content"]) for a in answers):
                answers = [{**a, "content": mark.sub("", a["content"])} for a in answers]
                style.notes["rows with marks of a turn around every response, taken off"] += 1
    last = before[-1] if isinstance(before, list) and before else {"role": "user"}
    if last["role"] == "assistant" and (not last["content"].strip() or any(
            same(last, a) for a in answers) or all(
            a["content"].lstrip().startswith(last["content"].strip()) and held(
                last["content"], a["content"]) for a in answers)):
        before = before[:-1]
    return before, answers


# ---------------------------------------------------------------- raw row → clean row

def write(style, history, answers, tools=None):
    """(prompt, responses) as the model reads them."""
    texts, marked = [a["content"] for a in answers], isinstance(history, str)
    turns = [] if marked else history
    keys = {k for m in [*turns, *answers] for k in m} - {"role", "content", "name", "tool_call_id"}
    if marked and style.form == "chat" and markup(history).rstrip() not in style.opened:
        style.notes["prompts in another markup than the model's, kept as they are"] += 1
    if marked:  # templated already: only an opening may lack
        prompt = open_turn(history, markup(history))
        begun = not prompt.endswith(markup(history))  # with words of the response
        texts = [ENDS.sub("", t if begun else OPENED.sub("", t).lstrip()).rstrip() for t in texts]
    said = [*(m["content"] for m in turns), *texts]
    if any(map(SPECIAL.search, said)) or style.asks and any(style.asks in text for text in said):
        style.notes["rows hold marks of a turn or a template, kept as text"] += 1
    later = [m["role"] != "system" for m in turns]
    if style.form == "hh" and later != sorted(later):
        style.notes["rows whose system turn in the middle goes to the front"] += 1
    if not marked:
        if style.form == "chat" and (keys or tools):
            check_used(style, history, answers, tools, keys)
        elif set(CALLS) & keys:
            raise Bad("`tool_calls` needs a --model whose chat template writes them")
        elif len(set(texts)) == 1 < len({json.dumps(a, sort_keys=True) for a in answers}):
            raise Bad(f"the responses differ in `{min(keys)}` only, which is not used")
        elif unused := keys & set(REASONING):
            style.notes[f"rows whose `{min(unused)}` is not used"] += 1
        prompt, texts = render(style, history, answers, tools)
    if not prompt.strip():
        raise Drop("empty prompt")
    if not all(t.strip() for t in texts):
        raise Drop("empty response")
    lead = style.lead if style.form == "hh" and not marked else ""  # a chat template writes its own
    return prompt, [lead + t for t in texts]


def write_none(row, sides, style):
    """--template none: (prompt, responses) as they stand in the columns, those of `sides` taken out
    of the row; an HH dialogue is divided after its last mark."""
    texts = without_prompt(row, [string(sides, name).rstrip() for name in sides], style)
    prompt = row.pop("prompt", None)
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
    return prompt, texts


def check_used(style, history, answers, tools, keys):
    """Bad where the chat template does not write a key of the messages, or the tools: calls and
    tools always, reasoning where the responses differ in nothing else."""
    alike = len({a["content"] for a in answers}) == 1
    whole = [apply_template(style, [*history, a], tools) for a in answers]
    for key in sorted([*keys, "tools"] if tools else keys):
        bare = [apply_template(style, [{k: v for k, v in m.items() if k != key}
                                       for m in [*history, a]], tools if key != "tools" else None)
                for a in answers]
        if bare == whole and (key not in REASONING or alike):
            raise Bad(f"`{key}` cannot be used: the chat template does not write it")
        if bare == whole:
            style.notes[f"rows whose `{key}` the chat template does not write"] += 1


def take_tools(row, style):
    """Columns that belong to the prompt: `tools` for a chat template; Bad where one cannot be
    used."""
    if isinstance(row.get("input"), dict) and "messages" in row["input"] and "prompt" not in row:
        inner = row.pop("input")  # OpenAI: messages, and tools beside them
        row |= {"prompt": inner["messages"], **{k: inner[k] for k in CARRIERS if k in inner}}
    tools = None
    for name in CARRIERS:
        value = row.pop(name, None)
        if isinstance(value, list) and not any(value) or isinstance(
                value, str) and value.strip() in ("", "[]", "{}", "null", "None"):
            continue
        if name == "tools" and isinstance(value, str):
            try:
                value = json.loads(value)
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
    if isinstance(row, (Bad, Drop)):
        raise row
    if isinstance(row, str) and kind not in ("pairs", "sft"):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise Bad(f"a JSON {type(row).__name__}, not an object")
    if isinstance(row, sources.Twice):
        raise Bad(f"two columns are called `{row.name}`")
    row = in_one_form(present(row), style)
    given = task_name(string(row, "task")) if "task" in row else ""
    own = [row.pop(k, None) for k in ("task", "id")]
    unused = {f"{k} of a message" for v in row.values() for m in (v if isinstance(v, list) else ())
              if isinstance(m, dict) and {"role", "from"} & m.keys()
              for k, x in m.items() if k not in KEYS and x is not None}
    clean = {"pairs": read_pair, "sft": read_sft}.get(kind, read_prompt)(row, style)
    check_left(row, clean, kind)
    if kind != "sft":
        clean["task"] = given or task
    try:
        json.dumps([clean, str(own)], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # open_text has such ones for bytes that are no text
        raw = isinstance(row, Cells) and "\udc80" <= error.object[error.start] <= "\udcff"
        raise Bad("a text is not in UTF-8: save the file as such" if raw else
                  "a text holds a lone surrogate, which UTF-8 cannot write") from None
    if ignored is not None:
        ignored.update(unused | {k for k in row if k and isinstance(k, str)})
    return clean


def present(row):
    """The columns that are there, in one spelling: None is Parquet's and NaN pandas' for no value,
    which beside another response is an empty one."""
    there = type(row)({SPELLINGS.get(k, k): v for k, v in row.items() if v is not None and (
        v == v or SPELLINGS.get(k, k) in (*NUMBERS, LABEL))})
    for a, b in (*CHOSEN_OF_TWO, *PAIRS):
        if {a, b} <= row.keys() and (a in there) != (b in there) and not any(
                {*two} <= there.keys() for two in (*CHOSEN_OF_TWO, *PAIRS)):
            there |= {name: "" for name in (a, b) if name not in (*there, "messages")}
    return there


def in_one_form(row, style):
    """The row with HH's marks in dialogues whose marks are words, but for --template none. Beside a
    prompt without them a response has such marks as its own, unless it repeats the prompt."""
    if style.form == "none":
        return row
    asked = [row[k] for k in (*PROMPTS, "input") if not is_blank(row.get(k, ""))]
    if not asked and isinstance(row.get("history"), str):  # SHP's prompt
        asked = [row["history"]]
    marked = [v.strip() for v in asked if isinstance(v, str) and reworded(v) != v]

    def one(name, text):
        new = reworded(text)
        last = new.rpartition(ASSISTANT)[2].strip()
        if name in (*PROMPTS, "input") and "\n\n" in last and HUMAN not in last:
            return text  # it goes on behind turns that it quotes
        for t in marked if new == text else ():  # the prompt, said once more
            if text.strip().startswith(t):
                return reworded(t) + text.strip()[len(t):]
        return new if marked or not asked or ASSISTANT in new and all(
            held(t, new) for t in words(asked)) else text
    return type(row)({k: one(k, v) if isinstance(v, str) else v for k, v in row.items()})


def check_left(row, clean, kind):
    """Bad where a column that is left holds words of the conversation that nothing else has."""
    kept = " ".join(x for x in clean.values() if isinstance(x, str))
    for name in (*PROMPTS, "input", *SYSTEM, "history", "document", "article"):
        left = parsed(row.get(name))
        if name in ("document", "article"):  # where it is no name, and not even its beginning there
            left = " ".join(some) if len(some := str(left or "").split()[:8]) > 1 else None
        if kind == "prompts" and isinstance(left, list):
            continue  # whole dialogues, whose responses are not wanted
        with contextlib.suppress(Bad):
            turns = messages(left, name)
            answered = bool(turns) and turns[-1]["role"] == "assistant"  # none of the prompt's
            left = [m["content"] for m in turns[:len(turns) - answered]]
        if not all(held(text, kept) for text in words(left)):
            raise Bad(f"column `{name}` belongs to the prompt and was not used")


def words(value):
    """All texts in a value of a column, but the names of roles and kinds."""
    if isinstance(value, dict):
        value = [v for k, v in value.items() if k not in ("role", "from", "type", "id")]
    if isinstance(value, list):
        return [text for v in value for text in words(v)]
    if isinstance(value, str) and is_transcript(value):
        return [m["content"] for m in transcript(value) if m["content"]]
    return [str(value)] if str(value).strip() and not isinstance(value, bool | None) else []


def task_name(text):
    """A task as part of a file's name: letters, digits and the marks on them, in any script; what
    is longer or has none is told apart by a hash."""
    name = "_".join("".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " "
                            for c in text.lower()).split())
    told = len(name) <= 40 and (name or not text.strip())
    return name if told else f"{name[:31]}_{hash_text(ascii(text))[:8]}"


def read_pair(row, style):
    if "margin" in row:
        style.notes["rows have a `margin`, in whose place the strength of stage 03 is used"] += 1
    extra = carried(row)
    for names in SCORED:
        a, b = map(row.get, names)
        if all(isinstance(x, (int, float)) for x in (a, b)) and a <= b:
            style.notes[f"rows whose `{names[0]}` is not above their `{names[1]}`"] += 1
    if row.get("status") == "tie":  # distilabel's
        raise Drop("no preference")
    tools = take_tools(row, style)
    if style.form == "none":
        prompt, texts = write_none(row, dict(zip(("chosen", "rejected"), take_sides(row))), style)
    else:
        before, answers, _ = divide(row, style)
        prompt, texts = write(style, before, answers, tools)
    if texts[0].strip() == texts[1].strip():
        raise Drop("identical responses")
    return {"prompt": prompt, "chosen": texts[0], "rejected": texts[1], **extra}


def divide(row, style):
    """Take prompt and responses out of a preference row → (messages or a templated prompt, [chosen,
    rejected] as messages, the two as they came)."""
    came, spoken = take_sides(row), next((k for k in PROMPTS if k in row), None)
    values = without_prompt(row, came, style)
    history, sides, drop = take_history(row, style, all(map(is_dialogue, came))), [], None
    values = parsed_sides(row, values, history)
    for name, value in zip(("chosen", "rejected"), values):
        try:
            sides.append(read_side(value, history, name))
        except Drop as reason:  # the other side must be readable all the same
            drop = drop or reason
    several = [is_texts(v) and len(v) for v in values]
    if drop and (len({n > 1 for n in several}) > 1 or any(n > 1 and n % 2 for n in several)):
        raise Bad("one side has several texts, which are no dialogue with this prompt: a row holds "
                  "one response on each side")
    if drop:
        raise drop
    (before, chosen), (other, rejected) = sides
    if plain(before) != plain(other):
        raise Drop("prompts differ")
    if history is None:
        before = with_columns(row, before, style)
    before, answers = bare(before, [chosen, rejected], style)
    if spoken in PROMPTS[4:] and isinstance(before, list) and before[-1]["role"] == "assistant":
        raise Bad(f"`{spoken}` ends in a turn of the assistant's that neither response repeats or "
                  "goes on with: leave it out, or call what it begins `prompt`")
    return before, answers, came


def as_came(row, style, spoken=False):
    """A preference row that `read_row` reads, under TRL's names and in the layout that it came in:
    whole dialogues as a text each, a prompt's text and two responses', else, or if `spoken`,
    messages; and its tools. Read again it gives what it gave."""
    as_it_is = present(row)
    row = in_one_form(as_it_is, style)
    whole = all(is_blank(row.get(k, "")) for k in (
        *PROMPTS, "input", "info", *SYSTEM, "history"))
    if style.form == "none":
        sides = dict(zip(("chosen", "rejected"), take_sides(row)))
        prompt, texts = write_none(row, sides, style)
        return sides if whole else {"prompt": prompt, **dict(zip(sides, texts))}
    tools, changed = take_tools(row, style), row != as_it_is
    given, raw = (next((r[k] for k in PROMPTS if not is_blank(r.get(k, ""))), None)
                  for r in (row, as_it_is))
    before, answers, came = divide(row, style)
    want, made = write(style, before, answers, tools), []
    if changed and not spoken and not tools:  # marks in words, as they came
        sides = dict(zip(("chosen", "rejected"), take_sides(as_it_is)))
        made = [sides if whole else {"prompt": raw, **sides}]
    if not spoken and not tools and all(isinstance(parsed(v), str) for v in came):
        if isinstance(before, str) or isinstance(given, str) and is_transcript(given):
            prompt, sides = write(style_of("tiny"), before, answers)  # in HH form, or as templated
        else:
            prompt, sides = before[-1]["content"], came
        made += [dict(zip(("chosen", "rejected"), came))] if whole else [
            {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]},
            {"prompt": prompt, **dict(zip(("chosen", "rejected"), (
                a["content"] for a in answers)))}]
    for pair in made:
        with contextlib.suppress(Drop, Bad):
            if [*read_pair(in_one_form(pair, style), style).values()] == [want[0], *want[1]]:
                return pair
    prompt, sides = (before, [[a] for a in answers]) if isinstance(before, list) else want
    return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1],
            **({"tools": tools} if tools else {})}


def carried(row):
    """Take the known columns beside the texts out of the row, checked; `margin` is the mean
    difference where only that is given."""
    out = {k: literal(v) if isinstance(v, str) else v  # CSV has texts only
           for k in (*SCORES, *NUMBERS, LABEL) if (v := row.pop(k, "")) != ""}
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
    tools, spoken = take_tools(row, style), set(PROMPTS[4:]) & row.keys()
    if style.form == "none":
        if not names:
            raise Bad("column `response` is missing")
        prompt, (response,) = write_none(row, {names[0]: row.pop(names[0])}, style)
        return {"prompt": prompt, "response": response}
    value = without_prompt(row, [row.pop(names[0])], style)[0] if names else None
    whole = next((k for k in PROMPTS[4:] if isinstance(parsed(row.get(k)), list)), None)
    history = take_history(row, style, is_dialogue(value)) if names or not whole else with_columns(
        row, messages(parsed(row.pop(whole)), whole), style)  # `prompt` beside is its first turn
    if spoken and isinstance(history, list) and (value is None
                                                 or history[-1]["role"] == "assistant"):
        before, answer = split_last(history)  # `answer` beside it may be a short form
    elif value is not None:
        before, answer = read_side(parsed_sides(row, [value], history)[0], history, names[0])
        before = with_columns(row, before, style) if history is None else before
    else:
        raise Bad("column `response` is missing")
    before, (answer,) = bare(before, [answer], style)
    prompt, (response,) = write(style, before, [answer], tools)
    return {"prompt": prompt, "response": response}


def read_prompt(row, style):
    if set(ARENA) <= row.keys():
        if len(asked := turns_of(row["prompt"])) != 1:
            raise Drop("prompts differ")  # by the answers of two models in between
        row["prompt"] = asked[0]
    if style.form == "none" and "prompt" in row:
        take_tools(row, style)
        return {"prompt": write_none(row, {"response": "-"}, style)[0]}
    names = next((two for two in (*CHOSEN_OF_TWO, *PAIRS) if set(two) <= row.keys()), None)
    tools = take_tools(row, style)
    history = take_history(row, style, names and is_dialogue(row[names[0]]))
    if history is None:
        if names is None:
            raise Bad(f"no column of a prompt ({', '.join(PROMPTS)}) and no pair that holds one")
        history, _ = read_side(parsed([row.pop(name) for name in names][0]), None, names[0])
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
                row = read_row(raw, "pairs" if kind == "gold" else kind, style, task, ignored)
                key = tuple(row.get(k) for k in ("prompt", "chosen", "rejected"))
                if kind != "sft" and key in seen:
                    raise Drop("duplicate prompt" if kind in ("prompts", "eval", "ood")
                               else "duplicate pair")
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
                if not args.skip_bad_rows or isinstance(problem, Misread):
                    common.die(f"{source}:{place}: {problem}" + " (--skip_bad_rows counts such "
                               "rows and goes on)" * (not isinstance(problem, Misread)))
                drops["unreadable"] += 1
            else:
                own = raw.get("id") if isinstance(raw, dict) else None
                own = str(own) if type(own) in (int, str) else ""
                new = own = own or re.sub("[:/ ]", "-", f"{name}-{place}")
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
