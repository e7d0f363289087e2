//! Small pieces of many connections at once: what one round of the event loop found readable is received by
//! one system call and passed on by another one (io_uring), instead of by two for each connection.
//!
//! Owns: the ring, the memory that the bytes pass through, the order of things in a round. Must not know:
//! connections, readiness, what becomes of an error.
//!
//! Nothing is ever left under way: no operation waits (`MSG_DONTWAIT`), each is complete when the call that
//! began it returns. So there is nothing to cancel, and a descriptor is used only while its owner holds it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::rc::Rc;
use std::task::{Poll, Waker};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use tracing::warn;

use super::urgent;

/// What one piece has room for. A page of it costs memory once bytes have come to it.
pub(super) const ROOM: usize = 16 << 10;

/// How many pieces there are; whoever comes when all are taken reads alone.
const PIECES: u16 = 128;

/// One thread's ring.
pub(in crate::relay) struct Ring(RefCell<Inner>);

struct Inner {
    /// Gone after a failure that nobody foresaw; everything goes on without it.
    uring: Option<IoUring>,
    free: Vec<Rc<Piece>>,
    /// What this round will move.
    queue: Vec<Rc<Piece>>,
    /// What was moved, and whose owners may not have looked yet.
    moved: Vec<Rc<Piece>>,
    round: Option<Waker>,
}

/// A piece of some connection's bytes on its way. An owner that has given up is seen by the count of references.
struct Piece {
    from: Cell<RawFd>,
    to: Cell<RawFd>,
    owner: Cell<Option<Waker>>,
    outcome: Cell<Option<Outcome>>,
    /// Of [`ROOM`] bytes.
    memory: RefCell<Box<[u8]>>,
}

impl Piece {
    fn new() -> Rc<Self> {
        Rc::new(Self {
            from: Cell::new(-1),
            to: Cell::new(-1),
            owner: Cell::default(),
            outcome: Cell::default(),
            memory: RefCell::new(vec![0; ROOM].into_boxed_slice()),
        })
    }
}

/// What became of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outcome {
    /// How many bytes came, at most [`ROOM`]; 0 is the end.
    pub(super) received: Result<usize, Errno>,
    /// Something was left behind them: the end, or what is behind an urgent mark. Where they fill the room
    /// there may be more in any case.
    pub(super) more: bool,
    /// How many of them were passed on at once.
    pub(super) sent: Result<usize, Errno>,
}

impl Outcome {
    fn nothing(received: Result<usize, Errno>) -> Self {
        Self {
            received,
            more: false,
            sent: Ok(0),
        }
    }
}

impl Ring {
    /// A ring of the calling thread, which alone may use it.
    ///
    /// # Errors
    /// `ENOSYS` or `EINVAL` before Linux 6.1, `EPERM` where the system does not allow io_uring
    /// (`kernel.io_uring_disabled`, a seccomp filter), `ENOMEM`.
    pub(in crate::relay) fn new() -> io::Result<Rc<Self>> {
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .build(u32::from(PIECES))?;
        Ok(Rc::new(Self(RefCell::new(Inner {
            uring: Some(uring),
            free: (0..PIECES).map(|_| Piece::new()).collect(),
            queue: Vec::with_capacity(PIECES.into()),
            moved: Vec::with_capacity(PIECES.into()),
            round: None,
        }))))
    }

    /// Has what `from` holds moved to `to` in this round; the waker is told when it is. The caller keeps
    /// both sockets open for as long as the ticket lives. `None` when all pieces are taken.
    pub(super) fn queue(&self, from: &impl AsFd, to: &impl AsFd, owner: &Waker) -> Option<Ticket> {
        let mut inner = self.0.borrow_mut();
        if inner.free.is_empty() {
            inner.reclaim();
        }
        let piece = inner.free.pop()?;
        piece.from.set(from.as_fd().as_raw_fd());
        piece.to.set(to.as_fd().as_raw_fd());
        piece.owner.set(Some(owner.clone()));
        if inner.queue.is_empty()
            && let Some(round) = &inner.round
        {
            round.wake_by_ref();
        }
        inner.queue.push(Rc::clone(&piece));
        Some(Ticket(piece))
    }

    /// Moves what was queued, round by round, for ever. A task of its own on the ring's thread: tasks run in
    /// the order in which they are woken, so it comes after all those that the same events woke.
    pub(in crate::relay) async fn run(self: Rc<Self>) {
        poll_fn(|cx| {
            let mut inner = self.0.borrow_mut();
            if !matches!(&inner.round, Some(round) if round.will_wake(cx.waker())) {
                inner.round = Some(cx.waker().clone());
            }
            inner.move_queued();
            Poll::Pending
        })
        .await
    }
}

impl Inner {
    /// Makes free what nobody else holds any more.
    fn reclaim(&mut self) {
        let left = self
            .moved
            .extract_if(.., |piece| Rc::strong_count(piece) == 1);
        self.free.extend(left.inspect(|piece| {
            piece.owner.take();
            piece.outcome.take();
        }));
    }

