"""Stage 09: the paper's figures and tables beside ours on one page, and a verdict on each of its
claims.

Reads OUT/seed_0, OUT/seed_1, ... as lab/experiments.py makes them, or OUT itself when it is one run
(a default run, or one on your own data: what was not measured there is left out). Writes
OUT/09_report/index.html, one file that needs no network; ledger.json, the claims of lab/claims.py
with their values, intervals and verdicts; tables.json, the rows of the page's tables;
figures/NAME.png and NAME.json, each figure (lab/figures.py) with its numbers down to single pairs
and prompts, from which the ledger is computed.

    python 09_report.py                    # after any run, or after run_all.sh experiments
    python 09_report.py --texts            # show dialogues of your own data too (some offend)
"""
from pathlib import Path

import common
from lab import page


def main(argv=None):
    args = common.parse_args(__doc__, {}, lambda flag: flag(
        "--texts", action="store_true", help="show dialogues that are not the embedded world's"),
        argv, reads_run=False)
    if common.rank() > 0:  # one process does it
        return
    out = Path(args.out)
    first = page.find_runs(out)[0].path
    for name in ("preset", "seed", "limit"):
        setattr(args, name, common.read_json(first / "run.json").get(name))
    names = [n for n in common.finished(out) if n != "09_report"] if first == out else []
    run = common.begin(args, "09_report", names)
    run.finish(verdicts=page.write(run, out, args.texts))


if __name__ == "__main__":
    common.launch(main)
