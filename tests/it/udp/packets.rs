//! Packets rather than payloads: sizes, path MTU, TOS, runs of equal datagrams.

use std::net::UdpSocket;
use std::time::Duration;

use mmproxyctl::model::UdpHeader::{Every, First, Spp};
use mmproxyctl::relay::spp;
use mmproxyctl::relay::udp::counters::Dropped;
use socket2::SockRef;

use super::lab::{Proxy, Relay, Service, addr, announce, settings};
use crate::relay::lab::{Lab, SOON};
use crate::support::net::Host;

#[test]
fn any_size_that_fits_a_datagram() {
    let lab = Lab::new();
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(Every, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    for size in [1, 2, 1472, 1473, 9000, 65_507 - 28] {
        let payload: Vec<u8> = (0..size).map(|at| at as u8).collect();
        proxy.exchange("192.0.2.7:4000", &payload);
    }
    assert_eq!(relay.totals().dropped.all(), 0);
}

/// An answer that has no room for its header is dropped and counted, and costs no other.
#[test]
fn an_answer_that_is_too_long() {
    let lab = Lab::new();
    let service = Service::start(&lab.wks, "127.0.0.1:0", |socket, seen| {
        let _ = socket.send_to(&[7; 65_500], seen.peer);
        let _ = socket.send_to(b"short", seen.peer);
    });
    let relay = Relay::start(&lab.wks, settings(Spp, &[service.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    let header = spp::Spp::new(addr("192.0.2.7:4000"), addr("198.51.100.1:53"));
    proxy.send(&[header.bytes(), b"go"]);
    assert_eq!(proxy.answer(), [&header.bytes()[..], b"short"].concat());
    relay.wait_dropped(Dropped::TooLong, 1);
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
    lab.vps
        .link("eth1", &["10.1.0.1/24"], &far, "eth0", &["10.1.0.2/24"]);
    lab.vps.ip("link set dev eth1 mtu 1300");
    far.ip("link set dev eth0 mtu 1300");
    far.ip("route add default via 10.1.0.1");
    lab.wks.ip("route add 10.1.0.0/24 via 10.0.0.2");
    lab.vps.sysctl("net.ipv4.ip_forward", "1");
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(First, &[service.addr]));
    let proxy = Proxy::new(&far, relay.addr);
    proxy.exchange("192.0.2.7:4000", b"hello");
    let large = vec![7; 1290];
    proxy
        .socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let mut buffer = [0; 2000];
    let tries = (1..=20)
        .find(|_| {
            proxy.send(&[&large]);
            proxy
                .socket
                .recv(&mut buffer)
                .is_ok_and(|length| length == large.len())
        })
        .expect("the large answer after the ICMP");
    assert!(tries <= 2, "{tries} tries");
}

#[test]
fn tos_and_ecn_both_ways() {
    let lab = Lab::new();
    let v4 = Service::start(&lab.wks, "127.0.0.1:0", |socket, seen| {
        SockRef::from(socket)
            .set_tos_v4(u32::from(seen.bytes[0]))
            .unwrap();
        let _ = socket.send_to(&seen.bytes, seen.peer);
    });
    let relay = Relay::start(&lab.wks, settings(Every, &[v4.addr]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    nix::sys::socket::setsockopt(&proxy.socket, nix::sys::socket::sockopt::IpRecvTos, &true)
        .unwrap();
    for tos in [0x02, 0xb8, 0x00, 0x03] {
        proxy.send(&[&announce("192.0.2.7:4000"), &[tos]]);
        assert_eq!(tos_of_next(&proxy.socket), tos);
    }
    let service = service_with_tos(&lab);
    let relay = Relay::start(&lab.wks, settings(Every, &[service.local_addr().unwrap()]));
    let proxy = Proxy::new(&lab.vps, relay.addr);
    for tos in [0x01, 0xb9, 0x00] {
        SockRef::from(&proxy.socket).set_tos_v4(tos.into()).unwrap();
        for _ in 0..2 {
            proxy.send(&[&announce("192.0.2.7:4000"), b"x"]);
        }
        for _ in 0..2 {
            assert_eq!(tos_of_next(&service), tos);
        }
    }
}

fn service_with_tos(lab: &Lab) -> UdpSocket {
    let socket = lab
        .wks
        .enter(|| UdpSocket::bind("127.0.0.1:0").expect("bind"));
    socket.set_read_timeout(Some(SOON)).expect("read timeout");
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpRecvTos, &true)
        .expect("IP_RECVTOS");
    socket
}

/// The TOS of the next datagram of a socket that has IP_RECVTOS.
fn tos_of_next(socket: &UdpSocket) -> u8 {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg};
    use std::os::fd::AsRawFd;
    let mut buffer = [0; 64];
    let mut parts = [std::io::IoSliceMut::new(&mut buffer)];
    let mut space = nix::cmsg_space!([u8; 64]);
    let message = recvmsg::<SockaddrIn>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::empty(),
    )
    .expect("a datagram");
    message
        .cmsgs()
        .expect("control messages")
        .find_map(|control| match control {
            ControlMessageOwned::Ipv4Tos(tos) => Some(tos),
            _ => None,
        })
        .expect("a TOS")
}
