//! A UDP relay as a running thing: one instance's part on the worker threads, around sockets that the caller
//! bound.
//!
//! Owns: starting and draining it, and what it is told. Must not know: configuration, signals, routing.
//!
//! One datagram: `worker` (a batch is read) → `datagram` (allowed proxy? whose is it?) → `table` (its flow),
//! or `registry` (it has none here) → a spoofed, connected socket per flow → the service; and back with the
//! flow's own path. See `flow` for what a flow is.
//!
//! What a relay that is no router can and cannot keep:
//!
//! - ECN and DSCP are passed on in both directions.
//! - DF cannot be seen on receiving. Datagrams are sent as the system's own (`net.ipv4.ip_no_pmtu_disc`): with
//!   DF while they fit the known path MTU, fragmented here where they do not. So nothing is lost on a smaller
//!   MTU towards the proxy, where the relay's answers are fragmented once ICMP has said "too big"; a service
//!   that probes the path by size (QUIC) measures the way to the relay.
//! - ICMP "port unreachable" from the service ends the flow and is counted; other ICMP is logged. None of it
//!   reaches the client: there is no way to say it to a proxy.

use std::collections::BTreeSet;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::num::NonZeroU32;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};
use tracing::warn;

use self::counters::{Counters, Totals};
use self::loan::Loans;
use self::registry::Registry;
use self::worker::{Change, Common, Order, Worker};
use super::ports::{Port, Ports};
use super::report::{LastError, Limiter};
use super::settings;
use super::view::Query;
use super::workers::Workers;
use crate::model::{AllowList, Family, Instance, InstanceOptions, UdpHeader};
use crate::socket::Failure;
use crate::socket::udp::{Bound, receive_from_proxies, udp_bound};

pub mod counters;
pub mod datagram;
mod flow;
mod loan;
mod registry;
pub(super) mod scratch;
mod table;
mod worker;

/// How one UDP relay treats its datagrams: what TCP has too, and its own.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What TCP has too; the timeouts there mean nothing here.
    pub common: settings::Settings,
    /// Which datagrams carry a header.
    pub header: UdpHeader,
    /// After how long without a datagram either way a flow ends.
    pub idle_timeout: Duration,
    /// How many flows, each with a socket, there may be: beyond it the one silent for longest ends.
    pub max_flows: NonZeroU32,
    /// How many of them from one proxy address.
    pub max_flows_per_proxy: NonZeroU32,
}

impl Settings {
    /// What an instance says, with its allow list.
    pub fn of(instance: &Instance, allow: Arc<AllowList>) -> Self {
        let options = &instance.options;
        let max_flows = options
            .max_flows
            .unwrap_or(InstanceOptions::DEFAULT_MAX_FLOWS);
        // one proxy must not be able to push out every other's flows
        let three_quarters = (u64::from(max_flows.get()) * 3 / 4) as u32;
        Self {
            common: settings::Settings::of(instance, allow),
            header: options.udp_header,
            idle_timeout: options
                .idle_timeout
                .unwrap_or(InstanceOptions::DEFAULT_UDP_IDLE_TIMEOUT),
            max_flows,
            max_flows_per_proxy: options
                .max_flows_per_proxy
                .or(NonZeroU32::new(three_quarters))
                .unwrap_or(max_flows),
        }
    }
}

impl Deref for Settings {
    type Target = settings::Settings;

    fn deref(&self) -> &settings::Settings {
        &self.common
    }
}

/// Why a relay could not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system gave no descriptor for a worker's part.
    #[error("cannot give a worker its part")]
    Start(#[source] io::Error),
    /// A listener lacks what the relay needs of it.
    #[error("cannot {} on a listener of instance {instance}", failure.operation)]
    Unfit {
        /// The instance.
        instance: String,
        /// The option, and what the kernel said as the source.
        #[source]
        failure: Failure,
    },
    /// A listener broke; datagrams would be lost from here on.
    #[error("a listener of instance {instance} failed")]
    Listener {
        /// The instance.
        instance: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A task panicked, or its worker thread died: a bug.
    #[error("a relay's task panicked")]
    Panicked,
}

/// Whether datagrams are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    Draining,
}

/// A listening socket, and the number of the worker that reads it.
type Owned<T> = (T, usize);

/// What a relay listens on.
#[derive(Debug)]
struct Listeners {
    present: Vec<Owned<Arc<UdpSocket>>>,
    /// No more, but perhaps still answered from.
    leaving: Vec<Owned<Weak<UdpSocket>>>,
}

/// A running relay. Dropping it is a drain.
#[derive(Debug)]
pub struct Server {
    phase: watch::Sender<Phase>,
    common: Arc<Common>,
    listeners: Mutex<Listeners>,
    orders: Vec<mpsc::UnboundedSender<Order>>,
    ended: tokio::sync::Mutex<mpsc::UnboundedReceiver<Result<(), Error>>>,
}

