#!/usr/bin/env bash
# From a fresh machine with Python to a trained model that answers:
#   bash run.sh              the demonstration
#   bash run.sh curriculum   four stages, each from the one before: idioms, the novel, questions
#   bash run.sh translate [--yes]  English to Chinese in four phases, with a score after each;
#                            --yes accepts the terms of use of its texts
#   bash run.sh test [--all] the tests; --all adds the minutes-long ones
# Run again, it does only what is missing or was interrupted.
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "error: $*" >&2; exit 1; }

# setup FILE: .venv with the packages of a requirements file, installed anew when the file changes
setup() {
  local name base=
  python=.venv/bin/python
  case $(uname -s) in MINGW* | MSYS* | CYGWIN*) python=.venv/Scripts/python ;; esac
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    for name in python3 python; do
      if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        base=$name
        break
      fi
    done
    [ -n "$base" ] || fail "no Python 3.11 or newer found; install one"
    "$base" -m venv --clear .venv ||
      fail "python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  local stamp=.venv/$1.installed
  if ! cat requirements.txt "$1" | cmp -s - "$stamp"; then
    echo "installing $1 (some minutes)"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$1" ||
      fail "pip could not install $1; see above"
    cat requirements.txt "$1" >"$stamp"
  fi
}

# stage NAME COMMAND...: says what runs, and afterwards how long it took
stage() {
  local name=$1 began=$SECONDS
  shift
  echo
  echo "== $name: ${*/#"$python"/python}"
  "$@"
  times+=("$(printf '%-22s %4d s' "$name" $((SECONDS - began)))")
}

demo() {
  setup requirements.txt
  local times=() began=$SECONDS
  stage fetch "$python" data/fetch_data.py sanguo
  # prepared once; prepare again by hand after editing qa.jsonl
  [ -f data/sanguo/meta.json ] || stage prepare "$python" data/sanguo/prepare.py
  stage pretrain "$python" train.py config/pretrain_sanguo.py --resume
  [ -f data/sanguo_sft/meta.json ] ||
    stage "prepare questions" "$python" data/sanguo/prepare_sft.py
  stage fine-tune "$python" train.py config/sft_sanguo.py --resume
  [ out-sanguo/evaluation-sanguo-val.json -nt out-sanguo/latest ] ||
    stage "evaluate novel" "$python" evaluations.py --out_dir=out-sanguo
  [ out-sanguo-sft/evaluation-sanguo_sft-val.json -nt out-sanguo-sft/latest ] ||
    stage "evaluate answers" "$python" evaluations.py --out_dir=out-sanguo-sft
  stage draw "$python" visualize.py --runs=out-sanguo,out-sanguo-sft
  stage answer "$python" sample.py --out_dir=out-sanguo-sft --start=FILE:data/sanguo/questions.txt
  stage continue "$python" sample.py --out_dir=out-sanguo --start=却说曹操 --top_p=0.9 --max_new_tokens=150
  echo
  printf '%s\n' "${times[@]}" "$(printf '%-22s %4d s' 'in all' $((SECONDS - began)))"
  echo
  echo "pictures  out-sanguo/curves.png  out-sanguo-sft/rouge_l.png  out-sanguo-sft/perplexity.png"
  echo "reports   out-sanguo/evaluation.json  out-sanguo-sft/evaluation.json"
  echo "answers   out-sanguo-sft/answers.jsonl"
}

curriculum() {
  setup requirements.txt
  local times=() began=$SECONDS number=0 config
  stage fetch "$python" data/fetch_data.py sanguo idioms
  [ -f data/sanguo/meta.json ] || stage "prepare novel" "$python" data/sanguo/prepare.py
  [ -f data/idioms/meta.json ] ||
    stage "prepare idioms" "$python" data/idioms/prepare.py --tokenizer=data/sanguo
  [ -f data/idioms_sft/meta.json ] ||
    stage "prepare questions" "$python" data/idioms/prepare_sft.py --tokenizer=data/sanguo
  [ -f data/sanguo_sft/meta.json ] ||
    stage "prepare curated ones" "$python" data/sanguo/prepare_sft.py
  for config in config/curriculum_small/*.py; do
    number=$((number + 1))
    stage "train stage $number" "$python" train.py "$config" --resume
  done
  stage evaluate "$python" evaluations.py --out_dir=out-small-4
  stage draw "$python" visualize.py --runs=out-small-1,out-small-2,out-small-3,out-small-4
  echo
  printf '%s\n' "${times[@]}" "$(printf '%-22s %4d s' 'in all' $((SECONDS - began)))"
  echo
  echo "picture   out-small-1/curves.png"
}

translate() {
  [ $# -le 1 ] || fail "bash run.sh translate takes --yes or nothing, not $2"
  [ -z "${1-}" ] || [ "$1" = --yes ] || fail "bash run.sh translate takes --yes or nothing, not $1"
  setup requirements.txt
  local times=() began=$SECONDS phase domain run runs=()
  stage fetch "$python" data/fetch_data.py hongkong ${1:+--yes}
  [ -f data/translation/meta.json ] || stage "prepare general" "$python" data/translation/prepare.py
  [ -f data/finance/meta.json ] ||
    stage "prepare finance" "$python" data/finance/prepare.py --tokenizer=data/translation
  for domain in translation finance; do
    [ -f "data/${domain}_sft/meta.json" ] ||
      stage "prepare questions" "$python" "data/$domain/prepare_sft.py"
  done
  for phase in pretrain sft lora grpo; do
    run=out-translate-$phase
    runs+=("$run")
    stage "train $phase" "$python" train.py config/translate_small/?_$phase.py --resume
    [ $phase != pretrain ] || [ $run/evaluation-translation-val.json -nt $run/latest ] ||
      stage "evaluate texts" "$python" evaluations.py --out_dir=$run --dataset=translation
    for domain in translation finance; do
      [ $run/evaluation-${domain}_sft-test.json -nt $run/latest ] ||
        stage "evaluate $phase" "$python" evaluations.py --out_dir=$run \
          --dataset=${domain}_sft --split=test
    done
  done
  runs=$(IFS=, && echo "${runs[*]}")
  stage draw "$python" visualize.py --runs="${runs%,*}"  # rewards are no loss
  stage draw "$python" visualize.py --runs=out-translate-grpo
  stage compare "$python" evaluations.py --compare="$runs"
  echo
  printf '%s\n' "${times[@]}" "$(printf '%-22s %4d s' 'in all' $((SECONDS - began)))"
}

run_tests() {
  setup requirements-dev.txt
  "$python" -m ruff check .
  "$python" -m ruff format --check .
  "$python" data/fetch_data.py sanguo gpt2 idioms
  case ${1-} in
    # each file's tests on one of two cores; -rs says what was skipped, and why
    "") "$python" -m pytest -q -rs -n 2 --dist loadfile -m "not slow" ;;
    --all) "$python" -m pytest -q -rs -n 2 --dist loadfile ;;
    *) fail "bash run.sh test takes --all or nothing, not $1" ;;
  esac
}

case ${1-} in
  "") demo ;;
  curriculum) curriculum ;;
  translate) translate "${@:2}" ;;
  test) run_tests "${2-}" ;;
  *) fail "unknown command $1; write bash run.sh, or behind it curriculum, translate, or test" ;;
esac
