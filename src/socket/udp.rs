//! UDP: listeners that say where a datagram was sent to, spoofed sockets that are connected, and who is
//! bound to a port.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::socket::{SetSockOpt, setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

use super::spoof::{Locality, Spoof, SpoofError, locality};
use super::{Failure, ListenError, Reach, Sharing, set_transparent};
use crate::model::{Family, ListenAddr, PortPolicy, TargetAddr};

/// The receive and send buffer of a listener, in bytes as the kernel accounts them: a datagram of 100 bytes
/// counts for 768, so this is what comes in some 20 ms at 300,000 a second.
const LISTENER_BUFFER: usize = 4 << 20;

/// The receive buffer of a flow's socket. Used memory only: a thousand idle ones cost nothing.
const FLOW_BUFFER: usize = 1 << 20;

/// Sockets that share one listen address.
#[derive(Debug)]
pub struct UdpListeners {
    /// The sockets, bound, non-blocking; as many as were asked for.
    pub sockets: Vec<UdpSocket>,
    /// The address is on no interface of this host yet; datagrams arrive once it is.
    pub address_missing: bool,
}

/// Binds `count` sockets to one address (`SO_REUSEPORT`); port 0 takes one free port for all of them.
///
/// The kernel deals datagrams out by a hash of both ends, so that those of one proxy port stay with one
/// socket while the number of sockets does not change.
///
/// # Errors
/// When the address is in use, also by another program that set `SO_REUSEPORT`, or cannot be bound.
pub fn udp_listeners(addr: ListenAddr, count: NonZeroUsize) -> Result<UdpListeners, ListenError> {
    listeners(addr.get(), Reach::Own, count).map_err(ListenError::on(addr))
}

pub(super) fn listeners(
    addr: SocketAddr,
    reach: Reach,
    count: NonZeroUsize,
) -> Result<UdpListeners, Failure> {
    // bound without SO_REUSEPORT, with which a second program would silently get half of the datagrams, and
    // shared only then
    let (first, address_missing) = bound_socket(addr, reach, Sharing::Exclusive)?;
    let bound = first
        .local_addr()
        .map_err(Failure::at("read the bound address"))?;
    SockRef::from(&first)
        .set_reuse_port(true)
        .map_err(Failure::at("set SO_REUSEPORT"))?;
    let others = (1..count.get()).map(|_| one_more_udp_listener(bound, reach));
    let sockets = std::iter::once(Ok(first))
        .chain(others)
        .collect::<Result<Vec<_>, _>>()?;
    Ok(UdpListeners {
        sockets,
        address_missing,
    })
}

/// One more on an address that others of this user share with `SO_REUSEPORT`.
pub(super) fn one_more_udp_listener(addr: SocketAddr, reach: Reach) -> Result<UdpSocket, Failure> {
    bound_socket(addr, reach, Sharing::ReusePort).map(|(socket, _)| socket)
}

fn bound_socket(
    addr: SocketAddr,
    reach: Reach,
    sharing: Sharing,
) -> Result<(UdpSocket, bool), Failure> {
    let socket = Socket::new(
        Domain::for_address(addr),
        Type::DGRAM.nonblocking(),
        Some(Protocol::UDP),
    )
    .map_err(Failure::at("open a socket"))?;
    if addr.is_ipv6() {
        socket
            .set_only_v6(true)
            .map_err(Failure::at("set IPV6_V6ONLY"))?;
    }
    if sharing == Sharing::ReusePort {
        socket
            .set_reuse_port(true)
            .map_err(Failure::at("set SO_REUSEPORT"))?;
    }
    if reach == Reach::Transparent {
        set_transparent(&socket, Family::of(addr.ip()))?;
    }
    let sockaddr = SockAddr::from(addr);
    let address_missing = match socket.bind(&sockaddr) {
        Ok(()) => false,
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
            if addr.is_ipv4() {
                socket.set_freebind_v4(true)
            } else {
                socket.set_freebind_v6(true)
            }
            .map_err(Failure::at("set IP_FREEBIND"))?;
            socket.bind(&sockaddr).map_err(Failure::at("bind"))?;
            true
        }
        Err(error) => return Err(Failure::at("bind")(error)),
    };
    Ok((UdpSocket::from(socket), address_missing))
}

