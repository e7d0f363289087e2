//! The relay of an instance, of either protocol.

use std::io;
use std::sync::Arc;

use super::listening::Listening;
use crate::model::{AllowList, Instance, Protocol};
use crate::relay::settings::Settings;
use crate::relay::workers::Workers;
use crate::relay::{tcp, udp};

/// A running relay.
#[derive(Debug)]
pub(super) enum Server {
    Tcp(tcp::Server),
    Udp(udp::Server),
}

/// Why one could not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    Tcp(#[from] tcp::Error),
    #[error(transparent)]
    Udp(#[from] udp::Error),
}

impl Server {
    /// Starts the relay of an instance on sockets of its protocol; others are closed.
    pub(super) fn start(
        workers: &Workers,
        sockets: Vec<Listening>,
        instance: &Instance,
        allow: Arc<AllowList>,
    ) -> Result<Self, Error> {
        let sockets = sockets.into_iter();
        Ok(match instance.options.protocol {
            Protocol::Tcp => {
                let of_kind = |socket| match socket {
                    Listening::Tcp(listener) => Some(listener),
                    Listening::Udp(_) => None,
                };
                let listeners = sockets.filter_map(of_kind).collect();
                let settings = Settings::of(instance, allow);
                Self::Tcp(tcp::Server::start(workers, listeners, settings)?)
            }
            Protocol::Udp => {
                let of_kind = |socket| match socket {
                    Listening::Udp(socket) => Some(socket),
                    Listening::Tcp(_) => None,
                };
                let listeners = sockets.filter_map(of_kind).collect();
                let settings = udp::Settings::of(instance, allow);
                Self::Udp(udp::Server::start(workers, listeners, settings)?)
            }
        })
    }

    /// Its sockets, once more, for whoever listens next; none once it drains.
    pub(super) fn listeners(&self) -> io::Result<Vec<Listening>> {
        Ok(match self {
            Self::Tcp(server) => {
                let listeners = server.listeners()?.into_iter();
                listeners.map(Listening::Tcp).collect()
            }
            Self::Udp(server) => {
                let listeners = server.listeners()?.into_iter();
                listeners.map(Listening::Udp).collect()
            }
        })
    }

    /// Treats what comes from here on by the instance's new line, of the same protocol.
    pub(super) fn set(&self, instance: &Instance, allow: Arc<AllowList>) {
        match self {
            Self::Tcp(server) => server.set(Settings::of(instance, allow)),
            Self::Udp(server) => server.set(udp::Settings::of(instance, allow)),
        }
    }

    pub(super) fn drain(&self) {
        match self {
            Self::Tcp(server) => server.drain(),
            Self::Udp(server) => server.drain(),
        }
    }

    /// Connections or flows there are now.
    pub(super) fn active(&self) -> u64 {
        match self {
            Self::Tcp(server) => server.totals().active,
            Self::Udp(server) => server.totals().flows,
        }
    }

    /// Waits until everything has ended. Cancel-safe.
    pub(super) async fn ended(&self) -> Result<(), Error> {
        match self {
            Self::Tcp(server) => server.ended().await?,
            Self::Udp(server) => server.ended().await?,
        }
        Ok(())
    }
}
