//! One instance's relay as a task under supervision: lock, pathway, sockets, server, in this order.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::plan::Spec;
use super::remedy::Maker;
use crate::causes::with_causes;
use crate::config::Configuration;
use crate::model::{Endpoint, Family, Instance, Listen, Mark, Pathway};
use crate::pathway::{self, Finding, Firewall};
use crate::relay::server::{Error, Server};
use crate::relay::workers::Workers;
use crate::runtime_dir::{Attempt, Lock, RuntimeDir};
use crate::socket;
use crate::socket::listening::{Listening, Place};
use crate::supervisor::Task;
use crate::systemd;

/// For how long a look at the pathways holds: a thousand instances that start together need one.
const FRESH: Duration = Duration::from_secs(1);

/// For how long a child may go on having this process's descriptors.
const FORKED: Duration = Duration::from_secs(2);

/// How many listening sockets a process makes without being told how many (`listeners=`): where there
/// are many instances on many cores, each is heard by fewer workers.
const SOCKETS: usize = 8192;

/// The lock of an instance. One may be called "pathways", which is a lock of its own: hence the suffix.
pub(super) fn lock_name(instance: &str) -> String {
    format!("{instance}.instance")
}

/// What all relays of the process are started from.
#[derive(Debug)]
pub(super) struct World {
    pub(super) workers: Workers,
    pub(super) runtime_dir: RuntimeDir,
    /// Start although the pathway may not be in place.
    pub(super) no_check: bool,
    /// Who makes the pathways.
    pub(super) maker: Maker,
    /// What gives replies their mark.
    pub(super) firewall: Firewall,
    /// Whether a sysctl may be set where that needs one.
    pub(super) set_sysctls: bool,
    /// As last read without a mistake.
    pub(super) configuration: RefCell<Rc<Configuration>>,
    /// How many instances this process has.
    pub(super) instances: std::cell::Cell<usize>,
    /// Locks that are held for instances about to start.
    pub(super) locks: RefCell<BTreeMap<String, Lock>>,
    /// Listening sockets without a relay, by protocol and address: passed by systemd or the process before, or left by
    /// a relay that another one follows.
    pub(super) offered: RefCell<BTreeMap<Place, Vec<Listening>>>,
    pub(super) look: tokio::sync::Mutex<Option<Look>>,
}

/// What was missing of the pathways, by mark, when they were last looked at.
#[derive(Debug)]
pub(super) struct Look {
    at: Instant,
    of: Rc<Configuration>,
    missing: BTreeMap<Mark, String>,
}

impl World {
    /// Offers a listening socket to the relay that will listen on its address.
    pub(super) fn offer(&self, listener: Listening) {
        match listener.place() {
            Ok(place) => self
                .offered
                .borrow_mut()
                .entry(place)
                .or_default()
                .push(listener),
            Err(error) => warn!(%error, "a listening socket has no address"),
        }
    }

    async fn lock(&self, instance: &str) -> anyhow::Result<Lock> {
        if let Some(lock) = self.locks.borrow_mut().remove(instance) {
            return Ok(lock);
        }
        let begin = Instant::now();
        loop {
            match self.runtime_dir.try_lock(&lock_name(instance))? {
                Attempt::Held(lock) => return Ok(lock),
                // the relay before has given it up, and a child of ours (iptables) that is not its own program
                // yet has a copy
                Attempt::HeldBy(Some(pid))
                    if pid == std::process::id() && begin.elapsed() < FORKED =>
                {
                    sleep(Duration::from_millis(2)).await;
                }
                Attempt::HeldBy(Some(pid)) => bail!("already running, pid {pid}"),
                Attempt::HeldBy(None) => bail!("already running in another process"),
            }
        }
    }

    /// Refuses where a reply would never find its way back: such a relay only times out.
    pub(super) async fn in_place(&self, mark: Option<Mark>) -> anyhow::Result<()> {
        // without a mark the way back is the host's own affair
        let Some(mark) = mark else { return Ok(()) };
        let configuration = Rc::clone(&self.configuration.borrow());
        // those that start at the same time wait here for the first one's look
        let mut look = self.look.lock().await;
        let looked = match look.take() {
            Some(look) if look.at.elapsed() < FRESH && Rc::ptr_eq(&look.of, &configuration) => look,
            _ => Look {
                missing: missing(&configuration.pathways, self.firewall, self.maker).await?,
                at: Instant::now(),
                of: configuration,
            },
        };
        let look = look.insert(looked);
        if look.of.pathway(mark).is_none() {
            bail!("no pathway has mark {mark}");
        }
        match look.missing.get(&mark) {
            Some(text) => bail!("{text}"),
            None => Ok(()),
        }
    }