/// Makes a bound socket fit to receive from proxies, whoever bound it: non-blocking, large buffers, and with
/// each datagram its TOS, its segment size where several came as one, and the count of those that were lost.
/// On a wildcard socket, also the address it was sent to, on a transparent one the address and the port.
///
/// # Errors
/// When the kernel refuses one of the options; a buffer smaller than wanted is no error.
pub fn receive_from_proxies(socket: &UdpSocket) -> Result<(), Failure> {
    let addr = socket
        .local_addr()
        .map_err(Failure::at("read the bound address"))?;
    socket
        .set_nonblocking(true)
        .map_err(Failure::at("set O_NONBLOCK"))?;
    set_buffers(socket, LISTENER_BUFFER, LISTENER_BUFFER);
    annotate(socket, Family::of(addr.ip()))?;
    coalesce(socket)?;
    let family = Family::of(addr.ip());
    if is_transparent(socket)? {
        const FAILED: &str = "set IP_RECVORIGDSTADDR";
        return match family {
            Family::V4 => option(socket, sockopt::Ipv4OrigDstAddr, &true, FAILED),
            Family::V6 => option(socket, sockopt::Ipv6OrigDstAddr, &true, FAILED),
        };
    }
    if addr.ip().is_unspecified() {
        let failed = "set IP_PKTINFO";
        match family {
            Family::V4 => option(socket, sockopt::Ipv4PacketInfo, &true, failed)?,
            Family::V6 => option(socket, sockopt::Ipv6RecvPacketInfo, &true, failed)?,
        }
    }
    Ok(())
}

/// Whether a socket may get what was sent elsewhere: each datagram then says where.
///
/// # Errors
/// When the kernel tells nothing about it.
pub fn is_transparent(socket: &UdpSocket) -> Result<bool, Failure> {
    let reach = socket.local_addr().and_then(|addr| Reach::of(socket, addr));
    Ok(reach.map_err(Failure::at("ask whether a socket is transparent"))? == Reach::Transparent)
}

/// A socket to answer from an address and port that need not be this host's, beside others that do: nothing
/// comes to it, because rules hand what is sent there to the listener.
///
/// # Errors
/// When a socket that does not share the address has it, or descriptors run out.
pub fn answering_from(addr: SocketAddr) -> Result<UdpSocket, Failure> {
    let socket = Socket::new(
        Domain::for_address(addr),
        Type::DGRAM.nonblocking(),
        Some(Protocol::UDP),
    )
    .map_err(Failure::at("open a socket"))?;
    set_transparent(&socket, Family::of(addr.ip()))?;
    socket
        .set_reuse_address(true)
        .map_err(Failure::at("set SO_REUSEADDR"))?;
    socket
        .bind(&SockAddr::from(addr))
        .map_err(Failure::at("bind to the address that was asked"))?;
    Ok(UdpSocket::from(socket))
}

/// Buffers of these sizes, beyond `net.core.rmem_max` with CAP_NET_ADMIN, up to it without.
fn set_buffers(socket: &UdpSocket, receive: usize, send: usize) {
    let plain = SockRef::from(socket);
    if setsockopt(socket, sockopt::RcvBufForce, &receive).is_err() {
        // cannot fail: the kernel cuts what is too much
        let _ = plain.set_recv_buffer_size(receive);
    }
    if send > 0 && setsockopt(socket, sockopt::SndBufForce, &send).is_err() {
        let _ = plain.set_send_buffer_size(send);
    }
}

/// With each datagram its TOS, and the count of those lost.
fn annotate(socket: &UdpSocket, family: Family) -> Result<(), Failure> {
    match family {
        Family::V4 => SockRef::from(socket).set_recv_tos_v4(true),
        Family::V6 => SockRef::from(socket).set_recv_tclass_v6(true),
    }
    .map_err(Failure::at("set IP_RECVTOS"))?;
    option(socket, sockopt::RxqOvfl, &1, "set SO_RXQ_OVFL")
}

