"""Exact resume: a checkpoint holds the engines, the random states of every rank, the stage's own
state and the length of its metrics, so that what follows has the bytes of an undisturbed run."""
import json
import os
import random
import shutil
import time

import numpy
import torch

from lab.base import (barrier, code_hashes, die, gather_rows, log, rank, read_json, sha256, sync,
                      world_size, write_text)


def newest(directory):
    """checkpoint.json of the newest complete checkpoint of a partial directory, or {}."""
    found = [{**read_json(path), "folder": path.parent.name}
             for path in directory.glob("checkpoint_*/checkpoint.json")]
    return max(found, key=lambda made: made["step"], default={})


def save(stage, step):
    """Complete under its name or not there; the one before is removed after that."""
    folder = stage.dir / "checkpoint.tmp"
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    barrier()
    for name, engine in stage.engines.items():
        engine.save_checkpoint(str(folder), tag=name, save_latest=False)
    name, keys, *rest = numpy.random.get_state()
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    write_text(folder / f"random_{rank()}.json", json.dumps({
        "python": random.getstate(), "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(), "cuda": cuda}))
    barrier()
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    # every rank reads its share back: a checkpoint of a large model is read once
    hashes = gather_rows([(f, (f, sync(folder / f))) for f in files[rank()::world_size()]])
    if rank() == 0:
        stage.metrics_file.flush()
        os.fsync(stage.metrics_file.fileno())
        write_text(folder / "checkpoint.json", json.dumps({
            "step": step, "total": stage.total, "settings": stage.settings,
            "seconds_a_step": (time.time() - stage.start) / max(1, step - stage.done),
            "metrics_bytes": stage.metrics_file.tell(),
            "state": stage.state, "code": code_hashes(stage.script), "files": dict(hashes)}))
        folder.rename(stage.dir / f"checkpoint_{step}")
        for old in stage.dir.glob("checkpoint_*"):
            if old.name != f"checkpoint_{step}":
                shutil.rmtree(old)
    barrier()


def load(stage):
    """Engines and random states as they were. DeepSpeed's checkpoints are pickles: they are loaded
    only if every file has the hash that this stage wrote down."""
    made = stage.checkpoint
    folder = stage.dir / made["folder"]
    bad = gather_rows([(f, f) for f in sorted(made["files"])[rank()::world_size()]
                       if not (folder / f).is_file() or sha256(folder / f) != made["files"][f]])
    if bad:
        die(f"{folder / bad[0]} is damaged: --restart begins anew")
    for name, engine in stage.engines.items():
        engine.load_checkpoint(str(folder), tag=name)
    states = read_json(folder / f"random_{rank()}.json")
    kind, numbers, gauss = states["python"]
    random.setstate((kind, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
    log(f"{stage.name}: goes on after step {made['step']} of {stage.total}")
