//! Bytes both ways between two sockets: small exchanges through one buffer per thread, bulk by splice.
//!
//! Owns: the state of a relayed pair, half-close, the choice between copy and splice. Must not know:
//! headers, addresses, how the sockets came to be.
//!
//! An idle pair holds no buffer and no pipe.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use super::counters::Counter;
use super::splice::{Pipe, Pool};

// The four sizes below, by measurement (docs/performance.md, 50 connections on 2 cores): a gigabyte took
// 0.34 s of the relay's CPU time spliced and 1.18 s copied, so a stream that fills half of the buffer at
// once is spliced. Below that a splice is two system calls and a pipe for what one read and one write do: a
// fill under 8 KiB ends it, four times less than what begins it, so that no stream goes back and forth.
// Turns of 256 KiB to 1 MiB made no difference to the rate; without them one busy connection held its
// thread for as long as there was something to move.

/// The shared buffer. It holds what a default receive window brings at once, and stays in the cache.
pub(super) const BUFFER: usize = 64 << 10;

/// A read of this many bytes or more is bulk.
const BULK: usize = 32 << 10;

/// A splice of fewer bytes than this is no longer bulk.
const SMALL: usize = 8 << 10;

/// After so many bytes one way it is the other connections' turn.
const TURN: u64 = 512 << 10;

/// What every pair of one thread uses in turn.
pub(super) struct Shared<'a> {
    /// Of [`BUFFER`] bytes; in use only inside one poll.
    pub(super) buffer: &'a RefCell<Box<[u8]>>,
    /// Spare pipes.
    pub(super) pipes: &'a Pool,
    /// Bytes handed to targets.
    pub(super) to_target: &'a Counter,
    /// Bytes handed to clients.
    pub(super) to_client: &'a Counter,
    /// Bytes spliced.
    pub(super) spliced: &'a Counter,
}

/// One of the two sockets of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The proxy's connection.
    Client,
    /// The spoofed connection to the service.
    Target,
}

/// How a pair ended.
#[derive(Debug)]
pub(super) enum End {
    /// Both sides closed their half.
    Closed,
    /// One side failed; the other must be reset.
    Broken {
        /// Where the error was seen.
        side: Side,
        /// What the kernel said.
        error: io::Error,
    },
    /// Nothing moved for the idle timeout.
    Idle,
}

/// Two sockets and what is between them.
pub(super) struct Pair {
    client: TcpStream,
    target: TcpStream,
    up: Flow,
    down: Flow,
    idle: Option<Box<Idle>>,
}

impl Pair {
    /// A pair whose target has to get, or has got, the client's first bytes.
    pub(super) fn new(
        client: TcpStream,
        target: TcpStream,
        first: First,
        idle_timeout: Option<Duration>,
    ) -> Self {
        Self {
            client,
            target,
            up: Flow {
                bytes: first.sent,
                state: first.unsent.map_or(State::Copy, State::Unsent),
            },
            down: Flow {
                bytes: 0,
                state: State::Copy,
            },
            idle: idle_timeout.map(|limit| Box::new(Idle::new(limit))),
        }
    }

    /// Bytes handed to the target and to the client so far.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.up.bytes, self.down.bytes)
    }

    /// The two sockets, the client's first.
    pub(super) fn sockets(&self) -> (&TcpStream, &TcpStream) {
        (&self.client, &self.target)
    }

    /// Moves what can be moved. Wakes when either side has news.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, shared: &Shared<'_>) -> Poll<End> {
        let before = self.up.bytes + self.down.bytes;
        let up = self.up.poll(
            cx,
            &mut self.client,
            &mut self.target,
            shared,
            shared.to_target,
        );
        if let Poll::Ready(Err(fault)) = up {
            return Poll::Ready(fault.seen(Side::Client, Side::Target));
        }
        let down = self.down.poll(
            cx,
            &mut self.target,
            &mut self.client,
            shared,
            shared.to_client,
        );
        if let Poll::Ready(Err(fault)) = down {
            return Poll::Ready(fault.seen(Side::Target, Side::Client));
        }
        if up.is_ready() && down.is_ready() {
            return Poll::Ready(End::Closed);
        }
        if let Some(idle) = &mut self.idle {
            let moved = self.up.bytes + self.down.bytes != before;
            ready!(idle.poll(cx, moved));
            return Poll::Ready(End::Idle);
        }
        Poll::Pending
    }
}

/// The client's first bytes, which came behind the header.
#[derive(Debug, Default)]
pub(super) struct First {
    sent: u64,
    unsent: Option<Box<Unsent>>,
}

impl First {
    /// So many bytes were sent, and these were not: a copy is kept of them.
    pub(super) fn new(sent: usize, unsent: &[u8]) -> Self {
        Self {
            sent: sent as u64,
            unsent: (!unsent.is_empty()).then(|| Unsent::boxed(unsent)),
        }
    }
}

/// Bytes that the writing side has not taken yet.
#[derive(Debug)]
struct Unsent {
    data: Box<[u8]>,
    sent: usize,
}

impl Unsent {
    /// A copy of bytes that are in the shared buffer.
    fn boxed(data: &[u8]) -> Box<Self> {
        Box::new(Self {
            data: data.into(),
            sent: 0,
        })
    }
}

/// One direction of a pair.
struct Flow {
    bytes: u64,
    state: State,
}

enum State {
    /// Nothing held: the next read goes through the shared buffer.
    Copy,
    /// Nothing held: the next read is spliced.
    Splice,
    /// The reader is slower than the writer: these bytes come first.
    Unsent(Box<Unsent>),
    /// A pipe with bytes in it comes first.
    Piped(Box<Pipe>),
    /// The end was passed on.
    Done,
}

