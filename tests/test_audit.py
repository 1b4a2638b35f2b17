"""Verification, replay, resume after kills and signals, determinism and bad input (see also
test_stages.py)."""
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CORES, PORT, ROOT, all_cores, launched, ranks, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lab import base, forks, manifest, record, verify

WORKER = [sys.executable, ROOT / "tests/pipeline_worker.py"]


def start(log, *command, processes=1):
    """A command in a session of its own, its output in a file."""
    return subprocess.Popen([str(c) for c in command], cwd=ROOT, stdout=open(log, "w"),
                            stderr=subprocess.STDOUT, start_new_session=True,
                            preexec_fn=all_cores if processes > 1 else None)


def wait_for(condition, process, seconds=90):
    """Poll until the condition holds; → False if the process ended before."""
    for _ in range(int(seconds / 0.05)):
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    raise AssertionError("waited too long")


def manifests_of(out):
    return {n: json.loads((out / n / "manifest.json").read_text()) for n in manifest.finished(out)}


def head(out):
    return manifest.head(manifests_of(out))


@pytest.fixture(scope="session")
def audited(tmp_path_factory):
    """An undisturbed run of the small pipeline."""
    out = tmp_path_factory.mktemp("audited") / "out"
    run(*WORKER, out)
    return out


@pytest.fixture
def copy(audited, tmp_path):
    return Path(shutil.copytree(audited, tmp_path / "out"))


# ---------------------------------------------------------------- kill and go on

def test_sigkill_at_six_moments_changes_nothing(audited, tmp_path):
    """In a step, in a checkpoint, in generation, between models: the end is that of the undisturbed
    run."""
    out, rng, hit, log = tmp_path / "out", random.Random(0), set(), tmp_path / "log"
    for name in ("01_sft", "02_rm_ensemble/rm_00", "04_rm_denoise/margin", "05_rm_contrastive/swav",
                 "06_ppo/round_0", "07_metarm/round_1"):
        process = start(log, *WORKER, out)
        begun = out / (name if name.endswith("margin") else f"{name}.partial")
        assert wait_for(begun.exists, process), log.read_text()[-2000:]
        if begun.suffix:  # somewhere in its first half, or as soon as it is complete
            time.sleep(rng.uniform(0, 0.5) * manifests_of(audited)[name]["seconds"])
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log.read_text()[-2000:]
        hit |= {
            str(p.relative_to(out))
            for pattern in ("*.partial", "*/*.partial")
            for p in out.glob(pattern)}
    run(*WORKER, out)
    print(f"unfinished after a kill: {sorted(hit)}")
    assert len(hit) >= 4
    assert head(out) == head(audited) and verify.verify(out)
    assert not [p for p in out.rglob("*") if p.name.endswith((".partial", ".tmp")) or
                p.name.startswith("checkpoint")]


@pytest.mark.parametrize("processes, cases",
                         [(1, [
                             "04_rm_denoise:0", "05_rm_contrastive:0", "06_ppo:0", "07_metarm:0",
                             "02_rm_ensemble:0", "01_sft:0"]),
                          (2, [
                              "04_rm_denoise:1", "05_rm_contrastive:2", "06_ppo:3", "07_metarm:0",
                              "07_metarm:2", "07_metarm:3", "01_sft:2"]),])
def test_resume_is_exact(run_copy, tmp_path, processes, cases):
    """Every training stage, ZeRO 0 to 3: cut off after step 4 of 5, half-written files lying
    about."""
    ranks(processes, "tests/resume_worker.py", tmp_path / "results.json", run_copy, *cases)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == cases
    for case, result in results.items():
        assert result["kept"] == [
            "checkpoint_4"] and result["files"] >= 3 and result["different"] == [], (case, result)


TRAIN = [
    "04_rm_denoise.py", "--methods", "margin", "--name", "mine", "--limit", 40, "--eval_every", 40,
    "--batch_size", 16]


def test_sigkill_of_two_processes(run_copy, tmp_path):
    """Launcher and both ranks die at once, in or after the second checkpoint."""
    flags = [*TRAIN, "--micro_batch_size", 8, "--save_every", 3, "--out", run_copy]
    log, partial = tmp_path / "log", run_copy / "04_rm_denoise/mine.partial"
    launcher = ["deepspeed", "--num_gpus", 2, "--master_port", PORT]
    process = start(log, *launcher, *flags, processes=2)
    assert wait_for(lambda: (partial / "checkpoint_6").exists(), process), log.read_text()[-2000:]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    step = max(int(p.name.split("_")[1]) for p in partial.glob("checkpoint_*"))
    text = launched(2, *flags).stdout
    killed = json.loads((run_copy / "04_rm_denoise/mine/manifest.json").read_text())["outputs"]
    assert f"goes on after step {step} of " in text and step >= 6
    launched(2, *flags, "--restart")
    undisturbed = json.loads((run_copy / "04_rm_denoise/mine/manifest.json").read_text())["outputs"]
    assert killed == undisturbed


