"""The model card: README.md of every directory that holds a model, in the form that the Hugging
Face hub reads (card.md). It says what the manifest beside it has, so that a stage made again has
the same."""
import json
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from lab.base import fill, write_text
from lab.sources import HUB_ID, container

ABOUT = {
    "01": "A policy, fine-tuned on demonstrations: pi^SFT",
    "02": "A reward model, one of the voters of section 2.2",
    "04": "A reward model on preferences with flipped or soft labels or margins, as its name says "
          "(sections 2.4 and 2.5)",
    "05": "A reward model trained with a contrastive loss beside it (section 3.1)",
    "06": "A policy, trained by PPO under a reward model (section 3.2)",
    "07": "A reward model trained by MetaRM, Algorithm 1, on the policy's samples (section 3.2)",
}


def on_hub(source):
    return bool(HUB_ID.fullmatch(source)) and not Path(source).exists() and not container(source)


def licence(base):
    """The licence that the base's own card names, in its folder or in the hub's cache, or None:
    then nothing is claimed."""
    if base == "tiny":
        return "mit"
    card = try_to_load_from_cache(base, "README.md") if on_hub(base) else Path(base, "README.md")
    if not isinstance(card, (str, Path)) or not Path(card).exists():
        return None
    text = Path(card).read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^license: *(\S+)", text, re.MULTILINE)
    return found[1] if found else None


def write_card(folder, name, settings, run, metrics):
    """README.md of a stage's directory, if that holds a model. settings: the manifest's; run:
    run.json; metrics: the stage's headline numbers."""
    if not (folder / "config.json").exists() or name[:2] not in ABOUT:
        return
    base, sources, policy = run["model"], run["preferences"], name[:2] in ("01", "06")
    hyper = {"seed": settings["seed"], **settings["hyperparameters"]}
    variant = f"A reward model trained by `{hyper['variant']}`, our variant of MetaRM" \
        if hyper.get("variant") else None
    head = {"license": licence(base), "base_model": base if on_hub(base) else None,
            "datasets": json.dumps([s.split(":")[0] for s in sources if on_hub(s)]),
            "library_name": "transformers",
            "pipeline_tag": "text-generation" if policy else "text-classification",
            "tags": json.dumps(["rlhf"] + ["reward-model"] * (not policy))}
    write_text(folder / "README.md", fill(
        "card.md", name=name, policy=policy, about=variant or ABOUT[name[:2]],
        form=run.get("form", "hh"), day=run.get("day"), limit=settings["limit"],
        preset=settings["preset"],
        head={key: value for key, value in head.items() if value not in (None, "[]")},
        base="a small Llama of this project's own, from scratch" if base == "tiny" else
        base if on_hub(base) else Path(base).name,
        data="the embedded toy world" if sources == ["toy"] else ", ".join(
            s if on_hub(s) else Path(s).name for s in sources),
        hyper=", ".join(f"{k} {v}" for k, v in hyper.items()),
        metrics=", ".join(f"{k} {v:.4g}" for k, v in metrics.items()
                          if isinstance(v, (int, float)))))
