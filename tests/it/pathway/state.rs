//! What `add` and `del` leave in the kernel: nothing more, nothing less, however often and however ended.

use std::process::Stdio;

use mmproxyctl::model::{ConnmarkMode, Pathway, Priority, TableId};
use mmproxyctl::pathway::{Firewall, Outcome, check};

use super::{add, assert_same, ctl, del, effects, inside, interface, json, listing, pathway};
use crate::support::net::Host;

over_both!(
    add_twice_del_twice,
    one_goes_the_other_stays_whole,
    every_change_is_a_diff_and_leaves_nothing_old,
    del_needs_no_knowledge_of_how_it_was_added,
    dry_run_lines_do_what_add_and_del_do,
    killed_anywhere_the_next_run_completes,
    runs_at_the_same_time_take_turns,
    connmark_auto_and_off,
    sysctl_and_default_route_decide_the_unmarked_rules,
);

/// A host with two interfaces' worth of other people's configuration.
fn lived_in(name: &'static str, firewall: Firewall) -> Host {
    let host = Host::new(name).with(firewall);
    interface(&host, &["10.0.0.2/24", "fd00::2/64"]);
    host.ip("route add default via 10.0.0.1");
    host.ip("rule add priority 50 fwmark 0x7b lookup 77");
    host.ip("rule add priority 5210 fwmark 0x80000/0xff0000 lookup main");
    host.ip("route add 192.0.2.0/24 dev eth0 table 77");
    host.run("iptables -t mangle -A OUTPUT -m mark --mark 0x7b -j ACCEPT");
    host.run("iptables -t mangle -N MINE");
    host.run("ip6tables -t mangle -A POSTROUTING -j CONNMARK --save-mark");
    host
}

#[test]
fn the_kernel_holds_the_scheme() {
    let host = Host::new("scheme");
    interface(&host, &["10.0.0.2/24"]);
    add(
        &host,
        &[pathway(123, &["10.0.0.2", "172.17.0.5", "fd00:17::5"])],
    );
    let rules = |family: &str| -> Vec<String> {
        host.ip(&format!("{family} rule"))
            .lines()
            .filter(|line| line.contains("proto 177"))
            .map(|line| line.replace('\t', " ").trim().to_owned())
            .collect()
    };
    assert_eq!(
        rules("-4"),
        [
            "100: from 10.0.0.2 fwmark 0x7b/0xff lookup 123 proto 177",
            "100: from 127.0.0.0/8 fwmark 0x7b/0xff iif lo lookup 123 proto 177",
            "100: from 172.17.0.5 fwmark 0x7b/0xff lookup 123 proto 177",
            "101: from all fwmark 0x7b/0xff iif lo ipproto icmp goto 103 proto 177",
            "102: from all fwmark 0x7b/0xff ipproto icmp lookup 123 proto 177",
            "103: from all fwmark 0x7b/0xff iif lo ipproto icmp nop proto 177",
            "200: from 127.0.0.0/8 iif lo lookup 123 proto 177",
            // this host's own, and there is no default route
            "40000: from 10.0.0.2 lookup 123 proto 177",
        ]
    );
    assert_eq!(
        rules("-6"),
        [
            "100: from ::1 fwmark 0x7b/0xff iif lo lookup 123 proto 177",
            "100: from fd00:17::5 fwmark 0x7b/0xff lookup 123 proto 177",
            "101: from all fwmark 0x7b/0xff iif lo ipproto ipv6-icmp goto 103 proto 177",
            "102: from all fwmark 0x7b/0xff ipproto ipv6-icmp lookup 123 proto 177",
            "103: from all fwmark 0x7b/0xff iif lo ipproto ipv6-icmp nop proto 177",
            "200: from ::1 iif lo lookup 123 proto 177",
        ]
    );
    assert_eq!(
        host.ip("route show table 123").trim(),
        "local default dev lo proto 177 scope host"
    );
    assert_eq!(
        host.ip("-6 route show table 123").trim(),
        "local default dev lo proto 177 metric 1024 pref medium"
    );
    for save in ["iptables-save", "ip6tables-save"] {
        let saved = host.run(&format!("{save} -t mangle"));
        let lines: Vec<_> = saved
            .lines()
            .filter(|line| line.starts_with("-A"))
            .map(|line| line.replace(" -m comment --comment \"mmproxyctl:123:made-table\"", ""))
            .collect();
        let masks = "--nfmask 0xff --ctmask 0xff";
        assert_eq!(
            lines,
            [
                format!(
                    "-A PREROUTING -m connmark --mark 0x7b/0xff -j CONNMARK --restore-mark {masks}"
                ),
                format!("-A OUTPUT -m mark --mark 0x7b/0xff -j CONNMARK --save-mark {masks}"),
                format!(
                    "-A OUTPUT -m connmark --mark 0x7b/0xff -j CONNMARK --restore-mark {masks}"
                ),
            ]
        );
    }
}

