//! The rules: made, needed, named where they are missing, removed, kept apart from other programs'.

use super::*;

/// Another program's TPROXY set-up, of the same shape.
fn foreign(rig: &Rig) {
    for (family, elsewhere) in [("", "203.0.112.0/24"), ("-6", "2001:db8:4::/64")] {
        rig.wks
            .ip(&format!("{family} rule add fwmark 0x1 lookup 100"));
        rig.wks.ip(&format!(
            "{family} rule add to {elsewhere} fwmark 0x2000/0x20ff lookup 100"
        ));
        rig.wks.ip(&format!(
            "{family} route add local default dev lo table 100"
        ));
    }
    let words = "-p tcp --dport 9999 -m comment --comment theirs -j TPROXY --on-port 9999 --tproxy-mark 0x1/0x1";
    match rig.backend {
        Backend::Nftables => {
            let table = "table inet theirs {\n chain prerouting {\n\
                type filter hook prerouting priority mangle;\n\
                tcp dport 9999 tproxy to :9999 meta mark set 1 accept\n }\n}\n";
            let file = rig.wks.write("theirs.nft", table);
            rig.wks.run(&format!("nft -f {}", file.display()));
        }
        Backend::Iptables | Backend::Legacy => {
            let end = if rig.backend == Backend::Legacy {
                "legacy"
            } else {
                "nft"
            };
            for program in ["iptables", "ip6tables"] {
                rig.wks
                    .run(&format!("{program}-{end} -t mangle -A PREROUTING {words}"));
            }
        }
    }
}

fn from_nothing_to_nothing(backend: Backend) {
    let rig = Rig::new(backend).with(LINES);
    foreign(&rig);
    let services = rig.services();
    let before = rig.listing();
    let relay = rig.run("run --all --no-check");
    rig.assert_cells(&services, false, "without rules");
    rig.said("pathway add --all");
    rig.assert_cells(&services, true, "with rules");
    let whole = rig.listing();
    let again = rig.said("pathway add --all");
    assert!(again.contains("unchanged"), "{again}");
    assert_same(&rig.listing(), &whole, "a second add");
    rig.said("pathway check");
    let healthy = rig.said("doctor");

    rig.break_rule("4", "tcp");
    assert!(!rig.passes(&services, CELLS[0]), "the rule is not needed");
    let (code, said) = rig.ctl("pathway check");
    assert_eq!(code, 1, "{said}");
    let named = match backend {
        Backend::Nftables => {
            "nftables entry missing: chain prerouting, tproxy tcp 203.0.113.0/24:10000-10999"
        }
        _ => {
            "IPv4 mangle PREROUTING rule missing: -d 203.0.113.0/24 ! -i lo -p tcp -m tcp --dport 10000:10999"
        }
    };
    assert!(said.contains(named), "{said}");
    let (code, said) = rig.ctl("doctor");
    assert_eq!(code, 1, "{said}\nhealthy it said:\n{healthy}");
    assert!(
        said.contains(named.split("missing: ").last().unwrap_or(named)),
        "{said}"
    );
    rig.said("pathway add --all");
    rig.assert_cells(&services, true, "mended");

    // the rule that delivers them here, too
    rig.wks.ip("rule del to 203.0.113.0/24");
    assert!(!rig.passes(&services, CELLS[0]));
    let (_, said) = rig.ctl("pathway check");
    let named = "IPv4 rule missing: priority 100 to 203.0.113.0/24 fwmark 0x2000/0x20ff lookup 123";
    assert!(said.contains(named), "{said}");
    rig.said("pathway add --all");
    rig.assert_cells(&services, true, "mended");

    rig.said("pathway del --all");
    assert_same(&rig.listing(), &before, "the end");
    rig.assert_cells(&services, false, "without rules again");
    // nothing of it is for the log: nobody reached the relay
    assert!(!relay.log().contains("WARN"), "{}", relay.log());
}

#[test]
fn iptables_nft() {
    from_nothing_to_nothing(Backend::Iptables);
}

#[test]
fn iptables_legacy() {
    from_nothing_to_nothing(Backend::Legacy);
}

#[test]
fn nftables() {
    from_nothing_to_nothing(Backend::Nftables);
}

