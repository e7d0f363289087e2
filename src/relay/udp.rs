//! A UDP relay as a running thing: worker threads around sockets that the caller bound.
//!
//! Owns: starting, draining and ending the threads, and what a UDP relay is told. Must not know:
//! configuration, signals, routing. A worker thread is started by the calling thread and so lives in its
//! network namespace.
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

use std::io;
use std::net::UdpSocket;
use std::num::{NonZeroU32, NonZeroUsize};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::{info_span, warn};

use self::counters::{Counters, Totals};
use self::registry::{Limits, Registry};
use self::worker::{Common, Phase, Worker};
use crate::model::{AllowList, Family, Instance, InstanceOptions, UdpHeader};
use crate::relay::settings;
use crate::socket::Failure;
use crate::socket::udp::{Bound, receive_from_proxies, udp_bound};

pub mod counters;
pub mod datagram;
mod flow;
mod registry;
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
    /// The system gave no thread or no descriptor.
    #[error("cannot start a worker thread")]
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
    /// A worker thread panicked: a bug.
    #[error("a worker thread panicked")]
    Panicked,
}

/// A running relay. Dropping it ends its flows and waits for its threads.
#[derive(Debug)]
pub struct Server {
    common: Arc<Common>,
    ended: mpsc::UnboundedReceiver<Result<(), Error>>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts relaying what arrives at the listeners, which are bound; their options are set here.
    ///
    /// The listeners are dealt out to the workers one by one. A worker without a listener would be idle,
    /// so there are never more workers than listeners.
    ///
    /// # Errors
    /// When a thread cannot be started or a listener lacks an option; threads that were started are ended.
    pub fn start(
        listeners: Vec<UdpSocket>,
        settings: Settings,
        workers: NonZeroUsize,
    ) -> Result<Self, Error> {
        let workers = workers.get().min(listeners.len());
        for listener in &listeners {
            receive_from_proxies(listener).map_err(|failure| Error::Unfit {
                instance: settings.name.to_string(),
                failure,
            })?;
        }
        warn_of_wildcard_services(&settings);
        let limits = Limits {
            flows: settings.max_flows,
            per_proxy: settings.max_flows_per_proxy,
        };
        let registry = Registry::new(limits, settings.port, workers)
            .map_err(|errno| Error::Start(errno.into()))?;
        let common = Arc::new(Common {
            settings,
            counters: (0..workers).map(|_| Arc::default()).collect(),
            registry,
            started: Instant::now(),
            phase: AtomicU8::new(Phase::Serving as u8),
        });
        let mut shares: Vec<Vec<UdpSocket>> = (0..workers).map(|_| Vec::new()).collect();
        for (number, listener) in listeners.into_iter().enumerate() {
            shares[number % workers].push(listener);
        }
        let (report, ended) = mpsc::unbounded_channel();
        let mut server = Self {
            common,
            ended,
            threads: Vec::with_capacity(workers),
        };
        for (number, share) in (0u32..).zip(shares) {
            let common = Arc::clone(&server.common);
            let report = report.clone();
            let thread = std::thread::Builder::new()
                .name(format!("relay-udp-{number}"))
                .spawn(move || {
                    let mut outcome = Outcome {
                        report,
                        result: Some(Err(Error::Panicked)),
                    };
                    outcome.result = Some(work(common, number, share));
                })
                .map_err(Error::Start)?;
            server.threads.push(thread);
        }
        Ok(server)
    }

    /// The counters of each worker thread.
    pub fn counters(&self) -> &[Arc<Counters>] {
        &self.common.counters
    }

    /// The counters of all workers together.
    pub fn totals(&self) -> Totals {
        self.counters().iter().map(|of| of.read()).sum()
    }

    /// Ends as soon as no flow awaits an answer, after a second at the latest: a datagram service has no
    /// connections that could end by themselves.
    pub fn drain(&self) {
        self.common.enter(Phase::Draining);
    }

    /// Ends at once.
    pub fn end(&self) {
        self.common.enter(Phase::Ending);
    }

    /// Waits until every worker has ended: after a drain, or by failure. Cancel-safe.
    ///
    /// # Errors
    /// The first worker's that failed; the others still run then.
    pub async fn ended(&mut self) -> Result<(), Error> {
        while let Some(result) = self.ended.recv().await {
            result?;
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
        for thread in self.threads.drain(..) {
            // a panic was reported through the channel and printed by the thread
            let _ = thread.join();
        }
    }
}

/// Reports how a thread ended, also when it panics.
struct Outcome {
    report: mpsc::UnboundedSender<Result<(), Error>>,
    result: Option<Result<(), Error>>,
}

impl Drop for Outcome {
    fn drop(&mut self) {
        if let Some(result) = self.result.take() {
            // nobody listens any more when the server is being dropped
            let _ = self.report.send(result);
        }
    }
}

/// The life of one worker thread.
fn work(common: Arc<Common>, number: u32, listeners: Vec<UdpSocket>) -> Result<(), Error> {
    // entered once for the thread: every line of every flow names the instance
    let _span = info_span!("relay", instance = %common.settings.name).entered();
    let instance = common.settings.name.to_string();
    let mut worker = Worker::new(common, number, listeners).map_err(Error::Start)?;
    worker
        .run()
        .map_err(|source| Error::Listener { instance, source })
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