def test_a_signal_stops_after_the_step_with_a_checkpoint(run_copy, tmp_path):
    command = [sys.executable, *TRAIN, "--out", run_copy]
    partial = run_copy / "04_rm_denoise/mine.partial"
    process = start(tmp_path / "log", *command)
    assert wait_for(lambda: list(partial.glob("checkpoint_*")), process)  # of step 20 of 40
    process.send_signal(signal.SIGINT)
    text = (tmp_path / "log").read_text() if process.wait() == record.STOPPED else ""
    assert re.search(r"stopped by SIGINT after step \d+ of \d+.*the same command goes on",
                     text), text
    assert len(list(
        partial.glob("checkpoint_*"))) == 1 and not (run_copy / "04_rm_denoise/mine").exists()
    # other hyperparameters, seed or world size are refused with the differences, and nothing is
    # lost
    refused = run(*command, "--lr", 0.01, "--seed", 7, check=False)
    line = refused.stdout.splitlines()[-1]
    assert refused.returncode == 2 and "--lr (0.001 then, 0.01 now)" in line
    assert "seed (0 then, 7 now)" in line
    assert "--restart" in line and list(partial.glob("checkpoint_*"))
    state = next(partial.glob("checkpoint_*/rm/*.pt"))  # damaged: a pickle that is not loaded
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    damaged = run(*command, check=False)
    assert damaged.returncode == 2 and state.name in damaged.stdout
    assert "is damaged" in damaged.stdout
    assert "goes on after step" not in run(*command, "--restart").stdout
    assert (run_copy / "04_rm_denoise/mine/manifest.json").exists()


@pytest.mark.skipif(len(CORES) < 2, reason="one core")
def test_a_fork_ends_as_python_does():
    def raises(error):
        raise error
    for work, code in ((lambda: None, 0), (lambda: raises(KeyboardInterrupt), 130),
                       (lambda: raises(ValueError), 1), *(
                           (lambda said=said: sys.exit(said), code) for said, code in (
                               (None, 0), (0, 0), (3, 3), ("no", 1), ("", 1), ([1], 1)))):
        _, status = os.waitpid(forks.fork(work), 0)
        assert os.waitstatus_to_exitcode(status) == code

    def unheard():  # nor does it go on with its parent's work where nothing can be said
        sys.stdout = sys.stderr = open(os.devnull)
        print("not writable")
    assert os.waitstatus_to_exitcode(os.waitpid(forks.fork(unheard), 0)[1]) == 1


def test_models_side_by_side_killed_and_stopped(small_run, run_copy, tmp_path):
    """Two processes, a core each, make what one makes on one core. Neither outlives a SIGKILL of
    the first, and its SIGTERM stops both after a checkpoint."""
    command = [
        sys.executable, "04_rm_denoise.py", "--methods", "flip", "margin", "flip", "--epochs", 5,
        "--batch_size", 16, "--eval_every", 200, "--save_every", 10, "--tensorboard", "--out"]
    alone, mine = shutil.copytree(small_run, tmp_path / "alone"), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    run(*command, alone)
    os.sched_setaffinity(0, mine)
    folders, log = [run_copy / "04_rm_denoise" / m for m in ("flip", "margin")], tmp_path / "log"
    process = start(log, *command, run_copy, processes=2)
    assert wait_for(lambda: all(list(f.parent.glob(f"{f.name}.partial/checkpoint_*"))
                                for f in folders), process), log.read_text()[-2000:]
    process.kill(), process.wait()
    process = start(log, *command, run_copy, processes=2)
    assert wait_for(lambda: log.read_text().count("goes on after step") == 2, process)
    process.terminate()
    assert process.wait() == record.STOPPED and log.read_text().count("stopped by SIGTERM") == 2
    assert run(*command, run_copy, processes=2).stdout.count("goes on after step") == 2
    for name, folder in zip(("flip", "margin"), folders):
        outputs = [json.loads((out / "04_rm_denoise" / name / "manifest.json").read_text())[
            "outputs"] for out in (alone, run_copy)]
        assert outputs[0] == outputs[1]
        events = EventAccumulator(str(folder)).Reload().Scalars("accuracy_original")
        steps = [json.loads(line)["step"] for line in open(folder / "metrics.jsonl")]
        # of three processes, as one: the start and each epoch's end
        assert [e.step for e in events] == steps and len(steps) == 6


def test_the_driver_passes_a_signal_on(copy, tmp_path):
    """SIGTERM to run_all.sh while a model trains: the stage stops, exit code 75, the command to go
    on is printed."""
    shutil.rmtree(copy / "02_rm_ensemble/rm_01")
    command = ["bash", "run_all.sh", "--out", copy, "--rounds", 1]
    process = start(tmp_path / "log", *command)
    pattern = "02_rm_ensemble/rm_0?.partial/checkpoint_*"
    assert wait_for(lambda: list(copy.glob(pattern)), process), \
        (tmp_path / "log").read_text()[-2000:]
    for _ in "ab":  # as `timeout` sends it: to its child and to its group
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    code, text = process.wait(), (tmp_path / "log").read_text()
    assert "stopped by SIGTERM" in text and "interrupted" not in text
    assert code == 75 and f"go on with: bash run_all.sh --out {copy} --rounds 1" in text, text[
        -2000:]
    assert not (copy / "02_rm_ensemble/rm_09").exists()  # it did not run to its end


