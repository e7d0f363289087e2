//! From what is asked to all that can be seen: looks, probes every target, looks again.
//!
//! Blocking; its threads and its event loop live in the caller's network namespace. Changes nothing, and
//! leaves no connection behind. Must not know: what any of it means.

mod probing;
mod routing;

use std::net::{SocketAddr, UdpSocket};

use ipnet::IpNet;

use self::probing::{Job, probe_all};
use self::routing::{ask, look_at_routing, routes};
use super::evidence::{Entry, Evidence, Host, Instance, Outcome, Place, Relay, Target};
use super::{filters, host, listeners};
use crate::model::{self, Listen, PortPolicy, Protocol};
use crate::pathway::Firewall;
use crate::pathway::netlink::Netlink;

/// An instance and what its configuration and its process say.
#[derive(Debug, Clone)]
pub struct Asked {
    /// As configured.
    pub instance: model::Instance,
    /// Its pathway.
    pub pathway: model::Pathway,
    /// Whether the pathway stands in pathways.conf.
    pub configured: bool,
    /// Who may connect.
    pub allow: Vec<IpNet>,
    /// Where that is written.
    pub allow_file: String,
    /// The process that runs it.
    pub relay: Option<Relay>,
}

/// Who asks: for the commands that a diagnosis prints.
#[derive(Debug, Clone, Default)]
pub struct Asker {
    /// What is typed before a verb.
    pub command: String,
    /// The configuration directory.
    pub config_dir: String,
    /// Which firewall the pathways use.
    pub firewall: Firewall,
}

/// Sees all there is to see about these instances.
///
/// # Errors
/// When no event loop can be had; what the kernel or a program does not show is part of the evidence.
pub fn gather(asked: &[Asked], asker: &Asker) -> std::io::Result<Evidence> {
    let mut host = Host {
        command: asker.command.clone(),
        config_dir: asker.config_dir.clone(),
        // the very first system calls on sockets: what fails here fails for every relay
        cannot_spoof: host::cannot_spoof(),
        ..Host::default()
    };
    let instances = || asked.iter().map(instance);
    if host.cannot_spoof.is_some() {
        return Ok(Evidence {
            host,
            pathways: Vec::new(),
            instances: instances().collect(),
        });
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (before, pathways) = std::thread::scope(|scope| {
        let filters = scope.spawn(host::filters);
        look(&mut host);
        let pathways = runtime.block_on(look_at_routing(&mut host, asked, asker.firewall));
        let (filters, unseen) = filters.join().unwrap_or_default();
        host.unseen.extend(unseen);
        (filters, pathways)
    });
    let drops = host::rp_filter_drops();
    let mut instances: Vec<Instance> = instances().collect();
    let mut jobs = Vec::new();
    runtime.block_on(async {
        let Ok(netlink) = Netlink::open() else {
            return;
        };
        for (at, (asked, instance)) in asked.iter().zip(&mut instances).enumerate() {
            // a Unix socket is nowhere else
            let listen = match asked.instance.listen {
                // and what is routed here is no address of this host's
                Listen::Network(_) => None,
                _ => asked.instance.listen.ports().map(|range| range.ip()),
            };
            instance.listen_here = match listen {
                None => true,
                Some(ip) => ip.is_unspecified() || ask(&netlink, ip).await.is_local(),
            };
            for target in asked.instance.targets() {
                let seen = routes(&netlink, &host, asked, target, at).await;
                jobs.push(Job {
                    instance: at,
                    asked,
                    target,
                    seen,
                });
            }
        }
    });
    host.filters = before;
    for (at, target) in probe_all(&host, jobs) {
        instances[at].targets.push(target);
    }
    add_listeners(&mut host, asked, &mut instances);
    let (after, _) = host::filters();
    host.filters = filters::joined(&host.filters, after);
    host.rp_filter_drops = host::rp_filter_drops().saturating_sub(drops);
    // probes may have filled it
    host.conntrack = host::conntrack().or(host.conntrack);
    host.ports = ports(&host, &instances);
    Ok(Evidence {
        host,
        pathways,
        instances,
    })
}

fn instance(asked: &Asked) -> Instance {
    let options = &asked.instance.options;
    Instance {
        name: asked.instance.name.to_string(),
        mark: asked.pathway.mark.get(),
        protocol: options.protocol.to_string(),
        listen: asked.instance.listen.ports().map(|range| range.first()),
        listen_here: true,
        keeps_ports: options.port == PortPolicy::Keep,
        max_connections: options.max_connections.map(|most| most.get()),
        allow_file: asked.allow_file.clone(),
        allow: asked.allow.clone(),
        targets: Vec::new(),
        relay: asked.relay.clone(),
    }
}

fn look(host: &mut Host) {
    host.sysctls = host::sysctls();
    host.conntrack = host::conntrack();
    host.networkd = host::networkd();
    // the kernel asks the interface's own switch, and `all` writes through to it
    let off = host.sysctls.get("net.ipv6.conf.lo.disable_ipv6");
    host.ipv6 = off.is_some_and(|off| off == "0");
}
fn add_listeners(host: &mut Host, asked: &[Asked], instances: &mut [Instance]) {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut of: Vec<&mut Target> = asked
            .iter()
            .zip(instances.iter_mut())
            .filter(|(asked, _)| asked.instance.options.protocol == protocol)
            .flat_map(|(_, instance)| &mut instance.targets)
            .filter(|target| target.place != Place::Remote)
            .collect();
        if of.is_empty() {
            continue;
        }
        let sockets = match listeners::listening(protocol) {
            Ok(sockets) => sockets,
            Err(error) => {
                host.unseen
                    .push(format!("the sockets of this host: {error}"));
                continue;
            }
        };
        let wanted: Vec<_> = sockets
            .into_iter()
            .filter(|(address, _)| of.iter().any(|one| one.address.port() == address.port()))
            .collect();
        let found = listeners::with_processes(&wanted);
        for target in &mut of {
            target.listeners = found
                .iter()
                .filter(|one| one.address.port() == target.address.port())
                .cloned()
                .collect();
            if protocol == Protocol::Udp {
                let bound = target.listeners.iter();
                let any = bound.clone().any(|one| covers(one.address, target.address));
                target.plain = if any {
                    Outcome::Open(0)
                } else {
                    Outcome::Refused
                };
            }
        }
    }
}

/// Whether a socket bound there gets what is sent to a target.
pub(super) fn covers(bound: SocketAddr, target: SocketAddr) -> bool {
    let ip = bound.ip().to_canonical();
    bound.port() == target.port()
        && (ip == target.ip()
            || (ip.is_unspecified() && (ip.is_ipv4() == target.is_ipv4() || ip.is_ipv6())))
}

/// Looked at only where a connect failed for want of a port: every connection has to be read.
fn ports(host: &Host, instances: &[Instance]) -> Option<super::evidence::Ports> {
    let wanting = |target: &Target| target.plain == Outcome::Failed(libc::EADDRNOTAVAIL);
    let mut targets = instances.iter().flat_map(|instance| &instance.targets);
    targets.find(|target| wanting(target))?;
    let range = host.sysctls.get("net.ipv4.ip_local_port_range")?;
    let mut ends = range.split_whitespace().map(str::parse);
    let range = (ends.next()?.ok()?, ends.next()?.ok()?);
    listeners::ports(range, |ip| UdpSocket::bind((ip, 0)).is_ok()).ok()
}

/// Whether connection tracking knew of a probe and forgot its mark.
pub(super) fn forgot(entry: &Entry, mark: u32, mask: u32) -> bool {
    matches!(entry, Entry::Seen { mark: seen, .. } if seen & mask != mark & mask)
}
