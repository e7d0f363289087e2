//! One relay's side on one worker thread: its listeners, its connections, what they share.
//!
//! Owns: accepting, limits on open connections, the life of one connection. A connection never leaves
//! its thread, so everything here is shared without a lock. Must not know: other threads but through
//! counters, signals, how long a drain may take.

use std::future::Future;
use std::io;
use std::net::TcpStream;
use std::ops::Deref;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use nix::errno::Errno;
use tokio::sync::{Notify, mpsc};
use tracing::{Span, debug, info_span, warn};

use super::copy::{self, End, Pair, Side};
use super::counters::{Counters, Refusal};
use super::ports::Ports;
use super::registry::{Entry, Registry};
use super::report::{self, LastError, Limiter, Subject};
use super::settings::Settings;
use super::setup::{self, Begun, Slow};
use super::spread::{Spread, Turnover};
use super::view::{Ask, Query, Reason};
use super::workers::Shared;
use crate::model::ProxyAddr;
use crate::socket;
use crate::socket::stream::{Acceptor, Taken};

/// After how many accepts in a row the connections get their turn.
const ACCEPTS_PER_TURN: u32 = 32;
/// How long accepting pauses at first when descriptors run out; twice as long each time, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// The longest pause: soon enough after somebody closes something.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// What the workers of one relay have in common.
#[derive(Debug)]
pub(super) struct Common {
    /// Swapped as a whole, without a lock, when the configuration is read again.
    pub(super) settings: ArcSwap<Settings>,
    /// Every worker's counters, for limits that hold for all of them together.
    pub(super) counters: Vec<Arc<Counters>>,
    /// Locked for as long as a line takes that was worth a warning.
    pub(super) last_error: Mutex<Option<LastError>>,
    pub(super) limiter: Limiter,
    pub(super) spread: Spread,
    pub(super) ports: Ports,
}

/// What the connections of one relay on one thread share.
pub(super) struct Worker {
    pub(super) shared: Rc<Shared>,
    pub(super) common: Arc<Common>,
    pub(super) counters: Arc<Counters>,
    number: usize,
    /// Names the instance in every line about a connection.
    pub(super) span: Span,
    registry: Registry,
    empty: Notify,
}

impl Worker {
    /// The worker of this number among those of its relay.
    pub(super) fn new(shared: Rc<Shared>, common: Arc<Common>, number: usize) -> Rc<Self> {
        let counters = Arc::clone(&common.counters[number]);
        let span = info_span!("relay", instance = %common.settings.load().name);
        Rc::new(Self {
            shared,
            common,
            counters,
            number,
            span,
            registry: Registry::default(),
            empty: Notify::new(),
        })
    }

    /// As they are now; not to be held over a wait.
    pub(super) fn settings(&self) -> Guard<Arc<Settings>> {
        self.common.settings.load()
    }

    /// Keeps what was said last, for `status`.
    pub(super) fn remember(&self, error: LastError) {
        let last = &self.common.last_error;
        *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    /// Waits until no connection is open.
    pub(super) async fn drained(&self) {
        while self.counters.active.get() > 0 {
            // one thread: nothing can end between the look and the wait
            self.empty.notified().await;
        }
    }

    /// Whether one more connection may wait for its header. The other workers' numbers are read
    /// without a lock: the sum can be off by what they accept in the same instant.
    pub(super) fn may_wait(&self) -> bool {
        let waiting: u64 = self.common.counters.iter().map(|of| of.waiting.get()).sum();
        waiting < u64::from(self.settings().max_waiting.get())
    }

    /// Whether one more connection may be open; read like [`Worker::may_wait`].
    fn may_open(&self) -> bool {
        self.settings()
            .max_connections
            .is_none_or(|max| self.common.spread.open() < u64::from(max.get()))
    }

    /// Takes a connection that another worker handed over.
    pub(super) fn take_over(self: &Rc<Self>, accepted: Taken) {
        self.common.spread.arrived(self.number);
        adopt(self, accepted);
    }

    /// How long connections stay here, as far as it matters for where the next one goes.
    fn turnover(&self) -> Turnover {
        if self.registry.left_lately() > self.counters.active.get() {
            Turnover::Fast
        } else {
            Turnover::Slow
        }
    }

    /// Answers questions about this relay's connections on this thread, until nobody can ask any more.
    pub(super) async fn answer(self: Rc<Self>, mut queries: mpsc::UnboundedReceiver<Query>) {
        while let Some(query) = queries.recv().await {
            let rows = match query.what {
                Ask::Live => self.registry.open(&query.filter),
                Ask::Kill => self.registry.kill(&query.filter),
                Ask::Recent => {
                    let instance = &self.settings().name;
                    self.shared.recent.of(instance, &query.filter)
                }
            };
            // whoever asked may have given up
            let _ = query.reply.send(rows);
        }
    }

    fn shared(&self) -> copy::Shared<'_> {
        copy::Shared {
            buffer: &self.shared.buffer,
            ring: self.shared.ring.as_ref(),
            pipes: &self.shared.pipes,
            to_target: &self.counters.bytes_to_target,
            to_client: &self.counters.bytes_to_client,
            spliced: &self.counters.bytes_spliced,
        }
    }
}

