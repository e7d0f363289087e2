//! Every target probed, many at a time.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Asked;
use super::routing::{Routes, inside};
use crate::doctor::evidence::{Host, Outcome, Place, SingledOut, Target};
use crate::doctor::filters::Packet;
use crate::doctor::probe::{self, Spoofed};
use crate::model::{Mark, Protocol, TargetAddr};

/// How many targets are probed at a time. They mostly wait.
const AT_ONCE: usize = 32;

/// One target to probe.
pub(super) struct Job<'a> {
    pub(super) instance: usize,
    pub(super) asked: &'a Asked,
    pub(super) target: TargetAddr,
    pub(super) seen: Routes,
}

/// Probes all, in their order.
pub(super) fn probe_all(host: &Host, jobs: Vec<Job<'_>>) -> Vec<(usize, Target)> {
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
