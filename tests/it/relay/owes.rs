//! What the relay owes the routing scheme, point by point.

use std::io::Write;

use mmproxyctl::model::{ClientAddr, Mark, PortPolicy, TargetAddr};
use mmproxyctl::relay::counters::Refusal;
use mmproxyctl::relay::header::{V1_UNKNOWN, V2};
use mmproxyctl::relay::settings::Settings;
use mmproxyctl::socket::{self, Spoof, SpoofError};

use super::lab::{
    Lab, MARK, Relay, Service, announce, announce_v1, assert_closed, exchange, install_pathway,
    settings, sockets_to,
};
use crate::support::net::{Host, wait_for};

const MARKED: &str = "fwmark:0x7b";

#[test]
fn the_service_sees_the_client_over_both_families() {
    let lab = Lab::new();
    let v4 = Service::echo(&lab.wks, "127.0.0.1:0");
    let v6 = Service::echo(&lab.wks, "[::1]:0");
    let relay = Relay::start(&lab.wks, settings(&[v4.addr, v6.addr]));
    for header in [announce("192.0.2.7:1234"), announce_v1("192.0.2.7:1235")] {
        let mut stream = lab.dial(relay.addr);
        stream.write_all(&header).unwrap();
        exchange(&mut stream, b"hello");
    }
    assert_eq!(v4.peer(), "192.0.2.7:1234".parse().unwrap());
    assert_eq!(v4.peer(), "192.0.2.7:1235".parse().unwrap());
    let mut stream = lab.connect(&relay, "[2001:db8::7]:1234");
    exchange(&mut stream, b"hello");
    assert_eq!(v6.peer(), "[2001:db8::7]:1234".parse().unwrap());
    assert!(sockets_to(&lab.wks, v6.addr).contains(MARKED));
}

