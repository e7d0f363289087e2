//! What the workers of a relay share: which flows there are, who has which, and how many are allowed.
//!
//! Owns: the lock, the limits, and the notes that workers leave each other. Must not know: epoll, datagrams.
//!
//! Touched only when a flow begins, ends or changes hands, never for a datagram of a flow that goes on.
//!
//! - The kernel hashes a proxy's address and port to one listener only while the number of listeners stays
//!   the same. So a worker that does not know a flow asks here, and takes it over from the worker that had it.
//! - One socket per client and target: two sockets with the same ends cannot be. Where the proxy itself goes
//!   on with a client from another port, after a pause, the socket goes along; else, also where the client
//!   has asked two addresses of the proxy, the newer flow keeps the client's address and gives up its port.

use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::flow::{Flow, Key, NOBODY, Route};
use crate::model::{ClientAddr, PortPolicy, TargetAddr};
use crate::relay::registry::next_number;

/// For how long a flow must have been silent, both ways, before its proxy's going on with the same client
/// from another port takes its socket along, in milliseconds. Longer than any two ports of one proxy take
/// turns for one client; shorter than the shortest time after which proxies forget a flow (Traefik: 3 s).
const MOVES_AFTER: u64 = 2_000;

/// How many notes may wait for a worker. Each asks for room for a flow that is there already, so this is by how
/// much the limits can be exceeded for a moment.
const MAX_NOTES: usize = 1024;

/// What a relay allows, as it is told now.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// How many flows there may be.
    pub(super) flows: NonZeroU32,
    /// How many from one proxy address.
    pub(super) per_proxy: NonZeroU32,
    /// Whether a client's port is kept.
    pub(super) port: PortPolicy,
}

/// What one worker asks of another.
#[derive(Debug)]
pub(super) enum Note {
    /// End the flow that has been silent for longest, of all or of a proxy: another takes its place.
    MakeRoom(Option<IpAddr>),
    /// This flow is no longer yours.
    Forget(Arc<Flow>),
}

/// The notes for a worker, and what wakes it.
#[derive(Debug)]
struct Mailbox {
    notes: Mutex<Vec<Note>>,
    wake: EventFd,
}

impl Mailbox {
    fn notes(&self) -> MutexGuard<'_, Vec<Note>> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // fails only when it would count beyond 2^64: then the worker is being woken anyway
        let _ = self.wake.write(1);
    }
}

/// An answer to [`Registry::admit`].
#[derive(Debug)]
pub(super) enum Admission {
    /// The flow was there, and is the asking worker's from now on.
    Adopted(Arc<Flow>),
    /// It is new.
    Opened(Opened),
    /// End the own flow that has been silent for longest, of all or of this proxy, and ask again.
    Full(Option<IpAddr>),
    /// There is no room, and none can be made at once.
    Refused,
}

/// A new flow.
#[derive(Debug)]
pub(super) struct Opened {
    /// It.
    pub(super) flow: Arc<Flow>,
    /// Another flow has a socket with the same client and target: this one needs a port of its own.
    pub(super) port_taken: bool,
    /// The flow whose socket it got.
    pub(super) moved: Option<Arc<Flow>>,
    /// The flow of the same key but another client that it replaces.
    pub(super) replaced: Option<Arc<Flow>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// How many flows there were: the lower half of their numbers.
    begun: u32,
    by_key: HashMap<Key, Arc<Flow>>,
    /// Who has the socket with these two ends.
    by_pair: HashMap<(ClientAddr, TargetAddr), Arc<Flow>>,
    /// Flows by worker.
    flows: Box<[u32]>,
    /// Flows by proxy and worker.
    of_proxy: HashMap<IpAddr, Box<[u32]>>,
}

/// All flows of a relay.
#[derive(Debug)]
pub(super) struct Registry {
    /// The upper half of the flows' numbers.
    number: u64,
    inner: Mutex<Inner>,
    mailboxes: Box<[Mailbox]>,
}

