//! `pathway watch`: what it puts back, what it says and counts, how it begins and ends.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{assert_same, ctl, effects, interface, json, listing, programs};
use crate::support::net::{Host, Running, wait_for};

/// wks01 with an own address as target, and a second pathway.
fn host() -> Host {
    let host = Host::new("watched");
    interface(&host, &["10.0.0.2/24", "fd00::2/64"]);
    host.write(
        "etc/pathways.conf",
        "123 name=vps01 targets=10.0.0.2,fd00::2\n124 name=router01\n",
    );
    host
}

fn watch(host: &Host, words: &str) -> Running {
    let running = host.spawn(host.mmproxyctl(&format!("pathway watch {words}")));
    running.wait_log("pathways are in place");
    running
}

fn in_place(host: &Host) -> bool {
    ctl(host, "pathway check").0 == 0
}

/// All that was put back, as `pathway list` counts it.
pub(super) fn repairs(host: &Host) -> u64 {
    let listed = json(host, "pathway list --json");
    let of = |entry: &serde_json::Value| -> u64 {
        let kinds = ["rule", "route", "firewall"];
        let counts = kinds.map(|kind| entry["repairs"][kind].as_u64().unwrap());
        counts.iter().sum()
    };
    listed.as_array().unwrap().iter().map(of).sum()
}

/// Lines of the log that tell of a repair.
fn told(running: &Running) -> Vec<String> {
    let log = running.log();
    let lines = log.lines().filter(|line| line.contains("WARN repaired"));
    lines.map(str::to_owned).collect()
}

#[test]
fn whatever_is_lost_is_put_back_named_and_counted() {
    let host = host();
    let before = listing(&host);
    let mut running = watch(&host, "");
    let whole = effects(&host);
    let mut lines = 0;
    let mut pieces = 0;
    // what is done, how many lines tell of it (one for each pathway), how many pieces it took, by whom
    for (command, pathways, lost, by) in [
        (
            "ip rule del priority 100 from 10.0.0.2 fwmark 123/0xff lookup 123",
            1,
            1,
            "pid ",
        ),
        (
            "ip -6 rule del priority 200 from ::1 iif lo lookup 124",
            1,
            1,
            "pid ",
        ),
        ("ip route del local default dev lo table 123", 1, 1, "pid "),
        ("ip -6 route flush table 124", 1, 1, "pid "),
        ("ip rule flush protocol 177", 2, 6, ""),
        ("iptables -t mangle -D OUTPUT 1", 1, 1, "iptables, pid "),
        ("iptables -t mangle -F", 2, 6, "iptables, pid "),
        ("nft flush table ip6 mangle", 2, 6, "nft, pid "),
        ("nft delete table ip mangle", 2, 6, "nft, pid "),
        ("nft flush ruleset", 2, 12, "nft, pid "),
    ] {
        host.run(command);
        pieces += lost;
        wait_for(&format!("what '{command}' took: {}", running.log()), || {
            effects(&host) == whole && repairs(&host) >= pieces
        });
        assert_eq!(repairs(&host), pieces, "{command}: {}", running.log());
        let told = told(&running);
        // a burst is one repair
        assert_eq!(told.len(), lines + pathways, "{command}: {told:#?}");
        for line in &told[lines..] {
            assert!(line.contains(by), "{command}: {line}");
        }
        lines = told.len();
    }
    // nothing more to do: its own changes were no news to it
    let log = running.log();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(running.log(), log);
    let (_, table, _) = ctl(&host, "pathway list");
    let kept = format!("by pid {}, ", running.pid());
    assert!(table.contains("KEPT") && table.contains(&kept), "{table}");
    // other programs' changes are none of its business
    host.ip("rule add priority 5000 from 192.0.2.0/24 lookup main");
    host.run("iptables -t mangle -A OUTPUT -d 192.0.2.1 -j ACCEPT");
    host.run("iptables -t mangle -D OUTPUT -d 192.0.2.1 -j ACCEPT");
    host.ip("rule del priority 5000");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(running.log(), log);

    running.signal(Signal::SIGTERM);
    assert!(running.wait(Duration::from_secs(10)).success());
    assert_same(&listing(&host), &before, "the end of the watch");
    let (_, table, _) = ctl(&host, "pathway list");
    assert!(!table.contains("by pid"), "{table}");
}

