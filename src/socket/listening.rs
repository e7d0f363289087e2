//! The sockets that instances listen with, of either protocol: made, passed on, taken over.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use socket2::{Domain, Socket, Type};

use super::udp::{one_more_udp_listener, udp_listeners};
use super::{Failure, ListenError, adopt_listener, sharing_listener, tcp_listeners};
use crate::model::{ListenAddr, Protocol};

/// A bound socket.
#[derive(Debug)]
pub enum Listening {
    /// Listening.
    Tcp(TcpListener),
    /// Not connected.
    Udp(UdpSocket),
}

/// What tells for which instances a socket is.
pub type Place = (Protocol, SocketAddr);

impl Listening {
    /// Binds `count` sockets; also whether the address is on no interface yet.
    ///
    /// # Errors
    /// When the address is taken or cannot be bound.
    pub fn bind(
        protocol: Protocol,
        addr: ListenAddr,
        count: NonZeroUsize,
    ) -> Result<(Vec<Self>, bool), ListenError> {
        Ok(match protocol {
            Protocol::Tcp => {
                let bound = tcp_listeners(addr, count)?;
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
    ///
    /// # Errors
    /// When the kernel tells nothing about it, or refuses what a listener needs.
    pub fn from_descriptor(descriptor: OwnedFd) -> Result<Option<Self>, Failure> {
        let ask = "ask what a descriptor is";
        let socket = Socket::from(descriptor);
        let domain = socket.domain().map_err(Failure::at(ask))?;
        if domain != Domain::IPV4 && domain != Domain::IPV6 {
            return Ok(None);
        }
        let kind = socket.r#type().map_err(Failure::at(ask))?;
        if kind == Type::STREAM && socket.is_listener().map_err(Failure::at(ask))? {
            let listener = TcpListener::from(socket);
            adopt_listener(&listener)?;
            return Ok(Some(Self::Tcp(listener)));
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
        let (_, addr) = self
            .place()
            .map_err(Failure::at("read the bound address"))?;
        match self {
            Self::Udp(_) => Ok(Self::Udp(one_more_udp_listener(addr)?)),
            Self::Tcp(listener) => match sharing_listener(addr) {
                Err(failure) if failure.errno() == Some(Errno::EADDRINUSE) => {
                    let same = listener.try_clone();
                    Ok(Self::Tcp(same.map_err(Failure::at("share a listener"))?))
                }
                own => Ok(Self::Tcp(own?)),
            },
        }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn place(&self) -> io::Result<Place> {
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
