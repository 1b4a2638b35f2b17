"""Stage 00: every source of preferences, SFT examples and prompts into one form (appendix B.1).

Every messy format is known to lab/formats.py, which drops and counts what cannot be used; later
stages read what is written here:

    train.jsonl valid.jsonl  {"id", "prompt", "chosen", "rejected", "task"} and, where known, the
                             columns that formats.py carries (scores, labels, gold)
    gold.jsonl               such pairs labelled by the truth (embedded world only)
    sft.jsonl                {"id", "prompt", "response"}
    prompts.jsonl            {"id", "prompt", "task"}: PPO's, each prompt once
    eval_TASK.jsonl ood_TASK.jsonl   {"id", "prompt", "task"}: prompts for stage 08, of every task,
                             or of all as one (general) where there are more than 30

Texts are as the model reads them. Where --model has a chat template, prompt + response + the `end`
of run.json is what the template writes for the whole dialogue (a template that asks for the date is
told `day`); else a prompt ends in "\\n\\nAssistant:" and a response is " text", one leading space,
without the white space around it, and EOS follows. run.json is written last, by this stage only.

Departures from the paper: (1) the 10 % for validation are whole prompts, so none is on both sides,
and prompts with judge labels go there first; (2) SFT and PPO take the training split's chosen
responses and prompts unless --sft and --prompts are given; (3) one SFT example per conversation,
its last turn; (4) evaluation prompts are the validation split's, where B.4 has red-team prompts for
harmlessness, and out of distribution there are those of --ood_prompts only (B.1: Oasst1, PKU).

    python 00_data.py                                                    # the embedded world
    python 00_data.py --preset paper                                     # Llama-2-7B on HH-RLHF
    python 00_data.py --preferences my_helpful.jsonl my_harmless.parquet --sft my_sft.jsonl.gz
"""
import os
import random
import sys
from collections import Counter
from pathlib import Path

import common
from lab import base_model, formats, sources
from lab.formats import LABEL
from lab.sources import TOY

MOST_TASKS = 30  # that have an evaluation set each, which every policy answers
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")  # of a base model; 01 reads them
HPARAMS = {
    # name: (paper, small, toy, help)
    "n_pairs": (0, 0, 5000, "preference pairs made by the embedded world; 0 where it is unused"),
    "n_gold": (0, 0, 2000, "pairs labelled by its truth, to measure with only"),
    "n_sft": (0, 0, 8000, "SFT examples made by the embedded world"),
    "n_prompts": (0, 0, 1000, "PPO prompts made by the embedded world, before equal ones are "
                  "dropped"),
    "n_eval": (100, 100, 400, "prompts per evaluation set"),
    "valid_fraction": (0.1, 0.1, 0.1, "share of the pairs held out for validation, by prompt"),
    "max_prompt_tokens": (1024, 512, 80, "later stages cut prompts to this, on the left"),
    "max_response_tokens": (512, 256, 48, "later stages cut responses to this, EOS included"),
}


def split_by_prompt(rows, fraction, seed):
    """(train, valid): whole prompts drawn until `fraction` of the rows is reached, judge-labelled
    ones first."""
    count = Counter(row["prompt"] for row in rows)
    labelled = {row["prompt"] for row in rows if row.get(LABEL) in (0, 1)}
    order, valid, n = list(count), set(), 0
    random.Random(seed).shuffle(order)
    for prompt in sorted(order, key=lambda p: p not in labelled)[:-1]:  # train keeps one
        if not valid or n < fraction * len(rows):
            valid.add(prompt)
            n += count[prompt]
    return [r for r in rows if r["prompt"] not in valid], [r for r in rows if r["prompt"] in valid]


def unique_prompts(rows):
    first = {row["prompt"]: row for row in reversed(rows)}
    return [{k: row[k] for k in ("id", "prompt", "task")} for row in rows
            if first[row["prompt"]] is row]


def add_flags(flag):
    flag("--model", help="base model: tiny (made by 01), a hub id or a path (default: tiny; paper "
         "meta-llama/Llama-2-7b-hf, small HuggingFaceTB/SmolLM2-135M-Instruct)")
    flag("--preferences", nargs="+", metavar="SOURCE",
         help="preference pairs (default: toy; paper Anthropic/hh-rlhf)")
    flag("--sft", nargs="+", metavar="SOURCE",
         help="SFT examples (default: the chosen responses; toy: its own)")
    flag("--prompts", nargs="+", metavar="SOURCE",
         help="PPO prompts (default: the training pairs'; toy: its own)")
    flag("--ood_prompts", nargs="+", metavar="SOURCE",
         help="prompts for the evaluation out of distribution")
    flag("--template", choices=("auto", "hh", "none"), default="auto", help="how dialogues become "
         "text: by --model's chat template where it has one (auto), in HH form, or strings as they "
         "are, nothing added (none)")
    flag("--skip_bad_rows", action="store_true",
         help="count rows that cannot be read instead of stopping")


