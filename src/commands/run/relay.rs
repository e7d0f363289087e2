//! The relay of an instance, of either protocol, as `run` sees it.

use std::num::NonZeroUsize;

use anyhow::Result;
use tracing::info;

use crate::config::Configuration;
use crate::model::{Instance, InstanceName, Protocol};
use crate::relay::settings::Settings;
use crate::relay::{tcp, udp};
use crate::socket;
use crate::socket::udp::udp_listeners;

/// A running relay.
pub(super) enum Relay {
    Tcp(tcp::Server),
    Udp(udp::Server),
}

impl Relay {
    /// Binds and starts; also whether the listen address is still missing.
    pub(super) fn start(
        configuration: &Configuration,
        instance: &Instance,
        workers: NonZeroUsize,
        listeners: NonZeroUsize,
    ) -> Result<(Self, bool)> {
        let allow = configuration.allow_list(instance);
        Ok(match instance.options.protocol {
            Protocol::Tcp => {
                let bound = socket::tcp_listeners(instance.listen, listeners)?;
                let settings = Settings::of(instance, allow);
                let server = tcp::Server::start(bound.sockets, settings, workers)?;
                (Self::Tcp(server), bound.address_missing)
            }
            Protocol::Udp => {
                let bound = udp_listeners(instance.listen, listeners)?;
                let settings = udp::Settings::of(instance, allow);
                let server = udp::Server::start(bound.sockets, settings, workers)?;
                (Self::Udp(server), bound.address_missing)
            }
        })
    }

    /// What it relays, in the plural.
    pub(super) fn units(&self) -> &'static str {
        match self {
            Self::Tcp(_) => "connections",
            Self::Udp(_) => "datagrams",
        }
    }

    /// Connections or flows there are now.
    pub(super) fn active(&self) -> u64 {
        match self {
            Self::Tcp(server) => server.totals().active,
            Self::Udp(server) => server.totals().flows,
        }
    }

    pub(super) fn drain(&self) {
        match self {
            Self::Tcp(server) => server.drain(),
            Self::Udp(server) => server.drain(),
        }
    }

    pub(super) fn end(&self) {
        match self {
            Self::Tcp(server) => server.end(),
            Self::Udp(server) => server.end(),
        }
    }

    /// Waits until every worker has ended. Cancel-safe.
    pub(super) async fn ended(&mut self) -> Result<()> {
        match self {
            Self::Tcp(server) => server.ended().await?,
            Self::Udp(server) => server.ended().await?,
        }
        Ok(())
    }

    /// One line about all it did.
    pub(super) fn say_ended(&self, name: &InstanceName) {
        match self {
            Self::Tcp(server) => {
                let totals = server.totals();
                info!(
                    instance = %name, connections = totals.accepted, refused = totals.refused.all(),
                    connect_failed = totals.connect_failed.all(), bytes.r#in = totals.bytes_to_target,
                    bytes.out = totals.bytes_to_client, "ended"
                );
            }
            Self::Udp(server) => {
                let totals = server.totals();
                info!(
                    instance = %name, flows = totals.flows_opened, refused = totals.refused.all(),
                    dropped = totals.dropped.all(), connect_failed = totals.open_failed.all(),
                    overflow.r#in = totals.overflow_from_proxy, overflow.out = totals.overflow_from_target,
                    datagrams.r#in = totals.datagrams_to_target, datagrams.out = totals.datagrams_to_client,
                    bytes.r#in = totals.bytes_to_target, bytes.out = totals.bytes_to_client, "ended"
                );
            }
        }
    }
}
