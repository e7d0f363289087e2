//! One relay's side on one worker thread: its listeners, its flows, its event loop.
//!
//! Owns: what happens to a datagram from where it is read to where it is sent on. Must not know: other
//! threads but through the registry and the loans.
//!
//! Everything a worker waits for is a descriptor in an epoll instance of its own, and that instance is what the
//! thread's runtime waits for: the unit of work is a batch of datagrams of many flows, not a flow, and a flow
//! costs the runtime nothing.
//!
//! `inbound` goes from the proxies to the service, `outbound` back; `lifecycle` has how flows begin and end,
//! `refusals` what is said about datagrams that go no further.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use tokio::sync::{mpsc, watch};
use tracing::{Span, info_span, warn};

use self::epoll::WaitableEpoll;
use self::lending::Lending;
use self::listeners::Listeners;
use self::refusals::peers;
use self::replies::Replies;
use self::view::Recent;
use super::counters::{Counters, Ended};
use super::datagram::Client;
use super::flow::{Flow, Key, Path};
use super::loan::Loans;
use super::registry::{Note, Registry};
use super::scratch::Scratch;
use super::table::{GRAIN, Id, Table};
use super::{Phase, Settings};
use crate::model::ClientAddr;
use crate::relay::batch::SegmentLimit;
use crate::relay::ports::Ports;
use crate::relay::report::{self, LastError, Limiter, Subject};
use crate::relay::view::Query;
use crate::relay::workers::Shared;
use crate::socket::udp::is_transparent;

mod epoll;
mod inbound;
mod lending;
mod lifecycle;
mod listeners;
mod outbound;
mod refusals;
mod replies;
mod room;
mod view;

pub(super) use listeners::Change;

/// How many datagrams one flow's answers may take of a batch before the next flow's turn.
const BATCH_OF_ONE: usize = 32;
/// How many full batches a listener or a flow gets before the others' turn.
const TURNS: usize = 4;
/// How many rounds a busy relay makes before the thread's other relays get their turn.
const ROUNDS: usize = 4;
/// Events per call.
const EVENTS: usize = 256;
/// How long a drain goes on for answers that are still to come, in milliseconds.
const DRAIN: u64 = 1_000;
/// How often a drain looks whether it is over.
const DRAIN_LOOK: Duration = Duration::from_millis(20);

/// A sleep shorter than this means that datagrams come in a stream. What is slower is served at once, without
/// giving up the CPU, which a busy machine might take milliseconds to give back.
const PRESSED: Duration = Duration::from_micros(100);

/// After a round of fewer datagrams than this, waiting for company pays; more of them pay for their round.
const FEW: usize = 16;

/// So does it for a single flow, served both ways: the longer its runs, the fewer packets.
const ONE_FLOW: usize = 2;

/// What an event is about; a flow's is its [`Id`], below all of these.
const LISTENERS: u64 = 1 << 32;
const MAILBOX: u64 = 1 << 33;
const LOANS: u64 = 1 << 34;

/// What a worker is told by others than workers.
#[derive(Debug)]
pub(super) enum Order {
    /// Answer once.
    Answer(Query),
    /// Listen elsewhere.
    Listen(Change),
}

/// What the workers of one relay have in common.
#[derive(Debug)]
pub(super) struct Common {
    /// Swapped as a whole, without a lock, when the configuration is read again.
    pub(super) settings: ArcSwap<Settings>,
    /// Every worker's.
    pub(super) counters: Vec<Arc<Counters>>,
    pub(super) limiter: Limiter,
    pub(super) last_error: Mutex<Option<LastError>>,
    pub(super) registry: Registry,
    pub(super) loans: Loans,
    pub(super) ports: ArcSwap<Ports>,
    pub(super) started: Instant,
}

/// A flow of this worker's.
struct Held {
    flow: Arc<Flow>,
    /// The flow's, while it has one; in this worker's epoll, unless it is lent.
    socket: Option<Arc<UdpSocket>>,
    /// The flow's socket has to do without the client's port.
    port_taken: bool,
    /// Queued datagrams, first and last.
    first: u32,
    last: u32,
    /// What the kernel last said about lost answers.
    overflow: u32,
}

/// Proxies whose trust was looked up last: usually there is one.
#[derive(Clone, Copy)]
struct Known {
    proxy: IpAddr,
    allowed: bool,
}

