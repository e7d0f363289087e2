//! One direction of a pair: what is held between the two sockets, and how it moves on.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use socket2::SockRef;
use tokio::io::{AsyncWrite, Interest};
use tokio::net::TcpStream;

use super::ring::{self, Outcome, Ticket};
use super::{BULK, End, SMALL, Shared, Side, TURN, Unsent, urgent};
use crate::relay::counters::Counter;
use crate::relay::splice::Pipe;

/// One direction of a pair.
pub(super) struct Flow {
    /// Bytes handed on so far.
    pub(super) bytes: u64,
    pub(super) state: State,
}

/// What is between the sockets. `more` where the kernel has announced what can be read there, and waiting
/// for the next announcement could be waiting for ever.
pub(super) enum State {
    /// Nothing held: the next piece is small, and moved together with other connections'.
    Small,
    /// Nothing held: the next read goes through the thread's buffer.
    Copy { more: bool },
    /// Nothing held: the next read is spliced.
    Splice { more: bool },
    /// Moved together with other connections' bytes, when the round comes.
    Queued(Ticket),
    /// The reader is slower than the writer: these bytes come first.
    Unsent(Box<Unsent>),
    /// A pipe with bytes in it comes first.
    Piped(Box<Pipe>),
    /// The end was passed on.
    Done,
}

impl State {
    /// As a flow begins.
    pub(super) const FRESH: Self = Self::Small;
}

pub(super) enum Fault {
    Reading(io::Error),
    Writing(io::Error),
}

impl Fault {
    /// What is wrong with a round's outcome, where anything is.
    fn of(outcome: Outcome) -> Option<Self> {
        const LATER: [Errno; 2] = [Errno::EAGAIN, Errno::EINTR];
        let errno =
            |bytes: Result<usize, Errno>| bytes.err().filter(|errno| !LATER.contains(errno));
        let reading = errno(outcome.received).map(|errno| Self::Reading(errno.into()));
        reading.or_else(|| errno(outcome.sent).map(|errno| Self::Writing(errno.into())))
    }

    pub(super) fn seen(self, from: Side, to: Side) -> End {
        let (side, error) = match self {
            Self::Reading(error) => (from, error),
            Self::Writing(error) => (to, error),
        };
        End::Broken { side, error }
    }
}

/// Waits until the kernel announces something to read, and takes the announcement.
///
/// Taken before the read, not after it: an announcement that comes in between is for bytes that the read
/// may not have seen. What one announcement stands for must be read to its end, or `more` be remembered.
fn announced(cx: &mut Context<'_>, from: &TcpStream) -> Poll<Result<(), Fault>> {
    ready!(from.poll_read_ready(cx)).map_err(Fault::Reading)?;
    taken(from);
    Poll::Ready(Ok(()))
}

/// Tells tokio that what was announced so far has been read, or is about to be. An end of the stream stays
/// announced.
fn taken(from: &TcpStream) {
    let _ = from.try_io(Interest::READABLE, || -> io::Result<()> {
        Err(io::ErrorKind::WouldBlock.into())
    });
}