impl Registry {
    /// One without flows.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub(super) fn new(workers: usize) -> nix::Result<Self> {
        let mailbox = || {
            let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
            Ok(Mailbox {
                notes: Mutex::default(),
                wake: EventFd::from_flags(flags)?,
            })
        };
        Ok(Self {
            number: next_number(),
            inner: Mutex::new(Inner {
                flows: vec![0; workers].into(),
                ..Inner::default()
            }),
            mailboxes: (0..workers)
                .map(|_| mailbox())
                .collect::<nix::Result<_>>()?,
        })
    }

    /// What wakes a worker: readable when there are notes.
    pub(super) fn wake_of(&self, worker: u32) -> &EventFd {
        &self.mailboxes[worker as usize].wake
    }

    /// Has a worker look at what it is told.
    pub(super) fn wake(&self, worker: u32) {
        self.mailboxes[worker as usize].wake();
    }

    /// Has every worker look at what it is told, also one with nothing to do.
    pub(super) fn wake_all(&self) {
        self.mailboxes.iter().for_each(Mailbox::wake);
    }

    /// Takes a worker's notes.
    pub(super) fn notes(&self, worker: u32) -> Vec<Note> {
        let mailbox = &self.mailboxes[worker as usize];
        // an error means that nobody has woken it
        let _ = mailbox.wake.read();
        std::mem::take(&mut *mailbox.notes())
    }

    /// The flow with this key, whosever it was: it is the worker's from now on.
    pub(super) fn adopt(&self, worker: u32, key: &Key) -> Option<Arc<Flow>> {
        let mut inner = self.lock();
        let flow = Arc::clone(inner.by_key.get(key)?);
        self.hand_over(&mut inner, &flow, worker);
        Some(flow)
    }

    /// Asks for a flow that the worker does not have.
    pub(super) fn admit(&self, worker: u32, route: &Route, rules: &Rules, now: u64) -> Admission {
        let mut inner = self.lock();
        let mut replaced = None;
        if let Some(flow) = inner.by_key.get(&route.key).cloned() {
            if flow.route.is_of_the_same(route) {
                self.hand_over(&mut inner, &flow, worker);
                return Admission::Adopted(flow);
            }
            self.end(&mut inner, &flow, worker);
            replaced = Some(flow);
        }
        let proxy = route.path.proxy().ip();
        let own = inner.of_proxy.get(&proxy);
        let all = [
            (own.map(|of| &**of), rules.per_proxy, Some(proxy)),
            (Some(&*inner.flows), rules.flows, None),
        ];
        for (flows, limit, of) in all {
            let Some(flows) = flows else { continue };
            if flows.iter().sum::<u32>() < limit.get() {
                continue;
            }
            // who has most gives most easily
            let most = (0u32..).zip(flows).max_by_key(|(_, flows)| **flows);
            match most {
                Some((owner, _)) if owner == worker => return Admission::Full(of),
                Some((owner, _)) if self.note(owner, Note::MakeRoom(of)) => {}
                _ => return Admission::Refused,
            }
        }
        let keeps_port = rules.port == PortPolicy::Keep && route.client.port() != 0;
        let (socket, moved, port_taken) = match keeps_port {
            true => self.pair(&mut inner, route, worker, now),
            false => (None, None, false),
        };
        let id = self.number << 32 | u64::from(inner.begun);
        inner.begun = inner.begun.wrapping_add(1);
        let flow = Flow::new(id, *route, worker, now, socket);
        if !port_taken && keeps_port {
            let pair = (route.client, route.target);
            inner.by_pair.insert(pair, Arc::clone(&flow));
        }
        inner.by_key.insert(route.key, Arc::clone(&flow));
        inner.count(&flow, worker, 1);
        Admission::Opened(Opened {
            flow,
            port_taken,
            moved,
            replaced,
        })
    }

    /// Ends a flow of a worker's; false when it is no longer its own.
    pub(super) fn release(&self, worker: u32, flow: &Arc<Flow>) -> bool {
        let mut inner = self.lock();
        let own = flow.owner() == worker;
        if own {
            self.end(&mut inner, flow, worker);
        }
        own
    }

    /// Notes that a flow's socket has another port than its client.
    pub(super) fn lost_port(&self, flow: &Arc<Flow>) {
        self.lock().forget_pair(flow);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // a panic inside would be a bug of this file; the maps are whole between their calls
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the socket of this client and target means for a new flow: the socket, whose it was, or that it
    /// stays where it is.
    fn pair(
        &self,
        inner: &mut Inner,
        route: &Route,
        worker: u32,
        now: u64,
    ) -> (Option<Arc<std::net::UdpSocket>>, Option<Arc<Flow>>, bool) {
        let Some(holder) = inner.by_pair.get(&(route.client, route.target)).cloned() else {
            return (None, None, false);
        };
        let same_proxy = holder.route.path.proxy().ip() == route.path.proxy().ip()
            && holder.route.asked == route.asked;
        if !same_proxy || now.saturating_sub(holder.used()) < MOVES_AFTER {
            return (None, None, true);
        }
        let socket = holder.take_socket();
        self.end(inner, &holder, worker);
        (socket, Some(holder), false)
    }

    /// Makes a flow another worker's.
    fn hand_over(&self, inner: &mut Inner, flow: &Arc<Flow>, worker: u32) {
        let before = flow.owner();
        if before == worker {
            return;
        }
        inner.count(flow, before, -1);
        inner.count(flow, worker, 1);
        flow.set_owner(worker);
        self.note(before, Note::Forget(Arc::clone(flow)));
    }

    /// Takes a flow out of everything; its worker is told unless it is the one that asks.
    fn end(&self, inner: &mut Inner, flow: &Arc<Flow>, asking: u32) {
        let owner = flow.owner();
        if owner == NOBODY {
            return;
        }
        flow.set_owner(NOBODY);
        inner.count(flow, owner, -1);
        inner.forget_pair(flow);
        if inner
            .by_key
            .get(&flow.route.key)
            .is_some_and(|known| Arc::ptr_eq(known, flow))
        {
            inner.by_key.remove(&flow.route.key);
        }
        inner.shrink();
        if owner != asking {
            self.note(owner, Note::Forget(Arc::clone(flow)));
        }
    }

    /// Leaves a note; false when the worker has too many.
    fn note(&self, worker: u32, note: Note) -> bool {
        let mailbox = &self.mailboxes[worker as usize];
        let mut notes = mailbox.notes();
        // a worker that is not told to forget a flow sees so when it next looks at it
        if notes.len() >= MAX_NOTES {
            return false;
        }
        notes.push(note);
        drop(notes);
        mailbox.wake();
        true
    }
}