    /// The sockets of an instance: for each of its places but those it has those that were offered, else new ones.
    fn sockets_of(
        &self,
        instance: &Instance,
        has: impl Fn(&Endpoint) -> bool,
    ) -> anyhow::Result<Vec<Listening>> {
        let count = self.listeners_of(instance);
        let mut sockets = Vec::new();
        let mut missing = false;
        for endpoint in instance.listen.endpoints().filter(|one| !has(one)) {
            let place = (instance.options.protocol, endpoint);
            let offered = self.offered.borrow_mut().remove(&place);
            let (_, endpoint) = place;
            match offered {
                Some(offered) if can_be_reached(&endpoint) => {
                    if let Endpoint::Unix(path) = &endpoint {
                        let options = &instance.options;
                        let owner = options.socket_owner.as_ref();
                        socket::unix::set_access(path, options.socket_mode, owner)
                            .with_context(|| format!("cannot go on listening on {endpoint}"))?;
                    }
                    sockets.extend(at_least(offered, instance, count));
                }
                _ => {
                    let (bound, address_missing) =
                        Listening::bind(&endpoint, &instance.options, count)?;
                    sockets.extend(bound);
                    missing |= address_missing;
                }
            }
        }
        if missing {
            warn!(
                instance = %instance.name, listen = %instance.listen,
                "the listen address is on no interface yet: listening all the same, connections arrive once it is there"
            );
        }
        Ok(sockets)
    }

    /// How many sockets it is to have at each of its places.
    pub(super) fn listeners_of(&self, instance: &Instance) -> NonZeroUsize {
        if matches!(instance.listen, Listen::Unix(_)) {
            return NonZeroUsize::MIN;
        }
        let asked = instance.options.listeners.map(NonZeroUsize::try_from);
        if let Some(Ok(count)) = asked {
            return count;
        }
        // the workers share the ports of a range among them
        if let Listen::Range(_) = instance.listen {
            return NonZeroUsize::MIN;
        }
        let share = SOCKETS / self.instances.get().max(1);
        NonZeroUsize::new(self.workers.count().min(share)).unwrap_or(NonZeroUsize::MIN)
    }
}

/// Whether whoever connects to a place gets to a socket that was bound there before.
fn can_be_reached(endpoint: &Endpoint) -> bool {
    match endpoint {
        Endpoint::Inet(_) | Endpoint::Transparent(_) => true,
        Endpoint::Unix(path) => socket::unix::is_reachable(path),
    }
}

async fn missing(
    pathways: &[Pathway],
    firewall: Firewall,
    maker: Maker,
) -> anyhow::Result<BTreeMap<Mark, String>> {
    let findings = pathway::check(pathways, firewall)
        .await
        .context("cannot check the pathways")?;
    let (findings, others): (Vec<_>, Vec<_>) = findings.into_iter().partition(Finding::is_vital);
    let mut warned = BTreeSet::new();
    for finding in others {
        if warned.insert(finding.mark) {
            warn!(
                mark = %finding.mark,
                "the pathway is without the rules for routers' ICMP: what is too large for a narrower link on \
                 the way to a service is lost; {}", maker.puts(&finding)
            );
        }
    }
    let mut missing = BTreeMap::new();
    for finding in &findings {
        missing
            .entry(finding.mark)
            .or_insert_with(|| format!("its pathway, mark {}, is not in place:", finding.mark))
            .push_str(&format!("\n  {finding}"));
    }
    let mut told = BTreeSet::new();
    for finding in findings {
        if let Some(text) = missing.get_mut(&finding.mark)
            && told.insert(finding.mark)
        {
            text.push_str(&format!(
                "\n{} (or start with --no-check)",
                maker.puts(&finding)
            ));
        }
    }
    Ok(missing)
}

