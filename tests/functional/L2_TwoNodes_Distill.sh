#!/usr/bin/env bash
# A distillation over two hosts has the numbers of one host's, and ends within a minute, with the lost host's name, when a host drops out.
# tier=L2 ranks=2 timeout=900 device=cpu needs=fixtures,namespaces layout=TP1PP2 owner=@nemo_opt
# shellcheck source=tests/functional/two_hosts.sh
source "$(dirname "${BASH_SOURCE[0]}")/two_hosts.sh"
# shellcheck source=tests/functional/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
fixtures
two_hosts

cat >"$OUT/distillation.yaml" <<'YAML'
logit_layers: ["output_layer", "output_layer"]
intermediate_layer_pairs:
  - ["decoder.final_layernorm", "decoder.final_layernorm"]
YAML

# What follows `python -m`: NeMo's script, with NAME, STEPS and ranks.
distillation() {
    local name=$1 steps=$2
    arguments=(nemo_opt.scripts.gpt_train --name "$name" --log_dir "$OUT" --model_path "$FIXTURES/student" --teacher_path "$FIXTURES/teacher"
        --kd_config "$OUT/distillation.yaml" --tp_size 1 --pp_size 2 --max_steps "$steps" --warmup_steps 3 --gbs 8 --mbs 4 --lr 2e-3
        --min_lr 2e-4 --seq_length 128 --split "99,1,0" --data_paths "$FIXTURES/data/text" --log_interval 1 --result_json "$OUT/$name.json")
}

on_one_host() {
    distillation one 10
    py -m "${arguments[@]}" --devices 2
}

# HOST's half of a run over both; leaves "exit code, time it ended" in NAME-HOST.end and its output in NAME-HOST.log.
half() {
    local host=$1 name=$2 steps=$3 is_host=0 code=0
    [[ $host != host-a ]] || is_host=1
    distillation "$name" "$steps"
    PYTHON=$(python_on "$host") py -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --max-restarts 0 --local-addr "${ADDRESS[$host]}" \
        --rdzv-backend c10d --rdzv-id "$name" --rdzv-endpoint "${ADDRESS[host-a]}:29400" --rdzv-conf "is_host=$is_host" \
        -m nemo_opt.hosts --limit 15 -m "${arguments[@]}" --devices 1 --num_nodes 2 >"$OUT/$name-$host.log" 2>&1 || code=$?
    echo "$code $EPOCHREALTIME" >"$OUT/$name-$host.end"
}

on_two_hosts() {
    local host
    for host in "${HOSTS[@]}"; do
        half "$host" "$1" "$2" &
    done
    wait
    for host in "${HOSTS[@]}"; do
        sed "s/^/$host: /" "$OUT/$1-$host.log"
    done
    test "$(cut -d ' ' -f 1 "$OUT/$1-host-a.end" "$OUT/$1-host-b.end" | xargs)" = "0 0"
}

# Runs NAME until its third step, does COMMAND... to host-b, waits, and writes NAME.json: exit code, seconds and words of each host afterwards.
broken_by() {
    local name=$1 host at code ended
    shift
    on_two_hosts "$name" 100000 &
    until [[ -e $OUT/$name/metrics.jsonl && $(wc -l <"$OUT/$name/metrics.jsonl") -ge 3 ]]; do
        kill -0 $!
        sleep 0.1
    done
    for host in "${HOSTS[@]}"; do
        wc -l <"$OUT/$name-$host.log" >"$OUT/$name-$host.lines"
    done
    at=$EPOCHREALTIME
    echo "$* after $(wc -l <"$OUT/$name/metrics.jsonl") steps"
    "$@"
    wait $! && exit 1 # it cannot succeed with one host
    for host in "${HOSTS[@]}"; do
        read -r code ended <"$OUT/$name-$host.end"
        printf '"%s": {"exit_code": %s, "seconds": %s, "names_a": %s, "names_b": %s}\n' "${host/-/_}" "$code" \
            "$(awk "BEGIN { print $ended - $at }")" "$(names "$name-$host" host-a)" "$(names "$name-$host" host-b)"
    done | awk 'BEGIN { print "{" } NR > 1 { print "," } { print } END { print "}" }' >"$OUT/$name.json"
    cat "$OUT/$name.json"
}

# Whether RUN blames HOST, by name or by address, in what it printed after its third step.
names() {
    tail -n "+$(($(<"$OUT/$1.lines") + 1))" "$OUT/$1.log" |
        grep -E "host $2 .*was lost|error \[?${ADDRESS[$2]}|closed by peer \[?${ADDRESS[$2]}" >/dev/null && echo true || echo false
}

step "distil on one host" 300 on_one_host
step "distil on two hosts" 300 on_two_hosts two 10
# Measured: equal to the bit. The same layout, and gloo adds in the same order over any cable.
check "$OUT/two.json" --with one="$OUT/one.json" 'steps == 10' 'layout == "TP1PP2"' 'loss_after < loss_before' \
    'abs(kd_loss_first - one.kd_loss_first) < 1e-5' 'abs(loss_before - one.loss_before) < 1e-5' 'abs(loss_after - one.loss_after) < 1e-5'

export NEMO_OPT_COVERAGE_KILLED=1 # what is ended here may leave no data
step "a host's processes are killed" 300 broken_by killed power_off host-b
check "$OUT/killed.json" 'host_b.exit_code == 137' 'host_a.exit_code == 1' 'host_a.seconds < 60' 'host_a.names_b'

step "a host loses its network" 300 broken_by unplugged unplug host-b
check "$OUT/unplugged.json" 'host_a.exit_code == 1' 'host_a.seconds < 60' 'host_a.names_b' 'host_b.exit_code == 1' 'host_b.seconds < 60' \
    'host_b.names_a'
