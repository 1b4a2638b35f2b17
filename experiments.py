"""Every experiment of the paper on top of the default pipeline, for several seeds: one call of a stage each.

The table below is the whole list. `deepspeed experiments.py` works through it in one launch, which saves the start-up
of some seventy; what is complete is skipped, what was interrupted goes on from its checkpoint. Each line is a command
that can be given by hand, with `--out out/seed_0` behind it:

    bash run_all.sh experiments --seeds 3            # this script, then 09_report.py
    python experiments.py --dry_run                  # print the commands
    deepspeed 04_rm_denoise.py --methods baseline --percentile 0 10 --epochs 3 --eval_every 5 --name tenth_01 \
        --out out/seed_0                             # a single one, by hand

Seed s is in OUT/seed_s. The paper treats summaries as a task of its own, with its own models: OUT/summary_s. That run
needs no strength of preferences, so its ensemble has two models only.
"""
import argparse
import shlex
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import audit
import common

WHOLE = [name for name, (*_, part) in import_module("04_rm_denoise").METHODS.items() if part == (0, 100)]
CONTRASTIVE = list(import_module("05_rm_contrastive").METHODS)
STRENGTHS = (0.01, 0.1, 1, 10)  # of eta, and of lambda in L - lambda J


def rounds_of(count):
    """Vanilla PPO and `count` rounds of MetaRM."""
    rows = [("06_ppo/round_0", "Figure 17", 20, "06_ppo --round 0")]
    for r in range(1, count + 1):
        rows += [(f"07_metarm/round_{r}", "Figures 16, 17", 20, f"07_metarm --round {r}"),
                 (f"06_ppo/round_{r}", "Figure 17, Tables 2, 3", 21, f"06_ppo --round {r}")]
    return rows


def tenth(i, purpose, name="", flags=""):
    """A reward model on the i-th tenth of the pairs by strength. A tenth is ten toy steps an epoch: one epoch would
    hardly move a model."""
    name = f"tenth_{i:02d}" + (f"_{name}" if name else "")
    return (f"04_rm_denoise/{name}", purpose, 5.5, f"04_rm_denoise --methods baseline --percentile {10 * i - 10} {10 * i} "
            f"{flags} --epochs 3 --eval_every {{often}} --name {name}")


