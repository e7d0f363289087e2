//! A TCP relay as a running thing: worker threads around sockets that the caller bound.
//!
//! Owns: starting, draining and ending the threads. Must not know: configuration, signals, routing.
//! A worker thread is started by the calling thread and so lives in its network namespace.

use std::io;
use std::net::TcpListener;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::thread::JoinHandle;

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::info_span;

use super::counters::{Counters, Totals};
use super::report::Limiter;
use super::settings::Settings;
use super::worker::{Common, Worker, accept_from};

/// Why a relay could not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system gave no thread or no epoll instance.
    #[error("cannot start a worker thread")]
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
    /// A worker thread panicked: a bug.
    #[error("a worker thread panicked")]
    Panicked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Serving,
    Draining,
    Ending,
}

/// A running relay. Dropping it ends its connections and waits for its threads.
#[derive(Debug)]
pub struct Server {
    phase: watch::Sender<Phase>,
    common: Arc<Common>,
    ended: mpsc::UnboundedReceiver<Result<(), Error>>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts relaying what arrives at the listeners, which are bound, listening and non-blocking.
    ///
    /// The listeners are dealt out to the workers one by one. A worker without a listener would be
    /// idle, so there are never more workers than listeners.
    ///
    /// # Errors
    /// When a thread cannot be started; those that were are ended.
    pub fn start(
        listeners: Vec<TcpListener>,
        settings: Settings,
        workers: NonZeroUsize,
    ) -> Result<Self, Error> {
        let workers = workers.get().min(listeners.len());
        let common = Arc::new(Common {
            settings,
            counters: (0..workers).map(|_| Arc::default()).collect(),
            limiter: Limiter::default(),
            open: AtomicU32::new(0),
        });
        let mut shares: Vec<Vec<TcpListener>> = (0..workers).map(|_| Vec::new()).collect();
        for (number, listener) in listeners.into_iter().enumerate() {
            shares[number % workers].push(listener);
        }
        let (report, ended) = mpsc::unbounded_channel();
        let mut server = Self {
            phase: watch::Sender::new(Phase::Serving),
            common,
            ended,
            threads: Vec::with_capacity(workers),
        };
        for (number, share) in shares.into_iter().enumerate() {
            let common = Arc::clone(&server.common);
            let phase = server.phase.subscribe();
            let report = report.clone();
            let thread = std::thread::Builder::new()
                .name(format!("relay-{number}"))
                .spawn(move || {
                    let mut outcome = Outcome {
                        report,
                        result: Some(Err(Error::Panicked)),
                    };
                    outcome.result = Some(work(&common, number, share, phase));
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

    /// Takes no new connections from here on; the open ones go on until they end.
    pub fn drain(&self) {
        self.enter(Phase::Draining);
    }

    /// Cuts what is still open.
    pub fn end(&self) {
        self.enter(Phase::Ending);
    }

    fn enter(&self, wanted: Phase) {
        self.phase.send_if_modified(|phase| {
            let later = wanted > *phase;
            *phase = wanted.max(*phase);
            later
        });
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
fn work(
    common: &Arc<Common>,
    number: usize,
    listeners: Vec<TcpListener>,
    mut phase: watch::Receiver<Phase>,
) -> Result<(), Error> {
    let runtime = Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build_local(LocalOptions::default())
        .map_err(Error::Start)?;
    // entered once for the thread: every line of every connection names the instance
    let _span = info_span!("relay", instance = %common.settings.name).entered();
    runtime.block_on(async {
        let worker = Worker::new(Arc::clone(common), Arc::clone(&common.counters[number]));
        let mut accepting = JoinSet::new();
        for listener in listeners {
            accepting.spawn_local(accept_from(worker.clone(), listener));
        }
        tokio::select! {
            failed = accepting.join_next() => return Err(match failed {
                Some(Ok(source)) => Error::Listener { instance: common.settings.name.to_string(), source },
                _ => Error::Panicked,
            }),
            () = reached(&mut phase, Phase::Draining) => {}
        }
        // closes the listeners
        accepting.shutdown().await;
        tokio::select! {
            () = worker.drained() => {}
            () = reached(&mut phase, Phase::Ending) => {}
        }
        Ok(())
    })
    // dropping the runtime closes whatever is still open
}

/// Waits for a phase or a later one, or for the server to be gone.
async fn reached(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    // an error means that the server was dropped, which ends everything
    let _ = phase.wait_for(|phase| *phase >= wanted).await;
}
