"""Odd rows and files from the field, a line each: why, the row, what it must give.

Q, A, B are the question and the two responses that every row holds in some form. What a row gives
is the prompt in HH form, or the reason of a Drop, or a part of the error of a Bad.
"""
import bz2
import gzip
import importlib
import io
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import can_fork, run

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT.parent / "shared/cases"
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
data = importlib.import_module("00_data")
from lab import formats, sources  # noqa: E402

Q, A, B = "Why is the sky blue?", "Light scatters.", "Because."
HH = f"\n\nHuman: {Q}\n\nAssistant:"
AB = {"chosen": A, "rejected": B}
SYSTEM = f"Be kind.{HH}"
TALK = f"\n\nHuman: Hi\n\nAssistant: Hello.{HH}"
TOOL = f"\n\nHuman: Hi\n\nTool: 42{HH}"
CHATML = f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n"
INST = f"<s>[INST] {Q} [/INST]"
LLAMA3 = ("<|start_header_id|>user<|end_header_id|>\n\n" + Q + "<|eot_id|>"
          "<|start_header_id|>assistant<|end_header_id|>\n\n")
POST = "SUBREDDIT: r/sky\n\nTITLE: Blue\n\nPOST: " + Q + "\n\nTL;DR:"


def user(text=Q):
    return {"role": "user", "content": text}


def says(text, role="assistant"):
    return {"role": role, "content": text}


BOTH = {"chosen": [user(), says(A)], "rejected": [user(), says(B)]}
CALL = {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}
TWO = {"response_0": A, "response_1": B}
ARENA = {"prompt": Q, "response_a": B, "response_b": A, "winner_model_a": 0, "winner_model_b": 0,
         "winner_tie": 0}
