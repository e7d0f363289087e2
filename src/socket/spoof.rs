//! Connections to a target that come from the client's address and carry the pathway's mark.
//!
//! Owns: the source's address and port, and what the kernel's answers about them mean. Must not know:
//! listeners, what becomes of a connection.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{
    Failure, ephemeral, loopback, reset_on_close, set_keepalive, set_stream, set_transparent,
};
use crate::model::{ClientAddr, Mark, PortPolicy, TargetAddr};

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
    set_stream(&socket)?;
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

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Locality {
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
pub(super) fn locality(ip: IpAddr) -> io::Result<Locality> {
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