fn add_twice_del_twice(firewall: Firewall) {
    let hosts = [
        ("bare", Host::new("bare").with(firewall)),
        ("lived-in", lived_in("lived-in", firewall)),
    ];
    for (name, host) in hosts {
        let pathways = [
            pathway(123, &["10.0.0.2", "172.17.0.0/16", "fd00::2"]),
            // beyond what eight bits of table and mark can hold
            pathway(4_000_000_000, &["10.0.0.3"]),
        ];
        let before = listing(&host);
        assert!(add(&host, &pathways).changed());
        let added = listing(&host);
        assert_ne!(before, added);
        let second = add(&host, &pathways);
        assert_eq!(second.changes, [], "{name}");
        assert_same(&listing(&host), &added, "listing");
        assert!(inside(&host, async || check(&pathways, firewall).await.unwrap()).is_empty());
        assert!(del(&host, &pathways).changed());
        assert_same(&listing(&host), &before, name);
        assert_eq!(del(&host, &pathways).changes, []);
        assert_same(&listing(&host), &before, "listing");
    }
}

fn one_goes_the_other_stays_whole(firewall: Firewall) {
    let host = lived_in("two", firewall);
    let (first, second) = (pathway(123, &["10.0.0.2"]), pathway(124, &["10.0.0.2"]));
    let before = listing(&host);
    add(&host, std::slice::from_ref(&second));
    let alone = listing(&host);
    add(&host, std::slice::from_ref(&first));
    if firewall == Firewall::Auto {
        assert_eq!(saves_and_restores(&host), "SSRR");
    }
    del(&host, std::slice::from_ref(&first));
    assert_same(&listing(&host), &alone, "listing");
    // in the other order, and as the last
    add(&host, std::slice::from_ref(&first));
    del(&host, std::slice::from_ref(&second));
    assert!(
        inside(&host, async || check(
            std::slice::from_ref(&first),
            Firewall::Auto
        )
        .await
        .unwrap())
        .is_empty()
    );
    del(&host, &[first]);
    assert_same(&listing(&host), &before, "listing");
}

/// The jobs of our lines in OUTPUT, in order.
fn saves_and_restores(host: &Host) -> String {
    host.run("iptables -t mangle -S OUTPUT")
        .lines()
        .filter(|line| line.contains("mmproxyctl:"))
        .map(|line| if line.contains("--save") { 'S' } else { 'R' })
        .collect()
}

#[test]
fn disorder_among_the_lines_is_mended() {
    let host = Host::new("disorder");
    let pathways = [pathway(123, &[]), pathway(124, &[])];
    add(&host, &pathways);
    let right = effects(&host);
    // every restore of 124 moves to the top, and one line is doubled
    let words = "-m connmark --mark 0x7c/0xff -m comment --comment mmproxyctl:124:made-table -j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff";
    host.run(&format!("iptables -t mangle -D OUTPUT {words}"));
    host.run(&format!("iptables -t mangle -I OUTPUT {words}"));
    host.run(&format!("iptables -t mangle -I PREROUTING {words}"));
    assert_eq!(saves_and_restores(&host), "RSSR");
    let report = add(&host, &pathways);
    assert_eq!(saves_and_restores(&host), "SSRR");
    assert_eq!(report.changes.len(), 3, "{:?}", report.changes);
    assert_eq!(add(&host, &pathways).changes, []);
    assert_same(&effects(&host), &right, "mended");
}

