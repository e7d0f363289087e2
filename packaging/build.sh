#!/usr/bin/env bash
# Builds the Debian and the RPM package into target/packages, for this machine's architecture and for
# distributions whose C library is at least as new as the one here.
#
#   ./packaging/build.sh
#
# Installs cargo-deb and cargo-generate-rpm into target/tools first, unless they are in PATH.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=examples/setup.sh
. examples/setup.sh

# pinned, because the names of the packages' files and what is in them are tested
deb_version=3.8.0 rpm_version=0.21.1

need cc:gcc dpkg-shlibdeps:dpkg-dev strip:binutils
need_cargo
target=${CARGO_TARGET_DIR:-$root/target}
export CARGO_TARGET_DIR=$target
PATH=$target/tools/bin:$PATH
command -v cargo-deb >/dev/null ||
    cargo install --quiet --locked --root "$target/tools" --target-dir "$target/tools/build" cargo-deb@$deb_version
command -v cargo-generate-rpm >/dev/null ||
    cargo install --quiet --locked --root "$target/tools" --target-dir "$target/tools/build" cargo-generate-rpm@$rpm_version

cargo build --release --locked
contents=$target/release/package
mkdir -p "$contents/bin" "$target/packages"
# names of functions stay, for what a crash prints
strip --strip-debug -o "$contents/bin/mmproxyctl" "$target/release/mmproxyctl"
./packaging/share.sh "$contents/bin/mmproxyctl" "$contents" >/dev/null

rm -f "$target/packages/"*.deb "$target/packages/"*.rpm
cargo deb --quiet --no-build --no-strip --output "$target/packages/"
cargo generate-rpm --target-dir "$target" --auto-req builtin --output "$target/packages/"
ls -1 "$target/packages/"*.deb "$target/packages/"*.rpm
