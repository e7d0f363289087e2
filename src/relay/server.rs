//! The relay of an instance, of either protocol.

use std::io;
use std::sync::Arc;

use super::counters::Totals;
use super::ports::Port;
use super::report::LastError;
use super::settings::Settings;
use super::view::Query;
use super::workers::Workers;
use super::{tcp, udp};
use crate::model::{AllowList, Instance, Protocol};
use crate::socket::listening::Listening;

/// A running relay.
#[derive(Debug)]
pub enum Server {
    /// Of connections.
    Tcp(tcp::Server),
    /// Of datagrams.
    Udp(udp::Server),
}

/// Why one could not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Of connections.
    #[error(transparent)]
    Tcp(#[from] tcp::Error),
    /// Of datagrams.
    #[error(transparent)]
    Udp(#[from] udp::Error),
}

impl Server {
    /// Starts the relay of an instance on sockets of its protocol; others are closed.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn start(
        workers: &Workers,
        sockets: Vec<Listening>,
        instance: &Instance,
        allow: Arc<AllowList>,
    ) -> Result<Self, Error> {
        let sockets = sockets.into_iter();
        Ok(match instance.options.protocol {
            Protocol::Tcp => {
                let of_kind = |socket| match socket {
                    Listening::Stream(listener) => Some(listener),
                    Listening::Udp(_) => None,
                };
                let listeners = sockets.filter_map(of_kind).collect();
                let settings = Settings::of(instance, allow);
                Self::Tcp(tcp::Server::start(workers, listeners, settings)?)
            }
            Protocol::Udp => {
                let of_kind = |socket| match socket {
                    Listening::Udp(socket) => Some(socket),
                    Listening::Stream(_) => None,
                };
                let listeners = sockets.filter_map(of_kind).collect();
                let settings = udp::Settings::of(instance, allow);
                Self::Udp(udp::Server::start(workers, listeners, settings)?)
            }
        })
    }

    /// Its sockets, once more, for whoever listens next; none once it drains.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn listeners(&self) -> io::Result<Vec<Listening>> {
        Ok(match self {
            Self::Tcp(server) => {
                let listeners = server.listeners()?.into_iter();
                listeners.map(Listening::Stream).collect()
            }
            Self::Udp(server) => {
                let listeners = server.listeners()?.into_iter();
                listeners.map(Listening::Udp).collect()
            }
        })
    }

    /// What came to each port of a range.
    pub fn ports(&self) -> Vec<Port> {
        match self {
            Self::Tcp(server) => server.ports(),
            Self::Udp(server) => server.ports(),
        }
    }

    /// Treats what comes from here on by the instance's new line, of the same protocol.
    pub fn set(&self, instance: &Instance, allow: Arc<AllowList>) {
        match self {
            Self::Tcp(server) => server.set(Settings::of(instance, allow)),
            Self::Udp(server) => server.set(udp::Settings::of(instance, allow)),
        }
    }

    /// Takes nothing new from here on.
    pub fn drain(&self) {
        match self {
            Self::Tcp(server) => server.drain(),
            Self::Udp(server) => server.drain(),
        }
    }

    /// Connections or flows there are now.
    pub fn active(&self) -> u64 {
        match self {
            Self::Tcp(server) => server.totals().active,
            Self::Udp(server) => server.totals().flows,
        }
    }

    /// What both protocols count; flows count as connections.
    pub fn totals(&self) -> Totals {
        match self {
            Self::Tcp(server) => server.totals(),
            Self::Udp(server) => server.totals().into(),
        }
    }

    /// What UDP counts beyond that.
    pub fn datagrams(&self) -> Option<udp::counters::Totals> {
        match self {
            Self::Tcp(_) => None,
            Self::Udp(server) => Some(server.totals()),
        }
    }

    /// What was last said about a peer that was not served.
    pub fn last_error(&self) -> Option<LastError> {
        match self {
            Self::Tcp(server) => server.last_error(),
            Self::Udp(server) => server.last_error(),
        }
    }

    /// The last line of each kind about each proxy, the newest last.
    pub fn recent_errors(&self) -> Vec<LastError> {
        match self {
            Self::Tcp(server) => server.recent_errors(),
            Self::Udp(server) => server.recent_errors(),
        }
    }

    /// Asks every worker about connections or flows. Each answers once, in its turn; the reply's receiver ends
    /// after the last.
    pub fn ask(&self, query: &Query) {
        match self {
            Self::Tcp(server) => server.ask(query),
            Self::Udp(server) => server.ask(query),
        }
    }

    /// Waits until everything has ended, after a drain, or until it fails. Cancel-safe.
    ///
    /// # Errors
    /// The first worker's that failed.
    pub async fn ended(&self) -> Result<(), Error> {
        match self {
            Self::Tcp(server) => server.ended().await?,
            Self::Udp(server) => server.ended().await?,
        }
        Ok(())
    }
}