#[test]
fn what_is_missing_is_named_and_added_alone() {
    let host = lived_in("missing", Firewall::Auto);
    let wanted = [pathway(123, &["10.0.0.2"])];
    add(&host, &wanted);
    let whole = effects(&host);
    let breakages = [
        (
            "ip rule del priority 200",
            "IPv4 rule missing: priority 200",
        ),
        (
            "ip -6 route del local default table 123",
            "IPv6 route missing",
        ),
        (
            "iptables -t mangle -D OUTPUT 1",
            "IPv4 mangle OUTPUT rule missing",
        ),
        (
            "ip6tables -t mangle -F PREROUTING",
            "IPv6 mangle PREROUTING rule missing",
        ),
    ];
    for (command, name) in breakages {
        host.run(command);
        let (code, out, err) = ctl(&host, "pathway check 123");
        // the binary does not know of the target: what it misses is the piece
        assert_eq!(code, 1, "{command}: {out}{err}");
        assert!(out.contains(name), "{command}: {out}");
        assert!(out.contains("mmproxyctl pathway add 123"), "{out}");
        let report = add(&host, &wanted);
        assert_eq!(report.changes.len(), 1, "{:?}", report.changes);
        assert_same(&effects(&host), &whole, command);
    }
    assert_eq!(ctl(&host, "pathway check 123").0, 0);
    assert_eq!(ctl(&host, "pathway check 124").0, 1);
}

/// What a pathway is changed into, one after the other.
fn variants() -> Vec<Pathway> {
    let base = pathway(123, &["10.0.0.2"]);
    let with = |change: fn(&mut Pathway)| {
        let mut pathway = base.clone();
        change(&mut pathway);
        pathway
    };
    vec![
        base.clone(),
        with(|pathway| pathway.priority = Priority::new(300).unwrap()),
        with(|pathway| pathway.table = TableId::new(1000).unwrap()),
        with(|pathway| pathway.mask = "0xffff".parse().unwrap()),
        with(|pathway| pathway.connmark = ConnmarkMode::Off),
        with(|pathway| pathway.targets.clear()),
        base,
    ]
}

fn every_change_is_a_diff_and_leaves_nothing_old(firewall: Firewall) {
    let (host, fresh) = (lived_in("changing", firewall), lived_in("fresh", firewall));
    let before = listing(&host);
    for variant in variants() {
        let report = add(&host, std::slice::from_ref(&variant));
        // make before break; the lines are one transaction in between
        let rules_and_routes: Vec<_> = report
            .changes
            .iter()
            .filter(|change| change.command.to_string().starts_with("ip "))
            .map(|change| change.outcome)
            .collect();
        assert!(rules_and_routes.is_sorted(), "{:#?}", report.changes);
        add(&fresh, std::slice::from_ref(&variant));
        assert_same(&effects(&host), &effects(&fresh), &format!("{variant:?}"));
        del(&fresh, std::slice::from_ref(&variant));
        assert_same(&listing(&fresh), &before, &format!("{variant:?}"));
    }
}

fn del_needs_no_knowledge_of_how_it_was_added(firewall: Firewall) {
    let host = lived_in("forgotten", firewall);
    let before = listing(&host);
    for variant in variants() {
        add(&host, &[variant]);
        // the defaults: another table, priority, mask and no targets
        let (code, out, err) = ctl(&host, "pathway del 123");
        assert_eq!(code, 0, "{out}{err}");
        assert_same(&listing(&host), &before, "listing");
    }
}

fn dry_run_lines_do_what_add_and_del_do(firewall: Firewall) {
    let scripts = |host: &Host| super::foreign::old_scripts(host, 123);
    let nothing = |_: &Host| {};
    let preparations: [&dyn Fn(&Host); 2] = [&nothing, &scripts];
    for prepare in preparations {
        let (by_hand, by_us) = (lived_in("by-hand", firewall), lived_in("by-us", firewall));
        for host in [&by_hand, &by_us] {
            prepare(host);
            let instances = "a\t123\t127.0.0.1:1\t10.0.0.2\t22\tfd00::2\n\
                             b\t0x200\t127.0.0.1:2\t172.17.0.9\t22\t::1\n";
            host.write("etc/instances.tsv", instances);
            host.write("etc/pathways.conf", "123\n0x200 table=70000 priority=30\n");
        }
        for verb in ["add-all", "del-all"] {
            let before = listing(&by_hand);
            let (code, commands, err) = ctl(&by_hand, &format!("pathway {verb} --dry-run"));
            assert_eq!(code, 0, "{err}");
            assert_same(&listing(&by_hand), &before, "a dry run changed something");
            assert!(!by_hand.dir().join("run").exists());
            let script = by_hand.write("script", format!("set -e\n{commands}"));
            by_hand.run(&format!("sh {}", script.display()));
            assert_eq!(ctl(&by_us, &format!("pathway {verb}")).0, 0);
            assert_same(
                &listing(&by_hand),
                &listing(&by_us),
                &format!("{verb}:\n{commands}"),
            );
        }
    }
}

