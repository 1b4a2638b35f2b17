"""Tests import the numbered stages from the repository's root and never touch the network."""
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
PORT = 29731 + WORKER
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
if CORES and "PYTEST_XDIST_WORKER" in os.environ:  # before torch counts them
    os.sched_setaffinity(0, {CORES[WORKER % len(CORES)]})


# the longest first, or one worker waits for the other at the end
LONGEST = ["test_audit", "test_report", "test_pipeline", "test_metarm", "test_models",
           "test_paper_preset", "test_stages", "test_judges"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST
               else len(LONGEST))


def all_cores():
    """In a child that is several processes: they spin while they wait for each other."""
    if CORES:
        os.sched_setaffinity(0, CORES)


@functools.cache
def can_fork():
    import torch  # a process that has asked for CUDA has it in no fork
    return sys.platform == "linux" and not torch.cuda.is_available()


@functools.cache
def server():
    """tests/warm.py, and the file for what its forks print."""
    return subprocess.Popen(
        [sys.executable, ROOT / "tests/warm.py"], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE), tempfile.NamedTemporaryFile()


def forked(words, environment, n=0):
    """The exit code and the output of a Python command, or of n ranks of it, by tests/warm.py."""
    process, log = server()
    request = json.dumps([list(map(str, words)), environment, log.name, n])
    print(request, file=process.stdin, flush=True)
    code = process.stdout.readline()
    assert code, "tests/warm.py has ended: its error is above"
    return int(code), Path(log.name).read_text(errors="replace")


def run(*command, check=True, processes=1):
    """Run a command in the repository's root; its output is shown when it fails. Python's and
    run_all.sh's are forks of tests/warm.py, where that can be, unless `env` stands before them or
    processes > 1."""
    command = [str(c) for c in command]
    if command[:2] == ["bash", "run_all.sh"]:
        command[:2] = ["python", "lab/driver.py"]  # to which it comes down
    if command[0] in ("python", sys.executable) and processes == 1 and can_fork():
        done = subprocess.CompletedProcess(command, *forked(command[1:], {**os.environ}))
    else:
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT,
                              preexec_fn=all_cores if processes > 1 else None)
    assert not check or done.returncode == 0, \
        f"{command} exited {done.returncode}\n{done.stdout[-6000:]}"
    return done


def launched(processes, script, *flags):
    """A stage through the real launcher, on a port of this worker's own."""
    return run("deepspeed", "--num_gpus", processes, "--master_port", PORT, script, *flags,
               processes=processes)


def ranks(processes, script, *flags):
    """A stage in several processes on a port of this worker's own, as the launcher makes them,
    whose own start would take ten seconds. → the output"""
    if not can_fork():
        return launched(processes, script, *flags).stdout
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}
    code, text = forked([script, *flags], {**os.environ, **address}, processes)
    assert code == 0, f"{script} {flags} exited {code}\n{text[-6000:]}"
    return text


def python_stages(*commands):
    """Several stages in one Python process: one start-up instead of one each."""
    code = "import importlib, sys\n" + "".join(
        f"importlib.import_module({c[0]!r}).main({[str(x) for x in c[1:]]!r})\n" for c in commands)
    return run(sys.executable, "-c", code)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run directory with a barely trained SFT model, two voters, the baseline reward model and
    round 0."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ["--out", out]
    python_stages([
        "00_data", *flags, "--preset", "toy", "--n_pairs", 400, "--n_sft", 400, "--n_prompts", 100,
        "--n_eval", 20, "--n_gold", 50],
                  ["01_sft", *flags, "--limit", 60, "--hidden_size", 64, "--layers", 2],
                  ["02_rm_ensemble", *flags, "--M", 2, "--limit", 5],
                  ["03_strength", *flags, "--M", 2],
                  ["04_rm_denoise", *flags, "--methods", "baseline", "--limit", 10],
                  ["06_ppo", *flags, "--round", 0, "--limit", 2])
    return out


@pytest.fixture
def run_copy(small_run, tmp_path):
    """A copy of `small_run` that a test may add to."""
    return Path(shutil.copytree(small_run, tmp_path / "out"))