#[test]
fn one_watch_in_a_namespace_and_a_word_to_who_deletes_under_it() {
    let host = host();
    let running = watch(&host, "");
    let (code, out, err) = ctl(&host, "pathway watch");
    let pid = running.pid();
    assert_eq!(code, 0, "{err}");
    assert_eq!(out, format!("the pathways are kept already, pid {pid}\n"));
    let (code, _, err) = ctl(&host, "pathway del 124");
    assert_eq!(code, 0, "{err}");
    let note = format!("note: pid {pid} keeps the pathway of mark 124 and puts it back");
    assert!(err.contains(&note), "{err}");
    wait_for("the pathway to be back", || in_place(&host));
    running.wait_log("WARN repaired");
    // another namespace is another host
    let other = self::host();
    watch(&other, "");
}

#[test]
fn the_files_are_followed_and_a_mistake_changes_nothing() {
    let host = host();
    let mut running = watch(&host, "--no-remove");
    let marks = |of: [bool; 3]| {
        let rules = host.ip("rule");
        ["0x7b", "0x7c", "0x7d"].map(|mark| rules.contains(&format!("fwmark {mark}/"))) == of
    };
    assert!(marks([true, true, false]));
    host.write("etc/pathways.conf", "123\n125\n");
    wait_for("the new pathways", || {
        marks([true, false, true]) && in_place(&host)
    });
    running.wait_log("INFO reloaded");
    assert_eq!(repairs(&host), 0, "{}", running.log());
    // targets of instances count too
    host.write(
        "etc/instances.tsv",
        "web\t125\t127.0.0.1:1\t10.0.0.2\t80\t-\n",
    );
    wait_for("the new target", || {
        host.ip("rule").contains("from 10.0.0.2 fwmark 0x7d/")
    });

    host.write("etc/instances.tsv", "");
    wait_for("the target to go", || {
        !host.ip("rule").contains("from 10.0.0.2 fwmark 0x7d/")
    });

    let whole = effects(&host);
    host.write("etc/pathways.conf", "12x\n");
    running.wait_log("'12x' is not a mark");
    host.write("etc/pathways.conf", "# none\n");
    running.wait_log("no pathway in ");
    assert_same(&effects(&host), &whole, "a mistake in the files");
    host.ip("rule del priority 100 from 127.0.0.0/8 fwmark 125/0xff iif lo lookup 125");
    wait_for("a repair in spite of it", || effects(&host) == whole);
    running.signal(Signal::SIGHUP);
    running.wait_log("SIGHUP");

    running.signal(Signal::SIGINT);
    assert!(running.wait(Duration::from_secs(10)).success());
    assert_same(&effects(&host), &whole, "--no-remove");
}

