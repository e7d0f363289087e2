#!/usr/bin/env bash
# The main job on real traffic: HAProxy on two proxies, sshd behind them, and sshd's own log with the
# addresses of the real clients. Everything runs in private network, mount and process namespaces that
# vanish with this script; of the host it touches nothing but the packages that are missing and target/.
#
#   client 203.0.113.7, 2001:db8:7::7
#     |- vps01     192.0.2.5, 2001:db8:5::5   HAProxy, send-proxy-v2   (examples/vps01-haproxy/)
#     `- router01  192.0.2.6, 2001:db8:6::6   HAProxy, send-proxy      (examples/router01-openwrt/)
#          `- wks01  100.101.102.123          mmproxyctl -> sshd       (config/*.example)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/setup.sh
. "$root/examples/setup.sh"

if [ "${1-}" != --inside ]; then
    need cc:gcc ip:iproute2 iptables:iptables haproxy:haproxy sshd:openssh-server ssh:openssh-client \
        sysctl:procps unshare:util-linux
    need_cargo
    say "Building mmproxyctl"
    # where --inside looks for it, whatever CARGO_TARGET_DIR says
    (cd "$root" && cargo build --release --locked --quiet --target-dir target)
    as_root unshare --net --mount --propagation private --pid --fork --kill-child --mount-proc \
        bash "$root/examples/quickstart.sh" --inside </dev/null
    exit
fi

# --- from here on as root in namespaces of our own -----------------------------------------------------

PATH=$root/target/release:$PATH:/usr/sbin:/sbin
# netns names, sshd's directory, locks and our files: all on a file system that nobody else sees
mount -t tmpfs -o mode=755 quickstart /run
mkdir -p /run/quickstart/etc /run/sshd
cd /run/quickstart
# where root's password is locked with "!", sshd without PAM takes no key either
sed 's/^root:[^:]*:/root:*:/' /etc/shadow >shadow
chmod 600 shadow
mount --bind shadow /etc/shadow

families=(4)
[ -e /proc/sys/net/ipv6 ] && families=(4 6) || echo "This kernel runs without IPv6: IPv4 only."