fn killed_anywhere_the_next_run_completes(firewall: Firewall) {
    // every message to the kernel, and every start of a program, is a place to die
    std::thread::scope(|scope| {
        for (verb, syscall) in [
            ("add", "sendto"),
            ("del", "sendto"),
            ("add", "clone,clone3,vfork"),
        ] {
            scope.spawn(move || killed_at_each(firewall, verb, syscall));
        }
    });
}

fn killed_at_each(firewall: Firewall, verb: &str, syscall: &str) {
    let host = lived_in("killed", firewall);
    let before = effects(&host);
    assert_eq!(ctl(&host, "pathway add 123").0, 0);
    let whole = effects(&host);
    let mut deaths = 0;
    for number in 1.. {
        // half of the state to begin with, so that a run that dies early dies in different places
        let setup = if verb == "add" { "del" } else { "add" };
        assert_eq!(ctl(&host, &format!("pathway {setup} 123")).0, 0);
        let target = host.mmproxyctl(&format!("pathway {verb} 123"));
        let mut command = host.command("strace");
        command
            .args(["-qq", "-o", "/dev/null", "-e", &format!("trace={syscall}")])
            .args(["-e", &format!("inject={syscall}:signal=KILL:when={number}")])
            .arg(target.get_program())
            .args(target.get_args())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let status = command
            .status()
            .unwrap_or_else(|error| panic!("strace: {error}: install it (./tests/run.sh does)"));
        if status.success() {
            break;
        }
        deaths += 1;
        let (code, out, err) = ctl(&host, &format!("pathway {verb} 123"));
        assert_eq!(code, 0, "{number}: {out}{err}");
        let expected = if verb == "add" { &whole } else { &before };
        if number % 4 == 0 {
            assert_same(
                &effects(&host),
                expected,
                &format!("killed at {syscall} {number}"),
            );
        }
        let state = json(&host, "pathway list --json");
        assert_eq!(
            state.as_array().unwrap().len(),
            usize::from(verb == "add"),
            "{state}"
        );
    }
    assert!(deaths >= 4, "{verb} made only {deaths} {syscall} calls");
}

