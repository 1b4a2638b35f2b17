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
# ---- flags: the driver's and the launcher's own here, all others go to lab/experiments.py
given=${*:+$(printf ' %q' "$@")}
mode=run out=out stage='' gpus='' hostfile='' dry_run='' restart='' flags=() activate=''
case ${1:-} in test|status|verify|replay|experiments|clean) mode=$1; shift ;; esac
while [ $# -gt 0 ] && [ $mode != test ]; do
  [[ ! $1 =~ ^--(out|stage|gpus|hostfile)= ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    -h|--help) sed -n '2,/^set -euo/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
    --dry_run|--restart) declare "${1#--}=$1" ;;
    --out|--stage|--gpus|--hostfile)
      [[ $# -gt 1 && $2 && $2 != --* ]] || fail "$1 needs a value"
      declare "${1#--}=$2"; shift ;;
    *) flags+=("$1") ;;
  esac; shift
done
[[ $mode =~ run|experiments|clean || ${#flags[@]} -eq 0 ]] || fail "unknown flag ${flags[*]}"
[[ $mode = replay && $stage || $mode != replay && ! $stage ]] || fail "replay takes --stage NAME"
[[ -z $gpus || $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus takes a positive whole number, got: $gpus"

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
  activate="source $(printf %q "$here")/.venv/bin/activate; "  # for the commands printed
fi
python "$here/lab/environment.py" "$here/requirements.txt" || exit 2
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
code=; [ "$PWD" = "$here" ] || code=$here/; quoted=${code:+$(printf %q "$code")}
case $mode in
  status) exec python -m lab.status "$out" ;;
  test) cd "$here"; exec python -m pytest -n 2 --dist loadfile "$@" ;;
  verify|replay) exec python -m lab.verify "$out" ${stage:+--replay "$stage"} ;;
esac
# ---- launcher: on a free port, for two runs on one stop each other; one process needs none (5 s)
port=$((20000 + $(cksum <<<"$PWD/$out" | cut -d' ' -f1) % 9000))
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
launcher=(deepspeed --master_port $port ${gpus:+--num_gpus "$gpus"} ${hostfile:+-H "$hostfile"})
[ -n "$gpus$hostfile" ] || nvidia-smi -L &>/dev/null ||
  { launcher=(python); export DS_ACCELERATOR=cpu; }
stopping='' child=
stop() {  # to the processes of the stage, not to the launcher, which would kill them after 30 s
  local s=TERM; [ -z "$stopping" ] || s=$1; stopping=1  # a second Ctrl-C waits for no step's end
  pkill -$s -g "$child" -f '^[^ ]*python[0-9.]* (-u )?[^ -][^ ]*\.py( |$)' || kill -$s "$child"
}
trap 'stop TERM' TERM; trap 'stop INT' INT
launch() {  # a command in a group of its own, so that Ctrl-C reaches its stage through `stop` only
  local result=0
  set -m; "$@" 9>&- & child=$!; set +m
  wait $child || result=$?
  while kill -0 $child 2>/dev/null; do wait $child || result=$?; done  # a trap ends `wait` early
  [ -z "$stopping" ] && [ $result -ne 75 ] || {
    echo "stopped; go on with: bash ${quoted}run_all.sh$given"; exit 75; }
  return $result
}
if [ $mode = experiments ]; then
  all=("${code}lab/experiments.py" --out "$out" "${flags[@]}" $restart $dry_run)
  [ -z "$dry_run" ] || exec python "${all[@]}"
  launch "${launcher[@]}" "${all[@]}" || fail "an experiment failed: try it again"
  launch python "${code}09_report.py" --out "$out" || fail "the report failed"
  echo "the page is $out/09_report/index.html"; exit 0
fi
# ---- the pipeline: lab/experiments.py says what is to do, in order, and what it will take
begin=$SECONDS page=$out/09_report/index.html
[ $mode != clean ] || flags+=(--clean)
plan=$(python "${code}lab/experiments.py" --plan --out "$out" "${flags[@]}" $dry_run) || exit 2
[ -z "$dry_run" ] || { echo "$plan"; exit 0; }
mkdir -p "$out" || fail "cannot make $out"
exec 9>"$out/.run_all.lock"
! command -v flock >/dev/null || flock -n 9 || fail "another run_all.sh works on $out: wait"
while IFS=$'\t' read -r -u 3 do id minutes purpose script; do
  case $do in note) echo; echo "== $id"; continue ;;
    skip) echo "== $id is complete, skipped"; continue ;; esac
  eval "command=($(printf '%q ' "${launcher[@]}") $quoted$script)"
  case $id in 00_data|09_report|clean) eval "command=(python $quoted$script)" ;; esac
  echo; echo "== $id: $purpose"; echo "   ${command[*]}"; echo "   minutes expected: $minutes"
  printf '%q ' "${command[@]}" >>"$out/commands.log"; echo >>"$out/commands.log"
  start=$SECONDS
  launch "${command[@]}" $restart ||
    fail "$id failed; run it again with: $activate$(printf '%q ' "${command[@]}")"
  echo "   minutes taken: $(awk "BEGIN { printf \"%.1f\", ($SECONDS - $start) / 60 }")"
done 3<<<"$plan"
[ $mode != clean ] || { cat "$out/clean/summary.txt" 2>/dev/null || true; exit 0; }
[ ! -f "$out/08_evaluate/tables.md" ] || cat "$out/08_evaluate/tables.md"
echo "everything is in $out/ ($([ ! -f "$page" ] || echo "page: $page, ")commands:" \
  "$out/commands.log); $(awk "BEGIN { printf \"%.1f\", ($SECONDS - $begin) / 60 }") minutes in all"