on() { ip netns exec "$@"; }
# start HOST LOG COMMAND…: in the background; $! is the command's own pid
start() {
    ip netns exec "$1" "${@:3}" >"$2" 2>&1 &
}
# link HOST INTERFACE PEER PEER_INTERFACE HOST4 PEER4 [HOST6 PEER6]: a cable between two hosts
link() {
    ip -n "$1" link add "$2" type veth peer name "$4" netns "$3"
    cable_end "$1" "$2" "$5" "$6" "${@:7:2}"
    cable_end "$3" "$4" "$6" "$5" ${8+"$8"} ${7+"$7"}
}
# cable_end HOST INTERFACE OWN4 OTHER4 [OWN6 OTHER6]
cable_end() {
    ip -n "$1" link set "$2" up
    ip -n "$1" address add "$3/32" dev "$2"
    ip -n "$1" route add "$4" dev "$2" src "$3"
    [ $# -gt 4 ] && [ ${#families[@]} -eq 2 ] || return 0
    ip -n "$1" address add "$5/128" dev "$2" nodad
    ip -n "$1" route add "$6" dev "$2" src "$5"
}
# until_listening HOST PORT LOG
until_listening() {
    for _ in $(seq 500); do
        [ -z "$(on "$1" ss -Hltn "sport = :$2")" ] || return 0
        sleep 0.02
    done
    echo "Nothing listens on port $2 of $1:"
    cat "$3"
    exit 1
}

for host in client vps01 router01 wks01; do
    ip netns add $host
    ip -n $host link set lo up
    [ ${#families[@]} -eq 1 ] || on $host sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0
done
link client vps01 vps01 public 203.0.113.7 192.0.2.5 2001:db8:7::7 2001:db8:5::5
link client router01 router01 public 203.0.113.7 192.0.2.6 2001:db8:7::7 2001:db8:6::6
link vps01 wks01 wks01 vps01 100.103.104.105 100.101.102.123
link router01 wks01 wks01 router01 100.103.104.106 100.101.102.123
# as on any real host there is a way out that replies could take instead of the pathway
for family in "${families[@]}"; do ip -n wks01 -"$family" route add default dev vps01; done

# sshd on wks01, with keys of its own
ssh-keygen -q -t ed25519 -N '' -f hostkey
ssh-keygen -q -t ed25519 -N '' -f key
cat >sshd_config <<CONFIG
HostKey $PWD/hostkey
AuthorizedKeysFile $PWD/key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
CONFIG
start wks01 sshd.log "$(command -v sshd)" -D -e -f sshd_config
until_listening wks01 22 sshd.log

# login LABEL ADDRESS EXPECTED: a command over ssh; sshd's line about it must name the expected client
failed=0
login() {
    local before line
    before=$(wc -l <sshd.log)
    if ! on client ssh -F none -i key -p 22001 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
        -o LogLevel=ERROR -o BatchMode=yes -o ConnectTimeout=5 "root@$2" true 2>ssh.log; then
        echo "  FAILED  $1: $(cat ssh.log)"
        failed=1
        return
    fi
    line=$(tail -n +$((before + 1)) sshd.log | grep '^Accepted publickey' | sed 's/ ssh2:.*//')
    case $line in
        *" from $3 port "*) printf '  %-15s %s\n' "$1" "$line" ;;
        *) printf '  %-15s %s   FAILED: expected %s\n' "$1" "$line" "$3"; failed=1 ;;
    esac
}

echo
echo "The client is 203.0.113.7 and 2001:db8:7::7. What sshd on wks01 logs ..."
echo
echo "... behind HAProxy alone (the proxy instead of the client):"
sed 's/:2222 send-proxy-v2/:22/' "$root/examples/vps01-haproxy/haproxy.cfg" >before.cfg
start vps01 before.log haproxy -db -f before.cfg
before=$!
until_listening vps01 22001 before.log
for family in "${families[@]}"; do
    [ "$family" = 4 ] && address=192.0.2.5 || address=2001:db8:5::5
    login "vps01 IPv$family" $address 100.103.104.105
done
kill $before
wait $before || true

for file in pathways.conf instances.tsv allow.txt; do cp "$root/config/$file.example" etc/$file; done
export MMPROXY_CONFIG_DIR=$PWD/etc
on wks01 mmproxyctl pathway add-all >pathway.log 2>&1 || { cat pathway.log; exit 1; }
for name in vps01-ssh router01-ssh; do start wks01 $name.log mmproxyctl run $name; done
until_listening wks01 2222 vps01-ssh.log
until_listening wks01 2223 router01-ssh.log
start vps01 vps01.log haproxy -db -f "$root/examples/vps01-haproxy/haproxy.cfg"
start router01 router01.log haproxy -db -f "$root/examples/router01-openwrt/haproxy.cfg"
until_listening vps01 22001 vps01.log
until_listening router01 22001 router01.log

echo
echo "... with mmproxyctl on wks01 (the client itself):"
for family in "${families[@]}"; do
    [ "$family" = 4 ] && client=203.0.113.7 || client=2001:db8:7::7
    [ "$family" = 4 ] && address=192.0.2.5 || address=2001:db8:5::5
    login "vps01 IPv$family" $address $client
    [ "$family" = 4 ] && address=192.0.2.6 || address=2001:db8:6::6
    login "router01 IPv$family" $address $client
done
echo
if [ $failed -ne 0 ]; then
    for log in *.log; do echo "--- $log"; cat "$log"; done
    exit 1
fi
echo "All of it ran on real HAProxy, sshd and kernel routing, and is gone now."
echo "The files used: config/*.example, examples/vps01-haproxy, examples/router01-openwrt."