    fn move_queued(&mut self) {
        self.reclaim();
        let mut queue = std::mem::take(&mut self.queue);
        // their owners have given up: the descriptors may be somebody else's by now
        let given_up = queue.extract_if(.., |piece| Rc::strong_count(piece) == 1);
        self.moved.extend(given_up);
        // alone there is nothing to share: two plain calls are cheaper
        if queue.len() > 1
            && let Err(error) = self.move_together(&queue)
        {
            warn!(%error, "io_uring failed: connections are relayed without it from here on");
            self.uring = None;
        }
        for piece in &queue {
            if piece.outcome.get().is_none() {
                piece.outcome.set(Some(move_alone(piece)));
            }
            if let Some(owner) = piece.owner.take() {
                owner.wake();
            }
        }
        self.moved.append(&mut queue);
        self.queue = queue;
    }

    /// Two system calls for all of them. Pieces are left without an outcome where the ring is gone or fails.
    fn move_together(&mut self, queue: &[Rc<Piece>]) -> io::Result<()> {
        let Some(uring) = &mut self.uring else {
            return Ok(());
        };
        for (number, piece) in queue.iter().enumerate() {
            let room = piece.memory.borrow_mut().as_mut_ptr();
            let receive = opcode::Recv::new(types::Fd(piece.from.get()), room, ROOM as u32)
                .flags(libc::MSG_DONTWAIT)
                .build();
            push(uring, receive.user_data(number as u64))?;
        }
        complete(uring, queue.len(), |number, received, more| {
            queue[number].outcome.set(Some(Outcome {
                more,
                ..Outcome::nothing(received)
            }));
        })?;
        let mut sends = 0;
        for (number, piece) in queue.iter().enumerate() {
            if let Some(Outcome {
                received: Ok(length @ 1..),
                ..
            }) = piece.outcome.get()
            {
                let data = piece.memory.borrow().as_ptr();
                let send = opcode::Send::new(types::Fd(piece.to.get()), data, length as u32)
                    .flags(libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
                    .build();
                push(uring, send.user_data(number as u64))?;
                sends += 1;
            }
        }
        // a call that fails has begun nothing: what was not sent then is sent by its owner
        complete(uring, sends, |number, sent, _| {
            if let Some(outcome) = queue[number].outcome.get() {
                queue[number].outcome.set(Some(Outcome { sent, ..outcome }));
            }
        })
    }
}

fn move_alone(piece: &Piece) -> Outcome {
    let mut room = piece.memory.borrow_mut();
    let received = recv(piece.from.get(), &mut room, MsgFlags::MSG_DONTWAIT);
    match received {
        Ok(length @ 1..) => {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            Outcome {
                received,
                sent: send(piece.to.get(), &room[..length], flags),
                more: urgent::is_more(&piece.from.get()),
            }
        }
        _ => Outcome::nothing(received),
    }
}

/// Adds an operation to the next call, which [`complete`] makes.
fn push(uring: &mut IoUring, entry: squeue::Entry) -> io::Result<()> {
    // SAFETY: the memory behind the entry belongs to a piece of the queue, which stays there, and nobody
    // looks at it, before `complete` has returned; then the operation is over
    #[expect(unsafe_code, reason = "the kernel reads and writes behind pointers")]
    let pushed = unsafe { uring.submission().push(&entry) };
    pushed.map_err(io::Error::other)
}

/// Begins the operations that were pushed, of which none waits, and takes their results; with each, whether the
/// socket that was received from has more.
fn complete(
    uring: &mut IoUring,
    mut left: usize,
    mut result: impl FnMut(usize, Result<usize, Errno>, bool),
) -> io::Result<()> {
    while left > 0 {
        match uring.submit_and_wait(left) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        for completion in uring.completion() {
            let outcome = usize::try_from(completion.result())
                .map_err(|_| Errno::from_raw(-completion.result()));
            // its place in the queue
            let more = cqueue::sock_nonempty(completion.flags());
            result(completion.user_data() as usize, outcome, more);
            left -= 1;
        }
    }
    Ok(())
}

/// One's place in a round. Whoever drops it has given up.
pub(super) struct Ticket(Rc<Piece>);

impl Ticket {
    /// What became of the bytes, after the round.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        self.0.outcome.get()
    }

    /// Those bytes that were received and not passed on.
    pub(super) fn unsent(&self) -> Box<[u8]> {
        let count = |bytes: Result<usize, Errno>| bytes.unwrap_or_default();
        let (received, sent) = match self.outcome() {
            Some(outcome) => (count(outcome.received), count(outcome.sent)),
            None => (0, 0),
        };
        self.0.memory.borrow()[sent..received].into()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicU32);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A connection's two sockets, and what stands at their other ends.
    struct Line {
        sender: UnixStream,
        from: UnixStream,
        to: UnixStream,
        receiver: UnixStream,
    }

    impl Line {
        fn new() -> Self {
            let (sender, from) = UnixStream::pair().unwrap();
            let (to, receiver) = UnixStream::pair().unwrap();
            receiver.set_nonblocking(true).unwrap();
            Self {
                sender,
                from,
                to,
                receiver,
            }
        }