#[test]
fn a_watch_that_starts_before_the_network_completes_the_pathways_as_it_comes_up() {
    let host = Host::new("early");
    host.ip("link set lo down");
    host.sysctl("net.ipv6.conf.all.disable_ipv6", "1");
    host.write("etc/pathways.conf", "123 targets=10.0.0.2,fd00::2\n");
    let running = host.spawn(host.mmproxyctl("pathway watch --poll 200ms"));
    running.wait_log("pathways are in place");
    wait_for("the rules of IPv4", || {
        host.ip("rule").contains("fwmark 0x7b/")
    });
    assert!(!host.ip("-6 rule").contains("proto 177"));
    // the switch of an interface that is down is noticed by looking
    host.sysctl("net.ipv6.conf.all.disable_ipv6", "0");
    wait_for("the rules of IPv6", || {
        host.ip("-6 rule").contains("fwmark 0x7b/")
    });
    running.wait_log("lo is down, and routes need it");
    let route = || !host.ip("-6 route show table 123").is_empty();
    assert!(!route());
    host.ip("link set lo up");
    wait_for("all of it", || in_place(&host));
    running.wait_log("all is in place again");
    // an interface, its addresses, and a default route
    interface(&host, &["10.0.0.2/24", "fd00::2/64"]);
    wait_for(
        "the rules for own addresses without a default route",
        || host.ip("rule").contains("40000:\tfrom 10.0.0.2 lookup 123") && in_place(&host),
    );
    host.ip("route add default via 10.0.0.1");
    wait_for("these rules to go", || {
        !host.ip("rule").contains("40000:\tfrom 10.0.0.2") && in_place(&host)
    });
    // nothing of that was lost
    assert_eq!(repairs(&host), 0, "{}", running.log());

    // lo goes, and the kernel takes the IPv6 route along
    host.ip("link set lo down");
    wait_for("the route to be missed", || !route());
    host.ip("link set lo up");
    wait_for("the route to be back", || route() && in_place(&host));
    running.wait_log("by=\"the kernel itself\"");
    // the same with IPv6
    host.sysctl("net.ipv6.conf.all.disable_ipv6", "1");
    wait_for("IPv6 to go", || !host.ip("-6 rule").contains("proto 177"));
    host.sysctl("net.ipv6.conf.all.disable_ipv6", "0");
    wait_for("IPv6 to come back", || route() && in_place(&host));
    assert_eq!(repairs(&host), 1, "{}", running.log());
}

#[test]
fn a_storm_is_given_way_to_and_named() {
    let host = host();
    let running = watch(&host, "");
    let delete = || {
        let words = "ip rule del priority 100 from 10.0.0.2 fwmark 123/0xff lookup 123";
        u64::from(host.try_run(words).status.success())
    };
    let mut burst = 0;
    let named = "a storm: something takes the pathway away again and again";
    while !running.log().contains(named) {
        burst += delete();
        assert!(burst < 50, "{}", running.log());
    }
    assert!(burst > 10, "{burst}: {}", running.log());
    // from here on it waits for 250 ms, 500 ms, 1 s, 2 s
    let (start, mut deleted) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(3) {
        deleted += delete();
    }
    assert!((1..=4).contains(&deleted), "{deleted}: {}", running.log());
    assert!(running.log().contains("pause=1s"), "{}", running.log());
    // the other pathway has nothing to do with it
    host.ip("rule del priority 100 from 127.0.0.0/8 fwmark 124/0xff iif lo lookup 124");
    let start = Instant::now();
    wait_for("the other pathway's repair", || {
        host.ip("rule").contains("fwmark 0x7c/0xff iif lo")
    });
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "{}",
        running.log()
    );
    wait_for("the end of the pause", || in_place(&host));
}

#[test]
fn events_that_come_too_fast_are_made_up_for() {
    let host = host();
    let running = watch(&host, "");
    let whole = effects(&host);
    running.signal(Signal::SIGSTOP);
    // more than its sockets hold, then a loss that is not told any more
    let mut batch = String::new();
    for number in 0..60_000 {
        let (high, low) = (number / 256, number % 256);
        batch.push_str(&format!(
            "route add blackhole 10.{}.{low}.0/24 table 9\n",
            high
        ));
    }
    let file = host.write("routes", batch);
    host.ip(&format!("-batch {}", file.display()));
    host.ip("rule del priority 100 from 10.0.0.2 fwmark 123/0xff lookup 123");
    host.run("nft flush ruleset");
    running.signal(Signal::SIGCONT);
    running.wait_log("the kernel's events came too fast");
    wait_for("the repair", || {
        effects(&host)
            .lines()
            .filter(|line| !line.contains("blackhole"))
            .eq(whole.lines())
    });
    assert!(
        told(&running)
            .iter()
            .any(|line| line.contains("by=\"unknown\""))
    );
}