# ---------------------------------------------------------------- one at a time, and what stops a
# run

def test_a_second_process_is_refused_while_one_works(copy):
    import fcntl
    with open(copy / ".lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write("4711")
        file.flush()
        done = run(sys.executable, "03_strength.py", "--M", 2, "--out", copy, check=False)
        lines = [x for x in done.stdout.splitlines() if "error" in x]
        assert done.returncode == 2 and len(lines) == 1 and "in use by process 4711" in lines[0]
    assert not list(copy.rglob("*.partial"))


BAD_RUN = """
import importlib, json, os, sys
from pathlib import Path
import common
from lab import base, manifest, record, verify
out = sys.argv[1]
def go(name, *flags):
    sys.argv = [name + ".py"]
    try: record.launch(lambda: importlib.import_module(name).main(["--out", out, *flags]))
    except SystemExit as stop: return stop.code
    return 0
"""


def python(code, *argv):
    return run(sys.executable, "-c", BAD_RUN + code, *argv, check=False)


def test_a_non_finite_loss_stops_with_the_ids(run_copy):
    """The reward turns NaN at step 4: the checkpoint of step 3 stays, the batch is written down,
    one line is printed."""
    done = python("""
import torch
denoise, calls = importlib.import_module("04_rm_denoise"), []
loss = denoise.preference_loss
def poisoned(*args):
    calls.append(1)
    return loss(*args) * (float("nan") if len(calls) == 4 else 1)
denoise.preference_loss = poisoned
print("CODE", go("04_rm_denoise", "--methods", "margin", "--limit", "10", "--save_every", "3",
                 "--eval_every", "4"))  # the model of that step is not evaluated
""", run_copy)
    partial = run_copy / "04_rm_denoise/margin.partial"
    lines = [x for x in done.stdout.splitlines() if x.startswith("error: ")]
    assert "CODE 2" in done.stdout and len(
        lines) == 1 and "Traceback" not in done.stdout, done.stdout[-3000:]
    assert "04_rm_denoise/margin step 4" in lines[0] and "loss nan" in lines[
        0] and "bad_batch.jsonl" in lines[0]
    bad = json.loads((partial / "bad_batch.jsonl").read_text())
    ids = {
        json.loads(x)["id"]
        for x in (run_copy / "03_strength/train.jsonl").read_text().splitlines()}
    assert bad["step"] == 4 and len(bad["ids"]) == 32 and set(bad["ids"]) <= ids
    assert (partial / "checkpoint_3/checkpoint.json").exists()


def test_a_non_finite_number_names_the_ids_of_both_of_07s_sets(tmp_path, capsys):
    args = SimpleNamespace(out=tmp_path, preset="toy", seed=0, limit=None, layout="auto",
                           deterministic=False, hparams={}, restart=False, save_every=10)
    stage = record.begin(args, "07_metarm/x")
    try:
        with pytest.raises(SystemExit):
            for _ in stage.steps([([{"id": "a"}], [{"id": "b"}])]):
                stage.note(loss=float("nan"))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        record.open_stages.clear()
    assert "loss nan is not finite" in capsys.readouterr().err
    assert json.loads((stage.dir / "bad_batch.jsonl").read_text())["ids"] == ["a", "b"]


def test_a_full_disk_is_one_line_and_finished_stages_stay(copy):
    done = python("""
import errno
write = base.write_text
def full(path, text):
    if "03_strength.partial" in str(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    write(path, text)
base.write_text = full
print("CODE", go("03_strength", "--M", "2"))
""", copy)
    lines = [x for x in done.stdout.splitlines() if x.startswith("error: ")]
    assert "CODE 2" in done.stdout and len(
        lines) == 1 and "No space left on device" in lines[0], done.stdout[-2000:]
    assert "Traceback" not in done.stdout and not (copy / "03_strength.partial").exists()
    assert verify.verify(copy)


# ---------------------------------------------------------------- verify

def test_verify_holds_and_prints_the_head(audited):
    done = run(sys.executable, "-m", "lab.verify", audited)
    lines = done.stdout.splitlines()
    names = manifest.finished(audited)
    assert len([x for x in lines if x.startswith("ok ")]) == len(names) >= 16
    # back to the data
    assert lines[0].split()[1] == "08_evaluate" and lines[len(names) - 1].split()[1] == "00_data"
    assert lines[-2] == f"all {len(names)} stages hold" and lines[-1] == f"head {head(audited)}"


def kinds(out):
    """One file of each kind: by name, or by suffix where the name is a number."""
    found = {}
    for path in sorted(p for p in out.rglob("*")
                       if p.is_file() and p.name not in verify.ROOT_FILES - {"run.json"}):
        found.setdefault(path.name if path.suffix != ".png" else path.suffix, path)
    return list(found.values())


def bad_lines(out, capsys):
    capsys.readouterr()
    holds = verify.verify(out)
    text = capsys.readouterr().out
    lines = [x for x in text.splitlines() if x.startswith("BAD")]
    assert holds == (not lines)
    return " | ".join(lines)


def test_every_kind_of_tampering_is_named(copy, capsys):
    """One byte flipped, a file deleted, one added, two swapped: verify names exactly that file, and
    holds again after."""
    paths = kinds(copy)
    assert len(paths) >= 15
    tampered = 0
    for path in paths:
        name, data = str(path.relative_to(copy)), path.read_bytes()
        for position in {0, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1:])
            assert bad_lines(copy, capsys).split("  ", 2)[2] == f"changed: {name}", name
            tampered += 1
        path.unlink()
        folder = "00_data" if name == "run.json" else str(path.parent.relative_to(copy))
        assert bad_lines(copy, capsys) == f"BAD  {folder}  missing: {name}"
        path.write_bytes(data)
        extra = path.with_name("extra_" + path.name)
        extra.write_bytes(data)
        folder = "." if name == "run.json" else folder
        assert bad_lines(copy, capsys) == f"BAD  {folder}  extra: {extra.relative_to(copy)}"
        extra.unlink()
    assert bad_lines(copy, capsys) == "" and tampered >= 40


