//! From what is asked to all that can be seen: looks, probes every target, looks again.
//!
//! Blocking; its threads and its event loop live in the caller's network namespace. Changes nothing, and
//! leaves no connection behind. Must not know: what any of it means.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use ipnet::IpNet;

use super::evidence::{
    Entry, Evidence, Host, Instance, Missing, Outcome, Pathway, Place, Relay, Shadow, SingledOut,
    Target,
};
use super::filters::{self, Packet};
use super::probe::{self, Spoofed};
use super::{host, listeners};
use crate::model::{self, Family, Mark, PortPolicy, Protocol, TargetAddr};
use crate::pathway::netlink::{Answered, Netlink, Question, SeenRule};
use crate::pathway::piece::{PROTOCOL, Step};
use crate::pathway::plan::UNROUTED_PRIORITY;
use crate::pathway::{self, Firewall, Problem};

/// How many targets are probed at a time. They mostly wait.
const AT_ONCE: usize = 32;

/// How many destinations of another program's table are tried.
const DESTINATIONS: usize = 3;

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
            let listen = asked.instance.listen.ports().map(|range| range.ip());
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
        mark: asked.instance.mark.get(),
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

async fn look_at_routing(host: &mut Host, asked: &[Asked], firewall: Firewall) -> Vec<Pathway> {
    match Netlink::open() {
        Ok(netlink) => {
            for family in Family::BOTH {
                match netlink.seen_rules(family).await {
                    Ok(rules) => host.rules.extend(rules),
                    Err(error) if family == Family::V6 && error.errno().is_some() => {}
                    Err(error) => host.unseen.push(chain(&error)),
                }
                let way = ask(&netlink, probe::nobody(family, 0)).await;
                if way.kind.as_deref() == Some("unicast") {
                    host.default_route.insert(family, way.dev);
                }
            }
        }
        Err(error) => host.unseen.push(chain(&error)),
    }
    let mut by_mark = BTreeMap::new();
    for one in asked {
        by_mark.entry(one.pathway.mark).or_insert(one);
    }
    let wanted: Vec<model::Pathway> = by_mark.values().map(|one| one.pathway.clone()).collect();
    let (listed, unread) = match pathway::list(&wanted, firewall).await {
        Ok(listed) => (listed, None),
        Err(error) => (Vec::new(), Some(chain(&error))),
    };
    let listed: BTreeMap<_, _> = listed
        .into_iter()
        .filter_map(|listed| Some((listed.mark?, listed)))
        .collect();
    by_mark
        .into_iter()
        .map(|(mark, one)| {
            let pathway = &one.pathway;
            let (missing, stale) = match listed.get(&mark) {
                Some(listed) => (
                    listed.missing.iter().map(missing).collect(),
                    listed.stale.clone(),
                ),
                None => (Vec::new(), Vec::new()),
            };
            Pathway {
                mark: mark.get(),
                mask: pathway.mask.get(),
                table: pathway.table.get(),
                priority: pathway.priority.get(),
                configured: one.configured,
                connmark: pathway.wants_connmark(),
                unread: unread.clone(),
                missing,
                stale,
            }
        })
        .collect()
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

fn missing(finding: &pathway::Finding) -> Missing {
    let (family, unrouted) = match &finding.problem {
        Problem::Missing(step) => (
            Some(step.family()),
            matches!(step, Step::AddRule(rule) if rule.priority == UNROUTED_PRIORITY),
        ),
        Problem::TableTaken(_) => (None, false),
    };
    Missing {
        family,
        text: finding.to_string(),
        unrouted,
        taken: matches!(finding.problem, Problem::TableTaken(_)),
    }
}

/// The way to an address, for a packet without mark.
async fn ask(netlink: &Netlink, to: IpAddr) -> Answered {
    let question = Question {
        to,
        from: None,
        mark: 0,
        iif: None,
    };
    netlink.route(question).await.unwrap_or_default()
}

/// What the routing says about a target.
struct Routes {
    place: Place,
    client: IpAddr,
    marked: Answered,
    unmarked: Answered,
    forward: Answered,
    chosen: Answered,
    shadows: Vec<Shadow>,
}

async fn routes(
    netlink: &Netlink,
    host: &Host,
    asked: &Asked,
    target: TargetAddr,
    number: usize,
) -> Routes {
    let client = probe::nobody(target.family(), number);
    let (to, mark) = (target.ip(), asked.pathway.mark.get());
    let way = ask(netlink, to).await;
    let place = if to.is_loopback() {
        Place::Loopback
    } else if way.is_local() {
        Place::Own
    } else if way.kind.as_deref() == Some("unicast") {
        Place::Remote
    } else {
        Place::Nowhere
    };
    let remote = place == Place::Remote;
    let iif = way.dev.as_deref().filter(|_| remote);
    let index = iif.and_then(|name| nix::net::if_::if_nametoindex(name).ok());
    let answer = async |to: IpAddr, mark: u32| {
        let question = Question {
            to,
            from: Some(target.ip()),
            mark,
            iif: index,
        };
        netlink.route(question).await.unwrap_or_default()
    };
    let forward = Question {
        to,
        from: None,
        mark,
        iif: None,
    };
    let came_in = iif.unwrap_or("lo");
    let mut shadows = Vec::new();
    let behind = asked.pathway.priority.get();
    // a local service's answer is routed once without its mark
    let looks = [(mark, behind), (0, asked.pathway.priority.unmarked())];
    let looks = &looks[..if place == Place::Loopback { 2 } else { 1 }];
    for (number, rule) in host.rules.iter().enumerate() {
        for &(mark, behind) in looks {
            if !before_ours(rule, target.family(), behind) {
                continue;
            }
            for clients in destinations(netlink, rule, client).await {
                let to = inside(clients);
                let meets = rule.selector.matches(target.ip(), to, mark, came_in);
                if meets != Some(true) {
                    continue;
                }
                let answer = answer(to, mark).await;
                if !answer.is_local() {
                    shadows.push(Shadow {
                        rule: number,
                        clients,
                        answer,
                    });
                }
            }
        }
    }
    Routes {
        place,
        client,
        marked: answer(client, mark).await,
        unmarked: answer(client, 0).await,
        forward: netlink.route(forward).await.unwrap_or_default(),
        chosen: ask(netlink, client).await,
        shadows,
    }
}

/// Whether a rule of others is asked before ours. The local table comes first by right.
fn before_ours(rule: &SeenRule, family: Family, ours: u32) -> bool {
    rule.family == family
        && rule.protocol != PROTOCOL
        && rule.priority < ours
        && rule.table != Some(255)
        && rule.action != "nop"
}

/// Clients that may go through a rule's table: the client of the probe, and what the table leads to.
async fn destinations(netlink: &Netlink, rule: &SeenRule, client: IpAddr) -> Vec<IpNet> {
    let mut nets = vec![IpNet::from(client)];
    if let Some(table) = rule.table.filter(|table| !matches!(table, 253 | 254)) {
        let found = netlink.destinations(rule.family, table).await;
        let found = found.unwrap_or_default().into_iter();
        nets.extend(found.filter(|net| net.prefix_len() > 0).take(DESTINATIONS));
    }
    nets
}

/// Some address of a prefix, not its first one.
fn inside(net: IpNet) -> IpAddr {
    const NUMBER: u128 = 77;
    match net.network() {
        IpAddr::V4(ip) => {
            let hosts = u32::MAX.checked_shr(net.prefix_len().into()).unwrap_or(0);
            Ipv4Addr::from_bits(ip.to_bits() | (NUMBER as u32 & hosts)).into()
        }
        IpAddr::V6(ip) => {
            let hosts = u128::MAX.checked_shr(net.prefix_len().into()).unwrap_or(0);
            Ipv6Addr::from_bits(ip.to_bits() | (NUMBER & hosts)).into()
        }
    }
}

/// One target to probe.
struct Job<'a> {
    instance: usize,
    asked: &'a Asked,
    target: TargetAddr,
    seen: Routes,
}

