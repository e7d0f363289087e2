//! What others left or own: the old scripts' state is taken over, everyone else's stays.

use mmproxyctl::pathway::Outcome;

use super::{add, assert_same, ctl, del, inside, interface, json, listing, options, pathway};
use crate::support::net::Host;

/// Installs what the shell scripts installed, with their very commands.
pub(crate) fn old_scripts(host: &Host, mark: u32) {
    for (ip, source, any) in [("ip", "127.0.0.1/8", "0.0.0.0/0"), ("ip -6", "::1", "::/0")] {
        host.run(&format!(
            "{ip} rule add from {source} fwmark {mark} iif lo lookup {mark}"
        ));
        host.run(&format!("{ip} route add local {any} dev lo table {mark}"));
    }
    for iptables in ["iptables", "ip6tables"] {
        host.run(&format!(
            "{iptables} -t mangle -A PREROUTING -i+ -m mark --mark {mark} -j CONNMARK --save-mark"
        ));
        host.run(&format!(
            "{iptables} -t mangle -A OUTPUT -o+ -m connmark --mark {mark} -j CONNMARK --restore-mark"
        ));
    }
}

#[test]
fn what_the_scripts_left_is_taken_over() {
    let (host, fresh) = (Host::new("scripted"), Host::new("fresh"));
    old_scripts(&host, 123);
    old_scripts(&fresh, 123);
    assert_eq!(
        ctl(&fresh, "pathway check 123").0,
        1,
        "the scripts' set-up alone does not work"
    );
    // on the fresh host only the chains stay that the scripts' lines had made
    for iptables in ["iptables", "ip6tables"] {
        fresh.run(&format!("{iptables} -t mangle -F"));
    }
    fresh.ip("rule flush");
    fresh.ip("rule add from all lookup main priority 32766 protocol kernel");
    fresh.ip("rule add from all lookup default priority 32767 protocol kernel");
    fresh.ip("-6 rule flush");
    fresh.ip("-6 rule add from all lookup main priority 32766 protocol kernel");
    fresh.ip("route flush table 123");
    fresh.ip("-6 route flush table 123");

    let report = json(&host, "pathway add 123 --json");
    add(&fresh, &[pathway(123, &[])]);
    assert_same(&listing(&host), &listing(&fresh), "listing");
    let changes = report["pathways"][0]["changes"].as_array().unwrap();
    let count = |outcome: &str| {
        changes
            .iter()
            .filter(|change| change["outcome"] == outcome)
            .count()
    };
    assert_eq!(
        (
            count("added"),
            count("adopted"),
            count("replaced"),
            count("removed")
        ),
        (10, 2, 6, 0),
        "{report:#}"
    );
    let (_, out, _) = ctl(&host, "pathway add 123");
    assert!(out.contains("unchanged"), "{out}");
}

#[test]
fn taking_over_leaves_no_gap() {
    let host = Host::new("gap");
    old_scripts(&host, 123);
    let (_, out, _) = ctl(&host, "pathway add 123 --dry-run");
    let at = |text: &str| {
        out.lines()
            .position(|line| line.starts_with(text))
            .unwrap_or_else(|| panic!("no '{text}' in:\n{out}"))
    };
    assert!(at("ip route replace local") < at("ip rule del"));
    assert!(at("ip rule add priority 100") < at("ip rule del"));
    assert!(at("iptables -t mangle -I OUTPUT") < at("iptables -t mangle -D OUTPUT"));
    assert!(!out.contains("route del"), "{out}");
}

#[test]
fn del_removes_what_the_scripts_left_and_says_so() {
    let host = Host::new("scripted");
    let before = host.ip("rule") + &host.ip("-6 rule") + &host.ip("route show table all");
    old_scripts(&host, 123);
    old_scripts(&host, 124);
    let (code, out, _) = ctl(&host, "pathway del 123");
    assert_eq!(code, 0);
    assert_eq!(
        out,
        "MARK  NAME  RESULT   WHAT\n\
         123   -     removed  2 rules, 2 routes, 4 CONNMARK lines (8 left by other scripts)\n"
    );
    assert!(host.run("iptables-save -t mangle").contains("0x7c"));
    assert!(!host.run("iptables-save -t mangle").contains("0x7b"));
    assert_eq!(ctl(&host, "pathway del 124").0, 0);
    let after = host.ip("rule") + &host.ip("-6 rule") + &host.ip("route show table all");
    assert_eq!(after, before);
    assert!(!host.run("iptables-save -t mangle").contains("-A"));
}

