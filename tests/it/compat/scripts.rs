//! The layout of the shell set-up: scripts, config and bin side by side, a start script that looks for a
//! running relay with pgrep, and `MMPROXY_BIN`.

use std::process::Output;
use std::time::Duration;

use crate::relay::lab::Service;
use crate::support::net::wait_for;

use super::lab::Old;

/// A start script as that set-up has one: the arguments in its order, its pattern, its environment.
pub(super) const START: &str = r#"set -eu
line=$(grep "^$1	" config/instances.tsv)
mark=$(printf %s "$line" | cut -f2) listen=$(printf %s "$line" | cut -f3)
four=$(printf %s "$line" | cut -f4) port=$(printf %s "$line" | cut -f5) six=$(printf %s "$line" | cut -f6)
pattern="go-mmproxy.*-l $listen.*-mark $mark"
if pgrep -f "$pattern" >/dev/null; then echo "$1: already running"; exit 0; fi
exec "$MMPROXY_BIN" -allowed-subnets "$ALLOW_LIST_PATH" -mark "$mark" -l "$listen" \
    -4 "$four:$port" -6 "[$six]:$port" -v 1
"#;

/// Its set-up script: add-all and del-all, with the mark as the table. Without the `-i+` and `-o+` of the real
/// one, which match every interface in iptables-legacy and none in iptables-nft.
pub(super) const SETUP: &str = r#"set -eu
case $1 in add-all) verb=add flag=-A ;; del-all) verb=del flag=-D ;; esac
while read -r mark || [ -n "$mark" ]; do
    case $mark in ''|'#'*) continue ;; esac
    ip rule $verb from 127.0.0.1/8 fwmark "$mark" iif lo lookup "$mark"
    ip -6 rule $verb from ::1 fwmark "$mark" iif lo lookup "$mark"
    ip route $verb local 0.0.0.0/0 dev lo table "$mark"
    ip -6 route $verb local ::/0 dev lo table "$mark"
    for tool in iptables ip6tables; do
        $tool -t mangle $flag PREROUTING -m mark --mark "$mark" -j CONNMARK --save-mark
        $tool -t mangle $flag OUTPUT -m connmark --mark "$mark" -j CONNMARK --restore-mark
    done
done <config/pathways.conf
"#;

/// How that set-up makes a pathway; it works where 127.0.0.0/8 may be routed.
fn old_pathway(old: &Old, mark: u32) {
    let wks = &old.lab.wks;
    wks.sysctl("net.ipv4.conf.all.route_localnet", "1");
    wks.ip(&format!(
        "rule add from 127.0.0.1/8 fwmark {mark} iif lo lookup {mark}"
    ));
    wks.ip(&format!(
        "-6 rule add from ::1 fwmark {mark} iif lo lookup {mark}"
    ));
    wks.ip(&format!("route add local 0.0.0.0/0 dev lo table {mark}"));
    wks.ip(&format!("-6 route add local ::/0 dev lo table {mark}"));
    for program in ["iptables", "ip6tables"] {
        wks.run(&format!(
            "{program} -t mangle -A PREROUTING -m mark --mark {mark} -j CONNMARK --save-mark"
        ));
        wks.run(&format!(
            "{program} -t mangle -A OUTPUT -m connmark --mark {mark} -j CONNMARK --restore-mark"
        ));
    }
}

struct Layout(Old);

impl Layout {
    fn new() -> Self {
        let old = Old::new();
        let wks = &old.lab.wks;
        wks.write("scripts/start-mmproxy.sh", START);
        wks.write("config/pathways.conf", "123\n#125 ");
        // no final newline, as the old example has none
        wks.write(
            "config/instances.tsv",
            "# name\tmark\nvps01-ssh\t123\t10.0.0.1:2222\t127.0.0.1\t2200\t::1",
        );
        wks.write("config/allow.txt", "# the proxies\n10.0.0.2\n");
        Self(old)
    }

