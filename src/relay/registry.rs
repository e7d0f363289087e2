//! The connections of one worker thread, as they can be asked for: the open ones, and a bounded memory
//! of those that ended.
//!
//! Owns: what is noted about a connection, and ending one from outside. Must not know: sockets.
//!
//! Nothing here is shared between threads: the thread writes plain cells as it relays and reads them when
//! a message asks. What is noted for every connection counts in the memory of an idle one; the text that
//! few proxies send is boxed, and there only when it was sent.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::header::{Endpoints, Header, Tlvs, Version};
use super::settings::Settings;
use super::view::{Connection, Ended, Filter, Reason, Stage};
use crate::model::{ClientAddr, InstanceName, Mark, ProxyAddr, TargetAddr};

/// How many connections that ended a thread remembers: under a megabyte, and minutes of a busy relay.
const REMEMBERED: usize = 4096;
/// What is kept of an authority; the DNS has no longer names.
const MAX_AUTHORITY: usize = 255;

/// The kernel's coarse monotonic clock in steps of 10 ms, which wraps after 497 days: a few nanoseconds to
/// read, hardly coarser than its tick (1 to 10 ms), and enough for ages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(u32);

impl Moment {
    /// Milliseconds.
    const STEP: u128 = 10;

    pub(super) fn now() -> Self {
        // the clock is there since Linux 2.6.32; without it every age is 0
        Self(
            clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(0, |now| {
                let now = Duration::from(now);
                (now.as_millis() / Self::STEP) as u32
            }),
        )
    }

    /// Milliseconds from an earlier moment to this one.
    pub(super) fn since(self, earlier: Self) -> u64 {
        u64::from(self.0.wrapping_sub(earlier.0)) * Self::STEP as u64
    }
}

/// An address and a port in 18 bytes: IPv4 is mapped, which [`ProxyAddr`] and [`ClientAddr`] never are.
#[derive(Debug, Clone, Copy)]
struct Packed {
    ip: [u8; 16],
    port: u16,
}

impl Packed {
    const NONE: Self = Self {
        ip: [0; 16],
        port: 0,
    };

    fn new(addr: SocketAddr) -> Self {
        let ip = match addr.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        Self {
            ip: ip.octets(),
            port: addr.port(),
        }
    }

    fn get(self) -> SocketAddr {
        SocketAddr::new(IpAddr::from(self.ip).to_canonical(), self.port)
    }

    /// A process of this host is its pid in `::/96` at port 0, where no TCP peer ever is.
    fn of_proxy(proxy: ProxyAddr) -> Self {
        match proxy {
            ProxyAddr::Inet(addr) => Self::new(addr),
            ProxyAddr::Local(pid) => Self {
                ip: u128::from(pid).to_be_bytes(),
                port: 0,
            },
        }
    }

    fn proxy(self) -> ProxyAddr {
        match u32::try_from(u128::from_be_bytes(self.ip)) {
            Ok(pid) if self.port == 0 => ProxyAddr::Local(pid),
            _ => ProxyAddr::new(self.get()),
        }
    }
}

/// What is known about one connection. Small on purpose: with its counts, an `Rc` of it fits the
/// allocator's size class of 112 bytes.
#[derive(Debug)]
pub(super) struct Entry {
    /// As they were when it was accepted: its target and mark stay.
    settings: Arc<Settings>,
    proxy: Packed,
    /// Means nothing before [`Stage::Connecting`].
    client: Cell<Packed>,
    bytes: Cell<(u64, u64)>,
    accepted: Moment,
    moved: Cell<Moment>,
    sent: OnceCell<Box<Sent>>,
    /// At which it was accepted; 0 on a Unix socket.
    port: u16,
    /// Where it stands in the registry's list.
    slot: Cell<u32>,
    /// The port of the socket towards the service; 0 as long as there is none.
    local_port: Cell<u16>,
    stage: Cell<Stage>,
    version: Cell<Option<Version>>,
    reason: Cell<Option<Reason>>,
    killed: Cell<bool>,
}

/// What some proxies send along.
#[derive(Debug)]
struct Sent {
    unique_id: Option<Box<[u8]>>,
    authority: Option<Box<str>>,
    /// The destination, where it is the target.
    asked: Option<TargetAddr>,
}