#[test]
fn the_scripts_table_goes_when_the_pathway_has_another() {
    let host = Host::new("moved");
    let before = host.ip("-j route show table all") + &host.ip("-j rule");
    old_scripts(&host, 123);
    host.write("etc/pathways.conf", "123 table=1000\n");
    let report = json(&host, "pathway add 123 --json");
    let text = report.to_string();
    assert!(
        text.contains("ip route del local default dev lo table 123"),
        "{report:#}"
    );
    assert!(!host.ip("rule").contains("lookup 123 "));
    assert_eq!(ctl(&host, "pathway del 123").0, 0);
    let after = host.ip("-j route show table all") + &host.ip("-j rule");
    assert_eq!(after, before);
}

#[test]
fn other_programs_keep_theirs() {
    let host = Host::new("foreign");
    interface(&host, &["10.0.0.2/24"]);
    let rules = [
        // the same mark, another table
        "rule add priority 40 fwmark 123 lookup 9",
        // the same table, other selectors
        "rule add priority 41 from 127.0.0.0/8 fwmark 123 iif lo ipproto tcp lookup 123",
        "rule add priority 42 from 127.0.0.0/8 fwmark 123 oif eth0 lookup 123",
        "rule add priority 43 not from 127.0.0.0/8 fwmark 123 iif lo lookup 123",
        "rule add priority 44 from 127.0.0.0/8 fwmark 123/0x7f iif lo lookup 123",
        // the same meaning, but somebody's: systemd-networkd tags with static
        "rule add priority 45 from 127.0.0.0/8 fwmark 123 iif lo lookup 123 protocol static",
        "-6 rule add priority 46 from ::1 fwmark 123 lookup 8",
        "rule add priority 47 from 10.0.0.0/24 lookup 123",
    ];
    for rule in rules {
        host.ip(rule);
    }
    host.ip("route add 192.0.2.0/24 dev eth0 table 9");
    let lines = [
        "OUTPUT -m mark --mark 0x7b -j ACCEPT",
        "OUTPUT -o eth0 -m connmark --mark 0x7b -j CONNMARK --restore-mark",
        "OUTPUT -m mark --mark 0x7b -m comment --comment mine -j CONNMARK --save-mark",
        "PREROUTING -p tcp -m mark --mark 0x7b -j CONNMARK --save-mark",
        "PREROUTING -i+ -m mark --mark 0x7d -j CONNMARK --save-mark",
        "PREROUTING -m mark --mark 0x7b -j CONNMARK --save-mark --nfmask 0xf --ctmask 0xf",
        "POSTROUTING -m mark --mark 0x7b -j CONNMARK --save-mark",
    ];
    for line in lines {
        host.run(&format!("iptables -t mangle -A {line}"));
    }
    host.run("nft add table inet mine");
    let before = listing(&host);
    let wanted = [pathway(123, &["10.0.0.2", "10.0.0.0/25"])];
    let report = add(&host, &wanted);
    assert!(
        report
            .changes
            .iter()
            .all(|change| change.outcome == Outcome::Added),
        "{:#?}",
        report.changes
    );
    assert!(
        report.notes.iter().any(|note| note.contains("lookup 9")),
        "a rule that takes the mark first is said: {:?}",
        report.notes
    );
    del(&host, &wanted);
    assert_same(&listing(&host), &before, "listing");
}

#[test]
fn lines_that_came_later_keep_their_chain() {
    let host = Host::new("later");
    let wanted = [pathway(123, &[])];
    add(&host, &wanted);
    host.run("iptables -t mangle -A OUTPUT -p udp -j ACCEPT");
    host.run("ip6tables -t mangle -A POSTROUTING -p udp -j ACCEPT");
    del(&host, &wanted);
    assert_eq!(
        host.run("iptables -t mangle -S OUTPUT"),
        "-P OUTPUT ACCEPT\n-A OUTPUT -p udp -j ACCEPT\n"
    );
    assert!(
        host.run("ip6tables-save -t mangle")
            .contains("-A POSTROUTING -p udp -j ACCEPT")
    );
}

