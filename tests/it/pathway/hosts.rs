//! Hosts that lack something: iptables, IPv6, privileges, an idle lock.

use std::fs::File;
use std::process::Command;
use std::time::Instant;

use super::{assert_same, ctl, finish, listing, programs};
use crate::support::net::Host;

const NFT: &str = "/usr/sbin/xtables-nft-multi";
const LEGACY: &str = "/usr/sbin/xtables-legacy-multi";

/// The binary with a PATH of its own.
fn with_path(host: &Host, words: &str) -> Command {
    std::fs::create_dir_all(host.dir().join("etc")).unwrap();
    let mut command = host.mmproxyctl(words);
    command.env("PATH", host.dir().join("bin"));
    command
}

/// Rules, routes and both variants' lines, without asking legacy for a table that is not there.
fn listing_of_both(host: &Host) -> String {
    listing(host) + &host.run("iptables-legacy-save") + &host.run("ip6tables-legacy-save")
}

fn without_comments(text: &str) -> String {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split(" [").next().unwrap_or(line).to_owned() + "\n")
        .collect()
}

#[test]
fn a_host_with_iptables_legacy_only() {
    let names = [
        "iptables",
        "ip6tables",
        "iptables-legacy",
        "ip6tables-legacy",
    ];
    for (installed, called) in [(&names[..2], "iptables"), (&names[2..], "iptables-legacy")] {
        let host = Host::new("legacy");
        let all: Vec<(String, &str)> = installed
            .iter()
            .flat_map(|name| {
                ["", "-save", "-restore"].map(|suffix| (format!("{name}{suffix}"), LEGACY))
            })
            .collect();
        let links: Vec<_> = all
            .iter()
            .map(|(name, target)| (name.as_str(), *target))
            .collect();
        programs(&host.dir().join("bin"), &links);
        let untouched = listing_of_both(&host);
        let (code, out, _) = finish(with_path(&host, "pathway add 123 --dry-run"));
        assert_eq!(code, 0);
        assert!(
            out.contains(&format!("\n{called} -t mangle -I OUTPUT 1 ")),
            "{out}"
        );
        assert_same(
            &listing_of_both(&host),
            &untouched,
            "looking made a table of legacy's",
        );
        // the legacy table comes with its first line and stays until the namespace goes
        for iptables in ["iptables-legacy", "ip6tables-legacy"] {
            host.run(&format!("{iptables} -t mangle -S"));
        }
        let before = without_comments(&listing_of_both(&host));
        let (code, out, err) = finish(with_path(&host, "pathway add 123"));
        assert_eq!(code, 0, "{err}");
        assert!(out.contains("4 rules, 2 routes, 6 CONNMARK lines"), "{out}");
        for save in ["iptables-legacy-save", "ip6tables-legacy-save"] {
            let saved = host.run(save);
            assert_eq!(saved.matches("mmproxyctl:123\"").count(), 3, "{saved}");
        }
        assert_eq!(host.run("nft list ruleset"), "");
        let (code, out, _) = finish(with_path(&host, "pathway add 123"));
        assert_eq!(code, 0);
        assert!(out.contains("unchanged"), "{out}");
        assert_eq!(finish(with_path(&host, "pathway check 123")).0, 0);
        assert_eq!(finish(with_path(&host, "pathway del 123")).0, 0);
        assert_same(
            &without_comments(&listing_of_both(&host)),
            &before,
            "listing",
        );
    }
}

#[test]
fn lines_stay_with_the_variant_that_holds_them() {
    let host = Host::new("switched");
    let links = [
        ("iptables", LEGACY),
        ("iptables-save", LEGACY),
        ("iptables-restore", LEGACY),
        ("ip6tables", LEGACY),
        ("ip6tables-save", LEGACY),
        ("ip6tables-restore", LEGACY),
    ];
    programs(&host.dir().join("bin"), &links);
    assert_eq!(finish(with_path(&host, "pathway add 123")).0, 0);
    // the distribution's default is nft now
    let (code, out, err) = ctl(&host, "pathway add 123 124");
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("123   -     unchanged"), "{out}");
    assert_eq!(host.run("nft list ruleset"), "");
    assert!(host.run("iptables-legacy-save").contains("mmproxyctl:124"));
    assert_eq!(ctl(&host, "pathway del 123 124").0, 0);
    assert!(!host.run("iptables-legacy-save").contains("mmproxyctl"));
    // what the scripts left in the other variant goes too
    host.run(
        "iptables-legacy -t mangle -A OUTPUT -o+ -m connmark --mark 123 -j CONNMARK --restore-mark",
    );
    host.run("iptables -t mangle -A FORWARD -j ACCEPT");
    let (code, out, err) = ctl(&host, "pathway add 123");
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("replaced"), "{out}");
    assert!(host.run("iptables-save").contains("mmproxyctl:123"));
    assert!(!host.run("iptables-legacy-save").contains("-A"));
}