/// Several datagrams of one size may be received as one, where the kernel has them so.
fn coalesce(socket: &UdpSocket) -> Result<(), Failure> {
    option(socket, sockopt::UdpGroSegment, &true, "set UDP_GRO")
}

fn option<O: SetSockOpt>(
    socket: &UdpSocket,
    kind: O,
    value: &O::Val,
    operation: &'static str,
) -> Result<(), Failure> {
    setsockopt(&socket.as_fd(), kind, value).map_err(|errno| Failure::at(operation)(errno.into()))
}

/// A spoofed UDP socket.
#[derive(Debug)]
pub struct SpoofedUdp {
    /// The socket, non-blocking, connected to the target.
    pub socket: UdpSocket,
    /// The client's port was taken (or is privileged and not permitted): the kernel chose another.
    pub port_given_up: bool,
}

/// How a spoofed UDP socket receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answers {
    /// One datagram at a time.
    Single,
    /// Several of one size may be received as one.
    Coalesced,
}

/// Opens a socket connected to the target that sends from the client's address and carries the mark.
///
/// Without `SO_REUSEADDR`: with it a second socket of the same two ends would silently take over what is
/// sent to the first. So a taken port is given up, and the address kept; taken is also what the same client
/// has towards another target, as the kernel compares bound ends only. Whether the client's address is
/// local to this host is asked as for TCP.
///
/// Path MTU: as the system has it (`net.ipv4.ip_no_pmtu_disc`), by default datagrams carry DF while they fit
/// the path and are fragmented here where they do not. A relay cannot see whether the sender of a datagram
/// had set DF itself.
///
/// # Errors
/// When the socket cannot be made, or its source address would not be the client's. A service that is
/// down is seen later, as the socket's pending error.
pub fn spoofed_udp(spoof: &Spoof, answers: Answers) -> Result<SpoofedUdp, SpoofError> {
    let port = match spoof.port {
        PortPolicy::Keep => spoof.client.port(),
        PortPolicy::Any => 0,
    };
    let (socket, port_given_up) = match begin(spoof, port) {
        Err(SpoofError::Failed(failure))
            if port != 0
                && matches!(
                    failure.errno(),
                    Some(Errno::EADDRINUSE | Errno::EADDRNOTAVAIL | Errno::EACCES)
                ) =>
        {
            (begin(spoof, 0)?, true)
        }
        outcome => (outcome?, false),
    };
    let got = socket
        .local_addr()
        .map_err(|error| SpoofError::Failed(Failure::at("read the source address")(error)))?
        .ip()
        .to_canonical();
    if got != spoof.client.ip() {
        return Err(SpoofError::SourceReplaced {
            wanted: spoof.client.ip(),
            got,
        });
    }
    let prepare = || {
        annotate(&socket, spoof.client.family())?;
        match answers {
            Answers::Single => Ok(()),
            Answers::Coalesced => coalesce(&socket),
        }
    };
    prepare().map_err(SpoofError::Failed)?;
    set_buffers(&socket, FLOW_BUFFER, 0);
    Ok(SpoofedUdp {
        socket,
        port_given_up,
    })
}