impl Entry {
    /// Where it goes, once the client is known.
    pub(super) fn target(&self) -> Option<TargetAddr> {
        if self.settings.destinations.is_some() {
            return self.sent.get()?.asked;
        }
        self.settings.target_at(self.client()?.family(), self.port)
    }

    pub(super) fn proxy(&self) -> ProxyAddr {
        self.proxy.proxy()
    }

    /// The port at which it was accepted; 0 on a Unix socket.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// The client, where the header named one already.
    pub(super) fn client(&self) -> Option<ClientAddr> {
        (self.stage.get() != Stage::Header).then(|| ClientAddr::new(self.client.get().get()))
    }

    /// The header is complete.
    pub(super) fn has_header(&self, header: &Header<'_>, client: ClientAddr) {
        self.client.set(Packed::new(client.get()));
        self.version.set(Some(header.version));
        self.stage.set(Stage::Connecting);
        let asked = match header.endpoints {
            Endpoints::Proxied { destination, .. } if self.settings.destinations.is_some() => {
                Some(TargetAddr::new(destination))
            }
            _ => None,
        };
        if let Some(sent) = sent(header.tlvs, asked) {
            // a connection has one header: the cell is empty
            let _ = self.sent.set(Box::new(sent));
        }
    }

    /// There is a socket towards the service.
    pub(super) fn is_connecting(&self, local_port: u16) {
        self.local_port.set(local_port);
    }

    /// The service answered; bytes of the first segment are with it already.
    pub(super) fn is_relaying(&self) {
        self.stage.set(Stage::Relaying);
        self.moved.set(Moment::now());
    }

    /// Bytes handed to the service and to the client.
    pub(super) fn bytes(&self) -> (u64, u64) {
        self.bytes.get()
    }

    /// Notes the bytes moved so far to the service and to the client. Reads the clock only on a change.
    #[inline]
    pub(super) fn moved(&self, bytes: (u64, u64)) {
        if bytes != self.bytes.get() {
            self.bytes.set(bytes);
            self.moved.set(Moment::now());
        }
    }

    /// Milliseconds since it was accepted.
    pub(super) fn age(&self) -> u64 {
        Moment::now().since(self.accepted)
    }

    /// Why it ended, or will.
    pub(super) fn reason(&self) -> Option<Reason> {
        self.reason.get()
    }

    /// Remembers why it ends; the first reason is the true one.
    pub(super) fn ends(&self, reason: Reason) {
        if self.reason.get().is_none() {
            self.reason.set(Some(reason));
        }
    }

    /// Whether somebody wants this connection to end.
    #[inline]
    pub(super) fn is_killed(&self) -> bool {
        self.killed.get()
    }

    fn row(&self, id: u64, now: Moment) -> Connection {
        let settings = &self.settings;
        let client = self.client();
        let (bytes_to_target, bytes_to_client) = self.bytes.get();
        let local = client
            .filter(|_| self.local_port.get() != 0)
            .map(|client| SocketAddr::new(client.ip(), self.local_port.get()));
        let sent = self.sent.get();
        Connection {
            id,
            instance: settings.name.to_string(),
            mark: settings.mark.map_or(0, Mark::get),
            stage: self.stage.get(),
            client: client.map(ClientAddr::get),
            proxy: self.proxy(),
            port: (self.port != 0).then_some(self.port),
            local,
            target: self.target().map(TargetAddr::get),
            age_ms: now.since(self.accepted),
            idle_ms: now.since(self.moved.get()),
            bytes_to_target,
            bytes_to_client,
            header: self.version.get().map(|version| match version {
                Version::V1 => 1,
                Version::V2 => 2,
            }),
            unique_id: sent.and_then(|sent| Some(printable(sent.unique_id.as_deref()?))),
            authority: sent.and_then(|sent| Some(sent.authority.as_deref()?.to_owned())),
            ended: None,
        }
    }
}

fn sent(tlvs: Tlvs<'_>, asked: Option<TargetAddr>) -> Option<Sent> {
    let unique_id = tlvs.unique_id().map(Box::from);
    let authority = tlvs.authority().map(|name| {
        let end = name.floor_char_boundary(MAX_AUTHORITY);
        Box::from(&name[..end])
    });
    (unique_id.is_some() || authority.is_some() || asked.is_some()).then_some(Sent {
        unique_id,
        authority,
        asked,
    })
}

