//! The proxy's side of an instance: what to write into the proxy's own configuration.
//!
//! Pure: an instance in, text out. Must not know: files, the kernel, whether the proxy is there.

mod balancers;
mod cloud;
mod dns;
mod gateways;

use std::net::SocketAddr;

use clap::ValueEnum;

use crate::model::{Family, Instance, Listen, Protocol, UdpHeader};

/// A program or service that sends PROXY headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// HAProxy, haproxy.cfg
    Haproxy,
    /// nginx's stream module, nginx.conf
    Nginx,
    /// Traefik 3, dynamic configuration
    Traefik,
    /// Caddy with the layer4 module, JSON
    Caddy,
    /// frp's client, frpc.toml
    Frp,
    /// Envoy, static resources
    Envoy,
    /// dnsdist, dnsdist.conf
    Dnsdist,
    /// AWS Network Load Balancer, Terraform
    AwsNlb,
    /// Cloudflare Spectrum, Terraform
    Spectrum,
}

/// What the snippet says beyond the instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edge {
    /// Where the proxy reaches the relay.
    pub relay: SocketAddr,
    /// The port on which the proxy serves the public.
    pub public_port: u16,
}

/// Why there is no snippet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EdgeError(String);

/// All that the texts are made from.
struct Facts<'i> {
    name: &'i str,
    protocol: Protocol,
    header: UdpHeader,
    edge: Edge,
    v4: bool,
    v6: bool,
    /// The listener is no address of this host: it needs a route there.
    routed: bool,
}

impl Edge {
    /// Where an instance is reached: its own address unless that is a wildcard; and its target's port.
    ///
    /// # Errors
    /// Where the instance listens on every address and none was given.
    pub fn of(
        instance: &Instance,
        address: Option<std::net::IpAddr>,
        public_port: Option<u16>,
    ) -> Result<Self, EdgeError> {
        let Some(listen) = instance.listen.ports().map(|range| range.first()) else {
            return Err(EdgeError(format!(
                "{} listens on a Unix socket, {}: point a proxy on this host at it (docs/places.md)",
                instance.name, instance.listen
            )));
        };
        let ip = match address {
            Some(ip) => ip,
            None if listen.ip().is_unspecified() => {
                return Err(EdgeError(format!(
                    "{} listens on every address: name the one that the proxy reaches with --address",
                    instance.name
                )));
            }
            None if matches!(instance.listen, Listen::Network(all) if all.network().hosts().nth(1).is_some()) =>
            {
                return Err(EdgeError(format!(
                    "{} takes whatever is routed to this host for {}: name the one that the proxy connects to \
                     with --address",
                    instance.name, instance.listen
                )));
            }
            None => listen.ip(),
        };
        if let (Listen::Network(all), Some(ip)) = (&instance.listen, address)
            && !all.is_anywhere()
            && !all.network().contains(&ip)
        {
            return Err(EdgeError(format!(
                "{ip} is none of the addresses that {} takes: {}",
                instance.name, instance.listen
            )));
        }
        let target = instance.targets().next().map(|target| target.port());
        Ok(Self {
            relay: SocketAddr::new(ip, listen.port()),
            public_port: public_port.or(target).unwrap_or(listen.port()),
        })
    }
}

/// The snippet for one instance.
///
/// # Errors
/// Where such a proxy cannot serve this instance, with what could.
pub fn snippet(instance: &Instance, kind: Kind, edge: Edge) -> Result<String, EdgeError> {
    let facts = Facts {
        name: instance.name.as_str(),
        protocol: instance.options.protocol,
        header: instance.options.udp_header,
        edge,
        v4: instance.target(Family::V4).is_some(),
        v6: instance.target(Family::V6).is_some(),
        routed: instance.interception().is_some(),
    };
    let text = match kind {
        Kind::Haproxy => balancers::haproxy(&facts),
        Kind::Nginx => balancers::nginx(&facts),
        Kind::Traefik => gateways::traefik(&facts),
        Kind::Caddy => gateways::caddy(&facts),
        Kind::Frp => gateways::frp(&facts),
        Kind::Envoy => gateways::envoy(&facts),
        Kind::Dnsdist => dns::dnsdist(&facts),
        Kind::AwsNlb => cloud::aws_nlb(&facts),
        Kind::Spectrum => cloud::spectrum(&facts),
    }?;
    Ok(text)
}

impl Facts<'_> {
    /// The lines about what every proxy's administrator has to know, behind this comment sign.
    fn preface(&self, sign: &str, program: &str, lines: &[&str]) -> String {
        let mut text = format!(
            "{sign} {program} in front of the mmproxyctl instance {}, which listens on {} ({}).\n\
             {sign} The address that the proxy connects from belongs in the allow list over there.\n",
            self.name, self.edge.relay, self.protocol
        );
        let family = match (self.v4, self.v6) {
            (true, false) => {
                "The instance has no IPv6 target: only IPv4 is listened on, IPv6 clients would be refused."
            }
            (false, true) => {
                "The instance has no IPv4 target: only IPv6 is listened on, IPv4 clients would be refused."
            }
            _ => "",
        };
        let route = match self.routed {
            true => {
                "That address is not the relay host's own: packets for it must be routed there (a static route)."
            }
            false => "",
        };
        for line in lines
            .iter()
            .chain(&[family, route])
            .filter(|line| !line.is_empty())
        {
            text.push_str(&format!("{sign} {line}\n"));
        }
        text
    }

    /// A name that every configuration language takes: letters, digits, underscores.
    fn identifier(&self) -> String {
        let mut identifier: String = self
            .name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
            .collect();
        if identifier.starts_with(|c: char| c.is_ascii_digit()) {
            identifier.insert(0, '_');
        }
        identifier
    }

    fn only_tcp(&self, program: &str) -> Result<(), EdgeError> {
        match self.protocol {
            Protocol::Tcp => Ok(()),
            Protocol::Udp => Err(EdgeError(format!(
                "{program} sends no PROXY header over UDP, and {} is protocol=udp: dnsdist, frp and spectrum do",
                self.name
            ))),
        }
    }

    /// UDP senders differ in which datagrams have the header.
    fn needs_header(&self, program: &str, header: UdpHeader) -> Result<(), EdgeError> {
        if self.protocol == Protocol::Udp && self.header != header {
            return Err(EdgeError(format!(
                "{program} needs udp-header={header} in the options of {}, which has udp-header={}",
                self.name, self.header
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
