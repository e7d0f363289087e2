//! `--firewall none`: what works without any, what is refused, and the sysctl that is set and set back.

use mmproxyctl::pathway::{self, Firewall, Options};

use crate::pathway::cells::{CLIENTS, HOPELESS, LIMIT, Lab};
use crate::pathway::{assert_same, ctl, inside, json, listing, options};
use crate::support::net::Host;

const SWITCH: &str = "sysctl -n net.ipv4.tcp_fwmark_accept";

fn none_host(name: &'static str) -> Host {
    let host = Host::new(name).with(Firewall::None);
    host.write(
        "etc/pathways.conf",
        "123 targets=10.0.0.2\n124 targets=10.0.0.2\n125\n",
    );
    host.ip("address add 10.0.0.2/32 dev lo");
    host
}

fn switch(host: &Host) -> String {
    host.run(SWITCH).trim().to_owned()
}

#[test]
fn tcp_to_this_hosts_own_addresses_in_both_families() {
    let mut lab = Lab::new(Firewall::None);
    let own = |address: &str| ["127.0.0.1", "::1", "10.0.0.2", "fd00::2"].contains(&address);
    lab.services.retain(|(address, _)| own(address));
    let far_away = &CLIENTS[..2];
    let wanted = [lab.pathway()];
    let options = Options {
        set_sysctls: true,
        ..options(&lab.wks)
    };
    for default_route in [true, false] {
        lab.default_route(default_route);
        for localnet in ["0", "1"] {
            lab.sysctls("route_localnet", localnet);
            inside(&lab.wks, async || pathway::add(&wanted, &options).await).unwrap();
            let case = format!("default route {default_route}, route_localnet {localnet}");
            assert_eq!(lab.failures(&CLIENTS, LIMIT), [""; 0], "{case}");
            lab.assert_direct(&case);
        }
    }
    lab.sysctls("route_localnet", "0");
    lab.default_route(true);
    inside(&lab.wks, async || pathway::add(&wanted, &options).await).unwrap();
    assert_eq!(lab.wks.run("nft list ruleset"), "");
    // IPv6 obeys the same switch, IPv4's by its name: without it only loopback is left
    assert_eq!(switch(&lab.wks), "1");
    lab.wks.sysctl("net.ipv4.tcp_fwmark_accept", "0");
    let failed = lab.failures(far_away, HOPELESS);
    assert_eq!(failed.len(), 2, "{failed:?}");
    assert!(
        failed.iter().any(|cell| cell.contains("fd00::2")),
        "{failed:?}"
    );
    let findings = inside(&lab.wks, async || {
        pathway::check(&wanted, Firewall::None).await.unwrap()
    });
    let [finding] = findings.as_slice() else {
        panic!("{findings:?}");
    };
    assert_eq!(finding.to_string(), "net.ipv4.tcp_fwmark_accept=1 missing");
    assert!(finding.fix().ends_with("--firewall none --set-sysctls"));
}

#[test]
fn the_sysctl_is_named_allowed_recorded_and_set_back() {
    let host = none_host("switch");
    let before = listing(&host);
    let (code, out, err) = ctl(&host, "pathway add 123");
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(
        err.contains("net.ipv4.tcp_fwmark_accept=1") && err.contains("--set-sysctls"),
        "{err}"
    );
    assert_same(&listing(&host), &before, "listing");
    assert_eq!(switch(&host), "0");

    let (code, out, err) = ctl(&host, "pathway add 123 --set-sysctls --dry-run");
    assert!(
        code == 0 && out.contains("sysctl -w net.ipv4.tcp_fwmark_accept=1"),
        "{err}"
    );
    assert_eq!(switch(&host), "0");
    let (code, out, err) = ctl(&host, "pathway add 123 --set-sysctls");
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("1 sysctl"), "{out}");
    assert!(
        err.contains("net.ipv4.tcp_fwmark_accept is set to 1"),
        "{err}"
    );
    assert_eq!(switch(&host), "1");
    let (_, out, err) = ctl(&host, "pathway add 123");
    assert!(out.contains("unchanged"), "{out}{err}");
    // the second one needs no permission: nothing is set any more
    assert_eq!(ctl(&host, "pathway add 124").0, 0);
    assert_eq!(ctl(&host, "pathway check 123 124").0, 0);
    assert_eq!(ctl(&host, "pathway del 123").0, 0);
    assert_eq!(switch(&host), "1", "124 needs it still");
    let (code, out, err) = ctl(&host, "pathway del 124");
    assert!(code == 0 && out.contains("1 sysctl"), "{out}");
    assert!(err.contains("is set back to 0"), "{err}");
    assert_eq!(switch(&host), "0");
    assert_same(&listing(&host), &before, "listing");

    // with another back end it is not needed any more
    assert_eq!(ctl(&host, "pathway add 123 124 --set-sysctls").0, 0);
    assert_eq!(ctl(&host, "--firewall nftables pathway add 123 124").0, 0);
    assert_eq!(switch(&host), "0");
    assert_eq!(ctl(&host, "pathway add 123 124 --set-sysctls").0, 0);
    assert_eq!(host.run("nft list ruleset"), "");
    assert_eq!(ctl(&host, "pathway del 123 124").0, 0);
    assert_eq!(switch(&host), "0");
    assert_same(&listing(&host), &before, "listing");
}