/// A running relay and what goes with it.
#[derive(Debug)]
pub(super) struct Relay {
    pub(super) instance: Instance,
    pub(super) server: Rc<Server>,
    lock: RefCell<Option<Lock>>,
}

impl Relay {
    /// Starts it, on sockets that were offered for its address, else on new ones.
    pub(super) async fn start(world: Rc<World>, spec: Spec) -> anyhow::Result<Self> {
        let Spec { instance, allow } = spec;
        let name = instance.name.as_str();
        let lock = world.lock(name).await?;
        if !world.no_check {
            world.in_place(instance.mark).await?;
        }
        let sockets = world.sockets_of(&instance, |_| false)?;
        let listeners = sockets.len();
        systemd::store(name, &sockets);
        let server = Server::start(&world.workers, sockets, &instance, allow)?;
        info!(
            instance = %instance.name, listen = %instance.listen, mark = instance.mark.map(tracing::field::display),
            target4 = instance.target_of(Family::V4).map(tracing::field::display),
            target6 = instance.target_of(Family::V6).map(tracing::field::display),
            workers = world.workers.count(), listeners, "relaying"
        );
        Ok(Self {
            instance,
            server: Rc::new(server),
            lock: RefCell::new(Some(lock)),
        })
    }

    /// Has it listen at the other ports that its new line says, over UDP; flows stay.
    pub(super) fn listen_on(&self, world: &World, instance: &Instance) -> anyhow::Result<()> {
        let Server::Udp(server) = &*self.server else {
            bail!("connections have a relay for each set of listeners");
        };
        let stays = |addr| instance.listen.has(&Endpoint::Inet(addr));
        server.listen_on(stays, |present| {
            let has =
                |one: &Endpoint| matches!(one, Endpoint::Inet(addr) if present.contains(addr));
            let more = world.sockets_of(instance, has)?.into_iter();
            let more = more.filter_map(|one| match one {
                Listening::Udp(socket) => Some(socket),
                Listening::Stream(_) => None,
            });
            anyhow::Ok(more.collect())
        })?;
        let sockets = self.server.listeners()?;
        systemd::forget(instance.name.as_str());
        systemd::store(instance.name.as_str(), &sockets);
        info!(
            instance = %instance.name, listen = %instance.listen, listeners = sockets.len(),
            "listening at other ports: flows stay"
        );
        Ok(())
    }

    /// What a line means for it that wants another number of listeners than it has, where that is kept.
    pub(super) fn keeps_its_sockets(&self, instance: &Instance) -> Option<String> {
        let wanted = usize::try_from(u32::from(instance.options.listeners?)).ok()?;
        let places = instance.listen.endpoints().count();
        let count = self.server.listeners().ok()?.len() / places.max(1);
        (count != wanted).then(|| {
            format!(
                "{}: keeps {count} listeners on {} until it is stopped and started: its flows are known to \
                 these",
                instance.name, instance.listen
            )
        })
    }

    /// Its lock for another process.
    pub(super) fn share_lock(&self) -> Option<std::io::Result<std::os::fd::OwnedFd>> {
        self.lock.borrow().as_ref().map(Lock::share)
    }
}

/// Adds to what was passed until it is as many. None is closed: the kernel may just have completed a
/// connection for it.
fn at_least(
    mut sockets: Vec<Listening>,
    instance: &Instance,
    count: NonZeroUsize,
) -> Vec<Listening> {
    while sockets.len() < count.get() {
        match sockets[0].another() {
            Ok(socket) => sockets.push(socket),
            Err(error) => {
                debug!(
                    instance = %instance.name, listeners = sockets.len(), wanted = count,
                    error = &error as &dyn std::error::Error, "listening on fewer sockets than wanted"
                );
                break;
            }
        }
    }
    sockets
}

impl Task for Relay {
    type Error = Chain;

    fn drain(&self) {
        self.server.drain();
        // whoever wants to run this instance from here on may
        self.lock.borrow_mut().take();
    }

    fn active(&self) -> u64 {
        self.server.active()
    }

    async fn ended(&self) -> Result<(), Chain> {
        self.server.ended().await.map_err(Chain)
    }
}

/// Shows an error with its causes.
#[derive(Debug)]
pub(super) struct Chain(Error);

impl std::fmt::Display for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&with_causes(&self.0))
    }
}