#[test]
fn a_host_without_ipv6() {
    let host = Host::new("no-v6");
    host.sysctl("net.ipv6.conf.all.disable_ipv6", "1");
    let before = listing(&host);
    let (code, out, err) = ctl(&host, "pathway add 123 124");
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("2 rules, 1 route, 3 CONNMARK lines"), "{out}");
    assert_eq!(err.matches("IPv4 only").count(), 1, "{err}");
    assert!(!host.ip("-6 rule").contains("177"));
    assert!(!host.run("ip6tables-save").contains("mmproxyctl"));
    let (code, out, _) = ctl(&host, "pathway check 123");
    assert_eq!(code, 0, "{out}");
    assert_eq!(ctl(&host, "pathway del 123 124").0, 0);
    assert_same(&listing(&host), &before, "listing");
}

#[test]
fn ipv6_that_is_switched_off_later_leaves_nothing_behind() {
    let host = Host::new("v6-off");
    let rules = host.ip("-6 rule");
    assert_eq!(ctl(&host, "pathway add 123").0, 0);
    host.sysctl("net.ipv6.conf.all.disable_ipv6", "1");
    assert_eq!(ctl(&host, "pathway del 123").0, 0);
    assert_eq!(host.ip("-6 rule"), rules);
    assert_eq!(host.run("nft list ruleset"), "");
}

#[test]
fn a_host_without_ip6tables() {
    let host = Host::new("no-ip6tables");
    let links = [
        ("iptables", NFT),
        ("iptables-save", NFT),
        ("iptables-restore", NFT),
    ];
    programs(&host.dir().join("bin"), &links);
    let (code, out, err) = finish(with_path(&host, "pathway add 123"));
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("2 rules, 1 route, 3 CONNMARK lines"), "{out}");
    assert!(err.contains("ip6tables is not installed"), "{err}");
    // without CONNMARK lines IPv6 needs no ip6tables
    host.write("etc/pathways.conf", "123 connmark=off\n");
    let (code, _, err) = finish(with_path(&host, "pathway add 123"));
    assert_eq!(code, 0, "{err}");
    assert!(host.ip("-6 rule").contains("lookup 123"));
}

#[test]
fn a_host_without_iptables() {
    let host = Host::new("no-iptables");
    std::fs::create_dir_all(host.dir().join("etc")).unwrap();
    let before = listing(&host);
    // an empty directory over the one with iptables, in a mount namespace of its own
    let hidden = |words: &str| {
        let target = host.mmproxyctl(words);
        let mut command = host.command("unshare");
        command
            .args(["--mount", "sh", "-c"])
            .arg("mount -t tmpfs none /usr/sbin && exec \"$@\"")
            .arg("sh")
            .arg(target.get_program())
            .args(target.get_args());
        finish(command)
    };
    let (code, out, err) = hidden("pathway add 123");
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    assert!(
        err.contains("neither iptables nor nftables is installed"),
        "{err}"
    );
    assert_same(&listing(&host), &before, "listing");
    host.write("etc/pathways.conf", "123 connmark=off\n");
    let (code, _, err) = hidden("pathway add 123");
    assert_eq!(code, 0, "{err}");
    assert_eq!(hidden("pathway del 123").0, 0);
    assert_same(&listing(&host), &before, "listing");
}

#[test]
fn a_failure_half_way_is_taken_back() {
    for missing in ["iptables-restore", "ip6tables-restore"] {
        let host = Host::new("half-way");
        super::foreign::old_scripts(&host, 123);
        let names = [
            "iptables",
            "iptables-save",
            "iptables-restore",
            "ip6tables",
            "ip6tables-save",
            "ip6tables-restore",
        ];
        let links: Vec<_> = names
            .into_iter()
            .filter(|name| *name != missing)
            .map(|name| (name, NFT))
            .collect();
        programs(&host.dir().join("bin"), &links);
        for words in ["pathway add 123", "pathway add 124"] {
            let before = listing(&host);
            let (code, out, err) = finish(with_path(&host, words));
            assert_eq!((code, out.as_str()), (1, ""));
            assert!(
                err.contains(missing) && err.contains("took back"),
                "{missing}: {err}"
            );
            assert_same(&listing(&host), &before, &format!("{missing}: {words}"));
        }
    }
    // and where the failed run had made table and chains
    let host = Host::new("half-way");
    let links = [
        ("iptables", NFT),
        ("iptables-save", NFT),
        ("iptables-restore", NFT),
        ("ip6tables", NFT),
        ("ip6tables-save", NFT),
    ];
    programs(&host.dir().join("bin"), &links);
    let before = listing(&host);
    assert_eq!(finish(with_path(&host, "pathway add 123")).0, 1);
    assert_same(&listing(&host), &before, "listing");
}

