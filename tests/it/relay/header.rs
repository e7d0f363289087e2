//! Headers on the wire: split, slow, missing, malformed, from a stranger.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mmproxyctl::relay::counters::Refusal;
use mmproxyctl::relay::header::{Transport, V2};
use mmproxyctl::relay::settings::Settings;

use super::lab::{
    Lab, Relay, Service, allow, announce, announce_v1, assert_closed, exchange, reset, settings,
};
use crate::support::malformed;

/// A header and the first payload, cut in two at every byte; the second half waits for the first.
#[test]
fn a_header_split_at_every_byte() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut port = 4000;
    for version in [announce_v1, announce] {
        let length = version("192.0.2.7:4000").len();
        for cut in 1..=length + 1 {
            port += 1;
            let client = format!("192.0.2.7:{port}");
            let header = version(&client);
            let bytes = [header.as_slice(), b"payload"].concat();
            let mut stream = lab.dial(relay.addr);
            stream.write_all(&bytes[..cut]).unwrap();
            if cut < length {
                relay.wait("the first part", |totals| totals.waiting == 1);
            } else {
                assert_eq!(service.peer(), client.parse().unwrap());
            }
            stream.write_all(&bytes[cut..]).unwrap();
            if cut < length {
                assert_eq!(service.peer(), client.parse().unwrap());
            }
            let mut answer = [0; 7];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"payload", "cut at {cut}");
            reset(stream);
            relay.wait("closed", |totals| totals.active == 0);
        }
    }
    assert_eq!(relay.totals().refused.all(), 0);
}

/// One byte at a time, each seen on its own.
#[test]
fn a_header_byte_by_byte() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.dial(relay.addr);
    for byte in announce("192.0.2.7:4000") {
        stream.write_all(&[byte]).unwrap();
        std::thread::yield_now();
    }
    exchange(&mut stream, b"hello");
    assert_eq!(service.peer(), "192.0.2.7:4000".parse().unwrap());
}

/// A payload far larger than the shared buffer right behind the header.
#[test]
fn a_header_with_much_behind_it() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let payload: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    let mut stream = lab.dial(relay.addr);
    let mut sender = stream.try_clone().unwrap();
    let bytes = [announce("192.0.2.7:4000"), payload.clone()].concat();
    let sending = std::thread::spawn(move || sender.write_all(&bytes).unwrap());
    let mut answer = vec![0; payload.len()];
    stream.read_exact(&mut answer).unwrap();
    sending.join().unwrap();
    assert!(answer == payload);
}

#[test]
fn a_slow_header_runs_into_the_timeout() {
    const LIMIT: Duration = Duration::from_millis(300);
    const SLACK: Duration = Duration::from_secs(1);
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(
        &lab.wks,
        Settings {
            header_timeout: LIMIT,
            ..settings(&[service.addr])
        },
    );
    let header = announce("192.0.2.7:4000");
    let start = Instant::now();
    let mut silent = lab.dial(relay.addr);
    let mut slow = lab.dial(relay.addr);
    // a byte now and then must not prolong the time
    for byte in &header[..3] {
        slow.write_all(&[*byte]).unwrap();
        std::thread::sleep(LIMIT / 6);
    }
    assert_closed(&mut slow, "slow");
    assert_closed(&mut silent, "silent");
    let took = start.elapsed();
    assert!(took >= LIMIT && took < LIMIT + SLACK, "{took:?}");
    relay.wait_refused(Refusal::HeaderTimeout, 2);
    relay.wait("gone", |totals| totals.active == 0 && totals.waiting == 0);
    service.assert_only(&lab, &relay, "192.0.2.7:4001");
}

/// Every malformed header there is, whole: closed without the service hearing of it.
#[test]
fn malformed_headers_never_reach_the_service() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let table = malformed::all();
    assert!(table.len() >= 60, "{}", table.len());
    for malformed in &table {
        lab.assert_refused(&relay, &malformed.bytes, malformed.name);
    }
    let totals = relay.totals();
    let counted = totals.refused.of(Refusal::NoHeader) + totals.refused.of(Refusal::BadHeader);
    assert_eq!(counted, table.len() as u64);
    assert_eq!(totals.refused.all(), counted);
    service.assert_only(&lab, &relay, "192.0.2.7:4000");
}

/// Valid headers, for UDP: whatever their family, they have no place on a TCP connection.
#[test]
fn headers_that_announce_datagrams_are_refused() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let client4: SocketAddr = "192.0.2.7:4000".parse().unwrap();
    let client6: SocketAddr = "[2001:db8:7::7]:4000".parse().unwrap();
    let unix = [
        b"\r\n\r\n\0\r\nQUIT\n\x21\x32\x00\xd8".as_slice(),
        &[0; 216],
    ]
    .concat();
    let headers = [
        V2::proxied(client4, client4, Transport::Datagram).finish(),
        V2::proxied(client6, client6, Transport::Datagram).finish(),
        unix,
    ];
    for header in &headers {
        let what = format!("{:02x?}", &header[12..16]);
        lab.assert_refused(&relay, &[header, b"payload".as_slice()].concat(), &what);
    }
    relay.wait_refused(Refusal::BadHeader, headers.len() as u64);
    service.assert_only(&lab, &relay, "192.0.2.7:4000");
}

/// Health checks connect and go away, by FIN or by RST; a header cut short is something else.
#[test]
fn connections_that_end_early() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    drop(lab.dial(relay.addr));
    relay.wait("FIN", |totals| totals.empty == 1);
    reset(lab.dial(relay.addr));
    relay.wait("RST", |totals| totals.empty == 2);
    let mut cut = lab.dial(relay.addr);
    cut.write_all(b"PROXY TCP4 192").unwrap();
    relay.wait("half a header", |totals| totals.waiting == 1);
    drop(cut);
    relay.wait_refused(Refusal::HeaderTruncated, 1);
    relay.wait("gone", |totals| totals.active == 0 && totals.waiting == 0);
    assert_eq!(relay.totals().refused.all(), 1);
    service.assert_only(&lab, &relay, "192.0.2.7:4000");
}

#[test]
fn a_proxy_that_is_not_listed_is_not_heard() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(
        &lab.wks,
        Settings {
            allow: allow(&["10.0.0.3"]),
            ..settings(&[service.addr])
        },
    );
    lab.assert_refused(&relay, &announce("192.0.2.7:4000"), "not listed");
    relay.wait_refused(Refusal::ProxyNotAllowed, 1);
    // the same host by a listed address
    lab.vps.address("eth0", "10.0.0.3/24");
    let mut stream = lab
        .vps
        .enter(|| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            let from: std::net::SocketAddr = ([10, 0, 0, 3], 0).into();
            socket.bind(&from.into())?;
            socket.connect(&relay.addr.into())?;
            std::io::Result::Ok(std::net::TcpStream::from(socket))
        })
        .unwrap();
    stream.write_all(&announce("192.0.2.7:4001")).unwrap();
    exchange(&mut stream, b"hello");
    assert_eq!(service.peer(), "192.0.2.7:4001".parse().unwrap());
}
