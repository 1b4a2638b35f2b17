"""The model card: README.md of every directory that holds a model, in the form that the Hugging
Face hub reads. It says what the manifest beside it has, so that a stage made again has the same."""
import json
import re
from pathlib import Path

from lab.base import write_text

ABOUT = {
    "01": "A policy, fine-tuned on demonstrations: pi^SFT",
    "02": "A reward model, one of the voters of section 2.2",
    "04": "A reward model on preferences with flipped or soft labels or margins, as its name says "
          "(sections 2.4 and 2.5)",
    "05": "A reward model trained with a contrastive loss beside it (section 3.1)",
    "06": "A policy, trained by PPO under a reward model (section 3.2)",
    "07": "A reward model trained by MetaRM on the policy's samples (section 3.2, Algorithm 1)",
}
# what is to be encoded, (of a policy, of a reward model), and in words, by the form of the texts
ENCODE = {
    "chat": ("tokenizer.apply_chat_template(dialogue, add_generation_prompt=True, "
             'return_dict=True,\n                                    return_tensors="pt")',
             'tokenizer.apply_chat_template(dialogue, return_dict=True, return_tensors="pt")',
             "`dialogue` is a list of messages: the text trained on is what the model's own chat "
             "template\nwrites for the whole of it."),
    "hh": ('tokenizer("\\n\\nHuman: Hi\\n\\nAssistant:", return_tensors="pt")',
           'tokenizer("\\n\\nHuman: Hi\\n\\nAssistant: Hello." + tokenizer.eos_token, '
           'return_tensors="pt")',
           "The text trained on is that of HH-RLHF: a turn begins with an empty line and `Human:` "
           "or\n`Assistant:`; EOS ends a response."),
    "none": ('tokenizer(prompt, return_tensors="pt")',
             'tokenizer(prompt + response + tokenizer.eos_token, return_tensors="pt")',
             "The text trained on is the rows' own: prompt, response and EOS.")}
FORM = """---
{head}
---
# {name}

{about}; of *Secrets of RLHF in Large Language Models Part II: Reward Modeling*, arXiv 2401.06080,
as its reference implementation makes it. `manifest.json` beside this file has the command, the
hashes of everything that it was made from, the code and the versions.

- **Base**: {base}
- **Data**: {data}{limit}
- **Preset** {preset}: {hyper}
- **Measured**: {metrics}

```python
from transformers import AutoModelFor{kind}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelFor{kind}.from_pretrained(path)
ids = {ids}
{result} = {use}
```

{text}

For research. It has learned what its labels say, the wrong ones included, and knows little of texts
that differ from them: a policy trained against it finds its mistakes.
"""


def licence(base):
    """The licence that the card of a base in a folder names; else nothing is claimed."""
    card = Path(base, "README.md")
    found = re.search(r"^license: *(\S+)", card.read_text(encoding="utf-8", errors="replace"),
                      re.M) if card.exists() else None
    return found[1] if found else "mit" if base == "tiny" else "other"


def on_hub(source):
    return source.count("/") == 1 and not Path(source).exists()


def write_card(folder, name, settings, run, metrics):
    """README.md of a stage's directory, if that holds a model. settings: the manifest's; run:
    run.json; metrics: the stage's headline numbers."""
    if not (folder / "config.json").exists() or name[:2] not in ABOUT:
        return
    base, sources, policy = run["model"], run["preferences"] or ["toy"], name[:2] in ("01", "06")
    hub = [s.split(":")[0] for s in sources if on_hub(s)]
    head = {"license": licence(base), "library_name": "transformers",
            "pipeline_tag": "text-generation" if policy else "text-classification",
            "tags": ["rlhf"] + ["reward-model"] * (not policy)}
    head |= {"datasets": hub} if hub else {}
    head |= {"base_model": base} if on_hub(base) else {}
    *encode, text = ENCODE[run.get("form", "hh")]
    hyper = {"seed": settings["seed"], **settings["hyperparameters"]}
    numbers = {k: f"{v:.4g}" for k, v in metrics.items() if isinstance(v, (int, float))}
    write_text(folder / "README.md", FORM.format(
        head="\n".join(f"{k}: {v if isinstance(v, str) else json.dumps(v)}"
                       for k, v in head.items()),
        name=name, about=ABOUT[name[:2]], text=text, preset=settings["preset"],
        base="a small Llama of this project's own, from scratch" if base == "tiny" else
        base if on_hub(base) else Path(base).name,
        data="the embedded toy world" if sources == ["toy"] else ", ".join(
            s if on_hub(s) else Path(s).name for s in sources),
        limit=f" (a smoke run, of at most {settings['limit']} steps)" * bool(settings["limit"]),
        hyper=", ".join(f"{k} {v}" for k, v in hyper.items()),
        metrics=", ".join(f"{k} {v}" for k, v in numbers.items()),
        kind="CausalLM" if policy else "SequenceClassification", ids=encode[not policy],
        result="answer" if policy else "reward", use="tokenizer.decode(model.generate(**ids, "
        "do_sample=True, max_new_tokens=99)[0])" if policy else "model(**ids).logits[0, 0]"))
