//! nftables as the back end: its table, what breaks it, what it is chosen over, and switching.

mod cost;
mod flood;
mod none;

use std::process::Command;
use std::time::Duration;

use mmproxyctl::pathway::{Firewall, Outcome};
use nix::sys::signal::Signal;

use super::cells::{LIMIT, Lab, under_traffic};
use super::{
    add, assert_same, ctl, del, effects, finish, interface, json, listing, pathway, programs,
};
use crate::support::net::{Host, wait_for};

const XTABLES: &str = "/usr/sbin/xtables-nft-multi";

fn nft_host(name: &'static str) -> Host {
    Host::new(name).with(Firewall::Nftables)
}

#[test]
fn one_rule_for_all_pathways_of_a_mask() {
    let host = nft_host("scheme");
    let before = listing(&host);
    let mut other = pathway(0x1000, &[]);
    other.mask = "0xf000".parse().unwrap();
    let pathways: Vec<_> = (1..=200)
        .map(|mark| pathway(mark, &[]))
        .chain([pathway(4_000_000_000, &[]), other])
        .collect();
    add(&host, &pathways);
    let rules = |chain: &str| -> Vec<String> {
        let table = host.run(&format!("nft list chain inet mmproxy {chain}"));
        let lines = table.lines().map(str::trim);
        lines
            .filter(|line| line.contains("mark") && !line.starts_with("table"))
            .map(|line| line.split(" vmap").next().unwrap().to_owned())
            .collect()
    };
    // saves before restores, and one of each for a mask, however many pathways
    let masks = ["& 0x000000ff", "& 0x0000f000", ""];
    let of = |key: &str| masks.map(|mask| format!("{key} mark {mask}").trim().to_owned());
    assert_eq!(rules("output"), [of("meta"), of("ct")].concat());
    assert_eq!(rules("prerouting"), of("ct"));
    let table = host.run("nft list table inet mmproxy");
    for hook in [
        "type route hook output priority mangle; policy accept;",
        "type filter hook prerouting priority mangle; policy accept;",
    ] {
        assert!(table.contains(hook), "{table}");
    }
    assert_eq!(table.matches(" : jump ").count(), 3 * pathways.len());
    assert_eq!(host.run("nft list tables"), "table inet mmproxy\n");
    assert_eq!(add(&host, &pathways).changes, []);
    del(&host, &pathways[1..]);
    let table = host.run("nft list table inet mmproxy");
    assert_eq!(table.matches(" : jump ").count(), 3);
    del(&host, &pathways[..1]);
    assert_same(&listing(&host), &before, "listing");
}

#[test]
fn what_others_break_is_named_and_mended() {
    let host = nft_host("broken");
    host.write("etc/pathways.conf", "123\n124\n");
    host.run("nft add table inet theirs");
    assert_eq!(ctl(&host, "pathway add-all").0, 0);
    let whole = effects(&host);
    let saves = "nftables entry missing: chain output, save mark 0x7b/0xff";
    let breakages = [
        ("nft flush ruleset", saves),
        ("nft delete table inet mmproxy", saves),
        ("nft flush table inet mmproxy", saves),
        ("nft flush chain inet mmproxy save-0x7b-0xff", saves),
        (
            "nft add rule inet mmproxy save-0x7b-0xff ct mark set 0x7c",
            saves,
        ),
        (
            "nft flush chain inet mmproxy prerouting",
            "nftables entry missing: chain prerouting, restore mark 0x7b/0xff",
        ),
        ("nft add table inet mmproxy { flags dormant ; }", saves),
        (
            "nft insert rule inet mmproxy output meta l4proto tcp accept",
            "something in it is not ours",
        ),
        (
            "nft delete element inet mmproxy output-save-0xff { 0x7b }",
            saves,
        ),
        ("nft flush map inet mmproxy output-save-0xff", saves),
        (
            "nft add element inet mmproxy output-save-0xff { 0x99 : jump save-0x7b-0xff }",
            "something in it is not ours",
        ),
        (
            "nft add map inet mmproxy mine { type mark : verdict ; }",
            "something in it is not ours",
        ),
        (
            "nft add set inet mmproxy mine { type mark ; }",
            "something in it is not ours",
        ),
    ];
    for (command, named) in breakages {
        host.run(command);
        let (code, out, err) = ctl(&host, "pathway check");
        assert_eq!(code, 1, "{command}: {out}{err}");
        assert!(out.contains(named), "{command}: {out}");
        assert!(
            out.contains("mmproxyctl pathway add 123 --firewall nftables"),
            "{command}: {out}"
        );
        let listed = json(&host, "pathway list --json");
        assert_eq!(listed[0]["state"], "partial", "{command}: {listed:#}");
        // the one pathway is mended; the table is one, so that what is left of the other stays with it
        let report = json(&host, "pathway add 123 --json");
        let changes = report["pathways"][0]["changes"].as_array().unwrap();
        assert_eq!(changes.len(), 1, "{command}: {report:#}");
        assert_eq!(ctl(&host, "pathway add-all").0, 0);
        if command.contains("ruleset") {
            host.run("nft add table inet theirs");
        }
        assert_same(&effects(&host), &whole, command);
        assert_eq!(ctl(&host, "pathway check").0, 0, "{command}");
    }
    assert_eq!(ctl(&host, "pathway del-all").0, 0);
    assert_eq!(
        host.run("nft list ruleset").trim(),
        "table inet theirs {\n}"
    );
}

