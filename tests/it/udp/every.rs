//! A header on every datagram.

use mmproxyctl::model::UdpHeader::Every;
use mmproxyctl::relay::counters::Refusal;
use mmproxyctl::relay::header::{Transport, V2, encode_v1};
use mmproxyctl::relay::udp::counters::Dropped;

use super::lab::{Proxy, Relay, Service, addr, announce, settings, sockets_to};
use crate::relay::lab::Lab;
use crate::support::malformed;

#[test]
fn the_service_sees_the_client_over_both_families() {
    let lab = Lab::new();
    let v4 = Service::echo(&lab.wks, "127.0.0.1:0");
    let v6 = Service::echo(&lab.wks, "[::1]:0");
    let targets = [v4.addr, v6.addr];
    let relay4 = Relay::start(&lab.wks, settings(Every, &targets));
    let relay6 = Relay::start_at(&lab.wks, "[fd00::1]:0", 1, settings(Every, &targets));
    for relay in [&relay4, &relay6] {
        let proxy = Proxy::new(&lab.vps, relay.addr);
        proxy.exchange("192.0.2.7:1234", b"over IPv4");
        proxy.exchange("[2001:db8::7]:1234", b"over IPv6");
        proxy.exchange("[::ffff:192.0.2.8]:1235", b"mapped");
        if relay.addr.is_ipv4() {
            assert_eq!(v4.peer_of(b"over IPv4"), addr("192.0.2.7:1234"));
            assert_eq!(v6.peer_of(b"over IPv6"), addr("[2001:db8::7]:1234"));
            assert_eq!(v4.peer_of(b"mapped"), addr("192.0.2.8:1235"));
            let marked = sockets_to(&lab.wks, v6.addr);
            assert!(marked.contains("fwmark:0x7b"), "{marked}");
        }
    }
}

/// What peers get wrong: one proxy socket, many clients, their datagrams and answers interleaved.
#[test]
fn many_clients_behind_one_proxy_port() {
    const CLIENTS: u8 = 200;
    let lab = Lab::new();
    let service = Service::start(&lab.wks, "127.0.0.1:0", |socket, seen| {
        let who = format!("{} ", seen.peer).into_bytes();
        let _ = socket.send_to(&[who, seen.bytes.clone()].concat(), seen.peer);
    });
    let relay = Relay::start(&lab.wks, settings(Every, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    for round in 0..3 {
        let mut expected = Vec::new();
        for client in 0..CLIENTS {
            let client = format!("198.18.0.{client}:{}", 4000 + u16::from(client));
            let payload = format!("{client} in round {round}").into_bytes();
            proxy.send(&[&announce(&client), &payload]);
            expected.push([format!("{client} ").into_bytes(), payload].concat());
        }
        let mut answers: Vec<_> = expected.iter().map(|_| proxy.answer()).collect();
        answers.sort();
        expected.sort();
        assert_eq!(answers, expected);
    }
    let totals = relay.totals();
    assert_eq!(totals.flows_opened, u64::from(CLIENTS));
    assert_eq!(totals.datagrams_to_target, 3 * u64::from(CLIENTS));
    assert_eq!(totals.datagrams_to_client, 3 * u64::from(CLIENTS));
    assert_eq!(totals.dropped.all() + totals.refused.all(), 0);
}

#[test]
fn each_proxy_port_gets_its_own_answers() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(Every, &[service.addr]));
    let proxies = [(); 4].map(|()| Proxy::new(&lab.vps, relay.addr));
    for (number, proxy) in proxies.iter().enumerate() {
        for client in ["192.0.2.7:1234", "192.0.2.8:1234"] {
            let payload = format!("{client} by {number}").into_bytes();
            proxy.send(&[&announce(client), &payload]);
        }
    }
    for (number, proxy) in proxies.iter().enumerate() {
        let mut answers = [proxy.answer(), proxy.answer()];
        answers.sort();
        for (client, answer) in ["192.0.2.7:1234", "192.0.2.8:1234"].iter().zip(answers) {
            assert_eq!(answer, format!("{client} by {number}").into_bytes());
        }
        proxy.assert_nothing_more();
    }
}

