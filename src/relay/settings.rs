//! What one relay is told: values only, nothing that was read from a file here.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::counters::Refusal;
use crate::model::{
    AllowList, ClientAddr, Family, Instance, InstanceName, InstanceOptions, Listen, Mark,
    NamedTargets, PortPolicy, PortRange, TargetAddr, TargetPorts,
};

/// How one relay treats its connections.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The instance's name, in every log line.
    pub name: InstanceName,
    /// The mark of its pathway, on every spoofed connection; `None` leaves them unmarked.
    pub mark: Option<Mark>,
    /// Where IPv4 clients go; `None` refuses them.
    pub target4: Option<TargetAddr>,
    /// Where IPv6 clients go; `None` refuses them.
    pub target6: Option<TargetAddr>,
    /// The target is the header's destination, in one of these prefixes.
    pub destinations: Option<Arc<[IpNet]>>,
    /// The targets that are names, for the message about one that has no address yet.
    pub named: NamedTargets,
    /// Where a range of ports is listened on and each goes to a port of its own: the listener's, the first of
    /// which stands for the targets' ports as they are here.
    pub parallel: Option<PortRange>,
    /// The ports that one transparent listener gets connections and datagrams for.
    pub intercepted: Option<PortRange>,
    /// The proxies that are believed; not asked about a process behind a Unix socket, whose file's permissions
    /// let it in.
    pub allow: Arc<AllowList>,
    /// How long a proxy may take to send its header.
    pub header_timeout: Duration,
    /// How long the target may take to answer.
    pub connect_timeout: Duration,
    /// After how long without a byte either way a connection ends; `None` never.
    pub idle_timeout: Option<Duration>,
    /// Whether the client's port is kept.
    pub port: PortPolicy,
    /// How many connections may be open at a time.
    pub max_connections: Option<NonZeroU32>,
    /// How many connections may wait for their header at a time.
    pub max_waiting: NonZeroU32,
}

impl Settings {
    /// How many connections may wait for their header: far above what a busy proxy needs, far below
    /// what a silent one could otherwise hold in descriptors.
    pub const DEFAULT_MAX_WAITING: NonZeroU32 = NonZeroU32::new(16_384).unwrap();

    /// What an instance says, with its allow list.
    pub fn of(instance: &Instance, allow: Arc<AllowList>) -> Self {
        let InstanceOptions {
            header_timeout,
            connect_timeout,
            idle_timeout,
            port,
            max_connections,
            ..
        } = instance.options;
        Self {
            name: instance.name.clone(),
            mark: instance.mark,
            target4: instance.target(Family::V4),
            target6: instance.target(Family::V6),
            destinations: instance.options.destinations.as_deref().map(Arc::from),
            named: instance.named.clone(),
            parallel: match instance.target_ports {
                TargetPorts::One => None,
                TargetPorts::Parallel => instance.listen.ports().map(|range| range.ports()),
            },
            intercepted: match instance.listen {
                Listen::Network(all) => Some(all.ports()),
                _ => None,
            },
            allow,
            header_timeout,
            connect_timeout,
            idle_timeout,
            port,
            max_connections,
            max_waiting: Self::DEFAULT_MAX_WAITING,
        }
    }

    /// Where a client goes that came to this port and asked the proxy for this destination, if the header says so.
    pub(super) fn target_for(
        &self,
        client: ClientAddr,
        asked: Option<SocketAddr>,
        port: u16,
    ) -> Result<TargetAddr, Refusal> {
        let Some(allowed) = &self.destinations else {
            if self.parallel.is_some_and(|ports| !ports.contains(port)) {
                return Err(Refusal::PortNotServed);
            }
            let target = self.target_at(client.family(), port);
            return target.ok_or(Refusal::FamilyNotServed);
        };
        let asked = asked.map(TargetAddr::new);
        let reachable = |asked: &TargetAddr| {
            let ip = asked.ip();
            let nowhere = match ip {
                IpAddr::V4(v4) => v4.is_broadcast() || v4.octets()[0] == 0,
                IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.is_unspecified(),
            };
            let within = allowed.iter().any(|prefix| prefix.contains(&ip));
            within && !nowhere && !ip.is_multicast() && asked.port() != 0
        };
        match asked.filter(reachable) {
            Some(target) if target.family() == client.family() => Ok(target),
            _ => Err(Refusal::DestinationRefused),
        }
    }

    /// Where clients of a family go that came to this port.
    pub fn target_at(&self, family: Family, port: u16) -> Option<TargetAddr> {
        let target = self.target(family)?;
        let Some(ports) = self.parallel else {
            return Some(target);
        };
        let mut addr = target.get();
        // both ranges are of one length and end within the ports there are
        let offset = port.saturating_sub(ports.first());
        addr.set_port(addr.port().saturating_add(offset));
        Some(TargetAddr::new(addr))
    }

    /// Where clients of a family go, of a range of ports with the first.
    pub fn target(&self, family: Family) -> Option<TargetAddr> {
        match family {
            Family::V4 => self.target4,
            Family::V6 => self.target6,
        }
    }
}