impl Inner {
    fn count(&mut self, flow: &Flow, worker: u32, by: i32) {
        let worker = worker as usize;
        let workers = self.flows.len();
        let proxy = flow.route.path.proxy().ip();
        let of_proxy = self
            .of_proxy
            .entry(proxy)
            .or_insert_with(|| vec![0; workers].into());
        of_proxy[worker] = of_proxy[worker].saturating_add_signed(by);
        if of_proxy.iter().all(|flows| *flows == 0) {
            self.of_proxy.remove(&proxy);
        }
        self.flows[worker] = self.flows[worker].saturating_add_signed(by);
    }

    fn forget_pair(&mut self, flow: &Arc<Flow>) {
        let pair = (flow.route.client, flow.route.target);
        if self
            .by_pair
            .get(&pair)
            .is_some_and(|holder| Arc::ptr_eq(holder, flow))
        {
            self.by_pair.remove(&pair);
        }
    }

    /// A flood leaves no memory behind.
    fn shrink(&mut self) {
        const KEPT: usize = 1024;
        if self.by_key.is_empty() && self.by_key.capacity() > KEPT {
            self.by_key.shrink_to(KEPT);
            self.by_pair.shrink_to(KEPT);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::super::datagram::Client;
    use super::super::flow::Path;
    use super::*;

    /// A registry of two workers, asked under the same rules each time.
    struct Ruled {
        registry: Registry,
        rules: Rules,
    }

    impl Ruled {
        fn admit(&self, worker: u32, route: &Route, now: u64) -> Admission {
            self.registry.admit(worker, route, &self.rules, now)
        }
    }

    impl std::ops::Deref for Ruled {
        type Target = Registry;

        fn deref(&self) -> &Registry {
            &self.registry
        }
    }

    fn registry(flows: u32, per_proxy: u32) -> Ruled {
        Ruled {
            registry: Registry::new(2).unwrap(),
            rules: Rules {
                flows: NonZeroU32::new(flows).unwrap(),
                per_proxy: NonZeroU32::new(per_proxy).unwrap(),
                port: PortPolicy::Keep,
            },
        }
    }

    fn route(proxy: &str, client: &str) -> Route {
        let path = Path {
            peer: proxy.parse().unwrap(),
            local: None,
            port: 53,
        };
        let client = ClientAddr::new(client.parse().unwrap());
        let asked = SocketAddr::from(([198, 51, 100, 1], 53));
        Route {
            key: Key::of_client(&path, &Client::Named { client, asked }, false),
            path,
            client,
            target: TargetAddr::new(SocketAddr::from(([127, 0, 0, 1], 53))),
            asked: Some(asked),
            spp: None,
        }
    }

    fn opened(admission: Admission) -> Opened {
        match admission {
            Admission::Opened(opened) => opened,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_flow_that_the_kernel_hashes_elsewhere_moves() {
        let registry = registry(9, 9);
        let route = route("10.0.0.1:1", "192.0.2.1:5");
        let flow = opened(registry.admit(0, &route, 0)).flow;
        let adopted = registry.adopt(1, &route.key).unwrap();
        assert!(Arc::ptr_eq(&flow, &adopted));
        assert_eq!(flow.owner(), 1);
        assert!(matches!(registry.notes(0)[..], [Note::Forget(_)]));
        assert!(!registry.release(0, &flow));
        assert!(registry.release(1, &flow));
        assert!(registry.adopt(0, &route.key).is_none());
    }

    /// With a header on the first datagram only, and the target that the header names.
    #[test]
    fn a_client_that_asks_elsewhere_has_another_flow() {
        let registry = registry(9, 9);
        let route = route("10.0.0.1:1", "192.0.2.1:5");
        let old = opened(registry.admit(0, &route, 0)).flow;
        let elsewhere = SocketAddr::from(([198, 51, 100, 2], 53));
        let moved = Route {
            target: TargetAddr::new(elsewhere),
            ..route
        };
        // another target of the configuration's is no reason
        assert!(matches!(
            registry.admit(1, &moved, 0),
            Admission::Adopted(_)
        ));
        let moved = Route {
            asked: Some(elsewhere),
            ..moved
        };
        let new = opened(registry.admit(0, &moved, 0));
        assert!(Arc::ptr_eq(&new.replaced.unwrap(), &old));
        assert_eq!(new.flow.route.target, moved.target);
    }

    #[test]
    fn one_socket_per_client_and_target() {
        let registry = registry(9, 9);
        let first = opened(registry.admit(0, &route("10.0.0.1:1", "192.0.2.1:5"), 0));
        assert!(!first.port_taken);
        // at the same time from another port, and later from another proxy: both keep their own
        let second = opened(registry.admit(1, &route("10.0.0.1:2", "192.0.2.1:5"), 1));
        assert!(second.port_taken && second.moved.is_none());
        let third = opened(registry.admit(1, &route("10.0.0.2:1", "192.0.2.1:5"), 9_999));
        assert!(third.port_taken && third.moved.is_none());
        // after a pause from another port of the same proxy
        let fourth = opened(registry.admit(1, &route("10.0.0.1:3", "192.0.2.1:5"), MOVES_AFTER));
        assert!(Arc::ptr_eq(&fourth.moved.unwrap(), &first.flow));
        assert_eq!(first.flow.owner(), NOBODY);
        assert!(matches!(registry.notes(0)[..], [Note::Forget(_)]));
    }

    #[test]
    fn limits_are_kept_by_ending_the_oldest() {
        let registry = registry(3, 2);
        let first = opened(registry.admit(0, &route("10.0.0.1:1", "192.0.2.1:5"), 0)).flow;
        opened(registry.admit(0, &route("10.0.0.1:1", "192.0.2.2:5"), 0));
        let third = route("10.0.0.1:1", "192.0.2.3:5");
        let proxy = third.path.proxy().ip();
        assert!(matches!(
            registry.admit(0, &third, 0),
            Admission::Full(Some(of)) if of == proxy
        ));
        assert!(registry.release(0, &first));
        opened(registry.admit(0, &third, 0));
        // another proxy fills the relay, and then asks the worker that has most
        opened(registry.admit(1, &route("10.0.0.2:1", "192.0.2.4:5"), 0));
        opened(registry.admit(1, &route("10.0.0.2:1", "192.0.2.5:5"), 0));
        assert!(matches!(registry.notes(0)[..], [Note::MakeRoom(None)]));
    }

    #[test]
    fn a_worker_that_does_not_answer_gets_no_more() {
        let registry = registry(1, 1);
        opened(registry.admit(0, &route("10.0.0.1:1", "192.0.2.1:5"), 0));
        for _ in 0..2 * MAX_NOTES {
            if let Some(notes) = registry.mailboxes.first() {
                notes.notes().push(Note::MakeRoom(None));
            }
        }
        assert!(matches!(
            registry.admit(1, &route("10.0.0.1:2", "192.0.2.2:5"), 0),
            Admission::Refused
        ));
    }
}