#[test]
fn empty_chains_that_were_there_stay() {
    let host = Host::new("empty");
    for chain in ["OUTPUT", "PREROUTING"] {
        host.run(&format!("iptables -t mangle -A {chain} -j ACCEPT"));
        host.run(&format!("iptables -t mangle -D {chain} -j ACCEPT"));
    }
    host.run("nft add table ip6 mangle");
    let before = listing(&host);
    assert!(before.contains("hook output"));
    let wanted = [pathway(123, &[])];
    add(&host, &wanted);
    del(&host, &wanted);
    assert_same(&listing(&host), &before, "listing");
}

#[test]
fn a_table_that_is_not_ours_is_refused() {
    for (route, owner) in [
        (
            "-4 route add 192.0.2.0/24 dev eth0 table 123",
            "unicast 192.0.2.0/24",
        ),
        ("-4 route add default dev eth0 table 123", "unicast default"),
        (
            "-6 route add fd01::/64 dev eth0 table 123",
            "unicast fd01::/64",
        ),
        (
            "-4 route add local default dev lo table 123 proto static",
            "local default dev lo table 123 proto 4",
        ),
        (
            "-4 route add blackhole default table 123",
            "blackhole default",
        ),
    ] {
        let host = Host::new("taken");
        interface(&host, &[]);
        host.ip(route);
        let before = listing(&host);
        let (code, out, err) = ctl(&host, "pathway add 123");
        assert_eq!((code, out.as_str()), (1, ""));
        assert!(
            err.contains("table 123 is not free for mark 123") && err.contains(owner),
            "{err}"
        );
        assert_same(&listing(&host), &before, "listing");
        let (code, out, _) = ctl(&host, "pathway check 123");
        assert_eq!(code, 1);
        assert!(out.contains(owner), "{out}");
        // with a table of its own it works, and del leaves the other's
        host.write("etc/pathways.conf", "123 table=500\n");
        assert_eq!(ctl(&host, "pathway add 123").0, 0);
        assert_eq!(ctl(&host, "pathway del 123").0, 0);
        assert_same(&listing(&host), &before, "listing");
    }
}

/// What every TPROXY guide says to type: a route like ours, untagged, and a rule that is not the scripts'.
#[test]
fn the_table_of_a_tproxy_setup_is_not_taken_for_the_scripts() {
    for rule in [
        "rule add fwmark 100 lookup 100",
        "-6 rule add fwmark 100 lookup 100",
        "rule add fwmark 100 ipproto tcp lookup 100",
    ] {
        let host = Host::new("tproxy");
        host.ip(rule);
        let ip = if rule.starts_with("-6") { "-6 " } else { "" };
        host.ip(&format!("{ip}route add local default dev lo table 100"));
        let before = listing(&host);
        let (code, out, err) = ctl(&host, "pathway add 100");
        assert_eq!((code, out.as_str()), (1, ""), "{rule}");
        assert!(err.contains("table 100 is not free for mark 100"), "{err}");
        assert_eq!(ctl(&host, "pathway del 100").0, 0);
        assert_same(&listing(&host), &before, "listing");
        host.write("etc/pathways.conf", "100 table=500\n");
        assert_eq!(ctl(&host, "pathway add 100").0, 0);
        assert_eq!(ctl(&host, "pathway del 100").0, 0);
        assert_same(&listing(&host), &before, "listing");
    }
}

#[test]
fn two_marks_do_not_share_a_table() {
    let host = Host::new("clash");
    let mut first = pathway(500, &[]);
    first.table = "123".parse().unwrap();
    add(&host, &[first.clone()]);
    let before = listing(&host);
    let options = options(&host);
    let refused = inside(&host, async || {
        mmproxyctl::pathway::add(&[pathway(123, &[])], &options).await
    });
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("is the table of mark 500"), "{error}");
    assert_same(&listing(&host), &before, "listing");
    // del of a mark whose default table is the other's leaves the other whole
    del(&host, &[pathway(123, &[])]);
    assert_same(&listing(&host), &before, "listing");
    // two pathways that swap tables in one run
    let mut second = pathway(501, &[]);
    second.table = "124".parse().unwrap();
    add(&host, &[first.clone(), second.clone()]);
    std::mem::swap(&mut first.table, &mut second.table);
    add(&host, &[first.clone(), second.clone()]);
    assert_eq!(add(&host, &[first, second]).changes, []);
    let rules = host.ip("rule");
    assert!(rules.contains("fwmark 0x1f4 iif lo lookup 124"), "{rules}");
    assert_eq!(rules.matches("lookup 123").count(), 2, "{rules}");
}
