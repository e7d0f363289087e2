//! Packets rather than payloads: sizes and TOS.

use std::net::UdpSocket;

use mmproxyctl::model::UdpHeader::{Every, Spp};
use mmproxyctl::relay::spp;
use mmproxyctl::relay::udp::counters::Dropped;
use socket2::SockRef;

use super::lab::{Proxy, Relay, Service, addr, announce, settings};
use crate::relay::lab::{Lab, SOON};

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

/// In IPv6 the same is called traffic class, and told by other options.
#[test]
fn tos_and_ecn_both_ways() {
    let lab = Lab::new();
    for (listen, target, client) in [
        ("10.0.0.1:0", "127.0.0.1:0", "192.0.2.7:4000"),
        ("[fd00::1]:0", "[::1]:0", "[2001:db8::7]:4000"),
    ] {
        let echo = Service::start(&lab.wks, target, |socket, seen| {
            send_with_tos(socket, seen.bytes[0]);
            let _ = socket.send_to(&seen.bytes, seen.peer);
        });
        let relay = Relay::start_at(&lab.wks, listen, 1, settings(Every, &[echo.addr]));
        let proxy = Proxy::new(&lab.vps, relay.addr);
        receive_tos(&proxy.socket);
        for tos in [0x02, 0xb8, 0x00, 0x03] {
            proxy.send(&[&announce(client), &[tos]]);
            assert_eq!(tos_of_next(&proxy.socket), tos, "{listen}");
        }
        let service = lab.wks.enter(|| UdpSocket::bind(target).expect("bind"));
        service.set_read_timeout(Some(SOON)).expect("read timeout");
        receive_tos(&service);
        let settings = settings(Every, &[service.local_addr().unwrap()]);
        let relay = Relay::start_at(&lab.wks, listen, 1, settings);
        let proxy = Proxy::new(&lab.vps, relay.addr);
        for tos in [0x01, 0xb9, 0x00] {
            send_with_tos(&proxy.socket, tos);
            for _ in 0..2 {
                proxy.send(&[&announce(client), b"x"]);
            }
            for _ in 0..2 {
                assert_eq!(tos_of_next(&service), tos, "{target}");
            }
        }
    }
}

/// What the socket sends from here on has this TOS, or traffic class.
fn send_with_tos(socket: &UdpSocket, tos: u8) {
    let is_v4 = socket.local_addr().expect("an address").is_ipv4();
    let socket = SockRef::from(socket);
    match is_v4 {
        true => socket.set_tos_v4(tos.into()),
        false => socket.set_tclass_v6(tos.into()),
    }
    .expect("set the TOS");
}

/// What the socket receives comes with its TOS, or traffic class.
fn receive_tos(socket: &UdpSocket) {
    let is_v4 = socket.local_addr().expect("an address").is_ipv4();
    let socket = SockRef::from(socket);
    match is_v4 {
        true => socket.set_recv_tos_v4(true),
        false => socket.set_recv_tclass_v6(true),
    }
    .expect("ask for the TOS");
}

/// The TOS of the next datagram of a socket that is told.
fn tos_of_next(socket: &UdpSocket) -> u8 {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
    use std::os::fd::AsRawFd;
    let mut buffer = [0; 64];
    let mut parts = [std::io::IoSliceMut::new(&mut buffer)];
    let mut space = nix::cmsg_space!([u8; 64]);
    let message = recvmsg::<SockaddrStorage>(
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
            ControlMessageOwned::Ipv6TClass(class) => u8::try_from(class).ok(),
            _ => None,
        })
        .expect("a TOS")
}
