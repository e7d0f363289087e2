//! While it runs: reload, the watch, a relay without files, an upgrade, and what other verbs say.

use super::*;

#[test]
fn a_reload_brings_one_and_takes_one_away() {
    let plain = "plain\t123\t10.0.0.1:2222\t10.1.0.2\t7000\tfd01::2\n";
    let rig = Rig::new(Backend::Iptables).with(plain);
    let services = rig.services();
    let _relay = rig.run("run --all --manage-pathways");
    let mut open = rig
        .connect("10.0.0.1:2222", "192.0.2.7:5000")
        .expect("a connection");
    services.tcp[0].peer();
    rig.assert_cells(&services, false, "before the reload");
    rig.wks
        .write("etc/instances.tsv", format!("{plain}{LINES}"));
    let said = rig.said("reload");
    for name in ["t4", "t6", "u4", "u6"] {
        assert!(said.contains(&format!("started: {name}")), "{said}");
    }
    rig.assert_cells(&services, true, "after the reload");
    // on the very address and port, another kind of socket
    rig.wks.write(
        "etc/instances.tsv",
        format!("{plain}t4\t123\t203.0.113.0/25:10000-10999\t10.1.0.2\t7000\tfd01::2\tlisten=transparent\n"),
    );
    rig.said("reload");
    assert!(rig.passes(&services, CELLS[0]));
    wait_for("the addresses to go that are not listened on", || {
        rig.connect("203.0.113.177:10500", "192.0.2.7:5001")
            .is_none()
    });
    rig.wks.write("etc/instances.tsv", plain);
    rig.said("reload");
    rig.assert_cells(&services, false, "at the end");
    wait_for("the rules to go", || {
        let saved = ["iptables-save -t mangle", "ip6tables-save -t mangle"];
        !saved
            .map(|save| rig.wks.run(save))
            .concat()
            .contains("TPROXY")
    });
    assert!(says(&mut open), "an open connection was lost");
}

#[test]
fn what_was_handed_over_stays_after_a_reload_until_it_ends() {
    for backend in [Backend::Iptables, Backend::Nftables] {
        let plain = "plain\t123\t10.0.0.1:2222\t10.1.0.2\t7000\tfd01::2\n";
        let rig = Rig::new(backend).with(plain);
        let services = rig.services();
        let relay = rig.run("run --all --manage-pathways");
        let without = effects(&rig.wks);
        rig.wks
            .write("etc/instances.tsv", format!("{plain}{LINES}"));
        rig.said("reload");
        let mut open: Vec<TcpStream> = CELLS[..2]
            .iter()
            .map(|(_, to, client)| {
                let client = SocketAddr::new(client.parse().expect("an address"), 5000);
                rig.connect(to, &client.to_string()).expect("a connection")
            })
            .collect();
        rig.wks.write("etc/instances.tsv", plain);
        rig.said("reload");
        // longer than the keeper's looks are apart
        for _ in 0..30 {
            let alive = open.iter_mut().all(says);
            assert!(alive, "{backend:?}: {}", relay.log());
            std::thread::sleep(Duration::from_millis(100));
        }
        rig.assert_cells(&services, false, "new ones after the reload");
        let (code, said) = rig.ctl("pathway check");
        assert_eq!(code, 0, "{said}");
        drop(open);
        wait_for("the rules to go", || effects(&rig.wks) == without);
    }
}

#[test]
fn the_watch_puts_the_rules_back_and_open_connections_stay() {
    for backend in [Backend::Iptables, Backend::Nftables] {
        let rig = Rig::new(backend).with(LINES);
        let services = rig.services();
        let before = rig.listing();
        let mut watch = rig.wks.spawn(rig.command("pathway watch"));
        wait_for("the pathways", || rig.ctl("pathway check").0 == 0);
        let relay = rig.run("run --all");
        let mut open = rig
            .connect(CELLS[0].1, "192.0.2.7:5000")
            .expect("a connection");
        services.tcp[0].peer();
        rig.break_rule("4", "tcp");
        rig.wks.ip("rule del to 203.0.113.0/24");
        wait_for("the repair", || rig.ctl("pathway check").0 == 0);
        assert!(
            says(&mut open),
            "an open connection was lost: {}",
            watch.log()
        );
        rig.assert_cells(&services, true, "after the repair");
        assert!(
            watch.log().to_lowercase().contains("tproxy"),
            "{}",
            watch.log()
        );
        drop((open, relay));
        watch.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(watch.wait(SOON).success());
        assert_same(&rig.listing(), &before, "the end of the watch");
    }
}

#[test]
fn one_relay_without_files_and_its_successor() {
    let rig = Rig::new(Backend::Nftables).with("");
    let services = rig.services();
    let flags = "run --listen 203.0.113.0/24:10000-10999 --listen-transparent --target4 10.1.0.2:7000 \
                 --target6 [fd01::2]:7000 --mark 123 --trust 10.0.0.2 --manage-pathways";
    // what it is advised to do without the rules is what makes them
    let unmanaged = flags.replace(" --manage-pathways", "");
    let (code, said) = rig.ctl(&unmanaged);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("start it with --manage-pathways"), "{said}");
    assert!(!said.contains("pathway add"), "{said}");
    let careless = rig.run(&format!("{unmanaged} --no-check"));
    let status = rig.said("status");
    assert!(
        status.contains("incomplete: start it with --manage-pathways"),
        "{status}"
    );
    drop(careless);
    let relay = rig.run(flags);
    let mut open = rig
        .connect(CELLS[0].1, "192.0.2.7:5000")
        .expect("a connection");
    services.tcp[0].peer();
    // its sockets are known for what they are in the next process
    let said = rig.said("upgrade");
    assert!(said.contains("handed over"), "{said}");
    assert!(rig.passes(&services, CELLS[0]), "{}", relay.log());
    assert!(says(&mut open), "an open connection was lost");
    let sockets = rig.wks.run("ss -Hltn sport = :10000");
    assert!(sockets.contains("203.0.113.0:10000"), "{sockets}");
    // without the flag it is no address of this host's
    let plain = flags.replace("--listen-transparent ", "");
    let (code, said) = rig.ctl(&plain);
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("203.0.113.0/24:10000-10999 is a network"),
        "{said}"
    );
}

#[test]
fn the_proxys_side_of_it() {
    let rig = Rig::new(Backend::Iptables).with(LINES);
    let (code, said) = rig.ctl("edge-config t4 haproxy");
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("name the one that the proxy connects to with --address"),
        "{said}"
    );
    let snippet = rig.said("edge-config t4 haproxy --address 203.0.113.7");
    for text in ["203.0.113.7:10000", "must be routed there"] {
        assert!(snippet.contains(text), "{snippet}");
    }
    let (code, said) = rig.ctl("edge-config t4 haproxy --address 203.0.114.7");
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("none of the addresses that t4 takes"),
        "{said}"
    );
    let checked = rig.said("check");
    assert!(
        checked.contains("tcp 203.0.113.0/24:10000-10999"),
        "{checked}"
    );
    // from here the way leads to the router, not to the relay
    let (code, said) = rig.ctl("probe 203.0.113.7:10000 --client 192.0.2.7:4000 --timeout 300ms");
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("t4 takes what is routed to this host"),
        "{said}"
    );
}