def pairs_table(rounds):
    """(directory, what it is for, seconds on two idle cores, stage and flags), in order."""
    return [
        ("00_data", "all", 4, "00_data"),
        ("01_sft", "all", 40, "01_sft"),
        ("02_rm_ensemble/figures", "Figures 1-3", 75, "02_rm_ensemble"),
        ("03_strength", "Figures 1-3, Table 1", 26, "03_strength"),
        ("04_rm_denoise/figures", "the five methods, one epoch", 56, "04_rm_denoise"),
        ("05_rm_contrastive/figures", "Figure 11", 63, "05_rm_contrastive"),
        *rounds_of(rounds),
        # ---- section 2.3, 2.4: what each part of the data teaches
        *(tenth(i, "Figure 4") for i in range(1, 11)),
        *(tenth(i, "Figure 5", "flip", "--flip_below 1") for i in (1, 2)),
        tenth(10, "Figure 6", "soft", "--smoothing 0.1 --soften_all"),
        tenth(10, "Figure 6", "margin", "--margin"),
        tenth(10, "Figure 6", "soft_margin", "--smoothing 0.1 --soften_all --margin"),
        tenth(1, "Figure 23", "flip_soft", "--flip_below 1 --smoothing 0.1"),
        tenth(1, "Figure 23", "flip_margin", "--flip_below 1 --margin"),
        tenth(1, "Figure 23", "flip_soft_margin", "--flip_below 1 --smoothing 0.1 --margin"),
        tenth(4, "Figure 24", "soft", "--smoothing 0.1 --soften_all"),
        tenth(4, "Figure 24", "margin", "--margin"),
        tenth(1, "Figure 25", "soft", "--smoothing 0.1"),
        # as many steps as one epoch of all the data, so that size and number of steps are not mixed up
        *((f"04_rm_denoise/part_{low:03d}_{high:03d}", "Figure 21" if low == 0 else "Figure 22", 10,
           f"04_rm_denoise --methods baseline --percentile {low} {high} --epochs {100 / (high - low):.4g} "
           f"--name part_{low:03d}_{high:03d}")
          for low, high in ((0, 20), (0, 40), (0, 60), (0, 80), (80, 100), (60, 100), (40, 100), (20, 100))),
        *((f"04_rm_denoise/{method}_3_epochs", "Figures 7, 8, 19, 20, 26, 27, 28", 33,
           f"04_rm_denoise --methods {method} --epochs 3 --eval_every {{seldom}} --name {method}_3_epochs")
          for method in WHOLE),
        # ---- PPO without KL penalty under each reward model
        *((f"06_ppo/{name}", "Figures 9, 10" if name in WHOLE else "Figures 12, 13", 21,
           f"06_ppo --rm {name} --kl_beta 0") for name in WHOLE + CONTRASTIVE),
        # ---- two studies that the paper does not have; a seed of their own, or they would see round 0's prompts again
        *((f"06_ppo/more_{r}", "more PPO, same reward model", 28,
           f"06_ppo --rm baseline --start {f'more_{r - 1}' if r > 1 else 'round_0'} --name more_{r} --seed 9{{seed}}{r}")
          for r in range(1, min(3, rounds) + 1)),
        # matched strength, lambda = eta: both are the factor of the same gradient of J
        *((f"07_metarm/eta_{eta}", "MetaRM beside L - lambda J", 23,
           f"07_metarm --round 1 --eta {eta} --name eta_{eta}") for eta in STRENGTHS),
        *((f"07_metarm/joint_{lam}", "MetaRM beside L - lambda J", 22,
           f"07_metarm --round 1 --joint {lam} --name joint_{lam}") for lam in STRENGTHS),
        ("06_ppo/joint", "MetaRM beside L - lambda J", 30, "06_ppo --rm joint_{eta} --start round_0 --name joint "
         "--seed 9{seed}1"),
        ("08_evaluate", "Figures 10, 13, 15, Tables 2, 3, best-of-n", 135, "08_evaluate --best_of {n}"),
    ]


def summary_table(rounds):
    """The summary task's own pipeline."""
    return [
        ("00_data", "all", 3, "00_data --preferences toy:summary"),
        ("01_sft", "all", 40, "01_sft"),
        ("02_rm_ensemble/figures", "all", 15, "02_rm_ensemble --M 2"),
        ("03_strength", "all", 6, "03_strength --M 2"),
        ("04_rm_denoise/baseline", "all", 12, "04_rm_denoise --methods baseline"),
        *rounds_of(rounds),
        ("08_evaluate", "Tables 2, 3", 11, "08_evaluate"),
    ]


def flags_of(manifest):
    """The recorded command's flags without those that change nothing."""
    given = [w for w in shlex.split(manifest["command"])[1:] if not w.startswith(("--local_rank", "--debug", "--restart"))]
    if "--out" in given:
        del given[given.index("--out"):given.index("--out") + 2]
    return given


def complete(out, name, flags):
    """The directory was made by these flags from the inputs that are here now; 08 also of every policy there is."""
    manifest = audit.read_manifest(Path(out), name)
    if manifest and name == "00_data" and flags_of(manifest) != flags:
        common.die(f"{out} was made with other flags ({shlex.join(flags_of(manifest))}): choose another --out")
    if not manifest or flags_of(manifest) != flags or audit.other_inputs(out, manifest):
        return False
    read = {path.rsplit("/", 1)[0] for path in manifest["inputs"]}
    missed = [p for p in audit.finished(out) if p.startswith("06_ppo/") and p not in read] if name[:2] == "08" else []
    return not missed


