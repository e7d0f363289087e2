//! The sockets of this network namespace that have a peer, as the kernel lists them (`sock_diag(7)`): whose
//! process they are of does not matter.
//!
//! Owns: the question and the shape of the answers. Must not know: what they are asked for.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::ControlFlow;

use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;
use rtnetlink::sys::{Socket, SocketAddr as Kernel};

use crate::model::{Family, Protocol};

/// `SOCK_DIAG_BY_FAMILY`
const BY_FAMILY: u16 = 20;
/// `NLMSG_ERROR`, `NLMSG_DONE`
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `INET_DIAG_MARK`: told to those only who have `CAP_NET_ADMIN`.
const MARK: u16 = 15;
/// Of a netlink message, of `struct inet_diag_req_v2`, and of `struct inet_diag_msg`.
const HEADER: usize = 16;
const REQUEST: usize = 56;
const ANSWER: usize = 72;
/// Where `struct inet_diag_sockid` has its parts in an answer.
const LOCAL_PORT: usize = 4;
const PEER_PORT: usize = 6;
const LOCAL: usize = 8;
const PEER: usize = 24;
/// Bits of the states in which a socket has something to send or to get: established, SYN sent, FIN wait 1 and
/// 2, close wait, last ACK, closing. A connected UDP socket is "established".
const STATES: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
/// The kernel sends no longer messages to who reads with so much room.
const ROOM: usize = 32 << 10;

/// A socket with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connected {
    /// Its protocol.
    pub protocol: Protocol,
    /// Its own address, IPv4 as such.
    pub local: SocketAddr,
    /// Its peer's.
    pub peer: SocketAddr,
    /// What it marks its packets with (`SO_MARK`); 0 for none.
    pub mark: u32,
}

/// Shows every one of a protocol, in no particular order, until told to stop. Blocking, a millisecond for a
/// thousand of them.
///
/// # Errors
/// When the kernel does not list them: it may have been built without (`CONFIG_INET_DIAG`).
pub fn each(
    protocol: Protocol,
    mut show: impl FnMut(Connected) -> ControlFlow<()>,
) -> io::Result<()> {
    for family in Family::BOTH {
        match dump(protocol, family, &mut show) {
            Ok(ControlFlow::Continue(())) => {}
            Ok(ControlFlow::Break(())) => return Ok(()),
            // no such family in this kernel
            Err(error) if family == Family::V6 && error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn dump(
    protocol: Protocol,
    family: Family,
    show: &mut impl FnMut(Connected) -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.send_to(&request(protocol, family), &Kernel::new(0, 0), 0)?;
    let mut buffer = Vec::with_capacity(ROOM);
    loop {
        buffer.clear();
        // a dump is made as it is read: there is always more, or its end
        match socket.recv(&mut buffer, 0) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            received => received?,
        };
        let mut rest = buffer.as_slice();
        while let Some((kind, body, after)) = split(rest) {
            rest = after;
            match kind {
                DONE => return Ok(ControlFlow::Continue(())),
                ERROR => return Err(refusal(body)),
                _ => {}
            }
            if let Some(one) = answer(protocol, family, body)
                && show(one).is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
        }
    }
}

fn request(protocol: Protocol, family: Family) -> Vec<u8> {
    let mut request = Vec::with_capacity(HEADER + REQUEST);
    request.extend(((HEADER + REQUEST) as u32).to_ne_bytes());
    request.extend(BY_FAMILY.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend([0; 8]);
    let family = match family {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    };
    let protocol = match protocol {
        Protocol::Tcp => libc::IPPROTO_TCP,
        Protocol::Udp => libc::IPPROTO_UDP,
    };
    // both fit their octet; no extension is asked for
    request.extend([family as u8, protocol as u8, 0, 0]);
    request.extend(STATES.to_ne_bytes());
    // any addresses and ports
    request.resize(HEADER + REQUEST, 0);
    request
}

/// The first message's kind and body, and what follows it.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER..length)?;
    let after = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, body, after))
}

fn refusal(body: &[u8]) -> io::Error {
    let code = body.get(..4).and_then(|code| code.try_into().ok());
    io::Error::from_raw_os_error(code.map_or(0, i32::from_ne_bytes).saturating_abs())
}

fn answer(protocol: Protocol, family: Family, body: &[u8]) -> Option<Connected> {
    let address = |port: usize, at: usize| {
        let port = u16::from_be_bytes(body.get(port..port + 2)?.try_into().ok()?);
        let octets: [u8; 16] = body.get(at..at + 16)?.try_into().ok()?;
        let ip = match family {
            Family::V4 => {
                let [a, b, c, d, ..] = octets;
                IpAddr::V4(Ipv4Addr::new(a, b, c, d))
            }
            Family::V6 => IpAddr::V6(Ipv6Addr::from(octets)).to_canonical(),
        };
        Some(SocketAddr::new(ip, port))
    };
    let mark = attribute(body.get(ANSWER..)?, MARK).and_then(|value| value.try_into().ok());
    Some(Connected {
        protocol,
        local: address(LOCAL_PORT, LOCAL)?,
        peer: address(PEER_PORT, PEER)?,
        mark: mark.map_or(0, u32::from_ne_bytes),
    })
}

/// The value of an attribute.
fn attribute(mut attributes: &[u8], number: u16) -> Option<&[u8]> {
    while let [a, b, c, d, ..] = *attributes {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = attributes.get(4..length)?;
        if u16::from_ne_bytes([c, d]) == number {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    fn all(protocol: Protocol) -> Vec<Connected> {
        let mut all = Vec::new();
        each(protocol, |one| {
            all.push(one);
            ControlFlow::Continue(())
        })
        .unwrap();
        all
    }

    #[test]
    fn the_two_ends_of_a_connection_are_listed_and_a_listener_is_not() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let at = listener.local_addr().unwrap();
            let from = || all(Protocol::Tcp).into_iter().filter(|one| one.local == at);
            assert_eq!(from().count(), 0, "{address}");
            let near = TcpStream::connect(at).unwrap();
            let (far, _) = listener.accept().unwrap();
            let ends = all(Protocol::Tcp);
            for one in [&near, &far] {
                let (local, peer) = (one.local_addr().unwrap(), one.peer_addr().unwrap());
                let same = |end: &&Connected| end.local == local && end.peer == peer;
                assert_eq!(ends.iter().filter(same).count(), 1, "{address}");
            }
        }
    }

    #[test]
    fn a_udp_socket_is_listed_once_it_has_a_peer_and_the_listing_stops_when_told() {
        let (near, far) = (
            UdpSocket::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        let (local, peer) = (near.local_addr().unwrap(), far.local_addr().unwrap());
        let listed = |from| {
            let all = all(Protocol::Udp);
            all.into_iter().find(|one| one.local == from)
        };
        near.connect(peer).unwrap();
        assert_eq!(listed(local).unwrap().peer, peer);
        assert_eq!(listed(peer), None);
        far.connect(local).unwrap();
        assert_eq!(listed(peer).unwrap().peer, local);
        let mut shown = 0;
        each(Protocol::Udp, |_| {
            shown += 1;
            ControlFlow::Break(())
        })
        .unwrap();
        assert_eq!(shown, 1);
    }
}