#[test]
fn a_table_of_that_name_which_is_somebodys() {
    for content in [
        "",
        "chain output { type route hook output priority mangle; meta mark 0x7b ct mark set 0x7b; }",
        "chain input { type filter hook input priority 0; tcp dport 22 accept comment \"mmproxy\"; }",
        "set marks { type mark; }",
    ] {
        let host = nft_host("foreign");
        let file = host.write("theirs", format!("table inet mmproxy {{\n{content}\n}}\n"));
        host.run(&format!("nft -f {}", file.display()));
        let before = listing(&host);
        let (code, out, err) = ctl(&host, "pathway add 123");
        assert_eq!((code, out.as_str()), (1, ""), "{content}");
        assert!(
            err.contains("table inet mmproxy of nftables is another program's"),
            "{err}"
        );
        assert_eq!(ctl(&host, "pathway check 123").0, 1);
        assert_eq!(ctl(&host, "pathway del 123").0, 0);
        assert_same(&listing(&host), &before, content);
        // the other back end does not mind
        for (verb, code) in [("add", 0), ("check", 0), ("del", 0)] {
            let words = format!("--firewall iptables pathway {verb} 123");
            assert_eq!(ctl(&host, &words).0, code, "{words}");
        }
        assert_same(&listing(&host), &before, content);
    }
}

#[test]
fn switching_under_traffic_loses_no_packet() {
    let mut lab = Lab::new(Firewall::Nftables);
    lab.default_route(true);
    let wanted = [lab.pathway()];
    add(&lab.wks, &wanted);
    let mut connections = lab.connections();
    assert_eq!(connections.len(), 8);
    lab.count_leaks();
    under_traffic(&mut connections, || {
        for round in 0..10 {
            let (to, gone, there) = if round % 2 == 0 {
                (Firewall::Iptables, "nft list tables", "iptables-save")
            } else {
                (Firewall::Nftables, "iptables-save", "nft list tables")
            };
            lab.wks = lab.wks.clone().with(to);
            let report = add(&lab.wks, &wanted);
            let made = report
                .changes
                .iter()
                .rposition(|change| change.outcome == Outcome::Added);
            let broken = report
                .changes
                .iter()
                .position(|change| change.outcome == Outcome::Removed);
            assert!(made < broken, "{:#?}", report.changes);
            assert!(!lab.wks.run(gone).contains("mmproxy"), "{to:?}");
            assert!(lab.wks.run(there).contains("mmproxy"), "{to:?}");
            assert_eq!(add(&lab.wks, &wanted).changes, []);
        }
        assert_eq!(lab.leaked(), [0, 0], "while back ends were switched");
        // and the table's own replacement, again and again
        let second = super::pathway(124, &[]);
        for _ in 0..20 {
            add(&lab.wks, std::slice::from_ref(&second));
            del(&lab.wks, std::slice::from_ref(&second));
        }
    });
    assert_eq!(lab.leaked(), [0, 0], "while the table was replaced");
    assert_eq!(lab.failures(&super::cells::CLIENTS, LIMIT), [""; 0]);
}

