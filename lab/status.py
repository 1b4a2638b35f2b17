"""A line for every stage of a run directory: done, running or stopped (its step, the time left),
stale (and why), missing.

    bash run_all.sh status [--out DIR]        or: python -m lab.status [DIR]
"""
import fcntl
import signal
from pathlib import Path

from lab import checkpoint, experiments
from lab.base import die, launch, new_parser, read_json
from lab.manifest import read_manifest


def in_use(out):
    """Whether a process holds the run directory."""
    if not (out / ".lock").exists():
        return False
    with open(out / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def begun(folder):
    """How far an unfinished directory is, by its newest checkpoint."""
    made = checkpoint.newest(folder)
    if not made or not made["step"]:
        return "no checkpoint yet"
    left = (made["total"] - made["step"]) * made["seconds_a_step"] / 60
    return f"step {made['step']} of {made['total']} saved, {left:.1f} min from there"


def line(out, directories, purpose, working):
    """(name, state, what else there is to say) of a stage."""
    name = experiments.name_of(directories)
    if partial := [d for d in directories if (out / f"{d}.partial").exists()]:
        said = f"{partial[0]}: " * (len(directories) > 1) + begun(out / f"{partial[0]}.partial")
        return name, "running" if working else "stopped", said
    reason = experiments.why(out, directories)
    if reason:
        made = sum((out / d / "manifest.json").exists() for d in directories)
        some = f"{made} of {len(directories)} are there" if 0 < made < len(directories) else purpose
        return (name, "missing", some) if reason == "missing" else (name, "stale", f"it {reason}")
    seconds = sum(read_json(out / d / "manifest.json")["seconds"] for d in directories)
    return name, "done", f"{seconds / 60:.1f} min"


def stages(run):
    """(directories, purpose, ...) of each stage of a run directory, in order."""
    made = [int(p.name.removesuffix(".partial")[6:]) for p in run.glob("06_ppo/round_*")]
    info = read_json(run / "run.json")
    usual = experiments.usual_rounds(info["preset"], info["limit"])
    M = len({p.name.removesuffix(".partial") for p in run.glob("02_rm_ensemble/rm_*")})
    voted = read_manifest(run, "03_strength") or {"hyperparameters": {"M": M}}
    return experiments.pipeline(max([*made, usual]), max(M, voted["hyperparameters"]["M"], 1))


def main(argv=None):
    parser = new_parser(__doc__, prog="run_all.sh status")
    parser.add_argument("dir", type=Path, nargs="?", default=Path("out"))
    out = parser.parse_args(argv).dir
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    runs = [out] if (out / "run.json").exists() else sorted(
        path.parent for path in out.glob("*_*/run.json"))
    if not runs:
        die(f"{out} holds no run: bash run_all.sh --out {out} makes one")
    for run in runs:
        print(f"== {run}" * (len(runs) > 1), end="\n" * (len(runs) > 1))
        stale, working = None, in_use(run)
        for directories, purpose, *_ in stages(run):
            name, state, said = line(run, directories, purpose, working)
            if stale and state == "done":  # run_all.sh would run it again, too
                state, said = "stale", f"it comes after {stale}"
            stale = stale or (name if state == "stale" else None)
            print(f"{name:26} {state:8} {said}")


if __name__ == "__main__":
    launch(main)
