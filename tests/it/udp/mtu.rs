//! Paths that are narrower than the link: fragments, ICMP "too big", runs of equal datagrams that no longer fit.

use std::net::UdpSocket;
use std::time::Duration;

use mmproxyctl::model::UdpHeader::{Every, First};
use mmproxyctl::pathway::Firewall;

use super::cells::run;
use super::lab::{Proxy, Relay, Service, addr, announce, settings};
use crate::narrow::Narrow;
use crate::relay::lab::Lab;
use crate::support::net::Host;

/// More than a narrow path takes, with any headers.
const LARGE: usize = 1290;
/// How often a datagram may have to be sent until all routers have said what they take.
const TRIES: usize = 2;

/// Sends until the answer has come, which is the payload's end; says how often that was.
fn tries(proxy: &Proxy, parts: &[&[u8]], payload: &[u8]) -> usize {
    let patience = Some(Duration::from_millis(200));
    proxy
        .socket
        .set_read_timeout(patience)
        .expect("read timeout");
    let mut buffer = vec![0; 65_536];
    (1..=20)
        .find(|_| {
            proxy.send(parts);
            let received = proxy.socket.recv(&mut buffer);
            received.is_ok_and(|length| buffer[..length] == *payload)
        })
        .expect("the large answer after the ICMP")
}

/// Two interfaces of two hosts, one narrower than Ethernet.
fn narrow(hosts: [(&Host, &str); 2]) {
    for (host, interface) in hosts {
        host.ip(&format!("link set dev {interface} mtu 1300"));
    }
}

fn forward(host: &Host) {
    host.sysctl("net.ipv4.ip_forward", "1");
    host.sysctl("net.ipv6.conf.all.forwarding", "1");
}

/// Answers larger than the way to the proxy, in runs: the kernel will not segment them, so they are sent
/// one by one and fragmented. Nothing is lost, and what fits is not fragmented.
#[test]
fn answers_larger_than_the_path() {
    let lab = Lab::new();
    for (host, interface) in [(&lab.wks, "eth0"), (&lab.vps, "eth0")] {
        host.ip(&format!("link set dev {interface} mtu 1400"));
    }
    let service = Service::start(&lab.wks, "127.0.0.1:0", |socket, seen| {
        for number in 0..20u8 {
            let _ = socket.send_to(&[number; 3000], seen.peer);
        }
        for number in 0..20u8 {
            let _ = socket.send_to(&[number; 1200], seen.peer);
        }
    });
    let relay = Relay::start(&lab.wks, settings(Every, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    for _ in 0..3 {
        proxy.send(&[&announce("192.0.2.7:4000"), b"go"]);
        for size in [3000, 1200] {
            for number in 0..20u8 {
                assert_eq!(proxy.answer(), vec![number; size]);
            }
        }
    }
    relay.wait("the answers", |totals| totals.datagrams_to_client == 120);
    assert_eq!(relay.totals().dropped.all(), 0);
}

/// A smaller MTU further on: ICMP says so, and what was lost by then is all that is lost.
#[test]
fn a_router_on_the_way_to_the_proxy_says_too_big() {
    let lab = Lab::new();
    // a router between them, whose other side is narrower
    let far = Host::new("far");
    let (here, there) = (["10.1.0.1/24", "fd01::1/64"], ["10.1.0.2/24", "fd01::2/64"]);
    lab.vps.link("eth1", &here, &far, "eth0", &there);
    narrow([(&lab.vps, "eth1"), (&far, "eth0")]);
    far.ip("route add default via 10.1.0.1");
    far.ip("-6 route add default via fd01::1");
    lab.wks.ip("route add 10.1.0.0/24 via 10.0.0.2");
    lab.wks.ip("-6 route add fd01::/64 via fd00::2");
    forward(&lab.vps);
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    for listen in ["10.0.0.1:0", "[fd00::1]:0"] {
        let relay = Relay::start_at(&lab.wks, listen, 1, settings(First, &[service.addr]));
        let proxy = Proxy::new(&far, relay.addr);
        proxy.exchange("192.0.2.7:4000", b"hello");
        let large = vec![7; LARGE];
        let tries = tries(&proxy, &[&large], &large);
        assert!(tries <= TRIES, "{listen}: {tries} tries");
    }
}

/// The same on the way to the service. Runs of equal datagrams are cut up from then on.
#[test]
fn a_router_on_the_way_to_the_service_says_too_big() {
    for firewall in [Firewall::Iptables, Firewall::Nftables] {
        let lab = Narrow::new(firewall);
        lab.add();
        let relay = run(&lab.wks, "run udp", &[2222]);
        for (client, target) in [
            ("203.0.113.7:4000", "172.20.0.2:7000"),
            ("[2001:db8:7::7]:4000", "[fd20::2]:7000"),
        ] {
            let service = Service::echo(&lab.far, target);
            let proxy = Proxy::new(&lab.vps, addr("10.0.0.1:2222"));
            proxy.exchange(client, b"hello");
            assert_eq!(service.peer_of(b"hello"), addr(client));
            let (header, large) = (announce(client), vec![7; LARGE]);
            let tries = tries(&proxy, &[&header, &large], &large);
            assert!(tries <= TRIES, "{target}: {tries} tries\n{}", relay.log());
            service.peer_of(&large);
            // as one, so that the relay has them as one to send on
            let datagram = [&header[..], &large].concat();
            send_as_one(&proxy.socket, &datagram, 10);
            for _ in 0..10 {
                assert_eq!(proxy.answer(), large);
            }
        }
    }
}

/// Sends equal datagrams with one call, which the kernel cuts (`UDP_SEGMENT`).
fn send_as_one(socket: &UdpSocket, datagram: &[u8], count: usize) {
    use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};
    use std::os::fd::AsRawFd;
    let size = u16::try_from(datagram.len()).expect("a small datagram");
    let bytes = datagram.repeat(count);
    let sent = sendmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &[std::io::IoSlice::new(&bytes)],
        &[ControlMessage::UdpGsoSegments(&size)],
        MsgFlags::empty(),
        None,
    );
    assert_eq!(sent, Ok(bytes.len()));
}