        fn queue(&self, ring: &Rc<Ring>, waker: &Waker) -> Ticket {
            ring.queue(&self.from, &self.to, waker).unwrap()
        }

        fn arrived(&mut self) -> Vec<u8> {
            let mut bytes = vec![0; 4 * ROOM];
            match self.receiver.read(&mut bytes) {
                Ok(length) => bytes[..length].to_vec(),
                Err(_) => Vec::new(),
            }
        }
    }

    /// A ring, and one whose io_uring has failed.
    fn rings() -> [Rc<Ring>; 2] {
        let failed = Ring::new().unwrap();
        failed.0.borrow_mut().uring = None;
        [Ring::new().unwrap(), failed]
    }

    fn round(ring: &Ring) {
        ring.0.borrow_mut().move_queued();
    }

    #[test]
    fn each_gets_what_is_its_own() {
        for ring in rings() {
            let woken = Arc::new(Woken::default());
            let waker = Waker::from(Arc::clone(&woken));
            for lines in [1, 2, 50] {
                let mut lines: Vec<Line> = (0..lines).map(|_| Line::new()).collect();
                let text = |number| format!("from {number}");
                let mut tickets = Vec::new();
                for (number, line) in lines.iter_mut().enumerate() {
                    line.sender.write_all(text(number).as_bytes()).unwrap();
                    tickets.push(line.queue(&ring, &waker));
                }
                assert!(tickets.iter().all(|one| one.outcome().is_none()));
                let before = woken.0.load(Ordering::Relaxed);
                round(&ring);
                assert_eq!(woken.0.load(Ordering::Relaxed) - before, lines.len() as u32);
                for (number, (line, ticket)) in lines.iter_mut().zip(&tickets).enumerate() {
                    let text = text(number);
                    assert_eq!(line.arrived(), text.as_bytes());
                    let all = Ok(text.len());
                    let expected = Outcome {
                        received: all,
                        more: false,
                        sent: all,
                    };
                    assert_eq!(ticket.outcome(), Some(expected));
                    assert!(ticket.unsent().is_empty());
                }
            }
        }
    }

    #[test]
    fn ends_errors_and_bytes_that_nobody_takes() {
        for ring in rings() {
            let mut lines: Vec<Line> = (0..5).map(|_| Line::new()).collect();
            // nothing there, the end, a full piece and more, a receiver that is gone, one that is full
            lines[1].sender.shutdown(std::net::Shutdown::Write).unwrap();
            lines[2].sender.write_all(&[7; ROOM + 1]).unwrap();
            lines[3].sender.write_all(b"lost").unwrap();
            let (gone, _) = UnixStream::pair().unwrap();
            lines[3].receiver = gone;
            lines[4].sender.write_all(b"later").unwrap();
            lines[4].to.set_nonblocking(true).unwrap();
            while lines[4].to.write(&[0; 1024]).is_ok() {}
            let tickets: Vec<_> = lines
                .iter()
                .map(|line| line.queue(&ring, Waker::noop()))
                .collect();
            round(&ring);
            let outcomes = tickets.iter().filter_map(Ticket::outcome);
            let outcomes: Vec<_> = outcomes.map(|one| (one.received, one.sent)).collect();
            let expected = [
                (Err(Errno::EAGAIN), Ok(0)),
                (Ok(0), Ok(0)),
                (Ok(ROOM), Ok(ROOM)),
                (Ok(4), Err(Errno::EPIPE)),
                (Ok(5), Err(Errno::EAGAIN)),
            ];
            assert_eq!(outcomes, expected);
            assert_eq!(&*tickets[4].unsent(), b"later");
        }
    }

    #[test]
    fn who_gave_up_is_left_alone() {
        for ring in rings() {
            let mut lines: Vec<Line> = (0..3).map(|_| Line::new()).collect();
            for line in &mut lines {
                line.sender.write_all(b"bytes").unwrap();
            }
            let mut tickets: Vec<_> = lines
                .iter()
                .map(|line| line.queue(&ring, Waker::noop()))
                .collect();
            drop(tickets.remove(1));
            round(&ring);
            assert!(lines[1].arrived().is_empty());
            assert_eq!(lines[0].arrived(), b"bytes");
            assert_eq!(lines[2].arrived(), b"bytes");
            drop(tickets);
            round(&ring);
            assert_eq!(ring.0.borrow().free.len(), usize::from(PIECES));
        }
    }

    #[test]
    fn a_round_has_an_end() {
        let ring = Ring::new().unwrap();
        let line = Line::new();
        let tickets: Vec<_> = (0..PIECES)
            .map(|_| line.queue(&ring, Waker::noop()))
            .collect();
        assert!(
            ring.queue(&line.from, &line.to, Waker::noop()).is_none(),
            "somebody reads alone"
        );
        round(&ring);
        drop(tickets);
        assert!(ring.queue(&line.from, &line.to, Waker::noop()).is_some());
    }
}
