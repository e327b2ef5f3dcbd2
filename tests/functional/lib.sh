#!/usr/bin/env bash
# What every functional script sources. It gives them:
#   OUT            an empty directory, removed at the end unless it was given
#   fixtures       makes or finds the fixtures; FIXTURES is their directory afterwards
#   py ARGS...     python, under coverage when NEMO_OPT_COVERAGE=1 (ranks included, through coverage's patch of subprocesses)
#   step NAME SECONDS COMMAND...   runs a command in a process group of its own with its own time limit; 124 means that it ran out of it
#   check RESULT.json [--with NAME=FILE] EXPRESSION...   asserts numbers
#   refused CODE TEXT COMMAND...   a command that must fail with that code and say that text
# Whatever a step started is ended with it.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
NAME=$(basename "$0" .sh)
GRACE_S=10
cd "$ROOT"

KEEP_OUT=${OUT:+1}
OUT=${OUT:-$(mktemp -d "${TMPDIR:-/tmp}/nemo_opt_$NAME.XXXXXX")}
mkdir -p "$OUT"
if [[ -n $(ls -A "$OUT") ]]; then
    echo "$NAME: OUT=$OUT is not empty" >&2
    exit 2
fi

STEP_GROUP=""
WATCH_GROUP=""

end_groups() {
    # The watch has nothing to clean up, and may not have dropped this shell's traps yet, which would swallow a SIGTERM.
    [[ -z $WATCH_GROUP ]] || kill -KILL -- "-$WATCH_GROUP" 2>/dev/null || true
    [[ -z $STEP_GROUP ]] || kill -TERM -- "-$STEP_GROUP" 2>/dev/null || true
    STEP_GROUP=""
    WATCH_GROUP=""
}

finish() {
    local code=$?
    trap - EXIT
    end_groups
    case $code in
        0) echo "$NAME: passed" ;;
        124) echo "$NAME: TIMEOUT (exit code 124)" ;;
        *) echo "$NAME: FAILED (exit code $code)" ;;
    esac
    [[ -n $KEEP_OUT ]] || rm -rf "$OUT"
    exit "$code"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

py() {
    if [[ ${NEMO_OPT_COVERAGE:-0} == 1 ]]; then
        "$PYTHON" -m coverage run --rcfile="$ROOT/pyproject.toml" --data-file="$ROOT/.coverage" --parallel-mode "$@"
    else
        "$PYTHON" "$@"
    fi
}

step() {
    local name=$1 seconds=$2 start=$SECONDS code=0
    local marker=$OUT/.timed_out
    shift 2
    echo "--- $name"
    set -m # a background job is then the leader of its own process group
    "$@" </dev/null &
    STEP_GROUP=$!
    (
        sleep "$seconds"
        touch "$marker"
        kill -TERM -- "-$STEP_GROUP"
        sleep "$GRACE_S"
        kill -KILL -- "-$STEP_GROUP"
    ) 2>/dev/null &
    WATCH_GROUP=$!
    disown # or the shell reports its end in the log
    set +m
    wait "$STEP_GROUP" || code=$?
    end_groups
    if [[ -e $marker ]]; then
        echo "--- $name: longer than $seconds s" >&2
        exit 124
    fi
    echo "--- $name: exit code $code after $((SECONDS - start)) s"
    return "$code"
}

check() {
    "$PYTHON" -m nemo_opt.testing.check "$@"
}

refused() {
    local expected=$1 text=$2 code=0 output
    shift 2
    output=$("$@" 2>&1) || code=$?
    if [[ $code != "$expected" || $output != *"$text"* ]]; then
        echo "expected exit code $expected with '$text', got $code:" >&2
        echo "$output" >&2
        return 1
    fi
    echo "ok   refused with '$text'"
}

fixtures() {
    FIXTURES=$("$PYTHON" -m nemo_opt.cli fixtures build --path | tail -n 1)
    if [[ ! -d $FIXTURES/teacher ]]; then
        echo "$NAME: no fixtures at '$FIXTURES'" >&2
        return 1
    fi
}
