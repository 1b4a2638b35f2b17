"""Check a finished run, or one stage of it, by the bytes.

    python -m lab.verify DIR                  every hash, from the last stage back to the data
    python -m lab.verify DIR --replay STAGE   run STAGE again elsewhere and compare, hash by hash
"""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from lab.base import EVENTS, HERE, die, launch, new_parser, read_json, sha256
from lab.manifest import finished, head, in_order, other_inputs, read_manifest, recorded_flags

SCRIPT = r"(0\d_\w+|lab/(clean|ppo_reward|best_of_n|metarm_variants))\.py"  # of a stage
ROOT_FILES = {"run.json", "commands.log", ".lock", ".report_lock", ".run_all.lock"}  # no stage's
STAGE_DIR = re.compile(r"(clean|0[01389]_[^/]+|0[24567]_\w+/[^/]+)/")


def check_outputs(out, good, found):
    """Every recorded output has its hash, and no other file lies in the run."""
    recorded = {path: (name, value) for name, m in good.items()
                for path, value in m["outputs"].items()}
    actual = {path: sha256(out / path) for path in recorded if (out / path).is_file()}
    wrong = {path: actual.get(path) for path, (_, value) in recorded.items()
             if actual.get(path) != value}
    for path, value in wrong.items():
        name, expected = recorded[path]
        partner = next((p for p in wrong if recorded[p][1] == value and wrong[p] == expected), None)
        found[name].append(f"missing: {path}" if value is None else
                           f"swapped: {path} and {partner}" if partner else f"changed: {path}")
    for file in sorted(p for p in out.rglob("*") if p.is_file() or p.is_symlink()):
        path = str(file.relative_to(out))
        if path in recorded or path in ROOT_FILES or ".partial/" in path or \
                file.name.startswith(EVENTS):
            continue
        folder = (STAGE_DIR.match(path) or ["", ""])[1]
        broken = folder in found and folder not in good
        if folder in found or not folder:
            if path != f"{folder}/manifest.json" and not broken:
                found.setdefault(folder or ".", []).append(f"extra: {path}")
        elif f"missing: {folder}/manifest.json" not in found.setdefault(folder, []):
            found[folder].append(f"missing: {folder}/manifest.json")


def check_inputs(good, found):
    """Every input is the output of a stage with that hash, or a file of the user's own with it."""
    recorded = {path: value for m in good.values() for path, value in m["outputs"].items()}
    for name, manifest in good.items():
        for path, value in manifest["inputs"].items():
            folder = (STAGE_DIR.match(path) or ["", "00_data"])[1]
            if os.path.isabs(path):
                if not Path(path).is_file():
                    print(f"note: {path}, which {name} was made from, is not here to be checked")
                elif sha256(path) != value:
                    found[name].append(f"made from another {path}")
            elif path in recorded:
                if recorded[path] != value:
                    found[name].append(f"made from another {path}")
            elif folder in good:
                found[name].append(f"made from {path}, which {folder} does not have")
            elif folder not in found:
                found[folder] = [f"missing: {folder}, which {name} was made from"]


def verify(out):
    """Check a run directory, print a line a stage and its files at fault; → True if all holds."""
    if not finished(out):
        die(f"{out} holds no finished stage")
    manifests = {name: read_manifest(out, name) for name in finished(out)}
    good = {name: m for name, m in manifests.items() if m}
    found = {name: [] if m else [f"changed: {name}/manifest.json"] for name, m in manifests.items()}
    check_outputs(out, good, found)
    check_inputs(good, found)
    for name, manifest in good.items():
        for file, value in manifest["code"].items():
            if not (HERE / file).is_file() or sha256(HERE / file) != value:
                commit = manifest["git_commit"][:12] or "unknown"
                found[name].append(f"made by other code: {file} of commit {commit}" +
                                   ", uncommitted changes" * manifest["git_dirty"])
    order = in_order(good)[::-1]
    for name in order + [n for n in found if n not in order]:
        if found[name]:
            print(f"BAD  {name}  " + "; ".join(found[name]))
        else:
            resumed = "  (some steps by other code)" * ("code_before_resume" in good[name])
            print(f"ok   {name}  {len(good[name]['outputs'])} files{resumed}")
    if aside := sorted(str(p.relative_to(out)) for p in out.rglob("*.partial")):
        print(f"note: not part of the run: {', '.join(aside)}")
    bad = sum(map(bool, found.values()))
    print(f"{bad} of {len(found)} stages do not hold" if bad else f"all {len(found)} stages hold")
    print(f"head {head(good)}")
    return not bad


