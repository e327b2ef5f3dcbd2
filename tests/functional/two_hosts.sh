#!/usr/bin/env bash
# Two hosts on one machine: network namespaces of their own, with names and addresses, joined by a virtual cable. Sourced before lib.sh.
#   two_hosts            makes them, or ends the script as infrastructure (75) where the machine does not permit it
#   HOSTS, ADDRESS[HOST] their names and addresses; INTERFACE is the end of the cable on each
#   python_on HOST       path of a python that runs on the host; what it starts is one process tree in a namespace of its own
#   power_off HOST       SIGKILL for that tree, all at once
#   unplug HOST          takes its end of the cable down: nothing is closed, nothing arrives any more
# Nothing remains: namespaces end with their last process, and each of these ends with the script.
HOSTS=(host-a host-b)
declare -A ADDRESS=([host-a]=10.213.0.1 [host-b]=10.213.0.2)
declare -A HOLDER=()
INTERFACE=eth0
NAMESPACES=(--net --uts --pid --fork --mount-proc)

impossible() {
    echo "$(basename "$0" .sh): this machine does not permit namespaces: $1" >&2
    echo "It takes root with CAP_SYS_ADMIN, or user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu)." >&2
    exit 75
}

if [[ $(id -u) != 0 ]]; then # root in a namespace will do
    why=$(unshare --user --map-root-user "${NAMESPACES[@]}" true 2>&1) || impossible "$why"
    exec unshare --user --map-root-user bash "$0" "$@"
fi

two_hosts() {
    local host why
    why=$(unshare "${NAMESPACES[@]}" true 2>&1) || impossible "$why"
    for host in "${HOSTS[@]}"; do
        setpriv --pdeathsig KILL unshare --net --uts sleep infinity &
        HOLDER[$host]=$!
        disown
        _until_separate "$host"
    done
    why=$(on host-a ip link add "$INTERFACE" type veth peer name "$INTERFACE" netns "${HOLDER[host-b]}" 2>&1) || impossible "$why"
    for host in "${HOSTS[@]}"; do
        on "$host" hostname "$host"
        on "$host" ip link set lo up
        on "$host" ip address add "${ADDRESS[$host]}/24" dev "$INTERFACE"
        on "$host" ip link set "$INTERFACE" up
        # Else torchrun waits a quarter of an hour for a store behind a dead link: with 15 retransmissions, the kernel's default.
        on "$host" sh -c 'echo 6 >/proc/sys/net/ipv4/tcp_retries2'
    done
}

_until_separate() {
    local attempt
    for attempt in {1..100}; do
        [[ $(readlink "/proc/${HOLDER[$1]}/ns/net") == "$(readlink /proc/$$/ns/net)" ]] || return 0
        sleep 0.1
    done
    impossible "no namespace for $1 after $attempt attempts"
}

on() {
    nsenter --net --uts --target "${HOLDER[$1]}" "${@:2}"
}

python_on() {
    local file=$OUT/python-on-$1
    cat >"$file" <<PYTHON_ON
#!/usr/bin/env bash
echo \$\$ >"$OUT/$1.pid"
exec setpriv --pdeathsig KILL nsenter --net --uts --target ${HOLDER[$1]} unshare --pid --fork --kill-child=KILL \\
    --mount-proc env GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE OMP_NUM_THREADS=1 "$PYTHON" "\$@"
PYTHON_ON
    chmod +x "$file"
    echo "$file"
}

power_off() {
    kill -KILL "$(<"$OUT/$1.pid")"
}

unplug() {
    on "$1" ip link set "$INTERFACE" down
}