/// Accepts until the listener itself fails; everything else is survived.
///
/// A connection is registered with no event loop before it is known whose it is: registering it here, and
/// once more on the thread that it is handed over to, would cost each of these four system calls.
///
/// Cancel-safe: a connection is taken off the queue and spawned, or handed over, without a wait between.
pub(super) async fn accept_from(worker: Rc<Worker>, listener: Rc<Acceptor>) -> io::Error {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut ready = match listener.ready().await {
            Ok(ready) => ready,
            Err(error) => return error,
        };
        let mut taken = 0;
        while taken < ACCEPTS_PER_TURN {
            taken += 1;
            let error = match ready.accept() {
                Some(Ok(accepted)) => {
                    pause = FIRST_PAUSE;
                    deal(&worker, accepted);
                    continue;
                }
                Some(Err(error)) => error,
                // all taken: readiness is cleared
                None => break,
            };
            match Trouble::of(&error) {
                Trouble::Connection => {
                    debug!(%error, "a connection was lost before it was accepted")
                }
                Trouble::Exhausted => {
                    worker.counters.accept_pauses.add(1);
                    if pause == FIRST_PAUSE {
                        let _named = worker.span.enter();
                        worker.common.limiter.warn_about_listener(
                            listener.listener(),
                            &format_args!("accepting pauses: {error}: raise LimitNOFILE or set max-connections"),
                        );
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                Trouble::Listener => return error,
            }
        }
        if taken == ACCEPTS_PER_TURN {
            // the connections' turn; not each time, because a task that yields costs its thread two system calls
            tokio::task::yield_now().await;
        }
    }
}

/// Takes what the kernel has completed already, before the listener is closed: it would reset them.
/// Never waits.
pub(super) fn take_queue(worker: &Rc<Worker>, listener: &Acceptor) {
    loop {
        match listener.accept_now() {
            Ok(accepted) => deal(worker, accepted),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) if Trouble::of(&error) == Trouble::Connection => {}
            Err(error) => {
                let _named = worker.span.enter();
                warn!(%error, "connections that were not accepted yet are lost");
                return;
            }
        }
    }
}

/// What an error of accept(2) is about.
#[derive(Debug, PartialEq, Eq)]
enum Trouble {
    /// The connection at the head of the queue; Linux passes on its pending network errors.
    Connection,
    /// Descriptors or memory: it passes when something is closed.
    Exhausted,
    /// The listener is broken for good.
    Listener,
}

impl Trouble {
    fn of(error: &io::Error) -> Self {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM) => Self::Exhausted,
            Some(
                Errno::EBADF | Errno::EINVAL | Errno::ENOTSOCK | Errno::EOPNOTSUPP | Errno::EFAULT,
            ) => Self::Listener,
            _ => Self::Connection,
        }
    }
}

/// Gives a connection to the worker that has the least to do, which is this one nearly always.
fn deal(worker: &Rc<Worker>, accepted: Taken) {
    let spread = &worker.common.spread;
    let kept = match spread.elsewhere(worker.number, worker.turnover()) {
        None => Some(accepted),
        // that one may drain already
        Some(to) => spread.send(to, accepted).err(),
    };
    if let Some(accepted) = kept {
        adopt(worker, accepted);
    }
}

fn adopt(worker: &Rc<Worker>, accepted: Taken) {
    let Taken { socket, peer, port } = accepted;
    let proxy = peer;
    worker.counters.accepted.add(1);
    worker.common.ports.count(port);
    let Some(live) = Live::new(worker, proxy, port) else {
        worker.counters.refuse(Refusal::TooManyConnections);
        let _named = worker.span.enter();
        report::warn_about(
            worker,
            Subject::Refused(Refusal::TooManyConnections),
            (proxy, None),
            &"refused: max-connections are open",
        );
        socket::reset_on_close(&socket);
        return;
    };
    tokio::task::spawn_local(Connection {
        live,
        stage: Stage::Accepted(socket),
    });
}

/// One connection and the worker it belongs to.
#[derive(Clone)]
pub(super) struct Conn {
    worker: Rc<Worker>,
    pub(super) entry: Rc<Entry>,
}

