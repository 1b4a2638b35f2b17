#!/usr/bin/env bash
# Replays the whole iterated pipeline of "Secrets of RLHF Part II", every stage in order:
#
#   bash run_all.sh                            the embedded world, minutes on two CPU cores
#   bash run_all.sh --preset paper --gpus 8    Llama-2-7B on HH-RLHF
#   bash run_all.sh --preferences my.jsonl --model my/model --out out_mine
#   bash run_all.sh clean --preferences my.jsonl --model my/model    a verdict on each pair
#   bash run_all.sh experiments [--seeds 5]    every experiment of the paper (lab/experiments.py)
#   bash run_all.sh test                       the test suite, in the same environment
#   bash run_all.sh status | verify            a line a stage; every hash of a run, back to the data
#   bash run_all.sh replay --stage NAME        a stage again, elsewhere, hash by hash
#
#   --out DIR          run directory (default: out)
#   --model NAME       base model, a path or hub id (default: tiny; Llama-2-7B in paper)
#   --preset NAME      paper, small or toy hyperparameters (default: toy for tiny, else small)
#   --preferences S…   --sft S…   --prompts S…    files, hub ids, toy (00_data.py --help)
#   --rounds R         MetaRM rounds (default: 3, 4 in paper, 1 with --limit)
#   --M N  --folds K   N models vote (10), none on what it trained on; --texts: shown by clean
#   --seed N           random seed (default: 0); experiments: --seeds N, for 0 to N-1
#   --limit N          smoke run: at most N steps in every loop, 64*N rows to train on
#   --gpus N           processes (default: all GPUs, or one on a CPU); --hostfile F: machines
#   --from STAGE       run this stage (04, 07_metarm/round_2, ...) and all after it; --to STAGE: end
#   --judge J          gold, ensemble, model:PATH, http://HOST/v1 (lab/judges.py) compares, labels
#   --restart          begin an unfinished stage anew; --tensorboard: event files; --dry_run: print
# A complete stage is skipped, unless an input has changed, your files and model among them; an
# unfinished one goes on from its checkpoint, with which Ctrl-C and SIGTERM stop (exit code 75).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fail() { echo "error: $*" >&2; exit 2; }
mode=${1:-}
[ "$mode" = test ] || case " $* " in *" -h "*|*" --help "*)
  sed -n '2,/^set -euo/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
esac
# ---- environment: an active one is used as it is, else .venv is made from requirements.txt
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  python3 "$here/lab/environment.py" || exit 2
  if ! cmp -s "$here/requirements.txt" "$here/.venv/installed.txt"; then
    echo "making $here/.venv from requirements.txt (a few minutes, once)"
    python3 -m venv "$here/.venv" || fail "python3 -m venv failed: install python3-venv"
    "$here/.venv/bin/pip" install -q -r "$here/requirements.txt" || fail "pip could not install"
    cp "$here/requirements.txt" "$here/.venv/installed.txt"
  fi
  export VIRTUAL_ENV=$here/.venv PATH=$here/.venv/bin:$PATH
  # for the commands printed
  export RUN_ALL_ACTIVATE="source $(printf %q "$here")/.venv/bin/activate; "
fi
python "$here/lab/environment.py" "$here/requirements.txt" || exit 2
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
[ "$mode" != test ] || {
  cd "$here"; exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${@:2}"; }
exec python "$here/lab/driver.py" "$@"