/// LOCAL and UNSPEC: the proxy itself is the client, over either family.
#[test]
fn without_a_client_the_proxy_is_the_client() {
    let lab = Lab::new();
    let v4 = Service::echo(&lab.wks, "127.0.0.1:0");
    let v6 = Service::echo(&lab.wks, "[::1]:0");
    let targets = [v4.addr, v6.addr];
    let relay4 = Relay::start(&lab.wks, settings(Every, &targets));
    let relay6 = Relay::start_at(&lab.wks, "[fd00::1]:0", 1, settings(Every, &targets));
    for header in [V2::local().finish(), V2::unspec().finish()] {
        for (relay, service) in [(&relay4, &v4), (&relay6, &v6)] {
            let proxy = Proxy::new(&lab.vps, relay.addr);
            proxy.send(&[&header, b"are you there?"]);
            assert_eq!(proxy.answer(), b"are you there?");
            assert_eq!(service.peer_of(b"are you there?"), proxy.addr());
        }
    }
}

/// dnsdist asks over UDP what it was asked over TCP or HTTPS, and says so in the header.
#[test]
fn a_client_that_came_over_tcp() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(Every, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    let header = V2::proxied(
        addr("192.0.2.7:50000"),
        addr("198.51.100.1:443"),
        Transport::Stream,
    );
    proxy.send(&[&header.finish(), b"query"]);
    assert_eq!(proxy.answer(), b"query");
    assert_eq!(service.peer_of(b"query"), addr("192.0.2.7:50000"));
}

#[test]
fn what_is_no_datagram_with_a_header_never_reaches_the_service() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(Every, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    let header = announce("192.0.2.7:1234");
    proxy.send(&[]);
    proxy.send(&[&header]);
    proxy.send(&[
        &encode_v1(addr("192.0.2.7:1"), addr("198.51.100.1:53")),
        b"x",
    ]);
    for length in 1..header.len() {
        proxy.send(&[&header[..length]]);
    }
    proxy.send(&[b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x01"]);
    proxy.send(&[&[0; 65_507]]);
    let mut oversized = header.clone();
    oversized[14..16].copy_from_slice(&[0xff, 0xff]);
    proxy.send(&[&oversized, &[0; 4096]]);
    let malformed = malformed::all();
    for case in &malformed {
        proxy.send(&[&case.bytes]);
    }
    proxy.exchange("192.0.2.7:1234", b"and this one does");
    service.peer_of(b"and this one does");
    service.assert_nothing_more();
    proxy.assert_nothing_more();
    let totals = relay.totals();
    assert_eq!(totals.flows_opened, 1);
    assert_eq!(totals.dropped.of(Dropped::Empty), 1);
    assert_eq!(totals.dropped.of(Dropped::NoPayload), 1);
    let version1 = malformed.iter();
    let version1 = version1.filter(|case| case.bytes.starts_with(b"PROXY "));
    let version1 = 1 + version1.count() as u64;
    assert_eq!(totals.dropped.of(Dropped::Version1), version1);
    let cut = totals.refused.of(Refusal::HeaderTruncated);
    assert_eq!(cut, header.len() as u64 - 1);
    let bad = 3 + header.len() - 1 + 3 + malformed.len();
    let counted = totals.refused.all() + totals.dropped.all();
    assert_eq!(counted, bad as u64, "{totals:#?}");
}

#[test]
fn a_proxy_that_is_not_allowed() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let mut settings = settings(Every, &[service.addr]);
    settings.common.allow = crate::relay::lab::allow(&["10.0.0.2"]);
    let relay = Relay::start(&lab.wks, settings);
    lab.vps.address("eth0", "10.0.0.3/24");
    let stranger = Proxy::from(&lab.vps, addr("10.0.0.3:0"), relay.addr);
    stranger.send(&[&announce("192.0.2.7:1234"), b"let me in"]);
    relay.wait("the refusal", |totals| {
        totals.refused.of(Refusal::ProxyNotAllowed) == 1
    });
    let proxy = Proxy::from(&lab.vps, addr("10.0.0.2:0"), relay.addr);
    proxy.exchange("192.0.2.7:1234", b"hello");
    service.peer_of(b"hello");
    service.assert_nothing_more();
    stranger.assert_nothing_more();
}