VICUNA = "A chat between a curious user and an assistant."
ALPACA = "Below is an instruction that describes a task. Write a response."
# (why, row, prompt or error)
ROWS = [
    ("paired Stack Exchange", {"question": Q, "response_j": A, "response_k": B}, HH),
    ("responses by their side", {"question": Q, "response_chosen": A, "response_rejected": B}, HH),
    ("HH, no final mark", {"prompt": f"\n\nHuman: {Q}", **AB}, HH),
    ("HH, one newline", {"prompt": f"\nHuman: {Q}\nAssistant:", **AB}, HH),
    ("HH, no newline before it", {"prompt": f"Human: {Q}\n\nAssistant:", **AB}, HH),
    ("HH, CRLF", {"prompt": HH.replace("\n", "\r\n"), **AB}, HH),
    ("HH, several turns, no final mark", {"prompt": TALK.removesuffix("\n\nAssistant:"), **AB},
     TALK),
    ("HH, text before the first mark", {"prompt": SYSTEM, **AB}, SYSTEM),
    ("HH dialogues beside a plain prompt", {"prompt": Q, "chosen": HH + A, "rejected": HH + B}, HH),
    ("HH dialogues beside another prompt", {"prompt": "X", "chosen": HH + A, "rejected": HH + B},
     "prompts differ"),
    ("HH, one newline in whole dialogues", {"chosen": f"Human: {Q}\nAssistant: {A}",
                                            "rejected": f"Human: {Q}\nAssistant: {B}"}, HH),
    ("HH mark inside a line is text", {"prompt": "Say Human: now", **AB},
     "\n\nHuman: Say Human: now\n\nAssistant:"),
    ("ChatML prompt", {"prompt": CHATML, **AB}, CHATML),
    ("ChatML prompt, not opened", {"prompt": CHATML.removesuffix("<|im_start|>assistant\n"), **AB},
     CHATML),
    ("ChatML dialogues", {"chosen": f"{CHATML}{A}<|im_end|>\n",
                          "rejected": f"{CHATML}{B}<|im_end|>"}, CHATML),
    ("ChatML, prompt repeated", {"prompt": CHATML, "chosen": CHATML + A, "rejected": CHATML + B},
     CHATML),
    ("[INST] prompt", {"prompt": INST, **AB}, INST),
    ("[INST] dialogues", {"chosen": f"{INST} {A} </s>", "rejected": f"{INST} {B} </s>"}, INST),
    ("Llama 3 headers", {"prompt": LLAMA3, **AB}, LLAMA3),
    ("system beside a templated prompt", {"prompt": CHATML, "system": "Be kind.", **AB},
     "`system`"),
    ("prompt repeated in both, HH", {"prompt": HH, "chosen": HH + A, "rejected": HH + B}, HH),
    ("prompt repeated in one only is text", {"prompt": Q, "chosen": f"{Q} {A}", "rejected": B}, HH),
    ("messages, prompt differs by white space", {"prompt": [user(f" {Q}\n")], **BOTH}, HH),
    ("messages, system in prompt only", {"prompt": [says("Be kind.", "system"), user()], **BOTH},
     SYSTEM),
    ("messages beside another prompt", {"prompt": [user("X")], **BOTH}, "prompts differ"),
    ("texts in lists beside a prompt", {"prompt": Q, "chosen": [A], "rejected": [B]}, HH),
    ("several responses on a side", {"prompt": Q, "chosen": A, "rejected": [B, "So."]},
     "one side has several texts"),
    ("several responses on a side, one in a list", {
        "prompt": Q, "chosen": [A], "rejected": [B, "So.", "No."]}, "one side has several texts"),
    ("dialogues with another prompt in lists of texts", {
        "prompt": Q, "chosen": ["Why?", A], "rejected": ["Why?", B]}, "prompts differ"),
    ("an answered prompt beside lists of texts", {
        "messages": [user(), says(A)], "chosen": [Q, A], "rejected": [Q, B]}, HH),
    ("whole dialogues in lists of texts beside a prompt", {
        "prompt": Q, "chosen": ["Hi", "Hello.", Q, A], "rejected": ["Hi", "Hello.", Q, B]}, TALK),
    ("a prompt of texts", {"prompt": ["Hi", "Hello.", Q], **AB}, TALK),
    ("single messages", {"prompt": Q, "chosen": says(A), "rejected": says(B)}, HH),
    ("JSON text of a prompt", {"prompt": json.dumps([user()]), **AB}, HH),
    ("JSON text that is no messages", {"prompt": Q, "chosen": '{"a": 1}', "rejected": "[1]"}, HH),
    ("content in parts", {"prompt": [{"role": "user", "content": [{"type": "text", "text": Q}]}],
                          **AB}, HH),
    ("a part that is no text", {"prompt": [{"role": "user", "content": [{"type": "image"}]}], **AB},
     "not text (image)"),
    ("roles in capitals", {"prompt": [says(Q, "USER")], "chosen": [says(A, "Assistant")],
                           "rejected": [says(B, "ASSISTANT")]}, HH),
    ("a tool's turn", {"prompt": [user("Hi"), says("42", "tool"), user()], **AB}, TOOL),
    ("a role nobody knows", {"prompt": [says(Q, "narrator")], **AB}, "role"),
    ("instruction and input", {"instruction": "Hi", "input": Q, **AB},
     f"\n\nHuman: Hi\n\n{Q}\n\nAssistant:"),
    ("question", {"question": Q, **AB}, HH),
    ("query and history of pairs", {"query": Q, "history": [["Hi", "Hello."]], **AB}, TALK),
    ("history of messages", {"prompt": Q, "history": [user("Hi"), says("Hello.")], **AB}, TALK),
    ("history beside a prompt, a text", {"prompt": Q, "history": "Hi", **AB}, "`history`"),
    ("system that is no text", {"prompt": Q, "system": ["Be kind."], **AB}, "`system`"),
    ("both spellings of a message, one null", {"prompt": [
        {"role": None, "from": "human", "content": None, "value": Q}], **AB}, HH),
    ("history nobody knows", {"prompt": Q, "history": 5, **AB}, "`history`"),
    ("a short input is no copy", {"prompt": Q, "input": "a", **AB},
     f"\n\nHuman: {Q}\n\na\n\nAssistant:"),
    ("system column that stands in the prompt", {"prompt": [says("Be kind.", "system"), user()],
                                                 "system": "Be kind.", **AB}, SYSTEM),
    ("input after a begun answer", {"prompt": [user("Hi"), says("Sure:")], "input": Q, **AB},
     f"\n\nHuman: Hi\n\n{Q}\n\nAssistant: Sure:"),
    ("white space in columns that would belong to the prompt", {
        "prompt": Q, "context": " ", "tools": "\n", **AB}, HH),
    ("context cannot be used", {"prompt": Q, "context": "the sky", **AB}, "`context`"),
    ("tools without a template", {"prompt": Q, "tools": [CALL], **AB}, "`tools`"),
    ("tools inside OpenAI's input", {"input": {"messages": [user()], "tools": [CALL]},
                                     "preferred_output": [says(A)],
                                     "non_preferred_output": [says(B)]}, "`tools`"),
    ("images of a message", {"prompt": [{**user(), "images": ["x.png"]}], **AB}, "`images`"),
    ("responses that are numbers", {"prompt": Q, "chosen": 4, "rejected": 5}, "`chosen` is int"),
    ("no tools", {"prompt": Q, "tools": [], **AB}, HH),
    ("responses that differ in calls", {"prompt": Q, "chosen": [{**says("Look."), **CALL}],
                                        "rejected": [says("Look.")]}, "`tool_calls`"),
    ("responses that differ in reasoning", {
        "prompt": Q, "chosen": [says("Yes.") | {"reasoning_content": "because"}],
        "rejected": [says("Yes.")]}, "`reasoning_content`"),
    ("content null", {"prompt": Q, "chosen": [says(None)], "rejected": [says(B)]}, "`content`"),
    ("ms-swift, messages on both sides", {"messages": [user(), says(A)],
                                          "rejected_messages": [user(), says(B)]}, HH),
    ("PKU-SafeRLHF", {"prompt": Q, "response_0": B, "response_1": A, "better_response_id": 1,
                      "safer_response_id": 0}, HH),
    ("the safer one only", {"prompt": Q, **TWO, "safer_response_id": 0}, HH),
    ("a choice by letter", {"prompt": Q, "response_a": A, "response_b": B, "winner": "model_a"},
     HH),
    ("a choice counted from one", {"prompt": Q, "answer_1": B, "answer_2": A, "choice": 2}, HH),
    ("the Arena's one column a verdict", {**ARENA, "winner_model_b": 1}, HH),
    ("the same in JSON lists", {**{k: json.dumps([v]) for k, v in ARENA.items() if v},
                                "winner_model_a": "0", "winner_model_b": 1.0, "winner_tie": False},
     HH),
    ("the Arena's tie", {**ARENA, "winner_tie": 1}, "no preference"),
    ("the Arena without a verdict", ARENA, "must be 1"),
    ("the Arena, several turns that differ", {
        "prompt": '["Hi", "Why?"]', "response_a": '["Hello.", "So."]',
        "response_b": '["Ha.", null]', "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
     "prompts differ"),
    ("the Arena, more turns than answers", {**ARENA, "prompt": '["Hi", "Why?"]', "winner_tie": 1},
     "as many turns"),
    ("Vicuna's marks", {"prompt": f"USER: {Q} ASSISTANT:", **AB}, HH),
    ("Vicuna's marks and sentence, whole", {
        side: f"{VICUNA} USER: Hi ASSISTANT: Hello.</s>USER: {Q} ASSISTANT: {text}"
        for side, text in AB.items()}, VICUNA + TALK),
    ("Alpaca's marks and sentence", {
        "prompt": f"{ALPACA}\n\n### Instruction:\n{Q}\n\n### Response:", **AB}, ALPACA + HH),
    ("Alpaca's marks, whole", {side: f"### Instruction:\n{Q}\n\n### Response:\n{text}"
                               for side, text in AB.items()}, HH),
    ("Vicuna's dialogues beside a plain prompt", {"prompt": Q, **{
        side: f"USER: {Q} ASSISTANT: {text}" for side, text in AB.items()}}, HH),
    ("Vicuna's prompt, repeated in dialogues that go on", {"prompt": "USER: Hi ASSISTANT:", **{
        side: f"USER: Hi ASSISTANT: Hello. USER: {Q} ASSISTANT: {text}"
        for side, text in AB.items()}}, TALK),
    ("Vicuna's marks, no final one", {"prompt": f"USER: {Q}", **AB}, HH),
    ("a mark quoted inside", {"prompt": "USER: It says USER: root. Why? ASSISTANT:", **AB},
     "\n\nHuman: USER: It says USER: root. Why? ASSISTANT:\n\nAssistant:"),
    ("Guanaco's marks", {side: f"### Human: Hi### Assistant: Hello.### Human: {Q}### Assistant: "
                         + text for side, text in AB.items()}, TALK),
    ("the Arena, native lists", {**ARENA, "prompt": [Q], "response_a": [B], "response_b": [A],
                                 "winner_model_b": True}, HH),
    ("the Arena, a list that is broken", {**ARENA, "prompt": f'["{Q}', "winner_tie": 1},
     "not JSON"),
    ("the Arena, a text in brackets", {**ARENA, "prompt": "[1] " + Q, "winner_model_b": 1},
     HH.replace(Q, "[1] " + Q)),
    ("### Human: and ### Assistant:", {"prompt": f"### Human: {Q}\n### Assistant:", **AB}, HH),
    ("a question about marks", {"prompt": "What does USER: x ASSISTANT: mean?", **AB},
     "\n\nHuman: What does USER: x ASSISTANT: mean?\n\nAssistant:"),
    ("a tie", {"prompt": Q, "response_a": A, "response_b": B, "winner": "tie (bothbad)"},
     "no preference"),
    ("no choice", {"prompt": Q, **TWO}, "no column says"),
    ("a choice nobody knows", {"prompt": Q, **TWO, "choice": 7}, "`choice`"),
    ("SHP, A preferred", {"history": Q, "human_ref_A": A, "human_ref_B": B, "labels": 1}, HH),
    ("SHP, B preferred", {"history": Q, "human_ref_A": B, "human_ref_B": A, "labels": 0}, HH),
    ("UltraFeedback, binarized", {"prompt": Q, **BOTH, "messages": BOTH["chosen"],
                                  "score_chosen": 8.0, "score_rejected": 2.0}, HH),
    ("UltraFeedback, scored", {"instruction": Q, "completions": [
        {"response": B, "overall_score": 2}, {"response": A, "overall_score": 9},
        {"response": "So.", "overall_score": 5}]}, HH),
    ("UltraFeedback, equal scores", {"instruction": Q, "completions": [
        {"response": B, "overall_score": 2}, {"response": A, "overall_score": 2}]},
     "no preference"),
    ("OpenAI's TL;DR", {"info": {"subreddit": "r/sky", "title": "Blue", "post": Q},
                        "summaries": [{"text": B}, {"text": A}], "choice": 1},
     f"\n\nHuman: {POST}\n\nAssistant:"),
    ("OpenAI's news", {"info": {"article": Q}, "summaries": [{"text": A}, {"text": B}],
                       "choice": 0}, f"\n\nHuman: ARTICLE: {Q}\n\nTL;DR:\n\nAssistant:"),
    ("a choice between the two", {"prompt": Q, **TWO, "choice": 0.7}, "`choice`"),
    ("a choice as text of a number", {"prompt": Q, **TWO, "choice": " 0.0"}, HH),
    ("a letter for numbered responses", {"prompt": Q, **TWO, "choice": "A"}, HH),
    ("SHP, a share of votes", {"history": Q, "human_ref_A": A, "human_ref_B": B, "labels": 0.9},
     "`labels`"),
    ("both are bad", {"prompt": Q, **TWO, "winner": "both_bad"}, "no preference"),
    ("chosen names a column", {"prompt": Q, **TWO, "chosen": "response_0",
                               "rejected": "response_1"}, HH),
    ("chosen is a letter beside two responses", {
        "prompt": Q, "response_a": A, "response_b": B, "chosen": "A", "rejected": "B"}, HH),
    ("a score that is NaN", {"instruction": Q, "completions": [
        {"response": "So.", "overall_score": float("nan")}, {"response": B, "overall_score": 2},
        {"response": A, "overall_score": 9}]}, HH),
    ("messages end in the chosen one", {"messages": [user(), says(A)], **AB}, HH),
    ("a plain prompt beside templated dialogues", {"prompt": Q, "chosen": CHATML + A,
                                                   "rejected": CHATML + B}, CHATML),
    ("another prompt beside templated dialogues", {"prompt": "Why is grass green?", "chosen":
                                                   CHATML + A, "rejected": CHATML + B},
     "prompts differ"),
    ("Phi's end of a turn", {"prompt": f"<|user|>\n{Q}<|end|>\n<|assistant|>\n",
                             "chosen": f"{A}<|end|>", "rejected": f"{B}<|end|>"},
     f"<|user|>\n{Q}<|end|>\n<|assistant|>\n"),
    ("DeepSeek's markup", {"prompt": f"<｜begin▁of▁sentence｜><｜User｜>{Q}", **AB},
     f"<｜begin▁of▁sentence｜><｜User｜>{Q}<｜Assistant｜>"),
    ("two ends of a turn", {"prompt": CHATML, "chosen": f"{A}<|im_end|>\n<|endoftext|>",
                            "rejected": f"{B}<|im_end|>\n<|endoftext|>"}, CHATML),
    ("an end of a turn beside a plain prompt", {"prompt": Q, "chosen": f"{A}</s>",
                                                "rejected": f"{B}</s>"}, HH),
    ("an end in one response only is text", {"prompt": Q, "chosen": f"{A}</s>", "rejected": B}, HH),
    ("the opening in the responses", {
        "prompt": Q, "chosen": f"<|im_start|>assistant\n{A}<|im_end|>",
        "rejected": f"<|im_start|>assistant\n{B}<|im_end|>"}, HH),
    ("HH, the mark in the responses", {"prompt": HH.removesuffix("\n\nAssistant:"),
                                       "chosen": f"\n\nAssistant: {A}",
                                       "rejected": f"\n\nAssistant: {B}"}, HH),
    ("ChatML with a beginning", {"prompt": f"{CHATML}Sure:", **AB}, f"{CHATML}Sure:"),
    ("markup in prose", {"prompt": "What does [INST] do?", **AB},
     "\n\nHuman: What does [INST] do?\n\nAssistant:"),
    ("system without a prompt column", {"system": "Be kind.", **BOTH}, SYSTEM),
    ("history without a prompt column", {"history": [["Hi", "Hello."]], **BOTH}, TALK),
    ("another system turn", {"prompt": [says("Be kind.", "system"), user()], "system": "Be brief.",
                             **AB}, "`system`"),
    ("other messages beside a prompt", {"prompt": Q, "messages": [user("What is the capital?")],
                                        **AB}, "`messages`"),
    ("a list of inputs", {"instruction": Q, "input": ["the sea"], **AB}, "`input`"),
    ("an input that is a number", {"instruction": Q, "input": 5, **AB}, "`input`"),
    ("the question inside the prompt", {"prompt": f"Be brief.\n\n{Q}", "question": Q, **AB},
     f"\n\nHuman: Be brief.\n\n{Q}\n\nAssistant:"),
    ("history that the prompt repeats", {"prompt": TALK, "history": [["Hi", "Hello."]], **AB},
     TALK),
    ("history as JSON text", {"query": Q, "history": '[["Hi", "Hello."]]', **AB}, TALK),
    ("history that is empty text", {"prompt": Q, "history": "", **AB}, HH),
    ("a beginning that the sides repeat, text", {
        "prompt": [user(), says("Sure:")], "chosen": f"Sure: {A}", "rejected": f"Sure: {B}"}, HH),
    ("a first word that both share is text", {
        "prompt": "Hello", "chosen": "Hello there", "rejected": "Hello you"},
     "\n\nHuman: Hello\n\nAssistant:"),
    ("Python text of messages", {"prompt": Q, "chosen": str(BOTH["chosen"]),
                                 "rejected": str(BOTH["rejected"])}, HH),
    ("an object of messages as JSON text", {"prompt": json.dumps({"messages": [user()]}), **AB},
     HH),
    ("text of messages that is cut", {"prompt": json.dumps([user()])[:-3], **AB}, "neither JSON"),
    ("a JSON answer with a role is text", {"prompt": Q, "chosen": '{"role": "admin"}',
                                           "rejected": "No."}, HH),
    ("HH, one newline after a preamble", {"prompt": f"Be kind.\nHuman: {Q}\nAssistant:", **AB},
     SYSTEM),
    ("HH, one newline after a preamble, dialogues", {
        "chosen": f"Be kind.\nHuman: {Q}\nAssistant: {A}",
        "rejected": f"Be kind.\nHuman: {Q}\nAssistant: {B}"}, SYSTEM),
    ("HH, both newlines", {"prompt": f"\n\nHuman: {Q}\nAssistant:", **AB}, HH),
    ("HH, CR", {"prompt": HH.replace("\n", "\r"), **AB}, HH),
    ("HH, no first mark", {"prompt": f"{Q}\n\nAssistant:", **AB}, HH),
    ("a templated prompt whose end was stripped", {"prompt": CHATML.strip(), **AB}, CHATML),
    ("the first turn beside whole dialogues", {
        "prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": f"{TALK} {A}",
        "rejected": f"{TALK} {B}"}, TALK),
    ("dialogues that begin with a preamble, beside a prompt", {
        "prompt": Q, "chosen": f"{SYSTEM} {A}", "rejected": f"{SYSTEM} {B}"}, SYSTEM),
    ("User: for Human:", {side: TALK.replace("Human", "User") + text for side, text in AB.items()},
     TALK),
    ("NaN beside a prompt", {"prompt": Q, "system": float("nan"), "input": float("nan"), **AB}, HH),
    ("empty lists from CSV", {"prompt": Q, "history": "[]", "images": "[]", "tools": "null", **AB},
     HH),
    ("info that is no post", {"prompt": Q, "info": {"source": "x"}, **AB}, HH),
    ("a beginning in Chinese that the sides repeat, text", {
        "prompt": [user(), says("好的，")], "chosen": "好的，因为光。", "rejected": "好的，不知道。"}, HH),
    ("an answer in JSON that is no message is text", {
        "prompt": Q, "chosen": '{"from": "a@b.c", "content": "Hi"}', "rejected": '{"from": "x"}'},
     HH),
    ("an answer that is a message, on one side, is text", {
        "prompt": Q, "chosen": '[{"role": "user", "content": "Hi"}]', "rejected": "No."}, HH),
    ("a prompt that begins with JSON", {"prompt": '{"from": "EUR", "value": 3}\nConvert.', **AB},
     '\n\nHuman: {"from": "EUR", "value": 3}\nConvert.\n\nAssistant:'),
    ("a short input that ends the prompt", {"prompt": "Translate: Hallo", "input": "Hallo", **AB},
     "\n\nHuman: Translate: Hallo\n\nAssistant:"),
    ("an input in Chinese inside the prompt", {
        "prompt": "翻译成英语我喜欢吃苹果和香蕉", "input": "我喜欢吃苹果和香蕉", **AB},
     "\n\nHuman: 翻译成英语我喜欢吃苹果和香蕉\n\nAssistant:"),
    ("another answer in the messages", {"prompt": Q, "messages": [user(), says("So.")], **AB}, HH),
    ("a reason that names both is no choice", {
        "prompt": Q, **TWO, "preference": "Response 0, although both are fine"}, "`preference`"),
    ("a choice by a model's name", {"prompt": Q, "response_a": B, "response_b": A, "winner":
                                    "auntie-7b", "model_a": "gpt", "model_b": "auntie-7b"}, HH),
    ("a quoted Assistant: is text of the prompt", {"prompt": "Rate:\n\nAssistant: Hi\n\nPolite?",
                                                   **AB},
     "\n\nHuman: Rate:\n\nAssistant: Hi\n\nPolite?\n\nAssistant:"),
    ("an image part with a text", {"prompt": [{"role": "user", "content": [
        {"type": "image", "text": ""}, {"type": "text", "text": Q}]}], **AB}, "not text (image)"),
    ("a part of a kind that is a number", {"prompt": [{"role": "user", "content": [
        {"type": 5, "text": Q}]}], **AB}, "not text (5)"),
    ("a choice by a name that both models have", {
        "prompt": Q, "response_a": A, "response_b": B, "winner": "gpt", "model_a": "gpt",
        "model_b": "gpt"}, "`winner`"),
    ("history that is blank text", {"query": Q, "history": " \n", **AB}, HH),
    ("lists of one text, from CSV", sources.Cells(
        prompt=str([Q]), chosen=str([A]), rejected=str([B])), HH),
    ("the Arena, Python's lists", {**{k: str([v]) for k, v in ARENA.items() if v},
                                   "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}, HH),
    ("the Arena, a text that begins as a list", {
        **ARENA, "prompt": f"['{Q}", "winner_model_b": 1}, HH.replace(Q, f"['{Q}")),
    ("an empty prompt column beside dialogues", {"prompt": "", **BOTH}, HH),
    ("an empty input beside HH's", {"input": " ", "chosen": HH + A, "rejected": HH + B}, HH),
    ("an empty instruction beside an input", {"instruction": "", "input": Q, **AB}, HH),
    ("an empty prompt", {"prompt": "", **AB}, "empty prompt"),
    ("an empty list beside dialogues", {"prompt": [], **BOTH}, HH),
    ("HH, system text and an opened answer", {"prompt": f"Be kind.{HH} Sure,", **AB},
     f"Be kind.{HH} Sure,"),
    ("a header that is contents", {"Buy a gun, now": Q, "Kill?": A}, "fits the columns (00_data"),
    ("a prompt that quotes a dialogue", {
        "prompt": f"Here is a chat:{HH} Rayleigh.\n\nSum it up.", **AB},
     f"\n\nHuman: Here is a chat:{HH} Rayleigh.\n\nSum it up.\n\nAssistant:"),
    ("a choice of -1", {"prompt": Q, **TWO, "preference": -1}, "`preference` is -1"),
    ("one of two is null", {"prompt": Q, "response_a": A, "response_b": None, "winner": "a"},
     "empty response"),
    ("rejected is null", {"prompt": Q, "chosen": A, "rejected": None}, "empty response"),
    ("both of ms-swift's columns, one null", {
        "messages": [user(), says(A)], "rejected_response": None,
        "rejected_messages": [user(), says(B)]}, HH),
    ("a response that is null", {"prompt": Q, "response": None, "rejected_response": B},
     "empty response"),
    ("Vicuna's dialogues beside prompt and history", {
        "prompt": Q, "history": "[]", **{side: f"USER: {Q} ASSISTANT: {text}"
                                         for side, text in AB.items()}}, HH),
    ("a quoted dialogue at the end", {"prompt": f"Sum this up:{HH} Rayleigh.", **AB},
     f"\n\nHuman: Sum this up:{HH} Rayleigh.\n\nAssistant:"),
    ("ms-swift's is null", {"messages": [user(), says(A)], "rejected_response": None},
     "empty response"),
    ("rejected is a number", {"prompt": Q, "chosen": A, "rejected": 5}, "neither text"),
    ("a form that is not known", {"prompt": Q, "answers": [{"answer": A, "rank": 1}]},
     "no other form fits the columns answers, prompt"),
    ("lists of texts, from CSV", {"chosen": str(["Hi", "Hello.", Q, A]),
                                  "rejected": str(["Hi", "Hello.", Q, B])}, TALK),
    ("two system turns that differ", {"prompt": [says("Be kind.", "system"), user()], "chosen": [
        says("Be rude.", "system"), *BOTH["chosen"]], "rejected": [
        says("Be rude.", "system"), *BOTH["rejected"]]}, "prompts differ"),
    ("messages beside both responses", {"messages": [user()], "response": A,
                                        "rejected_response": B}, HH),
    ("an assistant's turn that is opened only", {"prompt": [user(), says("")], **AB}, HH),
    ("an image", {"prompt": Q, "image": "a.png", **AB}, "`image`"),
    ("a response that begins like a dialogue is text", {
        "prompt": Q, "chosen": " Human: Hi\n\nAssistant: Hello.", "rejected": B}, HH),
    ("OpenAI's TL;DR without a post", {"info": {"title": "Blue", "post": None}, "summaries": [
        {"text": A}, {"text": B}], "choice": 0}, "empty prompt"),
    ("a prompt of two texts", {"prompt": ["Hi", "Hello."], **AB}, "even number"),
    ("a tool's turn with its id", {"prompt": [user("Hi"), {**says("42", "tool"),
                                                           "tool_call_id": "x"}, user()], **AB},
     TOOL),
    ("the last user's turn in the sides only", {
        "prompt": [user("Hi"), says("Hello."), user()], **BOTH}, TALK),
    ("turns that the sides add", {"prompt": "Hi", "chosen": [says("Hello."), *BOTH["chosen"]],
                                  "rejected": [says("Hello."), *BOTH["rejected"]]}, TALK),
    ("Capybara's conversation", {"conversation": [{"input": Q, "output": A}], **BOTH}, HH),
    ("a margin from CSV", {"prompt": Q, **AB, "margin": "0.5", "gold_chosen": ""}, HH),
    ("messages whose role is unknown name their column", {"prompt": Q, "chosen": [says(A, "x")],
                                                          "rejected": B}, "`chosen`: a message"),
    ("no prompt", AB, "column `prompt` is missing"),
    ("no rejected", {"prompt": Q, "chosen": A}, "column `rejected` is missing"),
    ("labels of single responses", {"prompt": Q, "completion": A, "label": True}, "column `label`"),
    ("a response by its column's letter", {"prompt": Q, "response_a": A, "response_b": B,
                                           "chosen": "Response A", "rejected": "Response B"}, HH),
    ("a response by its number", {"prompt": Q, "response_1": B, "response_2": A, "chosen": "2",
                                  "rejected": "1"}, HH),
    ("a response by its model", {"prompt": Q, "response_a": B, "response_b": A, "model_a": "gpt-4",
                                 "model_b": "llama", "chosen": "llama", "rejected": "gpt-4"}, HH),
    ("a name of neither response", {"prompt": Q, "response_a": A, "response_b": B, "chosen": "1",
                                    "rejected": "2"}, "neither the text nor the name"),
    ("a response by its place in a list", {"prompt": Q, "responses": [A, B], "chosen": "0",
                                           "rejected": "1"}, "neither the text nor the name"),
    ("the texts beside the list they are from", {"prompt": Q, "responses": [A, B], **AB}, HH),
    ("a response that begins like a tie, text", {
        "prompt": Q, "response_a": "Both of them do.", "response_b": B,
        "chosen": "Both of them do.", "rejected": B}, HH),
    ("a number that is a response, text", {"prompt": Q, "answer1": "2", "answer2": "1",
                                           "chosen": "1", "rejected": "2"}, HH),
    ("texts that begin like a tie, messages, text", {
        "prompt": Q, "response_a": [says("Both.")], "response_b": [says(B)], "chosen": "Both.",
        "rejected": B}, HH),
    ("short texts beside names of models", {"prompt": Q, "responses": ["gpt", "llama"], **AB}, HH),
    ("the last number of a reasoning, text", {
        "prompt": Q, "responses": ["So it is 5", "So it is 7"], "chosen": "5", "rejected": "7"},
     HH),
    ("chosen counted from one", {"prompt": Q, **TWO, "chosen": 2}, "counted from"),
    ("three summaries", {"info": {"post": Q}, "summaries": [{"text": A}] * 3, "choice": 2},
     "does not say which"),
    ("a begun turn beside the whole dialogue", {
        "prompt": [user(), says("Sure:")], "messages": [user(), says("Sure:"), says(A)], **AB},
     f"{HH} Sure:"),
    ("PandaLM", {"instruction": Q, "input": "", "response1": B, "response2": A, "label": 2}, HH),
    ("JudgeBench", {"question": Q, "response_A": A, "response_B": B, "label": "A>B"}, HH),
    ("counted from one, the columns from zero", {"prompt": Q, **TWO, "choice": 2}, "counted from"),
    ("counted from zero, the columns from one", {"prompt": Q, "response_1": A, "response_2": B,
                                                 "choice": "0"}, "counted from"),
    ("true, of two numbers", {"prompt": Q, **TWO, "label": True}, "does not say which"),
    ("scores of several types", {"prompt": Q, "completions": [
        {"response": A, "overall_score": "9"}, {"response": B, "overall_score": 5}]}, "no number"),
    ("messages that end in a reference answer", {"messages": [user(), says("It is.")], **AB},
     "neither response repeats"),
    ("conversations that end in the chosen answer", {"conversations": [user(), says(A)], **AB}, HH),
    ("distilabel's tie", {"input": Q, **AB, "status": "tie", "rating": [9, 9]}, "no preference"),
    ("HH in one line", {"prompt": f"Human: Hi Assistant: Hello. Human: {Q} Assistant:", **AB},
     TALK),
    ("HH in one line, the prompt in both responses", {
        "prompt": f"Human: {Q} Assistant:", "chosen": f"Human: {Q} Assistant: {A}",
        "rejected": f"Human: {Q} Assistant: {B}"}, HH),
    ("HH in one line, its marks quoted", {"prompt": "Human: Human: Hi\n\nAssistant:", **AB},
     "\n\nHuman: Human: Hi\n\nAssistant:"),
    ("earlier turns in a column of their own", {"prompt": Q, "chat_history": [user()], **AB},
     "`chat_history`"),
    ("the beginning of both responses in a column", {
        "prompt": Q, "initial_reason_steps": "1.", **AB}, "`initial_reason_steps`"),
    ("a system message's column", {"prompt": Q, "system_message": "Be kind.", **AB}, SYSTEM),
    ("JSON text of messages, written twice", {
        "prompt": Q, "chosen": json.dumps(json.dumps([says(A)])),
        "rejected": json.dumps(json.dumps([says(B)]))}, HH),
    ("JSON text of messages in a list in a list", {
        "prompt": Q, "chosen": json.dumps([[says(A)]]), "rejected": json.dumps([[says(B)]])}, HH),
    ("numpy's text of messages", {"prompt": Q, "chosen": f"array([{says('x')}], dtype=object)",
                                  "rejected": B}, "neither JSON nor Python"),
    ("three responses on each side", {"prompt": Q, "chosen": [A, "2", "3"],
                                      "rejected": [B, "5", "6"]}, "several texts"),
    ("numpy's text of texts, which Python would join", sources.Cells({
        "prompt": "['Hi' 'Hello.' 'Why?']", **AB}), "without commas"),
    ("numpy's text of responses", sources.Cells({
        "prompt": Q, "chosen": f"['{A}' 'So.']", "rejected": f"['{B}'\n 'No.']"}),
     "without commas"),
    ("the Arena, numpy's text of turns of which one is none", {
        **ARENA, "prompt": "['Hi' 'Why?']", "response_a": "['Hello.' None]",
        "winner_model_b": 1}, "without commas"),
    ("numpy's text of a history", sources.Cells({
        "query": Q, "history": "[['Hi' 'Hello.']]", **AB}), "without commas"),
    ("messages of a union of structs", {"prompt": [
        user("Hi"), {**says("Hello."), "input": None, "output": None}, user()], **AB}, TALK),
    ("a tool's message with its input", {"prompt": [
        user("Hi"), {**says("42", "tool"), "input": "look", "output": "42"}, user()], **AB}, TOOL),
    ("Python's text of messages, a long one in pieces", {
        "prompt": f"[{{'role': 'user',\n  'content': ('Why is '\n  {Q[7:]!r})}}]", **AB}, HH),
    ("a number beside a message", {"prompt": [{**user(), "value": 0.7}], **AB}, HH),
    ("a chat that the user quotes and asks about", {
        "prompt": f"user: alice\nassistant: bob\n\n{Q}", **AB},
     f"\n\nHuman: user: alice\nassistant: bob\n\n{Q}\n\nAssistant:"),
    ("HH that quotes a line of an AI's", {"prompt": f"\n\nHuman: {Q}\nAI: Hello.", **AB},
     f"\n\nHuman: {Q}\nAI: Hello.\n\nAssistant:"),
    ("[INST] dialogues whose answers end in a mark", {
        "chosen": f"{INST} {A}", "rejected": f"{INST} {B} [/INST]"}, "prompts differ"),
    ("a system beside an input of a message", {"conversation": [
        {"input": Q, "output": None, "system": "Be kind."}], **AB}, "`system` of a message"),
    ("two contents of a message", {"prompt": [{**user(), "value": "Why?"}], **AB}, "differ"),
    ("User and Assistant, one line each, HH's mark quoted", {
        "prompt": f"User: Is 'Human:' one?\nAssistant: Yes.\nUser: {Q}\nAssistant:", **AB},
     TALK.replace("Hi", "Is 'Human:' one?").replace("Hello.", "Yes.")),
    ("OASST's roles, one line each", {
        "prompt": f"prompter: Hi\nassistant: Hello.\nprompter: {Q}", **AB}, TALK),
    ("OASST's roles, a single turn", {"prompt": f"prompter: {Q}", **AB}, HH),
    ("roles in small letters, one line each", {
        "prompt": f"user: Hi\nassistant: Hello.\nuser: {Q}", **AB}, TALK),
    ("Human and AI, one line each", {"prompt": f"Human: Hi\nAI: Hello.\nHuman: {Q}\nAI:", **AB},
     TALK),
    ("User and AI, one line each", {"prompt": f"User: Hi\nAI: Hello.\nUser: {Q}", **AB}, TALK),
    ("HH, a log quoted with small roles", {
        "prompt": f"\n\nHuman: See:\nassistant: hm{HH}", **AB},
     f"\n\nHuman: See:\nassistant: hm{HH}"),
    ("ChatML dialogues that open the next turn", {
        "chosen": f"{CHATML}{A}<|im_end|>\n<|im_start|>assistant\n",
        "rejected": f"{CHATML}{B}<|im_end|>\n<|im_start|>assistant"}, CHATML),
    ("ChatML dialogues, one without an answer", {
        "chosen": f"{CHATML}{A}<|im_end|>\n", "rejected": CHATML}, "empty response"),
    ("responses of the user's", {"prompt": [user()], "chosen": [user()], "rejected": [user()]},
     "no assistant turn"),
    ("dialogues that differ by white space and an empty system turn", {
        "chosen": [says("", "system"), user(f"{Q} "), says(A)], "rejected": [user(), says(B)]}, HH),
    ("a reason that begins like a tie", {**TWO, "prompt": Q, "preference":
                                         "Neither is perfect, but A is better"}, "does not say"),
    ("a model's name that begins like a tie", {**TWO, "prompt": Q, "winner": "tiefighter-13b"},
     "does not say"),
    *((f"a tie in words: {words}", {**TWO, "prompt": Q, "winner": words}, "no preference")
      for words in ("Both are bad.", "tie (inconsistent)", "tie (bothbad)", "neither A nor B",
                    "both_good", "Equally good", "the same", "both" + " bad" * 3)),
    ("a tie, a long one", {**TWO, "prompt": Q, "winner": "both" + ",bad" * 3000 + ",x"}, "not say"),
    ("a document beside its question", {"prompt": Q, "document": "The sky.", **AB}, "`document`"),
    ("a document's name", {"prompt": Q, "document": "sky.txt", "article": 12, **AB}, HH),
    ("a document that the prompt holds", {"prompt": Q, "document": "the sky", **AB}, HH),
    ("paths of images", {"prompt": Q, "image_paths": ["x.png"], **AB}, "`image_paths`"),
    ("the Arena, a prompt that begins with a bracket", {
        **ARENA, "prompt": f"[note] {Q}", "winner_model_b": 1}, HH.replace(Q, f"[note] {Q}")),
]


@pytest.mark.parametrize("why, row, want", ROWS, ids=[why for why, *_ in ROWS])
def test_row(why, row, want):
    style = formats.style_of("tiny")
    try:
        copy = type(row)(json.loads(json.dumps(row)))
        clean = formats.read_row(copy, "pairs", style, "general")
    except (formats.Drop, formats.Bad) as problem:
        assert want in str(problem) and "\n" not in str(problem) and A not in str(problem)
        return
    assert clean["prompt"] == want
    if not why.endswith(("is text", ", text")):  # else a response is not A or B as it stands
        bare = [clean[side].strip() for side in ("chosen", "rejected")]
        assert bare == ([A, B] if "JSON text that" not in why else bare)


@pytest.mark.parametrize("chosen", [
    '["Paris"]', '["Paris", "Rome"]', "### Instruction:\nMix.", "USER: names the user",
    "Human: is a word", "### Instruction:\nMix.\n\n### Response:\nMixed.", "[1, 2]", "{'a': 1}",
    "User: x"])
@pytest.mark.parametrize("asked", [{"prompt": Q}, {"prompt": [user()]},
                                   {"instruction": "", "input": Q}, {"history": Q}])
def test_a_response_is_not_read_as_something_else(chosen, asked):
    """Lists, marks of other templates and messages that an answer shows are its text."""
    style = formats.style_of("tiny")
    clean = formats.read_row({**asked, "chosen": chosen, "rejected": B}, "pairs", style, "general")
    assert (clean["prompt"], clean["chosen"], clean["rejected"]) == (HH, f" {chosen}", f" {B}")
    clean = formats.read_row({**asked, "response": chosen}, "sft", style, "general")
    assert (clean["prompt"], clean["response"]) == (HH, f" {chosen}")


def test_columns_that_are_used_otherwise_than_a_user_may_think_are_told():
    style = formats.style_of("tiny")
    style.notes.clear()
    row = {"prompt": Q, "query": "clouds", **AB, "margin": 2.0, "score_chosen": 2.0,
           "score_rejected": 8.0}
    assert formats.read_row(row, "pairs", style, "x")["prompt"] == HH.replace(Q, f"{Q}\n\nclouds")
    formats.read_row({"prompt": [user(), says("Be rude.", "system")], **AB}, "pairs", style, "x")
    for text in (f"{Q}\nAI:", f"User: {Q}", f"<image> {Q}"):
        formats.read_row({"prompt": text, **AB}, "pairs", style, "x")
    assert sorted(style.notes) == [
        "prompts take in column `query`",
        "rows have a `margin`, in whose place the strength of stage 03 is used",
        "rows hold marks of a turn or a template, kept as text",
        "rows whose `score_chosen` is not above their `score_rejected`",
        "rows whose system turn in the middle goes to the front"]


def test_a_long_run_of_white_space_takes_no_time():
    """Degenerate generations look like this; patterns that begin anywhere in one are quadratic."""
    style, start = formats.style_of("tiny"), time.time()
    for blank in ("\n", " ", "\n "):
        for side in (f"{mark}a{blank * 20_000}b" for mark in ("", "USER: ", "Human: ")):
            for row in ({"prompt": Q, "chosen": side, "rejected": B}, {"prompt": side, **AB}):
                formats.read_row(row, "pairs", style, "general")
    assert time.time() - start < 5


@pytest.mark.parametrize("row, kind, want", [
    ({"messages": [user(), says(A)], "answer": "scatters"}, "sft", [HH, f" {A}"]),
    ({"prompt": Q, "response": f"{Q}\n{A}"}, "sft", [HH, f" {A}"]),
    ({"prompt": "Hi", "prompt_id": "x", "messages": [
        user("Hi"), says("Hello."), user(), says(A)]}, "sft", [TALK, f" {A}"]),
    ({"prompt": HH, "messages": [user(), says(A)]}, "sft", [HH, f" {A}"]),
    ({"prompt": Q, "messages": [user(), says(A)], "chosen": A}, "prompts", [HH]),
    ({**ARENA, "prompt": f'["{Q}"]'}, "prompts", [HH]),
    ({"prompt": "", "chosen": HH + A, "rejected": HH + B}, "prompts", [HH]),
    ({"prompt": "", "chosen": HH + A, "rejected": HH + B}, "sft", [HH, f" {A}"]),
    ({"prompt": f"Be kind.{TALK}"}, "prompts", [f"Be kind.{TALK}"]),
    ({"prompt": f"Be kind.{HH} {A}"}, "prompts", [f"Be kind.{HH}"]),
    ({"conversation_a": BOTH["chosen"], "conversation_b": BOTH["rejected"], "winner": "tie"},
     "prompts", [HH])])
def test_rows_of_other_kinds(row, kind, want):
    clean = formats.read_row(row, kind, formats.style_of("tiny"), "general")
    assert [clean[k] for k in ("prompt", "response") if k in clean] == want


@pytest.mark.parametrize("row, want", [
    ({"prompt": Q, "system": "Be kind.", **AB}, "`system`"),
    ({"prompt": Q, "tools": [CALL], **AB}, "`tools`"),
    ({"prompt": HH, "chosen": HH + A, "rejected": HH + B}, (HH, A, B)),
    ({"prompt": Q, "response_a": A, "response_b": B, "chosen": "A", "rejected": "B"}, (Q, A, B)),
    ({"prompt": Q, "question": Q, **AB}, (Q, A, B))])
def test_rows_as_they_stand(row, want):
    try:
        clean = formats.read_row(row, "pairs", formats.style_of("tiny", "none"), "general")
    except formats.Bad as problem:
        assert want in str(problem)
    else:
        assert (clean["prompt"], clean["chosen"], clean["rejected"]) == want


def test_links_are_read_as_what_they_stand_for(tmp_path):
    """A hub's cache has files without an ending behind links; a folder may hold linked ones."""
    (tmp_path / "blobs").mkdir(), (tmp_path / "snapshot/data").mkdir(parents=True)
    (tmp_path / "blobs/abc").write_text(LINES)
    (tmp_path / "snapshot/data/train.jsonl").symlink_to("../../blobs/abc")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/sub").symlink_to("../snapshot/data")
    for name in ("a", "b"):  # circles: each file is read once
        (tmp_path / "linked" / name).symlink_to("..")
    (tmp_path / "named").mkdir()
    for name in ("old", "x.jsonl", "y.jsonl"):  # the first that can be read
        (tmp_path / "named" / name).symlink_to("../blobs/abc")
    for source in ("snapshot/*/*.jsonl", "snapshot", "linked", "named", "named/*.jsonl",
                   "linked/sub/../*/*.jsonl", ""):
        found = sources.parts(str(tmp_path / source))
        assert len(found) == 1 and found[0].endswith(".jsonl"), source
        assert sources.files(str(tmp_path / source)) == [str(tmp_path / "blobs/abc")]
        sources.check([str(tmp_path / source)])
    assert common.user_files("owner/name") == []  # a hub id is no file of the user's


PAIRS = [{"prompt": f"{Q} {i}", "chosen": f"{A} é", "rejected": B} for i in range(6)]
LINES = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in PAIRS)
CSV = "prompt,chosen,rejected\n" + "".join(f'"{p["prompt"]}","{p["chosen"]}",{B}\n' for p in PAIRS)


def parquet(table, **columns):
    import pyarrow
    import pyarrow.parquet
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table, **columns), sink)
    return sink.getvalue().to_pybytes()


