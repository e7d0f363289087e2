//! The sockets that instances listen with, of either protocol: made, passed on, taken over.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use socket2::{Domain, Socket, Type};

use crate::model::{ListenAddr, Protocol};
use crate::socket::udp::udp_listeners;
use crate::socket::{self, ListenError};

/// A bound socket.
#[derive(Debug)]
pub(super) enum Listening {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

/// What tells for which instances a socket is.
pub(super) type Place = (Protocol, SocketAddr);

impl Listening {
    /// Binds `count` sockets; also whether the address is on no interface yet.
    pub(super) fn bind(
        protocol: Protocol,
        addr: ListenAddr,
        count: NonZeroUsize,
    ) -> Result<(Vec<Self>, bool), ListenError> {
        Ok(match protocol {
            Protocol::Tcp => {
                let bound = socket::tcp_listeners(addr, count)?;
                let sockets = bound.sockets.into_iter().map(Self::Tcp).collect();
                (sockets, bound.address_missing)
            }
            Protocol::Udp => {
                let bound = udp_listeners(addr, count)?;
                let sockets = bound.sockets.into_iter().map(Self::Udp).collect();
                (sockets, bound.address_missing)
            }
        })
    }

    /// A descriptor that came from outside, or `None` when it is neither a listening TCP socket nor a UDP
    /// socket that is bound and not connected.
    pub(super) fn from_descriptor(descriptor: OwnedFd) -> anyhow::Result<Option<Self>> {
        let socket = Socket::from(descriptor);
        let domain = socket.domain()?;
        if domain != Domain::IPV4 && domain != Domain::IPV6 {
            return Ok(None);
        }
        let kind = socket.r#type()?;
        if kind == Type::STREAM && socket.is_listener()? {
            let listener = TcpListener::from(socket);
            socket::adopt_listener(&listener)?;
            return Ok(Some(Self::Tcp(listener)));
        }
        if kind == Type::DGRAM && socket.peer_addr().is_err() {
            let socket = UdpSocket::from(socket);
            return Ok((socket.local_addr()?.port() != 0).then_some(Self::Udp(socket)));
        }
        Ok(None)
    }

    /// Where it listens.
    pub(super) fn place(&self) -> io::Result<Place> {
        Ok(match self {
            Self::Tcp(listener) => (Protocol::Tcp, listener.local_addr()?),
            Self::Udp(socket) => (Protocol::Udp, socket.local_addr()?),
        })
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Udp(socket) => socket.as_fd(),
        }
    }
}
