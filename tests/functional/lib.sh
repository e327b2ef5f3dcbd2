#!/usr/bin/env bash
# What every functional script sources. It gives them:
#   OUT            an empty directory, removed at the end unless it was given
#   fixtures       makes or finds the fixtures; FIXTURES is their directory afterwards
#   py ARGS...     python
#   step NAME SECONDS COMMAND...   runs a command in a process group of its own with its own time limit; 124 means that it ran out of it
#   check RESULT.json [--with NAME=FILE] EXPRESSION...   asserts numbers, of a JUnit XML file (RESULT.xml) the counts of its tests
#   refused CODE TEXT COMMAND...   a command that must fail with that code and say that text
#   asserting COMMAND...   any other command that judges and records its verdict (nemo_opt.testing.assertions)
# Whatever a step started is ended with it. Exit codes: 124 out of time; 75 for what is not the script's fault, no fixtures or a full disk.
# From the suite's runner come NEMO_OPT_ASSERTIONS, the file that a script must record something in, NEMO_OPT_METRICS, a directory for copies
# of metrics.jsonl, and NEMO_OPT_TIMEOUT_SCALE, a factor of the steps' time limits.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
NAME=$(basename "$0" .sh)
GRACE_S=10
LEAST_FREE_KIB=16384 # less is a full disk
cd "$ROOT"
# Not for commands, which may be suites themselves: `asserting` hands the first on.
ASSERTIONS=${NEMO_OPT_ASSERTIONS:-}
METRICS=${NEMO_OPT_METRICS:-}
TIMEOUT_SCALE=${NEMO_OPT_TIMEOUT_SCALE:-1}
unset NEMO_OPT_ASSERTIONS NEMO_OPT_METRICS NEMO_OPT_TIMEOUT_SCALE

KEEP_OUT=${OUT:+1}
OUT=${OUT:-$(mktemp -d "${TMPDIR:-/tmp}/nemo_opt_$NAME.XXXXXX")}
mkdir -p "$OUT"
if [[ -n $(ls -A "$OUT") ]]; then
    echo "$NAME: OUT=$OUT is not empty" >&2
    exit 2
fi

STEP_GROUP=""
WATCH_GROUP=""

# Where coverage is measured, says whom the script ends: they leave no data (ci/measured.py).
mark_ended() {
    local pid
    [[ -n ${NEMO_OPT_COVERAGE_MARKS:-} ]] || return 0
    for pid in $(pgrep -g "$STEP_GROUP"); do
        echo "{\"host\": \"$(hostname)\", \"pid\": $pid}" >"$NEMO_OPT_COVERAGE_MARKS/ended.$(hostname).$pid.lib.json"
    done
}

# SIGTERM for what is left of the step, and SIGKILL for what that does not end.
end_step() {
    local attempt
    mark_ended || true
    kill -TERM -- "-$STEP_GROUP" 2>/dev/null || return 0
    for ((attempt = 0; attempt < GRACE_S * 10; attempt++)); do
        sleep 0.1
        kill -0 -- "-$STEP_GROUP" 2>/dev/null || return 0
    done
    kill -KILL -- "-$STEP_GROUP" 2>/dev/null || true
}

end_groups() {
    # The watch has nothing to clean up, and may not have dropped this shell's traps yet, which would swallow a SIGTERM.
    [[ -z $WATCH_GROUP ]] || kill -KILL -- "-$WATCH_GROUP" 2>/dev/null || true
    [[ -z $STEP_GROUP ]] || end_step
    STEP_GROUP=""
    WATCH_GROUP=""
}

keep_metrics() {
    local file name
    [[ -n $METRICS ]] || return 0
    mkdir -p "$METRICS"
    while IFS= read -r file; do
        name=${file#"$OUT"/}
        cp "$file" "$METRICS/${name//\//_}" # run_metrics.jsonl
    done < <(find "$OUT" -name metrics.jsonl)
}

finish() {
    local code=$? free
    trap - EXIT
    end_groups
    keep_metrics || true
    free=$(df -Pk "$OUT" | awk 'NR == 2 { print $4 }') || free=unknown
    if [[ $code != 0 && $free =~ ^[0-9]+$ && $free -lt $LEAST_FREE_KIB ]]; then
        echo "$NAME: the disk is full: $free KiB are free for $OUT (exit code $code before)"
        code=75
    fi
    case $code in
        0) echo "$NAME: passed" ;;
        75) echo "$NAME: INFRASTRUCTURE (exit code 75)" ;;
        124) echo "$NAME: TIMEOUT (exit code 124)" ;;
        *) echo "$NAME: FAILED (exit code $code)" ;;
    esac
    [[ -n $KEEP_OUT ]] || rm -rf "$OUT"
    exit "$code"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

py() { "$PYTHON" "$@"; }

step() {
    local name=$1 seconds=$2 start=$SECONDS code=0
    local marker=$OUT/.timed_out
    shift 2
    seconds=$(awk "BEGIN { print $seconds * $TIMEOUT_SCALE }")
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

asserting() {
    NEMO_OPT_ASSERTIONS=$ASSERTIONS "$@"
}

check() {
    asserting "$PYTHON" -m nemo_opt.testing.check "$@"
}

refused() {
    local expected=$1 text=$2 code=0 output holds=true
    shift 2
    output=$("$@" 2>&1) || code=$?
    [[ $code == "$expected" && $output == *"$text"* ]] || holds=false
    asserting "$PYTHON" -m nemo_opt.testing.assertions refused "$text" "$holds"
    if [[ $holds == false ]]; then
        echo "expected exit code $expected with '$text', got $code:" >&2
        echo "$output" >&2
        return 1
    fi
    echo "ok   refused with '$text'"
}

fixtures() {
    FIXTURES=$("$PYTHON" -m nemo_opt.cli fixtures build --path | tail -n 1) || true
    if [[ ! -d $FIXTURES/teacher ]]; then
        echo "$NAME: no fixtures at '$FIXTURES'" >&2
        exit 75
    fi
}