@pytest.mark.parametrize("a, b", [
    ("02_rm_ensemble/rm_00/model.safetensors", "02_rm_ensemble/rm_01/model.safetensors"),
    ("00_data/train.jsonl", "00_data/valid.jsonl"),
    ("06_ppo/round_0/metrics.jsonl", "06_ppo/round_1/metrics.jsonl"),
    ("04_rm_denoise/flip/manifest.json", "04_rm_denoise/margin/manifest.json"),])
def test_swapped_files_are_named(copy, capsys, a, b):
    x, y = (copy / a).read_bytes(), (copy / b).read_bytes()
    (copy / a).write_bytes(y), (copy / b).write_bytes(x)
    text = bad_lines(copy, capsys)
    assert a in text and b in text and len(re.findall(r"[\w/]+\.(?:json|jsonl|safetensors)\b",
                                                      text)) in (2, 4)


def test_a_missing_stage_other_code_and_paths_outside_are_named(copy, capsys):
    shutil.move(copy / "03_strength", copy.parent / "elsewhere")
    assert "missing: 03_strength" in bad_lines(copy, capsys)
    shutil.move(copy.parent / "elsewhere", copy / "03_strength")
    path = copy / "01_sft/manifest.json"
    for change, words in (({"code": {"01_sft.py": "0" * 64}},
                           "made by other code: 01_sft.py of commit"),
                          ({"outputs": {"../../etc/passwd": "0" * 64}},
                           "changed: 01_sft/manifest.json")):
        text, found = path.read_text(), json.loads(path.read_text())
        found |= change
        path.write_text(manifest.canonical({**found, "digest": manifest.digest_of(found)}))
        assert words in bad_lines(copy, capsys)
        path.write_text(text)
    assert bad_lines(copy, capsys) == ""


def test_a_file_written_or_moved_after_its_manifest_is_read_again(copy, monkeypatch):
    """An input's hash is its manifest's, without a look at the bytes, unless the file is younger:
    edited under its old size and mtime, or another moved to its place."""
    name = "01_sft/model.safetensors"
    path, record_ = copy / name, copy / "01_sft/manifest.json"
    record_.write_text(record_.read_text())  # younger than the copies of the files
    known = json.loads(record_.read_text())["outputs"][name]
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "sha256", None)
        assert manifest.hash_now(copy, name) == known
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert manifest.hash_now(copy, name) == base.sha256(path) != known
    shutil.move(copy / "02_rm_ensemble/rm_00/model.safetensors", path)
    assert manifest.hash_now(copy, name) == base.sha256(path)


# ---------------------------------------------------------------- replay, heads, changed inputs

def test_replay_of_every_stage(copy, tmp_path):
    """In one process instead of one each; a recorded hash that is not reproduced is named."""
    stages = sorted({
        n.split("/")[0] if n[:2] in ("02", "04", "05") else n for n in manifest.finished(copy)})
    done = python(f"""
import subprocess
def in_process(command):
    name = Path(command[1]).stem
    sys.argv = command[1:]
    importlib.import_module(name).main(command[2:])
    return subprocess.CompletedProcess(command, 0)
verify.subprocess = type("", (), {{"run": staticmethod(in_process)}})
for stage in {stages!r}:
    print("REPLAY", stage, verify.replay(Path(out), stage), flush=True)
path = Path(out, "03_strength/manifest.json")
m = json.loads(path.read_text())
m["outputs"]["03_strength/train.jsonl"] = "0" * 64
path.write_text(manifest.canonical({{**m, "digest": manifest.digest_of(m)}}))
print("REPLAY false", verify.replay(Path(out), "03_strength"))
""", copy)
    results = [x.split()[1:] for x in done.stdout.splitlines() if x.startswith("REPLAY")]
    assert results == [[s, "True"] for s in stages] + [["false", "False"]], done.stdout[-3000:]
    assert "BAD  03_strength  differs: 03_strength/train.jsonl" in done.stdout and len(stages) == 10


