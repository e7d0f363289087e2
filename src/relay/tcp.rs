//! A TCP relay as a running thing: one instance's part on the worker threads, around sockets that the
//! caller bound.
//!
//! Owns: starting and draining it, changing what it is told. Must not know: configuration, signals, routing.

use std::io;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::counters::{Counters, Totals};
use super::ports::{Port, Ports};
use super::report::{LastError, Limiter};
use super::settings::Settings;
use super::spread::{Arrivals, Spread};
use super::view::Query;
use super::worker::{Common, Worker, accept_from, take_queue};
use super::workers::{Shared, Workers};
use crate::socket::stream::{Acceptor, StreamListener};

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
    listeners: Mutex<Vec<Arc<StreamListener>>>,
    ended: tokio::sync::Mutex<mpsc::UnboundedReceiver<Result<(), Error>>>,
    queries: Vec<mpsc::UnboundedSender<Query>>,
}

impl Server {
    /// Starts relaying what arrives at the listeners, which are bound, listening and non-blocking.
    ///
    /// The listeners are dealt out to the workers one by one; it takes no more workers than listeners, but
    /// for a Unix socket, of which there can be only one: its worker deals the connections out to all.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn start(
        workers: &Workers,
        listeners: Vec<impl Into<StreamListener>>,
        settings: Settings,
    ) -> Result<Self, Error> {
        // one descriptor for the worker and for whoever is handed the listener next
        let listeners: Vec<Arc<StreamListener>> = listeners
            .into_iter()
            .map(|one| Arc::new(one.into()))
            .collect();
        let is_unix =
            |listener: &Arc<StreamListener>| matches!(**listener, StreamListener::Unix(_));
        let wanted = match listeners.iter().any(is_unix) {
            true => workers.count(),
            false => listeners.len(),
        };
        let chosen: Vec<usize> = workers.pick(wanted).collect();
        let mut shares: Vec<Vec<Arc<StreamListener>>> = chosen.iter().map(|_| Vec::new()).collect();
        for (number, listener) in listeners.iter().enumerate() {
            shares[number % chosen.len()].push(Arc::clone(listener));
        }
        let ports = Ports::of(&listeners, settings.intercepted).map_err(Error::Start)?;
        let counters: Vec<Arc<Counters>> = chosen.iter().map(|_| Arc::default()).collect();
        let (spread, arrivals) = Spread::new(&counters);
        let (report, ended) = mpsc::unbounded_channel();
        let (queries, questions): (_, Vec<_>) =
            chosen.iter().map(|_| mpsc::unbounded_channel()).unzip();
        let server = Self {
            phase: watch::Sender::new(Phase::Serving),
            common: Arc::new(Common {
                settings: ArcSwap::from_pointee(settings),
                counters,
                last_error: Mutex::default(),
                limiter: Limiter::default(),
                spread,
                ports,
            }),
            listeners: Mutex::new(listeners),
            ended: tokio::sync::Mutex::new(ended),
            queries,
        };
        let parts = chosen.into_iter().zip(shares).zip(arrivals).zip(questions);
        for (number, (((worker, listeners), arrivals), queries)) in parts.enumerate() {
            let part = Part {
                number,
                listeners,
                arrivals,
                queries,
            };
            let common = Arc::clone(&server.common);
            let phase = server.phase.subscribe();
            let outcome = Outcome {
                report: report.clone(),
                result: Some(Err(Error::Panicked)),
            };
            workers.submit(worker, move |shared| {
                let shared = Rc::clone(shared);
                tokio::task::spawn_local(async move {
                    let result = work(shared, common, part, phase).await;
                    outcome.is(result);
                });
            });
        }
        Ok(server)
    }

    /// What was last said about a connection that was not relayed.
    pub fn last_error(&self) -> Option<LastError> {
        let last = &self.common.last_error;
        last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The last line of each kind about each proxy, the newest last.
    pub fn recent_errors(&self) -> Vec<LastError> {
        self.common.limiter.recent()
    }

    /// Asks every worker. Each answers once, in its turn; the reply's receiver ends after the last.
    pub fn ask(&self, query: &Query) {
        for worker in &self.queries {
            // a worker that is gone has no connections
            let _ = worker.send(query.clone());
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

    /// How many connections came to each port of a range, of those to which any came.
    pub fn ports(&self) -> Vec<Port> {
        self.common.ports.read()
    }

    /// The listening sockets, once more, for whoever listens next; none once it drains.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn listeners(&self) -> io::Result<Vec<StreamListener>> {
        let listeners = self
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        listeners.iter().map(|one| one.try_clone()).collect()
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

/// What one worker gets of a relay.
struct Part {
    number: usize,
    listeners: Vec<Arc<StreamListener>>,
    arrivals: Arrivals,
    queries: mpsc::UnboundedReceiver<Query>,
}

/// The relay's life on one worker thread.
async fn work(
    shared: Rc<Shared>,
    common: Arc<Common>,
    part: Part,
    mut phase: watch::Receiver<Phase>,
) -> Result<(), Error> {
    let Part {
        number,
        listeners,
        mut arrivals,
        queries,
    } = part;
    let worker = Worker::new(shared, common, number);
    tokio::task::spawn_local(Rc::clone(&worker).answer(queries));
    let listeners = listeners
        .into_iter()
        .map(|listener| Acceptor::new(listener).map(Rc::new))
        .collect::<io::Result<Vec<_>>>()
        .map_err(Error::Start)?;
    let mut accepting = JoinSet::new();
    for listener in &listeners {
        accepting.spawn_local(accept_from(Rc::clone(&worker), Rc::clone(listener)));
    }
    // each branch can be dropped and tried again: nothing is taken before it is chosen
    loop {
        tokio::select! {
            failed = accepting.join_next(), if !accepting.is_empty() => return Err(match failed {
                Some(Ok(source)) => Error::Listener { instance: worker.settings().name.to_string(), source },
                _ => Error::Panicked,
            }),
            // an error means that the server was dropped
            _ = phase.wait_for(|phase| *phase == Phase::Draining) => break,
            Some(accepted) = arrivals.recv() => worker.take_over(accepted),
        }
    }
    accepting.shutdown().await;
    for listener in listeners {
        take_queue(&worker, &listener);
    }
    // a worker that has not heard of the drain yet keeps from here on what it accepts
    arrivals.close();
    while let Some(accepted) = arrivals.recv().await {
        worker.take_over(accepted);
    }
    worker.drained().await;
    Ok(())
}
