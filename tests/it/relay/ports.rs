//! The host's ports: who has which in use, for how long, and what that leaves to the host itself.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mmproxyctl::model::PortPolicy;
use mmproxyctl::relay::header::encode_v2;
use mmproxyctl::relay::settings::Settings;

use super::lab::{Lab, Relay, SOON, Service, assert_closed, exchange, reset, settings};
use crate::support::net::wait_for;

/// As long as the kernel keeps a tuple in TIME_WAIT.
const TIME_WAIT: Duration = Duration::from_secs(60);

/// Makes this many short spoofed connections within a TIME_WAIT, each of a client that closes first (so
/// that its tuple stays in TIME_WAIT here) and whose port is the next of the host's own range, round and
/// round; the host's own connections must go on working. Returns how long it took.
fn short_connections(port: PortPolicy, range: RangeInclusive<u16>, count: usize) -> Duration {
    const PROXIES: usize = 4;
    let lab = Lab::new();
    for proxy in 0..PROXIES {
        // a destination each: the proxy's own ports are not what is tested
        lab.wks
            .address("eth0", &format!("10.0.0.{}/24", 11 + proxy));
    }
    let service = Service::echo(&lab.wks, "127.0.0.1:2222");
    let elsewhere = Service::echo(&lab.vps, "10.0.0.2:7777");
    let relay = Relay::start_at(
        &lab.wks,
        "0.0.0.0:3333",
        2,
        Settings {
            port,
            ..settings(&[service.addr])
        },
    );
    let (low, high) = (*range.start(), *range.end());
    lab.wks
        .sysctl("net.ipv4.ip_local_port_range", &format!("{low} {high}"));
    // over loopback the kernel would use a tuple again after a second of its TIME_WAIT, and fewer were left
    lab.wks.sysctl("net.ipv4.tcp_tw_reuse", "0");
    let own_connections = |when: &str| {
        lab.wks.enter(|| {
            for to in [elsewhere.addr, service.addr] {
                let mut own = TcpStream::connect_timeout(&to, SOON)
                    .unwrap_or_else(|error| panic!("own connection to {to} {when}: {error}"));
                exchange(&mut own, b"own");
                // leaves nothing of itself behind
                reset(own);
            }
        });
    };
    let start = Instant::now();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for proxy in 0..PROXIES {
            let (lab, next) = (&lab, &next);
            let relay = SocketAddr::from(([10, 0, 0, 11 + proxy as u8], relay.addr.port()));
            let work = move || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    let client = nth_client(number, low, high, port);
                    let mut stream = TcpStream::connect_timeout(&relay, SOON).expect("dial");
                    stream.set_read_timeout(Some(SOON)).expect("a timeout");
                    let mut bytes = encode_v2(client, ([198, 51, 100, 1], 443).into());
                    bytes.extend_from_slice(b"hello");
                    stream.write_all(&bytes).expect("send");
                    stream.read_exact(&mut [0; 5]).expect("an answer");
                }
            };
            scope.spawn(move || lab.vps.enter(work));
        }
    });
    let took = start.elapsed();
    assert!(
        took < TIME_WAIT,
        "{took:?}: the first have left TIME_WAIT before the last came"
    );
    relay.wait("all over", |totals| totals.active == 0);
    own_connections("afterwards");
    let totals = relay.totals();
    assert_eq!(totals.relayed, count as u64, "{totals:#?}");
    assert_eq!(totals.ports_given_up, 0, "{totals:#?}");
    for number in 0..count {
        let client = nth_client(number, low, high, port);
        let seen = service.peer();
        // the order is not that of the connections
        assert!(matches!(seen.ip(), std::net::IpAddr::V4(ip) if ip.octets()[..3] == [192, 0, 2]));
        assert_eq!(client.ip().is_ipv4(), seen.is_ipv4());
    }
    let all = usize::from(high - low) + 1;
    let left = lab
        .wks
        .run("ss -Htan state time-wait src 192.0.2.0/24")
        .lines()
        .count();
    assert!(
        left >= count.min(all),
        "only {left} tuples in TIME_WAIT: the test has not used up {all} ports"
    );
    took
}

/// With `port=keep`, every port of one client and then of the next. With `port=any` of many clients in turn:
/// the kernel looks for a port that is free under the client's address, which takes it long where one client
/// has nearly all of them in TIME_WAIT.
fn nth_client(number: usize, low: u16, high: u16, port: PortPolicy) -> SocketAddr {
    let ports = usize::from(high - low) + 1;
    let client = match port {
        PortPolicy::Keep => number / ports,
        PortPolicy::Any => number % 200,
    };
    let ip = Ipv4Addr::new(192, 0, 2, 1 + client as u8);
    SocketAddr::V4(SocketAddrV4::new(ip, low + (number % ports) as u16))
}

