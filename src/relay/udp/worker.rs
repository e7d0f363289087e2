//! One worker thread's side of a UDP relay: its listeners, its flows, its event loop.
//!
//! Owns: what happens to a datagram from where it is read to where it is sent on. Must not know: other
//! threads but through the registry, how long a drain may take.
//!
//! There is no async runtime here: everything a worker waits for is a descriptor in its one epoll instance,
//! and the unit of work is a batch of datagrams of many flows, not a flow.
//!
//! `inbound` goes from the proxies to the service, `outbound` back; `lifecycle` has how flows begin and end,
//! `refusals` what is said about datagrams that go no further.

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::Settings;
use super::counters::{Counters, Ended};
use super::datagram::Client;
use super::flow::{Flow, Key, Path};
use super::registry::{Note, Registry};
use super::table::{GRAIN, Id, Table};
use crate::model::ClientAddr;
use crate::relay::batch::{Arena, Outbox, Part};
use crate::relay::report::{self, Limiter, Subject};

mod inbound;
mod lifecycle;
mod outbound;
mod refusals;

/// Datagrams (or runs of equal ones) per call.
const BATCH: usize = 128;
/// Of these, how many one flow's answers may take before the next flow's turn.
const BATCH_OF_ONE: usize = 32;
/// How many full batches a listener or a flow gets before the others' turn.
const TURNS: usize = 4;
/// Events per call.
const EVENTS: usize = 256;
/// How long a drain goes on for answers that are still to come, in milliseconds.
const DRAIN: u64 = 1_000;
/// How often a drain looks whether it is over, in milliseconds.
const DRAIN_LOOK: u64 = 20;

/// What an event is about; a flow's is its [`Id`], below all of these.
const LISTENERS: u64 = 1 << 32;
const MAILBOX: u64 = 1 << 33;

/// No queued datagram.
const NONE: u32 = u32::MAX;

/// How far a relay is from its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Phase {
    Serving,
    Draining,
    Ending,
}

/// What the workers of one relay have in common.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) settings: Settings,
    /// Every worker's.
    pub(super) counters: Vec<Arc<Counters>>,
    pub(super) registry: Registry,
    pub(super) started: Instant,
    /// A [`Phase`].
    pub(super) phase: AtomicU8,
}

impl Common {
    /// Enters a later phase.
    pub(super) fn enter(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::Relaxed);
        self.registry.wake_all();
    }

    fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Serving,
            1 => Phase::Draining,
            _ => Phase::Ending,
        }
    }
}

/// A flow of this worker's.
struct Held {
    flow: Arc<Flow>,
    /// The flow's, while it has one; in this worker's epoll.
    socket: Option<Arc<UdpSocket>>,
    /// The flow's socket has to do without the client's port.
    port_taken: bool,
    /// Queued datagrams, first and last.
    first: u32,
    last: u32,
    /// What the kernel last said about lost answers.
    overflow: u32,
    /// Something was sent to the service since it last answered.
    asked: bool,
    /// The service has answered at least once.
    answered: bool,
}

/// A datagram queued at its flow.
#[derive(Clone, Copy)]
struct Queued {
    part: Part,
    tos: u8,
    next: u32,
}

/// Proxies whose trust was looked up last: usually there is one.
#[derive(Clone, Copy)]
struct Known {
    proxy: IpAddr,
    allowed: bool,
}

/// A worker. Made on its own thread.
pub(super) struct Worker {
    common: Arc<Common>,
    number: u32,
    counters: Arc<Counters>,
    limiter: Limiter,
    epoll: Epoll,
    listeners: Vec<Listener>,
    flows: Table<Key, Held>,
    /// Milliseconds since the relay's start.
    now: u64,
    known: Option<Known>,
    inbound: Arena,
    queue: Vec<Queued>,
    /// Flows with something queued.
    touched: Vec<Id>,
    to_target: Outbox,
    outbound: Arena,
    /// How many of its slots hold answers that are not sent yet.
    gathered: usize,
    to_client: Outbox,
    /// Flows whose answers were not all read in their turn.
    unfinished: Vec<Id>,
}

struct Listener {
    socket: UdpSocket,
    /// What the kernel last said about lost datagrams.
    overflow: u32,
}

