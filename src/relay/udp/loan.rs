//! Flows whose answers another worker than theirs reads.
//!
//! Owns: what one worker lends to another, and what each offers to the others. Must not know: when that pays,
//! datagrams.
//!
//! A flow that alone keeps a worker busy has two halves with little in common: what comes from the proxy, and
//! what the service answers. One flow at a time, a worker may have the second half done elsewhere. The flow stays
//! its own: it sends, and it alone ends the flow and closes the socket. Who reads does so under the loan's lock,
//! and sends what he read: once the loan has ended nobody else has the socket any more, or answers that those
//! that are read from then on could overtake.

use std::net::UdpSocket;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::sys::epoll::{Epoll, EpollEvent};
use nix::time::ClockId;

use super::flow::Flow;

/// A flow that another worker reads from.
#[derive(Debug)]
pub(super) struct Loan {
    pub(super) flow: Arc<Flow>,
    pub(super) socket: Arc<UdpSocket>,
    /// The worker that reads.
    pub(super) reader: u32,
    /// What the kernel last said about lost answers.
    pub(super) overflow: u32,
    /// ICMP has told the reader that nothing listens at the target.
    pub(super) service_down: bool,
}

/// What others may use of a worker.
#[derive(Debug)]
pub(super) struct Offer {
    /// What it waits for.
    pub(super) epoll: Arc<Epoll>,
    /// The ports it can answer from.
    pub(super) ports: Mutex<Box<[u16]>>,
    /// Its thread's CPU time.
    pub(super) clock: ClockId,
}

impl Offer {
    pub(super) fn has_port(&self, port: u16) -> bool {
        self.ports().contains(&port)
    }

    fn ports(&self) -> MutexGuard<'_, Box<[u16]>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the workers of a relay have lent, and offer.
#[derive(Debug)]
pub(super) struct Loans(Box<[Desk]>);

#[derive(Debug, Default)]
struct Desk {
    /// What the worker has lent.
    loan: Mutex<Option<Loan>>,
    /// What it offers, once it is there.
    offer: OnceLock<Offer>,
}

impl Desk {
    fn loan(&self) -> MutexGuard<'_, Option<Loan>> {
        // whole whatever happened to the thread that held it
        self.loan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Loans {
    /// Nothing lent, nothing offered.
    pub(super) fn new(workers: usize) -> Self {
        Self((0..workers).map(|_| Desk::default()).collect())
    }

    /// How many workers there are.
    pub(super) fn workers(&self) -> u32 {
        self.0.len() as u32
    }

    /// Offers to the others.
    pub(super) fn set_offer(&self, worker: u32, offer: Offer) {
        // a worker begins once
        let _ = self.0[worker as usize].offer.set(offer);
    }

    /// What a worker offers.
    pub(super) fn offer(&self, worker: u32) -> Option<&Offer> {
        self.0[worker as usize].offer.get()
    }

    /// A worker can answer from these ports now.
    pub(super) fn set_ports(&self, worker: u32, ports: Box<[u16]>) {
        if let Some(offer) = self.offer(worker) {
            *offer.ports() = ports;
        }
    }

    /// What a worker has lent.
    pub(super) fn of(&self, worker: u32) -> MutexGuard<'_, Option<Loan>> {
        self.0[worker as usize].loan()
    }

    /// Whether nothing listens at the target of what a worker has lent.
    pub(super) fn is_down(&self, worker: u32) -> bool {
        self.of(worker)
            .as_ref()
            .is_some_and(|loan| loan.service_down)
    }

    /// Lends a worker's flow, whose socket this worker no longer waits for: its reader does, by this event.
    /// False when it cannot, or the flow has become another worker's meanwhile.
    pub(super) fn lend(&self, worker: u32, loan: Loan, event: EpollEvent) -> bool {
        let Some(offer) = self.offer(loan.reader) else {
            return false;
        };
        let mut lent = self.of(worker);
        // who takes a flow over first says so, and then looks here
        if loan.flow.owner() != worker || offer.epoll.add(&*loan.socket, event).is_err() {
            return false;
        }
        *lent = Some(loan);
        true
    }

    /// Ends what a worker has lent.
    pub(super) fn end(&self, worker: u32) -> Option<Loan> {
        self.end_if(worker, |_| true)
    }

    /// Ends the loan of a socket, whosever it is, for whoever goes on with it.
    pub(super) fn end_of(&self, socket: &Arc<UdpSocket>) {
        for worker in 0..self.workers() {
            self.end_if(worker, |loan| Arc::ptr_eq(&loan.socket, socket));
        }
    }

    fn end_if(&self, worker: u32, condition: impl FnOnce(&Loan) -> bool) -> Option<Loan> {
        let mut lent = self.of(worker);
        let loan = lent.take_if(|loan| condition(loan))?;
        if let Some(offer) = self.offer(loan.reader) {
            // an error would mean that it was not in there
            let _ = offer.epoll.delete(&*loan.socket);
        }
        Some(loan)
    }
}
