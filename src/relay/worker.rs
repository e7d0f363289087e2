//! One relay's side on one worker thread: its listeners, its connections, what they share.
//!
//! Owns: accepting, limits on open connections, the life of one connection. A connection never leaves
//! its thread, so everything here is shared without a lock. Must not know: other threads but through
//! counters, signals, how long a drain may take.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::ops::Deref;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use nix::errno::Errno;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tracing::{Span, debug, info_span, trace};

use super::copy::{self, End, Side};
use super::counters::{Counters, Refusal};
use super::report::{Limiter, Subject};
use super::settings::Settings;
use super::setup::{self, Begun, Ready, Slow};
use super::workers::Shared;
use crate::model::ProxyAddr;
use crate::socket;

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
    pub(super) limiter: Limiter,
}

/// What the connections of one relay on one thread share.
pub(super) struct Worker {
    pub(super) shared: Rc<Shared>,
    pub(super) common: Arc<Common>,
    pub(super) counters: Arc<Counters>,
    /// Names the instance in every line about a connection.
    span: Span,
    empty: Notify,
}

impl Worker {
    pub(super) fn new(
        shared: Rc<Shared>,
        common: Arc<Common>,
        counters: Arc<Counters>,
    ) -> Rc<Self> {
        let span = info_span!("relay", instance = %common.settings.load().name);
        Rc::new(Self {
            shared,
            common,
            counters,
            span,
            empty: Notify::new(),
        })
    }

    /// As they are now; not to be held over a wait.
    pub(super) fn settings(&self) -> Guard<Arc<Settings>> {
        self.common.settings.load()
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
        self.settings().max_connections.is_none_or(|max| {
            let open: u64 = self.common.counters.iter().map(|of| of.active.get()).sum();
            open < u64::from(max.get())
        })
    }

    fn shared(&self) -> copy::Shared<'_> {
        copy::Shared {
            buffer: &self.shared.buffer,
            pipes: &self.shared.pipes,
            to_target: &self.counters.bytes_to_target,
            to_client: &self.counters.bytes_to_client,
            spliced: &self.counters.bytes_spliced,
        }
    }
}

/// Accepts until the listener itself fails; everything else is survived.
///
/// Cancel-safe: a connection is taken off the queue and spawned without a wait between.
pub(super) async fn accept_from(worker: Rc<Worker>, listener: TcpListener) -> io::Error {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return error,
    };
    let mut in_a_row = 0;
    let mut pause = FIRST_PAUSE;
    loop {
        match listener.accept().await {
            Ok((client, peer)) => {
                pause = FIRST_PAUSE;
                adopt(&worker, client, peer);
                in_a_row += 1;
                if in_a_row >= ACCEPTS_PER_TURN {
                    in_a_row = 0;
                    tokio::task::yield_now().await;
                }
            }
            Err(error) => match Trouble::of(&error) {
                Trouble::Connection => {
                    debug!(%error, "a connection was lost before it was accepted")
                }
                Trouble::Exhausted => {
                    worker.counters.accept_pauses.add(1);
                    if pause == FIRST_PAUSE {
                        let _named = worker.span.enter();
                        worker.common.limiter.warn_about_listener(
                            &listener,
                            &format_args!("accepting pauses: {error}: raise LimitNOFILE or set max-connections"),
                        );
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                Trouble::Listener => return error,
            },
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

fn adopt(worker: &Rc<Worker>, client: TcpStream, peer: SocketAddr) {
    worker.counters.accepted.add(1);
    let proxy = ProxyAddr::new(peer);
    let Some(live) = Live::new(worker) else {
        let _named = worker.span.enter();
        worker.counters.refuse(Refusal::TooManyConnections);
        worker.common.limiter.warn(
            Subject::Refused(Refusal::TooManyConnections),
            proxy,
            None,
            &"refused: max-connections are open",
        );
        socket::reset_on_close(&client);
        return;
    };
    tokio::task::spawn_local(Connection {
        live,
        stage: Stage::Accepted(client, proxy),
    });
}

/// A place among the open connections.
struct Live(Rc<Worker>);

impl Live {
    fn new(worker: &Rc<Worker>) -> Option<Self> {
        if !worker.may_open() {
            return None;
        }
        worker.counters.active.add(1);
        Some(Self(Rc::clone(worker)))
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.counters.active.sub_one();
        if self.0.counters.active.get() == 0 {
            self.0.empty.notify_waiters();
        }
    }
}

impl Deref for Live {
    type Target = Rc<Worker>;

    fn deref(&self) -> &Rc<Worker> {
        &self.0
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
    Accepted(TcpStream, ProxyAddr),
    Slow(Slow),
    Relaying(Ready),
    Over,
}

impl Future for Connection {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { stage, live } = &mut *self;
        loop {
            match stage {
                Stage::Accepted(..) => {
                    let Stage::Accepted(client, proxy) = std::mem::replace(stage, Stage::Over)
                    else {
                        return Poll::Ready(());
                    };
                    let _named = live.span.enter();
                    *stage = match setup::begin(live, cx, client, proxy) {
                        Begun::Ready(ready) => Stage::Relaying(ready),
                        Begun::Slow(slow) => Stage::Slow(slow),
                        Begun::Over => Stage::Over,
                    };
                }
                Stage::Slow(slow) => {
                    let _named = live.span.enter();
                    *stage = match ready!(slow.as_mut().poll(cx)) {
                        Some(ready) => Stage::Relaying(ready),
                        None => Stage::Over,
                    };
                }
                Stage::Relaying(relaying) => {
                    let end = ready!(relaying.pair.poll(cx, &live.shared()));
                    let _named = live.span.enter();
                    finish(live, relaying, end);
                    *stage = Stage::Over;
                }
                Stage::Over => return Poll::Ready(()),
            }
        }
    }
}

fn finish(worker: &Worker, relayed: &Ready, end: End) {
    let Ready { pair, ends } = relayed;
    let (bytes_in, bytes_out) = pair.bytes();
    let (client_socket, target_socket) = pair.sockets();
    match end {
        End::Closed => trace!(
            proxy.addr = %ends.proxy, client.addr = %ends.client, bytes.r#in = bytes_in, bytes.out = bytes_out,
            "closed"
        ),
        End::Broken { side, error } => {
            worker.counters.resets.add(1);
            // a reset is passed on as a reset: an ordinary close would tell the other side that all is well
            let (other, name) = match side {
                Side::Client => (target_socket, "proxy"),
                Side::Target => (client_socket, "service"),
            };
            socket::reset_on_close(other);
            debug!(
                proxy.addr = %ends.proxy, client.addr = %ends.client, bytes.r#in = bytes_in,
                bytes.out = bytes_out, %error, "the {name}'s side failed, the other is reset"
            );
        }
        End::Idle => {
            worker.counters.idle_ended.add(1);
            debug!(
                proxy.addr = %ends.proxy, client.addr = %ends.client, bytes.r#in = bytes_in,
                bytes.out = bytes_out, "closed: idle timeout"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_connection_is_small() {
        // tokio's own share per connection is two registrations and the task's header
        assert!(
            size_of::<Connection>() <= 208,
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