# (why, {file: bytes}, source below the folder)
FILES = [
    ("CR ends lines", {"x.jsonl": LINES.replace("\n", "\r").encode()}, "x.jsonl"),
    ("CRLF ends lines", {"x.jsonl": LINES.replace("\n", "\r\n").encode()}, "x.jsonl"),
    ("a mark of UTF-8", {"x.jsonl": b"\xef\xbb\xbf" + LINES.encode()}, "x.jsonl"),
    ("UTF-16 by its mark", {"x.jsonl": LINES.encode("utf-16")}, "x.jsonl"),
    ("U+2028 inside a text ends no line", {"x.jsonl": LINES.replace("sky", "\u2028sky").encode()},
     "x.jsonl"),
    ("an array over many lines", {"x.json": json.dumps(PAIRS, indent=2).encode()}, "x.json"),
    ("an object that holds the rows", {"x.json": json.dumps({"version": 1, "data": PAIRS},
                                                            indent=1).encode()}, "x.json"),
    ("CSV", {"X.CSV": CSV.encode()}, "X.CSV"),
    ("CSV with semicolons", {"x.csv": CSV.replace(",", ";").encode("utf-8-sig")}, "x.csv"),
    ("packed JSON", {"x.json.gz": gzip.compress(json.dumps(PAIRS).encode())}, "x.json.gz"),
    ("a folder of files", {"d/a.jsonl": LINES[:LINES.index("\n") + 1].encode(), "d/notes.txt": b"x",
                           "d/b/c.csv": CSV.replace(f"{Q} 0", f"{Q} 0").encode()}, "d"),
    ("a hub's folder", {"d/a.jsonl": LINES.encode(), "d/dataset_infos.json": b"{}"}, "d"),
    ("a glob", {"d/a.jsonl": LINES.encode(), "d/b.csv": b"no"}, "d/*.jsonl"),
    ("an object that holds the rows, on one line", {
        "x.json": json.dumps({"version": 1, "data": PAIRS}).encode()}, "x.json"),
    ("an object that holds rows of a query", {"x.json": json.dumps({"data": [
        {"query": p["prompt"], "response": p["chosen"], "rejected_response": B} for p in PAIRS
    ]}).encode()}, "x.json"),
    ("rows that hold lists of objects", {"x.jsonl": "".join(json.dumps({
        "instruction": p["prompt"], "completions": [
            {"response": B, "overall_score": 2},
            {"response": p["chosen"], "overall_score": 9}]}) + "\n" for p in PAIRS).encode()},
     "x.jsonl"),
    ("a glob that finds a folder", {"d/e/a.jsonl": LINES.encode()}, "d/*"),
    ("CSV, spaces in its header", {"x.csv": CSV.replace(",", " ,", 2).encode()}, "x.csv"),
    ("CSV, spaces after its commas", {"x.csv": CSV.replace(",", ", ").replace(
        f", {B}", f', "{B}"').encode()}, "x.csv"),
    ("two CSV files one after another", {
        "x.csv": CSV.encode() + b"\xef\xbb\xbfprompt,chosen,rejected\n"}, "x.csv"),
    ("a key twice in what nobody uses", {"x.jsonl": LINES.replace(
        "}", ', "meta": {"k": 1, "k": 2}}').encode()}, "x.jsonl"),
    ("columns of one name that nobody uses, the header twice", {"x.csv": CSV.replace(
        "rejected\n", "rejected,note,note\n").replace(f"{B}\n", f"{B},1,2\n").encode()
        + b"prompt,chosen,rejected,note,note\n"}, "x.csv"),
    ("Parquet, bytes that nobody uses", {"x.parquet": parquet([
        {**p, "embedding": b"\xff"} for p in PAIRS])}, "x.parquet"),
    ("Parquet, bytes in messages", {"x.parquet": parquet([
        {"prompt": [{"role": b"user", "content": p["prompt"].encode()}],
         "chosen": p["chosen"].encode(), "rejected": B.encode()} for p in PAIRS])}, "x.parquet"),
    ("Parquet with bytes", {"x.parquet": parquet([{k: v.encode() for k, v in p.items()}
                                                  for p in PAIRS])}, "x.parquet"),
]