/// Probes all, in their order.
fn probe_all(host: &Host, jobs: Vec<Job<'_>>) -> Vec<(usize, Target)> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(jobs.len()) {
            scope.spawn(|| {
                while let Some((at, job)) = {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    jobs.get(at).map(|job| (at, job))
                } {
                    let target = probe_one(host, job);
                    if let Ok(mut done) = done.lock() {
                        done.insert(at, (job.instance, target));
                    }
                }
            });
        }
    });
    let done = done.into_inner().unwrap_or_default();
    done.into_values().collect()
}

fn probe_one(host: &Host, job: &Job<'_>) -> Target {
    let Job {
        asked,
        target,
        seen,
        ..
    } = job;
    let (target, protocol) = (*target, asked.instance.options.protocol);
    let closed = TargetAddr::new(SocketAddr::new(target.ip(), probe::CLOSED));
    let local = matches!(seen.place, Place::Loopback | Place::Own);
    let (plain, baseline, through) = match protocol {
        Protocol::Tcp => {
            let plain = probe::plain(protocol, target);
            (plain.clone(), plain, target)
        }
        // whether a local service is there is told by its socket, without a datagram that it may log
        Protocol::Udp if local => (Outcome::Untried, probe::plain(protocol, closed), closed),
        Protocol::Udp => (
            probe::plain(protocol, target),
            probe::plain(protocol, closed),
            closed,
        ),
    };
    let mark = asked.pathway.mark;
    let spoof = |client| {
        let first = probe::spoofed(protocol, through, mark, client);
        match first.outcome {
            // once more: one lost packet, or a busy moment, is not a fault
            Outcome::Silent => probe::spoofed(protocol, through, mark, client),
            _ => first,
        }
    };
    let Spoofed { outcome, entry } = spoof(seen.client);
    let mut singled_out = Vec::<SingledOut>::new();
    for (number, filter) in host.filters.iter().enumerate() {
        let clients = requests(seen, target, protocol, mark)
            .iter()
            .find_map(|packet| filter.singles_out(packet));
        if let Some(clients) = clients
            && singled_out.iter().all(|known| known.clients != clients)
        {
            singled_out.push(SingledOut {
                clients,
                filter: number,
                outcome: spoof(inside(clients)).outcome,
            });
        }
    }
    Target {
        family: target.family(),
        address: target.get(),
        place: seen.place,
        client: seen.client,
        plain,
        baseline,
        spoofed: outcome,
        entry,
        marked: seen.marked.clone(),
        unmarked: seen.unmarked.clone(),
        forward: seen.forward.clone(),
        chosen: seen.chosen.clone(),
        listeners: Vec::new(),
        singled_out,
        shadows: seen.shadows.clone(),
    }
}

/// The relay's packets on their way to a service, at each hook.
fn requests<'a>(
    seen: &'a Routes,
    target: TargetAddr,
    protocol: Protocol,
    mark: Mark,
) -> Vec<Packet<'a>> {
    let local = seen.place != Place::Remote;
    let dev = if local {
        Some("lo")
    } else {
        seen.forward.dev.as_deref()
    };
    let hooks: &[&str] = if local {
        &["output", "input"]
    } else {
        &["output"]
    };
    hooks
        .iter()
        .map(|&hook| Packet {
            hook,
            iif: dev.filter(|_| hook == "input"),
            oif: dev.filter(|_| hook == "output"),
            from: seen.client,
            to: target.ip(),
            protocol: match protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
            },
            port: target.port(),
            answer: false,
            mark: mark.get(),
        })
        .collect()
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