def test_replay_by_the_command(copy):
    done = run("bash", "run_all.sh", "replay", "--out", copy, "--stage", "02_rm_ensemble")
    assert [x for x in done.stdout.splitlines() if x.startswith(("ok", "BAD"))] == [
        f"ok   02_rm_ensemble/{n}  6 files equal" for n in ("rm_00", "rm_01")]
    done = run("bash", "run_all.sh", "replay", "--out", copy, "--stage", "02_rm", check=False)
    assert done.returncode == 2 and "no finished stage 02_rm" in done.stdout


def test_equal_runs_have_equal_heads_and_another_seed_has_not(audited, tmp_path):
    """The kill test has the second run in another directory; here the first stages with another
    seed differ."""
    code = "import sys; sys.argv = ['x', sys.argv[1], *sys.argv[2:]]\n" + (
        ROOT / "tests/pipeline_worker.py").read_text().replace(
            "for final, script, more in STAGES", "for final, script, more in STAGES[:3]")
    (tmp_path / "worker.py").write_text(code.replace("Path(__file__).parents[1]", f"{str(ROOT)!r}"))
    a, b = tmp_path / "a", tmp_path / "b"
    run(sys.executable, tmp_path / "worker.py", a), run(sys.executable, tmp_path / "worker.py", b,
                                                        "--seed", 1)
    full, other = manifests_of(a), manifests_of(b)
    whole = manifests_of(audited)
    assert manifest.head(full) == manifest.head({n: whole[n] for n in full}) != manifest.head(other)
    for name in full:  # the seed has an effect in every stage
        weights = f"{name}/model.safetensors" if name != "00_data" else "00_data/train.jsonl"
        if weights in full[name]["outputs"]:
            assert full[name]["outputs"][weights] != other[name]["outputs"][weights], name


def states(*flags):
    """{stage: run or skip} that lab/experiments.py has for the driver, and its notes."""
    text = run(sys.executable, "lab/experiments.py", "--plan", *flags).stdout
    rows = [line.split("\t") for line in text.splitlines()]
    return {row[1]: row[0] for row in rows if row[0] != "note"}, \
        [row[1] for row in rows if row[0] == "note"]


def test_a_changed_input_runs_what_was_made_from_it_again(copy):
    """The driver says which input; an old directory stays until the new one is complete."""
    for m in range(2, 10):  # the plan asks for ten voters
        shutil.copytree(copy / "02_rm_ensemble/rm_01", copy / f"02_rm_ensemble/rm_{m:02d}")
        path = copy / f"02_rm_ensemble/rm_{m:02d}/manifest.json"
        text = path.read_text().replace("rm_01", f"rm_{m:02d}")
        found = json.loads(text)
        path.write_text(manifest.canonical({**found, "digest": manifest.digest_of(found)}))
    assert set(states("--out", copy, "--rounds", 1, "--to", "08")[0].values()) == {"skip"}
    path = copy / "00_data/prompts.jsonl"  # an input of 06 and 07 only
    path.write_text("".join(path.read_text().splitlines(True)[1:]))
    done = run("bash", "run_all.sh", "--out", copy, "--rounds", 1, "--to", "08")
    assert "06_ppo/round_0 was made from another 00_data/prompts.jsonl than is here now: it runs " \
        "again" in done.stdout
    assert "04_rm_denoise is complete, skipped" in done.stdout
    assert done.stdout.count("minutes taken") == 4
    assert set(states("--out", copy, "--rounds", 1, "--to", "08")[0].values()) == {"skip"}
    text = run(sys.executable, "-m", "lab.verify", copy, check=False).stdout
    assert "changed: 00_data/prompts.jsonl" in text


def test_a_replay_writes_nothing_into_the_run(copy, tmp_path):
    """A sibling that the replayed command trains again takes its link's place; a manifest that
    names another script than a stage is not followed."""
    scratch, made = tmp_path / "scratch", copy / "04_rm_denoise"
    names = sorted(os.listdir(made))
    (scratch / "04_rm_denoise").mkdir(parents=True)
    new, link = (scratch / f"04_rm_denoise/{names[0]}{end}" for end in (".partial", ""))
    shutil.copytree(made / names[0], new), link.symlink_to(made / names[0])
    before = manifests_of(copy)
    record.promote(new)
    assert not link.is_symlink() and (link / "manifest.json").exists()
    assert manifests_of(copy) == before
    path = copy / "03_strength/manifest.json"
    for script in ("/tmp/x.py", "../x.py", "tests/conftest.py"):
        found = json.loads(path.read_text()) | {"script": script}
        path.write_text(manifest.canonical({**found, "digest": manifest.digest_of(found)}))
        done = run(sys.executable, "-m", "lab.verify", copy, "--replay", "03_strength", check=False)
        assert done.returncode == 2 and "is no stage" in done.stdout


def test_metrics_end_where_a_checkpoint_was_written(tmp_path):
    """Gone on from, and checkpointed again before the next line: nothing is behind the old end."""
    args = SimpleNamespace(out=tmp_path, preset="toy", seed=0, limit=None, layout="auto",
                           deterministic=False, hparams={}, restart=False)
    first = record.Stage(args, "01_sft", "01_sft.py")
    settings, _ = first.open((), False)
    with first.metrics_file as file:
        file.write("one\ntwo\n")
    (folder := first.dir / "checkpoint_1").mkdir()
    (folder / "checkpoint.json").write_text(json.dumps(
        {"step": 1, "settings": settings, "metrics_bytes": 4, "state": {}}))
    again = record.Stage(args, "01_sft", "01_sft.py")
    again.open((), False)
    assert again.metrics_file.tell() == 4
    again.metrics_file.close()
    assert (first.dir / "metrics.jsonl").read_text() == "one\n"