#[test]
fn auto_moves_nothing() {
    let host = nft_host("sticky");
    let before = listing(&host);
    assert_eq!(ctl(&host, "pathway add 123").0, 0);
    let host = host.with(Firewall::Auto);
    let (code, out, _) = ctl(&host, "pathway add 123");
    assert!(code == 0 && out.contains("unchanged"), "{out}");
    assert_eq!(ctl(&host, "pathway check 123").0, 0);
    // a second pathway goes where the first one is
    let (_, out, _) = ctl(&host, "pathway add 124");
    assert!(out.contains("3 nftables entries"), "{out}");
    // asked for, it moves; del finds it wherever it is
    let (_, out, _) = ctl(&host, "--firewall iptables pathway add 123 124");
    assert!(out.contains("6 CONNMARK lines"), "{out}");
    assert!(!host.run("nft list tables").contains("inet mmproxy"));
    assert_eq!(ctl(&host, "--firewall nftables pathway add 123").0, 0);
    assert_eq!(ctl(&host, "pathway del 123 124").0, 0);
    assert_same(&listing(&host), &before, "listing");
    assert_eq!(ctl(&host, "--firewall nothing pathway add 123").0, 2);
}

/// The binary where /usr/sbin holds nothing but these of its programs.
fn with_only(host: &Host, kept: &[&str], words: &str) -> (i32, String, String) {
    std::fs::create_dir_all(host.dir().join("etc")).unwrap();
    let target = host.mmproxyctl(words);
    let keep: String = kept
        .iter()
        .map(|name| format!("cp -P /usr/sbin/{name} {} && ", host.dir().display()))
        .collect();
    let back: String = kept
        .iter()
        .map(|name| format!("cp -P {}/{name} /usr/sbin/ && ", host.dir().display()))
        .collect();
    let mut command = host.command("unshare");
    command
        .args(["--mount", "sh", "-c"])
        .arg(format!(
            "{keep} mount -t tmpfs none /usr/sbin && {back} exec \"$@\""
        ))
        .arg("sh")
        .arg(target.get_program())
        .args(target.get_args());
    copy_environment(&target, &mut command);
    finish(command)
}

fn copy_environment(from: &Command, to: &mut Command) {
    for (name, value) in from.get_envs() {
        match value {
            Some(value) => to.env(name, value),
            None => to.env_remove(name),
        };
    }
}

#[test]
fn what_is_installed_decides() {
    let host = Host::new("installed");
    let before = listing(&host);
    let (code, out, err) = with_only(&host, &[], "pathway add 123");
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(
        err.contains("neither iptables nor nftables is installed")
            && err.contains("install the package iptables or nftables"),
        "{err}"
    );
    for (firewall, program) in [("nftables", "nft"), ("iptables", "iptables")] {
        let words = format!("--firewall {firewall} pathway add 123");
        let (code, out, err) = with_only(&host, &[], &words);
        assert_eq!((code, out.as_str()), (1, ""));
        let said = format!("{program} is not installed");
        assert!(err.contains(&said), "{err}");
        assert!(err.contains(&format!("(package {firewall})")), "{err}");
    }
    assert_same(&listing(&host), &before, "listing");
    // nftables without being asked for; nobody's iptables tables are made
    let (code, out, err) = with_only(&host, &["nft"], "pathway add 123");
    assert_eq!(code, 0, "{err}");
    assert!(
        out.contains("4 rules, 2 routes, 3 nftables entries"),
        "{out}"
    );
    assert_eq!(host.run("nft list tables"), "table inet mmproxy\n");
    for words in ["pathway check 123", "pathway list"] {
        assert_eq!(with_only(&host, &["nft"], words).0, 0);
    }
    // nobody to ask whose it is: an add by other means says so, a del does not claim to have done it
    let (code, out, err) = with_only(&host, &[], "pathway del 123");
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("nft, which would tell whose it is"), "{err}");
    assert_eq!(with_only(&host, &["nft"], "pathway del 123").0, 0);
    assert_same(&listing(&host), &before, "listing");
}