@pytest.mark.parametrize("line, want", [
    ('"Why?" she asked\tA\tB', '"Why?" she asked'), ('"Why?\tA\tB', '"Why?'),
    ('"Why?"\tA\tB', "Why?"), ('"Why ""now""?"\tA\tB', 'Why "now"?'), ('Why "now"?\tA\tB',
                                                                   'Why "now"?'),
    ('"Why\nnow?"\tA\tB', "Why\nnow?")])
def test_quotes_in_tab_separated_text(line, want):
    """They are text where some cell is not one in quotes; no row swallows the next."""
    lines = f"prompt\tchosen\trejected\n{line}\nQ\tA\tB\n"
    rows = [row for _, row in sources.csv_rows(io.StringIO(lines))]
    assert [row["prompt"] for row in rows] == [want, "Q"]
    assert all((row["chosen"], row["rejected"]) == ("A", "B") for row in rows)


@pytest.mark.parametrize("lines", [
    '"Why?\tA\tB\n"Q"\tA\tB\nR\tA\tB\n', '"R"\tA\tB\n"Why?\tA\tB\nQ\tA"\tB\n"R"\t"A"\tB\n',
    '"Why \\"now\\"?"\t"A"\tB\nR\tA\tB\n', '"Why?\tA\tB\nQ\tA\nZ"\tA\tB\nR\tA\tB\n'])
