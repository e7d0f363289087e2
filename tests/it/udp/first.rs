//! A header on the first datagram of a flow: Cloudflare Spectrum v2, Traefik, frp.

use std::net::UdpSocket;
use std::time::Duration;

use mmproxyctl::model::UdpHeader::First;
use mmproxyctl::relay::counters::{ConnectFailure, Refusal};
use mmproxyctl::relay::header::{V2, encode_v1};
use mmproxyctl::relay::udp::Settings;
use mmproxyctl::relay::udp::counters::{Dropped, Ended};

use super::lab::{Proxy, Relay, Service, addr, announce, settings, wait_sockets_to};
use crate::relay::lab::Lab;
use crate::support::malformed;
use crate::support::net::wait_for;

#[test]
fn the_header_comes_alone_or_with_the_first_payload() {
    let lab = Lab::new();
    let v4 = Service::echo(&lab.wks, "127.0.0.1:0");
    let v6 = Service::echo(&lab.wks, "[::1]:0");
    let relay = Relay::start(&lab.wks, settings(First, &[v4.addr, v6.addr]));
    let alone = Proxy::new(&lab.vps, relay.addr);
    alone.send(&[&announce("192.0.2.7:1234")]);
    let together = Proxy::new(&lab.vps, relay.addr);
    together.send(&[&announce("[2001:db8::7]:1234"), b"the first"]);
    assert_eq!(together.answer(), b"the first");
    assert_eq!(v6.peer_of(b"the first"), addr("[2001:db8::7]:1234"));
    for round in 0..3 {
        for (proxy, service, client) in [
            (&alone, &v4, "192.0.2.7:1234"),
            (&together, &v6, "[2001:db8::7]:1234"),
        ] {
            let payload = format!("{client} in round {round}").into_bytes();
            proxy.send(&[&payload]);
            assert_eq!(proxy.answer(), payload);
            assert_eq!(service.peer_of(&payload), addr(client));
        }
    }
    assert_eq!(relay.totals().flows_opened, 2);
    assert_eq!(relay.totals().dropped.all(), 0);
    v4.assert_nothing_more();
}

#[test]
fn a_flow_without_payload_takes_no_socket() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(First, &[service.addr]));
    let proxies = [(); 20].map(|()| Proxy::new(&lab.vps, relay.addr));
    for (number, proxy) in proxies.iter().enumerate() {
        proxy.send(&[&announce(&format!("192.0.2.7:{}", 4000 + number))]);
    }
    relay.wait("the flows", |totals| totals.flows == 20);
    wait_sockets_to(&lab.wks, service.addr, 0);
}

#[test]
fn without_a_flow_it_is_dropped_and_counted() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(First, &[service.addr]));
    let known = Proxy::new(&lab.vps, relay.addr);
    known.exchange("192.0.2.7:1234", b"hello");
    service.peer_of(b"hello");
    let unknown = Proxy::new(&lab.vps, relay.addr);
    unknown.send(&[b"whose is this?"]);
    relay.wait_dropped(Dropped::NoFlow, 1);
    service.assert_nothing_more();
    known.assert_nothing_more();
}

#[test]
fn a_new_header_replaces_the_client() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(First, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    for client in ["192.0.2.7:1234", "192.0.2.8:1234", "192.0.2.9:1234"] {
        proxy.exchange(client, b"with a header");
        assert_eq!(service.peer_of(b"with a header"), addr(client));
        proxy.send(&[b"bare"]);
        assert_eq!(proxy.answer(), b"bare");
        assert_eq!(service.peer_of(b"bare"), addr(client));
    }
    // the same header again changes nothing
    proxy.exchange("192.0.2.9:1234", b"again");
    let local = V2::local().finish();
    proxy.send(&[&local, b"the proxy's own"]);
    assert_eq!(proxy.answer(), b"the proxy's own");
    service.peer_of(b"again");
    assert_eq!(service.peer_of(b"the proxy's own"), proxy.addr());
    let totals = relay.totals();
    assert_eq!(totals.flows, 1);
    assert_eq!(totals.flows_opened, 4);
    assert_eq!(totals.ended.of(Ended::Replaced), 3);
    assert_eq!(totals.ports_given_up, 0);
}

