//! The sockets that instances listen with, of either protocol: made, passed on, taken over.

use std::io;
use std::net::{TcpListener, UdpSocket};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use nix::errno::Errno;
use socket2::{Domain, Socket, Type};

use super::stream::StreamListener;
use super::udp::{self, one_more_udp_listener};
use super::unix::unix_listener;
use super::{Failure, Reach, adopt_listener, listeners, sharing_listener};
use crate::model::{Endpoint, InstanceOptions, Protocol, SocketMode};

/// A bound socket.
#[derive(Debug)]
pub enum Listening {
    /// Listening for connections.
    Stream(StreamListener),
    /// Not connected.
    Udp(UdpSocket),
}

/// What tells for which instances a socket is.
pub type Place = (Protocol, Endpoint);

/// Why a place cannot be listened at.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {endpoint}: cannot {}", failure.operation)]
pub struct BindError {
    /// The place.
    pub endpoint: Endpoint,
    /// The system call, and what the kernel said as the source.
    #[source]
    pub failure: Failure,
}

impl Listening {
    /// Binds `count` sockets to a place (one, where it is a Unix socket); also whether the address is on no
    /// interface yet.
    ///
    /// # Errors
    /// When the place is taken or cannot be bound.
    pub fn bind(
        endpoint: &Endpoint,
        options: &InstanceOptions,
        count: NonZeroUsize,
    ) -> Result<(Vec<Self>, bool), BindError> {
        let fail = |failure| BindError {
            endpoint: endpoint.clone(),
            failure,
        };
        let (addr, reach) = match endpoint {
            Endpoint::Unix(path) => {
                let mode = options.socket_mode.unwrap_or(SocketMode::DEFAULT);
                let listener =
                    unix_listener(path, mode, options.socket_owner.as_ref()).map_err(fail)?;
                return Ok((vec![Self::Stream(StreamListener::Unix(listener))], false));
            }
            Endpoint::Inet(addr) => (*addr, Reach::Own),
            Endpoint::Transparent(addr) => (*addr, Reach::Transparent),
        };
        Ok(match options.protocol {
            Protocol::Tcp => {
                let bound = listeners(addr, reach, count).map_err(fail)?;
                let sockets = bound
                    .sockets
                    .into_iter()
                    .map(|one| Self::Stream(one.into()));
                (sockets.collect(), bound.address_missing)
            }
            Protocol::Udp => {
                let bound = udp::listeners(addr, reach, count).map_err(fail)?;
                let sockets = bound.sockets.into_iter().map(Self::Udp);
                (sockets.collect(), bound.address_missing)
            }
        })
    }

    /// A descriptor that came from outside, or `None` when it is neither a listening TCP or Unix stream socket
    /// nor a UDP socket that is bound and not connected.
    ///
    /// # Errors
    /// When the kernel tells nothing about it, or refuses what a listener needs.
    pub fn from_descriptor(descriptor: OwnedFd) -> Result<Option<Self>, Failure> {
        let ask = "ask what a descriptor is";
        let socket = Socket::from(descriptor);
        let domain = socket.domain().map_err(Failure::at(ask))?;
        let kind = socket.r#type().map_err(Failure::at(ask))?;
        let listens = kind == Type::STREAM && socket.is_listener().map_err(Failure::at(ask))?;
        if domain == Domain::UNIX && listens {
            socket
                .set_nonblocking(true)
                .map_err(Failure::at("set O_NONBLOCK"))?;
            let listener = StreamListener::Unix(UnixListener::from(OwnedFd::from(socket)));
            // without a path it is in no configuration
            return Ok(listener
                .endpoint()
                .is_ok()
                .then_some(Self::Stream(listener)));
        }
        if domain != Domain::IPV4 && domain != Domain::IPV6 {
            return Ok(None);
        }
        if listens {
            let listener = TcpListener::from(socket);
            adopt_listener(&listener)?;
            return Ok(Some(Self::Stream(listener.into())));
        }
        if kind == Type::DGRAM && socket.peer_addr().is_err() {
            let socket = UdpSocket::from(socket);
            let bound = socket.local_addr().map_err(Failure::at(ask))?.port() != 0;
            return Ok(bound.then_some(Self::Udp(socket)));
        }
        Ok(None)
    }

    /// One more for the same address: a socket of its own where the kernel shares the address out
    /// (`SO_REUSEPORT`). Where it does not, because systemd bound it, this TCP socket once more.
    ///
    /// # Errors
    /// When descriptors run out, or UDP's address is not shared.
    pub fn another(&self) -> Result<Self, Failure> {
        let (_, endpoint) = self
            .place()
            .map_err(Failure::at("read the bound address"))?;
        let own = match (self, endpoint) {
            (Self::Udp(_), Endpoint::Inet(addr)) => {
                return Ok(Self::Udp(one_more_udp_listener(addr, Reach::Own)?));
            }
            (Self::Udp(_), Endpoint::Transparent(addr)) => {
                return Ok(Self::Udp(one_more_udp_listener(addr, Reach::Transparent)?));
            }
            (Self::Stream(StreamListener::Tcp(_)), Endpoint::Inet(addr)) => {
                sharing_listener(addr, Reach::Own)
            }
            (Self::Stream(StreamListener::Tcp(_)), Endpoint::Transparent(addr)) => {
                sharing_listener(addr, Reach::Transparent)
            }
            // its file has one socket
            _ => Err(Failure::at("bind")(io::Error::from_raw_os_error(
                libc::EADDRINUSE,
            ))),
        };
        match (self, own) {
            (Self::Stream(listener), Err(failure))
                if failure.errno() == Some(Errno::EADDRINUSE) =>
            {
                let same = listener.try_clone();
                Ok(Self::Stream(same.map_err(Failure::at("share a listener"))?))
            }
            (_, own) => Ok(Self::Stream(own?.into())),
        }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn place(&self) -> io::Result<Place> {
        Ok(match self {
            Self::Stream(listener) => (Protocol::Tcp, listener.endpoint()?),
            Self::Udp(socket) => {
                let addr = socket.local_addr()?;
                (Protocol::Udp, Reach::of(socket, addr)?.at(addr))
            }
        })
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Stream(listener) => listener.as_fd(),
            Self::Udp(socket) => socket.as_fd(),
        }
    }
}