def main():
    parser = argparse.ArgumentParser(description=__doc__, epilog="other flags go to 00_data.py", allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: common.die(f"{message} (experiments.py --help lists the flags)")
    flag = parser.add_argument
    flag("--out", default="out", help="directory of the runs (default: out)")
    flag("--seeds", type=int, default=3, help="seeds 0 to N-1 (default: 3)")
    flag("--rounds", type=int, help="MetaRM rounds (default: 5; 2 with --limit)")
    flag("--preset", choices=audit.CHOICES["preset"], default="toy", help="as for 00_data.py (default: toy)")
    flag("--limit", type=int, help="as for 00_data.py: a smoke run")
    flag("--preferences", nargs="+", metavar="SOURCE", help="as for 00_data.py (default: the embedded world)")
    flag("--dry_run", action="store_true", help="print the commands and run nothing")
    flag("--restart", action="store_true", help="begin an unfinished stage anew instead of from its checkpoint")
    flag("--debug", action="store_true", help="show the traceback of an error")
    flag("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    args, data = parser.parse_known_args()
    if args.seeds < 1 or "--seed" in data:
        common.die("--seeds N runs seeds 0 to N-1")
    if args.rounds is not None and args.rounds < 1:
        common.die("--rounds must be 1 or more: MetaRM beside the joint objective needs one")
    if (Path(args.out) / "run.json").exists():
        common.die(f"{args.out} holds a single run: give the experiments another --out")
    limited, toy = bool(args.limit), args.preset == "toy"
    rounds = args.rounds or (2 if limited else 5)
    for name in ("preset", "limit", "preferences"):
        given = getattr(args, name)
        data += [f"--{name}", *(given if name == "preferences" else [str(given)])] if given and given != "toy" else []
    words = {"often": 5 if toy else 100, "seldom": 10 if toy else 250,
             "eta": import_module("07_metarm").HPARAMS["eta"][toy],
             "n": 4 if limited else 64}
    todo = []
    for seed in range(args.seeds):
        runs = [(f"seed_{seed}", pairs_table(rounds))]
        if toy and not args.preferences:
            runs.append((f"summary_{seed}", summary_table(rounds)))
        for run, table in runs:
            for name, purpose, seconds, command in table:
                stage, *flags = command.format(**words, seed=seed).split()
                flags += [*data, "--seed", str(seed)] if stage == "00_data" else []
                todo.append((str(Path(args.out) / run), name, purpose, seconds, stage, flags))
    if args.dry_run:
        for out, name, purpose, seconds, stage, flags in todo:
            print(shlex.join([f"{stage}.py", *flags, "--out", out]), f"  # {name}: {purpose}")
        return
    if common.rank() == 0:
        left = [row for row in todo if not complete(row[0], row[1], row[5])]
        took = f"about {sum(row[3] for row in left) / 60:.0f} minutes on two idle cores" if toy and not limited else \
            "a time that was not measured for these flags"
        common.log(f"{len(todo) - len(left)} of {len(todo)} stages are complete, the others take {took}")

    def run(i, out, name, purpose, _, stage, flags):
        sys.argv = [f"{stage}.py", *flags, "--out", out]  # what the manifest records
        sys.argv += ["--debug"] * args.debug + ["--restart"] * args.restart
        common.log(f"\n== {i} of {len(todo)}, {out}/{name} ({purpose}): {shlex.join(sys.argv)}")
        if common.rank() == 0:
            Path(out).mkdir(parents=True, exist_ok=True)
            with open(Path(out) / "commands.log", "a") as log:
                log.write(shlex.join(["python" if stage == "00_data" else "deepspeed", *sys.argv]) + "\n")
        import_module(stage).main(sys.argv[1:])

    for i, row in enumerate(todo, 1):  # data are made by one process, before the others join it
        if row[4] == "00_data" and common.rank() == 0 and not complete(row[0], row[1], row[5]):
            run(i, *row)
    common.setup(SimpleNamespace(deterministic=False, seed=0, preset=args.preset, hparams={}))
    for i, row in enumerate(todo, 1):
        if row[4] != "00_data" and not audit.from_rank_0(lambda: complete(row[0], row[1], row[5])):  # noqa: B023
            run(i, *row)
    common.log(f"all {len(todo)} stages are complete")


if __name__ == "__main__":
    audit.run(main)