/// What a client's payload may begin with: it is payload, and what is half a header is not.
#[test]
fn payload_that_begins_like_a_header() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(First, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    let header = announce("192.0.2.7:1234");
    proxy.send(&[&header]);
    for payload in [&b"\r\n\r\n"[..], &header[..11], b"PROXY is a word", b"\0"] {
        proxy.send(&[payload]);
        assert_eq!(proxy.answer(), payload);
        service.peer_of(payload);
    }
    for length in 12..header.len() {
        proxy.send(&[&header[..length]]);
    }
    proxy.send(&[
        &encode_v1(addr("192.0.2.9:1"), addr("198.51.100.1:53")),
        b"x",
    ]);
    let mut spoiled = 0;
    for case in malformed::all() {
        if case.bytes.starts_with(&header[..12]) {
            proxy.send(&[&case.bytes]);
            spoiled += 1;
        }
    }
    assert!(spoiled > 10);
    proxy.send(&[b"the end"]);
    assert_eq!(proxy.answer(), b"the end");
    assert_eq!(service.peer_of(b"the end"), addr("192.0.2.7:1234"));
    let totals = relay.totals();
    assert_eq!(totals.dropped.of(Dropped::Version1), 1);
    assert_eq!(
        totals.refused.all() as usize,
        header.len() - 12 + spoiled,
        "{totals:#?}"
    );
}

/// A service that restarts: who the client is is known only from the flow's first datagram.
#[test]
fn the_flow_outlives_a_service_that_is_down() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let target = service.addr;
    let relay = Relay::start(&lab.wks, settings(First, &[target]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    proxy.exchange("192.0.2.7:1234", b"hello");
    drop(service);
    relay.wait("the ICMP", |totals| {
        proxy.send(&[b"anybody?"]);
        totals.open_failed.of(ConnectFailure::ServiceDown) > 0
    });
    wait_sockets_to(&lab.wks, target, 0);
    assert_eq!(relay.totals().flows, 1);
    let back = Service::echo(&lab.wks, &target.to_string());
    proxy.send(&[b"and now?"]);
    assert_eq!(proxy.answer(), b"and now?");
    assert_eq!(back.peer_of(b"and now?"), addr("192.0.2.7:1234"));
    assert_eq!(relay.totals().flows_opened, 1);
}

/// What was sent before a new header is the old client's, also where all of it is read at once.
#[test]
fn what_comes_before_a_new_header_is_not_lost() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let listen = lab.wks.enter(|| UdpSocket::bind("10.0.0.1:7000").unwrap());
    let proxy = Proxy::new(&lab.vps, addr("10.0.0.1:7000"));
    for client in ["192.0.2.7:1234", "192.0.2.8:1234", "192.0.2.9:1234"] {
        proxy.send(&[&announce(client)]);
        proxy.send(&[client.as_bytes()]);
    }
    wait_for("the datagrams in the listener's queue", || {
        let queued = lab.wks.run("ss -Huan sport = :7000");
        let queued = queued.split_whitespace().nth(1).map(str::parse::<u64>);
        // the kernel's unit of accounting for a small datagram
        matches!(queued, Some(Ok(bytes)) if bytes >= 6 * 768)
    });
    let relay = Relay::start_on(&lab.wks, vec![listen], settings(First, &[service.addr]));
    for client in ["192.0.2.7:1234", "192.0.2.8:1234", "192.0.2.9:1234"] {
        assert_eq!(service.peer_of(client.as_bytes()), addr(client));
    }
    assert_eq!(relay.totals().dropped.all(), 0);
}

#[test]
fn a_silent_flow_ends_and_the_proxy_has_to_say_who_it_is() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let settings = Settings {
        idle_timeout: Duration::from_millis(100),
        ..settings(First, &[service.addr])
    };
    let relay = Relay::start(&lab.wks, settings);
    let proxy = Proxy::new(&lab.vps, relay.addr);
    proxy.exchange("192.0.2.7:1234", b"hello");
    relay.wait("the end", |totals| totals.flows == 0);
    assert_eq!(relay.totals().ended.of(Ended::Idle), 1);
    assert_eq!(relay.totals().flows_unanswered, 0);
    proxy.send(&[b"too late"]);
    relay.wait_dropped(Dropped::NoFlow, 1);
    proxy.exchange("192.0.2.7:1234", b"hello again");
    service.peer_of(b"hello");
    assert_eq!(service.peer_of(b"hello again"), addr("192.0.2.7:1234"));
}

#[test]
fn a_client_that_is_refused_gets_no_flow() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(First, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    proxy.exchange("192.0.2.7:1234", b"hello");
    service.peer_of(b"hello");
    // its flow must not fall to who was there before
    proxy.send(&[&announce("127.0.0.1:1234"), b"I am root"]);
    proxy.send(&[b"still root"]);
    relay.wait_dropped(Dropped::NoFlow, 1);
    let totals = relay.totals();
    assert_eq!(totals.refused.of(Refusal::ClientLoopback), 1);
    assert_eq!(totals.flows, 0);
    service.assert_nothing_more();
}
