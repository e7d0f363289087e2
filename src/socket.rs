//! Every socket option there is: listeners, and spoofed, marked connections to a target.
//!
//! Owns: which options a socket gets, in which order, and what the kernel's answers to them mean; TCP
//! listeners here, the rest by file. Must not know: connections as a whole, counters, log lines.

mod ephemeral;
mod loopback;
mod raw;
mod spoof;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};

use crate::model::{Endpoint, Family, ListenAddr};

pub mod connected;
pub mod listening;
pub mod stream;
pub mod udp;
pub mod unix;

pub use spoof::{Spoof, SpoofError, Spoofed, spoofed_tcp};

/// What is asked of the kernel for connections: the system's own limit (`net.core.somaxconn`) cuts it.
const BACKLOG: i32 = i32::MAX;

/// How many proxies may be in the middle of a TCP Fast Open at a time; others connect as usual.
const FAST_OPENS: u32 = 1024;

/// After how long without a byte a peer is asked whether it is still there.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
/// How long the peer has for an answer.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// After how many answers that did not come the connection ends.
const KEEPALIVE_PROBES: u32 = 4;

/// A system call on a socket that failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation}")]
pub struct Failure {
    /// What was tried, as a verb phrase that ends the sentence "cannot …".
    pub operation: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

impl Failure {
    fn at(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { operation, source }
    }

    /// The kernel's error number, where it was the kernel.
    pub fn errno(&self) -> Option<Errno> {
        self.source.raw_os_error().map(Errno::from_raw)
    }
}

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {addr}: cannot {operation}")]
pub struct ListenError {
    /// The address.
    pub addr: ListenAddr,
    /// What was tried.
    pub operation: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

impl From<ListenError> for Failure {
    fn from(error: ListenError) -> Self {
        Self {
            operation: error.operation,
            source: error.source,
        }
    }
}

impl ListenError {
    fn on(addr: ListenAddr) -> impl Fn(Failure) -> Self {
        move |Failure { operation, source }| Self {
            addr,
            operation,
            source,
        }
    }
}

/// Sockets that share one listen address.
#[derive(Debug)]
pub struct Listeners {
    /// The sockets, bound and listening, non-blocking; as many as were asked for.
    pub sockets: Vec<TcpListener>,
    /// The address is on no interface of this host yet; connections arrive once it is.
    pub address_missing: bool,
}

/// Binds `count` sockets to one address (`SO_REUSEPORT`); port 0 takes one free port for all of them.
///
/// What an accepted socket inherits from its listener is set here once, not per connection:
/// `TCP_NODELAY`, `SO_OOBINLINE`, `SO_KEEPALIVE` and its times.
///
/// # Errors
/// When the address is in use, also by another program that set `SO_REUSEPORT`, or cannot be bound.
pub fn tcp_listeners(addr: ListenAddr, count: NonZeroUsize) -> Result<Listeners, ListenError> {
    listeners(addr.get(), Reach::Own, count).map_err(ListenError::on(addr))
}

fn listeners(addr: SocketAddr, reach: Reach, count: NonZeroUsize) -> Result<Listeners, Failure> {
    // Without SO_REUSEPORT bind() tells whether somebody listens there already; with it, a second
    // program of the same user would silently get half of the connections. The probe never listens:
    // it is in nobody's way, not even while a child that is just being forked still holds it open.
    let probe = bound(addr, reach, Sharing::Exclusive)?;
    let addr = probe
        .socket
        .local_addr()
        .map_err(Failure::at("read the bound address"))?
        .as_socket()
        .unwrap_or(addr);
    let sockets = (0..count.get())
        .map(|_| sharing_listener(addr, reach))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Listeners {
        sockets,
        address_missing: probe.address_missing,
    })
}

/// One more listener on an address that others of this user listen on with `SO_REUSEPORT`.
fn sharing_listener(addr: SocketAddr, reach: Reach) -> Result<TcpListener, Failure> {
    let socket = bound(addr, reach, Sharing::ReusePort)?.socket;
    set_stream(&socket)?;
    set_keepalive(&socket)?;
    loopback::send_at_once(&socket, addr.ip());
    // The header comes with the SYN, a round trip earlier, where this host (net.ipv4.tcp_fastopen)
    // and the proxy both want that. Never towards the service: a cookie belongs to a source
    // address, and each client is a new one.
    let _ = raw::set(&socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, FAST_OPENS);
    socket.listen(BACKLOG).map_err(Failure::at("listen"))?;
    Ok(TcpListener::from(socket))
}

/// What a listening socket can get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// What is sent to its address.
    Own,
    /// Also what the kernel's rules hand to it, whatever the address (`IP_TRANSPARENT`); so its own may be
    /// anybody's.
    Transparent,
}