/// An opaque identifier for people: HAProxy's are text, others' are binary.
fn printable(id: &[u8]) -> String {
    if !id.is_empty() && id.iter().all(u8::is_ascii_graphic) {
        return String::from_utf8_lossy(id).into_owned();
    }
    id.iter().fold("0x".to_owned(), |mut text, byte| {
        text.push_str(&format!("{byte:02x}"));
        text
    })
}

/// Connections that ended, of every relay on one thread, oldest first.
#[derive(Debug, Default)]
pub(super) struct Recent(RefCell<VecDeque<Past>>);

#[derive(Debug)]
struct Past {
    entry: Rc<Entry>,
    id: u64,
    at: Moment,
    reason: Reason,
}

impl Recent {
    fn push(&self, past: Past) {
        let mut all = self.0.borrow_mut();
        if all.len() == REMEMBERED {
            all.pop_front();
        }
        all.push_back(past);
    }

    /// Those of one instance that are meant. By name: a relay that took over from another is asked about
    /// its predecessor's connections too.
    pub(super) fn of(&self, instance: &InstanceName, filter: &Filter) -> Vec<Connection> {
        let now = Moment::now();
        let all = self.0.borrow();
        all.iter()
            .filter(|past| past.entry.settings.name == *instance)
            .map(|past| past.row(now))
            .filter(|row| filter.matches(row))
            .collect()
    }
}

impl Past {
    fn row(&self, now: Moment) -> Connection {
        Connection {
            age_ms: self.at.since(self.entry.accepted),
            idle_ms: self.at.since(self.entry.moved.get()),
            ended: Some(Ended {
                ago_ms: now.since(self.at),
                reason: self.reason.name().to_owned(),
            }),
            ..self.entry.row(self.id, now)
        }
    }
}

/// The open connections of one relay on one thread.
#[derive(Debug)]
pub(super) struct Registry {
    number: u64,
    next: Cell<u32>,
    open: RefCell<Vec<Open>>,
    left: Cell<Left>,
}

/// How many connections left, in a second that began at this moment and in the one before it.
#[derive(Debug, Clone, Copy)]
struct Left {
    since: Moment,
    now: u32,
    before: u32,
}

impl Left {
    const NOBODY: Self = Self {
        since: Moment(0),
        now: 0,
        before: 0,
    };

    /// As it is at a moment, before anybody leaves then.
    fn at(self, moment: Moment) -> Self {
        let before = match moment.since(self.since) {
            0..1000 => return self,
            1000..2000 => self.now,
            _ => 0,
        };
        Self {
            since: moment,
            now: 0,
            before,
        }
    }
}

#[derive(Debug)]
struct Open {
    entry: Rc<Entry>,
    number: u32,
    /// Wakes the connection's task to find that it is killed.
    waker: Option<Waker>,
}

/// The upper half of the numbers that a relay gives its connections or flows, once.
pub(super) fn next_number() -> u64 {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            number: next_number(),
            next: Cell::new(0),
            open: RefCell::default(),
            left: Cell::new(Left::NOBODY),
        }
    }
}

impl Registry {
    /// A connection was accepted.
    pub(super) fn enter(&self, proxy: ProxyAddr, port: u16, settings: Arc<Settings>) -> Rc<Entry> {
        let mut open = self.open.borrow_mut();
        let number = self.next.get();
        self.next.set(number.wrapping_add(1));
        let now = Moment::now();
        let entry = Rc::new(Entry {
            settings,
            proxy: Packed::of_proxy(proxy),
            port,
            client: Cell::new(Packed::NONE),
            bytes: Cell::new((0, 0)),
            accepted: now,
            moved: Cell::new(now),
            sent: OnceCell::new(),
            // descriptors run out long before
            slot: Cell::new(open.len() as u32),
            local_port: Cell::new(0),
            stage: Cell::new(Stage::Header),
            version: Cell::new(None),
            reason: Cell::new(None),
            killed: Cell::new(false),
        });
        open.push(Open {
            entry: Rc::clone(&entry),
            number,
            waker: None,
        });
        entry
    }