impl Server {
    /// Starts relaying what arrives at the listeners, which are bound; their options are set here.
    ///
    /// The listeners are dealt out to the workers one by one; it takes no more workers than listeners.
    ///
    /// # Errors
    /// When descriptors run out, or a listener lacks what the relay needs of it.
    pub fn start(
        workers: &Workers,
        listeners: Vec<UdpSocket>,
        settings: Settings,
    ) -> Result<Self, Error> {
        fit(&listeners, &settings)?;
        warn_of_wildcard_services(&settings);
        let chosen: Vec<usize> = workers.pick(listeners.len()).collect();
        // one descriptor for the worker and for whoever is handed the socket next
        let listeners = dealt(listeners, chosen.len());
        let shares = shares_of(&listeners, chosen.len());
        let ports = ports(&listeners, &settings).map_err(Error::Start)?;
        let registry = Registry::new(chosen.len()).map_err(|errno| Error::Start(errno.into()))?;
        let (report, ended) = mpsc::unbounded_channel();
        let mut server = Self {
            phase: watch::Sender::new(Phase::Serving),
            common: Arc::new(Common {
                settings: ArcSwap::from_pointee(settings),
                counters: chosen.iter().map(|_| Arc::default()).collect(),
                limiter: Limiter::default(),
                last_error: Mutex::default(),
                registry,
                loans: Loans::new(chosen.len()),
                ports: ArcSwap::from_pointee(ports),
                started: Instant::now(),
            }),
            listeners: Mutex::new(Listeners {
                present: listeners,
                leaving: Vec::new(),
            }),
            orders: Vec::with_capacity(chosen.len()),
            ended: tokio::sync::Mutex::new(ended),
        };
        for (number, (worker, share)) in (0u32..).zip(chosen.into_iter().zip(shares)) {
            let common = Arc::clone(&server.common);
            let phase = server.phase.subscribe();
            let (tell, orders) = mpsc::unbounded_channel();
            server.orders.push(tell);
            let outcome = Outcome {
                report: report.clone(),
                result: Some(Err(Error::Panicked)),
            };
            workers.submit(worker, move |shared| {
                let worker = Worker::new(Rc::clone(shared), Arc::clone(&common), number, share);
                tokio::task::spawn_local(async move {
                    let result = match worker {
                        Ok(worker) => {
                            worker
                                .run(phase, orders)
                                .await
                                .map_err(|source| Error::Listener {
                                    instance: common.settings.load().name.to_string(),
                                    source,
                                })
                        }
                        Err(error) => Err(Error::Start(error)),
                    };
                    outcome.is(result);
                });
            });
        }
        Ok(server)
    }