def test_the_head_has_every_own_file_and_no_place(copy):
    """Two files of one name, as HH has them, are two."""
    found = manifests_of(copy)

    def head_of(**files):
        made = found["00_data"] | {"inputs": {f"/{k}/train.jsonl": v for k, v in files.items()}}
        return manifest.head(found | {"00_data": made})
    assert head_of(a="1", b="2") == head_of(c="1", d="2") != head_of(a="3", b="2")
    assert head_of() == manifest.head(found)


def test_a_directory_killed_before_its_last_rename_counts_as_complete(copy):
    (copy / "08_evaluate").rename(copy / "08_evaluate.partial")
    states("--out", copy)
    assert (copy / "08_evaluate/manifest.json").exists()


def test_the_users_own_files_and_model_are_inputs(small_run, tmp_path, capsys, monkeypatch):
    """Rows of --preferences edited, a file put beside them, weights of a local --model changed: the
    driver runs what was made from them again, verify and replay name them; gone, they are not
    missed."""
    rows = [json.loads(line) for line in (small_run / "00_data/train.jsonl").open()][:60]
    own, model, out = tmp_path / "own/rows.jsonl", tmp_path / "model", tmp_path / "out"
    own.parent.mkdir()
    own.write_text("".join(json.dumps({k: r[k] for k in ("prompt", "chosen", "rejected")}) + "\n"
                           for r in rows))
    shutil.copytree(small_run / "01_sft", model)
    flags = ["--preferences", own.parent, "--model", model, "--limit", 1]
    for stage in (["00_data.py", *flags], ["01_sft.py"]):
        run(sys.executable, *stage, "--out", out)
    given = [*flags, "--out", f"{out}/../out/"]  # the same flags, spelt in another way
    assert list(states(*given)[0].items())[:3] == [
        ("00_data", "skip"), ("01_sft", "skip"), ("02_rm_ensemble", "run")]
    recorded = json.loads((out / "00_data/manifest.json").read_text())["inputs"]
    assert recorded[str(own)] == base.sha256(own) and str(model / "tokenizer.json") in recorded
    assert bad_lines(out, capsys) == ""
    weights = model / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    planned, notes = states("--out", out)
    assert planned["00_data"] == "skip" and planned["01_sft"] == "run"
    assert notes == [f"01_sft was made from another {weights} than is here now: it runs again, "
                     "and all after it"]
    assert bad_lines(out, capsys) == f"BAD  01_sft  made from another {weights}"
    done = run(sys.executable, "-m", "lab.verify", out, "--replay", "01_sft", check=False)
    assert done.returncode == 2 and f"made from another {weights}" in done.stdout
    weights.write_bytes(data)
    (own.parent / "notes.txt").write_text("not read")
    assert states("--out", out)[0]["00_data"] == "skip"
    shutil.copy(own, more := own.with_name("more.jsonl"))
    planned, notes = states("--out", out)
    assert planned["00_data"] == "run" and f"was made without {more}, which is there" in notes[0]
    more.unlink()
    from lab import experiments
    assert experiments.why(out, ["00_data"]) is None
    with monkeypatch.context() as moved:  # a relative --preferences in a project that was moved
        moved.setattr(experiments.sources, "files", lambda s: [str(tmp_path / "moved/rows.jsonl")])
        assert experiments.why(out, ["00_data"]) is None
    with own.open("a") as file:
        file.write(json.dumps({"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}) + "\n")
    assert states("--out", out)[0]["00_data"] == "run"
    assert f"made from another {own}" in bad_lines(out, capsys)
    shutil.rmtree(own.parent)
    shutil.rmtree(model)
    assert list(states("--out", out)[0].values())[:2] == ["skip", "skip"]
    assert bad_lines(out, capsys) == "" and manifest.finished(out)
    done = run("bash", "run_all.sh", "--limit", 2, "--out", out, check=False)
    assert done.returncode == 2 and "--limit (1 then, 2 now)" in done.stdout


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("stage, flags, words", [
    ("00_data", ["--n_pairs", "1"], ["1 pairs"]),
    ("00_data", ["--n_pairs", "many"], ["--n_pairs", "--help"]),
    ("00_data", ["--limit", "0"], ["--limit"]),
    ("00_data", ["--preferences", "missing.jsonl"], ["missing.jsonl is no file"]),
    ("01_sft", ["--lr", "nan"], ["--lr must be above 0"]),
    ("01_sft", ["--batchsize", "3"], ["--batchsize", "--help"]),
    ("02_rm_ensemble", ["--zero", "4"], ["--zero", "invalid choice"]),
    ("07_metarm", ["--round", "3"], ["06_ppo.py --round 2"]),
    ("06_ppo", ["--round", "3"], ["06_ppo.py --round 2"]),
    ("06_ppo", ["--rm", "nothing"], ["no finished reward model nothing"]),
    ("04_rm_denoise", ["--methods", "magic"], ["invalid choice: 'magic'"]),])
def test_bad_flags_of_a_stage_are_one_line(copy, stage, flags, words, capsys):
    from importlib import import_module
    before = {
        p: p.stat().st_mtime_ns
        for p in copy.rglob("*")
        if p.is_file() and p.name not in verify.ROOT_FILES}
    with pytest.raises(SystemExit) as stop:
        record.launch(lambda: import_module(stage).main(["--out", str(copy), *flags]))
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert all(word in lines[0] for word in words), lines[0]
    assert before == {
        p: p.stat().st_mtime_ns
        for p in copy.rglob("*")
        if p.is_file() and p.name not in verify.ROOT_FILES}


def test_bad_models_and_stages_are_one_line(copy, tmp_path):
    """Models that cannot work and previous stages that are not what they say, each refused; the run
    stays as it was."""
    done = python(
        """
import contextlib, io, shutil
import deepspeed, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
import torch
before, tmp = Path(out), Path(sys.argv[2])
KEPT = {"samples.jsonl", "metrics.jsonl", "checkpoint.json", "random_0.json"}  # what 07 has drawn
def case(name, stage="00_data", *flags, model=None):
    global out
    out = str(tmp / name)
    if not Path(out).exists(): shutil.copytree(before, out)
    if model is not None:
        flags = ["--model", str(model), "--max_prompt_tokens", "80"]
    stamps = lambda: {p: p.stat().st_mtime_ns for p in Path(out).rglob("*")
                      if p.is_file() and p.name not in verify.ROOT_FILES
                      and (p.name not in KEPT or "07_metarm/round_1.partial" not in str(p))}
    old = stamps()
    error = io.StringIO()
    with contextlib.redirect_stderr(error): code = go(stage, *flags)
    same = old == stamps()
    lines = [x for x in error.getvalue().splitlines() if "error:" in x or "Traceback" in x]
    print("CASE", json.dumps([name, code, same, lines]), flush=True)
    record.open_stages.clear()

def policy(name, change=None, vocabulary=None, context=4096):
    tokenizer = AutoTokenizer.from_pretrained(before / "01_sft")
    if change: change(tokenizer)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary or len(tokenizer), hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=context
        )).save_pretrained(tmp / name)
    tokenizer.save_pretrained(tmp / name)
    return tmp / name

case("reward model as policy", model=before / "04_rm_denoise/baseline")
case("no eos", model=policy("m1", lambda t: setattr(t, "eos_token", None)))
case("vocabulary", model=policy("m2", vocabulary=100))
case("context", model=policy("m3", context=64))
case("no such model", model=tmp / "nowhere")
case("hub without network", model="owner/name")
pickled = policy("m4")
state = AutoModelForCausalLM.from_pretrained(pickled).state_dict()
torch.save(state, pickled / "pytorch_model.bin")
(pickled / "model.safetensors").unlink()
case("pickled", model=pickled)
name = "policy as reward model"
shutil.copytree(before, tmp / name)
for file in (tmp / name / "01_sft").iterdir():
    if file.name != "manifest.json":
        shutil.copy(file, tmp / name / "04_rm_denoise/baseline" / file.name)
case(name, "06_ppo", "--round", "0")
name = "a copy"
shutil.copytree(before, tmp / name)
shutil.rmtree(tmp / name / "04_rm_denoise/flip")
shutil.copytree(before / "04_rm_denoise/margin", tmp / name / "04_rm_denoise/flip")
case(name, "06_ppo", "--rm", "flip")
name = "of another run"
shutil.copytree(before, tmp / name)
with open(tmp / name / "02_rm_ensemble/rm_01/model.safetensors", "ab") as file: file.write(b" ")
case(name, "04_rm_denoise")
name = "malformed row"
shutil.copytree(before, tmp / name)
with open(tmp / name / "00_data/train.jsonl", "a") as file: file.write("{half")
case(name, "02_rm_ensemble")
name = "damaged manifest"
shutil.copytree(before, tmp / name)
(tmp / name / "01_sft/manifest.json").write_text("{")
case(name, "02_rm_ensemble")
name = "damaged run.json"
shutil.copytree(before, tmp / name)
(tmp / name / "run.json").write_text("")
case(name, "02_rm_ensemble")
name = "input deleted"
shutil.copytree(before, tmp / name)
(tmp / name / "01_sft/model.safetensors").unlink()
case(name, "02_rm_ensemble")
def full(*args, **more): raise OSError(28, "No space left on device")
def train(*args): raise SystemExit("trained before it was known that the model can be saved")
transformers.PreTrainedModel.save_pretrained, deepspeed.DeepSpeedEngine.step = full, train
for stage, *flags in (["02_rm_ensemble", "--M", "2"], ["04_rm_denoise", "--methods", "flip"],
                      ["05_rm_contrastive", "--methods", "swav"], ["06_ppo", "--round", "0"],
                      ["07_metarm", "--round", "1", "--meta_prompts", "16"], ["01_sft"]):
    case("disk full", stage, *flags, "--restart")
""", copy, tmp_path)
    cases = [json.loads(x[5:]) for x in done.stdout.splitlines() if x.startswith("CASE ")]
    words = {
        "reward model as policy": ["is a LlamaForSequenceClassification"
                                   ], "no eos": ["no EOS token"], "vocabulary": ["vocabulary"],
        "context": ["64", "--max_prompt_tokens"], "no such model": ["nowhere"],
        "hub without network": ["owner/name"], "pickled": ["m4"],
        "policy as reward model": ["LlamaForCausalLM", "04_rm_denoise/baseline"],
        "a copy": ["is a copy of 04_rm_denoise/margin"], "of another run": [
            "03_strength was made from another 02_rm_ensemble/rm_01/model.safetensors",
            "python 03_strength.py"], "malformed row": ["train.jsonl:"],
        "damaged manifest": ["01_sft/manifest.json is damaged"],
        "damaged run.json": ["run.json is damaged"], "input deleted": ["01_sft/model.safetensors"],
        "disk full": ["No space left on device"]}
    assert [c[0] for c in cases] == [*words, *["disk full"] * 5], done.stdout[-3000:]
    for name, code, same, lines in cases:
        assert code == 2 and same and len(lines) == 1 and lines[0].startswith("error: "), (name,
                                                                                           code,
                                                                                           same,
                                                                                           lines)
        assert all(word in lines[0] for word in words[name]), (name, lines)


def test_debug_shows_the_traceback(tmp_path):
    (tmp_path / "out").write_text("a file where the run directory should be")
    done = run(sys.executable, "00_data.py", "--out", tmp_path / "out", "--n_pairs", 20,
               check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert "out" in done.stdout.splitlines()[-1]
    done = run(sys.executable, "00_data.py", "--out", tmp_path / "out", "--n_pairs", 20, "--debug",
               check=False)
    assert "Traceback" in done.stdout


def test_an_error_on_two_processes_is_one_line_and_none_hangs(run_copy):
    """All ranks find the error; one speaks. An exception on rank 1 alone is told by rank 1."""
    begin = time.time()
    done = run("deepspeed", "--num_gpus", 2, "--master_port", PORT, "06_ppo.py", "--out", run_copy,
               "--rm", "none", check=False)
    assert done.returncode == 2 and sum("error: no finished" in x
                                        for x in done.stdout.splitlines()) == 1
    done = run("deepspeed", "--num_gpus", 2, "--master_port", PORT, "04_rm_denoise.py", "--out",
               run_copy, "--methods", "margin", "--batch_size", 15, check=False)
    lines = [x for x in done.stdout.splitlines() if x.startswith("error: ")]
    assert done.returncode == 2 and len(
        lines) == 1 and "does not split evenly over 2 processes" in lines[0]
    assert "Traceback" not in done.stdout and time.time() - begin < 90


def test_status_says_what_is_done_stopped_stale_and_missing(run_copy):
    """A line a stage, while another process holds the directory too; nothing is changed."""
    before = {p: p.stat().st_mtime_ns for p in run_copy.rglob("*") if p.is_file()}

    def status():
        lines = run("bash", "run_all.sh", "status", "--out", run_copy).stdout.splitlines()
        return {line.split()[0]: line.split(None, 2)[1:] for line in lines}
    first = status()
    assert {s[0] for n, s in first.items() if n[:2] in ("00", "01", "02", "03")} == {"done"}
    assert first["04_rm_denoise"] == ["missing", "1 of 5 are there"]
    assert first["06_ppo/round_0"][0] == "done" and first["06_ppo/round_3"][0] == "missing"
    unread, end = os.pipe()  # as by `| head`, which reads no more
    os.close(unread)
    done = subprocess.run([sys.executable, "-m", "lab.status", run_copy], cwd=ROOT, stdout=end,
                          stderr=subprocess.PIPE)
    os.close(end)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")
    assert {p: p.stat().st_mtime_ns for p in before} == before
    shutil.move(run_copy / "02_rm_ensemble/rm_01", run_copy / "aside")
    gone = status()
    assert gone["02_rm_ensemble"] == ["missing", "1 of 2 are there"]
    assert gone["03_strength"][0] == "stale" and gone["03_strength"][1].endswith("which is gone")
    shutil.move(run_copy / "aside", run_copy / "02_rm_ensemble/rm_01")
    assert status() == first
    folder = run_copy / "07_metarm/round_1.partial/checkpoint_30"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text(json.dumps(
        {"step": 30, "total": 90, "seconds_a_step": 2.0}))
    (run_copy / "00_data/prompts.jsonl").touch()
    with open(run_copy / "00_data/prompts.jsonl", "a") as file:
        file.write("\n")
    changed = status()
    assert changed["07_metarm/round_1"] == [
        "stopped", "step 30 of 90 saved, 2.0 min from there"]
    state, reason = changed["06_ppo/round_0"]
    assert state == "stale" and "prompts.jsonl" in reason
    with open(run_copy / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert status()["07_metarm/round_1"][0] == "running"