/// Point 1. The pathway's rule captures whatever is marked and comes from the host's own address.
#[test]
fn a_client_on_this_host_is_not_marked() {
    let lab = Lab::new();
    let container = Host::new("container");
    lab.wks.link(
        "br0",
        &["172.18.0.1/24"],
        &container,
        "eth0",
        &["172.18.0.2/24"],
    );
    container.ip("route add default via 172.18.0.1");
    lab.wks.ip(&format!(
        "rule add priority 100 from 10.0.0.1 fwmark {MARK}/0xff lookup {MARK}"
    ));
    let captured = lab
        .wks
        .ip(&format!("route get 172.18.0.2 from 10.0.0.1 mark {MARK}"));
    assert!(
        captured.contains("dev lo"),
        "with the mark the packets would never leave: {captured}"
    );
    let service = Service::echo(&container, "172.18.0.2:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.connect(&relay, "10.0.0.1:4000");
    exchange(&mut stream, b"hello");
    assert_eq!(service.peer(), "10.0.0.1:4000".parse().unwrap());
    let sockets = sockets_to(&lab.wks, service.addr);
    assert!(
        sockets.contains("10.0.0.1:4000") && !sockets.contains("fwmark"),
        "{sockets}"
    );
}

/// Point 1 while the relay runs: an address comes and goes, and a sysctl makes every bind succeed.
#[test]
fn whether_a_client_is_local_is_asked_per_connection() {
    let lab = Lab::new();
    let service4 = Service::echo(&lab.wks, "127.0.0.1:0");
    let service6 = Service::echo(&lab.wks, "[::1]:0");
    let relay = Relay::start(&lab.wks, settings(&[service4.addr, service6.addr]));
    let marked = |client: &str| {
        let service = match client.starts_with('[') {
            true => &service6,
            false => &service4,
        };
        let mut stream = lab.connect(&relay, client);
        exchange(&mut stream, b"hello");
        assert_eq!(service.peer(), client.parse().unwrap());
        let sockets = sockets_to(&lab.wks, service.addr);
        let own = sockets.lines().find(|line| line.contains(client));
        own.expect("the spoofed socket").contains(MARKED)
    };
    assert!(marked("10.0.0.7:4000"));
    lab.wks.address("eth0", "10.0.0.7/24");
    assert!(!marked("10.0.0.7:4001"));
    lab.wks.ip("address del 10.0.0.7/24 dev eth0");
    assert!(marked("10.0.0.7:4002"));
    assert!(marked("[fd00::7]:4000"));
    lab.wks.address("eth0", "fd00::7/64");
    assert!(!marked("[fd00::7]:4001"));
    lab.wks.sysctl("net.ipv6.ip_nonlocal_bind", "1");
    assert!(!marked("[fd00::7]:4002"));
    lab.wks.ip("address del fd00::7/64 dev eth0");
    assert!(marked("[fd00::7]:4003"));
    assert!(marked("[2001:db8::9]:4003"), "no route to it");
    lab.wks.sysctl("net.ipv4.ip_nonlocal_bind", "1");
    assert!(marked("10.0.0.7:4003"));
    assert!(marked("192.0.2.9:4003"), "an address nobody has a route to");
    assert!(!marked("10.0.0.1:4003"));
    lab.wks.address("eth0", "10.0.0.7/24");
    assert!(!marked("10.0.0.7:4004"), "a secondary address");
}

/// Points 2 and 3: addresses that no client has.
#[test]
fn impossible_and_trusted_clients_are_refused() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let service6 = Service::echo(&lab.wks, "[::1]:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr, service6.addr]));
    for (client, kind, times) in [
        ("0.0.0.0:4000", Refusal::ClientUnspecified, 1),
        ("[::]:4000", Refusal::ClientUnspecified, 2),
        ("[::ffff:0.0.0.0]:4000", Refusal::ClientUnspecified, 3),
        ("224.0.0.1:4000", Refusal::ClientMulticast, 1),
        ("[ff02::1]:4000", Refusal::ClientMulticast, 2),
        ("255.255.255.255:4000", Refusal::ClientBroadcast, 1),
        ("10.0.0.255:4000", Refusal::ClientBroadcast, 2),
        ("127.0.0.1:4000", Refusal::ClientLoopback, 1),
        ("127.8.8.8:4000", Refusal::ClientLoopback, 2),
        ("[::1]:4000", Refusal::ClientLoopback, 3),
        ("[::ffff:127.0.0.1]:4000", Refusal::ClientLoopback, 4),
        ("[fe80::1]:4000", Refusal::ClientLinkLocal, 1),
    ] {
        let mut stream = lab.connect(&relay, client);
        let _ = stream.write_all(b"let me in");
        assert_closed(&mut stream, client);
        relay.wait_refused(kind, times);
    }
    service.assert_only(&lab, &relay, "192.0.2.1:4000");
    service6.assert_only(&lab, &relay, "[2001:db8::1]:4000");
}

/// Point 2, the last line of defence: whatever gets past the checks, the source must be the client.
#[test]
fn a_replaced_source_address_is_noticed() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    for client in ["0.0.0.0:4000", "224.0.0.1:4000"] {
        let outcome = lab.wks.enter(|| {
            socket::spoofed_tcp(&Spoof {
                client: ClientAddr::new(client.parse().unwrap()),
                target: TargetAddr::new(service.addr),
                mark: Mark::new(MARK),
                port: PortPolicy::Keep,
            })
        });
        match outcome {
            Err(SpoofError::SourceReplaced { wanted, got }) => {
                assert_ne!(wanted, got, "{client}");
            }
            other => panic!("{client}: {other:?}"),
        }
    }
}

/// Point 3: the family comes from the address after unmapping.
#[test]
fn mapped_clients_are_ipv4_and_ipv6_needs_its_own_target() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.dial(relay.addr);
    stream
        .write_all(b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:198.51.100.1 4000 443\r\n")
        .unwrap();
    exchange(&mut stream, b"hello");
    assert_eq!(service.peer(), "192.0.2.7:4000".parse().unwrap());
    let mut stream = lab.connect(&relay, "[2001:db8::7]:4000");
    assert_closed(&mut stream, "an IPv6 client without an IPv6 target");
    relay.wait_refused(Refusal::FamilyNotServed, 1);
    service.assert_only(&lab, &relay, "192.0.2.7:4001");
}