#[test]
fn what_iptables_legacy_loses_is_found_by_looking() {
    const LEGACY: &str = "/usr/sbin/xtables-legacy-multi";
    let host = host();
    let names = [
        "iptables",
        "iptables-save",
        "iptables-restore",
        "ip6tables",
        "ip6tables-save",
        "ip6tables-restore",
    ];
    programs(&host.dir().join("bin"), &names.map(|name| (name, LEGACY)));
    let mut command = host.mmproxyctl("pathway watch --poll 200ms");
    command.env("PATH", host.dir().join("bin"));
    let running = host.spawn(command);
    running.wait_log("pathways are in place");
    let lines = || {
        host.run("iptables-legacy-save -t mangle")
            .matches("CONNMARK")
            .count()
    };
    assert_eq!(lines(), 6);
    host.run("iptables-legacy -t mangle -F");
    wait_for("the lines to be back", || lines() == 6);
    running.wait_log("WARN repaired");
    assert_eq!(host.run("nft list ruleset"), "");
}

#[test]
fn a_watch_that_cannot_work_says_so() {
    let host = Host::new("refused");
    let (code, _, err) = ctl(&host, "pathway watch");
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("no pathway in "), "{err}");
    host.write("etc/pathways.conf", "123\n");
    let (code, _, err) = ctl(&host, "pathway watch --poll often");
    assert_eq!(code, 2, "{err}");
    // a table that is another program's
    host.ip("route add 192.0.2.0/24 dev lo table 123");
    let (code, _, err) = ctl(&host, "pathway watch");
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("table 123 is not free for mark 123"), "{err}");
}

#[test]
fn a_table_that_another_program_takes_later_costs_only_its_pathway() {
    let host = host();
    let running = watch(&host, "");
    host.ip("route add 192.0.2.0/24 dev eth0 table 124");
    running.wait_log("table 124 is not free for mark 124");
    host.ip("rule del priority 100 from 10.0.0.2 fwmark 123/0xff lookup 123");
    wait_for("the other pathway's repair", || {
        host.ip("rule").contains("from 10.0.0.2 fwmark 0x7b/")
    });
    host.ip("route del 192.0.2.0/24 dev eth0 table 124");
    running.wait_log("all is in place again");
    assert!(in_place(&host));
}

#[test]
fn a_watch_that_is_killed_leaves_no_lock_and_no_gap() {
    let host = host();
    let mut first = watch(&host, "");
    let whole = effects(&host);
    first.signal(Signal::SIGKILL);
    first.wait(Duration::from_secs(5));
    assert_same(&effects(&host), &whole, "a watch that was killed");
    let second = watch(&host, "");
    assert!(second.log().contains("changes=0"), "{}", second.log());
    host.run("iptables -t mangle -F");
    wait_for("the second one to repair", || effects(&host) == whole);
    kill(Pid::from_raw(second.pid().as_raw()), Signal::SIGTERM).unwrap();
}

#[test]
fn what_the_native_table_loses_is_put_back() {
    let host = host();
    let before = listing(&host);
    let mut running = watch(&host, "--firewall nftables");
    let table = || host.run("nft list table inet mmproxy");
    let whole = table();
    let mut lines = 0;
    for command in [
        "nft delete table inet mmproxy",
        "nft flush table inet mmproxy",
        "nft flush ruleset",
    ] {
        host.run(command);
        wait_for(&format!("what '{command}' took: {}", running.log()), || {
            host.try_run("nft list table inet mmproxy").stdout == whole.as_bytes()
                && told(&running).len() > lines
        });
        for line in &told(&running)[lines..] {
            assert!(line.contains("by=\"nft, pid "), "{command}: {line}");
        }
        lines = told(&running).len();
    }
    let log = running.log();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(running.log(), log);
    running.signal(Signal::SIGTERM);
    assert!(running.wait(Duration::from_secs(10)).success());
    assert_same(&listing(&host), &before, "the end of the watch");
}