    /// Makes sure that [`Registry::kill`] finds the task of a connection.
    pub(super) fn woken_by(&self, entry: &Entry, waker: &Waker) {
        if let Some(open) = self.open.borrow_mut().get_mut(entry.slot.get() as usize) {
            open.waker = Some(waker.clone());
        }
    }

    fn id(&self, number: u32) -> u64 {
        self.number << 32 | u64::from(number)
    }

    /// A connection is over. Remembered when it named a client: others answer no question.
    pub(super) fn leave(&self, entry: &Rc<Entry>, recent: &Recent) {
        let at = Moment::now();
        let mut left = self.left.get().at(at);
        left.now = left.now.saturating_add(1);
        self.left.set(left);
        let mut open = self.open.borrow_mut();
        let slot = entry.slot.get() as usize;
        // with its waker, which keeps the task's memory
        let number = open.swap_remove(slot).number;
        if let Some(moved) = open.get(slot) {
            moved.entry.slot.set(slot as u32);
        }
        // the list gives memory back after a rush, not at every swing
        if open.len() < open.capacity() / 4 && open.capacity() > 64 {
            let half = open.capacity() / 2;
            open.shrink_to(half);
        }
        if entry.client().is_some() {
            recent.push(Past {
                entry: Rc::clone(entry),
                id: self.id(number),
                at,
                reason: entry.reason.get().unwrap_or(Reason::Cut),
            });
        }
    }

    /// How many connections left within the last second or two.
    pub(super) fn left_lately(&self) -> u64 {
        let left = self.left.get().at(Moment::now());
        u64::from(left.now) + u64::from(left.before)
    }

    /// The open connections that are meant.
    pub(super) fn open(&self, filter: &Filter) -> Vec<Connection> {
        self.each(filter, |_| {})
    }

    /// Ends the open connections that are meant, when their tasks come round, and returns them.
    pub(super) fn kill(&self, filter: &Filter) -> Vec<Connection> {
        self.each(filter, |open| {
            open.entry.killed.set(true);
            if let Some(waker) = &open.waker {
                waker.wake_by_ref();
            }
        })
    }

    fn each(&self, filter: &Filter, act: impl Fn(&Open)) -> Vec<Connection> {
        let now = Moment::now();
        let open = self.open.borrow();
        open.iter()
            .filter_map(|one| {
                let row = one.entry.row(self.id(one.number), now);
                filter.matches(&row).then(|| {
                    act(one);
                    row
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_small() {
        // with the two counts of the Rc
        assert!(size_of::<Entry>() + 16 <= 112, "{}", size_of::<Entry>());
    }

    #[test]
    fn packed_addresses_come_out_as_they_were() {
        for text in [
            "192.0.2.7:0",
            "0.0.0.0:1",
            "[::]:65535",
            "[2001:db8::7]:40000",
        ] {
            let addr: SocketAddr = text.parse().unwrap();
            assert_eq!(Packed::new(addr).get(), addr);
        }
    }

    #[test]
    fn packed_proxies_come_out_as_they_were() {
        for text in [
            "192.0.2.7:1",
            "[::1]:1",
            "[2001:db8::7]:40000",
            "unix:0",
            "unix:4711",
        ] {
            let proxy: ProxyAddr = text.parse().unwrap();
            assert_eq!(Packed::of_proxy(proxy).proxy(), proxy);
        }
    }

    #[test]
    fn who_left_is_forgotten_after_two_seconds() {
        let at = |ms: u32| Moment(u32::MAX - 50).0.wrapping_add(ms / 10);
        let left = Left {
            since: Moment(at(0)),
            now: 7,
            before: 3,
        };
        let seen = |ms| {
            let left = left.at(Moment(at(ms)));
            (left.now, left.before)
        };
        assert_eq!(seen(990), (7, 3));
        assert_eq!(seen(1000), (0, 7));
        assert_eq!(seen(1990), (0, 7));
        assert_eq!(seen(2000), (0, 0));
    }

    #[test]
    fn ages_survive_the_wrap() {
        assert_eq!(Moment(5).since(Moment(u32::MAX - 4)), 100);
    }
}
