//! A TCP relay as a running thing: one instance's part on the worker threads, around sockets that the
//! caller bound.
//!
//! Owns: starting and draining it, changing what it is told. Must not know: configuration, signals, routing.

use std::io;
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::counters::{Counters, Totals};
use super::report::Limiter;
use super::settings::Settings;
use super::worker::{Common, Worker, accept_from};
use super::workers::{Shared, Workers};

/// Why a relay could not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system gave no descriptor for a worker's share of a listener.
    #[error("cannot give a worker its listener")]
    Start(#[source] io::Error),
    /// A listener broke; connections would be lost from here on.
    #[error("a listener of instance {instance} failed")]
    Listener {
        /// The instance.
        instance: String,
        /// What accept(2) said.
        #[source]
        source: io::Error,
    },
    /// A task panicked, or its worker thread died: a bug.
    #[error("a relay's task panicked")]
    Panicked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    Draining,
}

/// A running relay. Dropping it stops accepting; open connections go on until they end or the workers do.
#[derive(Debug)]
pub struct Server {
    phase: watch::Sender<Phase>,
    common: Arc<Common>,
    listeners: Mutex<Vec<TcpListener>>,
    ended: tokio::sync::Mutex<mpsc::UnboundedReceiver<Result<(), Error>>>,
}

impl Server {
    /// Starts relaying what arrives at the listeners, which are bound, listening and non-blocking.
    ///
    /// The listeners are dealt out to the workers one by one; it takes no more workers than listeners.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn start(
        workers: &Workers,
        listeners: Vec<TcpListener>,
        settings: Settings,
    ) -> Result<Self, Error> {
        let chosen: Vec<usize> = workers.pick(listeners.len()).collect();
        let mut shares: Vec<Vec<TcpListener>> = chosen.iter().map(|_| Vec::new()).collect();
        for (number, listener) in listeners.iter().enumerate() {
            // the same socket: the caller's side is kept to be handed over to whoever comes next
            let share = listener.try_clone().map_err(Error::Start)?;
            shares[number % chosen.len()].push(share);
        }
        let (report, ended) = mpsc::unbounded_channel();
        let server = Self {
            phase: watch::Sender::new(Phase::Serving),
            common: Arc::new(Common {
                settings: ArcSwap::from_pointee(settings),
                counters: chosen.iter().map(|_| Arc::default()).collect(),
                limiter: Limiter::default(),
            }),
            listeners: Mutex::new(listeners),
            ended: tokio::sync::Mutex::new(ended),
        };
        for (number, (worker, share)) in chosen.into_iter().zip(shares).enumerate() {
            let common = Arc::clone(&server.common);
            let phase = server.phase.subscribe();
            let outcome = Outcome {
                report: report.clone(),
                result: Some(Err(Error::Panicked)),
            };
            workers.submit(worker, move |shared| {
                let shared = Rc::clone(shared);
                tokio::task::spawn_local(async move {
                    let result = work(shared, common, number, share, phase).await;
                    outcome.is(result);
                });
            });
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

    /// The listening sockets, once more, for whoever listens next; none once it drains.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn listeners(&self) -> io::Result<Vec<TcpListener>> {
        let listeners = self
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        listeners.iter().map(TcpListener::try_clone).collect()
    }

    /// Treats what is accepted from here on as told; open connections keep their target, mark and idle
    /// timeout.
    pub fn set(&self, settings: Settings) {
        self.common.settings.store(Arc::new(settings));
    }

    /// Takes no new connections from here on; the open ones go on until they end.
    pub fn drain(&self) {
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.phase.send_replace(Phase::Draining);
    }

    /// Waits until every connection has ended, after a drain, or until it fails. Cancel-safe; one
    /// caller at a time is told.
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

/// The relay's life on one worker thread.
async fn work(
    shared: Rc<Shared>,
    common: Arc<Common>,
    number: usize,
    listeners: Vec<TcpListener>,
    mut phase: watch::Receiver<Phase>,
) -> Result<(), Error> {
    let counters = Arc::clone(&common.counters[number]);
    let worker = Worker::new(shared, common, counters);
    let mut accepting = JoinSet::new();
    for listener in listeners {
        accepting.spawn_local(accept_from(Rc::clone(&worker), listener));
    }
    tokio::select! {
        failed = accepting.join_next() => return Err(match failed {
            Some(Ok(source)) => Error::Listener { instance: worker.settings().name.to_string(), source },
            _ => Error::Panicked,
        }),
        // an error means that the server was dropped
        _ = phase.wait_for(|phase| *phase == Phase::Draining) => {}
    }
    // closes the listeners
    accepting.shutdown().await;
    worker.drained().await;
    Ok(())
}
