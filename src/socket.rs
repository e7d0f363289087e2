//! Every socket option there is: listeners, and spoofed, marked connections to a target.
//!
//! Owns: which options a socket gets, in which order, and what the kernel's answers to them mean.
//! Must not know: connections as a whole, counters, log lines.

mod ephemeral;
mod loopback;
mod raw;

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};

use crate::model::{ClientAddr, Endpoint, Family, ListenAddr, Mark, PortPolicy, TargetAddr};

pub mod connected;
pub mod listening;
pub mod stream;
pub mod udp;
pub mod unix;

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
/// `TCP_NODELAY`, `SO_KEEPALIVE` and its times.
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
    socket
        .set_tcp_nodelay(true)
        .map_err(Failure::at("set TCP_NODELAY"))?;
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
    socket
        .set_tcp_nodelay(true)
        .map_err(Failure::at("set TCP_NODELAY"))?;
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

/// A connection to a target that comes from the client's address.
#[derive(Debug, Clone, Copy)]
pub struct Spoof {
    /// Whose address it comes from; port 0 means that no port is known.
    pub client: ClientAddr,
    /// Where it goes; of the client's family.
    pub target: TargetAddr,
    /// The mark of the pathway, where there is one.
    pub mark: Option<Mark>,
    /// Whether the client's port is kept.
    pub port: PortPolicy,
}

/// A spoofed connection that was begun.
#[derive(Debug)]
pub struct Spoofed {
    /// The socket, non-blocking, connecting or connected already (on loopback usually connected).
    pub socket: TcpStream,
    /// The port that the socket has.
    pub port: u16,
    /// The client's port was taken (or is privileged and not permitted): the kernel chose another.
    pub port_given_up: bool,
}

/// Why a spoofed connection was not begun.
#[derive(Debug, thiserror::Error)]
pub enum SpoofError {
    /// A system call failed.
    #[error("cannot {}", .0.operation)]
    Failed(#[source] Failure),
    /// The client's address is a broadcast address of one of this host's networks.
    #[error("{0} is a broadcast address of this host's networks")]
    Broadcast(IpAddr),
    /// The kernel replaced the source address: the service would have believed in a wrong client.
    #[error("the kernel replaced the source address {wanted} by {got}")]
    SourceReplaced {
        /// The client.
        wanted: IpAddr,
        /// What `getsockname` says.
        got: IpAddr,
    },
}

/// Begins a connection to the target that comes from the client's address and carries the mark.
///
/// A taken port is given up and the address kept, never the other way round. A client whose address
/// is local to this host gets no mark: its pathway's `from <own address>` rule would capture the
/// relay's own packets.
///
/// # Errors
/// When the socket cannot be made, or its source address would not be the client's. A target that
/// does not answer or refuses is seen later, on the socket.
pub fn spoofed_tcp(spoof: &Spoof) -> Result<Spoofed, SpoofError> {
    let wanted = match spoof.port {
        PortPolicy::Keep => spoof.client.port(),
        PortPolicy::Any => 0,
    };
    let mut way = SourcePort::best(wanted);
    let socket = loop {
        match (begin(spoof, way), way.otherwise()) {
            (Err(SpoofError::Failed(failure)), Some(next)) if way.is_barred(&failure) => way = next,
            (outcome, _) => break outcome?,
        }
    };
    let local = socket
        .local_addr()
        .map_err(|error| SpoofError::Failed(Failure::at("read the source address")(error)))?;
    let got = local.ip().to_canonical();
    // bind() to 0.0.0.0, multicast and broadcast succeeds, and connect() then takes an address of
    // the host: whoever gets past the checks must still not become somebody else
    if got != spoof.client.ip() {
        reset_on_close(&socket);
        return Err(SpoofError::SourceReplaced {
            wanted: spoof.client.ip(),
            got,
        });
    }
    Ok(Spoofed {
        socket,
        port: local.port(),
        port_given_up: wanted != 0 && local.port() != wanted,
    })
}

/// How a spoofed connection comes by its source port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SourcePort {
    /// `connect()` may choose this one only, which leaves it to the host's own connections, too.
    Shared(u16),
    /// Bound: a tuple in TIME_WAIT can be used again at once.
    Bound(u16),
    /// As `connect()` chooses.
    Any,
}

impl SourcePort {
    fn best(wanted: u16) -> Self {
        match wanted {
            0 => Self::Any,
            port if ephemeral::contains(port) => Self::Shared(port),
            port => Self::Bound(port),
        }
    }

    fn otherwise(self) -> Option<Self> {
        match self {
            Self::Shared(port) => Some(Self::Bound(port)),
            Self::Bound(_) => Some(Self::Any),
            Self::Any => None,
        }
    }

    /// Whether a failure is about the port, or about this way to it.
    ///
    /// Shared, connect: EADDRNOTAVAIL beside anybody bound to that port, where the tuple is alive, and
    /// for the first second of its TIME_WAIT; ENOPROTOOPT on an old kernel. Bound, bind: EADDRINUSE
    /// beside a listener on that port, EACCES below 1024 without CAP_NET_BIND_SERVICE; connect:
    /// EADDRNOTAVAIL where the tuple is alive.
    fn is_barred(self, failure: &Failure) -> bool {
        match failure.errno() {
            Some(Errno::EADDRINUSE | Errno::EADDRNOTAVAIL | Errno::EACCES) => true,
            Some(Errno::ENOPROTOOPT) => matches!(self, Self::Shared(_)),
            _ => false,
        }
    }
}

