//! What the relay owes the routing scheme, for UDP.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use mmproxyctl::model::{Mark, PortPolicy, UdpHeader::Every, UdpHeader::First};
use mmproxyctl::relay::counters::Refusal;
use mmproxyctl::relay::header::{Transport, V2};
use mmproxyctl::relay::udp::counters::Ended;

use super::lab::{Proxy, Relay, Service, addr, announce, settings, sockets_to, wait_sockets_to};
use crate::relay::lab::{Lab, MARK, install_pathway};
use crate::support::net::Host;

/// The pathway's rule captures whatever is marked and comes from the host's own address.
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
    let service = Service::echo(&container, "172.18.0.2:0");
    let relay = Relay::start(&lab.wks, settings(Every, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    proxy.exchange("10.0.0.1:4000", b"hello");
    assert_eq!(service.peer_of(b"hello"), addr("10.0.0.1:4000"));
    let sockets = sockets_to(&lab.wks, service.addr);
    assert!(
        sockets.contains("10.0.0.1:4000") && !sockets.contains("fwmark"),
        "{sockets}"
    );
}

#[test]
fn addresses_that_are_no_client_are_refused() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(Every, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    let refused = [
        ("0.0.0.0:4000", Refusal::ClientUnspecified),
        ("[::]:4000", Refusal::ClientUnspecified),
        ("127.0.0.1:4000", Refusal::ClientLoopback),
        ("[::1]:4000", Refusal::ClientLoopback),
        ("[::ffff:127.0.0.1]:4000", Refusal::ClientLoopback),
        ("224.0.0.1:4000", Refusal::ClientMulticast),
        ("[ff02::1]:4000", Refusal::ClientMulticast),
        ("255.255.255.255:4000", Refusal::ClientBroadcast),
        // of eth0: only the kernel knows
        ("10.0.0.255:4000", Refusal::ClientBroadcast),
        ("[fe80::1]:4000", Refusal::ClientLinkLocal),
        ("[2001:db8::7]:4000", Refusal::FamilyNotServed),
    ];
    for (client, kind) in refused {
        let before = relay.totals().refused.of(kind);
        proxy.send(&[&announce(client), b"let me in"]);
        relay.wait(client, |totals| totals.refused.of(kind) == before + 1);
    }
    proxy.exchange("192.0.2.7:4000", b"hello");
    service.peer_of(b"hello");
    service.assert_nothing_more();
    assert_eq!(relay.totals().flows, 1);
    // also where the proxy has a flow of its own, over IPv6
    let v6 = Service::echo(&lab.wks, "[::1]:0");
    let relay = Relay::start_at(&lab.wks, "[fd00::1]:0", 1, settings(Every, &[v6.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    proxy.send(&[&V2::local().finish(), b"the proxy's own"]);
    assert_eq!(proxy.answer(), b"the proxy's own");
    v6.peer_of(b"the proxy's own");
    proxy.send(&[&announce("[::]:0"), b"nobody's"]);
    relay.wait("[::]:0", |totals| {
        totals.refused.of(Refusal::ClientUnspecified) == 1
    });
    v6.assert_nothing_more();
}

/// The same client through two ports of one proxy, and through two proxies, at the same time: everyone gets
/// what is for him, and the client's address is kept.
#[test]
fn one_client_on_several_ways_at_once() {
    for workers in [1, 3] {
        let lab = Lab::new();
        lab.vps.address("eth0", "10.0.0.3/24");
        let service = Service::echo(&lab.wks, "127.0.0.1:0");
        let relay = Relay::start_at(
            &lab.wks,
            "10.0.0.1:0",
            workers,
            settings(Every, &[service.addr]),
        );
        let ways = ["10.0.0.2:0", "10.0.0.2:0", "10.0.0.3:0"]
            .map(|from| Proxy::from(&lab.vps, addr(from), relay.addr));
        let mut ports = Vec::new();
        for round in 0..3 {
            for (number, way) in ways.iter().enumerate() {
                let payload = format!("way {number} in round {round}").into_bytes();
                way.send(&[&announce("192.0.2.7:4000"), &payload]);
                assert_eq!(way.answer(), payload);
                let peer = service.peer_of(&payload);
                assert_eq!(peer.ip(), addr("192.0.2.7:4000").ip());
                if round == 0 {
                    ports.push(peer.port());
                }
                assert_eq!(peer.port(), ports[number], "a way keeps its port");
            }
        }
        assert_eq!(ports[0], 4000);
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 3);
        assert_eq!(relay.totals().ports_given_up, 2);
        for way in &ways {
            way.assert_nothing_more();
        }
    }
}

/// Proxies forget a silent flow sooner than the relay does, and go on from another port.
#[test]
fn a_client_that_comes_back_through_another_port_keeps_its_own() {
    for (workers, header) in [(1, First), (4, First), (4, Every)] {
        let lab = Lab::new();
        let service = Service::echo(&lab.wks, "127.0.0.1:0");
        let relay = Relay::start_at(
            &lab.wks,
            "10.0.0.1:0",
            workers,
            settings(header, &[service.addr]),
        );
        let before: Vec<_> = (0..8).map(|_| Proxy::new(&lab.vps, relay.addr)).collect();
        for (number, proxy) in before.iter().enumerate() {
            proxy.exchange(&format!("192.0.2.{number}:4000"), b"before");
            service.peer_of(b"before");
        }
        std::thread::sleep(Duration::from_millis(2_100));
        for number in 0..8 {
            let proxy = Proxy::new(&lab.vps, relay.addr);
            let client = format!("192.0.2.{number}:4000");
            for _ in 0..2 {
                proxy.exchange(&client, b"after");
                assert_eq!(service.peer_of(b"after"), addr(&client));
            }
        }
        relay.wait("the flows", |totals| totals.flows == 8);
        let totals = relay.totals();
        assert_eq!(totals.ports_given_up, 0);
        assert_eq!(totals.ended.of(Ended::Moved), 8);
        for proxy in &before {
            proxy.assert_nothing_more();
        }
        wait_sockets_to(&lab.wks, service.addr, 8);
    }
}

/// The proxy has two addresses, and the same client talks to both of them, now and then.
#[test]
fn one_client_of_two_addresses_of_the_proxy() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(First, &[service.addr]));
    let client = addr("192.0.2.7:4000");
    let ways = ["198.51.100.1:53", "198.51.100.2:53"].map(|asked| {
        let header = V2::proxied(client, addr(asked), Transport::Datagram).finish();
        let proxy = Proxy::new(&lab.vps, relay.addr);
        proxy.send(&[&header, b"hello"]);
        assert_eq!(proxy.answer(), b"hello");
        // longer than any flow is kept from moving
        std::thread::sleep(Duration::from_millis(2_100));
        proxy
    });
    for way in &ways {
        way.send(&[b"no header"]);
        assert_eq!(way.answer(), b"no header");
    }
    let totals = relay.totals();
    assert_eq!((totals.flows, totals.ports_given_up), (2, 1));
    assert_eq!(totals.ended.of(Ended::Moved), 0);
}

/// Two relays with two marks, one target, one client.
#[test]
fn the_same_client_on_two_pathways() {
    let lab = Lab::new();
    install_pathway(&lab.wks, 124);
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let first = Relay::start(&lab.wks, settings(Every, &[service.addr]));
    let mut second = settings(Every, &[service.addr]);
    second.common.mark = Mark::new(124);
    let second = Relay::start(&lab.wks, second);
    let one = Proxy::new(&lab.vps, first.addr);
    let other = Proxy::new(&lab.vps, second.addr);
    one.exchange("192.0.2.7:4000", b"one");
    assert_eq!(service.peer_of(b"one"), addr("192.0.2.7:4000"));
    other.exchange("192.0.2.7:4000", b"other");
    let peer = service.peer_of(b"other");
    assert_eq!(peer.ip(), addr("192.0.2.7:4000").ip());
    assert_ne!(peer.port(), 4000);
    one.exchange("192.0.2.7:4000", b"the first goes on");
    assert_eq!(first.totals().ports_given_up, 0);
    assert_eq!(second.totals().ports_given_up, 1);
    let sockets = sockets_to(&lab.wks, service.addr);
    assert!(
        sockets.contains("fwmark:0x7b") && sockets.contains("fwmark:0x7c"),
        "{sockets}"
    );
}

/// A wildcard socket of the host has the client's port.
#[test]
fn a_client_port_that_is_taken_is_given_up() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let taken = lab.wks.enter(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    let port = taken.local_addr().unwrap().port();
    let relay = Relay::start(&lab.wks, settings(Every, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    for _ in 0..2 {
        proxy.exchange(&format!("192.0.2.7:{port}"), b"hello");
        let peer = service.peer_of(b"hello");
        assert_eq!(peer.ip(), addr("192.0.2.7:0").ip());
        assert_ne!(peer.port(), port);
    }
    assert_eq!(relay.totals().ports_given_up, 1);
}

#[test]
fn port_any_and_port_zero_leave_the_port_to_the_kernel() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let mut any = settings(Every, &[service.addr]);
    any.common.port = PortPolicy::Any;
    for (settings, client) in [
        (any, "192.0.2.7:4000"),
        (settings(Every, &[service.addr]), "192.0.2.7:0"),
    ] {
        let relay = Relay::start(&lab.wks, settings);
        let proxies = [(); 2].map(|()| Proxy::new(&lab.vps, relay.addr));
        for proxy in &proxies {
            proxy.exchange(client, b"hello");
            let peer = service.peer_of(b"hello");
            assert_eq!(peer.ip(), addr(client).ip());
            assert!(![0, 4000].contains(&peer.port()));
        }
        assert_eq!(relay.totals().ports_given_up, 0);
    }
}

/// Whoever asks one of several addresses of a wildcard listener is answered from that one.
#[test]
fn answers_leave_from_the_address_that_was_asked() {
    let lab = Lab::new();
    for address in ["10.0.0.5/24", "10.0.0.6/24", "fd00::5/64", "fd00::6/64"] {
        lab.wks.address("eth0", address);
    }
    let v4 = Service::echo(&lab.wks, "127.0.0.1:0");
    let v6 = Service::echo(&lab.wks, "[::1]:0");
    for (listen, asked) in [
        ("0.0.0.0:0", ["10.0.0.1", "10.0.0.5", "10.0.0.6"]),
        ("[::]:0", ["fd00::1", "fd00::5", "fd00::6"]),
    ] {
        let relay = Relay::start_at(&lab.wks, listen, 1, settings(Every, &[v4.addr, v6.addr]));
        // one port for all, so that nothing but the address asked tells them apart
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let any = Proxy::new(&lab.vps, (ip(asked[0]), relay.addr.port()).into());
        let from = any.addr();
        drop(any);
        for asked in asked {
            let relay = (ip(asked), relay.addr.port());
            let proxy = Proxy::from(&lab.vps, from, relay.into());
            for client in ["192.0.2.7:4000", "[2001:db8::7]:4000"] {
                proxy.exchange(client, asked.as_bytes());
            }
        }
        assert_eq!(relay.totals().flows, 6);
    }
}

/// A service bound to the wildcard address answers from elsewhere, past the relay: what the warning goes by.
#[test]
fn a_wildcard_service_is_seen() {
    let lab = Lab::new();
    for (bound, target, warned) in [
        ("0.0.0.0:0", "127.0.0.1", true),
        ("[::]:0", "127.0.0.1", true),
        ("[::]:0", "::1", true),
        ("127.0.0.1:0", "127.0.0.1", false),
        ("[::1]:0", "::1", false),
        ("[::1]:0", "127.0.0.1", false),
    ] {
        let service = Service::echo(&lab.wks, bound);
        let target = mmproxyctl::model::TargetAddr::new(
            (target.parse::<IpAddr>().unwrap(), service.addr.port()).into(),
        );
        let bound_to = lab
            .wks
            .enter(|| mmproxyctl::socket::udp::udp_bound(target).unwrap());
        assert_eq!(
            bound_to == mmproxyctl::socket::udp::Bound::Wildcard,
            warned,
            "{bound} {target}: {bound_to:?}"
        );
    }
}
