//! Over loopback sockets: what the kernel really does with these messages.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use super::arena::Control;
use super::*;
use crate::model::Family;
use crate::socket::udp::receive_from_proxies;

/// Two sockets on loopback; the first is prepared as a listener is.
fn pair(address: &str) -> (UdpSocket, UdpSocket) {
    let listener = UdpSocket::bind((address, 0)).unwrap();
    receive_from_proxies(&listener).unwrap();
    let sender = UdpSocket::bind((address, 0)).unwrap();
    sender
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    sender.connect(listener.local_addr().unwrap()).unwrap();
    (listener, sender)
}

fn all(arena: &mut Arena, socket: &UdpSocket, datagrams: usize) -> Vec<(Vec<u8>, Control)> {
    let mut seen = Vec::new();
    while seen.len() < datagrams {
        let received = arena.receive(socket.as_fd(), 0, arena.slots()).unwrap();
        for slot in 0..received {
            let got = arena.received(slot);
            assert!(!got.truncated);
            let size = got
                .control
                .segment
                .map_or(got.bytes.len(), usize::from)
                .max(1);
            for bytes in got.bytes.chunks(size) {
                seen.push((bytes.to_vec(), got.control));
            }
            if got.bytes.is_empty() {
                seen.push((Vec::new(), got.control));
            }
        }
    }
    seen
}

#[test]
fn peers_and_bytes_in_both_families() {
    for address in ["127.0.0.1", "::1"] {
        let (listener, sender) = pair(address);
        let mut arena = Arena::new(3, true);
        for payload in [&b"one"[..], b"", b"three"] {
            sender.send(payload).unwrap();
        }
        assert_eq!(arena.receive(listener.as_fd(), 0, 3).unwrap(), 3);
        for (slot, payload) in [&b"one"[..], b"", b"three"].into_iter().enumerate() {
            let got = arena.received(slot);
            assert_eq!(got.bytes, payload);
            assert_eq!(got.peer, Some(sender.local_addr().unwrap()));
            assert_eq!(got.control, Control::default());
        }
        let empty = arena.receive(listener.as_fd(), 0, 3).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(arena.receive(listener.as_fd(), 3, 3).unwrap(), 0);
    }
}

/// Also where the kernel has put several into one slot: the rest of them would be nobody's.
#[test]
fn what_is_cut_off_is_said() {
    let (listener, sender) = pair("127.0.0.1");
    let mut arena = Arena::short(2, true, 100);
    for size in [101, 100] {
        sender.send(&vec![7; size]).unwrap();
    }
    assert_eq!(arena.receive(listener.as_fd(), 0, 2).unwrap(), 2);
    let [long, short] = [0, 1].map(|slot| arena.received(slot));
    assert!(long.truncated && long.bytes.len() == 100);
    assert!(!short.truncated && short.bytes.len() == 100);
    // and the slot takes the next one as if nothing had been
    sender.send(b"next").unwrap();
    assert_eq!(arena.receive(listener.as_fd(), 0, 2).unwrap(), 1);
    assert!(!arena.received(0).truncated);
    assert_eq!(arena.received(0).bytes, b"next");

    nix::sys::socket::setsockopt(&sender, nix::sys::socket::sockopt::UdpGsoSegment, &60).unwrap();
    sender.send(&[7; 180]).unwrap();
    assert_eq!(arena.receive(listener.as_fd(), 0, 2).unwrap(), 1);
    let run = arena.received(0);
    assert!(run.truncated, "{run:?}");
    assert_eq!(run.control.segment, Some(60));
}

#[test]
fn what_a_slot_said_before_is_forgotten() {
    let wildcard = UdpSocket::bind("0.0.0.0:0").unwrap();
    receive_from_proxies(&wildcard).unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = wildcard.local_addr().unwrap().port();
    let mut arena = Arena::new(1, true);
    for address in [[127, 0, 0, 2], [127, 0, 0, 3]] {
        sender
            .send_to(b"x", (Ipv4Addr::from(address), port))
            .unwrap();
        assert_eq!(arena.receive(wildcard.as_fd(), 0, 1).unwrap(), 1);
        let local = arena.received(0).control.local.unwrap();
        assert_eq!(local.addr, std::net::IpAddr::from(address));
    }
    let (listener, sender) = pair("127.0.0.1");
    sender.send(b"y").unwrap();
    assert_eq!(arena.receive(listener.as_fd(), 0, 1).unwrap(), 1);
    assert_eq!(arena.received(0).control, Control::default());
}