#[test]
fn a_lock_of_iptables_that_is_held_for_too_long() {
    let host = Host::new("xtables-lock");
    let links = [
        ("iptables", LEGACY),
        ("iptables-save", LEGACY),
        ("iptables-restore", LEGACY),
        ("ip6tables", LEGACY),
        ("ip6tables-save", LEGACY),
        ("ip6tables-restore", LEGACY),
    ];
    programs(&host.dir().join("bin"), &links);
    host.run("iptables-legacy -t mangle -S");
    host.run("ip6tables-legacy -t mangle -S");
    let before = without_comments(&listing_of_both(&host));
    let path = host.write("xtables.lock", "");
    let lock = File::open(&path).unwrap();
    lock.lock().unwrap();
    let start = Instant::now();
    let mut command = with_path(&host, "pathway add 123");
    command.env("XTABLES_LOCKFILE", &path);
    let (code, _, err) = finish(command);
    assert_eq!(code, 1);
    assert!(
        err.contains("xtables lock") && err.contains("took back"),
        "{err}"
    );
    assert!(start.elapsed().as_secs() < 9);
    assert_same(
        &without_comments(&listing_of_both(&host)),
        &before,
        "listing",
    );
    drop(lock);
    let mut command = with_path(&host, "pathway add 123");
    command.env("XTABLES_LOCKFILE", &path);
    assert_eq!(finish(command).0, 0);
}

#[test]
fn our_own_lock_that_is_held() {
    let host = Host::new("lock");
    let options = super::options(&host);
    let _lock = host.enter(|| {
        options
            .runtime_dir
            .lock("pathways", std::time::Duration::ZERO)
            .unwrap()
    });
    let before = listing(&host);
    let short = mmproxyctl::pathway::Options {
        lock_timeout: std::time::Duration::from_millis(50),
        ..options
    };
    let wanted = [super::pathway(123, &[])];
    let error = super::inside(&host, async || {
        mmproxyctl::pathway::add(&wanted, &short).await
    })
    .unwrap_err();
    let error = format!("{:#}", anyhow::Error::from(error));
    assert!(
        error.contains(&format!("pid {}", std::process::id())),
        "{error}"
    );
    assert_same(&listing(&host), &before, "listing");
    // asking needs no lock
    assert_eq!(ctl(&host, "pathway list").0, 0);
    assert_eq!(ctl(&host, "pathway add 123 --dry-run").0, 0);
}

#[test]
fn without_the_capability_one_sentence() {
    let host = Host::new("unprivileged");
    std::fs::create_dir_all(host.dir().join("etc")).unwrap();
    let before = listing(&host);
    for words in [
        "pathway add 123",
        "pathway del 123",
        "pathway add 123 --dry-run",
        "pathway list",
        "pathway check 123",
    ] {
        let target = host.mmproxyctl(&format!("-q {words}"));
        let mut command = host.command("setpriv");
        command
            .args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"])
            .arg(target.get_program())
            .args(target.get_args());
        let (code, out, err) = finish(command);
        assert_eq!((code, out.as_str()), (1, ""), "{words}: {err}");
        assert!(err.contains("needs root or CAP_NET_ADMIN"), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
    }
    assert_same(&listing(&host), &before, "listing");
    // capabilities over somebody else's network namespace are none
    let target = host.mmproxyctl("-q pathway add 123");
    let mut command = host.command("unshare");
    command
        .args(["--user", "--map-root-user"])
        .arg(target.get_program())
        .args(target.get_args());
    let (code, _, err) = finish(command);
    assert_eq!(code, 1);
    assert!(err.contains("needs root or CAP_NET_ADMIN"), "{err}");
    assert_same(&listing(&host), &before, "listing");
}

#[test]
fn in_a_user_namespace_with_a_network_of_its_own() {
    let host = Host::new("userns");
    std::fs::create_dir_all(host.dir().join("etc")).unwrap();
    let target = host.mmproxyctl("pathway add 123");
    let mut command = host.command("unshare");
    command
        .args(["--user", "--map-root-user", "--net", "sh", "-c"])
        .arg("ip link set lo up && \"$@\" && \"$@\" && ip rule && iptables-save")
        .arg("sh")
        .arg(target.get_program())
        .args(target.get_args());
    let (code, out, err) = finish(command);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("unchanged"), "{out}");
    assert!(
        out.contains("lookup 123 proto 177") && out.contains("mmproxyctl:123"),
        "{out}"
    );
}