def parse(argv=None):
    """The flags with the defaults that depend on preset and sources; stops on what cannot work."""
    args = common.parse_args(f"{__doc__}\n{formats.__doc__}", HPARAMS, add_flags, argv,
                             reads_run=False)
    paper = args.preset == "paper"
    args.model = args.model or {
        "paper": "meta-llama/Llama-2-7b-hf", "small": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "toy": "tiny"}[args.preset]
    args.preferences = args.preferences or ["Anthropic/hh-rlhf" if paper else "toy"]
    args.sources = [s for given in (args.preferences, args.sft, args.prompts, args.ood_prompts)
                    for s in given or ()]
    sources.check(args.sources)
    args.model = os.path.abspath(args.model) if Path(args.model).is_dir() else args.model
    if not 0 < args.valid_fraction < 1:
        common.die("--valid_fraction must lie between 0 and 1")
    for name in ("n_pairs", "n_sft", "n_prompts", "n_gold"):  # only toy's column has sizes for it
        if set(TOY) & set(args.sources) and args.preset != "toy":
            args.hparams[name] = getattr(args, name) or HPARAMS[name][2]
            setattr(args, name, args.hparams[name])
    return args


def run_values(args):
    """What run.json keeps of the flags for the later stages."""
    return {key: getattr(args, key) for key in (
        "preset", "model", "seed", "limit", "preferences", "sft", "prompts", "ood_prompts",
        "max_prompt_tokens", "max_response_tokens", "template")}


def read_sources(args):
    """({kind: clean rows}, {kind: {"read", "kept", "drops"}}) of train, valid, gold, sft, prompts,
    eval, ood; what is not given is taken from the pairs."""
    ids, counts, world = {}, {}, set(args.preferences) <= set(TOY)
    pairs, counts["pairs"] = formats.load(args.preferences, "pairs", args, ids)
    train, valid = split_by_prompt(pairs, args.valid_fraction, args.seed)
    if not train or not valid:
        common.die(f"{len(pairs)} pairs of {len(unique_prompts(pairs))} prompts are left "
                   f"({counts['pairs']}): training and validation split without a common prompt "
                   "need two")
    if world:
        for row in valid:  # the judge is gold: 1 agrees with the label, 0 disagrees, -1 sees a tie
            c, r = row["gold_chosen"], row["gold_rejected"]
            row[LABEL] = -1 if c == r else int(c > r)
    rows = {"train": train, "valid": valid, "gold": [], "prompts": unique_prompts(train),
            "sft": [{"id": r["id"], "prompt": r["prompt"], "response": r["chosen"]} for r in train],
            "eval": unique_prompts(valid), "ood": []}
    for kind, given in (("sft", args.sft), ("prompts", args.prompts), ("eval", None),
                        ("ood", args.ood_prompts), ("gold", None)):
        if given or world:
            rows[kind], counts[kind] = formats.load(given or args.preferences, kind, args, ids)
    return rows, counts


def main(argv=None):
    args = parse(argv)
    if common.rank() > 0:
        sys.exit(0)
    base_model.check(args)
    model = [] if args.model == "tiny" else common.user_files(args.model)
    own = [path for s in args.sources for path in sources.files(s)]
    run = common.begin(args, "00_data", own + [p for p in model if not p.endswith(WEIGHTS)])
    rows, counts = read_sources(args)
    splits = {name: rows[name] for name in ("train", "valid", "gold") if rows[name]}
    for kind in ("eval", "ood"):
        tasks = {}
        for row in rows[kind]:
            tasks.setdefault(row["task"], []).append(row)
        if len(tasks) > MOST_TASKS:
            common.log(f"  {len(tasks)} tasks are more than {MOST_TASKS}: evaluated as one")
            tasks = {"general": rows[kind]}
        splits |= {f"{kind}_{task}": common.subset(of_task, args.n_eval, args.seed)
                   for task, of_task in tasks.items()}
    held_out = {r["prompt"] for name, split in splits.items()
                if name.startswith(("eval_", "ood_")) for r in split}
    valid = {r["prompt"] for r in rows["valid"]} if args.sft else set()  # pi^SFT has not seen them
    for kind, held in (("sft", held_out | valid), ("prompts", held_out)):
        splits[kind] = [r for r in rows[kind] if r["prompt"] not in held]
        if n := len(rows[kind]) - len(splits[kind]):
            count = counts.setdefault(kind, {"read": len(rows[kind]), "kept": len(rows[kind]),
                                             "drops": {}})
            count["kept"], count["drops"]["held-out prompt"] = count["kept"] - n, n
        if not splits[kind]:
            common.die(f"no row is left for {kind}.jsonl ({counts.get(kind)})")

    for kind, count in counts.items():
        run.log(0, kind=kind, **count)
    cut = {}
    for name, split in splits.items():
        cap = args.limit and args.limit * (64 if name in ("train", "sft", "prompts") else 16)
        splits[name] = common.subset(split, cap, args.seed) if cap else split
        cut[name] = len(split) - len(splits[name])
        common.write_jsonl(run.dir / f"{name}.jsonl", splits[name])
        common.log(f"  {name}.jsonl: {len(splits[name])} rows" +
                   f", {cut[name]} cut by --limit" * bool(cut[name]))
    tasks = [name[5:] for name in splits if name.startswith("eval_")]
    world = "toy" if set(args.preferences) <= set(TOY) else None  # gold is known
    style = formats.style_of(args.model, args.template)
    if style.tokenizer:  # 01 saves it with the models, which then write what they were trained on
        common.write_text(run.dir / "chat_template.jinja", style.tokenizer.chat_template)
    values = run_values(args) | {"world": world, "tasks": tasks} | {
        key: getattr(style, key) for key in ("form", "end", "lead", "day")}
    run.finish(run=values, **counts.pop("pairs"),
               other_sources=counts, cut_by_limit=cut,
               rows={name: len(split) for name, split in splits.items()})


if __name__ == "__main__":
    common.launch(main)