fn runs_at_the_same_time_take_turns(firewall: Firewall) {
    let host = lived_in("race", firewall);
    let before = listing(&host);
    for (verb, runs) in [("add", 6), ("del", 6)] {
        let outputs: Vec<_> = std::thread::scope(|scope| {
            let start = || {
                let command = host.mmproxyctl(&format!("pathway {verb} 123 124 --json"));
                scope.spawn(|| super::finish(command))
            };
            std::fs::create_dir_all(host.dir().join("etc")).unwrap();
            let threads: Vec<_> = (0..runs).map(|_| start()).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        let mut changed = 0;
        for (code, out, err) in outputs {
            assert_eq!(code, 0, "{out}{err}");
            let report: serde_json::Value = serde_json::from_str(&out).unwrap();
            changed += usize::from(report["changed"] == true);
        }
        assert_eq!(
            changed, 1,
            "{verb}: one run does it, the others find it done"
        );
        if verb == "add" {
            assert_eq!(ctl(&host, "pathway check 123 124").0, 0);
        }
    }
    assert_same(&listing(&host), &before, "listing");
}

fn sysctl_and_default_route_decide_the_unmarked_rules(firewall: Firewall) {
    let host = Host::new("facts").with(firewall);
    interface(&host, &["10.0.0.2/24"]);
    let wanted = [pathway(123, &["10.0.0.2"])];
    let unmarked = || -> Vec<String> {
        add(&host, &wanted);
        host.ip("-4 rule")
            .lines()
            .filter(|line| line.contains("proto 177") && !line.contains("fwmark"))
            .map(|line| line.replace('\t', " ").replace(" lookup 123 proto 177", ""))
            .collect()
    };
    let loopback = "200: from 127.0.0.0/8 iif lo";
    let unrouted = "40000: from 127.0.0.0/8 iif lo";
    let own = "40000: from 10.0.0.2";
    assert_eq!(unmarked(), [loopback, own]);
    host.sysctl("net.ipv4.conf.all.route_localnet", "1");
    assert_eq!(unmarked(), [own, unrouted]);
    host.ip("route add default via 10.0.0.1");
    assert_eq!(unmarked(), [""; 0]);
    host.sysctl("net.ipv4.conf.all.route_localnet", "0");
    assert_eq!(unmarked(), [loopback]);
    host.sysctl("net.ipv4.conf.eth0.route_localnet", "1");
    assert_eq!(unmarked(), [""; 0]);
    // the loopback look-ups never ask lo's own switch
    host.sysctl("net.ipv4.conf.eth0.route_localnet", "0");
    host.sysctl("net.ipv4.conf.lo.route_localnet", "1");
    assert_eq!(unmarked(), [loopback]);
}

fn connmark_auto_and_off(firewall: Firewall) {
    let host = Host::new("connmark").with(firewall);
    // a line of one family, or an entry of both
    let lines = || {
        let jumps = host.run("nft list ruleset").matches(" : jump ").count();
        jumps + host.run("iptables-save -t mangle").matches("-A ").count()
    };
    let mut wanted = pathway(123, &[]);
    wanted.connmark = ConnmarkMode::Auto;
    add(&host, &[wanted.clone()]);
    assert_eq!(lines(), 0, "loopback targets work without");
    host.sysctl("net.ipv4.conf.all.route_localnet", "1");
    add(&host, &[wanted.clone()]);
    assert_eq!(lines(), 3, "without the unmarked rule they do not");
    host.sysctl("net.ipv4.conf.all.route_localnet", "0");
    wanted.targets = pathway(123, &["10.0.0.9"]).targets;
    add(&host, &[wanted.clone()]);
    assert_eq!(lines(), 3);
    wanted.connmark = ConnmarkMode::Off;
    let report = add(&host, &[wanted]);
    assert!(
        report
            .changes
            .iter()
            .all(|change| change.outcome == Outcome::Removed)
    );
    assert_eq!(lines(), 0);
    assert_eq!(host.run("nft list ruleset"), "");
}

#[test]
fn the_verbs_take_files_names_and_marks() {
    let host = Host::new("verbs");
    host.write("etc/pathways.conf", "123 name=vps01\n0x7c\n");
    host.write(
        "etc/instances.tsv",
        "ssh\t123\t127.0.0.1:1\t127.0.0.1\t22\t::1\nweb\t124\t127.0.0.1:2\t172.17.0.2\t80\t-\n",
    );
    let added = json(&host, "pathway add ssh --json");
    assert_eq!(added["pathways"][0]["mark"], 123);
    assert_eq!(added["pathways"][0]["name"], "vps01");
    assert_eq!(added["changed"], true);
    let (code, out, _) = ctl(&host, "pathway check");
    assert_eq!(code, 1);
    assert!(
        out.contains("mark 123: in place\nmark 124: IPv4 rule missing")
            || out.contains("mark 124: "),
        "{out}"
    );
    let (code, out, _) = ctl(&host, "pathway add-all");
    assert_eq!(code, 0);
    assert_eq!(
        out,
        "MARK  NAME   RESULT     WHAT\n\
         123   vps01  unchanged  all in place\n\
         124   -      added      8 rules, 2 routes, 6 CONNMARK lines\n"
    );
    let (code, out, err) = ctl(&host, "pathway add 0x7d");
    assert_eq!(code, 0);
    assert!(out.contains("125   -     added   4 rules"), "{out}");
    assert_eq!(
        err,
        "note: mark 125 is in no pathways.conf: taking the defaults\n"
    );
    let listed = json(&host, "pathway list --json");
    let states: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| {
            (
                entry["mark"].as_u64().unwrap(),
                entry["state"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        states,
        [
            (123, "in-place"),
            (124, "in-place"),
            (125, "not-configured")
        ]
    );
    assert_eq!(ctl(&host, "pathway check").0, 0);
    for (words, said) in [
        ("add nobody", "'nobody' is no mark, and no instance in"),
        ("add 0", "mark 0 means unmarked"),
        ("add 254", "mark 254 is the number of a system table"),
        ("add", "required"),
        ("add 123 --all", "cannot be used with"),
    ] {
        let (code, out, err) = ctl(&host, &format!("pathway {words}"));
        assert_eq!((code, out.as_str()), (2, ""), "{words}: {err}");
        assert!(err.contains(said), "{words}: {err}");
    }
    assert_eq!(ctl(&host, "pathway del web 125 vps01").0, 2);
    assert_eq!(ctl(&host, "pathway del web 125 ssh").0, 0);
    let rules = host.ip("rule") + &host.ip("-6 rule");
    assert!(!rules.contains("177"), "{rules}");
}
