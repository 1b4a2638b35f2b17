"""How dialogues become text: by the chat template of --model, in HH form, or as they stand; and HH
texts and texts in a template's markup, read back."""
import functools
import re
from collections import Counter
from datetime import date
from types import SimpleNamespace

import common
from lab.sources import Bad, Drop

ROLES = {name: role for role, names in {
    "user": "user human prompter", "system": "system developer",
    "assistant": "assistant gpt model bot ai chatgpt", "tool": "tool function ipython observation",
}.items() for name in names.split()}
NAMES = {"user": "Human", "assistant": "Assistant", "tool": "Tool"}  # in HH form
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
# texts in a chat template's markup: {what opens the assistant's turn: what opens another}
MARKUPS = {opening: re.compile(other) for opening, other in (
    ("<|im_start|>assistant\n", r"<\|im_start\|>(?!assistant)\w+\n"),
    ("<|im_start|>assistant<|im_sep|>", r"<\|im_start\|>(?!assistant)\w+<\|im_sep\|>"),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n",
     r"<\|start_header_id\|>(?!assistant)\w+<\|end_header_id\|>"),
    ("<|header_start|>assistant<|header_end|>\n\n",
     r"<\|header_start\|>(?!assistant)\w+<\|header_end\|>"),
    ("<start_of_turn>model\n", r"<start_of_turn>(?!model)\w+\n"),
    ("<|assistant|>\n", r"<\|(user|system)\|>\s"),
    ("<｜Assistant｜>", r"<｜User｜>"),
    ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
     r"<\|START_OF_TURN_TOKEN\|><\|(USER|SYSTEM)_TOKEN\|>"),
    ("[/INST]", r"\[INST\]"))}
BEGIN = re.compile(r"\s*(<[^<>\s]+>|\[gMASK\]<sop>)?\s*")  # BOS, in any spelling
ENDS = re.compile(
    r"(?<!\s)(\s*(<\|(im_end|eot_id|eot|end|return|endoftext|end_of_text|END_OF_TURN_TOKEN)\|>"
    r"|<end_of_turn>|</s>|<eos>|<｜end▁of▁sentence｜>))+\s*\Z")
# other marks, also of what is no text, which are kept as text
SPECIAL = re.compile(r"<[|｜]\w+[|｜]>|</s>|<end_of_turn>|<extra_id_\d>|\[/?(INST|SYSTEM_PROMPT)\]"
                     r"|^### (Human|Instruction|Assistant|Response|Input)|^(USER|User|user):"
                     r"|<(image|video|audio)>|(Human|Assistant)：|\n\nHuman:"
                     r"|\n(A|AI|Bot|assistant|ASSISTANT|<bot>):\s*\Z", re.MULTILINE)
# marks that are words: (how a text with them begins, a mark), of Vicuna, of Alpaca and Guanaco,
# HH's own in one line (DeepSpeed-Chat), and others of one line each (OASST, LangChain)
WORDED = [(re.compile(begin, re.DOTALL), re.compile(mark)) for begin, mark in (
    (r"\s*(A chat between .*?)?USER:", r"(?:\A\s*|(?<!\s)\s+|</s>\s*)(USER|ASSISTANT):"),
    (r"\s*(Below is an instruction.*?)?### (Instruction|Human):",
     r"(?<!\s)\s*### (Instruction|Human|Response|Assistant):"),
    (r"\s*Human:(?!.*\n *(Human|Assistant):).*\sAssistant:\s*\Z",
     r"(?:\A\s*|(?<!\s)\s+)(Human|Assistant):"),
    (r"(Human:(?!.*\n *Assistant:)(?=.*\n *(AI|Bot|bot|assistant):)|\s*prompter:"
     r"|\s*(human|User|user):(?=.*\n *(AI|Bot|bot|[Aa]ssistant):))",
     r"(?:\A\s*|\n *)([Hh]uman|[Uu]ser|prompter|AI|[Bb]ot|[Aa]ssistant):"))]
UNSPACED = "\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef"  # Chinese and Japanese
CALLS = ("tool_calls", "function_call")
DAY = date(2024, 7, 26)  # what a chat template that writes the date is told