/// Every port of the host's range is in TIME_WAIT under some client's address.
#[test]
fn clients_leave_the_hosts_own_ports_alone() {
    for port in [PortPolicy::Keep, PortPolicy::Any] {
        short_connections(port, 40_000..=40_499, 1200);
    }
}

/// The same at full size, with the range as it is by default.
#[cfg(feature = "soak")]
#[test]
fn forty_thousand_short_connections_in_a_minute() {
    for port in [PortPolicy::Keep, PortPolicy::Any] {
        let took = short_connections(port, 32_768..=60_999, 40_000);
        println!("port={port}: 40,000 connections in {took:?}");
    }
}

/// While the connections are open, too; and the port that the service sees is the client's.
#[test]
fn open_connections_share_their_ports_with_the_host() {
    for (client, to, link) in [
        ("192.0.2.7", "127.0.0.1:2222", "10.0.0.2:7777"),
        ("[2001:db8::7]", "[::1]:2222", "[fd00::2]:7777"),
    ] {
        let lab = Lab::new();
        let service = Service::echo(&lab.wks, to);
        let elsewhere = Service::echo(&lab.vps, link);
        let relay = Relay::start(&lab.wks, settings(&[service.addr]));
        lab.wks
            .sysctl("net.ipv4.ip_local_port_range", "40000 40009");
        let open: Vec<_> = (40_000..=40_009)
            .map(|port| {
                let client = format!("{client}:{port}");
                let mut stream = lab.connect(&relay, &client);
                exchange(&mut stream, b"hello");
                assert_eq!(service.peer(), client.parse().unwrap());
                stream
            })
            .collect();
        let own = lab
            .wks
            .enter(|| TcpStream::connect_timeout(&elsewhere.addr, SOON));
        exchange(&mut own.expect("an own connection"), b"own");
        assert_eq!(relay.totals().ports_given_up, 0);
        drop(open);
    }
}

/// A port that is reserved from the host's range is a client's port like any other.
#[test]
fn a_reserved_port_is_kept() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    lab.wks
        .sysctl("net.ipv4.ip_local_reserved_ports", "40000-40009");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.connect(&relay, "192.0.2.7:40003");
    exchange(&mut stream, b"hello");
    assert_eq!(service.peer(), "192.0.2.7:40003".parse().unwrap());
    assert_eq!(relay.totals().ports_given_up, 0);
}

/// Which tuples a connection leaves in TIME_WAIT on the relay's host: `local peer` as `ss` has them.
fn left_in_time_wait(lab: &Lab, service: &Service) -> Vec<(String, String)> {
    let port = service.addr.port();
    let filter = format!("ss -Htan state time-wait ( sport = :{port} or dport = :{port} )");
    let lines = lab.wks.run(&filter);
    let pair = |line: &str| {
        let mut words = line.split_whitespace().skip(2).map(str::to_owned);
        Some((words.next()?, words.next()?))
    };
    lines.lines().filter_map(pair).collect()
}

/// Whoever closes first keeps the tuple: a client that does leaves it with its own address here, once;
/// a service that does keeps it itself; a reset leaves nothing.
#[test]
fn who_closes_first_has_the_time_wait() {
    let lab = Lab::new();
    let client = "192.0.2.7:4000".to_owned();

    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let spoofed = (client.clone(), service.addr.to_string());
    let mut stream = lab.connect(&relay, &client);
    exchange(&mut stream, b"hello");
    drop(stream);
    relay.wait("closed", |totals| totals.active == 0);
    wait_for("one spoofed tuple", || {
        left_in_time_wait(&lab, &service) == [spoofed.clone()]
    });

    let service = Service::start(&lab.wks, "127.0.0.1:0", |mut stream| {
        let mut hello = [0; 5];
        stream.read_exact(&mut hello).expect("a request");
        stream.write_all(&hello).expect("answer");
    });
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let at_service = (service.addr.to_string(), client.clone());
    for client_shuts_down in [false, true] {
        let mut stream = lab.connect(&relay, &client);
        exchange(&mut stream, b"hello");
        // seen by the client before it closes, so that the service was first
        assert_closed(&mut stream, "closed by the service");
        if client_shuts_down {
            stream
                .shutdown(std::net::Shutdown::Write)
                .expect("shutdown");
        }
        drop(stream);
        relay.wait("closed", |totals| totals.active == 0);
        wait_for("one tuple at the service, none spoofed", || {
            left_in_time_wait(&lab, &service) == [at_service.clone()]
        });
    }

    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    let mut stream = lab.connect(&relay, &client);
    exchange(&mut stream, b"hello");
    reset(stream);
    relay.wait("reset", |totals| totals.active == 0);
    assert_eq!(left_in_time_wait(&lab, &service), []);
}