#[test]
fn a_sysctl_that_others_set_stays() {
    let host = none_host("theirs");
    host.sysctl("net.ipv4.tcp_fwmark_accept", "1");
    let report = json(&host, "pathway add-all --json");
    assert!(!report.to_string().contains("sysctl"), "{report:#}");
    assert_eq!(ctl(&host, "pathway check").0, 0);
    assert_eq!(ctl(&host, "pathway del-all").0, 0);
    assert_eq!(switch(&host), "1");
}

#[test]
fn killed_anywhere_it_is_still_set_back() {
    let host = none_host("killed");
    // the record's file, its name, the switch: each is a place to die
    let places = [
        ("add", "write", 1),
        ("add", "rename", 1),
        ("add", "write", 2),
        ("del", "write", 1),
        ("del", "unlink", 1),
    ];
    for (verb, syscall, number) in places {
        let setup = if verb == "add" { "del" } else { "add" };
        assert_eq!(
            ctl(&host, &format!("pathway {setup} 123 --set-sysctls")).0,
            0
        );
        let target = host.mmproxyctl(&format!("pathway {verb} 123 --set-sysctls"));
        let mut command = host.command("strace");
        command
            .args(["-qq", "-f", "-o", "/dev/null"])
            .args(["-e", &format!("trace={syscall}")])
            .args(["-P", "/proc/sys/net/ipv4/tcp_fwmark_accept"])
            .args(["-P", &record(&host, "marks"), "-P", &record(&host, "new")])
            .args(["-e", &format!("inject={syscall}:signal=KILL:when={number}")])
            .arg(target.get_program())
            .args(target.get_args())
            .env("MMPROXY_FIREWALL", "none");
        let outcome = command.output().expect("strace: install it");
        assert!(!outcome.status.success(), "{verb}: no {syscall} {number}");
        assert_eq!(ctl(&host, "pathway add 123 --set-sysctls").0, 0);
        assert_eq!(switch(&host), "1", "{verb} {syscall} {number}");
        assert_eq!(ctl(&host, "pathway del 123").0, 0);
        assert_eq!(switch(&host), "0", "{verb} {syscall} {number}");
    }
}

fn record(host: &Host, suffix: &str) -> String {
    let file = host.enter(|| {
        options(host)
            .runtime_dir
            .file("tcp_fwmark_accept", suffix)
            .unwrap()
    });
    file.to_string_lossy().into_owned()
}

#[test]
fn what_the_kernel_cannot_do_alone_is_refused() {
    let host = none_host("refused");
    host.write(
        "etc/instances.tsv",
        "dns\t125\t127.0.0.1:53\t127.0.0.1\t5353\t-\tprotocol=udp\n\
         web\t126\t127.0.0.1:80\t172.17.0.2\t80\t-\n",
    );
    let before = listing(&host);
    host.write("etc/pathways.conf", "125\n126\n");
    for (target, said) in [
        ("dns", "serves TCP only, and mark 125 has UDP (dns)"),
        ("web", "172.17.0.2/32, a target of mark 126, is none"),
    ] {
        let (code, out, err) = ctl(&host, &format!("pathway add {target} --set-sysctls"));
        assert_eq!((code, out.as_str()), (1, ""));
        assert!(err.contains(said), "{err}");
        let (code, out, _) = ctl(&host, &format!("pathway check {target}"));
        assert_eq!(code, 1);
        assert!(out.contains(said), "{out}");
    }
    assert_same(&listing(&host), &before, "listing");
    assert_eq!(switch(&host), "0");
    // loopback needs nothing of a firewall, and the pathway says so
    host.write("etc/pathways.conf", "125 connmark=auto\n126\n");
    let (code, out, err) = ctl(&host, "pathway add dns");
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("4 rules, 2 routes\n"), "{out}");
    assert_eq!(switch(&host), "0");
    // relays ask the same question before they start
    host.write("etc/allow.txt", "127.0.0.1\n");
    let (code, _, err) = ctl(&host, "run web --manage-pathways --set-sysctls");
    assert_eq!(code, 1);
    assert!(err.contains("a target of mark 126, is none"), "{err}");
}