/// A relay on a worker thread. Never leaves it.
pub(super) struct Worker {
    shared: Rc<Shared>,
    common: Arc<Common>,
    /// As they were at the beginning of the round.
    settings: Arc<Settings>,
    number: u32,
    counters: Arc<Counters>,
    /// Names the instance in every line.
    span: Span,
    epoll: WaitableEpoll,
    listeners: Listeners,
    /// What sends the answers that have gathered.
    answering: Answering,
    /// Where one listener gets what was sent to many ports: sockets to answer from the others.
    replies: Option<Replies>,
    flows: Table<Key, Held>,
    /// Milliseconds since the relay's start.
    now: u64,
    known: Option<Known>,
    /// The thread's, during a round; else empty.
    scratch: Scratch,
    to_target: SegmentLimit,
    to_client: SegmentLimit,
    /// Flows whose answers were not all read in their turn, own and lent, by the numbers of their events.
    unfinished: Vec<u64>,
    /// Datagrams, or runs of them, that were read in this round.
    moved: usize,
    /// How often in it a flow got or gave some, either way.
    served: usize,
    recent: Recent,
    lending: Lending,
    /// The first descriptor that flows leave alone, as it was last looked up.
    spare_from: RawFd,
}

/// A socket that answers are sent from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answering {
    /// The listener of this number.
    Listener(usize),
    /// One that is bound to where the datagram was sent to.
    From(SocketAddr),
}

impl Worker {
    /// A worker for these listeners, of which there is at least one. Within the thread's event loop.
    ///
    /// # Errors
    /// When the kernel gives no epoll instance.
    pub(super) fn new(
        shared: Rc<Shared>,
        common: Arc<Common>,
        number: u32,
        listeners: Vec<Arc<UdpSocket>>,
    ) -> io::Result<Self> {
        let epoll = WaitableEpoll::new()?;
        let wake = common.registry.wake_of(number);
        epoll.add(wake, EpollEvent::new(EpollFlags::EPOLLIN, MAILBOX))?;
        let replies = match listeners.first() {
            Some(socket) if is_transparent(socket).map_err(|failure| failure.source)? => {
                Some(Replies::beside(socket.local_addr()?))
            }
            _ => None,
        };
        let listeners = Listeners::new(&epoll, listeners)?;
        let settings = common.settings.load_full();
        let worker = Self {
            shared,
            number,
            counters: Arc::clone(&common.counters[number as usize]),
            span: info_span!("relay", instance = %settings.name),
            settings,
            epoll,
            listeners,
            answering: Answering::Listener(0),
            replies,
            flows: Table::new(),
            now: 0,
            known: None,
            scratch: Scratch::none(),
            to_target: SegmentLimit::default(),
            to_client: SegmentLimit::default(),
            unfinished: Vec::new(),
            moved: 0,
            served: 0,
            recent: Recent::default(),
            lending: Lending::default(),
            spare_from: 0,
            common,
        };
        worker.common.loans.set_offer(number, worker.offer());
        Ok(worker)
    }

    /// Relays until the relay has drained.
    ///
    /// # Errors
    /// When a listener or the epoll instance fails for good.
    pub(super) async fn run(
        mut self,
        mut phase: watch::Receiver<Phase>,
        mut orders: mpsc::UnboundedReceiver<Order>,
    ) -> io::Result<()> {
        let mut draining_since = None;
        let mut pressed = false;
        loop {
            let mut rounds = 0;
            while self.round()? {
                rounds += 1;
                let wants_company = self.moved < FEW || self.served <= ONE_FLOW;
                if wants_company && (pressed || rounds > 1) {
                    // whoever sends and answers gets the CPU first, where it is short: what comes meanwhile
                    // is read at once, and runs of it cost the kernel little more than one datagram
                    std::thread::yield_now();
                }
                if rounds % ROUNDS == 0 {
                    tokio::task::yield_now().await;
                    while let Ok(order) = orders.try_recv() {
                        self.follow(order, draining_since.is_some());
                    }
                    // there may be something to do for ever
                    let due = match draining_since {
                        Some(since) => self.now - since >= DRAIN,
                        None => drains(&phase),
                    };
                    if due {
                        break;
                    }
                }
            }
            let draining = drains(&phase);
            if draining && draining_since.is_none() {
                draining_since = Some(self.now);
                // what was queued has just been read, unless it never ends: the rest is for whoever listens next
                self.listeners.stop(&self.epoll)?;
                // the other worker may have nothing to drain
                self.take_all_back();
                self.end_unasked();
                continue;
            }
            if let Some(since) = draining_since
                && (self.flows.is_empty() || self.now - since >= DRAIN)
            {
                return Ok(());
            }
            let patience = self.patience(draining);
            let asleep = Instant::now();
            tokio::select! {
                waited = self.epoll.wait() => waited?,
                () = tokio::time::sleep(patience.unwrap_or_default()), if patience.is_some() => {}
                _ = phase.changed(), if !draining => {}
                Some(order) = orders.recv() => self.follow(order, draining),
            }
            pressed = asleep.elapsed() < PRESSED;
        }
    }

