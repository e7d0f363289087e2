//! What a transparent listener's network takes away from the host that has it.
//!
//! Owns: which networks there are, where they are written, what is said of them. Must not know: how a host's
//! addresses and services are found out.

use std::net::{IpAddr, SocketAddr};

use super::diagnostics::{Diagnostic, Diagnostics, Place};
use super::instances::Line;
use super::source::Source;
use crate::model::{Instance, Listen, ListenNetwork, Protocol};

/// What a host has of its own.
#[derive(Debug, Clone, Default)]
pub struct Own {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Where its services listen (TCP), and what they are called.
    pub services: Vec<(SocketAddr, String)>,
}

/// The networks of transparent listeners, each with its place.
#[derive(Debug, Clone, Default)]
pub(super) struct Networks(Vec<(ListenNetwork, Protocol, Place)>);

impl Networks {
    /// Those of instances.tsv.
    pub(super) fn of_lines(source: &Source, lines: &[Line<'_>]) -> Self {
        let networks = lines.iter().filter_map(|line| match &line.listen {
            Some((Listen::Network(network), word)) => {
                Some((*network, line.protocol, source.position(*word).into()))
            }
            _ => None,
        });
        Self(networks.collect())
    }

    /// Those of instances that are in no instances.tsv.
    pub(super) fn of_instances(place: &Place, instances: &[Instance]) -> Self {
        let networks = instances.iter().filter_map(|one| match &one.listen {
            Listen::Network(network) => Some((*network, one.options.protocol, place.clone())),
            _ => None,
        });
        Self(networks.collect())
    }

    /// Warns of each that takes what the host has of its own, which is asked for only where it matters.
    pub(super) fn warn(&self, own: impl FnOnce() -> Own, warnings: &mut Diagnostics) {
        // to a wildcard, rules of somebody else's hand over: what they take is theirs to know
        let mut networks = self.0.iter().filter(|(one, ..)| !one.is_anywhere());
        let Some(first) = networks.next() else { return };
        let own = own();
        for (network, protocol, place) in std::iter::once(first).chain(networks) {
            if let Some(problem) = taken(*network, *protocol, &own) {
                warnings.push(Diagnostic::warning(
                    place.clone(),
                    problem,
                    "addresses that are routed to this host and not its own, or ports that nothing of this \
                     host's uses",
                ));
            }
        }
        *warnings = std::mem::take(warnings).sorted();
    }
}

/// What of a host's own a network takes, in a line. One address of the host's own is what somebody may well
/// mean, to have a range of ports with one socket: that is said only where a service loses by it.
fn taken(network: ListenNetwork, protocol: Protocol, own: &Own) -> Option<String> {
    let inside = |ip: &IpAddr| network.network().contains(ip);
    let addresses: Vec<IpAddr> = own.addresses.iter().copied().filter(inside).collect();
    let address = addresses.first()?;
    let ports = network.ports();
    let service = own.services.iter().find(|(at, _)| {
        let wildcard = at.ip().is_unspecified() && (at.is_ipv6() || address.is_ipv4());
        protocol == Protocol::Tcp
            && ports.contains(at.port())
            && (wildcard || addresses.contains(&at.ip().to_canonical()))
            // the relay's own socket, where it runs
            && *at != network.socket()
    });
    let more = match addresses.len() {
        1 => String::new(),
        many => format!(" and {} more of its own", many - 1),
    };
    let here = format!("this host's own {address}{more}");
    match service {
        Some((at, name)) => Some(format!(
            "{name} is cut off from others at port {} of {here}: what is sent there comes to this instance, of \
             connections that are open, too",
            at.port()
        )),
        None if network.network().prefix_len() == network.network().max_prefix_len() => None,
        None => {
            let noun = match ports.count() {
                1 => "port",
                _ => "ports",
            };
            Some(format!(
                "the network has {here}: whatever of this host uses {protocol} {noun} {ports} there is cut off \
                 from others"
            ))
        }
    }
}