fn begin(spoof: &Spoof, port: SourcePort) -> Result<TcpStream, SpoofError> {
    begin_unchecked(spoof, port).map_err(|error| match error {
        Begin::Failed(failure) => SpoofError::Failed(failure),
        Begin::Broadcast => SpoofError::Broadcast(spoof.client.ip()),
    })
}

enum Begin {
    Failed(Failure),
    Broadcast,
}

impl From<Failure> for Begin {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

fn begin_unchecked(spoof: &Spoof, port: SourcePort) -> Result<TcpStream, Begin> {
    let ip = spoof.client.ip();
    let bound = match port {
        SourcePort::Bound(port) => port,
        SourcePort::Shared(_) | SourcePort::Any => 0,
    };
    let source = SockAddr::from(SocketAddr::new(ip, bound));
    let socket = Socket::new(
        Domain::for_address(spoof.client.get()),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )
    .map_err(Failure::at("open a socket"))?;
    // a tuple in TIME_WAIT can be used again at once
    socket
        .set_reuse_address(true)
        .map_err(Failure::at("set SO_REUSEADDR"))?;
    if bound == 0 {
        // the port is chosen at connect, per target: a plain bind to port 0 would take the port away
        // from all of the host's own connections
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)
            .map_err(|errno| Failure::at("set IP_BIND_ADDRESS_NO_PORT")(errno.into()))?;
    }
    if let SourcePort::Shared(port) = port {
        ephemeral::keep_to(&socket, port).map_err(Failure::at("set IP_LOCAL_PORT_RANGE"))?;
    }
    // Whether an address is local is asked anew for each connection, because addresses change at run
    // time: without IP_TRANSPARENT bind() to any other address fails, before it looks at the port,
    // which is cheaper than any table of our own. Where it succeeds the address is local, or
    // net.ipv4.ip_nonlocal_bind is on: only then a look-up decides.
    let spoofing = match socket.bind(&source) {
        Ok(()) => match locality(ip).map_err(Failure::at("look up the client's address"))? {
            Locality::Local => false,
            Locality::Foreign => {
                set_transparent(&socket, spoof.client.family())?;
                true
            }
            Locality::Broadcast => return Err(Begin::Broadcast),
        },
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
            set_transparent(&socket, spoof.client.family())?;
            socket
                .bind(&source)
                .map_err(Failure::at("bind to the client's address"))?;
            true
        }
        Err(error) => return Err(Failure::at("bind to the client's address")(error).into()),
    };
    if let Some(mark) = spoof.mark.filter(|_| spoofing) {
        socket
            .set_mark(mark.get())
            .map_err(Failure::at("set SO_MARK"))?;
    }
    socket
        .set_tcp_nodelay(true)
        .map_err(Failure::at("set TCP_NODELAY"))?;
    if spoof.target.ip().is_loopback() {
        // the kernel itself knows when the service is gone: no keepalive
        loopback::send_at_once(&socket, spoof.target.ip());
    } else {
        set_keepalive(&socket)?;
    }
    match socket.connect(&SockAddr::from(spoof.target.get())) {
        Ok(()) => Ok(TcpStream::from(socket)),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            Ok(TcpStream::from(socket))
        }
        Err(error) => Err(Failure::at("connect")(error).into()),
    }
}

fn set_transparent(socket: &Socket, family: Family) -> Result<(), Failure> {
    match family {
        Family::V4 => socket.set_ip_transparent_v4(true),
        Family::V6 => socket.set_ip_transparent_v6(true),
    }
    .map_err(Failure::at("set IP_TRANSPARENT"))
}

#[derive(Debug, PartialEq, Eq)]
enum Locality {
    Local,
    Foreign,
    Broadcast,
}

/// Asks the routing tables, without regard to `ip_nonlocal_bind`. Connecting a datagram socket sends
/// nothing; the port (discard) plays no part.
///
/// IPv4: the output look-up refuses (EINVAL) a bound source that is not local. The source it would
/// choose itself does not tell: towards a secondary address that is the primary one.
/// IPv6: the look-up takes any bound source, and the source it chooses towards a local address is that
/// very address (RFC 6724, rule 1).
fn locality(ip: IpAddr) -> io::Result<Locality> {
    let bound = match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let outcome = UdpSocket::bind((bound, 0)).and_then(|socket| {
        socket.connect((ip, 9))?;
        socket.local_addr()
    });
    match outcome {
        Ok(source) if source.ip() == ip => Ok(Locality::Local),
        Ok(_) => Ok(Locality::Foreign),
        Err(error) => match error.raw_os_error() {
            Some(libc::EACCES) => Ok(Locality::Broadcast),
            Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH | libc::EHOSTUNREACH) => {
                Ok(Locality::Foreign)
            }
            _ => Err(error),
        },
    }
}