fn begin(spoof: &Spoof, port: u16) -> Result<UdpSocket, SpoofError> {
    let failed = |operation| move |error| SpoofError::Failed(Failure::at(operation)(error));
    let ip = spoof.client.ip();
    let source = SockAddr::from(SocketAddr::new(ip, port));
    let socket = Socket::new(
        Domain::for_address(spoof.client.get()),
        Type::DGRAM.nonblocking(),
        Some(Protocol::UDP),
    )
    .map_err(failed("open a socket"))?;
    const BIND: &str = "bind to the client's address";
    // as for TCP: without IP_TRANSPARENT only a local address can be bound
    let spoofing = match socket.bind(&source) {
        Ok(()) => match locality(ip).map_err(failed("look up the client's address"))? {
            Locality::Local => false,
            Locality::Foreign => {
                set_transparent(&socket, spoof.client.family()).map_err(SpoofError::Failed)?;
                true
            }
            Locality::Broadcast => return Err(SpoofError::Broadcast(ip)),
        },
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
            set_transparent(&socket, spoof.client.family()).map_err(SpoofError::Failed)?;
            socket.bind(&source).map_err(failed(BIND))?;
            true
        }
        Err(error) => return Err(failed(BIND)(error)),
    };
    if let Some(mark) = spoof.mark.filter(|_| spoofing) {
        socket.set_mark(mark.get()).map_err(failed("set SO_MARK"))?;
    }
    socket
        .connect(&SockAddr::from(spoof.target.get()))
        .map_err(failed("connect"))?;
    Ok(UdpSocket::from(socket))
}

/// Who is bound to the port of a local target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// No socket of this network namespace: the service is elsewhere, or not up.
    Nobody,
    /// A socket on the very address.
    Address,
    /// Only sockets on the wildcard address: unless the service takes care of it (`IP_PKTINFO`), its answers
    /// leave from an address of the kernel's choice, which for an outside client is not a loopback address.
    Wildcard,
}

/// Asks who is bound to a target in this thread's network namespace.
///
/// # Errors
/// When `/proc/thread-self/net/udp` or `udp6` cannot be read.
pub fn udp_bound(target: TargetAddr) -> io::Result<Bound> {
    // not /proc/net, which shows the namespace of the process' first thread
    let tables = ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"]
        .into_iter()
        .map(fs::read_to_string)
        .collect::<io::Result<Vec<_>>>()?;
    let mut bound = Bound::Nobody;
    for local in tables.iter().flat_map(|table| local_addresses(table)) {
        if local.port() != target.port() {
            continue;
        }
        if local.ip().to_canonical() == target.ip() {
            return Ok(Bound::Address);
        }
        // an IPv6 wildcard takes IPv4 too unless told otherwise, which the table does not say
        let covers = target.family() == Family::V4 || local.is_ipv6();
        if local.ip().is_unspecified() && covers {
            bound = Bound::Wildcard;
        }
    }
    Ok(bound)
}

/// The local addresses of a `/proc/net/udp` or `udp6` table: hexadecimal words in the machine's byte order.
fn local_addresses(table: &str) -> impl Iterator<Item = SocketAddr> + '_ {
    table.lines().skip(1).filter_map(|line| {
        let (address, port) = line.split_whitespace().nth(1)?.split_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        let word = |at: usize| {
            let digits = address.get(8 * at..8 * at + 8)?;
            Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
        };
        let ip: IpAddr = if address.len() == 8 {
            Ipv4Addr::from(word(0)?).into()
        } else {
            let mut octets = [0; 16];
            for (at, four) in octets.chunks_exact_mut(4).enumerate() {
                four.copy_from_slice(&word(at)?);
            }
            Ipv6Addr::from(octets).into()
        };
        Some(SocketAddr::new(ip, port))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn addresses_of_the_tables() {
        let v4 = "   sl  local_address rem_address   st tx_queue rx_queue\n \
                  521: 0100007F:0035 00000000:0000 07 00000000:00000000\n \
                  9: 00000000:14E9 00000000:0000 07 00000000:00000000\n garbage\n";
        let v6 = "  sl  local_address                         remote_address\n \
                  7: 000080FE00000000FF00000001000000:0222 0:0 07\n \
                  8: 00000000000000000000000001000000:0035 0:0 07\n";
        let seen: Vec<String> = [v4, v6]
            .iter()
            .flat_map(|table| local_addresses(table))
            .map(|addr| addr.to_string())
            .collect();
        assert_eq!(
            seen,
            [
                "127.0.0.1:53",
                "0.0.0.0:5353",
                "[fe80::ff:0:1]:546",
                "[::1]:53"
            ]
        );
    }
}