@functools.cache
def style_of(model, template="auto"):
    """How dialogues become text: by the chat template of --model (`auto`, where it has one), in HH
    form (`hh`), or strings as they are (`none`). → `form` (chat, hh, none), the tokenizer of chat,
    `end` (what the template writes after a response), `lead` (what a response begins with), `asks`
    and `opened` (what it opens a dialogue with, and a whole prompt), `day` (what a template that
    asks for the date is told)."""
    style = SimpleNamespace(form="none" if template == "none" else "hh", tokenizer=None, end="",
                            lead="" if template == "none" else " ", day=None, notes=Counter(),
                            opened="", asks="")
    if model == "tiny" or template != "auto":
        return style
    try:
        tokenizer = common.load_tokenizer(model)
    except Exception as error:
        common.die(f"cannot load the tokenizer of --model {model}: {common.first_line(error)}")
    if not tokenizer.chat_template:
        return style
    style.form, style.tokenizer = "chat", tokenizer
    tokenizer.chat_template, dated = re.subn(  # or the data would depend on the day
        r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda m: repr(DAY.strftime(m[2])),
        tokenizer.get_chat_template())
    style.day = DAY.isoformat() if dated else None
    question, answer = {"role": "user", "content": "Who?"}, "An unlikely answer 4711."
    try:
        whole = apply_template(style, [question, {"role": "assistant", "content": answer}])
        if answer not in whole:  # as those of some models of images, which take parts only
            raise Bad("it does not write an answer that is a text")
        style.end = whole.split(answer)[1]
        style.opened, (lead,) = render(
            style, [question], [{"role": "assistant", "content": answer}])
        asks = style.opened.partition(question["content"])[0]
        style.asks = asks.removeprefix(tokenizer.bos_token or "").strip()
        style.lead = lead.removesuffix(answer) if lead.strip() == answer else ""
    except Bad as problem:
        common.die(f"the chat template of --model {model} cannot be used: {problem}; "
                   "--template hh writes dialogues in HH form")
    return style


def apply_template(style, history, tools=None, generate=False):
    try:
        return style.tokenizer.apply_chat_template(
            history, tools=tools, tokenize=False, add_generation_prompt=generate)
    except Exception as error:  # templates raise what they like
        reason = common.first_line(error)[:80]
        raise Bad(f"the chat template refuses the messages ({reason})") from None


def render(style, history, answers, tools=None):
    """(prompt, [response, ...]) of messages and of the assistant's messages that may follow them.
    By a chat template a response is what it writes for the whole dialogue, without what it writes
    for the prompt and after every response."""
    if not any(m["content"].strip() or set(CALLS) & m.keys() for m in history
               if m["role"] != "system"):
        raise Drop("empty prompt")
    prefill = history[-1]["content"] if history[-1]["role"] == "assistant" else ""
    begun = prefill.rstrip() if history[-1]["role"] == "assistant" else None
    if not style.tokenizer:
        return render_hh(history, begun), [a["content"].strip() for a in answers]
    if begun is None:
        prompt = apply_template(style, history, tools, generate=True)
        wholes = [apply_template(style, [*history, a], tools) for a in answers]
    else:  # the response goes on with an assistant's turn
        joint = re.compile(rf"(?=[\w.:,;!?])[^{UNSPACED}][^\s{UNSPACED}]")  # words, not code
        rest = [{**a, "content": prefill + " " * bool(joint.match(
            prefill[-1:] + a["content"][:1])) + a["content"]} for a in answers]
        wholes = [apply_template(style, [*history[:-1], a], tools) for a in rest]
        prompt = apply_template(style, history, tools)
        prompt = prompt[:prompt.rindex(begun) + len(begun)] if begun in prompt else prompt
    think = re.search(r"<think>\s*\Z", prompt)
    if think and not all(w.startswith(prompt) for w in wholes):
        prompt = prompt[:think.start()]  # opened for a generation, not written in a whole dialogue
        style.notes["prompts end before <think>, which the chat template opens"] += 1
    for whole in wholes:
        if not whole.startswith(prompt) or not whole.endswith(style.end):
            raise Bad("the chat template writes the prompt in another way once a response follows")
    return prompt, [w[len(prompt):len(w) - len(style.end)] for w in wholes]


