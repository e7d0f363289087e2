#!/usr/bin/env bash
# Runs the tests, after setting up whatever a Debian-like machine lacks for them.
#
#   ./tests/run.sh               everything but the long ones
#   ./tests/run.sh --soak        the long ones, too
#   ./tests/run.sh chain         only tests whose name contains "chain"
#   ./tests/run.sh --setup-only  install what is missing and stop
#
# The tests build network namespaces and never touch the host's own network; that takes root, so
# without it the test programs (not the compiler) run through sudo.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=examples/setup.sh
. examples/setup.sh

# need_aioquic: an HTTP/3 client and server from PyPI, in a Python environment beside the build.
need_aioquic() {
    local home=${CARGO_TARGET_DIR:-target}/aioquic
    [ ! -e "$home/installed" ] || return 0
    need /usr/share/doc/python3-venv:python3-venv
    say "Installing aioquic in $home"
    /usr/bin/python3 -m venv "$home" && "$home/bin/pip" install --quiet aioquic==1.7.2 ||
        die "aioquic cannot be installed: the soak's HTTP/3 test needs it. Is PyPI within reach?"
    touch "$home/installed"
}

cargo_arguments=() filter=() setup_only= soak=
for argument in "$@"; do
    case $argument in
        --soak) soak=1 cargo_arguments+=(--features soak) ;;
        --setup-only) setup_only=1 ;;
        *) filter+=("$argument") ;;
    esac
done

need cc:gcc ip:iproute2 iptables:iptables nft:nftables conntrack:conntrack haproxy:haproxy nginx:nginx \
    /usr/share/nginx/modules-available/mod-stream.conf:libnginx-mod-stream \
    sshd:openssh-server ssh:openssh-client curl:curl socat:socat sysctl:procps \
    /lib/systemd/systemd:systemd /lib/systemd/system/dbus.socket:dbus tmux:tmux nc:netcat-openbsd promtool:prometheus dnsdist:dnsdist unbound:unbound dig:bind9-dnsutils \
    strace:strace setpriv:util-linux podman:podman crun:crun busybox:busybox-static \
    /usr/lib/podman/netavark:netavark
need_cargo
if [ -n "$soak" ]; then
    need_aioquic
    # the packages are installed over Debian's, in a copy of this machine
    need go-mmproxy:go-mmproxy rpm:rpm
fi
[ -z "$setup_only" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null ||
        die "The tests need root, for network namespaces. There is no sudo here: run $0 as root."
    triple=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
    export "CARGO_TARGET_${triple}_RUNNER=sudo --preserve-env"
fi

[ -z "$soak" ] || ./packaging/build.sh

# the dev profile, which is optimised a little because the data path is tested with gigabytes
exec cargo test --no-fail-fast --locked ${cargo_arguments[@]+"${cargo_arguments[@]}"} -- ${filter[@]+"${filter[@]}"} </dev/null
