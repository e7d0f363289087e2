//! Pathways on the real kernel, checked with `ip`, `iptables-save` and `nft`.

#![expect(
    clippy::unwrap_used,
    reason = "clippy does not take functions that tests share for tests"
)]

/// The same tests over both back ends: with what `auto` finds here, iptables, and with nftables.
macro_rules! over_both {
    ($($test:ident),* $(,)?) => {
        mod iptables {
            $(#[test] fn $test() { super::$test(mmproxyctl::pathway::Firewall::Auto) })*
        }
        mod nftables {
            $(#[test] fn $test() { super::$test(mmproxyctl::pathway::Firewall::Nftables) })*
        }
    };
}

mod backends;
mod cells;
mod deletions;
mod foreign;
mod hosts;
#[cfg(feature = "soak")]
mod many;
mod state;
mod watch;

use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use mmproxyctl::model::{Mark, Pathway};
use mmproxyctl::pathway::{self, Options, Report};
use mmproxyctl::runtime_dir::RuntimeDir;
use serde_json::Value;

use crate::support::net::{Host, wait_for};

/// What shows rules, routes and lines.
const PIECES: [&str; 6] = [
    "ip -j rule",
    "ip -j -6 rule",
    "ip -j route show table all",
    "ip -j -6 route show table all",
    "iptables-save -t mangle",
    "ip6tables-save -t mangle",
];

/// What shows empty tables and chains, too.
const RESIDUE: [&str; 3] = ["iptables-save", "ip6tables-save", "nft list ruleset"];

/// Everything the kernel lists that a pathway could touch, in the words of other programs.
pub(crate) fn listing(host: &Host) -> String {
    listed(host, &PIECES) + &listed(host, &RESIDUE)
}

/// [`listing`] without what has no effect: empty chains, and the order of what has the same priority.
pub(crate) fn effects(host: &Host) -> String {
    let mut listing = listed(host, &PIECES);
    if host.run("nft list tables").contains("table inet mmproxy\n") {
        listing += &listed(host, &["nft list table inet mmproxy"]);
    }
    let mut lines: Vec<_> = listing
        .lines()
        .map(|line| line.trim_matches(&['[', ']', ','][..]))
        .map(|line| line.replace(":made-chain", "").replace(":made-table", ""))
        .collect();
    lines.sort_unstable();
    lines.join("\n")
}

fn listed(host: &Host, commands: &[&str]) -> String {
    let mut text = String::new();
    for command in commands {
        text.push_str(&format!("== {command}\n"));
        for line in host.run(command).lines() {
            // the time of day, and counters
            if line.starts_with('#') {
                continue;
            }
            let line = line.split(" [").next().unwrap_or(line);
            let line = match line.split_once("counter packets ") {
                Some((before, counted)) => {
                    let after = counted.splitn(4, ' ').nth(3).unwrap_or_default();
                    format!("{before}counter {after}")
                }
                None => line.to_owned(),
            };
            // one object a line, so that a difference can be shown
            text.push_str(&line.replace("},{", "},\n{"));
            text.push('\n');
        }
    }
    text
}

/// Panics unless two listings are the same to the byte, and then shows the lines that differ.
#[track_caller]
pub(crate) fn assert_same(now: &str, expected: &str, when: &str) {
    if now == expected {
        return;
    }
    let only_in = |one: &str, other: &str, sign: char| -> String {
        let other: HashSet<_> = other.lines().collect();
        one.lines()
            .filter(|line| !other.contains(line))
            .map(|line| format!("{sign} {line}\n"))
            .collect()
    };
    let (more, less) = (only_in(now, expected, '+'), only_in(expected, now, '-'));
    panic!("{when}: the kernel's listings differ (in order, where nothing follows):\n{more}{less}");
}

/// Gives the host an `eth0` that leads nowhere, up and quiet: no address comes to it by itself.
pub(crate) fn interface(host: &Host, addresses: &[&str]) {
    host.ip("link add eth0 type veth peer name eth0-far");
    for interface in ["eth0-far", "eth0"] {
        host.ip(&format!("link set {interface} addrgenmode none up"));
    }
    wait_for("carrier on eth0", || {
        host.ip("link show eth0").contains("state UP")
    });
    for address in addresses {
        host.address("eth0", address);
        // the kernel enters an IPv6 address in the local table from a work queue
        let own = address.split('/').next().unwrap_or(address);
        wait_for("the local route of an address", || {
            let routes = host.ip("route show table local") + &host.ip("-6 route show table local");
            routes.contains(&format!("local {own} "))
        });
    }
}

/// A pathway with nothing said about it but targets.
pub(crate) fn pathway(mark: u32, targets: &[&str]) -> Pathway {
    let mut pathway = Pathway::with_defaults(Mark::new(mark).unwrap()).unwrap();
    pathway.targets = targets
        .iter()
        .map(|target| mmproxyctl::model::parse_prefix(target).unwrap())
        .collect();
    pathway
}

/// Runs an async call of the library in the host's namespace.
pub(crate) fn inside<T: Send>(host: &Host, call: impl AsyncFnOnce() -> T + Send) -> T {
    host.enter(|| {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(call())
    })
}

pub(crate) fn options(host: &Host) -> Options {
    Options {
        dry_run: false,
        runtime_dir: RuntimeDir::resolve(Some(host.dir().join("run"))),
        lock_timeout: Duration::from_secs(20),
        firewall: host.firewall(),
        set_sysctls: false,
    }
}

/// `pathway add` through the library; panics when it fails.
pub(crate) fn add(host: &Host, pathways: &[Pathway]) -> Report {
    let options = options(host);
    inside(host, async || pathway::add(pathways, &options).await)
        .unwrap_or_else(|error| panic!("add: {error}: {:?}", std::error::Error::source(&error)))
}

/// `pathway del` through the library; panics when it fails.
pub(crate) fn del(host: &Host, pathways: &[Pathway]) -> Report {
    let options = options(host);
    inside(host, async || pathway::del(pathways, &options).await)
        .unwrap_or_else(|error| panic!("del: {error}: {:?}", std::error::Error::source(&error)))
}

/// The binary: its exit code, stdout, stderr.
pub(crate) fn ctl(host: &Host, words: &str) -> (i32, String, String) {
    std::fs::create_dir_all(host.dir().join("etc")).unwrap();
    finish(host.mmproxyctl(words))
}

pub(crate) fn finish(mut command: Command) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}: install it (./tests/run.sh does)"));
    let code = status.code().unwrap_or(-1);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (code, text(stdout), text(stderr))
}

/// The binary with `--json`; panics unless it exits 0.
pub(crate) fn json(host: &Host, words: &str) -> Value {
    let (code, out, err) = ctl(host, words);
    assert_eq!(code, 0, "{words}: {out}{err}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{words}: {error}: {out}"))
}

/// Fills a directory with links, for a PATH that offers just these programs.
pub(crate) fn programs(dir: &Path, links: &[(&str, &str)]) {
    std::fs::create_dir_all(dir).unwrap();
    for (name, target) in links {
        assert!(Path::new(target).exists(), "{target}: install iptables");
        std::os::unix::fs::symlink(target, dir.join(name)).unwrap();
    }
}
