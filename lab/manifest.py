"""What finished stages wrote down, and whether what they were made from is still the same.

manifest.json names a stage's settings, code, inputs and outputs with their sha256. An input's hash
is the one in the manifest of the stage that wrote it; only `lab.verify` reads every byte again.
"""
import functools
import hashlib
import json
import os
import re
import shlex
from datetime import datetime
from pathlib import Path

from lab.base import die, from_rank_0, read_json, sha256

# what may differ between equal runs
UNNAMED = {"command", "start", "end", "seconds", "git_commit", "git_dirty", "hardware", "digest"}

def finished(out):
    """Names of the finished stages of a run directory."""
    found = [str(p.parent.relative_to(out)) for pattern in ("*/manifest.json", "*/*/manifest.json")
             for p in sorted(Path(out).glob(pattern))]
    return [name for name in found if not name.endswith(".partial")]


def maker(out, path):
    """Manifest file of the stage directory that a path of the run lies in."""
    place = Path(out) / ("00_data" if path == "run.json" else path)
    for folder in (place, *place.parents):
        if (folder / "manifest.json").exists():
            return folder / "manifest.json"
    die(f"{place} is missing: run the stage that makes it")


def hash_now(out, path, recorded=None, since=0.0):
    """sha256 of an input as it is now; None if it is gone. A file of the run has the hash that its
    stage wrote down, a user's own (absolute path) the one `recorded` at the time `since`: the bytes
    are read only where the file was written, replaced or moved here after that (its ctime)."""
    try:
        stat = os.stat(Path(out) / path)
    except OSError:
        return None
    if not os.path.isabs(path):
        file = maker(out, path)
        recorded, since = read_json(file)["outputs"].get(path), file.stat().st_ctime
    return sha256(Path(out) / path) if stat.st_ctime > since or recorded is None else recorded


def other_inputs(out, manifest):
    """Inputs of a finished stage that are no longer those it was made from. A user's own file that
    is gone is not missed: the run goes on without it."""
    since = datetime.fromisoformat(manifest["start"]).timestamp()
    now = {p: hash_now(out, p, value, since) for p, value in manifest["inputs"].items()}
    return [p for p, value in manifest["inputs"].items()
            if now[p] != value and not (os.path.isabs(p) and now[p] is None)]


def current(out, folder):
    """Names of a folder's finished stages that were made from what is here now, and of the others.
    """
    found = [name for name in finished(out) if name.startswith(f"{folder}/")]
    stale = {name for name in found
             if other_inputs(out, read_json(Path(out) / name / "manifest.json"))}
    return [name for name in found if name not in stale], sorted(stale)


def require(args, name, command):
    """Directory of a finished stage of this run; one line naming the command when it is not there,
    is not what its manifest says, or was made from other inputs than those that are here now."""
    path, mend = Path(args.out) / name, f"run `{command} --out {args.out}` first"
    if not (path / "manifest.json").exists():
        die(f"{path} is missing or unfinished: {mend}")
    manifest = read_json(path / "manifest.json")
    if manifest.get("stage") != name:
        die(f"{path} is a copy of {manifest.get('stage')}: {mend}")
    if other := from_rank_0(lambda: other_inputs(args.out, manifest)):
        die(f"{path} was made from another {other[0]} than is here now: {mend}")
    return path


def input_hashes(out, inputs):
    """{path: sha256} of the inputs: stage directories (without metrics.jsonl), files of the run,
    and absolute paths of the user's own files."""
    paths = ["run.json"] * any(not os.path.isabs(name) for name in inputs)
    for name in inputs:
        made = [] if os.path.isabs(name) else read_json(maker(out, name))["outputs"]
        paths += [p for p in made if p == name or p.startswith(f"{name}/") and
                  not p.endswith("/metrics.jsonl")]
        paths += [name] * os.path.isabs(name)
    hashes = {path: hash_now(out, path) for path in paths}
    if missing := [path for path, value in hashes.items() if value is None]:
        die(f"{Path(out) / missing[0]} is missing: run {missing[0].split('/')[0]} again")
    return hashes


def recorded_flags(manifest):
    """The recorded command's flags, without --out and those that change nothing."""
    given = [w for w in shlex.split(manifest["command"])[1:]
             if not w.startswith(("--local_rank", "--debug", "--restart", "--out="))]
    if "--out" in given:
        del given[given.index("--out"):given.index("--out") + 2]
    return given


def is_name(name):
    """A name that a directory of a stage with several models may have."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*", name)) and not name.endswith(".partial")


def canonical(manifest):
    """The manifest file's text for these values; `digest` is the hash of the text without it."""
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def hash_text(text):
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(manifest):
    return hash_text(canonical({k: v for k, v in manifest.items() if k != "digest"}))


def read_manifest(out, name):
    """A stage's manifest, or None if it is not, byte for byte, what was written for it here."""
    try:
        text = (out / name / "manifest.json").read_text(encoding="utf-8")
        manifest = json.loads(text)
        inputs = [p for p in manifest["inputs"] if not os.path.isabs(p)]
        ok = text == canonical(manifest) and manifest["digest"] == digest_of(manifest) \
            and manifest["stage"] == name and not any(
                os.path.isabs(p) or ".." in Path(p).parts for p in [*inputs, *manifest["outputs"]])
        return manifest if ok else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def in_order(manifests):
    """Stage names, each after the stages whose outputs it reads; the same wherever computed."""
    maker = {path: name for name, m in manifests.items() for path in m["outputs"]}

    @functools.cache
    def depth(name):
        makers = {maker[p] for p in manifests[name]["inputs"] if p in maker} - {name}
        return 1 + max(map(depth, makers), default=0)
    return sorted(manifests, key=lambda name: (depth(name), name))


def head(manifests):
    """One hash over all manifests in order, without what may differ between equal runs: command
    lines, times, git, the hardware's name, where the user's own files lie. The report is a view of
    the run, not a part of it."""
    text = ""
    for name in in_order({k: m for k, m in manifests.items() if k != "09_report"}):
        manifest = {k: v for k, v in manifests[name].items() if k not in UNNAMED}
        own = {p: value for p, value in manifest["inputs"].items() if os.path.isabs(p)}
        manifest["inputs"] = {p: v for p, v in manifest["inputs"].items() if p not in own}
        manifest |= {"own files": sorted((Path(p).name, v) for p, v in own.items())} if own else {}
        text += canonical(manifest)
    return hash_text(text)
