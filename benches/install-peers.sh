#!/bin/sh
# Installs the programs that `cargo bench --bench relay` compares with: three Debian packages, and
# mmproxy (crates.io) into target/peers, which is private to this checkout.
set -eu
cd "$(dirname "$0")/.."

if [ "$(id -u)" -ne 0 ]; then
    echo "install-peers.sh installs packages: run it as root" >&2
    exit 1
fi

export DEBIAN_FRONTEND=noninteractive
packages="haproxy nginx libnginx-mod-stream go-mmproxy iproute2 iptables strace"
missing=""
for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' ||
        missing="$missing $package"
done
if [ -n "$missing" ]; then
    apt-get update -q
    # the services of haproxy and nginx shall not be started on this host
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        trap 'rm -f "$policy"' EXIT
    fi
    # shellcheck disable=SC2086
    apt-get install -q -y --no-install-recommends $missing
fi

# --locked: with newer dependencies mmproxy 0.2.2 does not compile (it leans on a socket2 feature that an old
# tokio switched on). Pinned, because figures are only comparable between the same versions.
cargo install mmproxy --version =0.2.2 --locked --root target/peers --target-dir target/peers/build

for package in haproxy nginx go-mmproxy; do
    printf '%-12s %s\n' "$package" "$(dpkg-query -W -f '${Version}' "$package")"
done
printf '%-12s %s\n' mmproxy "$(sed -n 's/^"mmproxy \([^ ]*\) .*/\1/p' target/peers/.crates.toml)"
