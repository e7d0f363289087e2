//! Simple Proxy Protocol, byte for byte as Spectrum sends and expects it.

use mmproxyctl::model::UdpHeader::Spp;
use mmproxyctl::relay::counters::Refusal;
use mmproxyctl::relay::header::encode_v1;
use mmproxyctl::relay::udp::counters::Dropped;

use super::lab::{Proxy, Relay, Service, addr, announce, settings};
use crate::relay::lab::Lab;

/// 192.0.2.7:56324 that asked 198.51.100.1:443, written out from the description of the format.
const V4: [u8; 38] = [
    0x56, 0xec, //
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 7, //
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 198, 51, 100, 1, //
    0xdc, 0x04, 0x01, 0xbb,
];

/// [2001:db8::7]:56324 that asked [2001:db8:1::1]:443.
const V6: [u8; 38] = [
    0x56, 0xec, //
    0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, //
    0x20, 0x01, 0x0d, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, //
    0xdc, 0x04, 0x01, 0xbb,
];

#[test]
fn byte_for_byte_both_ways() {
    let lab = Lab::new();
    let v4 = Service::echo(&lab.wks, "127.0.0.1:0");
    let v6 = Service::echo(&lab.wks, "[::1]:0");
    let relay = Relay::start(&lab.wks, settings(Spp, &[v4.addr, v6.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    for _ in 0..3 {
        for (header, service, client) in [
            (&V4, &v4, "192.0.2.7:56324"),
            (&V6, &v6, "[2001:db8::7]:56324"),
        ] {
            for payload in [&b"x"[..], &[0x56; 1400], b"\r\n\r\n\0\r\nQUIT\n"] {
                proxy.send(&[header, payload]);
                assert_eq!(proxy.answer(), [header, payload].concat());
                assert_eq!(service.peer_of(payload), addr(client));
            }
        }
    }
    assert_eq!(relay.totals().flows_opened, 2);
}

/// The answer names the address that the client asked, also where one client asks two.
#[test]
fn one_client_of_two_addresses() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(Spp, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    let mut other = V4;
    other[33] = 2;
    let mut expected = Vec::new();
    for number in 0..10u8 {
        for header in [&V4, &other] {
            proxy.send(&[header, &[number]]);
            expected.push([&header[..], &[number]].concat());
        }
    }
    let mut answers: Vec<_> = expected.iter().map(|_| proxy.answer()).collect();
    answers.sort();
    expected.sort();
    assert_eq!(answers, expected);
}

/// A burst of answers leaves as few messages; each has its header.
#[test]
fn many_answers_to_one_datagram() {
    let lab = Lab::new();
    let service = Service::start(&lab.wks, "127.0.0.1:0", |socket, seen| {
        for number in 0..100u8 {
            let size = if number % 10 == 9 { 7 } else { 500 };
            let _ = socket.send_to(&vec![number; size], seen.peer);
        }
    });
    let relay = Relay::start(&lab.wks, settings(Spp, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    proxy.send(&[&V4, b"go"]);
    for number in 0..100u8 {
        let size = if number % 10 == 9 { 7 } else { 500 };
        assert_eq!(proxy.answer(), [&V4[..], &vec![number; size]].concat());
    }
}

#[test]
fn an_empty_answer_is_a_header() {
    let lab = Lab::new();
    let service = Service::start(&lab.wks, "127.0.0.1:0", |socket, seen| {
        let _ = socket.send_to(&[], seen.peer);
    });
    let relay = Relay::start(&lab.wks, settings(Spp, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    proxy.send(&[&V4, b"say nothing"]);
    assert_eq!(proxy.answer(), V4);
}

#[test]
fn what_has_no_such_header_never_reaches_the_service() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(Spp, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    for length in 0..=V4.len() {
        proxy.send(&[&V4[..length]]);
    }
    proxy.send(&[&announce("192.0.2.7:1234"), b"a v2 header"]);
    let version1 = encode_v1(addr("192.0.2.7:1"), addr("198.51.100.1:53"));
    proxy.send(&[&version1, b"a v1 header"]);
    let mut wrong = V4;
    wrong[0] = 0;
    proxy.send(&[&wrong, b"another magic"]);
    proxy.send(&[&V4, b"right"]);
    assert_eq!(proxy.answer(), [&V4[..], b"right"].concat());
    service.peer_of(b"right");
    service.assert_nothing_more();
    let totals = relay.totals();
    assert_eq!(totals.dropped.of(Dropped::Empty), 1);
    assert_eq!(totals.dropped.of(Dropped::NoPayload), 1);
    assert_eq!(totals.refused.of(Refusal::HeaderTruncated), 37);
    assert_eq!(totals.dropped.of(Dropped::Version1), 1);
    assert_eq!(totals.refused.of(Refusal::NoHeader), 2);
}