impl Worker {
    /// A worker for these listeners, of which there is at least one.
    ///
    /// # Errors
    /// When the kernel gives no epoll instance.
    pub(super) fn new(
        common: Arc<Common>,
        number: u32,
        listeners: Vec<UdpSocket>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let watched = EpollFlags::EPOLLIN;
        for (at, socket) in (0u64..).zip(&listeners) {
            epoll.add(socket, EpollEvent::new(watched, LISTENERS + at))?;
        }
        let wake = common.registry.wake_of(number);
        epoll.add(wake, EpollEvent::new(watched, MAILBOX))?;
        let listeners = listeners.into_iter().map(|socket| Listener {
            socket,
            overflow: 0,
        });
        Ok(Self {
            counters: Arc::clone(&common.counters[number as usize]),
            number,
            limiter: Limiter::default(),
            epoll,
            listeners: listeners.collect(),
            flows: Table::new(),
            now: 0,
            known: None,
            inbound: Arena::new(BATCH, true),
            queue: Vec::new(),
            touched: Vec::new(),
            to_target: Outbox::new(),
            outbound: Arena::new(BATCH, false),
            gathered: 0,
            to_client: Outbox::new(),
            unfinished: Vec::new(),
            common,
        })
    }

    /// Relays until the relay ends.
    ///
    /// # Errors
    /// When a listener or the epoll instance fails for good.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let mut draining_since = None;
        loop {
            let ready = match self.epoll.wait(&mut events, self.patience(draining_since)) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => 0,
                Err(errno) => return Err(errno.into()),
            };
            self.now = self.common.started.elapsed().as_millis() as u64;
            let again = std::mem::take(&mut self.unfinished);
            for event in &events[..ready] {
                match event.data() {
                    MAILBOX => self.read_notes(),
                    number if number >= LISTENERS => {
                        self.read_listener((number - LISTENERS) as usize)?
                    }
                    number => {
                        if let Some(id) = Id::from_u64(number) {
                            self.read_answers(id);
                        }
                    }
                }
            }
            for id in again {
                self.read_answers(id);
            }
            self.send_answers();
            self.expire();
            match self.common.phase() {
                Phase::Serving => {}
                Phase::Draining => {
                    let since = *draining_since.get_or_insert(self.now);
                    if self.now - since >= DRAIN || !self.awaits_answers() {
                        return Ok(());
                    }
                }
                Phase::Ending => return Ok(()),
            }
        }
    }

    /// How long to wait for events: until the next flow is due.
    fn patience(&self, draining_since: Option<u64>) -> EpollTimeout {
        if !self.unfinished.is_empty() {
            return EpollTimeout::ZERO;
        }
        let due = self.flows.oldest_use().map(|used| {
            let due = used.saturating_add(self.idle_timeout());
            // one more, as the clock's milliseconds are cut off
            due.saturating_sub(self.now) + 1
        });
        let due = match draining_since {
            Some(_) => Some(due.unwrap_or(DRAIN_LOOK).min(DRAIN_LOOK)),
            None => due,
        };
        match due {
            // waking up early is harmless
            Some(due) => EpollTimeout::try_from(due.min(i32::MAX as u64) as i32)
                .unwrap_or(EpollTimeout::ZERO),
            None => EpollTimeout::NONE,
        }
    }

    /// In milliseconds, with what the table's order may be behind.
    fn idle_timeout(&self) -> u64 {
        let timeout = self.common.settings.idle_timeout.as_millis();
        u64::try_from(timeout)
            .unwrap_or(u64::MAX)
            .saturating_add(GRAIN)
    }

    fn read_notes(&mut self) {
        for note in self.common.registry.notes(self.number) {
            match note {
                Note::MakeRoom(proxy) => {
                    self.make_room(proxy);
                }
                Note::Forget(flow) if flow.owner() != self.number => self.forget_flow(&flow),
                // it has come back
                Note::Forget(_) => {}
            }
        }
    }

    /// Ends what has been silent for the idle timeout.
    fn expire(&mut self) {
        let timeout = self.idle_timeout();
        while let Some(used) = self.flows.oldest_use()
            && used.saturating_add(timeout) <= self.now
            && let Some(id) = self.flows.oldest()
        {
            if let Some(held) = self.flows.get(id)
                && held.socket.is_some()
                && !held.answered
            {
                self.counters.flows_unanswered.add(1);
                self.limiter.warn(
                    Subject::Unanswered,
                    held.flow.route.path.proxy(),
                    Some(&held.flow.route.client),
                    &report::unanswered(held.flow.route.target, self.common.settings.mark),
                );
            }
            self.finish(id, Ended::Idle);
        }
    }

    /// Whether an answer may still come.
    fn awaits_answers(&self) -> bool {
        self.flows.ids().any(|id| {
            self.flows
                .get(id)
                .is_some_and(|held| held.asked && self.now - held.flow.used() < DRAIN)
        })
    }
}

/// Who a flow's client is.
fn client_of(client: &Client, path: &Path) -> ClientAddr {
    match client {
        Client::Named(client) => *client,
        Client::Spp(header) => header.client(),
        Client::Proxy => ClientAddr::new(path.proxy().get()),
    }
}