enum Fault {
    Reading(io::Error),
    Writing(io::Error),
}

impl Fault {
    fn seen(self, from: Side, to: Side) -> End {
        let (side, error) = match self {
            Self::Reading(error) => (from, error),
            Self::Writing(error) => (to, error),
        };
        End::Broken { side, error }
    }
}

impl Flow {
    /// Ready when the end of `from` was passed on to `to`.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut TcpStream,
        to: &mut TcpStream,
        shared: &Shared<'_>,
        counter: &Counter,
    ) -> Poll<Result<(), Fault>> {
        let turn = self.bytes + TURN;
        loop {
            if self.bytes >= turn {
                // back to the end of the queue: whatever else became ready comes first
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            match &mut self.state {
                State::Copy => ready!(self.copy(cx, from, to, shared, counter))?,
                State::Splice => ready!(self.fill(cx, from, shared))?,
                State::Unsent(unsent) => {
                    let rest = &unsent.data[unsent.sent..];
                    if rest.is_empty() {
                        // whoever fills a socket's buffer faster than it drains is in bulk
                        self.state = State::Splice;
                        continue;
                    }
                    let sent =
                        ready!(Pin::new(&mut *to).poll_write(cx, rest)).map_err(Fault::Writing)?;
                    unsent.sent += sent;
                    self.count(sent, counter);
                }
                State::Piped(_) => ready!(self.drain(cx, to, shared, counter))?,
                State::Done => return Poll::Ready(Ok(())),
            }
            if let State::Done = self.state {
                // the FIN; the other direction goes on
                SockRef::from(&*to)
                    .shutdown(Shutdown::Write)
                    .map_err(Fault::Writing)?;
            }
        }
    }

    /// One read and its writes through the shared buffer.
    fn copy(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut TcpStream,
        to: &mut TcpStream,
        shared: &Shared<'_>,
        counter: &Counter,
    ) -> Poll<Result<(), Fault>> {
        let mut buffer = shared.buffer.borrow_mut();
        let mut read = ReadBuf::new(&mut buffer);
        // a short read also tells tokio that the socket is empty: no second read to find out
        ready!(Pin::new(from).poll_read(cx, &mut read)).map_err(Fault::Reading)?;
        let data = read.filled();
        if data.is_empty() {
            self.state = State::Done;
            return Poll::Ready(Ok(()));
        }
        let mut sent = 0;
        while sent < data.len() {
            match Pin::new(&mut *to).poll_write(cx, &data[sent..]) {
                Poll::Ready(Ok(more)) => sent += more,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Fault::Writing(error))),
                Poll::Pending => {
                    self.state = State::Unsent(Unsent::boxed(&data[sent..]));
                    self.count(sent, counter);
                    return Poll::Pending;
                }
            }
        }
        if sent >= BULK {
            self.state = State::Splice;
        }
        self.count(sent, counter);
        Poll::Ready(Ok(()))
    }

    /// Socket → pipe. Leaves the pipe to others while there is nothing to read.
    fn fill(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        shared: &Shared<'_>,
    ) -> Poll<Result<(), Fault>> {
        ready!(from.poll_read_ready(cx)).map_err(Fault::Reading)?;
        let Ok(mut pipe) = shared.pipes.take() else {
            // out of descriptors: copying needs none
            self.state = State::Copy;
            return Poll::Ready(Ok(()));
        };
        self.state = match from.try_io(Interest::READABLE, || pipe.fill(from)) {
            Ok(0) => {
                shared.pipes.give(pipe);
                State::Done
            }
            Ok(_) => State::Piped(pipe),
            Err(error) => {
                shared.pipes.give(pipe);
                if error.kind() != io::ErrorKind::WouldBlock {
                    return Poll::Ready(Err(Fault::Reading(error)));
                }
                // readiness is cleared: the next round waits
                State::Splice
            }
        };
        Poll::Ready(Ok(()))
    }

    /// Pipe → socket, until the pipe is empty.
    fn drain(
        &mut self,
        cx: &mut Context<'_>,
        to: &TcpStream,
        shared: &Shared<'_>,
        counter: &Counter,
    ) -> Poll<Result<(), Fault>> {
        let State::Piped(mut pipe) = std::mem::replace(&mut self.state, State::Splice) else {
            return Poll::Ready(Ok(()));
        };
        while pipe.held() > 0 {
            match to.poll_write_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Fault::Writing(error))),
                Poll::Pending => {
                    self.state = State::Piped(pipe);
                    return Poll::Pending;
                }
            }
            match to.try_io(Interest::WRITABLE, || pipe.drain(to)) {
                Ok(given) => {
                    self.count(given, counter);
                    shared.spliced.add(given as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(Fault::Writing(error))),
            }
        }
        if pipe.filled() < SMALL {
            self.state = State::Copy;
        }
        shared.pipes.give(pipe);
        Poll::Ready(Ok(()))
    }

    fn count(&mut self, bytes: usize, counter: &Counter) {
        self.bytes += bytes as u64;
        counter.add(bytes as u64);
    }
}

/// The idle timeout: one timer that is set anew only when it fires, never per read.
struct Idle {
    limit: Duration,
    last: Instant,
    sleep: Pin<Box<Sleep>>,
}

impl Idle {
    fn new(limit: Duration) -> Self {
        let last = Instant::now();
        Self {
            limit,
            last,
            sleep: Box::pin(tokio::time::sleep_until(last + limit)),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, moved: bool) -> Poll<()> {
        if moved {
            self.last = Instant::now();
        }
        loop {
            ready!(self.sleep.as_mut().poll(cx));
            let end = self.last + self.limit;
            if Instant::now() >= end {
                return Poll::Ready(());
            }
            self.sleep.as_mut().reset(end);
        }
    }
}