def test_a_stray_quote_beside_quoted_cells_is_an_error_not_a_swallowed_row(lines):
    rows = [row for _, row in sources.csv_rows(io.StringIO(f"prompt\tchosen\trejected\n{lines}"))]
    bad = [row for row in rows if isinstance(row, formats.Bad)]
    assert bad and "quote" in str(bad[0]) or "CSV" in str(bad[0])
    assert {"prompt": "R", "chosen": "A", "rejected": "B"} in rows


@pytest.mark.parametrize("why, files, source", FILES, ids=[why for why, *_ in FILES])
def test_container(why, files, source, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    data.main(["--preferences", str(tmp_path / source), "--out", str(tmp_path / "out")])
    rows = [json.loads(line) for split in ("train", "valid") for line in
            open(tmp_path / f"out/00_data/{split}.jsonl", encoding="utf-8")]
    assert sorted(r["prompt"].replace("\u2028", "") for r in rows) == sorted(
        f"\n\nHuman: {p['prompt']}\n\nAssistant:" for p in PAIRS)
    assert {(r["chosen"], r["rejected"]) for r in rows} == {(f" {A} é", f" {B}")}


def test_a_damaged_array_names_its_line_and_loses_one_row(tmp_path):
    """Where rows stand on a line each; where they do not the fault's line is all that is known."""
    path, rows = tmp_path / "x.json", ",\n".join(map(json.dumps, PAIRS))
    for text in (f"[\n{rows}\n]", f"[{rows}]"):
        lines = text.split("\n")
        lines[3] = lines[3][:-3] + ","
        path.write_text("\n".join(lines))
        found = dict(sources.file_rows(path))
        assert [n for n, row in found.items() if isinstance(row, sources.Bad)] == [4]
        assert len(found) == 6
    path.write_text(json.dumps(PAIRS, indent=1).replace('"rejected"', "rejected", 1))
    (n, problem), = sources.file_rows(path)
    assert n == 5 and isinstance(problem, sources.Bad)
    path.write_text('[\n"a",\n"b,\n"c"\n]')  # prompts
    found = dict(sources.file_rows(path))
    assert (found[2], found[4]) == ("a", "c") and isinstance(found[3], sources.Bad)
    path.write_text(json.dumps([{"turns": ["a", "b"], "scores": [0.5] * 9}], indent=1)[:-4])
    (n, problem), = sources.file_rows(path)
    assert isinstance(problem, sources.Bad) and n > 10


def test_files_of_a_folder_have_its_tasks_and_ids(tmp_path):
    for task in ("harmless-base", "helpful-base"):
        (tmp_path / "hh" / task).mkdir(parents=True)
        (tmp_path / "hh" / task / "train.1.jsonl").write_text("".join(json.dumps(
            {**p, "prompt": task + p["prompt"]}) + "\n" for p in PAIRS))
    data.main(["--preferences", str(tmp_path / "hh"), "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/run.json").read_text())["tasks"] == ["harmless", "helpful"]
    ids = [json.loads(x)["id"] for s in ("train", "valid") for x in open(
        tmp_path / f"out/00_data/{s}.jsonl", encoding="utf-8")]
    assert sorted(ids) == sorted([f"train.1-{i}" for i in range(1, 7)] + [
        f"train.1-{i}-2" for i in range(1, 7)])


@pytest.mark.parametrize("name, content", [
    ("x.jsonl", b"\xff{}\n"), ("x.jsonl.bz2", bz2.compress(LINES.encode())),
    ("x.jsonl.zst", b"no"), ("x.parquet.gz", b"no"), ("x.csv", b"prompt,chosen\n1,2,3\n"),
    ("x/x.jsonl.bz2", bz2.compress(LINES.encode())),
    ("x.csv", CSV.encode() + b"Q2,A2\n"),
    ("x.csv", CSV.encode() + b'"no end,b,c\n'), ("x.csv", CSV.encode() + b'"a"b,c,d\n'),
    ("x.csv", b""), ("x.csv", CSV.split("\n")[0].encode()), ("x.json", b"[]"),
    ("x.csv", CSV.encode("cp1252")), ("x.jsonl", LINES.encode("cp1252"))])
def test_a_container_that_cannot_be_read_is_one_line(name, content, tmp_path, capsys):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        common.launch(lambda: data.main(["--preferences", str(tmp_path / name.split("/")[0]),
                                         "--out", str(tmp_path / "out")]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and name in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_datasets_saved_is_read_as_one(tmp_path, capsys):
    import datasets
    datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS)}).save_to_disk(
        tmp_path / "all" / "saved")
    for source in ("all/saved", "all/saved/train"):
        source = str(tmp_path / source)
        sources.check([source])
        rows = [row for part in sources.parts(source)
                for _, row in sources.raw_rows(part, "pairs", None)]
        assert [row["prompt"] for row in rows] == [p["prompt"] for p in PAIRS]
    with pytest.raises(SystemExit):
        sources.check([str(tmp_path / "all")])
    assert "all/saved was written by save_to_disk" in capsys.readouterr().err


