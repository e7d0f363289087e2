//! Listeners that connections come from, TCP or Unix, and taking connections off them.
//!
//! A connection is one kind of value whatever it came over: everything a relay does with it (read, write,
//! splice, half-close, poll) is the same system call for both. What only TCP has fails harmlessly on a Unix
//! socket: its peer address, `TCP_NODELAY`, a reset at close (the peer sees an ordinary end instead).

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::socket::{getsockopt, sockopt};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

use super::Reach;
use crate::model::{Endpoint, ProxyAddr, SocketPath};

/// A listening stream socket, non-blocking.
#[derive(Debug)]
pub enum StreamListener {
    /// TCP.
    Tcp(TcpListener),
    /// Unix.
    Unix(UnixListener),
}

impl StreamListener {
    /// Where it listens.
    ///
    /// # Errors
    /// When the kernel does not tell, or the socket has no path.
    pub fn endpoint(&self) -> io::Result<Endpoint> {
        match self {
            Self::Tcp(listener) => {
                let addr = listener.local_addr()?;
                Ok(Reach::of(listener, addr)?.at(addr))
            }
            Self::Unix(listener) => {
                let addr = listener.local_addr()?;
                let path = addr
                    .as_pathname()
                    .ok_or_else(|| io::Error::other("a Unix socket without a path"))?;
                Ok(Endpoint::Unix(SocketPath::bound(PathBuf::from(path))))
            }
        }
    }

    /// The same socket once more.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(listener) => Self::Tcp(listener.try_clone()?),
            Self::Unix(listener) => Self::Unix(listener.try_clone()?),
        })
    }
}

impl From<TcpListener> for StreamListener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

impl AsFd for StreamListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

/// A listener that an event loop watches. Several owners share one descriptor: a process with thousands
/// of listeners cannot afford two each.
#[derive(Debug)]
pub struct Acceptor {
    watched: AsyncFd<Shared>,
    port: ToPort,
}

/// Which port connections came to.
#[derive(Debug, Clone, Copy)]
enum ToPort {
    /// The listener's own.
    Own(u16),
    /// Each its own: rules hand those of many ports to one listener.
    Varies,
}

#[derive(Debug)]
struct Shared(Arc<StreamListener>);

impl AsRawFd for Shared {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Acceptor {
    /// Watches a listener. Within an event loop.
    ///
    /// # Errors
    /// When it cannot be watched, or the kernel does not tell its port.
    pub fn new(listener: Arc<StreamListener>) -> io::Result<Self> {
        let port = match listener.endpoint()? {
            Endpoint::Transparent(_) => ToPort::Varies,
            endpoint => ToPort::Own(endpoint.port()),
        };
        // SAFETY: the AsyncFd shares the listener's ownership, whose descriptor therefore stays open under the
        // same number for as long as it is registered; nothing can replace it behind the Arc
        #[expect(
            unsafe_code,
            reason = "tokio cannot know that the number stays the same"
        )]
        let watched =
            unsafe { AsyncFd::register_with_interest(Shared(listener), Interest::READABLE) };
        Ok(Self {
            watched: watched.map_err(io::Error::from)?,
            port,
        })
    }

    /// The listener.
    pub fn listener(&self) -> &StreamListener {
        &self.watched.get_ref().0
    }

    /// Takes a connection that is there, or `WouldBlock`.
    ///
    /// # Errors
    /// As `accept(2)`.
    pub fn accept_now(&self) -> io::Result<Taken> {
        accept(self.listener(), self.port)
    }

    /// Waits until there may be connections. Cancel-safe.
    ///
    /// # Errors
    /// When the event loop ends.
    pub async fn ready(&self) -> io::Result<Ready<'_>> {
        Ok(Ready {
            guard: self.watched.readable().await?,
            port: self.port,
        })
    }
}

/// A connection that was taken off its listener.
#[derive(Debug)]
pub struct Taken {
    /// Non-blocking, registered with no event loop.
    pub socket: TcpStream,
    /// Its sender.
    pub peer: ProxyAddr,
    /// The port it came to; 0 on a Unix socket.
    pub port: u16,
}

/// There may be connections.
#[derive(Debug)]
pub struct Ready<'a> {
    guard: AsyncFdReadyGuard<'a, Shared>,
    port: ToPort,
}

impl Ready<'_> {
    /// Takes one: non-blocking, registered with no event loop, with its sender. `None` when all are taken;
    /// then it is time to wait again.
    pub fn accept(&mut self) -> Option<io::Result<Taken>> {
        let port = self.port;
        self.guard
            .try_io(|shared| accept(&shared.get_ref().0, port))
            .ok()
    }
}

/// Takes one connection off a listener.
fn accept(listener: &StreamListener, port: ToPort) -> io::Result<Taken> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let (socket, peer) = SockRef::from(listener).accept4(flags)?;
    let peer = match peer.as_socket() {
        Some(addr) => ProxyAddr::new(addr),
        None => {
            // the pid is for people; a peer in another pid namespace has none
            let pid = getsockopt(&socket, sockopt::PeerCredentials)
                .map_or(0, |peer| u32::try_from(peer.pid()).unwrap_or(0));
            ProxyAddr::Local(pid)
        }
    };
    let socket = TcpStream::from(OwnedFd::from(socket));
    let port = match port {
        ToPort::Own(port) => port,
        // its own address is where the proxy sent it to
        ToPort::Varies => socket.local_addr()?.port(),
    };
    Ok(Taken { socket, peer, port })
}