#[test]
fn dry_run_lines_do_what_add_and_del_do() {
    for backend in [Backend::Iptables, Backend::Nftables] {
        let (by_hand, by_us) = (Rig::new(backend).with(LINES), Rig::new(backend).with(LINES));
        for verb in ["add", "del"] {
            let before = by_hand.listing();
            let commands = by_hand.said(&format!("-q pathway {verb} --all --dry-run"));
            let speaks = commands.to_lowercase().contains("tproxy");
            // a table goes as a whole
            let whole = backend == Backend::Nftables && verb == "del";
            assert!(speaks || whole, "{commands}");
            assert_same(&by_hand.listing(), &before, "a dry run changed something");
            let script = by_hand.wks.write("script", format!("set -e\n{commands}"));
            by_hand.wks.run(&format!("sh {}", script.display()));
            by_us.said(&format!("pathway {verb} --all"));
            let when = format!("{verb}:\n{commands}");
            // the links between hosts have names and numbers of their own
            let rules = |rig: &Rig| {
                let all = [
                    "ip rule",
                    "ip -6 rule",
                    "ip route show table 123",
                    "ip -6 route show table 123",
                    "iptables-save",
                    "ip6tables-save",
                    "nft list ruleset",
                ];
                all.map(|command| without_comments(&rig.wks.run(command)))
                    .concat()
            };
            assert_same(&rules(&by_hand), &rules(&by_us), &when);
        }
    }
}

#[test]
fn a_service_among_the_addresses_under_every_sysctl() {
    // the relay stands in line: the proxy's packets are for the service's own address, and so are the relay's
    let rig = Rig::new(Backend::Iptables).with(
        "in-line\t123\t203.0.113.0/24:443\t203.0.113.9\t443\t2001:db8:5::9\tlisten=transparent\n\
         in-line6\t123\t[2001:db8:5::]/64:443\t203.0.113.9\t443\t2001:db8:5::9\tlisten=transparent\n",
    );
    rig.srv.address("lo", "203.0.113.9/32");
    rig.srv.address("lo", "2001:db8:5::9/128");
    rig.wks.ip("route add 203.0.113.9 via 10.1.0.2");
    rig.wks.ip("-6 route add 2001:db8:5::9 via fd01::2");
    let services = ["203.0.113.9:443", "[2001:db8:5::9]:443"].map(|at| Service::echo(&rig.srv, at));
    let _relay = rig.run("run --all --manage-pathways");
    let sysctls = [
        ("0", "0", "0"),
        ("1", "0", "0"),
        ("1", "1", "0"),
        ("0", "0", "1"),
        ("1", "1", "1"),
    ];
    for ((rp_filter, valid_mark, accept), port) in sysctls.into_iter().zip(4000..) {
        for (name, value) in [
            ("net.ipv4.conf.all.rp_filter", rp_filter),
            ("net.ipv4.conf.eth0.rp_filter", rp_filter),
            ("net.ipv4.conf.all.src_valid_mark", valid_mark),
            ("net.ipv4.tcp_fwmark_accept", accept),
        ] {
            rig.wks.sysctl(name, value);
        }
        for (to, client, service) in [
            ("203.0.113.9:443", format!("192.0.2.7:{port}"), &services[0]),
            (
                "[2001:db8:5::9]:443",
                format!("[2001:db8::7]:{port}"),
                &services[1],
            ),
        ] {
            let open = rig.connect(to, &client);
            assert!(open.is_some(), "{to}, {rp_filter} {valid_mark} {accept}");
            assert_eq!(service.peer(), addr(&client));
        }
    }
    // why the mark is not the pathway's: by that, the relay's own packets are turned round as well
    rig.wks
        .ip("rule add priority 50 to 203.0.113.0/24 fwmark 123/0xff lookup 123");
    assert!(rig.connect("203.0.113.9:443", "192.0.2.7:5000").is_none());
}

#[test]
fn what_a_firewall_of_none_cannot_do_is_said() {
    let rig = Rig::new(Backend::Iptables).with(LINES);
    let (code, said) = rig.ctl("pathway add --all --firewall none");
    assert_eq!(code, 1, "{said}");
    let expected = "--firewall none cannot hand tcp 203.0.113.0/24:10000-10999 to a listener, as mark 123 wants";
    assert!(said.contains(expected), "{said}");
    rig.wks.write("etc/pathways.conf", "8192\n");
    rig.wks
        .write("etc/instances.tsv", LINES.replace("\t123\t", "\t8192\t"));
    let (code, said) = rig.ctl("pathway add --all");
    assert_eq!(code, 2, "{said}");
    let expected = "packets of mark 8192 look like those that are handed to a transparent listener";
    assert!(said.contains(expected), "{said}");
}