impl Conn {
    pub(super) fn worker(&self) -> &Rc<Worker> {
        &self.worker
    }
}

impl Deref for Conn {
    type Target = Worker;

    fn deref(&self) -> &Worker {
        &self.worker
    }
}

/// A place among the open connections.
struct Live(Conn);

impl Live {
    fn new(worker: &Rc<Worker>, proxy: ProxyAddr, port: u16) -> Option<Self> {
        if !worker.may_open() {
            return None;
        }
        worker.counters.active.add(1);
        Some(Self(Conn {
            worker: Rc::clone(worker),
            entry: worker
                .registry
                .enter(proxy, port, worker.common.settings.load_full()),
        }))
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let Conn { worker, entry } = &self.0;
        worker.registry.leave(entry, &worker.shared.recent);
        worker.counters.active.sub_one();
        if worker.counters.active.get() == 0 {
            worker.empty.notify_waiters();
        }
    }
}

/// One connection from accept to close. Written out as a future by hand because its size is the
/// memory of an idle connection: the slow ways of setting up are boxed, and gone when it relays.
struct Connection {
    // dropped after the sockets: a drain has ended only when they are closed
    stage: Stage,
    live: Live,
}

enum Stage {
    Accepted(TcpStream),
    Slow(Slow),
    Relaying(Pair),
    Over,
}

impl Future for Connection {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { stage, live } = &mut *self;
        let conn = &live.0;
        if conn.entry.is_killed() {
            let _named = conn.span.enter();
            kill(conn, stage);
            *stage = Stage::Over;
        }
        loop {
            match stage {
                Stage::Accepted(_) => {
                    let Stage::Accepted(client) = std::mem::replace(stage, Stage::Over) else {
                        return Poll::Ready(());
                    };
                    let _named = conn.span.enter();
                    conn.registry.woken_by(&conn.entry, cx.waker());
                    *stage = match setup::begin(conn, client) {
                        Begun::Ready(pair) => Stage::Relaying(pair),
                        Begun::Slow(slow) => Stage::Slow(slow),
                        Begun::Over => Stage::Over,
                    };
                }
                Stage::Slow(slow) => {
                    let _named = conn.span.enter();
                    *stage = match ready!(slow.as_mut().poll(cx)) {
                        Some(pair) => Stage::Relaying(pair),
                        None => Stage::Over,
                    };
                }
                Stage::Relaying(pair) => {
                    let outcome = pair.poll(cx, &conn.shared());
                    conn.entry.moved(pair.bytes());
                    let end = ready!(outcome);
                    let _named = conn.span.enter();
                    finish(conn, pair, end);
                    *stage = Stage::Over;
                }
                Stage::Over => return Poll::Ready(()),
            }
        }
    }
}

/// Ends a connection from outside: both sides are told that it did not end well.
fn kill(conn: &Conn, stage: &Stage) {
    conn.counters.killed.add(1);
    conn.entry.ends(Reason::Killed);
    if let Stage::Relaying(pair) = stage {
        let (client, target) = pair.sockets();
        socket::reset_on_close(client);
        socket::reset_on_close(target);
    }
    report::ended(conn, None);
}

fn finish(conn: &Conn, pair: &Pair, end: End) {
    let (client, target) = pair.sockets();
    let (reason, error) = match end {
        End::Closed => (Reason::Closed, None),
        End::Idle => {
            conn.counters.idle_ended.add(1);
            (Reason::Idle, None)
        }
        End::Broken { side, error } => {
            conn.counters.resets.add(1);
            // a reset is passed on as a reset: an ordinary close would tell the other side that all is well
            let (other, reason) = match side {
                Side::Client => (target, Reason::ProxyFailed),
                Side::Target => (client, Reason::ServiceFailed),
            };
            socket::reset_on_close(other);
            (reason, Some(error))
        }
    };
    conn.entry.ends(reason);
    report::ended(conn, error.as_ref());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_connection_is_small() {
        // tokio's task around it is 112 bytes more, in steps of 128
        assert!(
            size_of::<Connection>() <= 144,
            "a connection takes {} bytes",
            size_of::<Connection>()
        );
    }

    #[test]
    fn only_the_listener_itself_is_fatal() {
        for (errno, trouble) in [
            (libc::EMFILE, Trouble::Exhausted),
            (libc::ENFILE, Trouble::Exhausted),
            (libc::ECONNABORTED, Trouble::Connection),
            (libc::EPROTO, Trouble::Connection),
            (libc::EPERM, Trouble::Connection),
            (libc::EINVAL, Trouble::Listener),
        ] {
            assert_eq!(Trouble::of(&io::Error::from_raw_os_error(errno)), trouble);
        }
    }
}