def replay(out, stage):
    """Run a recorded stage again from its recorded inputs in a scratch directory; → True if every
    output has the recorded hash (on a CPU, with as many processes, it should)."""
    names = [n for n in finished(out) if n == stage or n.startswith(f"{stage}/")]
    if not names:
        die(f"{out} has no finished stage {stage} (they are: {', '.join(finished(out))})")
    manifests = {n: read_json(out / n / "manifest.json") for n in names}
    for name, manifest in manifests.items():
        gone = [p for p in manifest["inputs"] if os.path.isabs(p) and not os.path.exists(p)]
        if other := [*other_inputs(out, manifest), *gone]:
            die(f"{out}/{name} was made from another {other[0]} than is here now")
    scratch = Path(tempfile.mkdtemp(prefix="replay-"))
    read = {STAGE_DIR.match(p)[1] for m in manifests.values() for p in m["inputs"]
            if STAGE_DIR.match(p)}
    for name in finished(out):
        if name not in names and (name in read or not name.startswith("06_ppo/")):  # 08 takes all
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).symlink_to((out / name).resolve())
    if "00_data" not in names:
        shutil.copy(out / "run.json", scratch / "run.json")
    commands = {}  # in order; one command may have made several of the directories
    for m in (manifests[n] for n in in_order(manifests)):
        if not re.fullmatch(SCRIPT, m["script"]):
            die(f"{m['stage']} was made by {m['script']}, which is no stage")
        commands[m["world_size"], HERE / m["script"], *recorded_flags(m)] = None
    for processes, *words in commands:
        command = [*(["deepspeed", "--num_gpus", str(processes)] if processes > 1 else
                     [sys.executable]), *map(str, words), "--out", str(scratch)]
        print(shlex.join(command), flush=True)
        if subprocess.run(command).returncode:
            die(f"the command failed; {scratch} is kept")
    same = True
    for name, manifest in manifests.items():
        path, old = scratch / name / "manifest.json", manifest["outputs"]
        new = read_json(path)["outputs"] if path.exists() else {}
        different = [p for p in sorted(old.keys() | new.keys()) if old.get(p) != new.get(p)]
        print(f"BAD  {name}  differs: {', '.join(different)}" if different else
              f"ok   {name}  {len(old)} files equal")
        same = same and not different
    shutil.rmtree(scratch) if same else print(f"the replay is kept in {scratch}")
    return same


def main(argv=None):
    parser = new_parser(__doc__, prog="python -m lab.verify")
    parser.add_argument("dir", type=Path, help="run directory")
    parser.add_argument("--replay", metavar="STAGE", help="04_rm_denoise, 07_metarm/round_2, ...")
    args = parser.parse_args(argv)
    if not args.dir.is_dir():
        die(f"{args.dir} is no directory")
    if args.replay:
        sys.exit(not replay(args.dir, args.replay.strip("/")))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    runs = [] if (args.dir / "run.json").exists() else sorted(  # of experiments
        p.parent for kind in ("seed", "summary") for p in args.dir.glob(f"{kind}_*/run.json"))
    sys.exit(not all([print(f"== {run}") or verify(run) for run in runs] or [verify(args.dir)]))


if __name__ == "__main__":
    launch(main)