    fn start(&self) -> std::process::Command {
        let old = &self.0;
        let mut command = old.lab.wks.command("bash");
        command
            .args(["scripts/start-mmproxy.sh", "vps01-ssh"])
            .current_dir(old.lab.wks.dir())
            .env("MMPROXY_BIN", old.link("go-mmproxy"))
            .env(
                "ALLOW_LIST_PATH",
                old.lab.wks.dir().join("config/allow.txt"),
            )
            .env("RUNTIME_DIRECTORY", old.lab.wks.dir().join("run"));
        command
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_start_script_runs_unchanged_and_finds_the_process() {
    let layout = Layout::new();
    let old = &layout.0;
    old_pathway(old, 123);
    let services: [Service; 2] = old.services(2200);
    let relay = old.lab.wks.spawn(layout.start());
    relay.wait_log("ready");
    old.assert_seen("10.0.0.1:2222", &services);
    // -v 1 of go-mmproxy: the errors of single connections
    let mut stream = old.lab.dial("10.0.0.1:2222".parse().unwrap());
    std::io::Write::write_all(&mut stream, b"SSH-2.0-no-header\r\n").unwrap();
    relay.wait_log("SSH");

    let found = old
        .lab
        .wks
        .try_run("pgrep -f go-mmproxy.*-l.10.0.0.1:2222.*-mark.123");
    let pids: Vec<_> = stdout(&found).lines().map(str::to_owned).collect();
    assert!(pids.contains(&relay.pid().to_string()), "{pids:?}");
    // and by its name alone, as pkill looks for it
    let comm = std::fs::read_to_string(format!("/proc/{}/comm", relay.pid())).expect("its name");
    assert_eq!(comm.trim(), "go-mmproxy");
    let again = layout.start().output().expect("the script");
    assert!(again.status.success(), "{again:?}");
    assert_eq!(stdout(&again).trim(), "vps01-ssh: already running");
}

#[test]
fn the_new_command_reads_the_old_directory() {
    let layout = Layout::new();
    let old = &layout.0;
    let wks = &old.lab.wks;
    let services = old.services(2200);
    let ctl = |words: &str| {
        let mut command = wks.command(env!("CARGO_BIN_EXE_mmproxyctl"));
        command
            .env_remove("ALLOW_LIST_PATH")
            .args(["--config-dir", "config", "--runtime-dir", "run"])
            .args(words.split_whitespace())
            .current_dir(wks.dir());
        command
    };
    let added = ctl("pathway add vps01-ssh").output().expect("mmproxyctl");
    assert!(added.status.success(), "{added:?}");
    let relay = wks.spawn(ctl("run vps01-ssh"));
    relay.wait_log("ready");
    old.assert_seen("10.0.0.1:2222", &services);
}

#[test]
fn a_dynamic_user_without_a_runtime_directory() {
    // as in the forks' units: no RuntimeDirectory=, and /run is root's
    let old = Old::with_loopback_routing(123);
    let services = old.services(2200);
    let private = old.lab.wks.dir().join("tmp");
    std::fs::create_dir(&private).expect("a directory");
    std::os::unix::fs::chown(&private, Some(65534), Some(65534)).expect("chown");
    // the scratch directory is root's alone, and the links are in it
    std::fs::set_permissions(
        old.lab.wks.dir(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .expect("chmod");
    let mut command = old.lab.wks.command("setpriv");
    command
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .args(["--inh-caps", "+net_admin,+net_bind_service"])
        .args(["--ambient-caps", "+net_admin,+net_bind_service"])
        .arg(old.link("go-mmproxy"))
        .args([
            "-l",
            "10.0.0.1:22",
            "-4",
            "127.0.0.1:2200",
            "-6",
            "[::1]:2200",
        ])
        .env("TMPDIR", &private)
        .env_remove("RUNTIME_DIRECTORY");
    let mut relay = old.lab.wks.spawn(command);
    relay.wait_log("ready");
    assert!(
        relay.log().contains("cannot write to /run/mmproxy"),
        "{}",
        relay.log()
    );
    old.assert_seen("10.0.0.1:22", &services);
    relay.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(relay.wait(Duration::from_secs(10)).success());
    wait_for("nothing left behind", || {
        std::fs::read_dir(&private).expect("read").next().is_none()
    });
}