/// Point 4, connect: the very same tuple is alive through another pathway.
#[test]
fn the_same_client_over_two_pathways_keeps_its_address() {
    let lab = Lab::new();
    install_pathway(&lab.wks, 124);
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let first = Relay::start(&lab.wks, settings(&[service.addr]));
    let second = Relay::start(
        &lab.wks,
        Settings {
            mark: Mark::new(124),
            ..settings(&[service.addr])
        },
    );
    let mut one = lab.connect(&first, "192.0.2.7:4000");
    exchange(&mut one, b"hello");
    assert_eq!(service.peer(), "192.0.2.7:4000".parse().unwrap());
    let mut other = lab.connect(&second, "192.0.2.7:4000");
    exchange(&mut other, b"hello");
    let peer = service.peer();
    assert_eq!(peer.ip().to_string(), "192.0.2.7");
    assert_ne!(peer.port(), 4000);
    exchange(&mut one, b"the first goes on");
    assert_eq!(first.totals().ports_given_up, 0);
    assert_eq!(second.totals().ports_given_up, 1);
}

/// Point 4, bind: a wildcard listener of the host has the client's port.
#[test]
fn a_client_port_that_a_listener_has_is_given_up() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let taken = Service::echo(&lab.wks, "0.0.0.0:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let client = format!("192.0.2.7:{}", taken.addr.port());
    let mut stream = lab.connect(&relay, &client);
    exchange(&mut stream, b"hello");
    let peer = service.peer();
    assert_eq!(peer.ip().to_string(), "192.0.2.7");
    assert_ne!(peer.port(), taken.addr.port());
    assert_eq!(relay.totals().ports_given_up, 1);
}

/// Point 6: a client that reconnects at once with the same port finds its tuple in TIME_WAIT here.
#[test]
fn the_same_tuple_again_at_once() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    for round in 1..=3 {
        let mut stream = lab.connect(&relay, "192.0.2.7:4000");
        exchange(&mut stream, b"hello");
        assert_eq!(service.peer(), "192.0.2.7:4000".parse().unwrap());
        drop(stream);
        relay.wait("closed", |totals| totals.active == 0);
        wait_for("the spoofed tuple in TIME_WAIT", || {
            let sockets = lab.wks.run(&format!(
                "ss -Htn state time-wait dport = :{}",
                service.addr.port()
            ));
            sockets.contains("192.0.2.7:4000")
        });
        assert_eq!(relay.totals().relayed, round);
    }
    assert_eq!(relay.totals().ports_given_up, 0);
}

/// LOCAL, UNKNOWN and UNSPEC: the proxy itself is the client, over either family.
#[test]
fn without_a_client_the_proxy_is_the_client() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let service6 = Service::echo(&lab.wks, "[::1]:0");
    let targets = [service.addr, service6.addr];
    let relay = Relay::start(&lab.wks, settings(&targets));
    let relay6 = Relay::start_at(&lab.wks, "[fd00::1]:0", 1, settings(&targets));
    for header in [
        V1_UNKNOWN.to_vec(),
        b"PROXY UNKNOWN 192.0.2.9 192.0.2.8 1 2\r\n".to_vec(),
        V2::local().finish(),
        V2::unspec().finish(),
    ] {
        for (relay, service) in [(&relay, &service), (&relay6, &service6)] {
            let mut stream = lab.dial(relay.addr);
            stream.write_all(&header).unwrap();
            exchange(&mut stream, b"hello");
            assert_eq!(service.peer(), stream.local_addr().unwrap());
        }
    }
}

/// A header without a port: the kernel chooses one, and no port counts as given up.
#[test]
fn port_zero_is_no_port() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.connect(&relay, "192.0.2.7:0");
    exchange(&mut stream, b"hello");
    let peer = service.peer();
    assert_eq!(peer.ip().to_string(), "192.0.2.7");
    assert_ne!(peer.port(), 0);
    assert_eq!(relay.totals().ports_given_up, 0);
}
