//! Bytes both ways between two sockets: small exchanges through one buffer per thread, bulk by splice.
//!
//! Owns: the state of a relayed pair, half-close, the choice between copy and splice. Must not know:
//! headers, addresses, how the sockets came to be.
//!
//! An idle pair holds no buffer and no pipe.

mod flow;
mod gone;
mod idle;
mod ring;
mod urgent;

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::net::TcpStream;

use self::flow::{Flow, State};
use self::gone::Gone;
use self::idle::Idle;
use super::counters::Counter;
use super::splice::Pool;

pub(super) use ring::Ring;

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
    /// Where the system has one.
    pub(super) ring: Option<&'a Rc<Ring>>,
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
    /// Where one side has sent its end.
    gone: Option<Gone>,
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
                state: first.unsent.map_or(State::FRESH, State::Unsent),
            },
            down: Flow {
                bytes: 0,
                state: State::FRESH,
            },
            idle: idle_timeout.map(|limit| Box::new(Idle::new(limit))),
            gone: None,
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
        if let Some(fault) = self.up.failed() {
            return Poll::Ready(fault.seen(Side::Client, Side::Target));
        }
        if let Some(fault) = self.down.failed() {
            return Poll::Ready(fault.seen(Side::Target, Side::Client));
        }
        let before = self.up.bytes + self.down.bytes;
        let up = self
            .up
            .poll(cx, &self.client, &mut self.target, shared, shared.to_target);
        if let Poll::Ready(Err(fault)) = up {
            return Poll::Ready(fault.seen(Side::Client, Side::Target));
        }
        let down = self
            .down
            .poll(cx, &self.target, &mut self.client, shared, shared.to_client);
        if let Poll::Ready(Err(fault)) = down {
            return Poll::Ready(fault.seen(Side::Target, Side::Client));
        }
        let ended = match (up.is_ready(), down.is_ready()) {
            (true, true) => return Poll::Ready(End::Closed),
            (true, false) => Some((Side::Client, &self.client)),
            (false, true) => Some((Side::Target, &self.target)),
            (false, false) => None,
        };
        if let Some((side, socket)) = ended
            && let Poll::Ready(error) = self.gone.get_or_insert_with(Gone::new).poll(cx, socket)
        {
            return Poll::Ready(End::Broken { side, error });
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
            unsent: (!unsent.is_empty()).then(|| Unsent::boxed(unsent.into())),
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
    fn boxed(data: Box<[u8]>) -> Box<Self> {
        Box::new(Self { data, sent: 0 })
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::io::{ErrorKind, Read, Write};
    use std::net;
    use std::pin::pin;

    use super::*;
    use crate::socket::reset_on_close;

    /// Two ends of a connection; the relay's first.
    fn line() -> (TcpStream, net::TcpStream) {
        let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
        let other = net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, _) = listener.accept().unwrap();
        ours.set_nonblocking(true).unwrap();
        (TcpStream::from_std(ours).unwrap(), other)
    }

    /// Sending to the client tells of its reset, and the other direction must not take what it reads then for
    /// an end that the service is to see.
    #[test]
    fn a_reset_that_a_round_was_told_is_no_end() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap();
        runtime.block_on(async {
            let ((client, mut proxy), (target, mut service)) = (line(), line());
            // a whole piece, behind which more is looked for at once
            proxy.write_all(&[7; ring::ROOM]).unwrap();
            service.write_all(b"answer").unwrap();
            client.readable().await.unwrap();
            target.readable().await.unwrap();
            let (ring, buffer) = (Ring::new().unwrap(), vec![0; BUFFER].into_boxed_slice());
            let shared = Shared {
                buffer: &RefCell::new(buffer),
                ring: Some(&ring),
                pipes: &Pool::default(),
                to_target: &Counter::default(),
                to_client: &Counter::default(),
                spliced: &Counter::default(),
            };
            let mut pair = Pair::new(client, target, First::default(), None);
            let mut round = pin!(Rc::clone(&ring).run());
            poll_fn(|cx| {
                assert!(
                    pair.poll(cx, &shared).is_pending(),
                    "both wait for the round"
                );
                reset_on_close(&proxy);
                Poll::Ready(())
            })
            .await;
            drop(proxy);
            let end = poll_fn(|cx| {
                assert!(round.as_mut().poll(cx).is_pending());
                pair.poll(cx, &shared)
            })
            .await;
            let broken = matches!(
                end,
                End::Broken {
                    side: Side::Client,
                    ..
                }
            );
            assert!(broken, "{end:?}");
            service.read_exact(&mut [0; ring::ROOM]).unwrap();
            service.set_nonblocking(true).unwrap();
            let nothing = service.read(&mut [0; 1]).expect_err("a good end");
            assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
        });
    }
}
