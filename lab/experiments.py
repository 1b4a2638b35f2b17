"""The pipeline's stages in order, every experiment of the paper on top of them, and what works
through both. Each line is a command that can be given by hand, with `--out DIR` behind it.

    bash run_all.sh                                    the pipeline: lab/driver.py runs `plan`
    bash run_all.sh experiments --seeds 5              every experiment, then 09_report.py
    python lab/experiments.py --dry_run                print the experiments' commands

Experiments run in one launch, which saves the start-up of a hundred a seed; what is complete is
skipped, what was interrupted goes on from its checkpoint. Seed s is in OUT/seed_s. The paper treats
summaries as a task of its own, with its own models: OUT/summary_s. That run needs no strength of
preferences, so its ensemble has two models only.
"""
import argparse
import contextlib
import os
import shlex
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402  (the project's root is on the path now)
from lab import base_model, formats, judges, sources  # noqa: E402
from lab.base import die, from_rank_0, lock, locks, log, rank  # noqa: E402
from lab.manifest import current, other_inputs, read_manifest, recorded_flags  # noqa: E402
from lab.record import CHOICES, differences, promote  # noqa: E402

METHODS = list(import_module("04_rm_denoise").METHODS)
TRAINED = ("01", "02", "04", "05", "06", "07")  # stages with steps
CONTRASTIVE = list(import_module("05_rm_contrastive").METHODS)


def rounds_of(count):
    """Vanilla PPO and `count` rounds of MetaRM: Figures 16 and 17, Tables 2 and 3."""
    rows = [(["06_ppo/round_0"], "vanilla PPO under the vanilla reward model", 36,
             "06_ppo.py --round 0")]
    for r in range(1, count + 1):
        rows += [([f"07_metarm/round_{r}"], f"MetaRM, Algorithm 1, on samples of round {r - 1} "
                  "(section 3.2)", 27, f"07_metarm.py --round {r}"),
                 ([f"06_ppo/round_{r}"], f"PPO under MetaRM of round {r}", 40,
                  f"06_ppo.py --round {r}")]
    return rows


def pipeline(rounds, M=None, folds=None):
    """(directories it makes, purpose, seconds on two idle cores, command) of every stage. M, folds:
    stage 02's, where they are said."""
    voters = f" --M {M}" * (M is not None)
    return [
        (["00_data"], "bring the data into one clean form", 5, "00_data.py"),
        (["01_sft"], "supervised fine-tuning: pi^SFT", 45, "01_sft.py"),
        ([f"02_rm_ensemble/rm_{m:02d}" for m in range(10 if M is None else M)],
         "the reward models that vote (section 2.2)", 95,
         "02_rm_ensemble.py" + voters + f" --folds {folds}" * (folds is not None)),
        (["03_strength"], "preference strength, Eq. 4 (section 2.2)", 38,
         "03_strength.py" + voters),
        ([f"04_rm_denoise/{name}" for name in METHODS],
         "flip, margin, soft labels (sections 2.4, 2.5)", 70, "04_rm_denoise.py"),
        ([f"05_rm_contrastive/{name}" for name in CONTRASTIVE],
         "SimCSE and SwAV (section 3.1)", 85, "05_rm_contrastive.py"),
        *rounds_of(rounds),
        (["08_evaluate"], "win / tie / lose of every policy (Tables 2 and 3)", 28,
         "08_evaluate.py" + voters),
        (["09_report"], "the figures and tables on one page", 8, "09_report.py")]


def stages_of(args, rounds):
    """Those of the pipeline that run_all.sh is asked for; of `clean`, the first four and its own:
    up to the strength, and a verdict on each pair."""
    if args.M is not None and args.M < 1:
        die(f"--M must be at least 1, not {args.M}")
    if args.folds and (args.folds < 2 or (10 if args.M is None else args.M) % args.folds):
        die("--folds must be 2 or more, and --M a multiple of it")
    stages = pipeline(rounds, args.M, args.folds)
    return [*stages[:4], (["clean"], "keep, flip or soften: a verdict on each pair", 5,
                          "lab/clean.py" + " --texts" * args.texts)] if args.clean else stages


# ---------------------------------------------------------------- what run_all.sh is to do

def bring_scores(asked):
    """Whether every row of the preferences brings the scores of voters along."""
    def scored(row):
        with contextlib.suppress(sources.Bad):
            return isinstance(row, sources.Drop) or isinstance(row, dict) and \
                formats.SCORES[0] in formats.carried(formats.present(row))
    return all(scored(row) for source in asked.preferences for part in sources.parts(source)
               for _, row in sources.raw_rows(part, "pairs", asked))


def usual_rounds(preset, limit):
    """Rounds of MetaRM of a pipeline that is not told how many."""
    return 1 if limit else 4 if preset == "paper" else 3


def name_of(directories):
    """A stage's name: its directory, or the folder of several."""
    return directories[0] if len(directories) == 1 else directories[0].split("/")[0]


def why(out, directories, command=""):
    """Why a stage is to run, or None: it is complete, made with the command's flags, and from what
    is here now."""
    words = shlex.split(command)
    asked = {**({"folds": "0", "texts": str("--texts" in words)} if command else {}),  # not said: 0
             **{a[2:]: b for a, b in zip(words, words[1:]) if a[:2] == "--" and b[:2] != "--"}}
    if "--judge" in words:
        asked = dict.fromkeys(judges.FLAGS, "None") | asked
        asked["both_orders"] = str("--both_orders" in words or None)
    for name in directories:
        if not (out / name / "manifest.json").exists():
            return "missing"
        manifest = read_manifest(out, name)
        if manifest is None:
            return f"{name}/manifest.json is not what the stage wrote"
        if other := other_inputs(out, manifest):
            return f"was made from another {other[0]} than is here now" \
                if (out / other[0]).exists() else f"was made from {other[0]}, which is gone"
        for kind in ("preferences", "sft", "prompts", "ood_prompts") * (name == "00_data"):
            for files in map(sources.files, manifest["run"][kind] or []):
                new = [path for path in files if path not in manifest["inputs"]]
                if new and len(new) < len(files):  # else the project has moved, and its files
                    return f"was made without {new[0]}, which is there now"
        for flag, value in asked.items():
            if flag != "judge_parallel" and \
                    str(manifest["hyperparameters"].get(flag, value)) != value:
                return f"was made with another --{flag}"
        if name == "08_evaluate":
            read = {path.rsplit("/", 1)[0] for path in manifest["inputs"]}
            if missed := [p for p in current(out, "06_ppo")[0] if p not in read]:
                return f"has not judged {missed[0]}"
    return None


def meant(values, names):
    """Those flags of stage 00 by their meaning: two spellings of one file are equal."""
    def real(x):
        return os.path.realpath(x) if isinstance(x, str) and os.path.exists(x) else x
    return {k: list(map(real, v)) if isinstance(v, list) else real(v) for k, v in values.items()
            if k in names}


def check_data(out, flags, check_model=False):
    """Stop when the flags are none of stage 00's, or ask for other data than it made in `out`. →
    what stage 00 makes of them."""
    stage = import_module("00_data")
    args = stage.parse([*flags, "--out", str(out)])
    if check_model and not (out / "00_data/manifest.json").exists():
        base_model.check(args)  # before run_all.sh makes the directory
    if flags and (manifest := read_manifest(out, "00_data")):
        new = stage.run_values(args) | args.hparams
        old = meant(manifest["run"] | manifest["hyperparameters"], new)
        new = meant(new, new)
        if different := differences({"hyperparameters": old}, {"hyperparameters": new}):
            die(f"{out} was made with other flags ({'; '.join(different)}): choose another --out, "
                "or --from 00")
    return args


def check_named(args, stages):
    """Stop when --from or --to names none of the stages."""
    for flag, value in (("--from", args.start), ("--to", args.to)):
        if value and not any(name_of(d).startswith(value) for d, *_ in stages):
            die(f"{flag} {value} is no stage of this run (00_data, 04, 07_metarm/round_2, ...)")


def show_resolved(command, preset):
    """Print a command and, by its stage, the hyperparameters that it resolves to."""
    script, *flags = shlex.split(command)
    one = script in ("00_data.py", "09_report.py", "lab/clean.py")
    print("python" if one else "deepspeed", command)
    sys.argv = [script]
    with contextlib.suppress(SystemExit):
        stage_of(script).main([*flags, "--dry_run", "--preset", preset])


def plan(args, flags):
    """What is to do for the run that run_all.sh is asked for: of each stage ("run" or "skip", its
    name, minutes expected, purpose, command), and ("note", what is to be said) before it."""
    out, first = Path(args.out), args.start or "no"
    run, stages = {}, stages_of(args, args.rounds or 99)
    check_named(args, stages)
    if (out / "seed_0/run.json").exists():
        die(f"{out} holds experiments: give another --out")
    if out.exists() and not args.dry_run:
        lock(out)
        for pattern in ("*.partial/manifest.json", "*/*.partial/manifest.json"):
            for manifest in out.glob(pattern):
                promote(manifest.parent)  # a process was killed just before it did
        locks.pop((out, ".lock")).close()  # it is each stage's
    asked = check_data(out if not "00_data".startswith(first) else Path(os.devnull), flags,
                       check_model=not args.dry_run)
    preset, world = asked.preset, "toy" if {*asked.preferences} <= {*sources.TOY} else None
    if (out / "run.json").exists():
        run = common.read_json(out / "run.json")
        preset, world = (preset, world) if flags else (run["preset"], run.get("world"))
    limit = args.limit or run.get("limit")
    rounds = usual_rounds(preset, limit) if args.rounds is None else args.rounds
    if not flags and (made := read_manifest(out, "00_data")):
        flags = recorded_flags(made)
    again = False
    stages = stages_of(args, rounds)
    if args.clean and not args.dry_run and bring_scores(
            import_module("00_data").parse([*flags, "--out", args.out])):
        stages = [s for s in stages if not s[3].startswith(("01", "02"))]
        yield "note", "the rows bring scores: no model is trained to vote"
    check_named(args, stages)
    last = max(i for i, (d, *_) in enumerate(stages)
               if not args.to or name_of(d).startswith(args.to))
    judge = shlex.join(word for name in judges.FLAGS if (value := getattr(args, name)) is not None
                       for word in (f"--{name}", *[str(value)] * (value is not True)))
    if judge and args.judge != "ensemble" and not args.dry_run:  # told now, not after hours
        judges.choose(SimpleNamespace(**vars(args), run={"world": world}, hparams={}))
    for directories, purpose, seconds, command in stages[:last + 1]:
        if judge and (command[:2] == "08" or judges.reads(args) and command[:2] == "03"):
            command += f" {judge}"
        name, several = name_of(directories), len(directories) > 1  # those keep what is finished
        forced = name.startswith(first) or again and bool(args.start)
        reason = None if args.dry_run else why(out, directories, command)
        if not again and reason and reason != "missing":
            yield "note", f"{name} {reason}: it runs again, and all after it"
        unfinished = any((out / f"{d}.partial").exists() for d in directories)
        again = again or forced or bool(reason) or unfinished or args.dry_run
        command += f" {shlex.join(flags)}" * (name == "00_data" and bool(flags))
        command += " --tensorboard" * (args.tensorboard and command[:2] in TRAINED)
        command += f" --out {shlex.quote(args.out)}" + " --restart" * (forced and several)
        minutes = "unmeasured" if limit or preset != "toy" else f"{seconds / 60:.1f}"
        if args.dry_run:
            show_resolved(command, preset)
            continue
        yield "run" if again else "skip", name, minutes, purpose, command
    if args.start and not again:
        die(f"--from {args.start} matched no stage of this run")


# ---------------------------------------------------------------- the experiments

def tenth(i, purpose, name=""):
    """A reward model on the i-th tenth of the pairs by strength, with the switches in its name. A
    tenth is 15 toy steps an epoch: one epoch would hardly move a model."""
    switches = {"flip": "--flip_below 1", "margin": "--margin",
                "soft": "--smoothing 0.1" + " --soften_all" * (i > 1)}  # in the first most are soft
    flags = " ".join(switches[word] for word in name.split("_") if word)
    name = f"tenth_{i:02d}" + f"_{name}" * bool(name)
    return ([f"04_rm_denoise/{name}"], purpose, 8,
            f"04_rm_denoise.py --methods baseline --percentile {10 * i - 10} {10 * i} {flags} "
            f"--epochs 3 --eval_every {{often}} --name {name}")


def part(low, high, purpose):
    """A reward model on a share of the pairs by strength, in as many steps as one epoch of all, so
    that size and number of steps are not mixed up."""
    name = f"part_{low:03d}_{high:03d}"
    return ([f"04_rm_denoise/{name}"], purpose, 16,
            f"04_rm_denoise.py --methods baseline --percentile {low} {high} "
            f"--epochs {100 / (high - low):.4g} --name {name}")


def pairs_table(rounds, usual, alpha):
    """The pipeline without its page, and every experiment, in order; `usual`: stage 07's eta."""
    strengths = [f"{x:g}" for x in sorted({alpha, *(usual * f for f in (0.1, 1, 10, 100))})]
    served = {"joint": strengths, "theta_prime": [f"{usual:g}", f"{usual * 10:g}"],
              "weights": ["0.03", "0.1", "0.3", "1"]}  # whose eta is another: an e-fold for a std
    variants = [(variant, eta) for variant, etas in served.items() for eta in etas]
    shifted = ["04_rm_denoise/baseline", *(f"07_metarm/eta_{eta}" for eta in strengths),
               *(f"07_metarm/{variant}_{eta}" for variant, eta in variants)]
    models = [*(f"02_rm_ensemble/rm_{m:02d}" for m in range(10)),
              *(f"04_rm_denoise/{name}" for name in METHODS),
              *(f"05_rm_contrastive/{name}" for name in CONTRASTIVE),
              *(f"07_metarm/round_{r}" for r in range(1, rounds + 1))]
    return [
        *pipeline(rounds)[:-2],
        # ---- sections 2.3, 2.4: what each part of the data teaches
        *(tenth(i, "Figure 4") for i in range(1, 11)),
        *(tenth(i, "Figure 5", "flip") for i in (1, 2)),
        *(tenth(10, "Figure 6", name) for name in ("soft", "margin", "soft_margin")),
        *(tenth(1, "Figure 23", f"flip_{name}") for name in ("soft", "margin", "soft_margin")),
        *(tenth(4, "Figure 24", name) for name in ("soft", "margin")),
        tenth(1, "Figure 25", "soft"),
        *(part(0, high, "Figure 21") for high in (20, 40, 60, 80)),
        *(part(low, 100, "Figure 22") for low in (80, 60, 40, 20)),
        *(([f"04_rm_denoise/{method}_3_epochs"], "Figures 7, 8, 19, 20, 26, 27, 28", 50,
           f"04_rm_denoise.py --methods {method} --epochs 3 --eval_every {{seldom}} "
           f"--name {method}_3_epochs") for method in METHODS),
        # ---- PPO without KL penalty under each reward model
        *(([f"06_ppo/{name}"], "Figures 9, 10" if name in METHODS else "Figures 12, 13", 40,
           f"06_ppo.py --rm {name} --kl_beta 0") for name in METHODS + CONTRASTIVE),
        # ---- studies that the paper does not have; PPO with a seed of its own, or it would see
        # round 0's prompts again
        *(([f"06_ppo/more_{r}"], "more PPO, same reward model", 45, f"06_ppo.py --rm baseline "
           f"--start {f'more_{r - 1}' if r > 1 else 'round_0'} --name more_{r} --seed 9{{seed}}{r}")
          for r in range(1, min(3, rounds) + 1)),
        *(([f"07_metarm/eta_{eta}"], "MetaRM's eta", 30, f"07_metarm.py --round 1 --eta {eta} "
           f"--equation_17 0 --name eta_{eta}") for eta in strengths),
        *(([f"07_metarm/{variant}_{eta}"], "MetaRM's variants", 30,
           f"lab/metarm_variants.py --variant {variant} --round 1 --eta {eta} --equation_17 0 "
           f"--name {variant}_{eta}") for variant, eta in variants),
        *(([f"06_ppo/{name}"], "MetaRM's variants", 45, f"06_ppo.py --rm {rm} "
           f"--start round_0 --name {name} --seed 9{{seed}}1") for name, rm in (
               ("joint", f"joint_{usual:g}"), ("theta_prime", f"theta_prime_{usual:g}"),
               ("weights", "weights_1"), ("weights_mild", "weights_0.1"))),
        (["08_best_of_n_round_0"], "who orders the shifted policy's samples", 30,
         f"lab/best_of_n.py --policy round_0 --n {{few}} --models {' '.join(shifted)}"),
        (["06_ppo/metarm"], "over-optimisation", 40,
         "06_ppo.py --rm round_1 --kl_beta 0 --name metarm"),
        *(([f"06_ppo/{reward}"], "over-optimisation", 90, f"lab/ppo_reward.py --reward {reward} "
           f"--rm baseline --kl_beta 0 --name {reward}") for reward in ("mean", "mean_std")),
        (["08_best_of_n"], "best of n under each reward model", 200,
         f"lab/best_of_n.py --n {{n}} --models {' '.join(models)}"),
        (["08_evaluate"], "Figures 10, 13, 15, Tables 2, 3", 60, "08_evaluate.py")]


def summary_table(rounds, source="toy:summary"):
    """The summary task's own pipeline."""
    return [(["00_data"], "all", 5, f"00_data.py --preferences {source}"),
            (["01_sft"], "all", 45, "01_sft.py"),
            (["02_rm_ensemble/rm_00", "02_rm_ensemble/rm_01"], "all", 20,
             "02_rm_ensemble.py --M 2"),
            (["03_strength"], "all", 8, "03_strength.py --M 2"),
            (["04_rm_denoise/baseline"], "all", 17, "04_rm_denoise.py --methods baseline"),
            *rounds_of(rounds), (["08_evaluate"], "Tables 2, 3", 20, "08_evaluate.py")]


def stage_of(script):
    """The module of a stage's script."""
    return import_module(script.removesuffix(".py").replace("/", "."))


def complete(out, directories, flags):
    """The directories were made by these flags from the inputs that are here now."""
    manifests = [read_manifest(Path(out), name) for name in directories]
    if directories == ["00_data"]:
        check_data(Path(out), flags)
        return bool(manifests[0]) and not why(Path(out), directories)
    return all(m and recorded_flags(m) == flags for m in manifests) and \
        not why(Path(out), directories)


def listed(args, data):
    """Every experiment of every seed: (run directory, directories, purpose, seconds, script,
    flags)."""
    toy, limited, todo = args.preset == "toy", bool(args.limit), []
    column = CHOICES["preset"].index(args.preset)
    rounds = args.rounds or (2 if limited else 5)
    words = {"often": 5 if toy else 100, "seldom": 10 if toy else 250, "n": 4 if limited else 64,
             "few": 4 if limited else 16}
    eta, alpha = (import_module("07_metarm").HPARAMS[name][column] for name in ("eta", "lr"))
    for seed in range(args.seeds):
        runs = [(f"seed_{seed}", pairs_table(rounds, eta, alpha))]
        if toy and "--preferences" not in data:
            runs.append((f"summary_{seed}", summary_table(rounds)))
        for run, table in runs:
            for directories, purpose, seconds, command in table:
                script, *flags = command.format(**words, seed=seed).split()
                flags += [*data, "--seed", str(seed)] if script == "00_data.py" else []
                todo.append((f"{args.out}/{run}", directories, purpose, seconds, script, flags))
    return todo


def work(args, data):
    """Run what is not complete of the experiments, in this process."""
    todo = listed(args, data)
    if args.dry_run:
        for out, directories, purpose, _, script, flags in todo:
            command = shlex.join([script, *flags, "--out", out])
            print(f"{command}   # {name_of(directories)}: {purpose}")
        return
    if rank() == 0:
        left = [row for row in todo if not complete(row[0], row[1], row[5])]
        took = f"about {sum(row[3] for row in left) / 60:.0f} minutes on two idle cores" \
            if args.preset == "toy" and not args.limit else "a time that was not measured"
        log(f"{len(todo) - len(left)} of {len(todo)} stages are complete, the others take {took}")

    def run(i, out, directories, purpose, _, script, flags):
        sys.argv = [script, *flags, "--out", out]  # what the manifest records
        sys.argv += ["--debug"] * args.debug + ["--restart"] * args.restart
        log(f"\n== {i} of {len(todo)}, {out}/{name_of(directories)} ({purpose}): "
            f"{shlex.join(sys.argv)}")
        if rank() == 0:
            Path(out).mkdir(parents=True, exist_ok=True)
            with open(Path(out) / "commands.log", "a") as file:
                launcher = "python" if script == "00_data.py" else "deepspeed"
                file.write(shlex.join([launcher, *sys.argv]) + "\n")
        stage_of(script).main(sys.argv[1:])

    for i, row in enumerate(todo, 1):  # data are made by one process, before the others join it
        if row[4] == "00_data.py" and rank() == 0 and not complete(row[0], row[1], row[5]):
            run(i, *row)
    common.setup(SimpleNamespace(deterministic=False, seed=0, preset=args.preset, hparams={}))
    for i, row in enumerate(todo, 1):
        done = from_rank_0(lambda: complete(row[0], row[1], row[5]))  # noqa: B023
        if row[4] != "00_data.py" and not done:
            run(i, *row)
    log(f"all {len(todo)} stages are complete")


def parse(argv=None):
    """→ the flags of this file, the others, which are 00_data.py's."""
    parser = common.new_parser(__doc__, allow_abbrev=False, epilog="other flags go to 00_data.py")
    parser.error = lambda message: die(f"{message} (bash run_all.sh --help lists the flags)")
    flag = parser.add_argument
    flag("--out", default="out", help="run directory, or directory of the runs (default: out)")
    flag("--plan", action="store_true", help="of the pipeline: what run_all.sh is to do")
    flag("--from", dest="start", metavar="STAGE", help="with --plan: run this and all after it")
    flag("--to", metavar="STAGE", help="with --plan: nothing after this")
    flag("--clean", action="store_true", help="with --plan: the stages of `run_all.sh clean`")
    flag("--M", type=int, help="with --plan: reward models that vote (default: ten)")
    flag("--folds", type=int, help="with --plan: no model votes on what it trained on")
    flag("--texts", action="store_true", help="clean: show texts in doubtful.html")
    judges.add_flags(flag)
    flag("--seeds", type=int, help="seeds 0 to N-1 (default: 5)")
    flag("--rounds", type=int, help="MetaRM rounds (pipeline: 3, 4 in paper, 1 with --limit; "
         "experiments: 5, 2 with --limit)")
    flag("--preset", choices=CHOICES["preset"], help="as for 00_data.py")
    flag("--limit", type=int, help="as for 00_data.py: a smoke run")
    flag("--tensorboard", action="store_true", help="of the pipeline: metrics as event files too")
    flag("--dry_run", action="store_true", help="print the commands and run nothing")
    flag("--restart", action="store_true", help="begin an unfinished stage anew")
    flag("--debug", action="store_true", help="show the traceback of an error")
    flag("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    args, data = parser.parse_known_args(argv)
    data = [w for word in data for w in (word.split("=", 1) if word[:2] == "--" else [word])]
    for name in ("preset", "limit"):
        value = getattr(args, name)
        data += [f"--{name}", str(value)] if value is not None else []
    if args.texts and not args.clean:
        die("--texts goes with clean")
    if not args.plan and (args.tensorboard or args.clean):
        die("--tensorboard and --clean go with the pipeline")
    if not args.plan and (args.M, args.folds) != (None, None):
        die("--M and --folds go with the pipeline: the experiments have ten voters, and no folds")
    if not args.plan and any(getattr(args, name) is not None for name in judges.FLAGS):
        die("experiments are judged by gold, real data's by the ensemble: --judge goes with the "
            "pipeline")
    if args.plan and args.seeds is not None:
        die("--seeds goes with experiments")
    args.seeds = 5 if args.seeds is None else args.seeds
    if args.seeds < 1 or not args.plan and ("--seed" in data or args.start or args.to):
        die("experiments take --seeds N, for seeds 0 to N-1, and neither --from nor --to")
    if args.rounds is not None and args.rounds < (not args.plan):
        die("--rounds must be 1 or more: MetaRM beside the joint objective needs one")
    return args, data


def main():
    args, data = parse()
    if args.plan:
        for row in plan(args, data):
            print("\t".join(row))
    elif (Path(args.out) / "run.json").exists():
        die(f"{args.out} holds a single run: give the experiments another --out")
    else:
        args.preset = import_module("00_data").parse(data).preset
        work(args, data)


if __name__ == "__main__":
    common.launch(main)