#[test]
fn a_failure_half_way_is_taken_back() {
    // nft reads and does not write
    let host = nft_host("half-way");
    let bin = host.dir().join("bin");
    let names = ["iptables", "iptables-save", "ip6tables", "ip6tables-save"];
    programs(&bin, &names.map(|name| (name, XTABLES)));
    let nft = "#!/bin/sh\n[ \"$1\" != -f ] || { echo 'no, thank you' >&2; exit 1; }\nexec /usr/sbin/nft \"$@\"\n";
    let script = host.write("bin/nft", nft);
    host.run(&format!("chmod +x {}", script.display()));
    let with_path = |words: &str| {
        std::fs::create_dir_all(host.dir().join("etc")).unwrap();
        let mut command = host.mmproxyctl(words);
        command.env("PATH", &bin);
        finish(command)
    };
    let before = listing(&host);
    let (code, out, err) = with_path("pathway add 123");
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(
        err.contains("took back") && err.contains("no, thank you"),
        "{err}"
    );
    assert_same(&listing(&host), &before, "listing");
    // it replaces the table, and iptables' lines cannot go then: iptables-restore is missing
    assert_eq!(ctl(&host, "--firewall iptables pathway add 123 124").0, 0);
    assert_eq!(ctl(&host, "--firewall nftables pathway add 124").0, 0);
    std::fs::remove_file(&script).unwrap();
    std::os::unix::fs::symlink("/usr/sbin/nft", &script).unwrap();
    let before = listing(&host);
    let (code, out, err) = with_path("pathway add 123");
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(
        err.contains("took back") && err.contains("iptables-restore"),
        "{err}"
    );
    assert_same(&listing(&host), &before, "listing");
}

#[test]
fn with_net_admin_and_nothing_else() {
    let host = nft_host("relay");
    host.write("etc/pathways.conf", "123\n");
    assert_eq!(ctl(&host, "pathway add 123").0, 0);
    host.run(&format!("chmod 755 {}", host.dir().display()));
    let target = host.mmproxyctl("pathway check 123");
    let mut command = host.command("setpriv");
    command
        .args([
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "--no-new-privs",
        ])
        .args([
            "--inh-caps",
            "-all,+net_admin",
            "--ambient-caps",
            "-all,+net_admin",
        ])
        .args(["--bounding-set", "-all,+net_admin"])
        .arg(target.get_program())
        .args(target.get_args());
    copy_environment(&target, &mut command);
    let (code, out, err) = finish(command);
    assert_eq!((code, out.as_str()), (0, "mark 123: in place\n"), "{err}");
}

#[test]
fn the_watch_keeps_the_table() {
    let host = nft_host("watched");
    host.write("etc/pathways.conf", "123\n124\n");
    let before = listing(&host);
    let mut watch = host.spawn(host.mmproxyctl("pathway watch"));
    watch.wait_log("pathways are in place");
    let whole = effects(&host);
    for command in [
        "nft flush ruleset",
        "nft flush table inet mmproxy",
        "nft flush chain inet mmproxy save-0x7b-0xff",
        "nft add table inet mmproxy { flags dormant ; }",
        "nft insert rule inet mmproxy output accept",
        "nft flush map inet mmproxy output-save-0xff",
    ] {
        host.run(command);
        wait_for(&format!("what '{command}' broke: {}", watch.log()), || {
            effects(&host) == whole
        });
    }
    let log = watch.log();
    assert!(
        log.contains("by=nft, pid ") || log.contains("by=\"nft, pid "),
        "{log}"
    );
    watch.signal(Signal::SIGTERM);
    assert!(watch.wait(Duration::from_secs(10)).success());
    assert_same(&listing(&host), &before, "listing");
}

#[test]
fn the_scripts_lines_go_to_the_table() {
    let host = nft_host("scripted");
    interface(&host, &["10.0.0.2/24"]);
    super::foreign::old_scripts(&host, 123);
    let (code, out, err) = ctl(&host, "pathway add 123");
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("3 nftables entries"), "{out}");
    assert!(out.contains("left by other scripts"), "{out}");
    assert!(!host.run("iptables-save -t mangle").contains("-A"));
    assert_eq!(ctl(&host, "pathway check 123").0, 0);
}