#[test]
fn runs_of_equal_datagrams_arrive_whole() {
    for address in ["127.0.0.1", "::1"] {
        let (sender, receiver) = pair(address);
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        receive_from_proxies(&receiver).unwrap();
        let mut arena = Arena::new(200, false);
        // sizes: a run, its shorter end, another run, an empty one, more than fit one message
        let mut sizes = vec![100; 10];
        sizes.extend([40, 100, 100, 0, 100]);
        sizes.extend([1200; 100]);
        for (at, size) in sizes.iter().enumerate() {
            receiver.send(&vec![at as u8; *size]).unwrap();
        }
        let mut got = 0;
        while got < sizes.len() {
            got += arena.receive(sender.as_fd(), got, 200).unwrap();
        }
        let mut outbox = Outbox::new();
        let envelope = Envelope {
            to: Receiver::Connected(Family::of(address.parse().unwrap())),
            from: None,
            tos: 0xb9,
        };
        for (slot, size) in sizes.iter().enumerate() {
            outbox.push(envelope, Part::new(slot, 0, *size), SegmentLimit::default());
        }
        let sent = outbox.send(sender.as_fd(), &arena, &mut SegmentLimit::default());
        assert_eq!(sent.datagrams, sizes.len() as u64, "{sent:?}");
        assert_eq!(sent.failed, 0);
        assert!(outbox.is_empty());
        let seen = all(&mut Arena::new(16, false), &receiver, sizes.len());
        for (at, ((bytes, control), size)) in seen.iter().zip(&sizes).enumerate() {
            assert_eq!(bytes, &vec![at as u8; *size]);
            assert_eq!(control.tos, 0xb9);
        }
        assert!(seen[0].1.segment.is_some(), "the kernel did not coalesce");
    }
}

#[test]
fn answers_with_a_prefix_from_the_address_asked() {
    let wildcard = UdpSocket::bind("0.0.0.0:0").unwrap();
    receive_from_proxies(&wildcard).unwrap();
    let (_, asking) = pair("127.0.0.1");
    let at = SocketAddr::from(([127, 0, 0, 9], wildcard.local_addr().unwrap().port()));
    asking.connect(at).unwrap();
    let mut arena = Arena::new(4, true);
    for payload in [b"aa", b"bb"] {
        asking.send(payload).unwrap();
    }
    assert_eq!(arena.receive(wildcard.as_fd(), 1, 4).unwrap(), 2);
    let mut outbox = Outbox::new();
    for slot in [1, 2] {
        let got = arena.received(slot);
        let envelope = Envelope {
            to: Receiver::Address(got.peer.unwrap()),
            from: got.control.local,
            tos: 0,
        };
        arena.prefix(slot, b"head-");
        outbox.push(
            envelope,
            Part::with_prefix(slot, 5, 2),
            SegmentLimit::default(),
        );
    }
    assert_eq!(
        outbox
            .send(wildcard.as_fd(), &arena, &mut SegmentLimit::default())
            .datagrams,
        2
    );
    let mut buffer = [0; 64];
    for expected in [b"head-aa", b"head-bb"] {
        // a connected socket takes nothing that comes from another address
        let length = asking.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], expected);
    }
}

#[test]
fn a_refused_datagram_does_not_hold_up_the_rest() {
    let (listener, sender) = pair("127.0.0.1");
    let mut arena = Arena::new(2, true);
    sender.send(&[7; 1000]).unwrap();
    sender.send(b"ok").unwrap();
    assert_eq!(arena.receive(listener.as_fd(), 0, 2).unwrap(), 2);
    let good = Envelope {
        to: Receiver::Address(sender.local_addr().unwrap()),
        from: None,
        tos: 0,
    };
    let bad = Envelope {
        // broadcast without SO_BROADCAST
        to: Receiver::Address("255.255.255.255:9".parse().unwrap()),
        ..good
    };
    let mut outbox = Outbox::new();
    outbox.push(bad, Part::new(0, 0, 1000), SegmentLimit::default());
    outbox.push(good, Part::new(1, 0, 2), SegmentLimit::default());
    let sent = outbox.send(listener.as_fd(), &arena, &mut SegmentLimit::default());
    assert_eq!((sent.datagrams, sent.failed), (1, 1));
    assert_eq!(sent.error.unwrap().kind(), io::ErrorKind::PermissionDenied);
    let mut buffer = [0; 64];
    assert_eq!(sender.recv(&mut buffer).unwrap(), 2);
}
