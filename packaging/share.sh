#!/bin/sh
# Makes what the packages hold beyond the program and this repository's files: manual pages, completions.
#
#   ./packaging/share.sh MMPROXYCTL DIRECTORY
set -eu
program=$1 dir=$2

rm -rf "$dir/man" "$dir/completions"
mkdir -p "$dir/completions"
"$program" man --dir "$dir/man"
# as both distributions have their pages; -n: no time in it, so that the same program makes the same package
gzip -9n "$dir/man/"*.1
"$program" completions bash >"$dir/completions/mmproxyctl.bash"
"$program" completions fish >"$dir/completions/mmproxyctl.fish"
"$program" completions zsh >"$dir/completions/_mmproxyctl"
