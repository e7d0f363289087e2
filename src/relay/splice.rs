//! Pipes for `splice(2)`, and a per-thread pool of them: bytes pass from socket to socket inside the kernel.
//!
//! A pipe is filled only while it is empty and drained until it is empty. That is what makes EAGAIN
//! unambiguous: `splice(socket → pipe)` also returns it when the *pipe* has no free slot, and taking
//! that for an empty socket would wait for a readiness event that never comes.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

/// What a pipe shall hold. A page-sized slot of it takes a whole fragment of a received packet, so this
/// is a bound for small packets; above 1 MiB an unprivileged process is refused.
const CAPACITY: usize = 1 << 20;

/// How many empty pipes a thread keeps for the next bulk transfer.
const MAX_SPARE: usize = 16;

/// A pipe between two sockets.
#[derive(Debug)]
pub(super) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
    filled: usize,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // a smaller pipe works too: the user's page quota may be used up
        let _ = fcntl(
            &write,
            FcntlArg::F_SETPIPE_SZ(i32::try_from(CAPACITY).unwrap_or(i32::MAX)),
        );
        Ok(Self {
            read,
            write,
            held: 0,
            filled: 0,
        })
    }

    /// How many bytes are in it.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// How many bytes the last fill brought.
    pub(super) fn filled(&self) -> usize {
        self.filled
    }

    /// Takes what the socket has; 0 is its end. Only while the pipe is empty.
    pub(super) fn fill(&mut self, from: &impl AsFd) -> io::Result<usize> {
        debug_assert_eq!(self.held, 0, "EAGAIN would be ambiguous");
        let taken = splice(from, None, &self.write, None, CAPACITY, flags())?;
        (self.held, self.filled) = (taken, taken);
        Ok(taken)
    }

    /// Gives the socket what it takes; EAGAIN can only mean the socket. Only while bytes are held.
    pub(super) fn drain(&mut self, to: &impl AsFd) -> io::Result<usize> {
        let given = splice(&self.read, None, to, None, self.held, flags())?;
        self.held -= given;
        Ok(given)
    }
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK
}

/// The spare pipes of one thread. Boxed, so that a flow that holds one is a pointer larger and no more.
#[derive(Debug, Default)]
pub(super) struct Pool {
    #[expect(
        clippy::vec_box,
        reason = "the box moves between pool and flow without an allocation"
    )]
    spare: RefCell<Vec<Box<Pipe>>>,
}

impl Pool {
    /// An empty pipe, or the reason why there is none (descriptors).
    pub(super) fn take(&self) -> io::Result<Box<Pipe>> {
        match self.spare.borrow_mut().pop() {
            Some(pipe) => Ok(pipe),
            None => Pipe::new().map(Box::new),
        }
    }

    /// Takes a pipe back; one that still holds bytes is closed.
    pub(super) fn give(&self, pipe: Box<Pipe>) {
        let mut spare = self.spare.borrow_mut();
        if pipe.held == 0 && spare.len() < MAX_SPARE {
            spare.push(pipe);
        }
    }
}