@pytest.mark.parametrize("name, content", [
    ("x.csv", b"prompt,rejected,chosen,rejected\nQ,A,B,C\n"),
    ("x.jsonl", "".join(json.dumps({"prompt": f"{Q} {i}", **TWO, "choice": i}) + "\n"
                        for i in (1, 1, 2)).encode())])
def test_what_makes_other_rows_doubtful_cannot_be_skipped(name, content, tmp_path, capsys):
    """Columns of one name; a choice that counts from another number than the columns do."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit):
        data.main(["--preferences", str(tmp_path / name), "--out", str(tmp_path / "out"),
                   "--skip_bad_rows"])
    error = capsys.readouterr().err
    assert name in error and "--skip_bad_rows" not in error
    assert "called `" in error or "counted from another number" in error


def test_tasks_of_any_script_are_told_apart(tmp_path):
    names = ["Some Task/x", "帮助", "हानि", "हानी", "ดี", "ดู", "🙂", "🙃"]
    names += ["a" * 50 + "b", "a" * 50 + "c"]
    found = [formats.task_name(name) for name in names]
    assert len(set(found)) == len(names) and found[:2] == ["some_task_x", "帮助"]
    assert all(name and "/" not in name and len(name) <= 40 for name in found)
    assert formats.task_name(" ") == ""


def test_keys_of_messages_that_nobody_knows_are_named():
    ignored = formats.Counter()
    row = {"prompt": [{**user(), "weight": 1, "id": None}], **AB, "mood": "good"}
    formats.read_row(row, "pairs", formats.style_of("tiny"), "general", ignored)
    assert set(ignored) == {"weight of a message", "mood"}


def test_what_is_kept_all_the_same_is_counted(tmp_path):
    """Pairs both ways, prompts repeated in the responses, columns that nobody uses: in the manifest
    too."""
    rows = [{"prompt": f"{Q} {i}", "chosen": f"{Q} {i}\n{A}", "rejected": f"{Q} {i}\n{B}",
             "mood": "good"} for i in range(4)]
    rows += [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows[:3]]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data.main(["--preferences", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "out")])
    made = json.loads((tmp_path / "out/00_data/manifest.json").read_text())["metrics"]
    assert made["kept"] == 7 and made["drops"] == {} and made["unused"] == ["mood"]
    assert made["notes"] == {"pairs contradict another one, both are kept": 3,
                             "prompts repeated in every response, taken out there": 7}


@pytest.mark.skipif(not CASES.exists(), reason="the shared cases lie outside the project")
def test_the_shared_cases_hold(monkeypatch, capsys):
    """check.py, whose commands are forks of tests/warm.py."""
    def forked(command, **_):
        done = run(*command, check=False)
        return subprocess.CompletedProcess(command, done.returncode, done.stdout, "")
    if can_fork():  # else `run` asks subprocess itself
        monkeypatch.setattr(subprocess, "run", forked)
    monkeypatch.setattr(sys, "argv", ["check.py", str(CASES)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(CASES / "check.py", run_name="__main__")
    assert not stop.value.code, capsys.readouterr().out