impl Reach {
    /// That of a socket that is there.
    fn of(socket: &impl AsFd, addr: SocketAddr) -> io::Result<Self> {
        let socket = SockRef::from(socket);
        let transparent = match addr {
            SocketAddr::V4(_) => socket.ip_transparent_v4()?,
            SocketAddr::V6(_) => socket.ip_transparent_v6()?,
        };
        Ok(if transparent {
            Self::Transparent
        } else {
            Self::Own
        })
    }

    /// A place of this kind.
    fn at(self, addr: SocketAddr) -> Endpoint {
        match self {
            Self::Own => Endpoint::Inet(addr),
            Self::Transparent => Endpoint::Transparent(addr),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sharing {
    Exclusive,
    ReusePort,
}

struct Bound {
    socket: Socket,
    address_missing: bool,
}

fn bound(addr: SocketAddr, reach: Reach, sharing: Sharing) -> Result<Bound, Failure> {
    let socket = Socket::new(
        Domain::for_address(addr),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )
    .map_err(Failure::at("open a socket"))?;
    if addr.is_ipv6() {
        socket
            .set_only_v6(true)
            .map_err(Failure::at("set IPV6_V6ONLY"))?;
    }
    socket
        .set_reuse_address(true)
        .map_err(Failure::at("set SO_REUSEADDR"))?;
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
    Ok(Bound {
        socket,
        address_missing,
    })
}

/// What a relayed connection has at both ends: bytes leave at once, urgent ones among the others (RFC 6093; else
/// the last of them would be left out of the stream).
fn set_stream(socket: &Socket) -> Result<(), Failure> {
    socket
        .set_tcp_nodelay(true)
        .map_err(Failure::at("set TCP_NODELAY"))?;
    socket
        .set_out_of_band_inline(true)
        .map_err(Failure::at("set SO_OOBINLINE"))
}

fn set_keepalive(socket: &Socket) -> Result<(), Failure> {
    socket
        .set_tcp_keepalive(
            &TcpKeepalive::new()
                .with_time(KEEPALIVE_AFTER)
                .with_interval(KEEPALIVE_INTERVAL)
                .with_retries(KEEPALIVE_PROBES),
        )
        .map_err(Failure::at("set SO_KEEPALIVE"))
}

/// Gives a listening socket that somebody else bound what [`tcp_listeners`] gives its own.
///
/// # Errors
/// When the kernel refuses an option.
pub fn adopt_listener(listener: &TcpListener) -> Result<(), Failure> {
    let socket = SockRef::from(listener);
    socket
        .set_nonblocking(true)
        .map_err(Failure::at("set O_NONBLOCK"))?;
    set_stream(&socket)?;
    set_keepalive(&socket)
}

/// Makes the coming close of a socket a reset: the peer sees ECONNRESET, and no TIME_WAIT is left here.
pub fn reset_on_close(socket: &impl AsFd) {
    // fails only on a descriptor that is no socket; the close then is an ordinary one
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

/// Whether this process may spoof addresses and mark packets.
///
/// # Errors
/// `EPERM` without CAP_NET_ADMIN in the user namespace that owns the network namespace.
pub fn may_spoof() -> Result<(), Failure> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))
        .map_err(Failure::at("open a socket"))?;
    socket
        .set_ip_transparent_v4(true)
        .map_err(Failure::at("set IP_TRANSPARENT"))?;
    // any mark will do: the socket is never connected
    socket.set_mark(1).map_err(Failure::at("set SO_MARK"))
}

fn set_transparent(socket: &Socket, family: Family) -> Result<(), Failure> {
    match family {
        Family::V4 => socket.set_ip_transparent_v4(true),
        Family::V6 => socket.set_ip_transparent_v6(true),
    }
    .map_err(Failure::at("set IP_TRANSPARENT"))
}