impl Flow {
    /// Ready when the end of `from` was passed on to `to`.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
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
                State::Small => {
                    ready!(announced(cx, from))?;
                    let ring = shared.ring;
                    self.state = match ring.and_then(|ring| ring.queue(from, &*to, cx.waker())) {
                        Some(ticket) => State::Queued(ticket),
                        None => State::Copy { more: true },
                    };
                }
                State::Copy { more: false } => {
                    ready!(announced(cx, from))?;
                    self.state = State::Copy { more: true };
                }
                State::Copy { more: true } => ready!(self.copy(cx, from, to, shared, counter))?,
                State::Queued(ticket) => match ticket.outcome() {
                    Some(outcome) => self.moved(outcome, counter)?,
                    None => return Poll::Pending,
                },
                State::Splice { more: false } => {
                    ready!(announced(cx, from))?;
                    self.state = State::Splice { more: true };
                }
                State::Splice { more: true } => self.fill(from, shared)?,
                State::Unsent(unsent) => {
                    let rest = &unsent.data[unsent.sent..];
                    if rest.is_empty() {
                        // whoever fills a socket's buffer faster than it drains is in bulk
                        self.state = State::Splice { more: true };
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

    /// What a round has failed at, unless that was looked at before.
    ///
    /// To be asked of both directions before either is polled: the kernel tells a socket's error once. Where
    /// sending to a socket has told of a reset, reading from it finds what looks like a good end.
    pub(super) fn failed(&self) -> Option<Fault> {
        match &self.state {
            State::Queued(ticket) => Fault::of(ticket.outcome()?),
            _ => None,
        }
    }

    /// Takes note of what a round has done.
    fn moved(&mut self, outcome: Outcome, counter: &Counter) -> Result<(), Fault> {
        if let Some(fault) = Fault::of(outcome) {
            return Err(fault);
        }
        let received = match outcome.received {
            Ok(0) => {
                self.state = State::Done;
                return Ok(());
            }
            Err(Errno::EINTR) => {
                self.state = State::Copy { more: true };
                return Ok(());
            }
            // announced once more than there was something
            received => received.unwrap_or_default(),
        };
        let sent = outcome.sent.unwrap_or_default();
        self.count(sent, counter);
        let next = match received == ring::ROOM || outcome.more {
            true => State::Copy { more: true },
            false => State::Small,
        };
        let before = std::mem::replace(&mut self.state, next);
        if let State::Queued(ticket) = before
            && sent < received
        {
            self.state = State::Unsent(Unsent::boxed(ticket.unsent()));
        }
        Ok(())
    }

    /// One read and its writes through the shared buffer.
    fn copy(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        to: &mut TcpStream,
        shared: &Shared<'_>,
        counter: &Counter,
    ) -> Poll<Result<(), Fault>> {
        let mut buffer = shared.buffer.borrow_mut();
        let data = match recv(from.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => {
                self.state = State::Done;
                return Poll::Ready(Ok(()));
            }
            Ok(received) => &buffer[..received],
            Err(Errno::EAGAIN) => {
                taken(from);
                self.state = State::Copy { more: false };
                return Poll::Ready(Ok(()));
            }
            Err(Errno::EINTR) => return Poll::Ready(Ok(())),
            Err(errno) => return Poll::Ready(Err(Fault::Reading(errno.into()))),
        };
        let mut sent = 0;
        while sent < data.len() {
            match Pin::new(&mut *to).poll_write(cx, &data[sent..]) {
                Poll::Ready(Ok(more)) => sent += more,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Fault::Writing(error))),
                Poll::Pending => {
                    self.state = State::Unsent(Unsent::boxed(data[sent..].into()));
                    self.count(sent, counter);
                    return Poll::Pending;
                }
            }
        }
        // a read that does not fill the buffer has left nothing behind, unless it ended at an urgent mark
        let more = data.len() == buffer.len() || {
            taken(from);
            urgent::is_more(from)
        };
        self.state = match sent {
            BULK.. => State::Splice { more },
            ring::ROOM.. => State::Copy { more },
            _ if more => State::Copy { more },
            _ => State::Small,
        };
        self.count(sent, counter);
        Poll::Ready(Ok(()))
    }

    /// Socket → pipe. Leaves the pipe to others while there is nothing to read.
    fn fill(&mut self, from: &TcpStream, shared: &Shared<'_>) -> Result<(), Fault> {
        let Ok(mut pipe) = shared.pipes.take() else {
            // out of descriptors: copying needs none
            self.state = State::Copy { more: true };
            return Ok(());
        };
        self.state = match pipe.fill(from) {
            Ok(0) => {
                shared.pipes.give(pipe);
                State::Done
            }
            Ok(_) => State::Piped(pipe),
            Err(error) => {
                shared.pipes.give(pipe);
                match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        taken(from);
                        match urgent::is_more(from) {
                            true => State::Copy { more: true },
                            false => State::Splice { more: false },
                        }
                    }
                    io::ErrorKind::Interrupted => State::Splice { more: true },
                    _ => return Err(Fault::Reading(error)),
                }
            }
        };
        Ok(())
    }

    /// Pipe → socket, until the pipe is empty.
    fn drain(
        &mut self,
        cx: &mut Context<'_>,
        to: &TcpStream,
        shared: &Shared<'_>,
        counter: &Counter,
    ) -> Poll<Result<(), Fault>> {
        let next = State::Splice { more: true };
        let State::Piped(mut pipe) = std::mem::replace(&mut self.state, next) else {
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
            self.state = State::Copy { more: true };
        }
        shared.pipes.give(pipe);
        Poll::Ready(Ok(()))
    }

    fn count(&mut self, bytes: usize, counter: &Counter) {
        self.bytes += bytes as u64;
        counter.add(bytes as u64);
    }
}
