# Sourced by quickstart.sh and tests/run.sh: installs what is missing, finds cargo. Says what it does.

say() { printf '%s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# as_root COMMAND…: as it stands for root, through sudo for others.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "This needs root, for network namespaces. There is no sudo here: run it as root."
    fi
}

# need PROGRAM:PACKAGE…: installs the packages (Debian's names) whose program is missing. A program with
# a slash is a file. Services are neither started now nor enabled for the next boot.
need() {
    local pair program missing=()
    for pair in "$@"; do
        program=${pair%%:*}
        case $program in
            /*) [ -e "$program" ] && continue ;;
            *) PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null && continue ;;
        esac
        missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null ||
        die "Install these first (Debian's names), then run this again: ${missing[*]}"
    say "Installing: ${missing[*]}"
    as_root bash -euc '
        policy=/usr/sbin/policy-rc.d
        if [ ! -e $policy ]; then
            printf "#!/bin/sh\nexit 101\n" >$policy
            chmod +x $policy
            trap "rm -f $policy" EXIT
        fi
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        apt-get install -qq -y --no-install-recommends "$@" >/dev/null
        declare -A units=([haproxy]=haproxy.service [nginx]=nginx.service [openssh-server]="ssh.service ssh.socket")
        for package in "$@"; do
            for unit in ${units[$package]-}; do
                systemctl disable --quiet "$unit" 2>/dev/null || true
            done
        done
    ' setup "${missing[@]}" </dev/null || die "The installation failed."
}

# need_cargo: cargo in PATH, from rustup's usual place or Debian's rustup package if need be.
need_cargo() {
    command -v cargo >/dev/null && return 0
    [ -x "$HOME/.cargo/bin/cargo" ] && PATH=$HOME/.cargo/bin:$PATH && return 0
    if [ -n "$(apt-cache policy rustup 2>/dev/null | grep -E 'Candidate: [0-9]')" ]; then
        need rustup:rustup
        say "Installing the stable Rust toolchain with rustup"
        rustup toolchain install stable --profile default --no-self-update >/dev/null && rustup default stable >/dev/null &&
            command -v cargo >/dev/null && return 0
    fi
    die "cargo is missing: install Rust $(rust_version) or newer, for example with
  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y
(Debian 13 and Ubuntu 24.04 or newer: apt install rustup && rustup default stable), then run this again."
}

rust_version() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml"; }