def render_hh(history, begun=None):
    """Messages in HH form, system text going first; `begun`: the response goes on with the last."""
    prompt = "\n\n".join(m["content"].strip() for m in history if m["role"] == "system")
    for m in history:
        if m["role"] != "system":
            prompt += f"\n\n{NAMES[m['role']]}: {m['content'].strip()}".rstrip(" ")
    return prompt if begun else prompt + ASSISTANT


def reworded(text):
    """HH's marks for those of WORDED, in a text that begins with them or with the sentence
    that goes before and whose turns alternate; any other as it is."""
    for begin, mark in WORDED:
        if begin.match(text):
            first, *turns = mark.split(text)
            marks = [HUMAN if ROLES.get(role.lower(), "user") == "user" and role != "Response"
                     else ASSISTANT for role in turns[::2]]
            if all(m == (HUMAN, ASSISTANT)[i % 2] for i, m in enumerate(marks)):
                return first.strip() + "".join(f"{m} {content.strip()}".rstrip()
                                               for m, content in zip(marks, turns[1::2]))
    return text


def one_form(text):
    """A text with its newlines as one, and "Human:" for "User:" where only that is there."""
    text = re.sub("\r\n?", "\n", text)
    if re.match(r"\s*User:", text) and "\nAssistant:" in text and "\nHuman:" not in text:
        text = re.sub(r"(\A\s*|\n)User:", r"\1Human:", text)
    return text


def transcript(text):
    """A text with HH marks, in any form of them, → messages."""
    text = one_form(text)
    wide = ASSISTANT in text or HUMAN in text.lstrip() and "\nAssistant:" not in text
    line = "\n\n" if wide else "\n"
    first, *turns = re.split(rf"(?:\A\s*|{line})(Human|Assistant):", text)
    role = "system" if "Human" in turns[::2] else "user"
    before = [{"role": role, "content": first.strip()}] if first.strip() else []
    return before + [{"role": ROLES[role.lower()], "content": content.strip()}
                     for role, content in zip(turns[::2], turns[1::2])]


def is_transcript(text):
    text = one_form(text)
    return (bool(re.match(r"\s*(Human|Assistant):", text)) or HUMAN in text
            or text.rstrip().endswith(ASSISTANT)  # quoted in the middle it is text
            or bool(re.search(r"\nHuman:.*\nAssistant:\s*\Z", text, re.DOTALL)))


def markup(text):
    """What opens the assistant's turn in a text that begins with a chat template's markup, else
    None."""
    start = BEGIN.match(text).end(), len(text) - len(text.lstrip())
    return next((opening for opening, other in MARKUPS.items()
                 if any(other.match(text, at) for at in start)), None)


def open_turn(text, opening):
    """A prompt in a template's markup with the assistant's turn opened, where it is not yet: it may
    have begun with words of the response."""
    mark = opening.rstrip()
    last = max((m.start() for m in MARKUPS[opening].finditer(text)), default=-1)
    if text.rstrip().endswith(mark):
        return text.rstrip() + opening[len(mark):]
    if text.rfind(mark) > last and not ENDS.search(text):
        return text
    return text.rstrip("\n") + ("\n" if opening[-1] == "\n" else " " * (mark[0] == "[")) + opening


def split_markup(text):
    """A whole dialogue in a template's markup → (prompt, the assistant's message)."""
    opening = markup(text)
    opens = opening.rstrip("\n")
    bare = text.rstrip().removesuffix(opens)
    if opens in bare and opens != "[/INST]" and \
            not MARKUPS[opening].search(bare, bare.rindex(opens)):
        text = bare  # it opened the next turn behind the response
    head, mark, response = text.rpartition(opens)
    if not mark or MARKUPS[opening].search(response):
        raise Drop("no assistant turn")
    return head + opening, {"role": "assistant", "content": response}
