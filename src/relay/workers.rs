//! The worker threads of a process: a few event loops, one per core, that host the relays of every instance.
//!
//! Owns: the threads, and what everything on one thread shares. Must not know: what runs there.
//! A worker thread is started by the calling thread and so lives in its network namespace.

use std::cell::RefCell;
use std::io;
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::{mpsc, oneshot};
use tracing::debug;

use super::copy::{BUFFER, Ring};
use super::registry::Recent;
use super::splice::Pool;
use super::udp::scratch::Scratch;

/// What every relay on one thread uses in turn.
pub(super) struct Shared {
    /// In use only inside one poll.
    pub(super) buffer: RefCell<Box<[u8]>>,
    /// Where the system has io_uring, and it is wanted.
    pub(super) ring: Option<Rc<Ring>>,
    pub(super) pipes: Pool,
    /// Taken for one round at a time.
    pub(super) datagrams: RefCell<Scratch>,
    /// Connections that ended.
    pub(super) recent: Recent,
}

/// Whether the pieces that many connections have to pass on go through io_uring together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoUring {
    /// Where the system allows it; otherwise each goes alone.
    #[default]
    Auto,
    /// Each goes alone.
    Off,
}

/// Runs once on the thread, within its event loop: it may spawn local tasks, and does not block.
type Job = Box<dyn FnOnce(&Rc<Shared>) + Send>;

/// Running worker threads. Dropping them cuts every connection that is left, and waits for the threads.
#[derive(Debug)]
pub struct Workers {
    threads: Vec<Thread>,
    /// Where the next relay begins to deal out its listeners, so that relays with few do not all sit on the first.
    next: AtomicUsize,
}

#[derive(Debug)]
struct Thread {
    jobs: mpsc::UnboundedSender<Job>,
    handle: JoinHandle<()>,
}

impl Workers {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the system gives no thread or no epoll instance; those that were started are ended.
    pub fn start(count: NonZeroUsize) -> io::Result<Self> {
        Self::start_with(count, IoUring::default())
    }

    /// Starts the threads, with io_uring or without.
    ///
    /// # Errors
    /// As [`Workers::start`].
    pub fn start_with(count: NonZeroUsize, io_uring: IoUring) -> io::Result<Self> {
        let mut workers = Self {
            threads: Vec::with_capacity(count.get()),
            next: AtomicUsize::new(0),
        };
        for number in 0..count.get() {
            let (jobs, queue) = mpsc::unbounded_channel();
            let (report, started) = std::sync::mpsc::sync_channel(1);
            let handle = std::thread::Builder::new()
                .name(format!("relay-{number}"))
                .spawn(move || match event_loop() {
                    Ok(runtime) => {
                        // the caller waits for it
                        let _ = report.send(Ok(()));
                        work(&runtime, queue, io_uring);
                    }
                    Err(error) => {
                        let _ = report.send(Err(error));
                    }
                })?;
            workers.threads.push(Thread { jobs, handle });
            started
                .recv()
                .unwrap_or_else(|_| Err(io::Error::other("the thread ended")))?;
        }
        Ok(workers)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// The numbers of `count` workers, at most all of them, beginning where the last call ended.
    pub(super) fn pick(&self, count: usize) -> impl Iterator<Item = usize> + use<> {
        let all = self.threads.len();
        let count = count.min(all);
        let first = self.next.fetch_add(count, Ordering::Relaxed);
        (0..count).map(move |offset| first.wrapping_add(offset) % all)
    }

    /// Has a worker do something. A worker that is gone drops the job.
    pub(super) fn submit(&self, worker: usize, job: impl FnOnce(&Rc<Shared>) + Send + 'static) {
        if let Some(thread) = self.threads.get(worker) {
            let _ = thread.jobs.send(Box::new(job));
        }
    }

    /// Waits until every event loop has come round; false where a thread has died. For a watchdog: a
    /// worker that is stuck never answers. Cancel-safe.
    pub async fn answer(&self) -> bool {
        let answers: Vec<_> = (0..self.count())
            .map(|worker| {
                let (answer, answered) = oneshot::channel();
                self.submit(worker, move |_| {
                    let _ = answer.send(());
                });
                answered
            })
            .collect();
        for answered in answers {
            if answered.await.is_err() {
                return false;
            }
        }
        true
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for Thread { jobs, handle } in self.threads.drain(..).collect::<Vec<_>>() {
            drop(jobs);
            // a panic was printed by the thread
            let _ = handle.join();
        }
    }
}

/// After how many turns of connections sockets are asked for news, and new connections accepted, although
/// others are not done: beside bulk transfers a turn takes a hundred microseconds or more, and with tokio's
/// 61 of them a small exchange would wait for ten milliseconds.
const TURNS: u32 = 16;

fn event_loop() -> io::Result<LocalRuntime> {
    Builder::new_current_thread()
        .event_interval(TURNS)
        .enable_io()
        .enable_time()
        .build_local(LocalOptions::default())
}

/// The life of one thread. Dropping the runtime behind it closes whatever is still open.
fn work(runtime: &LocalRuntime, mut queue: mpsc::UnboundedReceiver<Job>, io_uring: IoUring) {
    let ring = match io_uring {
        IoUring::Auto => Ring::new()
            .inspect_err(|error| debug!(%error, "relaying without io_uring"))
            .ok(),
        IoUring::Off => None,
    };
    let shared = Rc::new(Shared {
        buffer: RefCell::new(vec![0; BUFFER].into_boxed_slice()),
        ring,
        pipes: Pool::default(),
        datagrams: RefCell::default(),
        recent: Recent::default(),
    });
    runtime.block_on(async {
        if let Some(ring) = &shared.ring {
            tokio::task::spawn_local(Rc::clone(ring).run());
        }
        while let Some(job) = queue.recv().await {
            job(&shared);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_stuck_worker_does_not_answer() {
        let workers = Workers::start(NonZeroUsize::new(2).unwrap()).unwrap();
        let runtime = Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            assert!(workers.answer().await);
            let (release, stuck) = std::sync::mpsc::channel::<()>();
            workers.submit(1, move |_| {
                let _ = stuck.recv();
            });
            let limit = Duration::from_millis(50);
            assert!(tokio::time::timeout(limit, workers.answer()).await.is_err());
            drop(release);
            assert!(workers.answer().await);
        });
    }

    #[test]
    fn relays_are_spread() {
        let workers = Workers::start(NonZeroUsize::new(3).unwrap()).unwrap();
        let pick = |count| workers.pick(count).collect::<Vec<_>>();
        assert_eq!(pick(1), [0]);
        assert_eq!(pick(1), [1]);
        assert_eq!(pick(9), [2, 0, 1]);
    }
}
