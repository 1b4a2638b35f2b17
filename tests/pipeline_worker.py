"""A small whole pipeline in one process, for test_audit.py: complete stages are skipped, as
run_all.sh does.
`pipeline_worker.py OUT [--seed N]`"""
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from lab.record import promote  # noqa: E402

out, *flags = sys.argv[1:]
SMALL = ["--limit", 6, "--n_pairs", 300, "--n_sft", 300, "--n_prompts", 80, "--n_eval", 8,
         "--n_gold", 20, *flags]
OFTEN = ["--save_every", 2]
STAGES = [  # what is complete at its end, script, flags
    ("00_data", "00_data", SMALL), ("01_sft", "01_sft", ["--hidden_size", 64, *OFTEN]),
    ("02_rm_ensemble/rm_01", "02_rm_ensemble", ["--M", 2, *OFTEN]),
    ("03_strength", "03_strength", ["--M", 2]),
    ("04_rm_denoise/soft_margin", "04_rm_denoise", OFTEN),
    ("05_rm_contrastive/swav_diff", "05_rm_contrastive",
     ["--tsne_pairs", 10, "--freeze_prototypes", 1, *OFTEN]),
    ("06_ppo/round_0", "06_ppo", ["--round", 0, "--eval_every", 2, *OFTEN]),
    ("07_metarm/round_1", "07_metarm",
     ["--round", 1, "--meta_prompts", 40, "--eval_every", 2, "--equation_17", 1, *OFTEN]),
    ("06_ppo/round_1", "06_ppo", ["--round", 1, *OFTEN]), ("08_evaluate", "08_evaluate", []),]

if __name__ == "__main__":
    Path(out).mkdir(exist_ok=True)
    for pattern in ("*.partial/manifest.json", "*/*.partial/manifest.json"):
        for manifest in Path(out).glob(pattern):
            promote(manifest.parent)
    for final, script, more in STAGES:
        if not (Path(out) / final / "manifest.json").exists():
            sys.argv = [f"{script}.py", "--out", out, *map(str, more)]  # what the manifest records
            import_module(script).main()