    /// Does what there is to do, without waiting; false when there was nothing.
    fn round(&mut self) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let ready = self.epoll.take(&mut events)?;
        self.now = self.common.started.elapsed().as_millis() as u64;
        let again = std::mem::take(&mut self.unfinished);
        let busy = ready > 0 || !again.is_empty();
        (self.moved, self.served) = (0, 0);
        let _named = self.span.clone().entered();
        self.touch_lent();
        if busy {
            let settings = self.common.settings.load();
            if !Arc::ptr_eq(&settings, &self.settings) {
                self.settings = Arc::clone(&settings);
                self.known = None;
            }
            self.scratch = self.shared.datagrams.take();
            self.scratch.prepare();
            let outcome = self.handle(&events[..ready], again);
            self.shared
                .datagrams
                .replace(std::mem::take(&mut self.scratch));
            outcome?;
        }
        self.lend();
        self.expire();
        self.let_listeners_go();
        Ok(busy)
    }

    fn handle(&mut self, events: &[EpollEvent], again: Vec<u64>) -> io::Result<()> {
        for event in events.iter().map(EpollEvent::data).chain(again) {
            match event {
                MAILBOX => self.read_notes(),
                number if number >= LOANS => self.read_lent((number - LOANS) as u32),
                number if number >= LISTENERS => {
                    self.read_listener((number - LISTENERS) as usize)?;
                }
                number => {
                    if let Some(id) = Id::from_u64(number) {
                        self.read_answers(id);
                    }
                }
            }
        }
        self.send_answers();
        if let Some(replies) = &mut self.replies {
            replies.rest();
        }
        Ok(())
    }

    fn follow(&mut self, order: Order, draining: bool) {
        match order {
            Order::Answer(query) => self.answer(&query),
            // nothing is read from anywhere any more
            Order::Listen(_) if draining => {}
            Order::Listen(change) => self.listen(change),
        }
    }

    /// Listens elsewhere. Flows stay, those at ports that go for as long as a drain takes.
    fn listen(&mut self, Change { gone, more }: Change) {
        self.now = self.common.started.elapsed().as_millis() as u64;
        self.listeners.retire(&self.epoll, &gone, self.now);
        for socket in more {
            if let Err(error) = self.listeners.add(&self.epoll, socket) {
                // fs.epoll.max_user_watches is used up
                warn!(parent: &self.span, %error, "cannot wait for what comes to a listening socket");
            }
        }
        self.common
            .loans
            .set_ports(self.number, self.listeners.ports());
    }

    /// Ends the flows of ports that are no more, once what was asked has had its time to be answered.
    fn let_listeners_go(&mut self) {
        if self.listeners.next_end().is_none_or(|end| end > self.now) {
            return;
        }
        let gone = self.listeners.let_go(self.now);
        self.common
            .loans
            .set_ports(self.number, self.listeners.ports());
        let flows = self.flows.ids().filter(|id| {
            let held = self.flows.get(*id);
            held.is_some_and(|held| gone.contains(&held.flow.route.path.port))
        });
        for id in flows.collect::<Vec<_>>() {
            self.finish(id, Ended::Drained);
        }
    }

    /// How long to wait for events: until the next flow is due, or a listener that goes.
    fn patience(&self, draining: bool) -> Option<Duration> {
        let due = self.flows.oldest_use();
        let due = due.map(|used| used.saturating_add(self.idle_timeout()));
        let due = due.into_iter().chain(self.listeners.next_end()).min();
        // one more, as the clock's milliseconds are cut off
        let due =
            due.map(|due| Duration::from_millis(due.saturating_sub(self.now).saturating_add(1)));
        match draining {
            true => Some(due.map_or(DRAIN_LOOK, |due| due.min(DRAIN_LOOK))),
            false => due,
        }
    }

    /// In milliseconds, with what the table's order may be behind.
    fn idle_timeout(&self) -> u64 {
        let timeout = self.settings.idle_timeout.as_millis();
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
        self.take_back_what_is_down();
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
                && !held.flow.was_answered()
            {
                self.counters.flows_unanswered.add(1);
                let route = held.flow.route;
                let message = report::unanswered(route.target, self.settings.mark);
                self.say(Subject::Unanswered, peers(&route), &message);
            }
            self.finish(id, Ended::Idle);
        }
    }

    /// Ends the flows from which no answer is to come, so that whoever relays next can have their sockets.
    fn end_unasked(&mut self) {
        let idle: Vec<Id> = self
            .flows
            .ids()
            .filter(|id| {
                self.flows
                    .get(*id)
                    .is_none_or(|held| !held.flow.awaits_answer())
            })
            .collect();
        for id in idle {
            self.finish(id, Ended::Drained);
        }
    }
}

fn drains(phase: &watch::Receiver<Phase>) -> bool {
    // a sender that is gone means that the server was dropped
    phase.has_changed().is_err() || *phase.borrow() == Phase::Draining
}

/// Who a flow's client is.
fn client_of(client: &Client, path: &Path) -> ClientAddr {
    match client {
        Client::Named { client, .. } => *client,
        Client::Spp(header) => header.client(),
        Client::Proxy => ClientAddr::new(path.peer),
    }
}