    /// What was last said about a datagram that was not relayed.
    pub fn last_error(&self) -> Option<LastError> {
        let last = &self.common.last_error;
        last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The last line of each kind about each proxy, the newest last.
    pub fn recent_errors(&self) -> Vec<LastError> {
        self.common.limiter.recent()
    }

    /// Asks every worker about its flows. Each answers once, in its turn; the reply's receiver ends after the
    /// last.
    pub fn ask(&self, query: &Query) {
        for worker in &self.orders {
            // a worker that is gone has no flows
            let _ = worker.send(Order::Answer(query.clone()));
        }
    }

    /// The counters of each worker thread.
    pub fn counters(&self) -> &[Arc<Counters>] {
        &self.common.counters
    }

    /// The counters of all workers together.
    pub fn totals(&self) -> Totals {
        self.counters().iter().map(|of| of.read()).sum()
    }

    /// How many flows began at each port of a range, of those at which any did.
    pub fn ports(&self) -> Vec<Port> {
        self.common.ports.load().read()
    }

    /// The listening sockets, once more, for whoever listens next; none once it drains.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn listeners(&self) -> io::Result<Vec<UdpSocket>> {
        let listeners = self.lock();
        let present = listeners.present.iter();
        present.map(|(socket, _)| socket.try_clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Listeners> {
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens at other ports of its address: at those of before that are to stay, and at new ones, whose sockets
    /// it is given, bound, once it has said which it has; their options are set here. Flows stay; those of a port
    /// that goes have as long as a drain for their answers.
    ///
    /// # Errors
    /// When there are no sockets, or one lacks what the relay needs of it; nothing has changed then.
    pub fn listen_on<E: From<Error>>(
        &self,
        stays: impl Fn(SocketAddr) -> bool,
        more: impl FnOnce(&BTreeSet<SocketAddr>) -> Result<Vec<UdpSocket>, E>,
    ) -> Result<(), E> {
        let settings = self.common.settings.load();
        let mut listeners = self.lock();
        let addr = |(socket, _): &Owned<Arc<UdpSocket>>| socket.local_addr().ok();
        let stay = |one: &Owned<Arc<UdpSocket>>| addr(one).is_some_and(&stays);
        let (mut all, gone): (Vec<_>, Vec<_>) = listeners.present.iter().cloned().partition(stay);
        // one that a moment ago was to go is still bound
        let leaving = listeners.leaving.iter();
        let leaving = leaving.filter_map(|(socket, worker)| Some((socket.upgrade()?, *worker)));
        let (back, leaving): (Vec<_>, Vec<_>) = leaving.partition(stay);
        let has = all.iter().chain(&back).filter_map(addr).collect();
        let more = more(&has)?;
        fit(&more, &settings)?;
        let more = dealt(more, self.orders.len());
        let more: Vec<_> = back.into_iter().chain(more).collect();
        all.extend(more.iter().cloned());
        let ports = ports(&all, &settings).map_err(Error::Start)?;
        ports.add(&self.common.ports.load());
        self.common.ports.store(Arc::new(ports));
        let leaving = leaving.iter().chain(&gone);
        *listeners = Listeners {
            present: all,
            leaving: leaving
                .map(|(socket, worker)| (Arc::downgrade(socket), *worker))
                .collect(),
        };
        let more = shares_of(&more, self.orders.len());
        let gone = shares_of(&gone, self.orders.len());
        for (worker, (gone, more)) in self.orders.iter().zip(gone.into_iter().zip(more)) {
            // a worker that is gone has failed, and the relay with it
            let _ = worker.send(Order::Listen(Change { gone, more }));
        }
        Ok(())
    }

    /// Treats what comes from here on as told; flows keep their target and mark until they end.
    pub fn set(&self, settings: Settings) {
        self.common.settings.store(Arc::new(settings));
        // a worker whose flows are all silent waits for their ends by the idle timeout of before
        self.common.registry.wake_all();
    }

    /// Takes no new datagrams from proxies from here on, and ends once no flow awaits an answer, after a second
    /// at the latest: a datagram service has no connections that could end by themselves.
    pub fn drain(&self) {
        self.lock().present.clear();
        self.phase.send_replace(Phase::Draining);
    }

    /// Waits until every flow has ended, after a drain, or until it fails. Cancel-safe; one caller at a time
    /// is told.
    ///
    /// # Errors
    /// The first worker's that failed; the others still run then.
    pub async fn ended(&self) -> Result<(), Error> {
        let mut ended = self.ended.lock().await;
        while let Some(result) = ended.recv().await {
            result?;
        }
        Ok(())
    }
}

/// Sets what the relay needs of listeners.
fn fit(listeners: &[UdpSocket], settings: &Settings) -> Result<(), Error> {
    for listener in listeners {
        receive_from_proxies(listener).map_err(|failure| Error::Unfit {
            instance: settings.name.to_string(),
            failure,
        })?;
    }
    Ok(())
}

/// Listeners dealt out to so many workers, one by one.
fn dealt(listeners: Vec<UdpSocket>, workers: usize) -> Vec<Owned<Arc<UdpSocket>>> {
    let listeners = listeners.into_iter().map(Arc::new);
    listeners.zip((0..workers).cycle()).collect()
}

/// What each of so many workers has of them.
fn shares_of(listeners: &[Owned<Arc<UdpSocket>>], workers: usize) -> Vec<Vec<Arc<UdpSocket>>> {
    let mut shares = vec![Vec::new(); workers];
    for (listener, worker) in listeners {
        shares[*worker].push(Arc::clone(listener));
    }
    shares
}

/// Counts for the ports of these listeners.
fn ports(listeners: &[Owned<Arc<UdpSocket>>], settings: &Settings) -> io::Result<Ports> {
    let ports = listeners
        .iter()
        .map(|(one, _)| Ok(one.local_addr()?.port()));
    let mut ports: Vec<u16> = ports.collect::<io::Result<_>>()?;
    ports.extend(settings.intercepted.map(|ports| ports.last()));
    Ok(Ports::from_ports(&ports))
}

/// Reports how a worker's part ended, also when it panics.
struct Outcome {
    report: mpsc::UnboundedSender<Result<(), Error>>,
    result: Option<Result<(), Error>>,
}

impl Outcome {
    fn is(mut self, result: Result<(), Error>) {
        self.result = Some(result);
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        if let Some(result) = self.result.take() {
            // nobody listens any more when the server was dropped
            let _ = self.report.send(result);
        }
    }
}

/// A service on the wildcard address may answer a datagram to a loopback address from another address, past
/// the relay and to the real client.
fn warn_of_wildcard_services(settings: &Settings) {
    for target in Family::BOTH
        .into_iter()
        .filter_map(|family| settings.target(family))
    {
        // what /proc does not tell is no reason not to start
        if let Ok(Bound::Wildcard) = udp_bound(target) {
            warn!(
                instance = %settings.name, target.addr = %target,
                "the service is bound to the wildcard address: unless it answers from the address it was \
                 asked at, its answers miss the relay: bind it to {}", target.ip()
            );
        }
    }
}
