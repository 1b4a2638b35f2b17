#!/usr/bin/env bash
# Replays the whole iterated pipeline of "Secrets of RLHF Part II" by running every stage in order:
#
#   bash run_all.sh                                  the embedded world, minutes on two CPU cores
#   bash run_all.sh --preset paper --gpus 8          Llama-2-7B on HH-RLHF
#   bash run_all.sh --preferences my.jsonl --model my/model --out out_mine
#   bash run_all.sh --limit 4                        smoke run: at most 4 steps in every loop
#   bash run_all.sh experiments [--seeds 3]          every experiment of the paper for each seed (experiments.py lists
#                                                    them) and the page OUT/09_report/index.html
#   bash run_all.sh test                             the test suite, in the same environment
#   bash run_all.sh verify [--out DIR]               check every hash of a run, from its last stage back to the data
#   bash run_all.sh replay [--out DIR] --stage NAME  run a recorded stage again elsewhere and compare, hash by hash
#
#   --out DIR          run directory (default: out)
#   --preset NAME      toy (default) or paper: the column of every stage's hyperparameter table
#   --model NAME       base model, a local path or hub id (default: tiny in toy, meta-llama/Llama-2-7b-hf in paper)
#   --preferences S…   preference data: toy, toy:summary, files or hub ids   --sft S…   --prompts S…   (see 00_data.py)
#   --rounds R         MetaRM rounds (default: 3 in toy, 4 in paper, 1 with --limit; experiments: 5, 2 with --limit)
#   --seeds N          experiments: seeds 0 to N-1, seed s in OUT/seed_s (default: 3)
#   --seed N           random seed (default: 0)
#   --limit N          at most N optimiser or roll-out steps in every loop, 64*N rows to train on, 16*N to evaluate
#   --gpus N           processes on this machine (default: all GPUs, or one process on a CPU)
#   --hostfile F       machines, in DeepSpeed's format
#   --from STAGE       run this stage (04, 04_rm_denoise, 07_metarm/round_2, ...) and all after it again
#   --restart          begin an unfinished stage anew instead of going on from its checkpoint
#   --dry_run          print every command with its resolved hyperparameters and run nothing
#
# A stage whose directory is complete is skipped with one line, unless one of its inputs has changed; an unfinished one
# goes on from its last checkpoint. Commands are kept in DIR/commands.log. Ctrl-C and SIGTERM stop after the step in
# hand, with a checkpoint and exit code 75: the same command goes on.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fail() { echo "error: $*" >&2; exit 2; }

# ---- flags
given=$(printf ' %q' "$@")
out=out preset= rounds= seeds=3 from= dry= restart= stage= launcher=() data=() mode=run
case ${1:-} in test|verify|replay|experiments) mode=$1; shift ;; esac
while [ $# -gt 0 ] && [ $mode != test ]; do
  flag=$1; shift
  case $flag in
    -h|--help) sed -n '2,/^set -euo/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
    --dry_run) dry=1; continue ;;
    --restart) restart=--restart; continue ;;
    --stage) [ $mode = replay ] || fail "--stage goes with replay" ;;
    --seeds) [ $mode = experiments ] || fail "--seeds goes with experiments" ;;
    --from|--seed) [ $mode != experiments ] || fail "$flag does not go with experiments (--seeds N)" ;;
    --out|--preset|--model|--preferences|--sft|--prompts|--rounds|--limit|--gpus|--hostfile) ;;
    *) fail "unknown flag $flag (bash run_all.sh --help lists them)" ;;
  esac
  values=()
  while [ $# -gt 0 ] && [[ $1 != --* ]]; do values+=("$1"); shift; done
  [ ${#values[@]} -gt 0 ] || fail "$flag needs a value"
  case $flag in
    --preferences|--sft|--prompts) ;;
    *) [ ${#values[@]} -eq 1 ] || fail "$flag takes one value, got: ${values[*]}" ;;
  esac
  case $flag in
    --rounds|--limit|--gpus|--seed|--seeds) [[ ${values[0]} =~ ^[0-9]+$ ]] || fail "$flag takes a whole number, got: ${values[0]}" ;;
  esac
  case $flag in
    --out) out=${values[0]} ;;
    --preset) preset=${values[0]}; data+=(--preset "$preset"); [[ $preset =~ ^(toy|paper)$ ]] || fail "--preset is toy or paper" ;;
    --rounds) rounds=${values[0]} ;;
    --seeds) seeds=${values[0]} ;;
    --from) from=${values[0]} ;;
    --stage) stage=${values[0]} ;;
    --gpus) launcher+=(--num_gpus "${values[0]}") ;;
    --hostfile) launcher+=(--hostfile "${values[0]}") ;;
    *) data+=("$flag" "${values[@]}") ;;
  esac
done

