//! Connections that prove a way: from this host, and from a client that does not exist.
//!
//! Every one ends with a reset, so that none is left, neither here nor in the service. Blocking, with
//! time limits. Must not know: what the outcome means.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};

use super::evidence::{Entry, Outcome};
use crate::model::{ClientAddr, Family, Mark, PortPolicy, Protocol, TargetAddr};
use crate::socket::udp::{Answers, spoofed_udp};
use crate::socket::{Spoof, SpoofError, reset_on_close, spoofed_tcp};

/// How long an answer may take. Nothing that a pathway leads to is far away.
pub const LIMIT: Duration = Duration::from_millis(600);

/// How long an ICMP answer may take: the same way, without a service that thinks.
const ICMP_LIMIT: Duration = Duration::from_millis(300);

/// A UDP port on which nobody listens: tcpmux, long dead, and never UDP.
pub const CLOSED: u16 = 1;

/// The client of a family that probe number `n` pretends to be: TEST-NET-1 and documentation addresses,
/// a different one each time because the kernel limits ICMP answers for each address.
pub fn nobody(family: Family, n: usize) -> IpAddr {
    let last = u8::try_from(n % 254 + 1).unwrap_or(1);
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, last).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, last.into()).into(),
    }
}

/// A spoofed probe: what became of it, and what connection tracking knew of it.
#[derive(Debug)]
pub struct Spoofed {
    /// What became of it.
    pub outcome: Outcome,
    /// What connection tracking knew at the end.
    pub entry: Entry,
}

/// Connects from this host's own address.
pub fn plain(protocol: Protocol, target: TargetAddr) -> Outcome {
    let attempt = || -> io::Result<Outcome> {
        let start = Instant::now();
        match protocol {
            Protocol::Tcp => {
                let socket = Socket::new(Domain::for_address(target.get()), Type::STREAM, None)?;
                socket.connect_timeout(&target.get().into(), LIMIT)?;
                reset_on_close(&socket);
                Ok(Outcome::Open(micros(start)))
            }
            Protocol::Udp => {
                let any: IpAddr = match target.family() {
                    Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
                    Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
                };
                let socket = UdpSocket::bind((any, 0))?;
                socket.connect(target.get())?;
                datagram(&socket, start)
            }
        }
    };
    attempt().unwrap_or_else(|error| failed(&error))
}

fn micros(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn failed(error: &io::Error) -> Outcome {
    match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => Outcome::Refused,
        Some(libc::ETIMEDOUT) => Outcome::Silent,
        Some(errno) => Outcome::Failed(errno),
        None => Outcome::Silent,
    }
}

/// Sends an empty datagram and waits: only a closed port answers it, with ICMP.
fn datagram(socket: &UdpSocket, start: Instant) -> io::Result<Outcome> {
    socket.set_read_timeout(Some(ICMP_LIMIT))?;
    socket.set_nonblocking(false)?;
    socket.send(&[])?;
    match socket.recv(&mut [0; 1]) {
        Ok(_) => Ok(Outcome::Open(micros(start))),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Outcome::Silent),
        Err(error) => Err(error),
    }
}

/// Connects from a client's address, with the mark of a pathway.
pub fn spoofed(protocol: Protocol, target: TargetAddr, mark: Mark, client: IpAddr) -> Spoofed {
    let start = Instant::now();
    let spoof = Spoof {
        client: ClientAddr::new(SocketAddr::new(client, 0)),
        target,
        mark: Some(mark),
        port: PortPolicy::Any,
    };
    let outcome = match protocol {
        Protocol::Tcp => spoofed_tcp(&spoof).map(|spoofed| {
            let from = spoofed.socket.local_addr();
            let socket = Socket::from(spoofed.socket);
            let outcome = connected(&socket, start).unwrap_or_else(|error| failed(&error));
            let entry = from.map_or(Entry::Unknown, |from| remembered(6, from, target));
            reset_on_close(&socket);
            Spoofed { outcome, entry }
        }),
        Protocol::Udp => spoofed_udp(&spoof, Answers::Single).map(|spoofed| {
            let from = spoofed.socket.local_addr();
            let outcome = datagram(&spoofed.socket, start).unwrap_or_else(|error| failed(&error));
            let entry = from.map_or(Entry::Unknown, |from| remembered(17, from, target));
            Spoofed { outcome, entry }
        }),
    };
    outcome.unwrap_or_else(|error| Spoofed {
        outcome: match error {
            SpoofError::Failed(failure) => failed(&failure.source),
            _ => Outcome::Failed(libc::EADDRNOTAVAIL),
        },
        entry: Entry::Unknown,
    })
}

fn connected(socket: &Socket, start: Instant) -> io::Result<Outcome> {
    let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    let limit = PollTimeout::try_from(LIMIT).unwrap_or(PollTimeout::MAX);
    if poll(&mut ready, limit)? == 0 {
        return Ok(Outcome::Silent);
    }
    match socket.take_error()? {
        Some(error) => Err(error),
        None => Ok(Outcome::Open(micros(start))),
    }
}

fn remembered(protocol: u8, from: SocketAddr, to: TargetAddr) -> Entry {
    super::conntrack::entry(protocol, from, to.get()).unwrap_or(Entry::Unknown)
}
