"""Your own preferences, cleaned by the paper's rule (sections 2.2 to 2.4): what stages 00 to 03
found of each pair, in the layout that it came in.

Reads 03_strength/{train,valid}.jsonl and your files once more, writes clean/:

    train.jsonl      every pair under TRL's column names: `prompt` (where it had one), `chosen`,
                     `rejected`, messages or texts as they came; `margin`, `id`, `verdict`, mean and
                     std of the preference difference, and `split`: a pair of `valid` was seen by no
                     model. Ready for trl.RewardTrainer
    doubtful.html    the hundred weakest pairs and the hundred nearest to 0, to be looked at
    strength.png     Figure 1 of your pairs
    summary.txt      one line

A pair in the lowest fifth of strength whose mean mu_hat is below 0 is flipped: chosen and rejected
have changed places, margin = -mu_hat. Of the others those with mu_hat < 0 are to be softened (label
smoothing, Eq. 5; TRL has no column for it). All others are kept. The validation pairs are judged by
the threshold of the training pairs. Rows that bring their scores along, as the authors' released
set does, need no models: stages 01 and 02 are left out.

    bash run_all.sh clean --preferences mine.jsonl --model my/model --out out_mine [--texts]
"""
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402  (the project's root is on the path now)

from lab import figures, formats, sources  # noqa: E402
from lab.base import fill  # noqa: E402

MEAN, STD = "mean preference difference", "std preference difference"
FLIP_BELOW, DOUBTFUL = 0.2, 100


def verdicts(train, valid):
    """{id: flip, soften or keep}: stage 04's rule on training pairs, its threshold elsewhere."""
    lowest = sorted(train, key=lambda row: row[MEAN])[:round(FLIP_BELOW * len(train))]
    flipped = {r["id"]: r[MEAN] for r in lowest if r[MEAN] < 0}
    threshold = max(flipped.values(), default=float("-inf"))
    flipped |= {r["id"]: r[MEAN] for r in valid if r[MEAN] <= threshold}
    return {r["id"]: "flip" if r["id"] in flipped else "soften" if r[MEAN] < 0 else "keep"
            for r in train + valid}


def layout(originals, rows, style):
    """{id: the pair in the layout that it came in}, in messages where there are several layouts."""
    for spoken in (False, True):
        pairs = {r["id"]: formats.as_came(originals[r["id"]], style, spoken) for r in rows}
        if len({tuple((k, type(pair[k])) for k in ("prompt", "chosen") if k in pair)
                for pair in pairs.values()}) == 1:
            break
    return pairs


def read_again(data):
    """{id: the row as it came} of the run's sources, and the style in which 00 wrote them."""
    made = common.read_json(data / "manifest.json")
    args = SimpleNamespace(**made["hyperparameters"], **{
        k: v for k, v in made["run"].items() if k not in made["hyperparameters"]},
        skip_bad_rows="--skip_bad_rows" in made["command"])
    originals = {}
    formats.load(args.preferences, "pairs", args, {}, originals)
    return originals, formats.style_of(args.model, args.template)


def main(argv=None):
    args = common.parse_args(__doc__, {}, lambda flag: flag(
        "--texts", action="store_true", help="show the pairs' texts in doubtful.html"), argv)
    data = common.require(args, "00_data", "python 00_data.py")
    strength = common.require(args, "03_strength", "python 03_strength.py")
    if common.rank() > 0:
        return
    args.hparams["texts"] = args.texts
    own = [path for s in args.run["preferences"] for path in sources.files(s)]
    run = common.begin(args, "clean", ["00_data", "03_strength", *own], script="lab/clean.py")
    splits = {name: common.read_jsonl(strength / f"{name}.jsonl") for name in ("train", "valid")}
    originals, style = read_again(data)
    verdict, out = verdicts(*splits.values()), []
    pairs = layout(originals, sum(splits.values(), []), style)
    for split, rows in splits.items():
        for row in rows:
            came, flip = pairs[row["id"]], verdict[row["id"]] == "flip"
            if flip:
                came |= {"chosen": came["rejected"], "rejected": came["chosen"]}
            out.append(came | {
                "margin": -row[MEAN] if flip else row[MEAN], "id": row["id"],
                "verdict": verdict[row["id"]], MEAN: row[MEAN], STD: row[STD], "split": split})
    common.write_jsonl(run.dir / "train.jsonl", out)

    every = [row | {"verdict": verdict[row["id"]]} for row in sum(splits.values(), [])]
    count, out_of = Counter(verdict.values()), common.read_json(data / "manifest.json")["metrics"]
    below = sum(row[MEAN] < 0 for row in every) / len(every)
    summary = (f"{len(every)} of {out_of['read']} pairs: {count['keep']} kept, {count['flip']} "
               f"flipped, {count['soften']} to be softened; mean strength "
               f"{sum(r[MEAN] for r in every) / len(every):.3f}, {below:.0%} below 0")
    tables = [("The weakest", sorted(every, key=lambda r: r[MEAN])[:DOUBTFUL]),
              ("The nearest to 0", sorted(every, key=lambda r: abs(r[MEAN]))[:DOUBTFUL])]
    common.write_text(run.dir / "doubtful.html", fill(
        "clean.html", summary=summary, tables=tables, texts=args.texts, MEAN=MEAN, STD=STD))
    picture, _ = figures.draw_01([figures.data_01(SimpleNamespace(path=Path(args.out)))])
    picture.savefig(run.dir / "strength.png")
    common.write_text(run.dir / "summary.txt", summary + "\n")
    run.finish(pairs=len(every), share_mean_below_zero=below, **count)


if __name__ == "__main__":
    common.launch(main)