# ---- environment: an active one is used as it is, else .venv is made from requirements.txt
requirements=$here/requirements.txt
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  if ! cmp -s "$requirements" "$here/.venv/installed.txt"; then
    echo "making $here/.venv from requirements.txt (a few minutes, once)"
    python3 -m venv "$here/.venv" || fail "python3 -m venv failed: install python3-venv"
    "$here/.venv/bin/pip" install -q -r "$requirements" || fail "pip could not install $requirements"
    cp "$requirements" "$here/.venv/installed.txt"
  fi
  export VIRTUAL_ENV=$here/.venv PATH=$here/.venv/bin:$PATH
fi
missing=$(python - "$requirements" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
for line in open(sys.argv[1]):
    name = line.split("==")[0].strip()
    if name and not name.startswith("#"):
        try:
            version(name)
        except PackageNotFoundError:
            print(name, end=" ")
PY
)
[ -z "$missing" ] || fail "missing in the active environment: ${missing% }; run: pip install -r $requirements"
code=; [ "$PWD" = "$here" ] || code=$here/
case $mode in
  test) cd "$here"; exec python -m pytest -n 2 --dist loadfile "$@" ;;
  verify)
    runs=("$out")
    [ -f "$out/run.json" ] || { [ -f "$out/seed_0/run.json" ] && runs=("$out"/seed_* "$out"/summary_*); } || true
    result=0
    for run in "${runs[@]}"; do
      [ ! -d "$run" ] && [ ${#runs[@]} -gt 1 ] && continue  # a pattern that found nothing
      [ ${#runs[@]} -eq 1 ] || echo "== $run"
      python "${code}common.py" verify "$run" || result=1
    done
    exit $result ;;
  replay) [ -n "$stage" ] || fail "replay needs --stage NAME"; exec python "${code}common.py" replay "$out" "$stage" ;;
esac

# ---- launcher: one process on a machine without GPUs
if [ ${#launcher[@]} -eq 0 ] && ! { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then
  launcher=(--num_gpus 1)
  export DS_ACCELERATOR=cpu  # or every launch warns that it looked for a GPU
fi
# a port of the run's own: on DeepSpeed's default one two runs on a machine stop each other
launcher+=(--master_port $((20000 + $(cksum <<<"$PWD/$out" | cut -d' ' -f1) % 9000)))
run_json() { [ ! -f "$out/run.json" ] || python -c '
import json, sys
print(json.load(open(sys.argv[1])).get(sys.argv[2]) or "")' "$out/run.json" "$1"; }

again= child= stopping=
# A signal goes on to the processes of the stage, not to the launcher, which would kill them after 30 s.
stop() {
  stopping=1
  kill -0 "$child" 2>/dev/null || stopped
  python - "$child" <<'PY' || true
import sys
import psutil  # comes with deepspeed
child = psutil.Process(int(sys.argv[1]))
tree = [child, *child.children(recursive=True)]
for process in [p for p in tree if any(a.endswith(".py") for a in p.cmdline()[1:3])] or [child]:  # `python -u 04_...py`
    process.terminate()
PY
}
stopped() { echo "stopped; go on with: bash ${code}run_all.sh$given"; exit 75; }
trap stop TERM INT
# Run a command so that a signal reaches its stage; exits with 75 when it was stopped, else returns its exit code.
launch() {
  local result=0
  set -m  # a process group of its own: the terminal's Ctrl-C reaches the stage through `stop` only
  "$@" 9>&- & child=$!
  set +m
  wait $child || result=$?
  while kill -0 $child 2>/dev/null; do wait $child || result=$?; done  # a trap ends `wait` early
  if [ -n "$stopping" ] || [ $result -eq 75 ]; then stopped; fi
  return $result
}
if [ $mode = experiments ]; then
  flags=(--out "$out" --seeds "$seeds" ${rounds:+--rounds "$rounds"} $restart ${data[@]+"${data[@]}"})
  if [ -n "$dry" ]; then exec python "${code}experiments.py" --dry_run "${flags[@]}"; fi
  launch deepspeed "${launcher[@]}" "${code}experiments.py" "${flags[@]}" || fail "an experiment failed; the same command goes on"
  launch python "${code}09_report.py" --out "$out" || fail "the report failed; run it again with: python ${code}09_report.py --out $out"
  echo "the page is $out/09_report/index.html"
  exit 0
fi
# stage ID, purpose, minutes expected (toy preset on two idle cores), script and flags
stage() {
  local id=$1 purpose=$2 expected=$3 dir=$1; shift 3
  case $id in 02_*|04_*|05_*) dir=$id/figures ;; esac        # their last output: all models of the launch are done
  if [ -n "$from" ] && [[ $id == "$from"* ]]; then again=1; fi
  local command=(deepspeed "${launcher[@]}" "$code$1" "${@:2}" --out "$out")
  [[ $id != 00_data && $id != 09_report ]] || command=(python "$code$1" "${@:2}" --out "$out")
  if [ -n "$dry" ]; then
    echo "${command[*]}"; python "$code$1" "${@:2}" --out "$out" ${preset:+--preset "$preset"} --dry_run; return
  fi
  local other; other=$(grep -m 1 "^$id[/ ]" <<<"$changed" || true)
  if [ -z "$again" ] && [ -n "$other" ]; then
    echo; echo "== ${other% *} was made from another ${other##* } than is here now: it runs again, and all after it"
  elif [ -z "$again" ] && [ -f "$out/$dir/manifest.json" ] && [ ! -d "$out/$id.partial" ]; then echo "== $id is complete, skipped"; return; fi
  # measured for the toy preset without flags that change its size
  [[ " ${data[*]-} " != *" --limit "* && ${preset:-toy}$(run_json limit) = toy ]] || expected=unmeasured
  echo; echo "== $id: $purpose"
  echo "   ${command[*]}"
  echo "   minutes expected: $expected"
  mkdir -p "$out"; printf '%q ' "${command[@]}" >>"$out/commands.log"; echo >>"$out/commands.log"
  again=1  # what comes after is made from other inputs now
  local start=$SECONDS
  launch "${command[@]}" $restart || fail "$id failed; run it again with: ${command[*]}"
  echo "   minutes taken: $(awk "BEGIN { printf \"%.1f\", ($SECONDS - $start) / 60 }")"
}

# ---- the pipeline
begin=$SECONDS
# every stage of the longest run; --from takes any beginning of one
known="00_data 01_sft 02_rm_ensemble 03_strength 04_rm_denoise 05_rm_contrastive $(
  echo {06_ppo,07_metarm}/round_{0..99}) 08_evaluate 09_report"
[ -z "$from" ] || [[ " $known" == *" $from"* ]] || fail "--from $from is no stage (00_data, 04, 07_metarm/round_2, ...)"
changed=
if [ -z "$dry" ]; then
  [ ! -f "$out/seed_0/run.json" ] || fail "$out holds experiments: give another --out"
  mkdir -p "$out" || fail "cannot make $out"
  if command -v flock >/dev/null; then
    exec 9>"$out/.run_all.lock"; flock -n 9 || fail "another run_all.sh works on $out: wait for it, or give another --out"
  fi
  [ -z "$(ls "$out")" ] || changed=$(python "${code}common.py" changed "$out") || exit 2
fi
if [[ -n $from && 00_data == "$from"* && ${#data[@]} -eq 0 && -f $out/run.json && -z $dry ]] &&
  [[ $(run_json model)$(run_json preferences) != "tiny['toy']" ]]; then
  fail "--from $from makes the data anew: give the data flags again (see $out/run.json)"
fi
if [ -z "$dry" ] && [[ 00_data != "${from:-none}"* ]] && [ ${#data[@]} -gt 0 ] && [ -f "$out/00_data/manifest.json" ]; then
  made=$(grep '00_data.py' "$out/commands.log" 2>/dev/null | tail -1 || true)
  wanted=$(printf '%q ' "${data[@]}" --out "$out")
  [ "${made#*00_data.py }" = "$wanted" ] || fail "$out was made with other flags (see $out/commands.log): choose another --out, or --from 00"
fi
stage 00_data "bring the data into one clean form" 0.1 00_data.py ${data[@]+"${data[@]}"}
preset=${preset:-$(run_json preset)}
[ -n "$dry" ] || [ -z "$(run_json limit)" ] || echo "note: $out is a smoke run (--limit $(run_json limit))"
if [ -z "$rounds" ]; then
  rounds=3
  [ "$preset" != paper ] || rounds=4
  [[ -z $(run_json limit) && " ${data[*]-} " != *" --limit "* ]] || rounds=1  # every stage once
fi
stage 01_sft "supervised fine-tuning: pi^SFT" 0.5 01_sft.py
stage 02_rm_ensemble "ten reward models that vote (section 2.2)" 1.5 02_rm_ensemble.py
stage 03_strength "preference strength, Eq. 4 (section 2.2)" 0.5 03_strength.py
stage 04_rm_denoise "flip, margin, soft labels (sections 2.4, 2.5)" 1 04_rm_denoise.py
stage 05_rm_contrastive "SimCSE and SwAV (section 3.1)" 1.5 05_rm_contrastive.py
stage 06_ppo/round_0 "vanilla PPO under the vanilla reward model" 0.5 06_ppo.py --round 0
for ((r = 1; r <= rounds; r++)); do
  stage 07_metarm/round_$r "MetaRM, Algorithm 1, on samples of round $((r - 1)) (section 3.2)" 0.5 07_metarm.py --round $r
  stage 06_ppo/round_$r "PPO under MetaRM of round $r" 0.5 06_ppo.py --round $r
done
stage 08_evaluate "win / tie / lose of every policy (Tables 2 and 3)" 0.3 08_evaluate.py
stage 09_report "the figures and tables on one page" 0.4 09_report.py
[ -n "$dry" ] && exit 0
[ -z "$from" ] || [ -n "$again" ] || fail "--from $from matched no stage of this run"
echo; cat "$out/08_evaluate/tables.md"
echo "everything is in $out/ (page: $out/09_report/index.html, commands: $out/commands.log); $(awk "BEGIN { printf \"%.1f\", ($SECONDS - $begin) / 60 }") minutes in all"
